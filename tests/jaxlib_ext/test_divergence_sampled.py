"""Estimators of divergences from samples: expectations and gradients by enumeration, weights, extremes, control variates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from kinds import SOME, compiled, expected, generator, problem, together
from reference import divergence as reference

from janax.jaxlib_ext import divergence


def test_estimators_by_enumeration(x64, strict):
    """Every source of samples gives the value and the gradient of the exact divergence, in expectation."""
    zs, zt = problem(seed=4, scale=1.0)
    log_p, log_q, log_b = map(reference.log_softmax, (zs, zt, problem(seed=6, scale=1.0)[0]))
    p, q, b = map(np.exp, (log_p, log_q, log_b))

    def make(kind):
        g = generator(kind)

        def call(log_p):
            baseline = divergence.expected_f_prime(g, zs, zt)
            estimators = {
                "reference": lambda x: divergence.from_reference(g, x, log_q),
                "policy": lambda x: divergence.from_policy(g, x, log_q, baseline=baseline),
                "behaviour": lambda x: divergence.from_behaviour(g, x, log_q, log_b),
            }
            pulled = {name: jax.vjp(term, log_p) for name, term in estimators.items()}
            return {name: (values, pull(jnp.ones_like(values))[0]) for name, (values, pull) in pulled.items()}, baseline

        return call

    sources = {"reference": q, "policy": p, "behaviour": b}
    for kind, (found, baseline) in together([*SOME, ("reverse_kl", None)], make)(log_p).items():
        value, gradient = expected(kind, p, q), reference.gradient(kind[0], p, q, kind[1])
        np.testing.assert_allclose(baseline, np.sum(p * reference.f(kind[0], p / q, kind[1])[1]), rtol=1e-10, atol=1e-13)
        for name, (values, scores) in found.items():
            estimate, pulls = np.sum(sources[name] * values), sources[name] * np.asarray(scores)
            np.testing.assert_allclose(estimate, value, rtol=1e-12, atol=1e-12, err_msg=f"{kind} {name}")
            np.testing.assert_allclose(pulls - p * pulls.sum(), gradient, rtol=1e-12, atol=1e-12 * max(1, value), err_msg=f"{kind} {name}")


def test_k_estimators_by_enumeration(x64, strict):
    """What each of them estimates, and whose gradient it has as a loss."""
    zs, zt = problem(seed=4, scale=1.0)
    log_p, log_q = reference.log_softmax(zs), reference.log_softmax(zt)
    p, q = np.exp(log_p), np.exp(log_q)
    constant = jax.lax.stop_gradient
    losses = {
        "k1": divergence.k1,
        "k2": divergence.k2,
        "k3": divergence.k3,
        "k3 by ratio": lambda x, y: jnp.exp(x - constant(x)) * divergence.k3(x, y),
        "k1 in the reward": lambda x, y: constant(divergence.k1(x, y)) * x,
        "k2 with the value of k3": lambda x, y: divergence.with_value(divergence.k2(x, y), divergence.k3(x, y)),
        "from_policy": lambda x, y: divergence.from_policy(divergence.REVERSE_KL, x, y),
    }

    def pulled(x, y):
        found = {name: jax.vjp(loss, x, y) for name, loss in losses.items()}
        return {name: (values, *pull(jnp.ones_like(values))) for name, (values, pull) in found.items()}

    found = {name: tuple(map(np.asarray, x)) for name, x in compiled(pulled)(log_p, log_q).items()}
    value = {name: np.sum(p * x[0]) for name, x in found.items()}
    gradient = {name: p * x[1] - p * np.sum(p * x[1]) for name, x in found.items()}
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)
    reverse, to_reverse, to_forward = reference.kl(p, q), reference.gradient("reverse_kl", p, q), p - q
    for name in ("k1", "k3", "k2 with the value of k3", "from_policy"):
        close(value[name], reverse)
    assert abs(value["k2"] - reverse) > 0.01
    close(gradient["k1"], np.zeros(11))
    close(gradient["k3"], to_forward)
    for name in ("k2", "k3 by ratio", "k1 in the reward", "k2 with the value of k3", "from_policy"):
        close(gradient[name], to_reverse)
    close(found["from_policy"][0], found["k3"][0])
    assert np.all(found["k3"][0] >= 0) and all(np.all(x[2] == 0) for x in found.values())


def test_weights(x64, strict):
    log_p, log_b = np.log([0.5, 0.25, 0.25]), np.log([0.1, 0.4, 0.5])
    np.testing.assert_allclose(divergence.importance_weights(log_p, log_b), [5, 0.625, 0.5], rtol=1e-14)
    np.testing.assert_allclose(divergence.importance_weights(log_p, log_b, max_weight=2.0), [2, 0.625, 0.5], rtol=1e-14)
    assert np.all(jax.grad(lambda x: jnp.sum(divergence.importance_weights(x, log_b)))(log_p) == 0)
    loss = lambda x: divergence.from_behaviour(divergence.REVERSE_KL, x, jnp.zeros(3), log_b, max_weight=2.0)  # noqa: E731
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(loss(x)))(log_p), np.array([2, 0.625, 0.5]) * log_p, rtol=1e-12)


def test_sampled_extremes(strict):
    """Forgotten, forbidden and certain tokens; the gradient of forward KL is not cut where the policy has forgotten."""
    log_p = jnp.array([-0.1, -100.0, -1e-3, -jnp.inf, -jnp.inf, 0.0, -300.0])
    log_q = jnp.array([-100.0, -0.1, -jnp.inf, -2.0, -jnp.inf, 0.0, -300.0])
    terms = divergence.from_reference, functools.partial(divergence.from_behaviour, log_behaviour=log_q)

    def make(kind):
        g = generator(kind)
        call = lambda term, x: (term(g, x, log_q), jax.grad(lambda x: jnp.sum(term(g, x, log_q)))(x))  # noqa: E731
        return lambda x: [call(term, x) for term in terms]

    for kind, found in together([*SOME, ("reverse_kl", None), ("chi2_forward", None)], make)(log_p).items():
        for values, gradient in found:
            assert np.all(np.isfinite(values)) and np.all(np.isfinite(gradient)) and gradient[3] == gradient[4] == 0
            np.testing.assert_allclose(np.asarray(values)[[5, 6]], 0, atol=1e-6)
        if kind[0] == "forward_kl":
            np.testing.assert_allclose(found[0][1][1], -1)


def test_control_variates(x64, strict):
    rng = np.random.default_rng(0)
    zs, zt = problem(seed=8, scale=0.7)
    log_p, log_q = reference.log_softmax(zs), reference.log_softmax(zt)
    tokens = rng.choice(11, size=4000, p=np.exp(log_q) / np.exp(log_q).sum())
    l = (log_p - log_q)[tokens]
    values, control = -l, np.expm1(l)
    np.testing.assert_allclose(
        divergence.control_variate(values[:40], control[:40]), reference.leave_one_out(values[:40], control[:40]), rtol=1e-10, atol=1e-12
    )
    np.testing.assert_array_equal(divergence.control_variate(values, control, coefficient=-1.0), values + control)
    best = divergence.control_variate(values, control, leave_one_out=False)
    coefficient = np.cov(values, control, ddof=0)[0, 1] / np.var(control)
    np.testing.assert_allclose(best, values - coefficient * control, rtol=1e-10, atol=1e-12)
    exact = reference.forward_kl(np.exp(log_p), np.exp(log_q))
    assert abs(np.mean(best) - exact) < 4 * np.std(best) / np.sqrt(4000) and np.std(best) <= np.std(values + control) < np.std(values)
    mask = np.arange(40) % 3 > 0
    spoiled = np.where(mask, values[:40], np.nan)
    masked = divergence.control_variate(spoiled, control[:40], mask=mask)
    np.testing.assert_allclose(
        np.asarray(masked)[mask], reference.leave_one_out(values[:40][mask], control[:40][mask]), rtol=1e-10, atol=1e-12
    )
    assert np.all(np.asarray(masked)[~mask] == 0)
    for n in (1, 2):
        np.testing.assert_allclose(divergence.control_variate(values[:n], control[:n]), values[:n])
    np.testing.assert_allclose(divergence.control_variate(values[:9], np.zeros(9)), values[:9])


def test_leave_one_out_is_unbiased(x64):
    """Over all samples of size 3 from three tokens: the mean of the corrected values is the divergence; with one shared c it is not."""
    log_p, log_q = np.log([0.2, 0.3, 0.5]), np.log([0.6, 0.3, 0.1])
    l, q = log_p - log_q, np.exp(log_q)
    tokens = np.stack(np.meshgrid(*[range(3)] * 4, indexing="ij"), -1).reshape(-1, 4)
    weight = np.prod(q[tokens], axis=1)
    for shared in (False, True):
        corrected = jax.vmap(functools.partial(divergence.control_variate, leave_one_out=not shared))(-l[tokens], np.expm1(l)[tokens])
        error = abs(np.sum(weight * np.mean(corrected, axis=1)) - reference.kl(np.exp(log_q), np.exp(log_p)))
        assert error > 1e-3 if shared else error < 1e-13
