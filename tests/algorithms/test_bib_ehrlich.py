"""Ehrlich functions beside exact fractions: values, certificates, the guarantees of random instances."""

import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import ehrlich as reference

from janax.algorithms.bib import baselines, ehrlich

SIZES = [
    {"num_letters": 4, "length": 12, "num_motifs": 2, "motif_length": 4, "motif_repeats": False},
    {"num_letters": 20, "length": 15, "num_motifs": 3, "motif_length": 5, "quantization": 2},  # no slack, 2 does not divide 5
    {"num_letters": 3, "length": 7, "num_motifs": 7, "motif_length": 1},
    {"num_letters": 32, "length": 64, "num_motifs": 4, "motif_length": 4, "quantization": 2, "epistasis": 0.5},
]


@functools.cache
def maker(i):
    return jax.jit(functools.partial(ehrlich.random_instance, **SIZES[i]))


@functools.cache
def problem(i, seed=0):
    with jax.enable_x64(False):
        return maker(i)(jax.random.key(seed))


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0))
def every(instance, tokens):
    return ehrlich.certify(instance, tokens), ehrlich.value(instance, tokens, infeasible_value=-jnp.inf)


def parts(instance):
    return np.asarray(instance.transition), np.asarray(instance.motifs), np.diff(np.asarray(instance.offsets), axis=1)


def population(i, count=40):
    """Feasible ones, uniform ones, and the optimum with up to three letters changed."""
    instance, length, v = problem(i), SIZES[i]["length"], SIZES[i]["num_letters"]
    key = jax.random.key(1)

    @jax.jit
    def draw(keys):
        sample = functools.partial(ehrlich.sample_feasible, problem=instance, length=length)
        return jax.vmap(sample)(keys), ehrlich.optimal_sequence(instance, length=length)

    paths, best = draw(jax.random.split(key, count))
    rng = np.random.default_rng(0)
    near = np.tile(np.asarray(best), (count, 1))
    for row, times in zip(near, rng.integers(0, 4, count)):
        row[rng.integers(0, length, times)] = rng.integers(0, v, times)
    return np.concatenate([paths, rng.integers(0, v, (count, length)), near]).astype(np.int32)


@pytest.mark.parametrize("i", range(len(SIZES)))
def test_values(i):
    instance, tokens = problem(i), population(i)
    transition, motifs, gaps = parts(instance)
    q, e = int(instance.quantization), SIZES[i].get("epistasis", 0)
    got, outside = every(instance, tokens)
    wanted = [float(reference.value(transition, motifs, gaps, row.tolist(), q, e)) for row in tokens]
    np.testing.assert_allclose(got.value, wanted, rtol=3e-6, atol=1e-12)
    assert len(set(wanted)) > 1 and max(wanted) == 1
    feasible = [reference.feasible(transition, row.tolist()) for row in tokens]
    np.testing.assert_array_equal(got.feasible, feasible)
    assert np.all(got.feasible[:40])  # what the chain emits
    np.testing.assert_array_equal(outside, np.where(feasible, got.value, -np.inf))


@functools.cache
def golden():
    with np.load(Path(__file__).parents[1] / "golden" / "ehrlich.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.mark.parametrize("i", range(4))
def test_official_values(i):
    """Those of pytorch-holo, from the file made by tests/golden/make_ehrlich.py (q divides k there)."""
    file = {key.removeprefix(f"{i}_"): x for key, x in golden().items() if key.startswith(f"{i}_")}
    instance = ehrlich.instance(file["transition"], file["motifs"], file["spacings"], quantization=file["quantization"])
    for e in (0.0, 1.5):
        got, outside = every(instance._replace(epistasis=jnp.float32(e)), file["tokens"])
        np.testing.assert_array_equal(got.quality, file["quality"])
        np.testing.assert_array_max_ulp(np.asarray(outside), file[f"value_{e}"], 2)
    assert len(np.unique(file["value_0.0"])) > 1
    np.testing.assert_allclose(ehrlich.stationary_distribution(file["transition"]), file["stationary"], atol=1e-6)


@pytest.mark.parametrize("i", range(len(SIZES)))
def test_random_instances_have_an_optimum(i):
    """Over forty seeds: rows are probabilities, two steps lead anywhere, motifs fit, the certificate says 1 and where they are."""
    size = SIZES[i]
    batch = jax.jit(jax.vmap(functools.partial(ehrlich.random_instance, **size)))(jax.random.split(jax.random.key(2), 40))
    transition = np.asarray(batch.transition)
    np.testing.assert_allclose(transition.sum(-1), 1, rtol=1e-5)
    assert np.all(np.linalg.matrix_power(transition, 2) > 0) and np.all(np.diagonal(transition, axis1=1, axis2=2) > 0)
    width = 2 * int(0.4 * size["num_letters"]) + 1
    allowed = (transition > 0).sum(-1)
    assert np.all((allowed == width) | (allowed == width + 1))
    assert np.all(batch.offsets[..., 0] == 0) and np.all(np.diff(batch.offsets, axis=-1) >= 1)
    assert np.all((batch.offsets[..., -1] + 1).sum(-1) <= size["length"])
    repeats = np.diff(np.asarray(batch.motifs).reshape(40, -1), axis=-1) == 0
    assert np.any(repeats) == size.get("motif_repeats", True)

    @jax.jit
    @jax.vmap
    def prove(instance):
        tokens = ehrlich.optimal_sequence(instance, length=size["length"])
        return tokens, ehrlich.certify(instance, tokens)

    best, proof = prove(batch)
    np.testing.assert_array_equal(proof.value, ehrlich.OPTIMUM)
    assert np.all(proof.feasible) and np.all(proof.quality == 1)
    for instance, tokens, positions in zip(range(40), np.asarray(best), np.asarray(proof.positions)):
        for motif, offsets, place in zip(batch.motifs[instance], batch.offsets[instance], positions):
            np.testing.assert_array_equal(tokens[place + np.asarray(offsets)], motif)


def test_by_hand():
    """v = 3, 2 -> 0 banned; the motif 0 1 2 with gaps 1 and 2."""
    transition = np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.0, 0.5, 0.5]])
    instance = ehrlich.instance(transition, np.array([[0, 1, 2]]), np.array([[1, 2]]))
    value = jax.jit(ehrlich.value)
    for tokens, wanted in (([0, 1, 1, 2], 1), ([0, 1, 1, 1, 2], 2 / 3), ([2, 0, 1, 1, 2], 0), ([1, 1, 1, 1], 1 / 3), ([0, 1, 1], 0)):
        np.testing.assert_allclose(value(instance, jnp.array(tokens)), wanted, rtol=1e-6)
    quality, feasible = jax.jit(lambda tokens: (ehrlich.motif_quality(instance, tokens), ehrlich.is_feasible(instance, tokens)))(
        jnp.array([2, 0, 1, 1, 2])
    )
    assert quality == 1 and not feasible
    assert jax.jit(ehrlich.certify)(instance, jnp.array([0, 1, 1])).positions == -1  # the motif needs four places
    np.testing.assert_array_equal(ehrlich.optimal_sequence(instance, length=6), [0, 1, 1, 2, 2, 2])
    coarse = instance._replace(quantization=jnp.int32(1), epistasis=jnp.float32(1))
    assert value(coarse, jnp.array([0, 1, 1, 1])) == 0
    bent = instance._replace(epistasis=jnp.float32(1.5))
    np.testing.assert_allclose(value(bent, jnp.array([0, 1, 1, 1])), 2 / 3 * (1 - 1.5 * 2 / 9), rtol=1e-6)


def test_the_chain(x64):
    transition = np.asarray(problem(0).transition, np.float64)
    transition /= transition.sum(1, keepdims=True)
    pi = jax.jit(ehrlich.stationary_distribution)(transition)
    np.testing.assert_allclose(pi @ transition, pi, atol=1e-14)
    instance = problem(0)._replace(transition=jnp.asarray(transition), epistasis=jnp.float64(0))
    path = jax.jit(functools.partial(ehrlich.sample_feasible, length=20000))(jax.random.key(0), instance)
    pairs = np.zeros((4, 4))
    np.add.at(pairs, (path[:-1], path[1:]), 1)
    np.testing.assert_allclose(pairs / pairs.sum(1, keepdims=True), transition, atol=0.04)  # some 4 standard errors
    assert np.all(pairs[transition == 0] == 0)


def test_the_relaxation(x64):
    """Exact mass of the feasible set, equal to the value at one-hot rows if q = k, and differentiable."""
    instance = jax.tree.map(lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a, problem(0))
    rng = np.random.default_rng(0)
    x = rng.dirichlet(np.ones(4), 5)
    short = instance._replace(motifs=instance.motifs[:, :1], offsets=instance.offsets[:, :1])  # one letter: h = its largest probability
    wanted = reference.feasible_mass(np.asarray(instance.transition), x) * np.prod([x[:, int(m)].max() for m in short.motifs[:, 0]])
    np.testing.assert_allclose(jax.jit(ehrlich.relaxed_value)(short, x), wanted, rtol=1e-12)
    tokens = population(0)
    relaxed = jax.jit(jax.vmap(ehrlich.relaxed_value, in_axes=(None, 0)))(instance, jax.nn.one_hot(tokens, 4, dtype=jnp.float64))
    np.testing.assert_allclose(relaxed, every(instance, tokens)[0].value, rtol=1e-12)
    rows, direction = rng.dirichlet(np.ones(4), 12), rng.normal(size=(12, 4))
    f = jax.jit(jax.value_and_grad(ehrlich.relaxed_value, argnums=1))
    slope = (f(instance, rows + 1e-6 * direction)[0] - f(instance, rows - 1e-6 * direction)[0]) / 2e-6
    np.testing.assert_allclose(np.sum(f(instance, rows)[1] * direction), slope, rtol=1e-6)


def test_evolution_on_the_oracle():
    """From one letter throughout, which is feasible, to a proven optimum."""
    instance, starts = problem(0), np.repeat(np.arange(4)[:, None], 12, axis=1)
    options = {"num_letters": 4, "num_designs": 4, "num_generations": 30, "num_parents": 64, "num_children": 128}

    @jax.jit
    def run(key):
        found = baselines.genetic_algorithm(ehrlich.score, instance, key, starts, **options)
        return found, ehrlich.certify(instance, found.tokens[0])

    found, proof = run(jax.random.key(0))
    assert found.trajectory[0, 0] < 1 and found.predicted[0] == proof.value == ehrlich.OPTIMUM


def test_one_trace_for_all_instances():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def f(instance, tokens):
        return ehrlich.value(instance, tokens)

    tokens = population(0)[0]
    for seed in range(4):
        f(problem(0, seed)._replace(quantization=jnp.int32(1 + seed), epistasis=jnp.float32(seed)), tokens)


def test_strict_promotion(strict):
    @jax.jit
    def run(key):
        key_instance, key_path = jax.random.split(key)
        instance = ehrlich.random_instance(key_instance, **SIZES[3])
        tokens = ehrlich.sample_feasible(key_path, instance, length=64)
        rows = jax.nn.one_hot(tokens, 32, dtype=jnp.bfloat16)
        return ehrlich.value(instance, tokens), ehrlich.relaxed_value(instance, rows)

    with jax.debug_key_reuse(True):
        assert all(value.dtype == jnp.float32 for value in run(jax.random.key(0)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 7}, "2 motifs of 4 letters do not fit into 'length' 7"),
        ({"num_letters": 2}, "'num_letters' is 2, expected at least 3"),
        ({"num_motifs": 0}, "'num_motifs' is 0, expected at least 1"),
        ({"bandwidth": 0}, "'bandwidth' 0 lets 1 of 4 letters follow"),
        ({"quantization": 5}, "'quantization' is 5, expected within 1..motif_length=4"),
    ],
)
def test_errors_of_random_instances(change, message):
    with pytest.raises(ValueError, match=f"ehrlich.random_instance: {message}"):
        ehrlich.random_instance(jax.random.key(0), **{**SIZES[0], **change})


def test_errors():
    transition, motifs, gaps = np.full((3, 3), 1 / 3), np.array([[0, 1]]), np.array([[1]])
    with pytest.raises(ValueError, match=r"'spacings' has shape \(1, 2\), expected \[c k-1\]"):
        ehrlich.instance(transition, motifs, np.array([[1, 1]]))
    with pytest.raises(ValueError, match="'spacings' holds 0, expected at least 1"):
        ehrlich.instance(transition, motifs, 0 * gaps)
    with pytest.raises(ValueError, match="rows of 'transition' must be probabilities"):
        ehrlich.instance(2 * transition, motifs, gaps)
    with pytest.raises(ValueError, match=r"'motifs' holds letters outside 0\.\.2"):
        ehrlich.instance(transition, motifs + 2, gaps)
    with pytest.raises(ValueError, match="'quantization' is 3, expected within"):
        ehrlich.instance(transition, motifs, gaps, quantization=3)
    instance = ehrlich.instance(transition, motifs, gaps)
    with pytest.raises(ValueError, match=r"ehrlich.value: 'tokens' has shape \(2, 3\), expected \[l\]"):
        ehrlich.value(instance, np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="'tokens' has dtype float32, expected integers"):
        ehrlich.value(instance, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="'length' is 1, but the spaced motifs need 2 places"):
        ehrlich.optimal_sequence(instance, length=1)
    with pytest.raises(ValueError, match="'length' is 0, expected at least 1"):
        ehrlich.sample_feasible(jax.random.key(0), instance, length=0)
    with pytest.raises(ValueError, match="'x' has shape"):
        ehrlich.relaxed_value(instance, np.zeros((4, 5)))
