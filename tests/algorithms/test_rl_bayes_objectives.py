"""Variational objectives: gradients beside explicit sums of scores, estimators beside their expectations, preferences, token-level forms."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import rl_bayes as reference

from janax.algorithms import rl_bayes
from janax.jaxlib_ext import divergence as library

SPACE = rl_bayes.Space(vocab_size=reference.V, length=reference.T)
NAMES = ("fkl", "rkl", "tv", "js", "hell2", "chi2p", "chi2r")  # the order of rl_bayes.FAMILY
PRIOR, POLICY, PROPOSAL = (reference.sequence_log_probs(table) for table in (reference.PRIOR, reference.POLICY, reference.PROPOSAL))
SCORES = reference.scores(reference.POLICY)
PHI = reference.REWARD / 0.5
LOG_Z = reference.lse(PRIOR + PHI)
LOG_P = PRIOR + PHI - LOG_Z
with np.errstate(divide="ignore"):
    HARD = PRIOR + np.log(reference.ACCEPTED)
LOG_Z_HARD = reference.lse(HARD)


def log_probs_of(table):
    return rl_bayes.sequence_log_probs(SPACE, rl_bayes.log_rows(SPACE, table.reshape(-1, reference.V)[reference.PREFIX_STATES]))


@functools.partial(jax.jit, static_argnames=("baseline", "floored"))
def fdpg(table, log_target, log_q, log_z, kind, baseline="none", floored=False):
    """Value, gradient with respect to the table, info: samples are all x, weighted by the law that draws them."""

    def loss(table):
        options = {"floor": -20.0} if floored else {}
        return rl_bayes.fdpg_loss(
            log_probs_of(table), log_target, log_q, log_z=log_z, divergence=kind, baseline=baseline, weights=jnp.exp(log_q), **options
        )

    return jax.value_and_grad(loss, has_aux=True)(table)


@jax.jit
def exact(table, log_p, kind):
    return jax.value_and_grad(lambda table: rl_bayes.exact_divergence(kind, log_probs_of(table), log_p))(table)


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_divergences_three_ways(index, x64, strict):
    """T17: autodiff of the enumerated divergence, the score form, and the importance form under another law."""
    name, kind = NAMES[index], jnp.asarray(index)
    wanted = reference.divergence_gradient(name, POLICY, LOG_P, SCORES)
    value, gradient = exact(reference.POLICY, LOG_P, kind)
    np.testing.assert_allclose(value, reference.divergence(name, POLICY, LOG_P), rtol=1e-10)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-9, atol=1e-12)
    for log_q in (POLICY, PROPOSAL):
        (estimate, info), gradient = fdpg(reference.POLICY, PRIOR + PHI, log_q, LOG_Z, kind)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(estimate, value, rtol=1e-10)
        np.testing.assert_allclose(info.value, value, rtol=1e-10)
        assert not info.skipped and info.dropped == 0
    if name in reference.GRADIENTS:
        printed = np.linalg.norm(gradient), gradient[0, 4, 0], gradient[2, 1, 3]
        np.testing.assert_allclose(printed, reference.GRADIENTS[name], atol=5.1e-11)


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_hard_constraints(index, x64, strict):
    """f'(inf) where the target is zero: finite for bounded divergences; else the value is inf and samples are dropped, or floored."""
    name, kind = NAMES[index], jnp.asarray(index)
    value, autodiff = exact(reference.POLICY, HARD - LOG_Z_HARD, kind)
    (estimate, info), gradient = fdpg(reference.POLICY, HARD, POLICY, LOG_Z_HARD, kind)
    assert np.all(np.isfinite(gradient)) and np.all(np.isfinite(autodiff)) and np.isfinite(estimate)
    np.testing.assert_allclose(info.dead, np.exp(POLICY)[reference.ACCEPTED == 0].sum(), rtol=1e-10)
    if np.isinf(reference.F_PRIME_INF[name]):
        assert np.isposinf(value) and int(info.dropped) == np.sum(reference.ACCEPTED == 0)
        (_, floored), pushed = fdpg(reference.POLICY, HARD, POLICY, LOG_Z_HARD, kind, floored=True)
        wanted = reference.divergence_gradient(name, POLICY, np.maximum(HARD, -20) - LOG_Z_HARD, SCORES)
        np.testing.assert_allclose(pushed, wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())
        assert floored.dropped == 0 and floored.dead > 0.5
        return
    wanted = reference.divergence_gradient(name, POLICY, HARD - LOG_Z_HARD, SCORES)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(autodiff, wanted, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose((value, estimate), [reference.divergence(name, POLICY, HARD - LOG_Z_HARD)] * 2, rtol=1e-10)
    if name in reference.HARD:
        np.testing.assert_allclose((value, np.linalg.norm(gradient), gradient[2, 1, 3]), reference.HARD[name], atol=5.1e-11)


@pytest.mark.slow
def test_slopes_and_the_rest_of_the_family(x64):
    """f' as tabulated, f'(inf) and f(0) as limits; alpha between its neighbours; every generator of the library."""
    l = np.linspace(-8, 8, 33)
    slopes = jax.jit(jax.vmap(rl_bayes.f_prime, in_axes=(0, None)))(jnp.arange(7), l)
    for name, slope in zip(NAMES, slopes):
        np.testing.assert_allclose(slope, reference.f_prime(name, np.exp(l)), rtol=1e-10, atol=1e-13)
    kinds = {"alpha": rl_bayes.alpha(0.3), **dict(zip(NAMES, rl_bayes.FAMILY))}
    for name, kind in kinds.items():
        np.testing.assert_allclose(rl_bayes.f_value(kind, l), reference.f(name, np.exp(l)), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(rl_bayes.f_prime_inf(kind), reference.F_PRIME_INF[name])
    others = {
        "alpha": rl_bayes.alpha(0.3), "js": rl_bayes.js(0.2), "skew": rl_bayes.skew_kl(0.3),
        "skew_reverse": rl_bayes.skew_reverse_kl(0.3), "jeffreys": rl_bayes.JEFFREYS,
    }  # fmt: skip
    plain = {
        "alpha": functools.partial(library.alpha_divergence, alpha=0.7), "js": functools.partial(library.js, beta=0.2),
        "skew": functools.partial(library.skew_kl, alpha=0.3), "skew_reverse": functools.partial(library.skew_reverse_kl, alpha=0.3),
        "jeffreys": library.jeffreys,
    }  # fmt: skip
    p, q = np.log([0.5, 0.5, 1e-300, 0.0 + 1e-320]), np.log([1e-300, 0.25, 0.75, 1e-320])
    with np.errstate(divide="ignore"):
        zero_p, zero_q = np.log([0.5, 0.5, 0.0, 0.0]), np.log([0.0, 0.25, 0.75, 0.0])
    for name, kind in others.items():
        np.testing.assert_allclose(rl_bayes.exact_divergence(kind, POLICY, LOG_P), plain[name](POLICY, LOG_P), rtol=1e-9)
        limit = rl_bayes.exact_divergence(kind, zero_p, zero_q)
        if name == "jeffreys":
            assert np.isposinf(limit)
        else:
            np.testing.assert_allclose(limit, rl_bayes.exact_divergence(kind, p, q), rtol=1e-6)

    def score_form(pi, kind):
        loss = lambda pi: rl_bayes.fdpg_loss(pi, PRIOR + PHI, log_z=LOG_Z, divergence=kind, weights=np.exp(POLICY))[0]  # noqa: E731
        return jax.grad(loss)(pi), jax.grad(lambda z: rl_bayes.exact_divergence(kind, jax.nn.log_softmax(z), LOG_P))(pi)

    for score, autodiff in jax.jit(lambda pi: [score_form(pi, kind) for kind in others.values()])(POLICY):
        # logits of a table over x: autodiff removes the mean, which the score does not have to
        np.testing.assert_allclose(score - np.exp(POLICY) * score.sum(), autodiff, rtol=1e-9, atol=1e-14)
    near = [rl_bayes.exact_divergence(rl_bayes.alpha(a), POLICY, LOG_P) for a in (1e-9, 0.5, 1 - 1e-9)]
    wanted = [
        reference.divergence("fkl", POLICY, LOG_P),
        2 * reference.divergence("hell2", POLICY, LOG_P),
        reference.divergence("rkl", POLICY, LOG_P),
    ]
    np.testing.assert_allclose(near, wanted, rtol=1e-7)


def test_inequalities_between_divergences(x64):
    values = jax.jit(jax.vmap(lambda i: rl_bayes.exact_divergence(i, POLICY, LOG_P)))(jnp.arange(7))
    fkl, rkl, tv, js, hell2, chi2p, _ = np.asarray(values)
    assert tv**2 <= min(fkl, rkl) / 2 and hell2 / 2 <= tv <= np.sqrt(hell2) and hell2 <= min(fkl, rkl)
    assert 0.5 * js <= tv * np.log(2) and fkl <= np.log1p(chi2p)


@functools.partial(jax.jit, static_argnames=("baseline", "scale"))
def dpg(table, log_target, log_q, log_z, baseline="none", scale="normalised"):
    loss = lambda table: rl_bayes.dpg_loss(  # noqa: E731
        log_probs_of(table), log_target, log_q, log_z=log_z, baseline=baseline, scale=scale, weights=jnp.exp(log_q)
    )
    return jax.value_and_grad(loss, has_aux=True)(table)


@pytest.mark.parametrize("log_q", [POLICY, PROPOSAL], ids=["on", "off"])
def test_dpg(log_q, x64, strict):
    """The gradient of KL(p || pi) with any baseline, GDC's without 1 / Z, and the published variances."""
    wanted = -np.einsum("x,x...->...", np.exp(LOG_P), SCORES)
    for baseline in ("none", "z", "leave_one_out", "batch_mean"):
        if baseline == "none" or baseline == "z":
            (value, _), gradient = dpg(reference.POLICY, PRIOR + PHI, log_q, LOG_Z, baseline)
            np.testing.assert_allclose(gradient, wanted, rtol=1e-9, atol=1e-11)
            np.testing.assert_allclose(value, reference.kl(LOG_P, POLICY), rtol=1e-10)
    _, gradient = dpg(reference.POLICY, PRIOR + PHI, log_q, LOG_Z, scale="unnormalised")
    np.testing.assert_allclose(gradient, np.exp(LOG_Z) * wanted, rtol=1e-9, atol=1e-11)
    (_, info), gradient = dpg(reference.POLICY, HARD, log_q, LOG_Z_HARD, "z")
    np.testing.assert_allclose(gradient, -np.einsum("x,x...->...", np.exp(HARD - LOG_Z_HARD), SCORES), rtol=1e-9, atol=1e-11)
    assert info.dropped == 0

    def one(baseline):
        loss = lambda pi, target, q: rl_bayes.dpg_loss(pi, target, q, log_z=LOG_Z, baseline=baseline)[0]  # noqa: E731
        coefficients = jax.vmap(jax.grad(loss))(POLICY[:, None], (PRIOR + PHI)[:, None], log_q[:, None])
        return rl_bayes.estimator_variance(log_q, coefficients * SCORES.reshape(1024, -1))

    law = "on" if log_q is POLICY else "off"
    np.testing.assert_allclose([jax.jit(one, static_argnums=0)(b) for b in ("none", "z")], reference.VARIANCE[law], rtol=1e-11)


def test_dpg_agrees_with_its_form_as_f_divergence(x64):
    rng = np.random.default_rng(0)
    x = rng.choice(1024, 16, p=np.exp(PROPOSAL))
    arrays = POLICY[x], (PRIOR + PHI)[x], PROPOSAL[x]
    for baseline in ("none", "leave_one_out", "batch_mean"):
        a = jax.grad(lambda pi: rl_bayes.dpg_loss(pi, *arrays[1:], log_z=LOG_Z, baseline=baseline)[0])(arrays[0])  # noqa: B023
        b = jax.grad(lambda pi: rl_bayes.fdpg_loss(pi, *arrays[1:], log_z=LOG_Z, divergence=rl_bayes.FKL, baseline=baseline)[0])(arrays[0])  # noqa: B023
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)
    loss, info = rl_bayes.cdpg_loss(*arrays)
    z = np.mean(np.exp(arrays[1] - arrays[2])) + 1e-4
    np.testing.assert_allclose(info.log_z, np.log(z), rtol=1e-12)
    gradient = jax.grad(lambda pi: rl_bayes.cdpg_loss(pi, *arrays[1:])[0])(arrays[0])
    np.testing.assert_allclose(gradient, -np.exp(arrays[1] - arrays[2]) / z / 16, rtol=1e-10)
    assert np.isfinite(loss)
    a, m = 0.25, 1.5
    raw = np.exp(-(1 - a) * (POLICY[x] - (PRIOR + PHI)[x] + LOG_Z)) - 1
    r = np.minimum(raw, m)
    gradient = jax.grad(lambda pi: rl_bayes.alpha_dpg_loss(pi, arrays[1], log_z=LOG_Z, alpha=a, max_reward=m)[0])(arrays[0])
    np.testing.assert_allclose(gradient, -(r - r.mean()) * 16 / 15 / 16, rtol=1e-9, atol=1e-14)
    info = rl_bayes.alpha_dpg_loss(*arrays[:2], log_z=LOG_Z, alpha=a, max_reward=m)[1]
    np.testing.assert_allclose(info.clipped, np.mean(raw > m))
    assert info.clipped > 0


@functools.partial(jax.jit, static_argnames="baseline")
def kl_rl(table, log_q, reward, beta, baseline="none"):
    loss = lambda table: rl_bayes.kl_rl_loss(  # noqa: E731
        log_probs_of(table), PRIOR, reward, log_q, beta=beta, baseline=baseline, weights=jnp.exp(log_q)
    )
    return jax.value_and_grad(loss, has_aux=True)(table)


def test_kl_regularised_rl(x64, strict):
    """T5: the score form with the penalised reward held constant is the gradient of J, on- and off-policy, with any constant baseline."""
    for log_q in (POLICY, PROPOSAL):
        (value, _), gradient = kl_rl(reference.POLICY, log_q, reference.REWARD, 0.5)
        np.testing.assert_allclose(value, -reference.BY_BETA[0.5][10], atol=5.1e-11)
        printed = np.linalg.norm(gradient), -gradient[0, 4, 0], -gradient[2, 1, 3]
        np.testing.assert_allclose(printed, reference.GRADIENTS["J"], atol=5.1e-11)
        rkl = reference.divergence_gradient("rkl", POLICY, LOG_P, SCORES)
        np.testing.assert_allclose(gradient, 0.5 * rkl, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        kl_rl(reference.POLICY, POLICY, reference.REWARD, 0.5, baseline="batch_mean")[1], gradient, rtol=1e-9, atol=1e-12
    )
    gradient = kl_rl(reference.POLICY, POLICY, reference.REWARD, 0.0)[1]
    np.testing.assert_allclose(gradient, -np.einsum("x,x...->...", np.exp(POLICY) * reference.REWARD, SCORES), rtol=1e-9, atol=1e-12)
    plain = jax.grad(lambda pi: rl_bayes.reinforce_loss(pi, reference.REWARD, weights=np.exp(POLICY))[0])(POLICY)
    np.testing.assert_allclose(plain, -np.exp(POLICY) * reference.REWARD, rtol=1e-10)
    with np.errstate(divide="ignore"):
        hard = np.log(reference.ACCEPTED)
    (value, info), gradient = kl_rl(reference.POLICY, POLICY, hard, 0.5)
    assert np.all(np.isfinite(gradient)) and np.isfinite(value) and int(info.dropped) == np.sum(reference.ACCEPTED == 0)
    (_, info), gradient = kl_rl(reference.POLICY, POLICY, np.full(1024, -np.inf), 0.5, baseline="leave_one_out")
    assert info.skipped and not np.any(gradient)


def test_a_log_z_of_minus_infinity_skips(x64):
    for kind in range(7):
        (value, info), gradient = fdpg(reference.POLICY, np.full(1024, -np.inf), POLICY, -np.inf, jnp.asarray(kind))
        assert value == 0 and info.skipped and not np.any(gradient)
    (value, info), gradient = dpg(reference.POLICY, np.full(1024, -np.inf), POLICY, -np.inf)
    assert value == 0 and info.skipped and not np.any(gradient)


BATCH, RUNS = 64, 4000


@functools.partial(jax.jit, static_argnames="baseline")
def slopes_of_batches(x, log_q, directions, kind, baseline):
    """[runs d] estimates of the gradient of D_f along directions [x d], from batches x [runs n]."""

    def one(x):
        loss = lambda pi: rl_bayes.fdpg_loss(pi, jnp.asarray(PRIOR + PHI)[x], log_q[x], log_z=LOG_Z, divergence=kind, baseline=baseline)[0]  # noqa: E731
        return jax.grad(loss)(jnp.asarray(POLICY)[x]) @ directions[x]

    return jax.lax.map(one, x, batch_size=500)


@pytest.mark.parametrize("law", ["on", "off"])
def test_monte_carlo(law, x64):
    """T18: estimates from batches within four standard errors of the exact gradient, leave-one-out included; batch mean is off by 1 / n."""
    rng = np.random.default_rng(3)
    log_q = POLICY if law == "on" else PROPOSAL
    x = rng.choice(1024, (RUNS, BATCH), p=np.exp(log_q) / np.exp(log_q).sum())
    directions = SCORES.reshape(1024, -1) @ rng.normal(size=(100, 5)) / 10
    for index, name in enumerate(NAMES[:5]):
        slope = reference.f_prime(name, np.exp(POLICY - LOG_P))
        wanted = (np.exp(POLICY) * slope) @ directions
        for baseline in ("none", "leave_one_out"):
            estimates = np.asarray(slopes_of_batches(x, log_q, directions, jnp.asarray(index), baseline))
            error = estimates.std(0) / np.sqrt(RUNS)
            assert np.all(np.abs(estimates.mean(0) - wanted) < 4 * error), (name, baseline)
        if law == "on":
            biased = np.asarray(slopes_of_batches(x, log_q, directions, jnp.asarray(index), "batch_mean"))
            np.testing.assert_allclose(biased * BATCH / (BATCH - 1), estimates, rtol=1e-8, atol=1e-10)


def test_baselines(x64):
    """Leave-one-out is (n / (n - 1)) (R - mean R); numbers are traced; one sample has none."""
    rng = np.random.default_rng(4)
    log_pi, r = rng.normal(size=6), rng.normal(size=6)
    coefficients = lambda **options: -6 * jax.grad(lambda pi: rl_bayes.reinforce_loss(pi, r, **options)[0])(log_pi)  # noqa: E731
    np.testing.assert_allclose(coefficients(), r, rtol=1e-12)
    np.testing.assert_allclose(coefficients(baseline="batch_mean"), r - r.mean(), atol=1e-14)
    np.testing.assert_allclose(coefficients(baseline="leave_one_out"), 6 / 5 * (r - r.mean()), atol=1e-14)
    np.testing.assert_allclose(coefficients(baseline=0.7), r - 0.7, rtol=1e-12)
    log_q = rng.normal(size=6)
    ratio = np.exp(log_pi - log_q)
    _, info = rl_bayes.reinforce_loss(log_pi, r, log_q)
    np.testing.assert_allclose((info.value, info.ess), (-np.mean(ratio * r), ratio.sum() ** 2 / (ratio**2).sum()), rtol=1e-12)
    alone = jax.grad(lambda pi: rl_bayes.reinforce_loss(pi, r[:1], baseline="leave_one_out")[0])(log_pi[:1])
    np.testing.assert_allclose(alone, -r[:1])
    with pytest.raises(
        ValueError, match=r"rl_bayes.reinforce_loss: 'baseline' is 'mean', expected one of 'none', 'batch_mean', 'leave_one_out'"
    ):
        rl_bayes.reinforce_loss(log_pi, r, baseline="mean")
    with pytest.raises(ValueError, match=r"'log_target' has shape \(5,\), expected \[n\] with n=6 from 'log_pi'"):
        rl_bayes.fdpg_loss(log_pi, r[:5], log_z=0.0)
    with pytest.raises(ValueError, match="'scale' is 'raw', expected one of 'normalised', 'unnormalised'"):
        rl_bayes.dpg_loss(log_pi, r, log_z=0.0, scale="raw")


def test_running_normaliser(x64, strict):
    rng = np.random.default_rng(5)
    log_w = rng.normal(size=(3, 40)) + 1000  # beyond the range of exp
    log_w[0, :7] = -np.inf
    state = rl_bayes.init_log_z(dtype=jnp.float64)
    assert np.isneginf(rl_bayes.current_log_z(state))
    update = jax.jit(rl_bayes.update_log_z)
    for batch in log_w:
        state = update(state, batch)
    np.testing.assert_allclose(rl_bayes.current_log_z(state), reference.lse(log_w.ravel()) - np.log(120), rtol=1e-13)
    decayed = update(update(rl_bayes.init_log_z(dtype=jnp.float64), log_w[1]), log_w[2], decay=0.5)
    z = [np.exp(w - 1000) for w in log_w[1:]]
    np.testing.assert_allclose(rl_bayes.current_log_z(decayed), 1000 + np.log((0.5 * z[0].sum() + z[1].sum()) / 60), rtol=1e-13)
    ids = rng.integers(0, 3, 40)
    several = update(rl_bayes.init_log_z(4, dtype=jnp.float64), log_w[1], ids)
    wanted = [reference.lse(log_w[1][ids == c]) - np.log(np.sum(ids == c)) for c in range(3)]
    np.testing.assert_allclose(rl_bayes.current_log_z(several), [*wanted, -np.inf], rtol=1e-13)
    with pytest.raises(ValueError, match=r"'state' has shape \(4,\), expected \[\] without 'context_ids'"):
        rl_bayes.update_log_z(several, log_w[0])
    mixed = rl_bayes.log_mixture(np.log([[0.2, 0.4], [0.6, 0.0 + 1e-300]]), np.log([0.25, 0.75]))
    np.testing.assert_allclose(np.exp(mixed), [0.25 * 0.2 + 0.75 * 0.6, 0.1], rtol=1e-12)

    window = rl_bayes.init_window(4, dtype=jnp.float64)
    assert rl_bayes.window_mean(window) == 0
    step, seen = jax.jit(rl_bayes.update_window), []
    for values in ([1.0, -np.inf, 2.0], [np.inf, 3.0, 4.0], [5.0, 6.0, 7.0]):
        window = step(window, np.array(values))
        seen += [v for v in values if np.isfinite(v)]
        np.testing.assert_allclose(rl_bayes.window_mean(window), np.mean(seen[-4:]), rtol=1e-13)
    np.testing.assert_allclose(rl_bayes.window_mean(step(window, np.arange(9.0))), np.mean([5, 6, 7, 8]), rtol=1e-13)


def test_monitor_and_the_adaptive_proposal(x64):
    everything = np.repeat(np.arange(1024), np.maximum(np.round(np.exp(PROPOSAL) * 2e5), 1).astype(int))
    seen = jax.jit(rl_bayes.monitor)((PRIOR + PHI)[everything], PROPOSAL[everything], POLICY[everything], log_z=LOG_Z)
    tv = lambda a, b: 0.5 * np.abs(np.exp(a) - np.exp(b)).sum()  # noqa: E731
    wanted = reference.kl(LOG_P, POLICY), reference.kl(LOG_P, PROPOSAL), tv(LOG_P, POLICY), tv(LOG_P, PROPOSAL)
    np.testing.assert_allclose(seen[:4], wanted, rtol=0.02)
    few = np.array([3, 500, 900])
    w = np.exp((PRIOR + PHI - PROPOSAL)[few])
    seen = rl_bayes.monitor((PRIOR + PHI)[few], PROPOSAL[few], POLICY[few], log_z=LOG_Z)
    z = np.exp(LOG_Z)
    kl = [-LOG_Z + np.mean(w * ((PRIOR + PHI) - m)[few]) / z for m in (POLICY, PROPOSAL)]
    ratio = np.exp(POLICY - PROPOSAL)[few]
    wanted = (*kl, 0.5 * np.mean(np.abs(ratio - w / z)), 0.5 * np.mean(np.abs(1 - w / z)), w.sum() ** 2 / (w**2).sum())
    np.testing.assert_allclose(seen, wanted, rtol=1e-11)
    nothing = rl_bayes.monitor(np.full(3, -np.inf), PROPOSAL[few], POLICY[few], log_z=-np.inf)
    assert np.isposinf(nothing.kl_p_pi) and nothing.ess == 0 and not any(np.isnan(x) for x in nothing)
    closer = seen._replace(kl_p_pi=jnp.asarray(0.1), kl_p_q=jnp.asarray(0.2))
    tree = {"a": jnp.zeros(2)}, {"a": jnp.ones(2)}
    chosen, replaced = rl_bayes.adapt_proposal(*tree, closer)
    assert replaced and chosen["a"][0] == 1
    chosen, replaced = rl_bayes.adapt_proposal(*tree, closer._replace(kl_p_pi=jnp.asarray(0.3)))
    assert not replaced and chosen["a"][0] == 0
    with pytest.raises(ValueError, match="'by' is 'js', expected one of 'kl', 'tv'"):
        rl_bayes.adapt_proposal(*tree, closer, by="js")
    np.testing.assert_allclose(
        rl_bayes.estimate_divergence(rl_bayes.JS, POLICY[everything], (PRIOR + PHI)[everything], PROPOSAL[everything], log_z=LOG_Z),
        reference.divergence("js", POLICY, LOG_P),
        rtol=0.02,
    )


def test_balance(x64, strict):
    """VarGrad is REINFORCE with the batch mean; on-policy, TB and VarGrad descend twice KL(pi || p), TB for any log Z."""
    rng = np.random.default_rng(6)
    x = rng.choice(1024, 32, p=np.exp(POLICY))
    log_pi, prior, phi = POLICY[x], PRIOR[x], PHI[x]
    half = jax.grad(lambda pi: 0.5 * rl_bayes.vargrad_loss(pi, prior, phi)[0])(log_pi)
    for ddof, baseline in ((0, "batch_mean"), (1, "leave_one_out")):
        half = jax.grad(lambda pi: 0.5 * rl_bayes.vargrad_loss(pi, prior, phi, ddof=ddof)[0])(log_pi)  # noqa: B023
        rl = jax.grad(
            lambda pi: rl_bayes.fdpg_loss(pi, prior + phi, log_z=LOG_Z, divergence=rl_bayes.RKL, baseline=baseline)[0]  # noqa: B023
        )(log_pi)
        np.testing.assert_allclose(half, rl, rtol=1e-10, atol=1e-14)
    value, info = rl_bayes.vargrad_loss(POLICY, PRIOR, PHI, weights=np.exp(POLICY))
    np.testing.assert_allclose((value, -info.log_z), (4.4376364239, 3.5328435905), atol=5.1e-11)
    np.testing.assert_allclose(rl_bayes.vargrad_loss(POLICY, PRIOR, PHI, weights=np.exp(PROPOSAL))[0], 4.1324080940, atol=5.1e-11)

    @jax.jit
    def gradients(table, log_z):
        tb = lambda t, z: rl_bayes.tb_loss(log_probs_of(t), PRIOR, PHI, z, weights=np.exp(POLICY))[0]  # noqa: E731
        vg = lambda t: rl_bayes.vargrad_loss(log_probs_of(t), PRIOR, PHI, weights=np.exp(POLICY))[0]  # noqa: E731
        return jax.grad(tb, argnums=(0, 1))(table, log_z), jax.grad(vg)(table)

    twice = 2 * reference.divergence_gradient("rkl", POLICY, LOG_P, SCORES)
    for log_z in (-3.0, 0.0, LOG_Z):
        (tb, of_z), vg = gradients(reference.POLICY, log_z)
        np.testing.assert_allclose(tb, twice, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(vg, twice, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(of_z, 2 * (log_z + 3.5328435905), atol=2e-10)
    for loss, info in (rl_bayes.tb_loss(LOG_P, PRIOR, PHI, LOG_Z), rl_bayes.vargrad_loss(LOG_P, PRIOR, PHI)):
        assert loss < 1e-20
        np.testing.assert_allclose(info.log_z, LOG_Z, rtol=1e-12)
    hard = np.where(np.arange(32) % 2, phi, -np.inf)
    loss, info = rl_bayes.vargrad_loss(log_pi, prior, hard)
    assert np.isfinite(loss) and info.dropped == 16
    np.testing.assert_allclose(
        rl_bayes.vargrad_loss(log_pi, prior, hard, floor=-9.0)[0], np.var(log_pi - prior - np.maximum(hard, -9)), rtol=1e-10
    )
    nothing = jax.value_and_grad(lambda pi: rl_bayes.tb_loss(pi, prior, np.full(32, -np.inf), 0.0)[0])(log_pi)
    assert nothing[0] == 0 and not np.any(nothing[1])


def test_sub_trajectory_balance(x64, strict):
    rng = np.random.default_rng(7)
    log_pi, log_reward, log_stop = rng.normal(size=(4, 5)), rng.normal(size=(4, 6)), -rng.random(size=(4, 6))
    lengths = np.array([5, 3, 0, 1])
    mask = np.arange(5)[None] < lengths[:, None]
    loss = jax.jit(lambda lam: rl_bayes.subtb_loss(log_pi, log_reward, log_stop, mask, lam=lam)[0])
    for lam in (1.0, 0.7):
        np.testing.assert_allclose(loss(lam), reference.subtb(log_pi, log_reward, log_stop, lengths, lam), rtol=1e-11)
    # pi(x, stop) = R / Z for every prefix: u is log Z, and the loss is zero
    log_z, rewards = 0.7, log_pi.cumsum(1)
    rewards = np.concatenate([np.zeros((4, 1)), rewards], axis=1) + log_stop + log_z
    loss, mean = rl_bayes.subtb_loss(log_pi, rewards, log_stop, mask)
    assert loss < 1e-25
    np.testing.assert_allclose(mean, log_z, rtol=1e-12)
    none, _ = rl_bayes.subtb_loss(log_pi, log_reward, log_stop, np.zeros((4, 5)))
    assert none == 0
    with pytest.raises(ValueError, match=r"'log_reward' has shape \(4, 5\)"):
        rl_bayes.subtb_loss(log_pi, log_reward[:, :5], log_stop, mask)


def test_preferences(x64, strict):
    """T15, T16: at p* the margin is the reward's, for every beta, and with Bradley-Terry labels the gradient vanishes."""
    log_prior, reward, log_q = reference.log_softmax(reference.PRIOR[0, 0]), np.array([0.3, -1.0, 2.0, 0.5]), np.log([0.4, 0.3, 0.2, 0.1])
    i, j, label, weights = rl_bayes.population_preferences(log_q, reward)

    @jax.jit
    def at(logits, beta):
        def loss(logits):
            log_pi = jax.nn.log_softmax(logits)
            return rl_bayes.dpo_loss(log_pi[i], log_pi[j], log_prior[i], log_prior[j], beta=beta, label=label, weights=weights)

        return jax.value_and_grad(loss, has_aux=True)(logits)

    entropy = -np.sum(weights * (label * np.log(label) + (1 - label) * np.log1p(-label)))
    for beta in (0.2, 1.0, 3.0):
        star = log_prior + reward / beta
        star = star - reference.lse(star)
        (value, _), gradient = at(star, beta)
        np.testing.assert_allclose(value, entropy, rtol=1e-11)
        np.testing.assert_allclose(gradient, 0, atol=1e-12)
        implied = rl_bayes.implied_reward(star, log_prior, beta=beta)
        np.testing.assert_allclose(implied[i] - implied[j], reward[i] - reward[j], atol=1e-12)
        assert np.linalg.norm(at(np.zeros(4), beta)[1]) > 1e-3
        gap = implied / beta
        value = rl_bayes.ipo_loss(star[i], star[j], log_prior[i], log_prior[j], beta=beta, weights=weights)[0]
        np.testing.assert_allclose(value, np.sum(weights * (gap[i] - gap[j] - 0.5 / beta) ** 2), rtol=1e-11)
    one, info = rl_bayes.dpo_loss(*(np.array([x]) for x in (-1.0, -2.0, -1.5, -1.0)), beta=0.5)
    np.testing.assert_allclose(one, np.log1p(np.exp(-0.75)), rtol=1e-12)
    assert info.kept == 1 and info.accuracy == 1
    lost = jax.value_and_grad(lambda a: rl_bayes.dpo_loss(a, a - 1, np.array([-1.0, -np.inf]), np.zeros(2), beta=1.0), has_aux=True)
    (value, info), gradient = lost(np.array([-1.0, -2.0]))
    assert info.kept == 1 and np.isfinite(value) and np.all(np.isfinite(gradient))


def test_token_level(x64, strict):
    """Reward-to-go has the exact gradient; GAE and PPO beside loops; what the KL estimators' gradients are."""
    tokens = reference.SEQUENCES
    previous = np.concatenate([np.full((1024, 1), reference.V), tokens[:, :-1]], axis=1)
    steps = np.arange(reference.T)[None]

    def per_token(table):
        return jax.nn.log_softmax(table)[steps, previous, tokens]

    prior = per_token(reference.PRIOR)
    mask = np.ones((1, reference.T))

    def expected(table):
        each = lambda pi, p0, r: rl_bayes.token_kl_rl_loss(pi[None], p0[None], r[None], mask, beta=0.5)  # noqa: E731
        weights = jax.lax.stop_gradient(jnp.exp(jnp.sum(per_token(table), 1)))
        return jnp.sum(weights * jax.vmap(each)(per_token(table), prior, jnp.asarray(reference.REWARD)))

    value, gradient = jax.jit(jax.value_and_grad(expected))(reference.POLICY)
    np.testing.assert_allclose(value, -reference.BY_BETA[0.5][10], atol=5.1e-11)
    np.testing.assert_allclose(gradient, 0.5 * reference.divergence_gradient("rkl", POLICY, LOG_P, SCORES), rtol=1e-9, atol=1e-12)
    two = rl_bayes.token_kl_rl_loss(
        POLICY[:4, None], PRIOR[:4, None], reference.REWARD[:4], np.ones((4, 1)), beta=0.5, baseline="leave_one_out"
    )
    same = rl_bayes.kl_rl_loss(POLICY[:4], PRIOR[:4], reference.REWARD[:4], beta=0.5, baseline="leave_one_out")[0]
    np.testing.assert_allclose(two, same, rtol=1e-12)

    a, b = np.log([0.5, 0.3, 0.2]), np.log([0.2, 0.2, 0.6])
    forward, reverse = np.exp(a) - np.exp(b), np.exp(a) * (a - b - np.sum(np.exp(a) * (a - b)))
    for estimator, wanted in (("k1", 0 * a), ("k2", reverse), ("k3", forward)):

        def loss(z, estimator=estimator):
            log_pi = jax.nn.log_softmax(z)[:, None]
            return jnp.sum(np.exp(a) * rl_bayes.token_kl(log_pi, b[:, None], np.ones((3, 1)), estimator=estimator))

        value, gradient = jax.jit(jax.value_and_grad(loss))(a)
        np.testing.assert_allclose(gradient, wanted, atol=1e-14)
        if estimator != "k2":
            np.testing.assert_allclose(value, np.sum(np.exp(a) * (a - b)), rtol=1e-12)

    rng = np.random.default_rng(8)
    mask = np.arange(6)[None] < np.array([[6], [3], [1]])
    log_pi, log_old, log_prior, values, old_values = rng.normal(size=(5, 3, 6))
    reward = rng.normal(size=3)
    policy = value = kl = 0.0
    gae = jax.jit(rl_bayes.gae)
    for row, n in enumerate((6, 3, 1)):
        r = -0.2 * (log_old - log_prior)[row, :n]
        kl += (log_old - log_prior)[row, :n].sum() / 3
        r[-1] += reward[row]
        advantage = reference.gae(r, old_values[row, :n], 1.0, 0.95)
        ours = gae(np.pad(r, (0, 6 - n))[None], old_values[row : row + 1], mask[row : row + 1])
        np.testing.assert_allclose(ours[0, :n], advantage, rtol=1e-11)
        returns, v, old = advantage + old_values[row, :n], values[row, :n], old_values[row, :n]
        ratio = np.exp((log_pi - log_old)[row, :n])
        policy += np.maximum(-advantage * ratio, -advantage * np.clip(ratio, 0.8, 1.2)).sum() / 18
        value += 0.5 * np.maximum((v - returns) ** 2, (np.clip(v, old - 0.2, old + 0.2) - returns) ** 2).sum() / 18
    junk = np.where(mask, 0.0, np.nan)
    loss, info = jax.jit(rl_bayes.ppo_penalty_loss)(
        *(x + junk for x in (log_pi, log_old, log_prior)), reward, mask, values + junk, old_values + junk, beta=0.2
    )
    np.testing.assert_allclose((loss, info.policy_loss, info.value_loss, info.kl), (policy + 0.1 * value, policy, value, kl), rtol=1e-11)
    np.testing.assert_allclose(rl_bayes.adaptive_beta(0.2, 60.0, num_samples=256), 0.2 * (1 + 0.2 * 256 / 10000), rtol=1e-12)
    np.testing.assert_allclose(rl_bayes.adaptive_beta(0.2, 5.4, num_samples=256), 0.2 * (1 - 0.1 * 256 / 10000), rtol=1e-12)
    logits = rng.normal(size=(2, 3, 4))
    log_probs = jax.jit(rl_bayes.token_log_probs)(logits, np.array([[1, 2, 9], [0, 3, 3]]), np.array([2, 3]))
    np.testing.assert_allclose(
        log_probs,
        [[*reference.log_softmax(logits)[0, [0, 1], [1, 2]], 0], reference.log_softmax(logits)[1, [0, 1, 2], [0, 3, 3]]],
        rtol=1e-12,
    )


SMALL = rl_bayes.Space(vocab_size=3, length=3)


def objectives(log_z, beta, learned):
    """Eight objectives with the same signature, for `lax.switch`."""
    fdpg = lambda kind: lambda pi, p0, phi: rl_bayes.fdpg_loss(pi, p0 + phi, log_z=log_z, divergence=kind, baseline="leave_one_out")  # noqa: E731
    return [
        *(fdpg(kind) for kind in (rl_bayes.FKL, rl_bayes.RKL, rl_bayes.TV, rl_bayes.JS)),
        lambda pi, p0, phi: rl_bayes.kl_rl_loss(pi, p0, phi * beta, beta=beta, baseline="leave_one_out"),
        lambda pi, p0, phi: rl_bayes.reinforce_loss(pi, phi, baseline="leave_one_out"),
        lambda pi, p0, phi: rl_bayes.vargrad_loss(pi, p0, phi),
        lambda pi, p0, phi: rl_bayes.tb_loss(pi, p0, phi, learned),
    ]


@pytest.mark.slow
def test_many_trainings_in_one_call():
    """Eight objectives by three seeds, objective and hyperparameters traced: one program, compiled once."""
    rng = np.random.default_rng(9)
    logits, phi = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((13, 3), (27,)))
    prior_rows = rl_bayes.log_rows(SMALL, logits)
    log_prior = rl_bayes.sequence_log_probs(SMALL, prior_rows)
    p = rl_bayes.posterior(log_prior, phi)

    def train(index, seed, rate, beta):
        def step(carry, key):
            params, state = carry
            x = jax.random.categorical(key, rl_bayes.sequence_log_probs(SMALL, rl_bayes.log_rows(SMALL, params[0])), shape=(64,))

            def loss(params):
                log_pi = rl_bayes.sequence_log_probs(SMALL, rl_bayes.log_rows(SMALL, params[0]))[x]
                return jax.lax.switch(index, objectives(rl_bayes.current_log_z(state), beta, params[1]), log_pi, log_prior[x], phi[x])

            gradient, info = jax.grad(loss, has_aux=True)(params)
            log_pi = rl_bayes.sequence_log_probs(SMALL, rl_bayes.log_rows(SMALL, params[0]))
            state = rl_bayes.update_log_z(state, (log_prior + phi - log_pi)[x])
            return (jax.tree.map(lambda a, b: a - rate * b, params, gradient), state), info

        start = (jnp.asarray(logits), jnp.zeros(())), rl_bayes.init_log_z()
        (params, state), info = jax.lax.scan(step, start, jax.random.split(jax.random.key(seed), 150))
        log_pi = rl_bayes.sequence_log_probs(SMALL, rl_bayes.log_rows(SMALL, params[0]))
        return rl_bayes.kl_divergence(p.log_probs, log_pi), rl_bayes.entropy(log_pi), rl_bayes.current_log_z(state), info

    grid = jax.jit(jax.vmap(jax.vmap(chex.assert_max_traces(train, n=1), in_axes=(None, 0, None, None)), in_axes=(0, None, 0, None)))
    rates = np.where(np.arange(8) == 7, 0.1, 0.5).astype(np.float32)
    for beta in (0.5, 1.0):
        kl, entropy, log_z, info = grid(jnp.arange(8), jnp.arange(3), rates, jnp.asarray(beta))
    start = rl_bayes.kl_divergence(p.log_probs, log_prior)
    distribution_matching = [i for i in range(8) if i != 5]
    kl, entropy, log_z = (np.asarray(x) for x in (kl, entropy, log_z))
    assert np.all(np.mean(kl, 1)[distribution_matching] < 0.35 * start), (kl, start)
    assert np.all(entropy[5] < 0.5 * rl_bayes.entropy(p.log_probs))  # T10: plain RL collapses
    assert np.all(np.abs(log_z[[0, 3, 4]] - p.log_z) < 0.1)
    assert info.value.shape == (8, 3, 150) and np.all(np.isfinite(info.value))
