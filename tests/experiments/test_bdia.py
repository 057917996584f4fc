"""The BDIA experiment: data, pieces, and a whole run through the command line at a size that takes seconds."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import bdia as reference

from janax.experiments import cli, report
from janax.experiments.bdia import DEFAULT, PRESETS, DigitsConfig, digits, mixture

GOLDEN_DIT = Path(__file__).parent.parent / "golden" / "dit"


def test_digits_are_split_as_documented():
    data = digits.load()
    assert data.train.shape == (1497, 8, 8, 1) and data.test.shape == (300, 8, 8, 1)
    assert data.train.min() == -1 and data.train.max() == 1
    assert len({x.tobytes() for x in data.train} & {x.tobytes() for x in data.test}) == 0


def test_batches_are_a_pure_function_of_the_position():
    batch = digits.batch_fn(DEFAULT.train, digits.load())
    again = digits.batch_fn(DEFAULT.train, digits.load())
    for position in (0, 23, 24, 1000):
        np.testing.assert_array_equal(batch(position)["image"], again(position)["image"])
    seen = np.concatenate(
        [digits.batch_fn(dataclasses.replace(DEFAULT.train, batch_size=499), digits.load())(i)["label"] for i in range(3)]
    )
    np.testing.assert_array_equal(np.bincount(seen), np.bincount(digits.load().train_labels))  # one epoch sees every image once


def test_frechet_distance_of_gaussians_by_hand():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200_000, 2)) * [1.0, 2.0]
    b = rng.normal(size=(200_000, 2)) * [3.0, 2.0] + [0.0, 1.0]
    assert digits.frechet(a, a) == pytest.approx(0.0, abs=1e-9)
    assert digits.frechet(a, b) == pytest.approx(1.0 + (3.0 - 1.0) ** 2, rel=0.02)  # |mu|^2 + sum (s_a - s_b)^2


def test_loss_of_the_perfect_and_the_zero_predictor():
    """Predicting nothing costs E eps^2 = 1; an oracle that is told the noise costs nothing."""
    network = digits.make_network(DigitsConfig())
    data = digits.load()
    batch = {"image": jnp.asarray(data.train[:512]), "label": jnp.asarray(data.train_labels[:512])}
    keys = jax.random.split(jax.random.key(0), 512)
    loss = digits.loss_fn(network, mixture.sd_alphas_cumprod(), label_drop=0.15)
    params = jax.jit(network.init)(jax.random.key(0))
    assert float(jax.jit(loss)(params, batch, keys)[0]) == pytest.approx(1.0, abs=0.02)  # the last layer starts at zero
    table = mixture.sd_alphas_cumprod()

    def oracle(params, z, t, cond):
        alpha = jnp.sqrt(jnp.asarray(table, jnp.float32))[t.astype(jnp.int32)].reshape(-1, 1, 1, 1)
        return (z - alpha * batch["image"]) / jnp.sqrt(1 - alpha**2)

    assert float(jax.jit(digits.loss_fn(network._replace(noise_fn=oracle), table, label_drop=0.0))(None, batch, keys)[0]) < 1e-5


def test_the_mixture_is_the_reference_mixture():
    model = reference.Mixture()
    z = np.random.default_rng(1).normal(size=(5, 8))
    params = mixture.Mixture(model.means, model.stds, model.weights)
    sb = 0.7
    alpha = 1 / np.sqrt(1 + sb**2)
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.jit(mixture.VP_NOISE)(params, z, sb), model.eps(z, alpha, sb * alpha), rtol=1e-12)
        np.testing.assert_allclose(jax.jit(mixture.VE_NOISE)(params, z, sb), model.eps(z, 1.0, sb), rtol=1e-12)


def test_exact_flow_agrees_with_a_finer_one():
    config = dataclasses.replace(DEFAULT.mixture, num_seeds=2, batch_size=4, exact_steps=500)
    problems = mixture.problems(config)
    coarse = mixture.exact_vp(config, *problems)
    fine = mixture.exact_vp(dataclasses.replace(config, exact_steps=2000), *problems)
    assert np.max(np.abs(coarse - fine)) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--digits.num-seeds", "1"], "digits.num_seeds must be at least 2"),
        (["--mixture.steps", "20"], "mixture.steps must be a list with 10 and 50"),
        (["--latents.gamma", "0"], "latents.gamma must be in (0, 1]"),
        (["--digits.gamas", "0"], "digits.gammas"),
        (["--preset", "tiny"], "smoke"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, tmp_path, capsys):
    assert cli.main(["run", "bdia", "--workdir", str(tmp_path / "run"), *arguments]) == 2
    text = capsys.readouterr().err.strip()
    assert message in text and len(text.splitlines()) == 1


def test_paper_preset_asks_for_weights(tmp_path, capsys):
    assert cli.main(["run", "bdia", "--preset", "paper", "--workdir", str(tmp_path / "run")]) == 2
    assert "latents.weights must name a directory with DiT weights" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:encode")  # ten O-BELM steps in float32 are meant to be hard
def test_latents_study_on_a_tiny_checkpoint(tmp_path):
    """The paper-scale code path on the golden DiT: real loading, mesh of eight, four samplers, a report."""
    weights = next(path.parent for path in sorted(GOLDEN_DIT.rglob("config.json")))
    command = f"run bdia --preset paper --workdir {tmp_path / 'run'} --latents.weights {weights} --latents.batch-size 8"
    command += " --latents.num-steps 10 --latents.dtype float32 --latents.gamma 1.0"
    code = cli.main(command.split())
    assert code == 0
    results = report.load_results(tmp_path / "run")
    assert results is not None
    table = {row[0]: row for row in next(t for t in results.tables if t.title.startswith("Latents")).rows}
    assert table["BDIA"][2] < 1e-8 and table["O-BELM"][2] < 1e-6 and table["DDIM"][2] > 10 * table["BDIA"][2]


@pytest.mark.slow
def test_a_whole_small_run_and_its_report(tmp_path):
    """A few steps of training, a few samples: every study that `smoke` runs ends in claims; the run is finished and stays so."""
    command = [sys.executable, "-m", "janax.experiments.cli", "run", "bdia", "--preset", "smoke", "--workdir", str(tmp_path / "run")]
    command += ["--sections", "digits", "--train.num-steps", "110", "--train.checkpoint-every", "50", "--digits.num-samples", "65"]
    command += ["--digits.num-edits", "8", "--digits.parts", "reconstruction", "--digits.gammas", "0", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    claims = {claim["id"]: claim for claim in json.loads((tmp_path / "run" / "results.json").read_text())["claims"]}
    assert claims["bdia-12d"]["verdict"] == "holds" and claims["bdia-12d"]["ours"] < 1e-20
    assert claims["bdia-13a"]["verdict"] == "not run"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "data:image/png;base64" in page and "<script" not in page
    again = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert again.returncode == 0 and "finished" in again.stdout
    shutil.rmtree(tmp_path / "run")


def test_presets():
    assert set(PRESETS) == {"smoke", "default", "paper"}
    assert PRESETS["paper"].latents.batch_size == 256 and PRESETS["paper"].latents.num_steps == 50
