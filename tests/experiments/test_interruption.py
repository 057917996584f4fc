"""Runs in processes of their own that are killed, stopped and broken."""

import json
import random
import signal
import time

import numpy as np
import pytest

SLOW = ("--pause", "0.02")


def finish(process, code=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


def wait_for_step(process, workdir, step):
    path, deadline = workdir / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        rows = path.read_text().splitlines() if path.exists() else []
        if any(f'"step": {i},' in row for row in rows for i in (step, step + 1, step + 2, step + 3, step + 4)):
            return
        time.sleep(0.01)
    raise AssertionError(f"no row of step {step} appeared: {process.communicate()}")


def assert_same(workdir, reference):
    assert (workdir / "metrics.jsonl").read_text() == (reference / "metrics.jsonl").read_text()
    ours, theirs = np.load(workdir / "final.npz"), np.load(reference / "final.npz")
    for name in theirs.files:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reference")
    finish(start("run", "toy", *SLOW, "--workdir", workdir, cwd=workdir.parent))
    return workdir


def test_kill_minus_nine_leaves_no_trace_in_the_result(start, reference, tmp_path):
    step = random.randrange(5, 55)
    process = start("run", "toy", *SLOW, "--workdir", tmp_path, cwd=tmp_path)
    wait_for_step(process, tmp_path, step)
    process.kill()
    assert process.wait() == -signal.SIGKILL, f"the run ended before step {step}"
    assert not (tmp_path / "final.npz").exists()
    finish(start("run", "toy", *SLOW, "--workdir", tmp_path, cwd=tmp_path))
    assert_same(tmp_path, reference)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_says_how_to_resume_and_exits_0(start, reference, tmp_path, number):
    process = start("run", "toy", *SLOW, "--workdir", tmp_path, cwd=tmp_path)
    wait_for_step(process, tmp_path, 10)
    process.send_signal(number)
    _, err = finish(process)
    assert "the state is saved; the same command resumes: janax run toy --pause 0.02" in err
    if number == signal.SIGTERM:  # the other one resumes the same way
        _, err = finish(start("run", "toy", *SLOW, "--workdir", tmp_path, cwd=tmp_path))
        assert "resuming at step" in err
        assert_same(tmp_path, reference)


def test_second_ctrl_c_leaves_at_once(start, tmp_path):
    process = start("run", "toy", "--pause", "5", "--workdir", tmp_path, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "status.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, code=130)
    assert time.monotonic() - begun < 4.0 and "Left at once" in err


def test_a_bad_loss_is_one_sentence_and_exit_3(start, tmp_path):
    _, err = finish(start("run", "toy", "--break-at", "33", "--workdir", tmp_path, cwd=tmp_path), code=3)
    line = err.splitlines()[-1]
    assert line.startswith("janax: linear: the loss or its gradient was not finite at step 34; the last good checkpoint is step 20")
    assert "Traceback" not in err
