"""A run directory and all that goes with it: who may write there, how the run ends, what the terminal shows.

    with session.open_session("bdia", config, workdir, preset="default") as run:
        for seed in run.track(range(5), "seeds"):
            value = run.memo(f"fid-{seed}", lambda: float(evaluate(seed)))

A directory holds config.json, status.json, metrics.jsonl, tensorboard/, checkpoints/, memo/, figures/, results.json and report.html.
"""

import contextlib
import dataclasses
import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from janax.experiments import config as configs
from janax.experiments import processes
from janax.experiments.errors import NonFiniteError, StoppedError, UserError

__all__ = ["ProgressLine", "Session", "check_workdir", "in_terms_of", "is_finished", "open_session"]

T = TypeVar("T")

_QUIET_SECONDS = 30.0
_SHARED_SECONDS = 20.0


def is_finished(workdir: Path) -> bool:
    """Whether the run in this directory came to its end."""
    status = workdir / "status.json"
    return status.exists() and configs.read_json(status).get("state") == "finished"


@dataclasses.dataclass
class Session:
    """What an experiment's `run(config, session)` is given.

    With several processes all of them call its methods, in the same order; process 0 alone writes and speaks.

    Attributes:
      name: The experiment's.
      preset: The preset the configuration came from.
      config: The resolved configuration.
      workdir: The run directory.
      console: Where text goes; standard error, so that standard output stays free for results.
      is_main: Whether this process writes files and speaks: process 0 of several, else the only one.
    """

    name: str
    preset: str
    config: Any
    workdir: Path
    console: Console
    is_main: bool = True
    _stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    _started: float = dataclasses.field(default_factory=time.monotonic)
    _seconds_before: float = 0.0
    _elsewhere: Path | None = None

    @property
    def stop_requested(self) -> bool:
        """Whether Ctrl-C or SIGTERM asked this process to end; `training.fit` then saves and leaves, in all processes."""
        return self._stop.is_set()

    def request_stop(self) -> None:
        """Asks the run to end at the next step, as a signal does."""
        self._stop.set()

    def check_stop(self) -> None:
        """Raises StoppedError if the run was asked to end, in any process; call it between pieces of long work that is not training."""
        if processes.anyone(self._stop.is_set()):
            raise StoppedError("stopped between two pieces of work; what was finished is kept")

    @property
    def seconds(self) -> float:
        """Wall time of this run, over all its resumptions."""
        return self._seconds_before + time.monotonic() - self._started

    def say(self, message: str) -> None:
        """One line for the reader, from process 0 only."""
        if self.is_main:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def figure_path(self, name: str) -> Path:
        """Path of a picture, "samples.png", in the run's figures/ directory, which is made; not in process 0: a path that is thrown away."""
        path = (self.workdir if self._elsewhere is None else self._elsewhere) / "figures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def memo(self, name: str, compute: Callable[[], T], *, alone: bool = False) -> T:
        """The result of `compute`, kept on disk: a resumed run reads it instead of computing it again.

        Args:
          name: Name of the result, unique within the run.
          compute: Returns JSON values (numbers, strings, lists, dictionaries with string keys); tuples come back as lists.
          alone: Of several processes only process 0 computes: for work on local arrays, which the others need not repeat, and which neither
            communicates nor asks this session for `memo` or `track`.

        Returns:
          The value as JSON gives it back, the first time as well; that of process 0 in all processes.

        Raises:
          StoppedError: if the run was asked to end and the value is not there yet.
        """
        path = self.workdir / "memo" / f"{name.replace('/', '-')}.json"
        if not processes.agreed(path.exists()):
            self.check_stop()
            if not alone:
                value = compute()
                return processes.from_main(lambda: _keep(path, value))
            return processes.from_main(lambda: _keep(path, compute()))
        return processes.from_main(lambda: configs.read_json(path)["value"])

    def track(self, items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
        """Iterates with a progress bar and stops between two items if the run was asked to.

        Raises:
          StoppedError: between two items, after Ctrl-C or SIGTERM.
        """
        length = len(items) if total is None and isinstance(items, Sequence) else total
        with self.progress(description, length) as line:
            for done, item in enumerate(items):
                self.check_stop()
                yield item
                line.update(done + 1)

    @contextlib.contextmanager
    def progress(self, description: str, total: int | None, *, unit: str = "it", start: int = 0) -> Iterator["ProgressLine"]:
        """A progress bar with rate and time left; where there is no terminal, a line now and then."""
        line = ProgressLine(self, description, total, unit=unit, start=start)
        try:
            yield line
        finally:
            line.close()

    def save_status(self, state: str, message: str = "") -> None:
        """Writes status.json: "running", "stopped", "failed" or "finished", with the wall time so far."""
        if self.is_main:
            configs.write_json(self.workdir / "status.json", {"state": state, "message": message, "seconds": round(self.seconds, 1)})


def _keep(path: Path, value: Any) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    configs.write_json(path, {"value": value})
    return configs.read_json(path)["value"]


class ProgressLine:
    """One bar of `Session.progress`. `update(done, note)` is cheap enough for every step: it looks at the clock and mostly returns."""

    def __init__(self, session: Session, description: str, total: int | None, *, unit: str, start: int):
        self._session, self._description, self._total, self._unit = session, description, total, unit
        self._start, self._began = start, time.monotonic()
        self._next = self._began + (0.1 if session.console.is_terminal else _QUIET_SECONDS)
        self._bar: Progress | None = None
        if session.is_main and session.console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(20),
                MofNCompleteColumn(),
                _Rate(unit),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=session.console, transient=True)
            self._task = self._bar.add_task(description, total=total, completed=start, note="")
            self._bar.start()

    def update(self, done: int, note: Callable[[], str] | None = None) -> None:
        """Shows that `done` of the total are done; `note` is only called when something is drawn."""
        now = time.monotonic()
        if now < self._next:
            return
        text = note() if note is not None else ""
        if self._bar is not None:
            self._next = now + 0.1
            self._bar.update(self._task, completed=done, note=text)
            return
        self._next = now + _QUIET_SECONDS
        rate = (done - self._start) / max(now - self._began, 1e-9)
        share = f"{done}" if self._total is None else f"{done}/{self._total}"
        left = "" if self._total is None or rate <= 0 else f", {_duration((self._total - done) / rate)} left"
        self._session.say(f"{self._description}: {share}, {rate:.3g} {self._unit}/s{left}{', ' + text if text else ''}")

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()


class _Rate(ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self._unit = unit

    def render(self, task: Any) -> Text:
        return Text("" if not task.speed else f"{task.speed:.3g} {self._unit}/s", style="progress.data.speed")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextlib.contextmanager
def in_terms_of(option: str, given: Path, workdir: Path) -> Iterator[None]:
    """Within, errors of the run directory name the option and the directory that the user gave instead of --workdir."""
    try:
        yield
    except (UserError, NonFiniteError) as error:
        message = str(error).replace(f"--workdir {workdir}", f"{option} {given}").replace("--workdir", option)
        raise type(error)(message) from error


@contextlib.contextmanager
def open_session(
    name: str,
    config: Any,
    workdir: Path,
    *,
    preset: str = "default",
    console: Console | None = None,
    signals: bool = True,
) -> Iterator[Session]:
    """Opens a run directory, new or to be resumed, and keeps its status.

    Args:
      name: The experiment's name.
      config: The resolved configuration, a frozen dataclass.
      workdir: Made if it is not there.
      preset: Name of the preset `config` was built from.
      console: Where to write; standard error by default.
      signals: Turn SIGTERM and the first Ctrl-C into a request to stop; the second Ctrl-C leaves at once. Main thread only.

    Returns:
      A context manager that gives the session.

    Raises:
      UserError: if the directory cannot be used, holds another configuration, or another process is writing to it.
    """
    processes.from_main(lambda: _prepare(workdir))
    import jax  # late: an unusable directory is told at once

    if jax.process_count() > 1 and not processes.started():
        raise UserError(f"JAX finds {jax.process_count()} processes here; start all of them with --distributed")
    mine = {"experiment": name, "config": configs.to_dict(config)}
    theirs = processes.from_main(lambda: mine)
    processes.together(lambda: _check_same(mine, theirs))
    console = Console(stderr=True) if console is None else console
    is_main = jax.process_index() == 0
    with contextlib.ExitStack() as stack:

        def claim() -> dict[str, Any]:
            stack.enter_context(_lock(workdir))
            fresh = not (workdir / "config.json").exists()
            _match_config(name, config, workdir, preset)
            return {"fresh": fresh, "mark": _mark(workdir)}

        claimed = processes.from_main(claim)
        fresh = claimed["fresh"] and is_main
        try:
            processes.together(lambda: _check_shared(workdir, claimed["mark"]))
        except UserError:
            if fresh:
                _forget(workdir)
            raise
        finally:
            if is_main and claimed["mark"]:
                (workdir / claimed["mark"]).unlink(missing_ok=True)
        status = workdir / "status.json"
        before = float(configs.read_json(status).get("seconds", 0.0)) if is_main and status.exists() else 0.0
        session = Session(name=name, preset=preset, config=config, workdir=workdir, console=console, is_main=is_main)
        session._seconds_before = before
        if not is_main:
            session._elsewhere = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="janax-")))
        if signals and threading.current_thread() is threading.main_thread():
            stack.enter_context(_signals(session))
        session.save_status("running")
        try:
            yield session
        except StoppedError as stop:
            session.save_status("stopped", str(stop))
            raise
        except NonFiniteError as failure:
            session.save_status("failed", str(failure))
            raise
        except UserError as mistake:
            session.save_status("failed", str(mistake))
            if fresh:
                _forget(workdir)
            raise
        except BaseException as error:
            session.save_status("failed", f"{type(error).__name__}: {error}"[:500])
            raise
        session.save_status("finished")


def _prepare(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        entries = {entry.name for entry in workdir.iterdir() if not entry.name.startswith(".")}
        probe = workdir / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"--workdir {workdir} cannot be used: {reason}; choose a directory you may write to") from error
    if entries and "config.json" not in entries:
        raise UserError(f"--workdir {workdir} is not empty and holds no janax run (no config.json); choose another directory")


def _forget(workdir: Path) -> None:
    """Removes the record of a run that never began, so that the mended command finds the directory as it was."""
    if {entry.name for entry in workdir.iterdir() if not entry.name.startswith(".")} <= {"config.json", "status.json"}:
        for name in ("config.json", "status.json"):
            (workdir / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(workdir: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    with (workdir / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another janax process is writing to {workdir}; wait for it, or choose another --workdir") from error
        yield


def _mark(workdir: Path) -> str:
    """The name of an empty file by which other processes see that they share the directory; none if there are no others."""
    if processes.count() == 1:
        return ""
    path = workdir / f".mark.{uuid.uuid4().hex}"
    path.touch()
    return path.name


def _check_shared(workdir: Path, mark: str) -> None:
    deadline = time.monotonic() + _SHARED_SECONDS  # a network file system may take a while to show a new file
    while mark and not (workdir / mark).exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"--workdir {workdir} of process {processes.index()} is not that of process 0; choose a directory on a file system that "
                f"all hosts share"
            )
        time.sleep(0.2)


def _check_same(mine: dict[str, Any], main: dict[str, Any]) -> None:
    changed = configs.differences(main, mine)
    if changed:
        field, (theirs, ours) = next(iter(changed.items()))
        raise UserError(
            f"process {processes.index()} has {field.removeprefix('config.')} {_shown(ours)} and process 0 {_shown(theirs)}; "
            f"start all with the same command"
        )


def _match_config(name: str, config: Any, workdir: Path, preset: str) -> None:
    path = workdir / "config.json"
    if not path.exists():
        new = configs.to_dict(config)
        seed = configs.flatten(new).get("train.seed", configs.flatten(new).get("seed"))
        record = {"experiment": name, "preset": preset, "seed": seed, "config": new, **configs.environment()}
        configs.write_json(path, record)
        return
    check_workdir(name, config, workdir)


def check_workdir(name: str, config: Any, workdir: Path) -> None:
    """Raises UserError if `workdir` holds a run of another experiment or configuration; a directory without a run passes."""
    path = workdir / "config.json"
    try:
        there = path.exists()
    except OSError:
        return  # said better when the directory is opened
    if not there:
        return
    record = configs.read_json(path)
    if record.get("experiment") != name:
        raise UserError(f"--workdir {workdir} holds a run of {record.get('experiment')!r}, not of {name!r}; choose another directory")
    changed = configs.differences(record.get("config", {}), configs.to_dict(config))
    if changed:
        field, (old, new) = next(iter(changed.items()))
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"--workdir {workdir} holds a run with {field} {_shown(old)}, not {_shown(new)}{more}; "
            f"set it back to resume, choose another --workdir, or delete the directory"
        )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


@contextlib.contextmanager
def _signals(session: Session) -> Iterator[None]:
    def handle(number: int, frame: FrameType | None) -> None:
        if session.stop_requested and number == signal.SIGINT:
            os.write(2, b"\nLeft at once; the last checkpoint is kept.\n")
            os._exit(130)
        session.request_stop()
        # os.write, not the console: a handler may interrupt the console while it holds its lock.
        os.write(2, b"\nStopping after this step; Ctrl-C once more leaves at once.\n")

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, handle) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, previous):
            signal.signal(number, old)
