"""Two processes of four CPU devices each as one run, beside one process of eight."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from janax.experiments import report
from janax.experiments.metrics import read_rows

STEPS = ("--train.num-steps", "40", "--train.checkpoint-every", "10", "--optimizer.warmup-steps", "5", "--pause", "0.1")
WAIT = 300
JANAX = ("-m", "janax.experiments.cli")
GOLDEN_DIT = Path(__file__).resolve().parents[1] / "golden" / "dit"


def finish(processes, code=0, limit=WAIT):
    """What all processes said on standard error, without the line about their meeting."""
    said = []
    for process in processes:
        _, err = process.communicate(timeout=limit)
        assert process.returncode == code, err
        said.append([line for line in err.splitlines() if line and "meeting the others" not in line])
    return said


def wait_for_step(processes, workdir, step):
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if any(row["step"] >= step for row in read_rows(workdir / "metrics.jsonl")):
            return
        time.sleep(0.05)
    ended = [process.communicate() for process in processes if process.poll() is not None]
    raise AssertionError(f"no row of step {step} appeared: {ended}")


def stopped_at(workdir):
    status = json.loads((workdir / "status.json").read_text())
    assert status["state"] == "stopped"
    return int(status["message"].split("stopped at step ")[1].split()[0])


def assert_close(workdir, reference):
    """The same rows and the same weights; sums over devices in another order differ by roundings, a few 1e-7 a step."""
    ours, theirs = read_rows(workdir / "metrics.jsonl"), read_rows(reference / "metrics.jsonl")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    np.testing.assert_allclose([row["loss"] for row in ours], [row["loss"] for row in theirs], rtol=1e-5)
    with np.load(workdir / "final.npz") as mine, np.load(reference / "final.npz") as other:
        for name in other.files:
            np.testing.assert_allclose(mine[name], other[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_functions_in_two_processes(pair, tmp_path):
    """What is asserted here is computed by two.py."""
    found = []
    for process in pair(tmp_path / "run", cwd=tmp_path, script=(Path(__file__).with_name("two.py"),)):
        out, err = process.communicate(timeout=WAIT)
        assert process.returncode == 0, err
        found.append(json.loads(out.splitlines()[-1]))
    for me, seen in enumerate(found):
        assert seen["count"] == 2 and seen["together"]
        assert seen["agreements"] == {
            "anyone": [True, False],
            "agreed": [True, False],
            "from_main": 0,
            "user": "UserError: wrong",
            "other": "RuntimeError: process 0 failed with KeyError: 'lost'" if me else "KeyError: 'lost'",
            "together": "UserError: only here",
            "fine": None,
        }
        rows = list(range(8)) if me == 0 else list(range(8, 16))
        assert seen["placement"] == {"w": True, "split": True, "n": 3.0, "key": True, "rows": rows, "all_rows": 16}
        assert seen["batches"]["rows"] == [row for row in range(16) if row // 2 % 2 == me]
        assert seen["batches"]["whole"] == seen["batches"]["share"] == found[0]["batches"]["whole"]
        assert "has 5 rows, expected 16 or the 8 of this process's devices" in seen["batches"]["wrong"]
        assert seen["votes"] == found[0]["votes"] and 40 < seen["votes"]["heard"][0] < 4000
        assert "stopped between two pieces of work" in seen["stops"]["error"] and seen["stops"]["done"] == [0, 1, 2]
        calls = ["everywhere"] if me else ["everywhere", "alone"]
        assert seen["memos"] == {"values": [[0, 2.5], 0, 0], "calls": calls, "inside": me == 0, "there": True}
    assert (tmp_path / "run" / "figures" / "picture.png").read_text() == "0"


@pytest.mark.slow
def test_two_one_and_two_processes_end_where_one_does(start, pair, tmp_path):
    """Stopped in one of two processes, resumed and stopped in one alone, resumed in two: the losses of an uninterrupted run."""
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    alone = start("run", "toy", *STEPS, "--workdir", reference, cwd=tmp_path, devices=8)
    finish([alone])
    command = ("run", "toy", *STEPS, "--workdir", workdir)

    both = pair(*command, "--distributed", cwd=tmp_path)
    wait_for_step(both, workdir, 5)
    both[1].send_signal(signal.SIGTERM)
    main, other = finish(both)
    first = stopped_at(workdir)
    assert 5 < first < 40
    assert [line for line in main if line.startswith("janax:")] == [
        f"janax: linear stopped at step {first} of 40; the state is saved; the same command resumes: "
        f"janax {' '.join(map(str, command))} --distributed"
    ]
    assert other == ["Stopping after this step; Ctrl-C once more leaves at once."]

    alone = start(*command, cwd=tmp_path, devices=8)
    wait_for_step([alone], workdir, first + 1)
    alone.send_signal(signal.SIGTERM)
    (said,) = finish([alone])
    assert f"linear: resuming at step {first} of 40" in said
    second = stopped_at(workdir)
    assert first < second < 40

    main, other = finish(pair(*command, "--distributed", cwd=tmp_path))
    assert f"linear: resuming at step {second} of 40" in main and other == []
    assert_close(workdir, reference)


def test_run_all_is_written_and_told_by_process_0(pair, tmp_path):
    both = pair("run", "all", "--preset", "smoke", "--workdir", "runs", "--distributed", cwd=tmp_path)
    (out, err), (other_out, other_err) = (process.communicate(timeout=WAIT) for process in both)
    assert [process.returncode for process in both] == [0, 0], err + other_err
    assert out.count("report: runs/toy-smoke/report.html") == out.count("report of all: runs/report-smoke.html") == 1
    assert "report" not in other_out and [line for line in other_err.splitlines() if "meeting" not in line] == []
    run = tmp_path / "runs" / "toy-smoke"
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [5, 10, 15, 20]
    record = json.loads((run / "config.json").read_text())
    assert (record["num_processes"], record["num_devices"]) == (2, 8)
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    files = {entry.name for entry in run.iterdir() if not entry.name.startswith(".")}
    assert files == {
        "checkpoints", "config.json", "figures", "final.npz", "metrics.jsonl", "report.html", "results.json", "status.json", "tensorboard",
    }  # fmt: skip
    assert [entry.name for entry in run.iterdir() if entry.name.startswith(".")] == [".lock"]


def test_a_signal_to_both_processes_stops_both(pair, tmp_path):
    both = pair("run", "toy", *STEPS, "--workdir", tmp_path, "--distributed", cwd=tmp_path)
    wait_for_step(both, tmp_path, 5)
    for process in both:
        process.send_signal(signal.SIGTERM)
    main, other = finish(both)
    assert 5 < stopped_at(tmp_path) < 40
    assert sum("the state is saved" in line for line in main + other) == 1


def test_a_bad_loss_ends_both_processes_in_one_sentence(pair, tmp_path):
    main, other = finish(pair("run", "toy", "--break-at", "33", "--workdir", tmp_path, "--distributed", cwd=tmp_path), code=3)
    assert main[-1].startswith("janax: linear: the loss or its gradient was not finite at step 34; the last good checkpoint is step 20")
    assert other == [] and "Traceback" not in "".join(main)


@pytest.mark.parametrize(
    ("same", "more", "message"),
    [
        (("--train.batch-size", "12"), (), "train.batch_size must be a multiple of mesh.data x train.accumulation (8 x 1), got 12; try 16"),
        ((), ("--noise", "0.3"), "process 1 has noise 0.3 and process 0 0.1; start all with the same command"),
    ],
)
def test_a_mistake_is_told_once(pair, tmp_path, same, more, message):
    main, other = finish(pair("run", "toy", *same, "--workdir", "w", "--distributed", cwd=tmp_path, more=more), code=2)
    assert (main[-1], other) == (f"janax: {message}", [])
    assert [entry.name for entry in (tmp_path / "w").iterdir() if not entry.name.startswith(".")] == []


def test_a_cluster_that_is_not_there_is_one_sentence(start, tmp_path):
    process = start("run", "toy", "--distributed", cwd=tmp_path)
    (said,) = finish([process], code=2)
    assert said == [
        "janax: --distributed finds no cluster that JAX knows (Cloud TPU, GKE, SLURM, Open MPI); give every process "
        "JAX_COORDINATOR_ADDRESS=HOST:PORT of process 0, JANAX_NUM_PROCESSES and JANAX_PROCESS_ID"
    ]


@pytest.mark.slow
def test_a_process_that_fails_alone_says_so_and_the_other_ends_too(pair, tmp_path):
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import toy
from janax.experiments import cli, errors
whole = toy.batch
def batch(config, position):
    if position == 30 and os.environ["JANAX_PROCESS_ID"] == "0":
        raise errors.UserError("a shard of the data is missing")
    return whole(config, position)
toy.batch = batch
sys.exit(cli.main(sys.argv[1:], experiments=(toy,)))
"""
    main, other = pair("run", "toy", "--workdir", tmp_path / "run", "--distributed", cwd=tmp_path, script=("-c", script))
    said = finish([main], code=2)[0]
    assert said[-1] == "janax: a shard of the data is missing"
    assert other.wait(timeout=WAIT) != 0
    finish(pair("run", "toy", "--workdir", tmp_path / "run", "--distributed", cwd=tmp_path))


@pytest.mark.slow
def test_the_bdia_study_runs_in_two_processes(pair, tmp_path):
    run = tmp_path / "run"
    finish(pair("run", "bdia", "--preset", "smoke", "--workdir", run, "--distributed", cwd=tmp_path, script=JANAX), limit=1500)
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    claims = {claim["id"]: claim for claim in json.loads((run / "results.json").read_text())["claims"]}
    assert claims["bdia-12d"]["verdict"] == "holds" and (run / "report.html").exists()
    rows = read_rows(run / "metrics.jsonl")
    assert len(rows) == 24 and rows[-1]["loss"] < 0.3


@pytest.mark.slow
def test_the_bdia_study_of_real_weights_runs_in_two_processes(pair, tmp_path):
    """What the README says for a pod, on the golden DiT."""
    weights = next(path.parent for path in sorted(GOLDEN_DIT.rglob("config.json")))
    command = f"run bdia --preset paper --workdir run --latents.weights {weights} --latents.batch-size 8 --latents.num-steps 10"
    command += " --latents.dtype float32 --latents.gamma 1.0 --distributed"
    finish(pair(*command.split(), cwd=tmp_path, script=JANAX), limit=1500)
    results = report.load_results(tmp_path / "run")
    table = {row[0]: row for row in next(t for t in results.tables if t.title.startswith("Latents")).rows}
    assert table["BDIA"][2] < 1e-8 and table["O-BELM"][2] < 1e-6 and table["DDIM"][2] > 10 * table["BDIA"][2]
    assert (tmp_path / "run" / "figures" / "latents.png").exists()


@pytest.mark.slow
def test_a_language_model_of_two_processes_goes_on_in_one(start, pair, tmp_path):
    """Twenty steps and more in two processes of four devices, and on in one of eight: the losses of one process all along."""
    fields = {"train.num-steps": 60, "train.checkpoint-every": 20, "train.log-every": 1, "mesh.model": 2}
    command = ("run", "lm", "--preset", "smoke", *(str(x) for name, value in fields.items() for x in (f"--{name}", value)))
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    finish([start(*command, "--workdir", reference, cwd=tmp_path, devices=8, script=JANAX)])

    both = pair(*command, "--workdir", workdir, "--distributed", cwd=tmp_path, script=JANAX)
    wait_for_step(both, workdir, 20)
    both[0].send_signal(signal.SIGTERM)
    finish(both)
    assert 20 <= stopped_at(workdir) < 60

    finish([start(*command, "--workdir", workdir, cwd=tmp_path, devices=8, script=JANAX)])
    ours, theirs = ([row["loss"] for row in read_rows(run / "metrics.jsonl") if "loss" in row] for run in (workdir, reference))
    assert len(ours) == len(theirs) == 60
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
