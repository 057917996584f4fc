"""The baselines beside closed forms: distinct choices, ensembles, ascents, COMs, CbAS, evolution, CMA-ES, the perceptrons."""

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference.cma import Cma

from janax.algorithms.bib import baselines
from janax.algorithms.bib.baselines import designs as designs_module

V, L = 3, 5
SPACE = np.array(list(itertools.product(range(V), repeat=L)), np.int32)


def linear(params, x):
    """The closed-form proxy of most tests: additive over positions."""
    return jnp.sum(params * x)


def weights(seed=0, shape=(L, V)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def scores_of(w, tokens):
    return np.asarray(w)[np.arange(tokens.shape[1])[None], tokens].sum(1)


def ranked(w):
    return np.sort(scores_of(w, SPACE))[::-1]


def starts_of(n, seed=1):
    return SPACE[np.random.default_rng(seed).choice(len(SPACE), n, replace=False)]


def check_designs(designs, w, m, steps):
    """What holds for every method."""
    chex.assert_shape((designs.tokens, designs.predicted, designs.trajectory), [(m, L), (m,), (steps + 1, m)])
    assert designs.tokens.dtype == jnp.int32
    np.testing.assert_allclose(designs.predicted, scores_of(w, np.asarray(designs.tokens)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.sort(designs.trajectory[-1]), np.sort(designs.predicted), rtol=1e-5, atol=1e-5)
    assert designs.num_distinct == len(np.unique(np.asarray(designs.tokens), axis=0))


# --- distinct designs


def choose(tokens, predicted, m, preferred=None):
    """The documented order, by a dictionary."""
    falling = np.where(np.isnan(predicted), -np.inf, predicted)
    late = np.zeros(len(tokens)) if preferred is None else 1 - preferred
    order = np.lexsort((np.arange(len(tokens)), -falling, late))
    seen, first, again = set(), [], []
    for i in order:
        (again if tuple(tokens[i]) in seen else first).append(i)
        seen.add(tuple(tokens[i]))
    return (first + again)[:m], min(len(first), m)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 19])
def test_distinct(length):
    rng = np.random.default_rng(length)
    tokens = rng.integers(-2, 3, (60, length))[rng.integers(0, 60, 200)]
    predicted = np.round(rng.normal(size=200), 1).astype(np.float32)
    predicted[:3] = np.nan, np.inf, -np.inf
    preferred = rng.random(200) < 0.1
    for chosen, (index, count) in (
        (jax.jit(baselines.distinct, static_argnums=2)(tokens, predicted, 80), choose(tokens, predicted, 80)),
        (
            jax.jit(functools.partial(baselines.distinct, num_designs=30))(tokens, predicted, preferred=preferred),
            choose(tokens, predicted, 30, preferred),
        ),
    ):
        np.testing.assert_array_equal(chosen.index, index)
        np.testing.assert_array_equal(chosen.tokens, tokens[index])
        np.testing.assert_array_equal(chosen.predicted, predicted[index])
        assert chosen.num_distinct == count
    assert jax.jit(baselines.count_distinct)(tokens) == len(np.unique(tokens, axis=0))


def test_distinct_in_pieces_and_in_batches():
    """An archive fed in pieces is one choice among all; vmap is a loop."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (4, 30, 4)).astype(np.int32)
    predicted = (
        np.round(scores_of(weights(3, (4, 3)), tokens.reshape(-1, 4)), 3).reshape(4, 30).astype(np.float32)
    )  # a function of the tokens
    choose_some = jax.jit(baselines.distinct, static_argnums=2)
    add = jax.jit(designs_module.archive, static_argnums=2)
    former = add(tokens[0], predicted[0], 25)
    for piece in zip(tokens[1:], predicted[1:]):
        former = add(*piece, 25, former)
    whole = choose_some(tokens.reshape(-1, 4), predicted.reshape(-1), 25)
    np.testing.assert_array_equal(former.predicted, whole.predicted)
    worst = np.asarray(whole.predicted)[-1]  # ties at the end may differ
    for got, wanted in zip(np.asarray(former.tokens), np.asarray(whole.tokens)):
        assert np.array_equal(got, wanted) or scores_of(weights(3, (4, 3)), got[None]).round(3) <= worst + 1e-6
    batched = jax.jit(jax.vmap(lambda t, p: baselines.distinct(t, p, 10)))(tokens, predicted)
    for i in range(4):
        chex.assert_trees_all_equal(jax.tree.map(lambda x, i=i: x[i], batched), choose_some(tokens[i], predicted[i], 10))


def test_too_few_distinct():
    tokens, predicted = np.array([[1, 2], [0, 0], [1, 2], [1, 2]]), np.array([1.0, 0.0, 3.0, 2.0])
    chosen = jax.jit(baselines.distinct, static_argnums=2)(tokens, predicted, 4)
    np.testing.assert_array_equal(chosen.index, [2, 1, 3, 0])
    assert chosen.num_distinct == 2


# --- ensembles and what needs no optimisation


def test_ensembles(x64):
    w = np.random.default_rng(0).normal(size=(4, L, V))
    x = np.random.default_rng(1).dirichlet(np.ones(V), L)
    values = (w * x).sum((1, 2))
    score = functools.partial(baselines.ensemble_score, linear)
    np.testing.assert_allclose(score(w, x), values.mean(), rtol=1e-12)
    np.testing.assert_allclose(score(w, x, reduce="min"), values.min(), rtol=1e-12)
    lcb = jax.jit(functools.partial(score, reduce="lcb"))
    np.testing.assert_allclose(lcb(w, x, num_deviations=2.0), values.mean() - 2 * values.std(), rtol=1e-12)
    mixed = baselines.ensemble_score((linear, lambda p, x: p * x[0, 0]), (w[0], 3.0), x, reduce="min")
    np.testing.assert_allclose(mixed, min(values[0], 3 * x[0, 0]), rtol=1e-12)
    same = np.stack([w[0], w[0]])
    gradient = jax.grad(functools.partial(score, reduce="lcb"), argnums=1)(same, x)
    np.testing.assert_allclose(gradient, w[0], rtol=1e-12)  # no infinite slope where members agree


def test_random_and_best():
    w = weights()
    found = jax.jit(lambda key: baselines.random_designs(linear, w, key, num_letters=V, length=L, num_designs=200))(jax.random.key(0))
    check_designs(found, w, 200, 0)
    counts = np.array([np.bincount(column, minlength=V) for column in np.asarray(found.tokens).T])
    assert np.all(np.abs(counts - 200 / V) < 5 * math.sqrt(200 * (1 / V) * (1 - 1 / V)))
    best = jax.jit(lambda space: baselines.best_predicted(linear, w, space, num_letters=V, num_designs=20, batch_size=50))(SPACE)
    check_designs(best, w, 20, 0)
    np.testing.assert_allclose(best.predicted, ranked(w)[:20], rtol=1e-5)
    scores = np.array([0.0, 2.0, 1.0, 2.0])
    offline = jax.jit(functools.partial(baselines.best_offline, num_designs=3))(SPACE[[5, 6, 7, 6]], scores)
    np.testing.assert_array_equal(offline.tokens, SPACE[[6, 6, 7]])  # ties by row, repeats and all
    np.testing.assert_array_equal(offline.predicted, [2, 2, 1])
    assert offline.num_distinct == 2


# --- gradient ascent


@pytest.mark.parametrize("relaxation", ["straight_through", "soft"])
def test_ascent_finds_the_optimum_of_a_linear_proxy(relaxation):
    w, starts = weights(), starts_of(6)
    found = jax.jit(lambda w: baselines.gradient_ascent(linear, w, starts, num_letters=V, num_steps=60, relaxation=relaxation))(w)
    check_designs(found, w, 6, 60)
    np.testing.assert_array_equal(found.tokens, np.tile(w.argmax(1), (6, 1)))
    np.testing.assert_allclose(found.trajectory[0], scores_of(w, starts), rtol=1e-5)
    assert found.num_distinct == 1


def test_free_ascent_by_hand():
    w, starts = weights(), starts_of(4)
    options = {"num_letters": V, "num_steps": 3, "relaxation": "free", "transform": optax.identity()}
    run = jax.jit(lambda rate: baselines.gradient_ascent(linear, w, starts, learning_rate=rate, **options))
    rows = np.eye(V, dtype=np.float32)[starts]
    batched = jax.vmap(run)(jnp.array([0.1, 0.3, 0.6]))
    for i, rate in enumerate((0.1, 0.3, 0.6)):
        path = [scores_of(w, (rows + t * rate * w).argmax(-1)) for t in range(4)]
        found = run(rate)
        np.testing.assert_allclose(found.trajectory, path, rtol=1e-5)
        np.testing.assert_array_equal(found.tokens, (rows + 3 * rate * w).argmax(-1))
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], batched), found, rtol=1e-6)


def test_what_is_handed_out():
    """Repeats are replaced by the best others on the way; `best` forgets the end of the path."""
    w, starts = weights(), starts_of(6)
    run = functools.partial(baselines.gradient_ascent, linear, w, starts, num_letters=V, num_steps=40)
    last, distinct, best = jax.jit(lambda: tuple(run(select=select) for select in baselines.SELECTIONS))()
    assert last.num_distinct == 1 and distinct.num_distinct == best.num_distinct == 6
    np.testing.assert_array_equal(distinct.tokens[0], last.tokens[0])
    chex.assert_trees_all_close(distinct.tokens, best.tokens)  # the end is the optimum here
    assert np.all(np.diff(best.predicted) <= 0)
    np.testing.assert_array_equal(last.trajectory, best.trajectory)
    given = jax.jit(lambda: run(start_variables=10 * jax.nn.one_hot(starts, V), num_steps=0))()
    np.testing.assert_array_equal(given.tokens, starts)


# --- COMs


@pytest.mark.parametrize("through_ascent", [False, True])
@pytest.mark.parametrize("adversary", ["last", "path"])
def test_coms_loss_of_a_linear_proxy(adversary, through_ascent, x64, strict):
    """x_t = x + t rate w, so the overestimation is rate |w|^2 times T, or (T + 1)/2 along the path."""
    rng = np.random.default_rng(0)
    w, x, y = rng.normal(size=(L, V)), rng.dirichlet(np.ones(V), (7, L)), rng.normal(size=7)
    alpha, rate, steps = 0.7, 0.3, 4
    times = steps if adversary == "last" else (steps + 1) / 2
    options = {"num_ascent_steps": steps, "adversary": adversary, "through_ascent": through_ascent}
    f = jax.jit(jax.value_and_grad(functools.partial(baselines.coms_loss, linear, **options), has_aux=True))
    (value, info), gradient = f(w, x, y, alpha=alpha, ascent_rate=rate)
    residual = (w * x).sum((1, 2)) - y
    np.testing.assert_allclose(info.squared_error, np.mean(residual**2), rtol=1e-12)
    np.testing.assert_allclose(info.overestimation, rate * times * np.sum(w**2), rtol=1e-12)
    np.testing.assert_allclose(info.shift, rate * steps * np.sqrt(np.mean(w**2)), rtol=1e-12)
    np.testing.assert_allclose(value, np.mean(residual**2) + alpha * rate * times * np.sum(w**2), rtol=1e-12)
    wanted = 2 * np.mean(residual[:, None, None] * x, 0) + (2 if through_ascent else 1) * alpha * rate * times * w
    np.testing.assert_allclose(gradient, wanted, rtol=1e-11)


def test_coms_loss_of_a_curved_proxy(x64):
    """Three steps by hand on f = w.x - c |x|^2 / 2."""
    rng = np.random.default_rng(0)
    w, c, x, y = rng.normal(size=(L, V)), 0.4, rng.dirichlet(np.ones(V), (3, L)), rng.normal(size=3)

    def curved(params, x):
        return jnp.sum(params["w"] * x) - params["c"] * jnp.sum(x * x) / 2

    found = x
    for _ in range(3):
        found = found + 0.2 * (w - c * found)
    f = lambda x: (w * x).sum((1, 2)) - c * (x * x).sum((1, 2)) / 2  # noqa: E731
    value, info = jax.jit(functools.partial(baselines.coms_loss, curved, num_ascent_steps=3))(
        {"w": w, "c": c}, x, y, alpha=2.0, ascent_rate=0.2
    )
    np.testing.assert_allclose(info.overestimation, f(found).mean() - f(x).mean(), rtol=1e-12)
    np.testing.assert_allclose(value, np.mean((f(x) - y) ** 2) + 2 * info.overestimation, rtol=1e-12)


def test_coms_loss_on_meshes(mesh):
    rng = np.random.default_rng(0)
    w, x, y = weights(), rng.dirichlet(np.ones(V), (8, L)).astype(np.float32), rng.normal(size=8).astype(np.float32)
    f = jax.jit(jax.value_and_grad(functools.partial(baselines.coms_loss, linear, num_ascent_steps=2), has_aux=True))
    placed = (x, y) if mesh is None else tuple(jax.device_put(a, jax.P("data")) for a in (x, y))
    (value, info), gradient = f(w, *placed, alpha=0.5, ascent_rate=0.1)
    residual = (w * x).sum((1, 2)) - y
    np.testing.assert_allclose(value, np.mean(residual**2) + 0.5 * 0.2 * np.sum(w**2), rtol=1e-5)
    np.testing.assert_allclose(gradient, 2 * np.mean(residual[:, None, None] * x, 0) + 0.5 * 0.2 * w, rtol=1e-4, atol=1e-6)
    assert np.isfinite(info.shift)


def test_dual_steps(x64):
    start = baselines.dual_init(jnp.float64(0.5))
    up = baselines.dual_step(start, 3.0, target=2.0, learning_rate=0.01)
    down = baselines.dual_step(start, 1.0, target=2.0, learning_rate=0.01)
    np.testing.assert_allclose(
        [up.alpha, down.alpha], 0.5 * np.exp([0.01, -0.01]), rtol=1e-6
    )  # Adam's first step has the length of its rate
    plain = functools.partial(baselines.dual_step, rule="projected", target=2.0, learning_rate=0.1)
    np.testing.assert_allclose([plain(start, 3.0).alpha, plain(start, -9.0).alpha], [0.6, 0.0], rtol=1e-12)
    state, m, v, log_alpha = start, 0.0, 0.0, math.log(0.5)
    for t, over in enumerate((3.0, 1.0, 2.5), start=1):
        gradient = math.exp(log_alpha) * (2.0 - over)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        log_alpha -= 0.01 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
        state = baselines.dual_step(state, over)
    np.testing.assert_allclose(state.alpha, math.exp(log_alpha), rtol=1e-12)


def test_coms_is_conservative():
    """Where the plain proxy climbs far beyond the target, the conservative one does not; its designs are ascents from the starts."""
    w = weights()
    scores = scores_of(w, SPACE)
    scores = ((scores - scores.mean()) / scores.std()).astype(np.float32)
    options = {"num_letters": V, "num_steps": 200, "num_ascent_steps": 5, "batch_size": 64, "widths": (32,), "ascent_rate": 0.3}
    fit = jax.jit(lambda key, target: baselines.fit_coms(key, SPACE, scores, target=target, dual_rate=0.05, **options))
    free, tight = (fit(jax.random.key(0), jnp.float32(target)) for target in (1e6, 0.5))
    assert tight.info.overestimation[-20:].mean() < 1.0 < 0.5 * free.info.overestimation[-20:].mean()
    assert tight.alpha[-1] > 0.1 > free.alpha[-1]
    starts = starts_of(6)
    run = jax.jit(lambda params: baselines.coms(baselines.mlp_score, params, starts, num_letters=V, num_steps=5, ascent_rate=0.3))
    found = run(free.params)
    chex.assert_shape(found.trajectory, (6, 6))
    assert found.trajectory[-1].mean() > found.trajectory[0].mean()


# --- CbAS


def test_independent_positions(x64):
    tokens, weight = np.array([[0, 1], [0, 2], [2, 2]]), np.array([1.0, 2.0, 1.0])
    model = baselines.site_fit(tokens, weight, num_letters=3, smoothing=0.3)
    frequency = np.array([[0.75, 0, 0.25], [0, 0.25, 0.75]])
    np.testing.assert_allclose(np.exp(model), 0.7 * frequency + 0.1, rtol=1e-12)
    np.testing.assert_allclose(baselines.site_log_prob(model, jnp.array([2, 0])), model[0, 2] + model[1, 0], rtol=1e-12)
    np.testing.assert_allclose(np.exp(baselines.site_fit(tokens, 0 * weight, num_letters=3)), 1 / 3, rtol=1e-12)
    np.testing.assert_array_equal(baselines.site_refit(model, tokens, jnp.zeros(3)), model)
    drawn = jax.vmap(baselines.site_sample, in_axes=(None, 0))(model, jax.random.split(jax.random.key(0), 4000))
    share = np.stack([np.bincount(column, minlength=3) for column in np.asarray(drawn).T]) / 4000
    np.testing.assert_allclose(share, np.exp(model), atol=0.035)


def test_importance_weights(x64):
    rng = np.random.default_rng(0)
    log_prior, log_model, f = rng.normal(size=(3, 9))
    normal = lambda u: 0.5 * (1 + math.erf(u / math.sqrt(2)))  # noqa: E731
    chance = np.array([normal((value - 0.2) / 0.7) for value in f])
    wanted = (np.exp(0.5 * (log_prior - log_model)) * chance) ** 0.2
    got = baselines.importance_weights(log_prior, log_model, f, 0.2, spread=0.7, ratio_power=0.5, weight_power=0.2)
    np.testing.assert_allclose(got, wanted / wanted.max(), rtol=1e-10)
    hard = baselines.importance_weights(log_prior, log_model, f, 0.2, ratio_power=0.0)
    np.testing.assert_array_equal(hard, f >= 0.2)
    assert not np.any(baselines.importance_weights(log_prior, log_model, f, 99.0))


def test_cbas():
    """The level rises; the prior holds it back, so DbAS goes further; a generative model of one's own."""
    w = weights()
    prior = baselines.site_fit(SPACE[scores_of(w, SPACE) < np.median(scores_of(w, SPACE))], num_letters=V)
    options = {"num_letters": V, "num_designs": 64, "num_iters": 3, "num_samples": 256, "quantile": 0.5}
    run = jax.jit(lambda key, power, spread: baselines.cbas(linear, w, key, prior, ratio_power=power, spread=spread, **options))
    found, further = run(jax.random.key(0), 1.0, 0.1), run(jax.random.key(0), 0.0, 0.1)
    check_designs(found, w, 64, 3)
    assert found.trajectory[0].mean() + 0.5 < found.predicted.mean() < further.predicted.mean()
    again = jax.vmap(run, in_axes=(0, None, None))(jax.random.split(jax.random.key(1), 2), 1.0, 0.1)
    assert np.any(again.tokens[0] != again.tokens[1])

    def half_fit(model, tokens, weights):
        return {"site": 0.5 * (model["site"] + baselines.site_refit(model["site"], tokens, weights))}

    own = {
        "sample_fn": lambda model, key: baselines.site_sample(model["site"], key),
        "log_prob_fn": lambda model, tokens: baselines.site_log_prob(jax.nn.log_softmax(model["site"]), tokens),
        "fit_fn": half_fit,
        "spread": lambda w, x: 0.05 * jnp.ones(()),
        "select": "best",
    }
    best = jax.jit(lambda key: baselines.cbas(linear, w, key, {"site": prior}, **options, **own))(jax.random.key(0))
    assert best.num_distinct == 64 and np.all(np.diff(best.predicted) <= 0)
    assert best.predicted[0] > found.trajectory[0].mean()


# --- evolution


def test_genetic_algorithm():
    """Finds the best 16 of 243 exactly, distinct, and never loses what it has."""
    w, starts = weights(), starts_of(3)
    options = {"num_letters": V, "num_designs": 16, "num_generations": 15, "num_parents": 24, "num_children": 64}
    run = jax.jit(lambda key, rate: baselines.genetic_algorithm(linear, w, key, starts, mutation_rate=rate, **options))
    found = run(jax.random.key(0), 0.2)
    check_designs(found, w, 16, 15)
    assert found.num_distinct == 16
    np.testing.assert_allclose(found.predicted, ranked(w)[:16], rtol=1e-5)
    assert np.all(np.diff(np.asarray(found.trajectory).max(1)) >= 0)
    batched = jax.vmap(run, in_axes=(None, 0))(jax.random.key(0), jnp.array([0.2, 0.0]))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], batched), found, rtol=1e-6)
    assert batched.num_distinct[1] <= 16 and batched.predicted[1, 0] <= found.predicted[0]  # without mutation only what the starts hold


def test_adalead():
    w, starts = weights(), starts_of(3)
    options = {"num_letters": V, "num_designs": 8, "num_rounds": 8, "num_parents": 16, "num_rollout_steps": 10}
    found = jax.jit(lambda key: baselines.adalead(linear, w, key, starts, batch_size=16, **options))(jax.random.key(0))
    check_designs(found, w, 8, 8)
    assert found.num_distinct == 8
    np.testing.assert_allclose(found.predicted, ranked(w)[:8], rtol=1e-5)


def test_variation():
    key, tokens = jax.random.key(0), jnp.asarray(SPACE)
    changed = baselines.mutate(key, tokens, 0.25, num_letters=V)
    assert np.all((changed >= 0) & (changed < V))
    share = np.mean(np.asarray(changed) != SPACE)
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / SPACE.size)
    np.testing.assert_array_equal(baselines.mutate(key, tokens, 0.0, num_letters=V), SPACE)
    assert np.all(np.asarray(baselines.mutate(key, tokens, 1.0, num_letters=V)) != SPACE)
    first, second = tokens, (tokens + 1) % V
    child = np.asarray(baselines.crossover(key, first, second))
    assert 0.4 < np.mean(child == first) < 0.6 and np.all((child == first) | (child == second))
    one, other = baselines.recombine(key, first, second, 0.3)
    np.testing.assert_array_equal(one + other, first + second)
    same, swapped = baselines.recombine(key, first, second, 1.0)  # changes over at every letter
    np.testing.assert_array_equal(same[:, 0], first[:, 0])
    np.testing.assert_array_equal(same[:, 1], second[:, 1])
    np.testing.assert_array_equal(swapped[:, 1], first[:, 1])


# --- CMA-ES


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("active", [False, True])
def test_cma_beside_the_tutorial(active, diagonal, x64, strict):
    n, population = 6, 9
    rng = np.random.default_rng(0)
    mean, hessian = rng.normal(size=n), np.diag(np.logspace(0, 3, n))
    state, reference = baselines.cma_init(mean, 0.7, diagonal=diagonal), Cma(mean, 0.7, population, active=active, diagonal=diagonal)
    ask = jax.jit(functools.partial(baselines.cma_ask, population=population))
    tell = jax.jit(functools.partial(baselines.cma_tell, active=active))
    for generation in range(12):
        samples = np.asarray(ask(state, jax.random.key(generation)))
        values = -np.einsum("pi,ij,pj->p", samples, hessian, samples)
        state = tell(state, samples, values)
        reference.tell(samples, values)
        covariance = np.diag(state.covariance) if diagonal else state.covariance
        for got, wanted in (
            (state.mean, reference.m),
            (state.sigma, reference.sigma),
            (covariance, reference.C),
            (state.path_c, reference.pc),
            (state.path_sigma, reference.ps),
        ):
            np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)
    assert state.generation == 12
    if not diagonal:
        np.testing.assert_allclose(state.basis @ jnp.diag(state.scales**2) @ state.basis.T, state.covariance, rtol=1e-10, atol=1e-12)


def test_cma_samples_and_constants(x64):
    np.testing.assert_allclose(baselines.cma_constants(10).weights[:5].sum(), 1, rtol=1e-12)
    assert len(baselines.cma_constants(10).weights) == 10  # 4 + floor(3 log 10)
    passive = baselines.cma_constants(10, active=False)
    assert passive.weights.min() == 0 and baselines.cma_constants(10).weights.min() < 0
    np.testing.assert_allclose(passive.mu_eff, 3.1672, atol=1e-4)  # the value that the tutorial's own code prints for n = 10
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    state = baselines.cma_init(np.ones(3), 2.0)._replace(basis=jnp.asarray(turn), scales=jnp.array([1.0, 2.0, 3.0]))
    samples = np.asarray(baselines.cma_ask(state, jax.random.key(0), population=40000))
    covariance = 4 * turn @ np.diag([1.0, 4.0, 9.0]) @ turn.T
    np.testing.assert_allclose(np.cov(samples.T), covariance, atol=5 * 36 * math.sqrt(2 / 40000))


def test_cma_converges(x64):
    """On the rotated ellipsoid the full form reaches 1e-8 in the generations that the tutorial lets expect; the diagonal one on the straight one."""
    n = 5
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))[0]
    scales = jnp.logspace(0, 4, n)

    def run(diagonal, turn):
        def generation(state, key):
            samples = baselines.cma_ask(state, key, population=8)
            return baselines.cma_tell(state, samples, -jnp.sum(scales[None] * (samples @ turn) ** 2, axis=1)), None

        return jax.lax.scan(generation, baselines.cma_init(jnp.ones(n), 0.5, diagonal=diagonal), jax.random.split(jax.random.key(0), 500))[
            0
        ]

    for diagonal, rotation in ((False, turn), (True, np.eye(n))):
        state = jax.jit(run, static_argnums=0)(diagonal, rotation)
        assert np.abs(state.mean).max() < 1e-8 and state.sigma < 1e-4


def test_cma_runs():
    w, starts = weights(), starts_of(4)
    options = {"num_letters": V, "num_generations": 25, "select": "distinct"}
    found = jax.jit(lambda key, sigma: baselines.cma_es(linear, w, key, starts, sigma=sigma, **options))(jax.random.key(0), 0.5)
    assert found.num_distinct == 4
    np.testing.assert_allclose(found.predicted, scores_of(w, np.asarray(found.tokens)), rtol=1e-5)
    np.testing.assert_allclose(found.trajectory[0], scores_of(w, starts), rtol=1e-5)
    np.testing.assert_array_equal(found.tokens[0], w.argmax(1))
    options = {"num_letters": V, "num_generations": 15, "diagonal": True, "relaxation": "straight_through"}
    plain = jax.jit(lambda key: baselines.cma_es(linear, w, key, starts, **options))(jax.random.key(0))
    check_designs(plain, w, 4, 15)
    assert np.all(np.diff(plain.trajectory, axis=0) >= -1e-6)  # the best so far
    assert plain.predicted.mean() > plain.trajectory[0].mean()


# --- perceptrons


def test_perceptron_by_hand(x64):
    params = baselines.mlp_init(jax.random.key(0), num_letters=V, length=L, widths=(7, 6))
    assert [layer.weight.shape for layer in params] == [(15, 7), (7, 6), (6, 1)]
    params = tuple(layer._replace(bias=layer.bias + 0.1) for layer in params)
    x = np.random.default_rng(0).dirichlet(np.ones(V), L)
    h = x.reshape(-1)
    for layer in params[:-1]:
        h = np.maximum(h @ np.asarray(layer.weight) + 0.1, 0)
    np.testing.assert_allclose(baselines.mlp_score(params, x), h @ np.asarray(params[-1].weight)[:, 0] + 0.1, rtol=1e-12)


def test_ensemble_fit():
    """Members differ, learn, and the fit is the same under vmap over keys; of a linear model, least squares."""
    w = weights()
    scores = scores_of(w, SPACE)
    fit = functools.partial(baselines.fit_ensemble, num_letters=V, num_members=3, num_steps=150, batch_size=64, widths=(32, 32))
    run = jax.jit(lambda key: fit(key, SPACE, scores, learning_rate=1e-2))
    one = run(jax.random.key(0))
    assert one.losses.shape == (150, 3) and np.all(one.losses[-10:].mean(0) < 0.02 * one.losses[0])
    assert np.ptp(np.asarray(one.losses[0])) > 0
    many = jax.vmap(run)(jnp.stack([jax.random.key(0), jax.random.key(1)]))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], many.params), one.params, rtol=1e-3, atol=1e-4)
    options = {"num_members": 2, "num_steps": 400, "learning_rate": 0.05, "bootstrap": True, "score_fn": linear}
    of_lines = functools.partial(baselines.fit_ensemble, num_letters=V, init_fn=lambda key: jax.random.normal(key, (L, V)), **options)
    line = jax.jit(of_lines)(jax.random.key(0), SPACE, scores)
    for member in np.asarray(line.params):
        np.testing.assert_allclose(scores_of(member, SPACE), scores, atol=1e-3)


# --- all of them


def test_methods_compose():
    """One trace for a sweep of float hyperparameters; strict keys; a perceptron ensemble as proxy."""
    score_fn = functools.partial(baselines.ensemble_score, baselines.mlp_score, reduce="lcb")
    init = functools.partial(baselines.mlp_init, num_letters=V, length=L, widths=(8,))
    params = jax.vmap(init)(jax.random.split(jax.random.key(0), 2))
    starts = starts_of(4)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def sweep(key, x):
        key_genetic, key_cma = jax.random.split(key)
        evolved = baselines.genetic_algorithm(
            score_fn,
            params,
            key_genetic,
            starts,
            num_letters=V,
            num_designs=4,
            num_generations=2,
            num_parents=8,
            num_children=8,
            mutation_rate=x,
            crossover_rate=x,
        )
        climbed = baselines.gradient_ascent(score_fn, params, starts, num_letters=V, num_steps=2, learning_rate=x, smoothing=x)
        searched = baselines.cma_es(score_fn, params, key_cma, starts, num_letters=V, num_generations=2, sigma=x, smoothing=x)
        return evolved, climbed, searched

    with jax.debug_key_reuse(True):
        for i in range(3):
            evolved, *others = sweep(jax.random.key(i), jnp.float32(0.3 + 0.1 * i))
    assert jax.tree.structure(evolved) == jax.tree.structure(others[0]) == jax.tree.structure(others[1])

    def predicted(params):
        return jnp.sum(baselines.gradient_ascent(score_fn, params, starts, num_letters=V, num_steps=2).predicted)

    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(jax.jit(jax.grad(predicted))(params)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_narrow_parameters(dtype, strict):
    """Rows are float32 at least, and so are predictions."""

    def narrow(params, x):
        return jnp.sum(params * x.astype(params.dtype))

    w, starts = jnp.asarray(weights(), dtype), starts_of(4)

    @jax.jit
    def run(key):
        key_genetic, key_cbas, key_cma = jax.random.split(key, 3)
        few = {"num_letters": V, "num_designs": 4}
        return (
            baselines.gradient_ascent(narrow, w, starts, num_letters=V, num_steps=2, transform=optax.identity()),
            baselines.genetic_algorithm(narrow, w, key_genetic, starts, num_generations=2, num_parents=8, num_children=8, **few),
            baselines.cbas(narrow, w, key_cbas, baselines.site_fit(SPACE, num_letters=V), num_iters=2, num_samples=8, **few),
            baselines.cma_es(narrow, w, key_cma, starts, num_letters=V, num_generations=2),
        )

    for found in run(jax.random.key(0)):
        assert found.predicted.dtype == found.trajectory.dtype == jnp.float32


KEY = 0
W = np.zeros((L, V), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: baselines.distinct(SPACE, np.zeros(9), 2), r"baselines.distinct: 'predicted' has shape \(9,\), expected \[n\] with n=243"),
        (lambda: baselines.distinct(SPACE[:3], np.zeros(3), 4), "'num_designs' is 4, expected at most the 3 of 'tokens'"),
        (lambda: baselines.distinct(SPACE[:3] * 1.0, np.zeros(3), 2), "'tokens' has dtype float32, expected integers"),
        (lambda: baselines.best_offline(SPACE, np.zeros(243), num_designs=244), "'num_designs' is 244, expected at most the 243"),
        (lambda: baselines.ensemble_score(linear, W[None], W, reduce="max"), "'reduce' is 'max', expected one of 'mean', 'min', 'lcb'"),
        (lambda: baselines.ensemble_score((linear, linear), (W,), W), "'params' must be as many trees as 'score_fn' has members, 2"),
        (
            lambda: baselines.gradient_ascent(lambda p, x: x[0], W, SPACE, num_letters=V, num_steps=1),
            r"'score_fn' returned shape \(3,\) for one design, expected \[\]",
        ),
        (lambda: baselines.gradient_ascent(linear, W, SPACE, num_letters=V, relaxation="hard"), "'relaxation' is 'hard'"),
        (lambda: baselines.gradient_ascent(linear, W, SPACE, num_letters=V, select="all"), "'select' is 'all'"),
        (lambda: baselines.gradient_ascent(linear, W, SPACE[0], num_letters=V), r"'starts' has shape \(5,\), expected \[n l\]"),
        (
            lambda: baselines.gradient_ascent(linear, W, SPACE, num_letters=V, start_variables=np.zeros((243, L, 4))),
            r"'start_variables' has shape \(243, 5, 4\), expected \[m l 3\]",
        ),
        (lambda: baselines.coms_loss(linear, W, W[None], np.zeros(2), alpha=1.0), r"coms_loss: 'scores' has shape \(2,\)"),
        (lambda: baselines.coms_loss(linear, W, W[None], np.zeros(1), alpha=1.0, num_ascent_steps=0), "'num_ascent_steps' is 0"),
        (lambda: baselines.coms_loss(linear, W, W[None], np.zeros(1), alpha=1.0, adversary="all"), "'adversary' is 'all'"),
        (lambda: baselines.dual_step(baselines.dual_init(), 0.0, rule="sgd"), "'rule' is 'sgd'"),
        (lambda: baselines.fit_coms(KEY, SPACE, np.zeros(243), num_letters=V, score_fn=linear), "give 'init_fn' with a 'score_fn'"),
        (lambda: baselines.fit_ensemble(KEY, SPACE, np.zeros(243), num_letters=V, score_fn=linear), "give 'init_fn' with a 'score_fn'"),
        (
            lambda: baselines.fit_ensemble(KEY, SPACE, np.zeros(243), num_letters=V, num_members=0),
            "'num_members' is 0, expected at least 1",
        ),
        (
            lambda: baselines.cbas(linear, W, KEY, W, num_letters=V, num_samples=9),
            "'num_designs' is 128, expected at most the 9 of 'num_samples'",
        ),
        (lambda: baselines.genetic_algorithm(linear, W, KEY, SPACE, num_letters=V, num_parents=9), "at most the 9 of 'num_parents'"),
        (
            lambda: baselines.adalead(linear, W, KEY, SPACE, num_letters=V, num_designs=2, num_parents=9),
            "'num_parents' is 9, expected an even",
        ),
        (lambda: baselines.cma_es(linear, W, KEY, SPACE, num_letters=V, population=1), "'population' is 1, expected at least 2"),
        (lambda: baselines.cma_es(linear, W, KEY, SPACE, num_letters=1), "'num_letters' is 1, expected at least 2"),
        (lambda: baselines.cma_init(W, 0.5), r"'mean' has shape \(5, 3\), expected \[n\]"),
        (lambda: baselines.cma_tell(baselines.cma_init(W[0], 0.5), W, np.zeros(4)), r"'values' has shape \(4,\), expected \[p\] with p=5"),
        (lambda: baselines.mlp_init(KEY, num_letters=V, length=L, widths=(0,)), "'widths' is 0, expected at least 1"),
        (
            lambda: baselines.mlp_score((baselines.Layer(np.zeros((4, 1)), np.zeros(1)),), W),
            r"'x' has shape \(5, 3\), expected 4 entries",
        ),
        (lambda: baselines.site_fit(SPACE, np.zeros(3), num_letters=V), r"'weights' has shape \(3,\)"),
        (lambda: baselines.importance_weights(W[0], W[0], W[1], W[0]), r"'level' has shape \(3,\), expected \[\]"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
