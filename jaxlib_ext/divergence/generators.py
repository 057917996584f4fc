"""The scalar generators of f-divergences: f as a function of the log-ratio, its derivatives, its dual and its conjugate."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import dtypes
from janax.jaxlib_ext.divergence import numerics

__all__ = [
    "CHI2_FORWARD",
    "CHI2_REVERSE",
    "FORWARD_KL",
    "JEFFREYS",
    "REVERSE_KL",
    "SQUARED_HELLINGER",
    "TOTAL_VARIATION",
    "Generator",
    "alpha_generator",
    "conjugate",
    "dual",
    "f",
    "f_prime",
    "f_second",
    "inverse_f_prime",
    "js_generator",
    "skew_kl_generator",
    "skew_reverse_kl_generator",
    "terms",
    "terms_and_slopes",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator:
    """The function f of an f-divergence, as functions of log-ratios. One of `h` and `summand` is enough.

    Adding c (u - 1) to f changes neither D_f nor an expected gradient; the generators here have f >= 0 and f'(1) = 0. A pytree whose leaves
    are the parameters: it may be an argument of `jit`, and `vmap` over parameters gives a family at once.

    Attributes:
      h: (l, *parameters) -> f(exp(l)), elementwise. Static.
      summand: (log_p, log_q, *parameters) -> q f(p / q), elementwise, without overflow where one of them is tiny. Made of `h` if None: then
        log-ratios are cut at +-39 (float32) or +-319 (float64), with zero gradients beyond. Static.
      slope: (l, *parameters) -> f'(exp(l)); by autodiff if None. Static.
      with_slope: (log_p, log_q, *parameters) -> (summand, p f'(p / q)), sharing what both are made of; by autodiff if None. Static.
      parameters: Numbers or arrays [], traced.
    """

    h: Callable[..., jax.Array] | None = dataclasses.field(default=None, metadata={"static": True})
    summand: Callable[..., jax.Array] | None = dataclasses.field(default=None, metadata={"static": True})
    slope: Callable[..., jax.Array] | None = dataclasses.field(default=None, metadata={"static": True})
    with_slope: Callable[..., tuple[jax.Array, jax.Array]] | None = dataclasses.field(default=None, metadata={"static": True})
    parameters: tuple[Any, ...] = ()

    def __post_init__(self):
        if self.h is None and self.summand is None:
            raise ValueError("Generator: 'h' and 'summand' are both None, expected at least one")


def _forward_summand(log_p, log_q):
    below, top, d = numerics.ordered(log_p, log_q)
    return numerics.exp(top) * jnp.where(below, numerics.expm1_below(d) - d, d * jnp.exp(d) - numerics.expm1_below(d))


def _reverse_summand(log_p, log_q):
    return _forward_summand(log_q, log_p)


def _jeffreys_summand(log_p, log_q):
    _, top, d = numerics.ordered(log_p, log_q)
    return numerics.exp(top) * d * numerics.expm1_below(d)


def _total_variation_summand(log_p, log_q):
    _, top, d = numerics.ordered(log_p, log_q)
    return 0.5 * numerics.exp(top) * jnp.where(d < 0, -numerics.expm1_below(d), jnp.zeros_like(d))  # no gradient at a tie


def _hellinger_summand(log_p, log_q):
    _, top, d = numerics.ordered(log_p, log_q)
    return 0.5 * numerics.exp(top) * jnp.square(numerics.expm1_below(0.5 * d))


def _chi2_forward_summand(log_p, log_q):
    below, top, d = numerics.ordered(log_p, log_q)
    return numerics.exp(jnp.where(below, top - d, top)) * jnp.square(numerics.expm1_below(d))


def _chi2_reverse_summand(log_p, log_q):
    return _chi2_forward_summand(log_q, log_p)


def _js_summand(log_p, log_q, beta):
    below, top, d = numerics.ordered(log_p, log_q)
    log_beta, log_rest = numerics.log_weight(beta), numerics.log_weight(1 - beta)
    weight, rest = jnp.where(below, beta, 1 - beta), jnp.where(below, 1 - beta, beta)
    log_m = numerics.log_mixture(rest, jnp.where(below, log_beta, log_rest), jnp.where(below, log_rest, log_beta), d)
    return numerics.exp(top) * (rest * jnp.exp(d) * (d - log_m) - weight * log_m)


def _js_slope(l, beta):
    return -(1 - beta) * jnp.logaddexp(numerics.log_weight(1 - beta), numerics.log_weight(beta) - l)


def _skew_summand(log_p, log_q, alpha):
    below, top, d = numerics.ordered(log_p, log_q)
    log_alpha, log_rest = numerics.log_weight(alpha), numerics.log_weight(1 - alpha)
    q_larger = (1 - alpha) * numerics.expm1_below(d) - numerics.log_mixture(1 - alpha, log_alpha, log_rest, d)
    p_larger = (alpha - 1) * numerics.expm1_below(d) - jnp.exp(d) * (numerics.log_mixture(alpha, log_rest, log_alpha, d) - d)
    return numerics.exp(top) * jnp.where(below, q_larger, p_larger)


def _skew_slope(l, alpha):
    log_m = jnp.logaddexp(numerics.log_weight(alpha), numerics.log_weight(1 - alpha) + l)
    return (1 - alpha) * (1 - numerics.exp(-log_m))


def _skew_reverse_summand(log_p, log_q, alpha):
    return _skew_summand(log_q, log_p, alpha)


def _skew_reverse_slope(l, alpha):
    log_m = jnp.logaddexp(numerics.log_weight(1 - alpha) - l, numerics.log_weight(alpha))  # log(m / p)
    return (1 - alpha) * (numerics.exp(-l - log_m) - 1) - log_m


def _alpha_summand(log_p, log_q, alpha):
    # Below one half the roles of p and q change, so that the one division by a small number is in numerics.power_minus_one.
    high = alpha >= 0.5
    x, y = jnp.where(high, log_p, log_q), jnp.where(high, log_q, log_p)
    weight, exponent = jnp.where(high, alpha, 1 - alpha), jnp.where(high, 1 - alpha, alpha)
    l = x - y
    near = jnp.abs(l) < 1
    difference = jnp.where(near, numerics.exp(y) * jnp.expm1(jnp.where(near, l, jnp.zeros_like(l))), numerics.exp(x) - numerics.exp(y))
    return (difference - numerics.power_minus_one(y, l, exponent)) / weight


def _u_power(l, exponent):
    """(u^exponent - 1) / exponent; f'(u) of the alpha-divergence for exponent = -alpha."""
    return numerics.power_minus_one(jnp.zeros_like(l), l, exponent)


def _alpha_slope(l, alpha):
    return _u_power(l, -alpha)


def _pieces(log_p, log_q):
    """(whether p <= q, the larger of the two, d = log(smaller / larger), exp(d), exp(d) - 1)."""
    below, top, d = numerics.ordered(log_p, log_q)
    return below, jnp.exp(top), d, jnp.exp(d), jnp.expm1(d)


def _forward_with_slope(log_p, log_q):
    below, larger, d, power, e = _pieces(log_p, log_q)
    return larger * jnp.where(below, e - d, d * power - e), jnp.where(below, larger * e, -larger * e)


def _reverse_with_slope(log_p, log_q):
    below, larger, d, power, e = _pieces(log_p, log_q)
    return larger * jnp.where(below, d * power - e, e - d), larger * jnp.where(below, d * power, -d)


def _jeffreys_with_slope(log_p, log_q):
    below, larger, d, power, e = _pieces(log_p, log_q)
    return larger * d * e, larger * jnp.where(below, d * power + e, -d - e)


def _js_with_slope(log_p, log_q, beta):
    below, larger, d, power, e = _pieces(log_p, log_q)
    weight, rest = jnp.where(below, beta, 1 - beta), jnp.where(below, 1 - beta, beta)
    log_m = numerics.log_mixture_of(weight, rest, e, power)  # log(m / larger)
    smaller = power * (d - log_m)
    return larger * (rest * smaller - weight * log_m), (1 - beta) * larger * jnp.where(below, smaller, -log_m)


FORWARD_KL = Generator(summand=_forward_summand, slope=lambda l: _u_power(l, -1.0), with_slope=_forward_with_slope)
"""f(u) = u - 1 - log u: D_f(p || q) = KL(q || p)."""
REVERSE_KL = Generator(summand=_reverse_summand, slope=lambda l: l, with_slope=_reverse_with_slope)
"""f(u) = u log u - u + 1: D_f(p || q) = KL(p || q)."""
JEFFREYS = Generator(summand=_jeffreys_summand, slope=lambda l: l + _u_power(l, -1.0), with_slope=_jeffreys_with_slope)
"""f(u) = (u - 1) log u: KL(p || q) + KL(q || p)."""
TOTAL_VARIATION = Generator(summand=_total_variation_summand, slope=lambda l: 0.5 * jnp.sign(l))
"""f(u) = |u - 1| / 2; f' is 0 at a tie."""
SQUARED_HELLINGER = Generator(summand=_hellinger_summand, slope=lambda l: 0.25 * _u_power(l, -0.5))
"""f(u) = (sqrt(u) - 1)^2 / 2: 1 - sum sqrt(p q), a quarter of the alpha-divergence at 1/2."""
CHI2_FORWARD = Generator(summand=_chi2_forward_summand, slope=lambda l: 2 * _u_power(l, -2.0))
"""f(u) = (1 - u)^2 / u: sum (q - p)^2 / p, twice the alpha-divergence at 2."""
CHI2_REVERSE = Generator(summand=_chi2_reverse_summand, slope=lambda l: 2 * _u_power(l, 1.0))
"""f(u) = (u - 1)^2: sum (p - q)^2 / q, twice the alpha-divergence at -1."""


def js_generator(beta: ArrayLike = 0.5) -> Generator:
    """f(u) = -beta log M + (1 - beta) u log(u / M) with M = beta + (1 - beta) u; see `js`. At 1/2, f = [u log u - (u+1) log((u+1)/2)] / 2."""
    return Generator(summand=_js_summand, slope=_js_slope, with_slope=_js_with_slope, parameters=(beta,))


def skew_kl_generator(alpha: ArrayLike = 0.1) -> Generator:
    """f(u) = (1 - alpha) (u - 1) - log(alpha + (1 - alpha) u); see `skew_kl`."""
    return Generator(summand=_skew_summand, slope=_skew_slope, parameters=(alpha,))


def skew_reverse_kl_generator(alpha: ArrayLike = 0.1) -> Generator:
    """f(u) = u log(u / M) + (1 - alpha) (1 - u) with M = alpha u + 1 - alpha; see `skew_reverse_kl`."""
    return Generator(summand=_skew_reverse_summand, slope=_skew_reverse_slope, parameters=(alpha,))


def alpha_generator(alpha: ArrayLike) -> Generator:
    """f(u) = (u^(1-alpha) - (1-alpha) u - alpha) / (alpha (alpha - 1)); REVERSE_KL at 0, FORWARD_KL at 1; see `alpha_divergence`."""
    return Generator(summand=_alpha_summand, slope=_alpha_slope, parameters=(alpha,))


def f(generator: Generator, log_ratio: ArrayLike) -> jax.Array:
    """f(u) at u = exp(log_ratio) [...]; as a function of the log-ratio this is h, and its derivative is u f'(u)."""
    l = dtypes.at_least_float32(log_ratio)
    if generator.h is not None:
        return generator.h(l, *_parameters(generator, l))
    return terms(generator, l, jnp.zeros_like(l))


def f_prime(generator: Generator, log_ratio: ArrayLike) -> jax.Array:
    """f'(u) at u = exp(log_ratio) [...]: minus the reward whose policy gradient descends the divergence."""
    l = dtypes.at_least_float32(log_ratio)
    if generator.slope is not None:
        return generator.slope(l, *_parameters(generator, l))
    l = numerics.cut(l)
    return jax.jvp(lambda x: f(generator, x), (l,), (jnp.ones_like(l),))[1] * jnp.exp(-l)


def f_second(generator: Generator, log_ratio: ArrayLike) -> jax.Array:
    """f''(u) at u = exp(log_ratio) [...]. At log-ratio 0: the local strength, D_f ~ f''(1) / 2 sum (p - q)^2 / q.

    Log-ratios are cut at +-39 (float32) or +-319 (float64).
    """
    l = numerics.cut(dtypes.at_least_float32(log_ratio))
    return jax.jvp(lambda x: f_prime(generator, x), (l,), (jnp.ones_like(l),))[1] * jnp.exp(-l)


def terms(generator: Generator, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """q f(p / q) by entries [...], from finite log-probabilities [...] of one shape and dtype; differentiable in both."""
    parameters = _parameters(generator, log_p)
    if generator.summand is not None:
        return generator.summand(log_p, log_q, *parameters)
    assert generator.h is not None
    l = numerics.cut(log_p - log_q)
    below, top, _ = numerics.ordered(log_p, log_q)
    return numerics.exp(top) * generator.h(l, *parameters) * jnp.exp(jnp.where(below, jnp.zeros_like(l), -l))


def terms_and_slopes(generator: Generator, log_p: jax.Array, log_q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """q f(p / q) by entries, and p f'(p / q), its derivative with respect to log p: all that a loss over a vocabulary needs, in one go.

    Args:
      generator: f.
      log_p: [...] log-probabilities, float32 or float64, finite: `numerics.FORBIDDEN` in the place of -inf.
      log_q: [...] of the same shape and dtype.

    Returns:
      Both [...], of that dtype, to the digits of `terms` and its derivative by autodiff. Not meant to be differentiated again.
    """
    if generator.with_slope is not None:
        return generator.with_slope(log_p, log_q, *_parameters(generator, log_p))
    return jax.jvp(lambda log_p: terms(generator, log_p, log_q), (log_p,), (jnp.ones_like(log_p),))


def dual(generator: Generator) -> Generator:
    """The generator u f(1/u), whose divergence is the same one with p and q exchanged."""
    h = None if generator.h is None else _dual_h(generator.h)
    return Generator(h=h, summand=None if generator.summand is None else _swapped(generator.summand), parameters=generator.parameters)


def inverse_f_prime(generator: Generator, y: ArrayLike) -> jax.Array:
    """The log-ratio l with f'(exp(l)) = y, by bisection: argmax_p <p, r> - eta D_f(p || q) is q exp(l((r - c) / eta)), c for the normalisation.

    Args:
      generator: f, with f' increasing.
      y: [...] slopes. Outside the range of f' the result is the end of the search, +-39 in float32 and +-319 in float64.

    Returns:
      [...] float32 or wider; differentiable in y and in the generator's parameters.
    """
    y = dtypes.at_least_float32(y)
    limit = numerics.cut_at(y.dtype)
    frozen, target = jax.tree.map(jax.lax.stop_gradient, (generator, y))

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        above = f_prime(frozen, middle) > target
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    start = jnp.zeros_like(target)
    low, high = jax.lax.fori_loop(0, 80, halve, (start - limit, start + limit))
    l = jax.lax.stop_gradient(0.5 * (low + high))
    rate = jax.lax.stop_gradient(jax.jvp(lambda x: f_prime(frozen, x), (l,), (jnp.ones_like(l),))[1])
    inside = (jnp.abs(l) < limit - 1e-3) & (rate > 0)
    step = (f_prime(generator, l) - y) / jnp.where(inside, rate, jnp.ones_like(rate))  # of no size; it carries the derivatives
    return l - jnp.where(inside, step, jnp.zeros_like(step))


def conjugate(generator: Generator, y: ArrayLike) -> jax.Array:
    """f*(y) = sup_u (u y - f(u)) [...], for slopes y in the range of f'; its derivative is u. D_f = sup_T E_p[T] - E_q[f*(T)]."""
    y = dtypes.at_least_float32(y)
    l = inverse_f_prime(generator, y)
    return numerics.exp(l) * y - f(generator, l)


def _parameters(generator: Generator, like: jax.Array) -> list[jax.Array]:
    return [jnp.asarray(x).astype(like.dtype) for x in generator.parameters]


@functools.cache
def _swapped(summand: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda log_p, log_q, *parameters: summand(log_q, log_p, *parameters)


@functools.cache
def _dual_h(h: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda l, *parameters: jnp.exp(l) * h(-l, *parameters)
