"""BIB's losses, adaptive rules and loop against NumPy; BDI; relaxations, refinement and choice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import bib as reference

from janax.algorithms import bib
from janax.jaxlib_ext import kmers, sharding

LENGTH, LETTERS, WIDTH, ROWS = 4, 3, 6, 25


def make_toy(hard=False, seed=0):
    rng = np.random.default_rng(seed)
    mixing, shift = rng.normal(size=(LENGTH * LETTERS, WIDTH)), 0.3 * rng.normal(size=WIDTH)
    tokens = rng.integers(0, LETTERS, (ROWS, LENGTH))
    phi = np.tanh(np.eye(LETTERS)[tokens].reshape(ROWS, -1) @ mixing + shift)
    scores = rng.uniform(size=ROWS)
    y = (scores - scores.mean()) / (scores.std(ddof=1) + 1e-9)
    w, _, _ = reference.ridge(phi, y, 1e-3)
    aux, bias = rng.normal(size=(5, WIDTH)), rng.normal(size=5)
    return reference.Toy(mixing, shift, phi, y, w, 10.0, 1e-3, aux, bias, scores.std(ddof=1), hard), scores


def pieces(toy, scores, relaxation):
    proxy = bib.fit_proxy(toy.phi, scores, rel_ridge=1e-3)
    heads = bib.Heads(jnp.asarray(toy.aux), jnp.asarray(toy.aux_bias), bib.Scale(jnp.asarray(0.0), jnp.asarray(toy.aux_scale)))
    objectives = bib.Objectives(
        functools.partial(bib.forward_loss, proxy),
        functools.partial(bib.backward_loss, proxy, rel_ridge=1e-3),
        functools.partial(bib.head_value, heads),
    )

    def features(z):
        return jnp.tanh(bib.relax_tokens(z, relaxation=relaxation).reshape(-1) @ toy.mixing + toy.shift)

    return proxy, heads, objectives, features


# --- losses


@pytest.mark.parametrize("rel_ridge", [1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("m", [1, 3])
def test_losses_and_gradients(m, rel_ridge, x64):
    toy, scores = make_toy()
    proxy = bib.fit_proxy(toy.phi, scores, rel_ridge=1e-3)
    phi_h = np.random.default_rng(1).normal(size=(m, WIDTH))
    for found, expected in (
        (jax.value_and_grad(lambda p: bib.forward_loss(proxy, p))(phi_h), reference.forward(phi_h, toy.w, 10.0)),
        (
            jax.value_and_grad(lambda p: bib.backward_loss(proxy, p, rel_ridge=rel_ridge))(phi_h),
            reference.backward(phi_h, toy.phi, toy.y, 10.0, rel_ridge),
        ),
    ):
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-10)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-8, atol=1e-10)
    if m == 1:
        np.testing.assert_allclose(bib.backward_loss(proxy, phi_h[0]), bib.backward_loss(proxy, phi_h), rtol=1e-14)


def test_backward_loss_by_statistics_is_the_one_over_rows(x64):
    toy, scores = make_toy()
    proxy = bib.fit_proxy(toy.phi, scores)
    phi_h = np.random.default_rng(1).normal(size=(3, WIDTH))
    expected, _ = reference.backward(phi_h, toy.phi, toy.y, 10.0, 1e-6)
    np.testing.assert_allclose(bib.backward_loss(proxy, phi_h), expected, rtol=1e-12)


def test_proxy(x64):
    toy, scores = make_toy()
    proxy = bib.fit_proxy(toy.phi, scores, rel_ridge=1e-3)
    np.testing.assert_allclose(proxy.fit.weights, toy.w, rtol=1e-9)
    lam = 1e-3 * np.sum(toy.phi**2) / ROWS
    inverse = np.linalg.inv(toy.phi.T @ toy.phi + lam * np.eye(WIDTH))
    freedom = np.trace(toy.phi @ inverse @ toy.phi.T)
    variance = np.sum((toy.y - toy.phi @ toy.w) ** 2) / (ROWS - freedom)
    np.testing.assert_allclose(proxy.variance, variance, rtol=1e-9)
    expected = np.sqrt(variance * np.einsum("nd,de,ne->n", toy.phi, inverse, toy.phi))
    np.testing.assert_allclose(bib.uncertainty(proxy, toy.phi), expected, rtol=1e-9)
    perfect = proxy._replace(variance=jnp.zeros_like(proxy.variance))
    assert np.isfinite(jax.grad(lambda phi: bib.lower_confidence_bound(perfect, phi))(jnp.asarray(toy.phi[0]))).all()
    bound = bib.lower_confidence_bound(proxy, toy.phi, num_deviations=2.0)
    np.testing.assert_allclose(bound, toy.phi @ toy.w - 2 * expected, rtol=1e-9, atol=1e-12)


def test_conservative_fit_is_the_minimiser(x64):
    toy, scores = make_toy()
    proxy = bib.fit_proxy(toy.phi, scores, rel_ridge=1e-3)
    explored = np.random.default_rng(1).normal(size=(9, WIDTH))
    found = bib.conservative(proxy, explored, toy.phi.mean(0), weight=0.7, rel_ridge=1e-3).fit.weights
    lam = 1e-3 * np.sum(toy.phi**2) / ROWS

    def loss(w):
        return jnp.mean((toy.phi @ w - toy.y) ** 2) + lam / ROWS * jnp.sum(w * w) + 0.7 * (jnp.mean(explored @ w) - jnp.mean(toy.phi @ w))

    np.testing.assert_allclose(jax.grad(loss)(found), np.zeros(WIDTH), atol=1e-12)


def test_heads(x64):
    toy, scores = make_toy()
    heads = bib.fit_heads(jax.random.key(0), toy.phi, scores, num_heads=5)
    values = np.asarray(heads.weights) @ toy.phi.T + np.asarray(heads.bias)[:, None]
    std, mean = scores.std(ddof=1), scores.mean()
    np.testing.assert_allclose(bib.head_value(heads, toy.phi), std * values.mean(0) + mean, rtol=1e-10)
    np.testing.assert_allclose(bib.head_value(heads, toy.phi, reduce="min"), std * values.min(0) + mean, rtol=1e-10)
    lcb = std * (values.mean(0) - 2 * values.std(0)) + mean
    np.testing.assert_allclose(bib.head_value(heads, toy.phi, reduce="lcb", num_deviations=2.0), lcb, rtol=1e-10)
    alone = bib.head_value(heads, toy.phi, compatibility="public_code")
    np.testing.assert_allclose(alone, std * values[-1] + mean, rtol=1e-10)
    assert np.corrcoef(bib.head_value(heads, toy.phi), scores)[0, 1] > 0.4  # they have learned something
    same = bib.Heads(heads.weights[:1], heads.bias[:1], heads.scale)
    assert np.isfinite(jax.grad(lambda p: bib.head_value(same, p, reduce="lcb"))(toy.phi[0])).all()


# --- the loop


CASES = {
    "forward": {"mode": "forward"},
    "backward": {"mode": "backward"},
    "fixed": {"mode": "both"},
    "gamma": {"mode": "both", "adapt_gamma": True},
    "eta": {"mode": "both", "adapt_eta": True},
    "forward + eta": {"mode": "forward", "adapt_eta": True},
    "gamma + eta": {"mode": "both", "adapt_gamma": True, "adapt_eta": True},
}


@pytest.mark.parametrize("relaxation", ["straight_through", "soft"])
@pytest.mark.parametrize("case", list(CASES))
def test_eight_steps_are_the_public_codes(case, relaxation, x64):
    toy, scores = make_toy(hard=relaxation == "straight_through")
    _, _, objectives, features = pieces(toy, scores, relaxation)
    z = 0.5 * np.random.default_rng(2).normal(size=(LENGTH, LETTERS))
    settings = CASES[case]
    path, gammas, etas = reference.run(toy, z, 8, **settings)
    run = jax.jit(
        functools.partial(
            bib.design,
            feature_fn=features,
            objectives=objectives,
            num_steps=8,
            mode=settings["mode"],
            gamma_rule="frozen" if settings.get("adapt_gamma") else None,
            eta_rule="frozen" if settings.get("adapt_eta") else None,
        )
    )(z)
    np.testing.assert_allclose(run.state.z, path[-1], rtol=1e-8, atol=1e-9)
    np.testing.assert_array_equal(run.path[1:], path.argmax(-1))
    np.testing.assert_array_equal(run.tokens, path[-1].argmax(-1))
    np.testing.assert_allclose(run.info.eta, etas, rtol=1e-9)
    if settings["mode"] == "both":
        np.testing.assert_allclose(run.info.gamma, gammas, rtol=1e-8, atol=1e-9)


@pytest.fixture
def smooth(x64):
    toy, scores = make_toy()
    _, _, objectives, features = pieces(toy, scores, "soft")
    state = bib.init(jnp.asarray(0.5 * np.random.default_rng(2).normal(size=(LENGTH, LETTERS))))
    for _ in range(2):  # moments that are not empty
        state, _ = bib.step(state, features, objectives, gamma_rule="frozen")
    return toy, objectives, features, state


def outer(toy, state, gamma, eta, steps, adam=True):
    """f_aux after a number of steps with these constants, by hand."""
    z, m, v, t = (np.asarray(x) for x in (state.z, state.adam.m, state.adam.v, state.adam.count))
    for i in range(steps):
        _, g_f, g_b, _ = toy.gradients(z)
        g = gamma * g_f + (1 - gamma) * g_b
        if adam:
            m, v, g = reference.adam(m, v, g, t + i)
        z = z - eta * g
    return toy.value(z)


@pytest.mark.parametrize("rule,steps", [("exact", 1), ("adam", 1), ("lookahead", 3)])
def test_hyper_gradients_are_finite_differences(rule, steps, smooth):
    toy, objectives, features, state = smooth
    gamma, h = float(state.gamma.gamma), 1e-5
    ends = [outer(toy, state, gamma + s, 0.1, steps, adam=rule != "exact") for s in (h, -h)]
    new, info = bib.step(state, features, objectives, gamma_rule=rule, lookahead=3)
    # Adam's first moment tells which slope it was given: m' = .9 m - .1 slope.
    slope = -(new.gamma.adam.m - 0.9 * state.gamma.adam.m) / 0.1
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * h), rtol=1e-6)

    ends = [outer(toy, state, gamma, 0.1 + s, steps, adam=rule != "exact") for s in (h, -h)]
    _, info = bib.step(state, features, objectives, eta_rule=rule, lookahead=3, settings=bib.Settings(eta_high=100.0, eta_low=-100.0))
    np.testing.assert_allclose((info.eta - 0.1) / 0.01, (ends[0] - ends[1]) / (2 * h), rtol=1e-6)


def test_frozen_gamma_is_the_codes_formula_and_not_exact(smooth):
    toy, objectives, features, state = smooth
    _, g_f, g_b, g_a = toy.gradients(np.asarray(state.z))
    new, _ = bib.step(state, features, objectives, gamma_rule="frozen")
    slope = -(new.gamma.adam.m - 0.9 * state.gamma.adam.m) / 0.1
    np.testing.assert_allclose(slope, -0.1 * np.sum(g_a * (g_f - g_b)), rtol=1e-9)
    ends = [outer(toy, state, float(state.gamma.gamma) + s, 0.1, 1, adam=False) for s in (1e-5, -1e-5)]
    assert abs(slope - (ends[0] - ends[1]) / 2e-5) > 1e-4 * abs(slope)


def test_the_published_form_of_the_adam_tangent(smooth):
    """Section 12.5 (iii), written out."""
    toy, _, _, state = smooth
    _, g_f, g_b, _ = toy.gradients(np.asarray(state.z))
    g, change = 0.3 * g_f + 0.7 * g_b, g_f - g_b
    t, (m, v) = int(state.adam.count), (np.asarray(x) for x in state.adam[:2])
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    mhat, vhat = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.999 ** (t + 1))
    to_m, to_v = 0.1 * change / (1 - 0.9 ** (t + 1)), 0.002 * g * change / (1 - 0.999 ** (t + 1))
    root = np.sqrt(vhat)
    expected = to_m / (root + 1e-8) - mhat * to_v / (2 * root * (root + 1e-8) ** 2)
    np.testing.assert_allclose(bib.gamma_tangent(state.adam, jnp.asarray(g), jnp.asarray(change)), expected, rtol=1e-10)


# Through Adam, the slope of the first step (its update is sign(g), nearly) is what remains, 1e-8 / |g|, of two terms that cancel: its relative
# rounding is 2e-16 / 1e-8, gamma's own Adam makes a step of unit size of it, and a design moves by .1 at most of that.
@pytest.mark.parametrize("rule, tolerance", [("exact", 1e-12), ("adam", 2e-9)])
def test_designs_tasks_and_settings_by_vmap(rule, tolerance, x64):
    toy, scores = make_toy()
    z = 0.5 * np.random.default_rng(2).normal(size=(3, LENGTH, LETTERS))
    many = np.stack([scores, 1 - scores])

    def run(z, scores, rate):
        _, _, objectives, features = pieces(toy, scores, "soft")
        settings = bib.Settings(learning_rate=rate)
        return bib.design(z, features, objectives, num_steps=4, settings=settings, gamma_rule=rule, eta_rule=rule).state.z

    traces = []

    @jax.jit
    def over(z, many, rates):
        traces.append(1)
        seeds = jax.vmap(run, in_axes=(0, None, None))
        return jax.vmap(jax.vmap(seeds, in_axes=(None, 0, None)), in_axes=(None, None, 0))(z, many, rates)

    over(z, many, jnp.asarray([0.3, 0.2]))
    batched = over(z, many, jnp.asarray([0.05, 0.1]))
    assert len(traces) == 1
    for k, rate in enumerate((0.05, 0.1)):
        for j in range(2):
            _, _, objectives, features = pieces(toy, many[j], "soft")
            one = jax.jit(
                lambda z, o=objectives, f=features, r=rate: (
                    bib.design(z, f, o, num_steps=4, settings=bib.Settings(learning_rate=r), gamma_rule=rule, eta_rule=rule).state.z
                )
            )
            np.testing.assert_allclose(batched[k, j, 1], one(z[1]), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("explicit", [False, True])
def test_fit_and_design_on_eight_devices(explicit, x64):
    toy, scores = make_toy()
    phi, scores = np.tile(toy.phi, (8, 1)), np.tile(scores, 8)
    z = 0.5 * np.random.default_rng(2).normal(size=(8, LENGTH, LETTERS))
    heads = bib.fit_heads(jax.random.key(0), phi, scores)

    def run(proxy, z):
        objectives = bib.Objectives(
            functools.partial(bib.forward_loss, proxy),
            functools.partial(bib.backward_loss, proxy),
            functools.partial(bib.head_value, heads),
        )
        features = lambda z: jnp.tanh(bib.relax_tokens(z, relaxation="soft").reshape(-1) @ toy.mixing + toy.shift)  # noqa: E731
        return jax.vmap(lambda z: bib.design(z, features, objectives, num_steps=5, eta_rule="frozen").state.z)(z)

    alone = bib.fit_proxy(phi, scores)
    expected = jax.jit(run)(alone, z)
    with jax.set_mesh(sharding.make_mesh({"data": 8}, explicit=explicit)):
        fit = jax.shard_map(functools.partial(bib.fit_proxy, axis_name="data"), in_specs=(jax.P("data"), jax.P("data")), out_specs=jax.P())
        proxy = jax.jit(fit)(*jax.device_put((jnp.asarray(phi), jnp.asarray(scores)), jax.P("data")))
        found = jax.jit(run)(proxy, jax.device_put(jnp.asarray(z), jax.P("data")))
        np.testing.assert_allclose(phi @ np.asarray(proxy.fit.weights), phi @ np.asarray(alone.fit.weights), rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_joint_designs_and_trust(x64):
    toy, scores = make_toy()
    _, _, objectives, features = pieces(toy, scores, "soft")
    z = jnp.asarray(0.5 * np.random.default_rng(2).normal(size=(3, LENGTH, LETTERS)))
    joint = objectives._replace(auxiliary=lambda phi: jnp.mean(objectives.auxiliary(phi)))
    run = bib.design(z, jax.vmap(features), joint, num_steps=5)
    assert run.tokens.shape == (3, LENGTH) and run.info.gamma.shape == (5,)
    np.testing.assert_allclose(run.info.backward[0], reference.backward(np.asarray(jax.vmap(features)(z)), toy.phi, toy.y, 10.0, 1e-3)[0])
    held = bib.design(z[0], features, objectives, num_steps=20, settings=bib.Settings(trust=1e4))
    np.testing.assert_array_equal(held.tokens, np.argmax(z[0], -1))


def test_public_codes_path(x64):
    toy, scores = make_toy()
    _, _, objectives, features = pieces(toy, scores, "soft")
    z = jnp.asarray(np.random.default_rng(2).normal(size=(LENGTH, LETTERS)))
    ours, theirs = (bib.design(z, features, objectives, num_steps=3, compatibility=c).path for c in (None, "public_code"))
    np.testing.assert_array_equal(theirs, ours[np.array([1, 1, 2, 3])])


def test_bfloat16_and_float32_logits():
    toy, scores = make_toy()
    phi, scores = toy.phi.astype(np.float32), scores.astype(np.float32)
    proxy = bib.fit_proxy(phi, scores, rel_ridge=1e-2)
    objectives = bib.Objectives(
        functools.partial(bib.forward_loss, proxy),
        functools.partial(bib.backward_loss, proxy, rel_ridge=1e-3),
        lambda phi: jnp.mean(phi),
    )
    for dtype in (jnp.float32, jnp.bfloat16):
        features = lambda z: jnp.tanh(bib.relax_tokens(z).reshape(-1) @ toy.mixing.astype(np.float32))  # noqa: E731
        run = bib.design(jnp.ones((LENGTH, LETTERS), dtype), features, objectives, num_steps=3, gamma_rule="adam", eta_rule="adam")
        assert run.state.z.dtype == dtype and np.isfinite(run.state.z.astype(np.float32)).all()


# --- Adaptive-eta for any optimiser


def test_adaptive_eta_in_a_chain(x64):
    params = {"a": jnp.asarray([0.3, -0.2]), "b": jnp.asarray(0.7)}
    aux = lambda p: -jnp.sum((p["a"] - 1) ** 2) + p["b"]  # noqa: E731
    grads = {"a": jnp.asarray([0.4, 0.1]), "b": jnp.asarray(-2.0)}
    for rule in ("frozen", "exact"):
        optimizer = optax.chain(optax.scale_by_adam(), bib.adaptive_eta(0.1, meta_rate=0.02, rule=rule, aux_fn=aux))
        state = optimizer.init(params)
        first, state = optimizer.update(grads, state, params)
        np.testing.assert_allclose(first["b"], 0.1, rtol=1e-6)  # the base rate, up to Adam's epsilon
        second, state = jax.jit(optimizer.update)(grads, state, params)
        direction = {"a": np.sign([0.4, 0.1]), "b": -1.0}  # Adam's, for a constant gradient
        at = {k: params[k] - (0.1 * direction[k] if rule == "exact" else 0) for k in params}
        slope = -sum(np.sum(jax.grad(aux)(at)[k] * direction[k]) for k in params)
        np.testing.assert_allclose(second["b"], 0.1 + 0.02 * slope, rtol=1e-6)
    given = bib.adaptive_eta(0.1, rule="frozen")
    _, state = given.update(grads, given.init(params), aux_grad=grads)
    updates, _ = given.update(grads, state, aux_grad=grads)
    np.testing.assert_allclose(updates["b"], 2 * (0.1 - 0.01 * (0.16 + 0.01 + 4)), rtol=1e-6)


# --- relaxations


def test_straight_through(x64):
    z = jnp.asarray([[0.1, 2.0, -1.0], [3.0, 3.0, 0.0]])
    x = bib.relax_tokens(z)
    np.testing.assert_array_equal(x, [[0, 1, 0], [1, 0, 0]])
    probe = jnp.asarray([[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]])
    hard, soft = (jax.grad(lambda z, r=r: jnp.sum(bib.relax_tokens(z, relaxation=r) * probe))(z) for r in bib.RELAXATIONS)
    np.testing.assert_allclose(hard, soft, rtol=1e-14)
    assert np.abs(soft).max() > 0.01


def test_kmers(x64):
    z = np.random.default_rng(0).normal(size=(5, 4))
    p = reference.softmax(z)
    s = kmers.soft_kmers(p, k=3)
    assert s.shape == (3, 64)
    for i in range(3):
        np.testing.assert_allclose(s[i].reshape(4, 4, 4), np.einsum("a,b,c->abc", *p[i : i + 3]), rtol=1e-12)
    letters = p.argmax(-1)
    hard = bib.relax_kmers(z, k=3)
    np.testing.assert_array_equal(hard.argmax(-1), letters[:-2] * 16 + letters[1:-1] * 4 + letters[2:])
    np.testing.assert_array_equal(np.unique(hard), [0, 1])
    probe = np.random.default_rng(1).normal(size=(3, 64))
    slopes = [jax.grad(lambda z, r=r: jnp.sum(bib.relax_kmers(z, relaxation=r) * probe))(z) for r in bib.RELAXATIONS]
    np.testing.assert_allclose(*slopes, rtol=1e-14)
    jax.test_util.check_grads(lambda z: bib.relax_kmers(z, relaxation="soft"), (z,), order=1, rtol=1e-6)


def test_first_logits(x64):
    tokens = np.array([2, 0, 1, 1])
    z = jax.vmap(lambda key: bib.init_logits(key, tokens, num_letters=4))(jax.random.split(jax.random.key(0), 50))
    np.testing.assert_array_equal(bib.read_out(z), np.tile(tokens, (50, 1)))
    noise = np.array([[3.0, 1.0, 2.0]])
    np.testing.assert_array_equal(bib.init_logits(jax.random.key(0), np.array([1]), num_letters=3, noise=noise), [[1.0, 3.0, 2.0]])
    np.testing.assert_array_equal(bib.init_logits(jax.random.key(0), np.array([0]), num_letters=3, noise=noise), noise)
    np.testing.assert_allclose(
        np.sort(z[0].ravel()), np.sort(0.01 * jax.random.normal(jax.random.split(jax.random.key(0), 50)[0], (4, 4)).ravel())
    )


# --- BDI


def bdi_problem():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4, (30, 5))
    z = bib.log_odds(tokens, num_letters=4)
    scale = bib.log_odds_scale(z)
    x = (z - scale.mean[None]) / scale.std[None]
    y = rng.normal(size=30)
    return tokens, scale, np.asarray(x), (y - y.mean()) / (y.std() + 1e-9)


def test_log_odds_and_back(x64):
    tokens, scale, x, _ = bdi_problem()
    soft = 0.6 * np.eye(4)[tokens] + 0.1
    np.testing.assert_allclose(bib.log_odds(tokens, num_letters=4), np.log(soft[..., 1:] / soft[..., :1]).reshape(30, -1), rtol=1e-12)
    np.testing.assert_allclose([x.mean(0), x.std(0)], [np.zeros(15), np.ones(15)], atol=1e-12)
    np.testing.assert_array_equal(bib.from_log_odds(x, scale, num_letters=4), tokens)


@pytest.mark.parametrize("m", [1, 3])
def test_bdi_losses(m, x64):
    _, _, x, y = bdi_problem()
    fit = bib.bdi_fit(x, y)
    proposals = np.random.default_rng(1).normal(size=(m, 15))
    forward, backward = reference.bdi_losses(x, y, proposals, 10.0, 1e-6, 1e-6, 0.3)
    np.testing.assert_allclose(bib.bdi_forward_loss(fit, proposals), forward, rtol=1e-8)
    np.testing.assert_allclose(bib.bdi_backward_loss(fit, proposals, weighting=0.3), backward, rtol=1e-8)
    assert bib.bdi_residual(fit, block_size=7) < 1e-12
    np.testing.assert_allclose(bib.bdi_residual(bib.bdi_fit(x, y, dual=2 * fit.dual)), 1, rtol=1e-9)


@pytest.mark.parametrize("mode", ["both", "forward", "backward"])
def test_bdi_gradient_and_steps(mode, x64):
    _, _, x, y = bdi_problem()
    fit = bib.bdi_fit(x, y)
    start = x[:1] + 0.3 * np.random.default_rng(5).normal(size=(1, 15))  # the kernel has a kink at the data themselves
    r_back = 1e-6 if mode == "backward" else 0.0

    def reference_loss(point):
        forward, backward = reference.bdi_losses(x, y, point, 10.0, 1e-6, r_back, 0.0)
        return {"forward": forward, "backward": backward, "both": forward + backward}[mode]

    def loss(point):
        forward, backward = bib.bdi_forward_loss(fit, point), bib.bdi_backward_loss(fit, point, rel_ridge=r_back)
        return {"forward": forward, "backward": backward, "both": forward + backward}[mode]

    slope = jax.jit(jax.grad(loss))
    differences = np.zeros_like(start)
    for i in range(start.size):
        step = np.zeros_like(start)
        step[0, i] = 1e-5
        differences[0, i] = (reference_loss(start + step) - reference_loss(start - step)) / 2e-5
    np.testing.assert_allclose(slope(start), differences, atol=1e-6 * np.abs(differences).max())
    for first in (1, 0):
        z, m, v = start.copy(), 0.0, 0.0
        for t in range(1 + first, 4 + first):
            g = np.asarray(slope(z))
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            z = z - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        run = functools.partial(bib.bdi_design, mode=mode, num_steps=3, compatibility="public_code" if first else None)
        np.testing.assert_allclose(jax.jit(run)(fit, start).x, z, rtol=1e-8, atol=1e-9)
    for compatibility, length in (("public_code", 0.0744), (None, 0.1)):
        first_step = np.abs(bib.bdi_design(fit, start, mode=mode, num_steps=1, compatibility=compatibility).x - start)
        np.testing.assert_allclose(first_step.max(), length, atol=1e-4)


# --- refinement and choice


def test_refine_finds_the_best_neighbour_and_stops():
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    score = lambda x: jnp.sum(x * weights)  # noqa: E731
    start = np.array([0, 1, 2, 3, 0])
    one = bib.refine(jax.random.key(0), score, start, num_letters=4, num_rounds=1, num_candidates=1)
    best = max((float(score(jax.nn.one_hot(t, 4))), tuple(t.tolist())) for t in bib.substitutions(start, num_letters=4))
    assert tuple(one.tokens.tolist()) == best[1]  # additive, so the gradient's promise is exact
    run = jax.jit(lambda key: bib.refine(key, score, start, num_letters=4, num_rounds=8))(jax.random.key(0))
    np.testing.assert_array_equal(run.tokens, np.argmax(weights, axis=1))
    np.testing.assert_allclose(run.score, np.max(weights, axis=1).sum(), rtol=1e-6)
    assert not run.accepted[-1]


def test_search_keeps_the_best_distinct_ones(x64):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    score = lambda tokens: jnp.sum(jnp.take_along_axis(weights[None], tokens[..., None], axis=2), axis=(1, 2))  # noqa: E731
    starts = np.zeros((20, 4), np.int32)
    starts[::2] = 1
    found = jax.jit(lambda t: bib.neighbourhood_search(score, t, num_letters=3, num_kept=20, num_rounds=4))(starts)
    every = np.indices((3,) * 4).reshape(4, -1).T
    order = np.argsort(-np.asarray(score(jnp.asarray(every))))
    np.testing.assert_allclose(found.predicted[:10], np.asarray(score(jnp.asarray(every)))[order[:10]], rtol=1e-12)
    assert len(np.unique(found.tokens, axis=0)) == 20
    refined = bib.refine(jax.random.key(0), lambda x: jnp.sum(x * weights), starts[0], num_letters=3)
    np.testing.assert_array_equal(refined.tokens, every[order[0]])


def test_refine_at_a_temperature_samples_the_law():
    weights = jnp.asarray([[0.0, 1.0], [0.5, 0.0]], jnp.float32)
    score = lambda x: jnp.sum(x * weights) + x[0, 1] * x[1, 1]  # noqa: E731
    chains = jax.jit(
        jax.vmap(lambda key: bib.refine(key, score, np.array([0, 0]), num_letters=2, num_rounds=30, temperature=1.0).path[-1])
    )(jax.random.split(jax.random.key(1), 20000))
    energy = np.array([0.5, 0.0, 1.5, 2.0])
    law = np.exp(energy) / np.exp(energy).sum()
    share = np.bincount(np.asarray(chains) @ [2, 1], minlength=4) / 20000
    np.testing.assert_allclose(share, law, atol=4 * 0.5 / np.sqrt(20000))  # four standard errors of a share


def test_choice_without_copies_and_with_distance():
    tokens = np.array([[0, 0, 0], [0, 0, 0], [0, 0, 1], [1, 1, 1], [2, 2, 2]])
    quality = np.array([1.0, 3.0, 2.0, 0.5, 0.1], np.float32)
    assert bib.select_diverse(quality, tokens, num_designs=3).index.tolist() == [1, 2, 3]
    far = jax.jit(functools.partial(bib.select_diverse, num_designs=4, min_distance=2))(quality, tokens)
    assert far.index[:3].tolist() == [1, 3, 4] and far.valid.tolist() == [True, True, True, False]
    np.testing.assert_array_equal(bib.hamming(tokens[:2], tokens[2:]), [[1, 3, 3], [1, 3, 3]])


def test_choice_by_determinant_is_the_greedy_maximum():
    rng = np.random.default_rng(0)
    phi, quality = rng.normal(size=(12, 4)).astype(np.float32), rng.normal(size=12).astype(np.float32)
    tokens = np.arange(12)[:, None]
    found = bib.select_diverse(quality, tokens, num_designs=5, features=phi, diversity=0.8).index.tolist()
    chosen = []
    for _ in range(5):

        def value(i, chosen=tuple(chosen)):
            rows = phi[[*chosen, i]].astype(float)
            return quality[[*chosen, i]].sum() + 0.8 * np.linalg.slogdet(rows @ rows.T + np.eye(len(rows)))[1]

        chosen.append(max((i for i in range(12) if i not in chosen), key=value))
    assert found == chosen


def test_errors():
    toy, scores = make_toy()
    proxy, _, objectives, features = pieces(toy, scores, "soft")
    state = bib.init(jnp.zeros((LENGTH, LETTERS)))
    for message, call in (
        ("'phi' has shape", lambda: bib.forward_loss(proxy, np.zeros(5))),
        ("'mode' is 'neither'", lambda: bib.step(state, features, objectives, mode="neither")),
        (
            "'gamma_rule' is 'frozen' with mode 'forward'",
            lambda: bib.step(state, features, objectives, mode="forward", gamma_rule="frozen"),
        ),
        ("'eta_rule' is 'best', expected one of", lambda: bib.step(state, features, objectives, eta_rule="best")),
        ("'num_steps' must be at least 1", lambda: bib.design(state.z, features, objectives, num_steps=0)),
        ("with l of at least k=5", lambda: kmers.soft_kmers(np.ones((4, 3)), k=5)),
        ("'scores' has 1 entries", lambda: bib.standardise(np.ones(1))),
        ("'num_heads' must be at least 1", lambda: bib.fit_heads(jax.random.key(0), toy.phi, scores, num_heads=0)),
        ("expected integers", lambda: bib.init_logits(jax.random.key(0), np.zeros(3), num_letters=4)),
        (
            "'num_designs' is 6, expected between 1 and the 5 candidates",
            lambda: bib.select_diverse(np.ones(5), np.zeros((5, 2)), num_designs=6),
        ),
        ("rule 'exact' needs 'aux_fn'", lambda: bib.adaptive_eta(0.1)),
        ("'mode' is 'up'", lambda: bib.bdi_design(bib.bdi_fit(np.ones((3, 2)), np.ones(3)), np.ones((1, 2)), mode="up")),
    ):
        with pytest.raises(ValueError, match=message):
            call()
