"""The experiment on RL as inference: networks over prefixes, what the report says of given figures, mistakes, and a small whole run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from janax.algorithms import rl_bayes
from janax.experiments import cli
from janax.experiments import rl_bayes as experiment
from janax.experiments import session as sessions
from janax.experiments.config import MeshConfig, TrainConfig
from janax.experiments.rl_bayes import coverage, exact, findings, pods, steering, text, twists, verdicts, worlds
from janax.experiments.rl_bayes.config import ExactConfig, PodConfig, SteeringConfig, TextConfig, TwistsConfig

SPACE = rl_bayes.Space(vocab_size=3, length=3)


@pytest.fixture
def session(tmp_path):
    console = rich.console.Console(quiet=True)
    with sessions.open_session("rl_bayes", experiment.SMOKE, tmp_path / "run", console=console, signals=False) as opened:
        yield opened


def verdicts_of(config, found, session):
    return {claim.id.removeprefix("rl-bayes-"): claim.verdict for claim in findings.results(config, found, session).claims}


def test_samples_of_a_network_have_the_probabilities_of_its_rows():
    params = worlds.init(jax.random.key(0), SPACE, 4, gain=2.0)
    log_pi = rl_bayes.sequence_log_probs(SPACE, worlds.policy_rows(SPACE, params))
    place, log_q = worlds.sample(jax.random.key(1), SPACE, params, num_samples=4000)
    np.testing.assert_allclose(log_q, log_pi[place], atol=1e-5)
    seen = np.bincount(place, minlength=27) / 4000
    assert np.abs(seen - np.exp(log_pi)).max() < 0.035  # 4.4 standard errors of a share of one half


def test_objectives_from_samples_and_exact_ones_end_at_the_posterior():
    config = ExactConfig(vocab_size=3, length=3, width=6, num_steps=200, sampled_steps=200, batch_size=64, sampled_rate=0.02)
    world = worlds.draw_world(jax.random.key(0), SPACE, 6)
    log_p = rl_bayes.posterior(world.log_prior, world.reward / config.beta).log_probs
    ends = jax.jit(lambda kind: exact.train_exact(config, world.params, world, jnp.asarray(config.beta), kind)[0])
    assert all(rl_bayes.kl_divergence(ends(jnp.asarray(kind)), log_p) < 0.02 for kind in range(1, len(exact.EXACT)))
    assert rl_bayes.entropy(ends(jnp.asarray(0))) < 0.1
    fit = jax.jit(lambda kind: exact.train_sampled(config, jax.random.key(1), world, kind)[0])
    ends = {}
    for name in ("RKL, baseline", "VarGrad", "TB"):
        log_pi = rl_bayes.sequence_log_probs(SPACE, worlds.policy_rows(SPACE, fit(jnp.asarray(exact.SAMPLED.index(name)))))
        ends[name] = float(rl_bayes.kl_divergence(log_pi, log_p))
    assert max(ends.values()) < 0.1
    assert ends["VarGrad"] == pytest.approx(ends["RKL, baseline"], rel=0.02)


def test_learned_twists_come_nearer_the_posterior():
    config = dataclasses.replace(
        experiment.SMOKE,
        exact=ExactConfig(vocab_size=3, length=3, width=6),
        twists=TwistsConfig(num_steps=400, batch_size=64, width=6, learning_rate=0.03),
    )
    world = worlds.draw_world(jax.random.key(2), SPACE, 6)
    log_p = rl_bayes.posterior(world.log_prior, world.reward / config.exact.beta).log_probs
    fit = jax.jit(lambda kind: twists.train(config, jax.random.key(0), world, kind))
    for kind in range(len(twists.LOSSES)):
        log_q = rl_bayes.sequence_log_probs(SPACE, rl_bayes.twisted_rows(world.rows, fit(jnp.asarray(kind))))
        assert rl_bayes.kl_divergence(log_p, log_q) < 0.6 * rl_bayes.kl_divergence(log_p, world.log_prior)


def test_text_goes_there_and_back():
    tokens = text.encode_text("An  Array,\nshape (12, é)")
    assert text.decode_text(tokens) == "an array, shape (00, #)"
    word = text.encode_text("array")
    rows = jnp.asarray(np.stack([tokens, text.encode_text("an arrax, shape (00, #)")]))
    assert text.contains(rows, word).tolist() == [True, False]
    assert float(text.vowels(rows)[0]) == pytest.approx(5 / 23)


def test_texts_drawn_by_the_decoder_have_its_probabilities():
    config = TextConfig(width=16, depth=1, length=6, word="a")
    shape = text.network(config)
    from janax.models import transformer

    params = transformer.init(shape, jax.random.key(0))
    tokens = text.draw(shape, params, jax.random.key(1), 16, 6)
    assert tokens.shape == (16, 6) and int(tokens.min()) >= 1
    logits = transformer.logits(shape, params, jnp.concatenate([jnp.zeros((16, 1), jnp.int32), tokens[:, :-1]], axis=1))
    expected = jax.nn.log_softmax(logits[:, :, 1:])
    picked = np.take_along_axis(np.asarray(expected), np.asarray(tokens)[:, :, None] - 1, axis=2).sum(axis=(1, 2))
    np.testing.assert_allclose(text.log_probs(shape, params, tokens), picked, rtol=1e-5)


def test_problems_are_as_hard_as_asked_and_policies_learn_to_solve_them():
    config = ExactConfig(vocab_size=3, length=3, width=6, coverage_steps=150)
    world = worlds.draw_world(jax.random.key(0), SPACE, 6)
    right = coverage.problems(jax.random.key(1), SPACE, world.log_prior, 4)
    before = np.where(right, np.exp(world.log_prior), 0).sum(axis=1)
    last = np.exp(world.log_prior).max()  # a string is counted whole
    wanted = np.geomspace(0.5, 0.001, 4)
    assert np.all(before >= wanted - 1e-6) and np.all(before <= wanted + last)
    rates = jax.jit(lambda kind: coverage.train(config, world, right, kind))
    ends = {name: np.asarray(rates(jnp.asarray(i))) for i, name in enumerate(coverage.OBJECTIVES)}
    assert np.all(ends["f-DPG, JS"] > before)
    passes = coverage._passes(np.stack([ends["f-DPG, JS"], before]))
    assert passes.shape == (2, len(coverage.ATTEMPTS)) and np.all(np.diff(passes, axis=1) >= 0)
    np.testing.assert_allclose(passes[1, 1], np.mean(1 - (1 - before) ** 4), rtol=1e-6)


def test_ppo_on_text_climbs_towards_its_reward():
    config = TextConfig(
        tasks=("continuous",), width=16, depth=1, length=8, num_steps=30, batch_size=64, learning_rate=1e-2, pool=64, num_eval=32
    )
    prepared = text.Prepared(config)
    prepared.prior = (text.transformer.init(text.network(config), jax.random.key(0)), {})
    params, curves = prepared.train_ppo(prepared.task("continuous"), jax.vmap(jax.random.key)(np.arange(2)))
    reward = np.asarray(curves["reward"])
    assert reward.shape == (2, 30) and np.all(reward[:, -3:].mean(axis=1) > reward[:, :3].mean(axis=1) + 0.5)
    assert np.asarray(curves["kl_prior"])[:, 0] == pytest.approx(0.0, abs=1e-4)
    assert jax.tree.leaves(params)[0].shape[0] == 2


def test_steering_forbids_tokens_with_a_letter(tiny_model, session):
    config = SteeringConfig(
        weights=str(tiny_model), letter="o", prompts=("a few", "words to merge"), num_particles=4, max_new_tokens=5, num_runs=2
    )
    model = steering.loading.load(tiny_model)
    masked = steering.forbidden(model, "o")
    assert (
        masked[model.tokenizer.encode("o", add_special_tokens=False)].all() and masked[list(model.stop_tokens)].all() and not masked.all()
    )
    found = steering._study(config, session)
    ways = found["ways"]
    assert ways["masking"]["allowed"] == ways["SMC"]["allowed"] == [1.0, 1.0]
    assert all("o" not in one for name in ("masking", "SMC") for one in found["texts"][name])
    assert all(z < 0 for z in ways["masking"]["log_z"]) and np.allclose(ways["decoder"]["log_z"], 0, atol=1e-5)
    got = verdicts_of(dataclasses.replace(experiment.DEFAULT, steering=config), {"steering": found}, session)
    assert set(got) == {"12a", "12b"}


def test_a_step_of_fdpg_on_a_decoder_is_that_of_its_log_probabilities():
    shape = text.network(TextConfig(width=16, depth=1, length=6))
    params = text.transformer.init(shape, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (8, 6), 1, shape.vocab_size)
    log_target, log_q = jax.random.normal(jax.random.key(2), (2, 8)) - 15
    batch = {"tokens": tokens, "mask": jnp.ones((8, 6), bool), "log_target": log_target, "log_q": log_q, "log_z": jnp.full(8, -0.5)}

    def plain(params):
        log_pi = jax.nn.log_softmax(text.transformer.logits(shape, params, tokens[:, :-1]))
        log_pi = jnp.take_along_axis(log_pi, tokens[:, 1:, None], axis=2)[..., 0].sum(axis=1)
        options = {"log_z": -0.5, "divergence": rl_bayes.JS, "baseline": "leave_one_out"}
        return rl_bayes.fdpg_loss(log_pi, log_target, log_q, **options)[0]

    found = jax.grad(lambda params: pods.loss_fn(shape)(params, batch, jax.random.key(0))[0])(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), found, jax.grad(plain)(params))


def test_programs_of_a_pod_trace_with_their_placement():
    pod = PodConfig(shape="smollm2-135m", num_prompts=2, num_particles=8, prompt_length=4, max_new_tokens=3)
    config = dataclasses.replace(
        experiment.PAPER, pod=pod, mesh=MeshConfig(data=2, model=4), train=TrainConfig(num_steps=1000, batch_size=4)
    )
    steered, step = pods.programs(config, jax.devices())
    placed = jax.tree.leaves(steered.in_shardings[0])
    assert all("data" not in where.spec for where in placed) and any("model" in where.spec for where in placed)
    with jax.set_mesh(placed[0].mesh):
        result = jax.eval_shape(steered.fn, *steered.args)
        assert result.tokens.shape == (2, 8, 3) and result.log_z.shape == (2,)
        jax.eval_shape(step.fn, *step.args)
    assert step.args[1]["tokens"].shape == (4, 7)


def collapse_figures(entropy, rkl):
    row = {"reward": [1.0] * 3, "fkl": [0.1] * 3, "most": [0.1] * 3, "curve": [[2.0, 1.0]] * 3}
    kept = row | {"entropy": [5.0, 5.01, 4.99], "rkl": rkl, "distinct": [300.0, 310.0, 290.0]}
    rows = dict.fromkeys(exact.EXACT, kept) | {"RL without KL": row | {"entropy": entropy, "rkl": [9.0] * 3, "distinct": [1.0, 1.0, 2.0]}}
    posterior = {"entropy": [5.01] * 3, "reward": [1.0] * 3, "rkl": [0.0] * 3, "fkl": [0.0] * 3, "most": [0.1] * 3}
    return {"objectives": rows, "truth": {"posterior": posterior, "prior": [6.0] * 3, "log_z": [1.0] * 3}, "stride": 5}


def test_verdicts_of_collapse_come_from_intervals(session):
    good = verdicts_of(experiment.DEFAULT, {"exact": {"collapse": collapse_figures([0.01, 0.012, 0.011], [0.02, 0.021, 0.02])}}, session)
    assert good == {"2a": "holds", "2b": "holds", "2c": "holds", "2d": "holds"}
    wide = verdicts_of(experiment.DEFAULT, {"exact": {"collapse": collapse_figures([0.01, 0.2, 0.05], [0.01, 0.02, 0.1])}}, session)
    assert wide["2a"] == "undecided" and wide["2d"] == "undecided"
    bad = verdicts_of(experiment.DEFAULT, {"exact": {"collapse": collapse_figures([1.0, 1.1, 1.0], [0.2, 0.21, 0.2])}}, session)
    assert bad["2a"] == "does not hold" and bad["2d"] == "does not hold"


def test_verdicts_of_bounds_come_from_their_errors(session):
    def case(gap, ratio=1.01):
        half = {"lower": -gap / 2, "upper": gap / 2, "lower_error": 0.01, "upper_error": 0.01, "gap": gap}
        return {"4": half | {"ratio": ratio, "ratio_error": 0.02}}

    found = {"log_z": 1.0, "base exact": [-2.0, 2.0], "twist exact": [-0.2, 0.2]}
    names = ("base, weights only", "base, resampling", "twist, weights only", "twist, resampling")
    good = dict(zip(names, (case(1.0), case(0.5), case(0.1), case(0.15))))
    got = verdicts_of(experiment.DEFAULT, {"exact": {"sandwich": found | {"cases": good}}}, session)
    assert got == {"6a": "holds", "6b": "holds", "6c": "holds", "6d": "holds"}
    close = good | {"base, resampling": case(0.99), "twist, resampling": case(0.02), "twist, weights only": case(0.1, ratio=1.2)}
    got = verdicts_of(experiment.DEFAULT, {"exact": {"sandwich": found | {"cases": close}}}, session)
    assert got["6a"] == "undecided" and got["6b"] == "does not hold" and got["6c"] == "does not hold"


def test_infinite_divergences_are_told_apart_from_numbers():
    assert verdicts.array([[1, None], [2.5, 3]]).tolist() == [[1.0, float("inf")], [2.5, 3.0]]


def run(*arguments):
    name = cli._name(experiment)
    return cli.main(["run", name, *map(str, arguments)], experiments=(experiment,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--exact.length", 30), "exact.length must be so that 5^length is at most 2^20"),
        (("--exact.betas", 1.0), "exact.betas must be positive, with exact.beta among them"),
        (("--exact.particles", 1), "exact.particles must be a list of numbers from 2 on"),
        (("--twists.num-seeds", 1), "twists.num_seeds must be at least 2: intervals need them"),
        (("--text.word", "Not this"), "text.word must be small letters a to z"),
        (("--text.width", 20), "text.width must be a multiple of 16"),
        (("--steering.letter", "E"), "steering.letter must be a small letter"),
        (("--sections", "steering", "--steering.weights", "nowhere"), "steering.weights: 'nowhere' is neither a directory"),
    ],
)
def test_mistakes_are_told(tmp_path, capsys, arguments, message):
    assert run(*arguments, "--workdir", tmp_path / "a") == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_smoke_runs_to_its_report(tmp_path):
    out = tmp_path / "run"
    assert run("--preset", "smoke", "--workdir", out) == 0
    results = json.loads((out / "results.json").read_text())
    claims = {claim["id"]: claim["verdict"] for claim in results["claims"]}
    assert claims["rl-bayes-1a"] == "holds" and "rl-bayes-2d" in claims
    assert (out / "figures" / "collapse.png").exists() and (out / "report.html").exists()
