"""Arguments of the command line: the experiment's name, its fields, and mistakes told in one sentence that names the nearest right one."""

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from janax.experiments.errors import UserError

__all__ = [
    "Answered",
    "check_fields",
    "experiment_name",
    "flags",
    "nearest",
    "needs",
    "parse",
    "parse_experiment",
    "preset_of",
    "take",
    "without",
]


class Answered(Exception):
    """Help was printed; nothing is left to do."""


def nearest(word: str, words: Sequence[str]) -> str:
    """A hint at the word that was meant, with all there are."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    listed = ", ".join(words)
    return f"did you mean {close[0]!r}? There are: {listed}" if close else f"choose one of: {listed}"


def experiment_name(argv: list[str], command: str, valued: tuple[str, ...]) -> str | None:
    """The first argument that is neither an option nor an option's value; None if help for the command itself is asked for."""
    rest = list(argv)
    for option in valued:
        _, rest = take(rest, option)
    if rest and not rest[0].startswith("-"):
        return rest[0]
    if {"-h", "--help"} & set(rest):
        return None
    raise UserError(f"{command} needs the name of an experiment before its fields; `janax list` shows them")


def take(argv: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of `--option value` or `--option=value` (the last one), and the arguments without it."""
    value, rest, i = None, [], 0
    while i < len(argv):
        if argv[i] == option:
            if i + 1 == len(argv):
                raise UserError(f"{option} needs a value; see --help")
            value, i = argv[i + 1], i + 2
        elif argv[i].startswith(option + "="):
            value, i = argv[i][len(option) + 1 :], i + 1
        else:
            rest.append(argv[i])
            i += 1
    return value, rest


def without(argv: list[str], name: str) -> list[str]:
    """The arguments without the experiment's name: the first that equals it and is no option's value."""
    for i, token in enumerate(argv):
        if token == name and (i == 0 or argv[i - 1] not in ("--preset", "--workdir", "--topology", "--json")):
            return argv[:i] + argv[i + 1 :]
    return argv


def preset_of(module: Any, name: str, preset: str) -> Any:
    """The experiment's configuration of that name; UserError if it has none."""
    if preset not in module.PRESETS:
        raise UserError(f"--preset: experiment {name!r} has no preset {preset!r}; {nearest(preset, tuple(module.PRESETS))}")
    return module.PRESETS[preset]


def parse_experiment(module: Any, name: str, command: str, argv: list[str], *, preset: str) -> Any:
    """Options of the command and fields of the experiment's configuration, with the chosen preset's values as defaults."""
    import tyro

    chosen, _ = take(argv, "--preset")
    preset = preset if chosen is None else chosen
    default = preset_of(module, name, preset)
    own: list[tuple[str, Any, Any]] = [("preset", Annotated[str, tyro.conf.arg(help=f"One of {', '.join(module.PRESETS)}.")], preset)]
    if command == "run":
        help_text = f"Run directory; runs/{name}-PRESET if none is given. The same directory resumes."
        own.append(("workdir", Annotated[Path | None, tyro.conf.arg(help=help_text)], None))
        help_text = "This is one of several processes, all started with the same command; they share the directory."
        own.append(("distributed", Annotated[bool, tyro.conf.arg(help=help_text), tyro.conf.FlagCreatePairsOff], False))
    else:
        help_text = "Chip and shape of the slice: v5e:16x16, v5p:4x4x4, v6e:8x8, v4:2x2x4, h100:2x8. Several are compiled in turn."
        own.append(("topology", Annotated[tuple[str, ...], tyro.conf.arg(help=help_text)], ("v5e:16x16",)))
        own.append(("json", Annotated[Path | None, tyro.conf.arg(help="File to write all figures to.")], None))
    fields = [(field, kind, dataclasses.field(default=value)) for field, kind, value in own]
    options = dataclasses.make_dataclass(
        "Options",
        [*fields, ("config", Annotated[module.Config, tyro.conf.arg(name="")], dataclasses.field(default=default))],
        frozen=True,
    )
    check_fields(argv, (*(f"--{field}" for field, _, _ in own), *flags(default)), f"{command} {name}")
    description = f"{module.SUMMARY}\n\nPresets: {', '.join(module.PRESETS)}; the values shown are those of {preset!r}."
    return parse(options, argv, prog=f"janax {command} {name}", description=description)


def flags(config: Any, prefix: str = "") -> list[str]:
    """The option of every field, as tyro spells it."""
    names = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            names += flags(value, f"{prefix}{name}.")
        else:
            names.append(f"--{prefix}{name}")
            names += [f"--{prefix}no-{name}"] if isinstance(value, bool) else []
    return names


def check_fields(argv: list[str], known: Sequence[str], command: str) -> None:
    """Raises UserError for an option that is not among the known ones, with the nearest that is."""
    for token in argv:
        option = token.partition("=")[0]
        if not option.startswith("--") or option == "--help" or option.replace("_", "-") in known:
            continue
        last = option.rpartition(".")[2].removeprefix("--").replace("_", "-")
        same_name = [name for name in known if name.rpartition(".")[2].removeprefix("--") == last]
        close = same_name or difflib.get_close_matches(option.replace("_", "-"), known, n=1, cutoff=0.5)
        if not close:
            close = [name for name in known if difflib.get_close_matches(last, [name.rpartition(".")[2].removeprefix("--")], cutoff=0.6)]
        hint = f"did you mean {close[0]}?" if close else "there is none like it;"
        raise UserError(f"there is no field {option}; {hint} `janax {command} --help` lists them")


def parse(kind: Any, argv: list[str], *, prog: str, description: str) -> Any:
    """Parses with tyro, whose framed complaints become one sentence."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=argv, prog=prog, description=description)
    except SystemExit as end:
        if not end.code:
            raise Answered from None
        raise UserError(_one_sentence(said.getvalue(), prog)) from None
    except ValueError as error:  # from the __post_init__ of the experiment's own dataclass
        raise UserError(str(error)) from error


_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_RULE = re.compile(r"[-─]+")


def _one_sentence(framed: str, prog: str) -> str:
    """The first paragraph under the title of tyro's frame, which is drawn with box characters or, where those cannot be shown, blanks."""
    body: list[str] = []
    for line in framed.strip().splitlines()[1:]:
        text = _COLOR.sub("", line).strip().strip("│╭╮╰╯").strip()
        if text and not _RULE.fullmatch(text):
            body.append(text)
        elif body:
            break
    text = " ".join(body).rstrip(".")
    match = re.match(r"Error parsing (\S+): (.*)", text)
    if match is None:
        text = (text[:1].lower() + text[1:]).replace(". ", "; ")
        return f"{text or 'the arguments were not understood'}; see `{prog} --help`"
    field, message = match.groups()
    if not field.startswith("--"):
        return message  # from a __post_init__, which names the field itself
    wanted = {"invalid literal for int": "an integer", "could not convert string to float": "a number"}
    for start, noun in wanted.items():
        if message.startswith(start):
            return f"{field} must be {noun}, got {message.rpartition(': ')[2]}; see `{prog} --help`"
    return f"{field}: {message}; see `{prog} --help`"


def needs(argv: list[str], command: str, options: Sequence[str], known: Sequence[str]) -> None:
    """Raises UserError for options that are not there, or not known."""
    check_fields(argv, known, command)
    given = {token.partition("=")[0] for token in argv}
    missing = [option for option in options if option not in given]
    if missing and not {"-h", "--help"} & given:
        raise UserError(f"{command} needs {', '.join(missing)}; see `janax {command} --help`")
