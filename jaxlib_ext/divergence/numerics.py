"""Elementwise functions in log space that neither overflow nor cancel, for the divergences."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from janax.jaxlib_ext import dtypes

__all__ = [
    "FORBIDDEN",
    "cut",
    "cut_at",
    "exp",
    "expm1_below",
    "log1p_ratio",
    "log_mixture",
    "log_mixture_of",
    "log_sum",
    "log_weight",
    "ordered",
    "power_minus_one",
    "widest",
    "without_infinities",
]

FORBIDDEN = -1e4
"""The log-probability of a token that only one of the two distributions forbids."""


def widest(*arrays: ArrayLike) -> list[jax.Array]:
    """All in the widest of their floored dtypes."""
    floored = [dtypes.at_least_float32(x) for x in arrays]
    dtype = jnp.float64 if any(x.dtype == jnp.float64 for x in floored) else jnp.float32
    return [x.astype(dtype) for x in floored]


def without_infinities(log_p: jax.Array) -> jax.Array:
    """-inf replaced by a stand-in without gradient."""
    return jnp.where(jnp.isneginf(log_p), jnp.full_like(log_p, FORBIDDEN), log_p)


def ordered(log_p: jax.Array, log_q: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(whether p <= q, log of the larger, log of the smaller over the larger)."""
    l = log_p - log_q
    below = l <= 0
    return below, jnp.where(below, log_q, log_p), jnp.where(below, l, -l)


def _exp_limit(dtype: Any) -> float:
    return math.log(float(np.finfo(dtype).max)) - 28.0  # room for a factor 1e4 and a sum over any vocabulary


def exp(x: jax.Array) -> jax.Array:
    """exp(x), continued by its tangent where it would come near overflow."""
    limit = _exp_limit(x.dtype)
    inside = x <= limit
    return jnp.exp(jnp.where(inside, x, limit)) * jnp.where(inside, jnp.ones_like(x), 1.0 + (x - limit))


def expm1_below(d: jax.Array) -> jax.Array:
    """exp(d) - 1 for d <= 0, whose derivative by autodiff keeps its digits where it is small (that of `expm1` is made of its value)."""
    near = d > -1
    return jnp.where(near, jnp.expm1(jnp.where(near, d, jnp.zeros_like(d))), jnp.exp(jnp.where(near, -jnp.ones_like(d), d)) - 1)


def cut_at(dtype: Any) -> float:
    """Largest |l| for which exp(2 l) is far from overflow: 39 in float32, 319 in float64."""
    return 0.45 * math.log(float(np.finfo(dtype).max))


def cut(l: jax.Array) -> jax.Array:
    """Log-ratios limited to +-`cut_at`."""
    limit = cut_at(l.dtype)
    return jnp.where(l > limit, limit, jnp.where(l < -limit, -limit, l))


def log_weight(weight: jax.Array) -> jax.Array:
    """log of a mixture weight, finite at 0."""
    positive = weight > 0
    return jnp.where(positive, jnp.log(jnp.where(positive, weight, jnp.ones_like(weight))), FORBIDDEN)


def log_mixture(rest: jax.Array, log_first: jax.Array, log_rest: jax.Array, d: jax.Array) -> jax.Array:
    """log(first + rest exp(d)) for weights first + rest = 1 and d <= 0, without cancellation near d = 0."""
    near = d > -1
    close = jnp.log1p(rest * jnp.expm1(jnp.where(near, d, jnp.zeros_like(d))))
    return jnp.where(near, close, jnp.logaddexp(log_first, log_rest + jnp.where(near, -jnp.ones_like(d), d)))


def log_mixture_of(first: jax.Array, rest: jax.Array, e: jax.Array, power: jax.Array) -> jax.Array:
    """`log_mixture` without derivatives, from e = exp(d) - 1 and power = exp(d): one logarithm.

    Its digits near d = 0 come from e, its digits where a weight is tiny from a sum of positive numbers.
    """
    u = jnp.maximum(first + rest * power, float(np.finfo(power.dtype).tiny))
    return jnp.log(u) - jnp.where(u > 0.5, ((u - 1) - rest * e) / u, jnp.zeros_like(u))


def log_sum(x: jax.Array, where: jax.Array) -> jax.Array:
    """log sum exp(x) over the last axis, where told; as forbidden, with zero gradients, if nowhere."""
    top = jax.lax.stop_gradient(jnp.max(jnp.where(where, x, -jnp.inf), axis=-1, keepdims=True))
    some = ~jnp.isneginf(top)
    top = jnp.where(some, top, jnp.zeros_like(top))
    terms = jnp.where(where, jnp.exp(jnp.where(where, x - top, jnp.zeros_like(x))), jnp.zeros_like(x))
    total = jnp.sum(terms, axis=-1, keepdims=True)
    result = jnp.where(some, top + jnp.log(jnp.where(some, total, jnp.ones_like(total))), FORBIDDEN)
    return jnp.squeeze(result, -1)


def log1p_ratio(x: jax.Array) -> jax.Array:
    """log(1 + x) / x, smooth through 0."""
    tiny = jnp.abs(x) < 1e-3
    far = jnp.where(tiny, jnp.ones_like(x), x)
    series = 1 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x * (1 / 5 - x / 6))))
    return jnp.where(tiny, series, jnp.log1p(far) / far)


_EXPM1_SERIES = tuple(1.0 / math.factorial(k) for k in range(13, 0, -1))


def _expm1_ratio(x: jax.Array) -> jax.Array:
    """(exp(x) - 1) / x for |x| <= 0.3, smooth through 0."""
    total = jnp.full_like(x, _EXPM1_SERIES[0])
    for coefficient in _EXPM1_SERIES[1:]:
        total = total * x + coefficient
    return total


def power_minus_one(log_scale: jax.Array, l: jax.Array, exponent: jax.Array | float) -> jax.Array:
    """scale (u^b - 1) / b, and its limit scale log u at b = 0."""
    product = exponent * l
    small = jnp.abs(product) < 0.3
    series = exp(log_scale) * l * _expm1_ratio(jnp.where(small, product, jnp.zeros_like(product)))
    divisor = jnp.where(small, jnp.ones_like(product), exponent)
    direct = (exp(log_scale + jnp.where(small, jnp.ones_like(product), product)) - exp(log_scale)) / divisor
    return jnp.where(small, series, direct)
