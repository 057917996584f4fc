"""The SinKD experiment: closed forms beside the specification's numbers, pieces of the studies, mistakes, and small whole runs."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from janax.experiments import cli, report
from janax.experiments import session as sessions
from janax.experiments import sinkd as experiment
from janax.experiments.config import TrainConfig
from janax.experiments.sinkd import analyses, digits, findings, language, students, text
from janax.models import transformer


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def test_two_normals_move_apart(wide):
    found = analyses.moving_apart()
    np.testing.assert_allclose(found["JS"]["value"], [0.11142, 0.33683, 0.63272, 0.68930, 0.693054, 0.693146], atol=5e-6)
    np.testing.assert_allclose(found["JS"]["slope"], [1.99e-1, 2.25e-1, 6.86e-2, 6.23e-3, 1.96e-4, 2.23e-6], rtol=3e-3)
    np.testing.assert_allclose(found["TVD"]["slope"], [3.52e-1, 2.42e-1, 5.40e-2, 4.43e-3, 1.34e-4, 1.49e-6], rtol=3e-3)
    distances = np.asarray(analyses.DISTANCES)
    for name in ("KL", "RKL"):
        np.testing.assert_allclose(found[name]["value"], distances**2 / 2, rtol=1e-9)
    np.testing.assert_allclose(found["W1"]["value"], distances, rtol=1e-9)
    np.testing.assert_allclose(found["W1"]["slope"], 1, rtol=1e-9)


@pytest.mark.slow
def test_one_mode_for_two(wide):
    found = analyses.modes()
    assert found["KL"]["mean"] == pytest.approx(0, abs=1e-3) and found["KL"]["spread"] == pytest.approx(np.sqrt(9.25), abs=1e-3)
    assert found["KL"]["valley"] == pytest.approx(0.378, abs=1e-3)
    for name, value in (("RKL", np.log(2)), ("JS", 0.21576)):
        assert (found[name]["mean"], found[name]["spread"]) == pytest.approx((3, 0.5), abs=1e-3)
        assert found[name]["value"] == pytest.approx(value, abs=1e-5)
    assert analyses.js_at_a_mode() == pytest.approx(0.21576, abs=1e-5)
    assert (found["TVD"]["mean"], found["TVD"]["spread"]) == pytest.approx((2.83, 0.98), abs=0.02)
    assert found["TVD"]["value"] == pytest.approx(0.49994, abs=1e-5)
    assert (found["W1"]["mean"], found["W1"]["value"]) == pytest.approx((0, 1.2556), abs=1e-3)  # the quantiles are 2000 midpoints
    assert (found["W2 squared"]["mean"], found["W2 squared"]["value"]) == pytest.approx((0, 2.0460), abs=2e-3)


def test_a_class_that_was_nearly_lost(wide):
    found = analyses.lost_class()
    at = [analyses.SHARES.index(e) for e in (1e-2, 1e-4, 1e-8)]
    wanted = {
        "KL": (-9.0e-2, -1.0e-1, -1.0e-1),
        "RKL": (-2.4e-2, -7.0e-4, -1.6e-7),
        "JS": (-8.7e-3, -3.1e-4, -7.7e-8),
        "TVD": (-7.0e-3, -7.0e-5, -7.0e-9),
        "skew KL .1": (-3.9e-2, -8.1e-4, -8.2e-8),
        "Renyi .5": (-2.2e-2, -3.2e-3, -3.3e-5),
    }
    for name, slopes in wanted.items():
        np.testing.assert_allclose(np.asarray(found[name])[at], slopes, rtol=0.03, err_msg=name)
    np.testing.assert_allclose(found["SinKD"], 2 * np.asarray(found["TVD"]), rtol=1e-9)  # one row: nothing is transported


def test_sure_of_different_classes(wide):
    found = analyses.saturation()
    gradients = found["gradients"]
    assert (gradients["KL"], gradients["Renyi .5"]) == pytest.approx((1, 0.5), rel=1e-9)
    assert 1e-27 < gradients["Hellinger"] < 1e-25 and 1e-27 < gradients["SinKD"] < 1e-25
    assert max(gradients[name] for name in ("RKL", "JS", "TVD")) < 1e-45
    assert gradients["SinKD on logits"] > 1
    assert found["value"] == pytest.approx(32, abs=1e-9)  # 2 for each of 16 rows
    assert found["finite"] == {"kernel normalisation": False, "this library": True}


def test_students_are_paired_and_rows_share_a_program():
    """Equal keys give equal students for equal objectives, whatever else is computed beside; another weight gives another student."""
    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(120, 64)).astype(np.float32), rng.integers(0, 10, 120).astype(np.int32)
    inputs[np.arange(120), labels] += 4
    index = np.arange(120, dtype=np.int32)
    data = students.Data(*(jnp.asarray(x) for x in (inputs, labels, inputs[:, :10], index[:60], index[60:90], index[90:])))
    rows = [students.Row(name, weights) for name, weights in (("a", {"labels": 1.0}), ("b", {"labels": 1.0}), ("c", {"kd": 1.0}))]
    sizes = {"num_seeds": 2, "num_steps": 30, "batch_size": 8, "num_train": 40, "num_iters": 5, "learning_rate": 1e-2}
    numbers = students.numbers_of(experiment.ObjectiveConfig())
    found = students.train_students(digits.network(4), ("labels", "kd"), rows, numbers, data, **sizes)
    assert found["a"] == found["b"] != found["c"]
    assert len(found["a"]["test"]) == 2 and 0.1 < np.mean(found["a"]["test"]) <= 1
    with pytest.raises(ValueError, match="row 'a' has a weight for 'labels', expected one of kd"):
        students.train_students(digits.network(4), ("kd",), rows, numbers, data, **sizes)


def test_rows_of_the_digits():
    rows = digits.rows(experiment.DEFAULT)
    names = [row.name for group in rows.values() for row in group]
    assert len(set(names)) == len(names)
    by_name = {row.name: row for group in rows.values() for row in group}
    weight = by_name["KD + SinKD 0.0008"].weights
    assert weight == pytest.approx({"labels": 0.1, "kd": 0.9, "sinkd": 0.0008 * 32})  # a sum over rows, in the unit of a mean
    assert set(findings._MEASURED) <= set(names)


def test_names_are_taken_out_of_text():
    assert text.anonymous("JAX arrays and np.ndarray, from `jax.numpy`; sklearn's fit") == "_ arrays and _.ndarray, from `_._`; _'s fit"
    assert text.anonymous("input snp. wnp") == "input snp. wnp"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--digits.num-seeds", "1"], "digits.num_seeds must be at least 2"),
        (["--digits.losses", "KD", "JS"], "digits.losses must be a list with KD and SinKD"),
        (["--language.group-size", "7"], "language.group_size must be a divisor of the 192 predictions"),
        (["--objective.epsilon", "0"], "objective.epsilon must be above 0"),
        (["--digits.num-train", "40"], "ablations.batch_sizes must be at most digits.num_train (40)"),
        (["--text.packags", "numpy"], "text.packages"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, tmp_path, capsys):
    assert cli.main(["run", "sinkd", "--workdir", str(tmp_path / "run"), *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1


def test_paper_preset_asks_for_checkpoints(tmp_path, capsys):
    assert cli.main(["run", "sinkd", "--preset", "paper", "--workdir", str(tmp_path / "run")]) == 2
    assert "checkpoints.teacher must be given" in capsys.readouterr().err


def test_presets():
    assert set(experiment.PRESETS) == {"smoke", "default", "paper"}
    assert min(getattr(experiment.DEFAULT, part).num_seeds for part in ("digits", "text", "language", "ablations")) >= 10


@pytest.mark.slow
def test_a_whole_small_run_and_its_report(tmp_path):
    command = [sys.executable, "-m", "janax.experiments.cli", "run", "sinkd", "--preset", "smoke", "--workdir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    claims = {claim["id"]: claim for claim in json.loads((tmp_path / "run" / "results.json").read_text())["claims"]}
    assert claims["sinkd-2a"]["verdict"] == "holds" and claims["sinkd-2d"]["verdict"] == "does not hold"
    assert claims["sinkd-12b"]["verdict"] == "does not hold" and claims["sinkd-60"]["verdict"] == "not run"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "data:image/png;base64" in page and "is missing" not in page


@pytest.mark.slow
def test_text_and_language_at_a_small_size(tmp_path):
    """Both kinds of transformers and all layouts, and what is said of them."""
    settings = experiment.TextConfig(
        packages=("optax", "orbax"), sequence_length=16, vocab_size=400, num_train=64, batch_size=8, num_steps=4, teacher_steps=4,
        width=16, teacher_width=16, num_seeds=2,
    )  # fmt: skip
    layouts = experiment.LanguageConfig(
        packages=("optax",), vocab_size=300, sequence_length=9, batch_size=4, group_size=8, num_train=16, num_steps=3, teacher_steps=3,
        width=16, teacher_width=16, num_seeds=2,
    )  # fmt: skip
    config = dataclasses.replace(experiment.DEFAULT, sections=("text", "language"), text=settings, language=layouts)
    with sessions.open_session("sinkd", config, tmp_path / "run", console=rich.console.Console(quiet=True), signals=False) as run:
        results = experiment.run(config, run)
    assert {"sinkd-30b", "sinkd-31b", "sinkd-40a"} <= {claim.id for claim in results.claims}
    table = next(table for table in results.tables if table.title.startswith("Language"))
    assert [row[0] for row in table.rows] == list(language.OBJECTIVES)


@pytest.mark.slow
def test_checkpoints_are_distilled(tiny_model, tmp_path):
    """The paper's code path from directories to held-out losses; the student starts as the teacher."""
    lines = [json.dumps({"prompt": f"a few words {i}", "completion": " to merge, and a few more words" * (1 + i % 3)}) for i in range(200)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    checkpoints = experiment.CheckpointsConfig(
        teacher=str(tiny_model), student=str(tiny_model), path=str(tmp_path / "data.jsonl"), sequence_length=32, dtype="float32"
    )
    train = TrainConfig(num_steps=4, batch_size=8, checkpoint_every=4, log_every=2)
    config = dataclasses.replace(experiment.PAPER, checkpoints=checkpoints, train=train)
    with sessions.open_session("sinkd", config, tmp_path / "run", console=rich.console.Console(quiet=True), signals=False) as run:
        results = experiment.run(config, run)
    report.save_results(tmp_path / "run", results)
    found = json.loads((tmp_path / "run" / "memo" / "checkpoints.json").read_text())["value"]
    assert found["teacher"] == pytest.approx(found["before"], rel=1e-4)
    assert found["after"] < found["before"]


def test_the_published_shapes():
    from janax.experiments.sinkd import checkpoints

    for shape, millions in ((checkpoints.GPT_NEO_125M, 125), (checkpoints.GPT_NEO_2_7B, 2651)):
        params = jax.eval_shape(lambda key, shape=shape: transformer.init(shape, key), jax.random.key(0))
        assert sum(x.size for x in jax.tree.leaves(params)) / 1e6 == pytest.approx(millions, rel=0.01)
