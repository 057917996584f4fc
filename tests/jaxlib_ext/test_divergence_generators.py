"""One scalar function per divergence: its values, derivatives, dual and conjugate, and the forms made of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinds import GENERATED, ONE_EACH, SOME, compiled, each_kind, expected, generator, problem, together
from reference import divergence as reference

from janax.jaxlib_ext import divergence


def test_generators(x64, strict):
    """f, f', f'' against the tables, and convexity with the minimum 0 at 1."""
    l = np.linspace(-4, 4, 80)  # no tie
    u = np.exp(l)
    ties = jnp.array([0.0, 1e-9, -1e-9])

    def make(kind):
        g = generator(kind)
        return lambda l: (
            divergence.f(g, l),
            divergence.f_prime(g, l),
            divergence.f_second(g, l),
            divergence.f(g, ties),
            divergence.f_prime(g, ties),
        )

    for kind, (*found, f_one, f_prime_one) in together([kind for kind in GENERATED if kind in ONE_EACH or kind[1] == -1], make)(l).items():
        for ours, table in zip(found, reference.f(kind[0], u, kind[1])):
            np.testing.assert_allclose(ours, table, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(f_one, 0, atol=1e-9)
        np.testing.assert_allclose(f_prime_one, 0, atol=0.51 if kind[0] == "total_variation" else 1e-8)
        assert np.all(np.asarray(found[0]) >= 0) and np.all(np.diff(found[1]) > -1e-15)


@each_kind(SOME)
def test_one_function_gives_all(kind, x64, strict):
    """From h alone, by autodiff: f', f'', the dual and the exact form."""
    l = np.linspace(-4, 4, 80)
    u, g = np.exp(l), generator(kind)
    bare = divergence.Generator(h=lambda l: divergence.f(g, l))
    both = divergence.dual(bare), divergence.dual(g)
    zs, zt = problem()

    def call(l):
        reflected = [(divergence.f(x, l), divergence.f_prime(x, l)) for x in both]
        return divergence.f_prime(bare, l), divergence.f_second(bare, l), reflected, divergence.exact(bare, zs, zt)

    slope, curvature, reflected, value = compiled(call)(l)
    _, slopes, curvatures = reference.f(kind[0], u, kind[1])
    np.testing.assert_allclose(slope, slopes, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(curvature, curvatures, rtol=1e-7, atol=1e-9)
    values, slopes, _ = reference.f(kind[0], 1 / u, kind[1])
    for f_dual, f_prime_dual in reflected:
        np.testing.assert_allclose(f_dual, u * values, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(f_prime_dual, values - slopes / u, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(value, expected(kind, reference.softmax(zs), reference.softmax(zt)), rtol=1e-10)


def test_curvature_at_one(x64):
    strength = compiled(lambda g: divergence.f_second(g, 0.0))
    for g, expected_strength in (
        (divergence.FORWARD_KL, 1),
        (divergence.REVERSE_KL, 1),
        (divergence.js_generator(), 1 / 4),
        (divergence.js_generator(0.1), 0.09),
        (divergence.alpha_generator(0.3), 1),
        (divergence.SQUARED_HELLINGER, 1 / 4),
        (divergence.CHI2_FORWARD, 2),
        (divergence.CHI2_REVERSE, 2),
        (divergence.JEFFREYS, 2),
        (divergence.skew_kl_generator(0.1), 0.81),
        (divergence.skew_reverse_kl_generator(0.1), 0.81),
    ):
        np.testing.assert_allclose(strength(g), expected_strength, rtol=1e-12)
    z = np.array([0.2, -0.4, 1.0])
    nearby = z + 1e-3 * np.array([1.0, -2.0, 0.5])
    np.testing.assert_allclose(divergence.js(nearby, z), divergence.chi2_reverse(nearby, z) / 8, rtol=5e-3)


def test_slope_at_infinity(x64):
    """What a sample outside the support of q counts, at most: f'(inf), here with f'(1) = 0."""
    for g, limit in (
        (divergence.FORWARD_KL, 1),
        (divergence.REVERSE_KL, np.inf),
        (divergence.TOTAL_VARIATION, 1 / 2),
        (divergence.js_generator(), np.log(2) / 2),
        (divergence.SQUARED_HELLINGER, 1 / 2),
        (divergence.CHI2_FORWARD, 1),
        (divergence.alpha_generator(0.25), 4),
        (divergence.skew_kl_generator(0.1), 0.9),
        (divergence.skew_reverse_kl_generator(0.1), np.log(10) - 0.9),
    ):
        np.testing.assert_allclose(divergence.f_prime(g, np.inf), limit, rtol=1e-12)
        if np.isfinite(limit):
            np.testing.assert_allclose(divergence.f_prime(g, 1e4), limit, rtol=1e-12)


def test_conjugate(x64):
    l = jnp.linspace(-3.0, 3.0, 13)

    def make(kind):
        g = generator(kind)

        def call(l):
            y = divergence.f_prime(g, l)
            rates = [
                jax.vmap(jax.grad(functools.partial(function, g)))(y) for function in (divergence.conjugate, divergence.inverse_f_prime)
            ]
            exact = jnp.exp(l) * y - divergence.f(g, l)
            return divergence.inverse_f_prime(g, y), divergence.conjugate(g, y), exact, *rates, divergence.f_second(g, l)

        return call

    kinds = [("reverse_kl", None), *SOME[:3]]
    for inverse, conjugate, exact, u, slope, curvature in together(kinds, make)(l).values():
        np.testing.assert_allclose(inverse, l, atol=1e-9)
        np.testing.assert_allclose(conjugate, exact, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(u, np.exp(l), rtol=1e-8)
        np.testing.assert_allclose(slope * curvature * np.exp(l), 1, rtol=1e-8)


def test_regularised_optima(x64):
    """argmax <p, r> - eta D_f(p || q) in closed form, through the inverse of f'."""
    r, eta = jnp.array([0.0, 0.05, 0.1]), 0.2
    y = r / eta - 0.3
    closed = {
        divergence.REVERSE_KL: jnp.exp(y),
        divergence.FORWARD_KL: 1 / (1 - y),
        divergence.js_generator(): jnp.exp(2 * y) / (2 - jnp.exp(2 * y)),
        divergence.alpha_generator(0.3): (1 - 0.3 * y) ** (-1 / 0.3),
    }
    for g, u in closed.items():
        np.testing.assert_allclose(jnp.exp(compiled(divergence.inverse_f_prime)(g, y)), u, rtol=1e-10)
    a_slope = compiled(jax.grad(lambda a: divergence.inverse_f_prime(divergence.alpha_generator(a), -0.3)))(0.3)
    finite = lambda a: -jnp.log(1 + 0.3 * a) / a  # noqa: E731
    np.testing.assert_allclose(a_slope, jax.grad(finite)(0.3), rtol=1e-9)


def test_own_generator(strict):
    mine = divergence.Generator(h=lambda l: jnp.exp(l) * l - jnp.expm1(l))  # reverse KL again
    zs, zt = (x.astype(np.float32)[:3] for x in problem())
    both = compiled(jax.value_and_grad(functools.partial(divergence.exact, mine)))
    s, t = reference.softmax(zs), reference.softmax(zt)
    value, gradient = both(zs, zt)
    np.testing.assert_allclose(value, reference.reverse_kl(s, t), rtol=1e-5)
    np.testing.assert_allclose(gradient, reference.gradient("reverse_kl", s, t), atol=1e-6)
    value, gradient = both(np.float32([60, -60, -np.inf]), np.float32([-60, 60, 0]))
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


@each_kind([*GENERATED, ("js", 0.0), ("js", 1.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-6), ("float64", 1e-13)])
def test_summands_and_slopes_made_together(kind, dtype, tolerance):
    """`terms_and_slopes` is the summand and its derivative, from ratios of 1 + 1e-6 to where one side is forbidden."""
    l = np.array([0.0, 1e-6, -1e-6, 1e-3, -0.3, 0.299, 0.301, -0.7, 2.0, -20.0, 35.0])
    log_q = np.log(np.linspace(0.001, 0.4, len(l)))
    log_p, log_q = np.minimum(log_q + l, -1e-3), log_q
    log_p, log_q = np.append(log_p, [-1e4, -1.0, -1e4, -90.0]), np.append(log_q, [-1.0, -1e4, -1e4, -0.5])
    made = generator(kind)

    def by_autodiff(p, q):
        return jax.jvp(lambda p: divergence.terms(made, p, q), (p,), (jnp.ones_like(p),))

    with jax.enable_x64(dtype == "float64"):
        log_p, log_q = (jnp.asarray(x, dtype) for x in (log_p, log_q))
        value, slope = compiled(lambda p, q: divergence.terms_and_slopes(made, p, q))(log_p, log_q)
        expected_value, expected_slope = compiled(by_autodiff)(log_p, log_q)
        size = np.exp(np.maximum(log_p, log_q)) * (1 + np.abs(np.asarray(log_p - log_q)))  # of what is summed in both
    for made_together, one in ((value, expected_value), (slope, expected_slope)):
        assert np.all(np.abs(made_together - one) <= tolerance * (size + np.abs(one)))
