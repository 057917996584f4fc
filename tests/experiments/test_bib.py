"""The BIB experiment: what its studies share, what its report says of given figures, its programs, and a small whole run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from janax.experiments import bib as experiment
from janax.experiments import cli
from janax.experiments import session as sessions
from janax.experiments.bib import findings, infinite, kernels, methods, pods, pretraining, rivals, tasks
from janax.experiments.bib.config import BaselinesConfig, BdiConfig, MethodsConfig, PaperConfig
from janax.experiments.config import MeshConfig
from janax.experiments.errors import UserError
from janax.models import sequence


@pytest.fixture
def session(tmp_path):
    with sessions.open_session(
        "bib", experiment.SMOKE, tmp_path / "run", console=rich.console.Console(quiet=True), signals=False
    ) as opened:
        yield opened


def reports(medians, **more):
    return [{"max": m + 0.05, "median": m, "mean": m, "distinct": 100, "from_start": 5.0, "regret 1": 0.1, **more} for m in medians]


def test_verdicts_come_from_intervals(session):
    seeds = np.linspace(-0.01, 0.01, 8)
    variants = {
        "forward": reports(0.70 + seeds),
        "backward": reports(0.50 + seeds),
        "both, fixed": reports(0.69 + 0 * seeds + 0.05 * np.array([1, -1] * 4)),
        "Adaptive-gamma": reports(0.75 + seeds),
        "Adaptive-gamma + Adaptive-eta": reports(0.76 + seeds),
        methods.BEST: reports(0.85 + seeds, designs=np.zeros((4, 8), int).tolist()),
    }
    curves = {"median": [0.1, 0.2], "gamma": [0.5, 0.4], "eta": [0.1, 0.1], "start": [0.1], "end": [0.2], "predicted": [0.3]}
    for name in methods.VARIANTS:
        if name in variants:
            variants[name][0]["curves"] = curves
    found = {
        "methods": {
            "encoder": {"r2": 0.71},
            "quality": {"lowest5000": {"spearman": 0.6, "top_max": 0.99, "top_median": 0.87}},
            "tasks": {"SIX6_REF_R1/lowest5000": variants},
        }
    }
    results = findings.results(dataclasses.replace(experiment.SMOKE), found, session)
    verdicts = {claim.id: claim.verdict for claim in results.claims}
    assert verdicts["bib-4a"] == "holds" and verdicts["bib-4b"] == "holds" and verdicts["bib-4e"] == "holds"
    assert verdicts["bib-4d"] == "undecided" and verdicts["bib-4c"] == "holds"
    assert verdicts["bib-5b"] == "holds"
    assert {figure.path for figure in results.figures} >= {"figures/trajectories.png", "figures/logos.png"}


def test_half_split_of_bdi_is_judged_and_others_are_not(session):
    row = {"max": 0.9734, "median": 0.5951, "mean": 0.63, "distinct": 117, "count": 128, "unmoved": 17}
    found = {"bdi": {"residual": 2e-6, "dual": "published", "rows": 32898, "both": row, "forward": row, "backward": row}}
    for split, verdict in (("half", "holds"), ("lowest5000", "not run")):
        config = dataclasses.replace(experiment.DEFAULT, bdi=BdiConfig(split=split))
        claims = {claim.id: claim for claim in findings.results(config, found, session).claims}
        assert claims["bib-2a"].verdict == verdict and claims["bib-1"].verdict == "holds"
    config = dataclasses.replace(experiment.DEFAULT, bdi=BdiConfig(split="half"))
    claims = {claim.id: claim for claim in findings.results(config, found, session).claims}
    assert claims["bib-2b"].verdict == "does not hold"  # the forward mode's own numbers are others


def test_large_systems_are_solved_in_place():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(700, 6))
        y = np.random.default_rng(1).normal(size=700)
        dual = infinite._solve(x, y)
        from janax.algorithms import bib

        assert bib.bdi_residual(bib.bdi_fit(x, y, dual=dual)) < 1e-9


@pytest.mark.slow
def test_the_walk_is_the_same_for_tasks_together_and_apart():
    """Section 15.7: vmap over designs, seeds and tasks equals loops."""
    config = MethodsConfig(num_seeds=2, num_designs=3, num_steps=4, kept=3)
    model = sequence.DNA_KMERS
    params = pretraining.initial_params(model, jax.random.key(0))
    trained = pretraining.Trained(model, params, {})
    fitted = []
    with jax.enable_x64(True):
        for factor in tasks.FACTORS[:2]:
            offline, _ = tasks.tfbind8(factor, "lowest5000")
            offline = offline._replace(tokens=offline.tokens[-300:], scores=offline.scores[-300:])
            phi = pretraining.all_features(trained, offline.tokens)
            fitted.append(methods.fit(phi, offline, num_seeds=2, num_designs=3, rel_ridge=1e-6))
        keys = jax.vmap(jax.random.key)(np.arange(2))
        run = methods.walk(config, methods.features_of(trained, both_strands=False), "Adaptive-gamma + Adaptive-eta")
        together, paths, _ = jax.jit(run)(params, methods.plain(fitted), keys)
        alone, _, _ = jax.jit(run)(params, methods.plain(fitted[1:]), keys)
        assert together.shape == (2, 2, 3, 8) and paths.shape == (2, 2, 3, 5, 8)
        np.testing.assert_array_equal(together[1], alone[0])
        np.testing.assert_array_equal(paths[0, 0, :, 0], fitted[0].starts)


def test_every_baseline_hands_out_designs():
    tokens = jnp.asarray(tasks.all_sequences(4))
    scores = jnp.asarray(np.random.default_rng(0).normal(size=256), jnp.float32)
    runs = rivals.searches(4, tokens, scores, 4)
    assert set(runs) == set(BaselinesConfig().methods)


@pytest.mark.slow
def test_sketched_features_are_gradients(session):
    model = sequence.DNA_KMERS
    trained = pretraining.Trained(model, pretraining.initial_params(model, jax.random.key(0)), {})
    phi = kernels._sketched(trained, tasks.all_sequences(8)[:3], 32)
    assert phi.shape == (3, 32) and np.isfinite(phi).all() and np.ptp(phi) > 0


def test_programs_of_the_papers_scale_have_shapes():
    config = dataclasses.replace(experiment.PAPER, paper=PaperConfig(num_rows=100, length=12, batch_size=8, num_designs=8, num_steps=2))
    features, designs = pods.programs(config, jax.devices())
    assert features.args[1].shape == (13, 8, 12) and designs.args[3].shape == (8, 12, 20)


def test_the_papers_scale_runs_from_weights(tmp_path, session):
    """On a tiny encoder in ESM-2's layout; the same designs whole and over eight devices."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 20, (70, 6)).astype(np.uint8)
    (tmp_path / "aav").mkdir()
    scores = (tokens < 5).sum(axis=1) + 0.01 * rng.normal(size=70)
    letters = np.array(list(tasks.AMINO_ACIDS))
    np.savez(tmp_path / "aav" / "aav2_28mer.npz", alphabet=letters, tokens=tokens, score=scores, wildtype=tokens[0])
    small = dataclasses.replace(sequence.ESM2_8M.config, width=16, depth=1, heads=2, hidden=16, dtype="float32")
    model = dataclasses.replace(sequence.ESM2_8M, config=small)
    sequence.save(tmp_path / "esm", model, pretraining.initial_params(model, jax.random.key(0)))
    paper = PaperConfig(weights=str(tmp_path / "esm"), protein="aav", num_designs=5, num_steps=2, batch_size=16, dtype="float32")
    config = dataclasses.replace(experiment.PAPER, data_dir=str(tmp_path), paper=paper, mesh=MeshConfig(data=8))
    with pytest.raises(UserError, match="their product must be 8"):
        pods.study(dataclasses.replace(config, mesh=MeshConfig(data=1)), session)
    whole = pods._study(dataclasses.replace(config, mesh=MeshConfig(data=1, model=8)), session)
    found = experiment.run(config, session)
    assert {claim.id for claim in found.claims} == {"bib-10"}
    designs = [row[0] for row in found.tables[1].rows]
    assert designs == whole["designs"] and len(designs) == 5 and all(len(text) == 6 for text in designs)
    with pytest.raises(UserError, match=r"paper\.weights must be a directory of the encoder to run"):
        pods.study(experiment.PAPER, session)


def test_mistakes_are_told(tmp_path, capsys):
    assert cli.main(["run", "bib", "--sections", "proteins", "--workdir", str(tmp_path / "a")]) == 2
    assert "data_dir must be a directory for the section proteins" in capsys.readouterr().err
    assert cli.main(["run", "bib", "--methods.kept", "3", "--workdir", str(tmp_path / "a")]) == 2
    assert "methods.kept must be at least methods.num_designs" in capsys.readouterr().err


@pytest.mark.slow
def test_smoke_runs_to_its_report(tmp_path):
    out = tmp_path / "run"
    assert cli.main(["run", "bib", "--preset", "smoke", "--workdir", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert {claim["id"] for claim in results["claims"]} >= {"bib-3", "bib-5b"}
    assert (out / "figures" / "logos.png").exists() and (out / "report.html").exists()
