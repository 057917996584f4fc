"""Resampling schemes of sequential Monte Carlo, plain and conditional, and the arrangement that moves the fewest particles.

Each scheme gives particle j on average n W_j descendants, which is all that the unbiasedness of Z needs. Conditional on a planted particle (slot
0) surviving, the other ancestors follow the law that they have given that a slot picked at random descends from it: for multinomial resampling
they are as usual, for the others uniforms are drawn in proportion to the number of descendants that they give it. Reference: Douc et al.,
arXiv:cs/0507025 (schemes); Andrieu et al., 2010, and Chopin and Singh, arXiv:1304.1887 (conditional forms).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from janax.jaxlib_ext import dtypes, logprobs, sharding
from janax.jaxlib_ext.checks import check_shapes, one_of

__all__ = ["SCHEMES", "arrange", "resample"]

SCHEMES = ("multinomial", "residual", "stratified", "systematic")


def resample(key: jax.Array, log_weights: ArrayLike, *, scheme: str = "systematic", planted: bool = False) -> jax.Array:
    """Ancestors of n new particles.

    Args:
      key: [] typed key.
      log_weights: [n] unnormalised; -inf has no descendants. If all are -inf, all are taken to be equal.
      scheme: One of `SCHEMES`. Static.
      planted: Slot 0 keeps at least one descendant; see the head of the file. Static.

    Returns:
      [n] int32 indices into the particles, each of positive weight.

    Raises:
      ValueError: on an unknown scheme.
    """
    check_shapes("rl_bayes.resample", log_weights=(log_weights, "n"))
    one_of("rl_bayes.resample", "scheme", scheme, SCHEMES)
    return sharding.placed(functools.partial(_resample, scheme, planted), lambda _: jax.P(), key, log_weights)


def _resample(scheme: str, planted: bool, key: jax.Array, log_weights: ArrayLike) -> jax.Array:
    log_w = dtypes.at_least_float32(log_weights)
    n = log_w.shape[0]
    total = logprobs.log_normalizer(log_w)
    log_w = jnp.where(jnp.isneginf(total), jnp.zeros_like(log_w), log_w)
    weights = jnp.exp(log_w - logprobs.log_normalizer(log_w))
    expected = n * weights[0]  # descendants of the planted particle
    floor = jnp.minimum(jnp.floor(expected), n)
    rest = expected - floor
    key_draw, key_coin = jax.random.split(key)
    order = jnp.arange(n, dtype=weights.dtype)

    if scheme in ("systematic", "stratified"):
        u = jax.random.uniform(key_draw, () if scheme == "systematic" else (n,), weights.dtype)
        if planted:
            coin = jax.random.uniform(key_coin, (), weights.dtype)
            one_more = coin * expected < rest * (floor + 1)
            biased = lambda u: jnp.where(one_more, rest * u, rest + (1 - rest) * u)  # noqa: E731
            u = biased(u) if scheme == "systematic" else jnp.where(order == floor, biased(u), u)
        ancestors = _invert(weights, (order + u) / n)
    elif scheme == "multinomial":
        ancestors = _invert(weights, jax.random.uniform(key_draw, (n,), weights.dtype))
        if planted:
            ancestors = jnp.where(jnp.arange(n, dtype=jnp.int32) == 0, 0, ancestors)
    else:
        copies = jnp.floor(
            n * weights * (1 + 4 * float(jnp.finfo(weights.dtype).eps))
        )  # n W that is whole but for rounding counts as whole
        left = jnp.maximum(n * weights - copies, 0)
        certain = jnp.cumsum(copies)
        # The first slots take the certain copies, the others are drawn from what is left of the weights.
        whole = jnp.searchsorted(certain, order, side="right").astype(jnp.int32)
        drawn = _invert(left, jax.random.uniform(key_draw, (n,), weights.dtype))
        if planted:
            coin = jax.random.uniform(key_coin, (), weights.dtype)
            among_drawn = coin * expected >= copies[0]
            drawn = jnp.where((order == certain[-1]) & among_drawn, 0, drawn)
        ancestors = jnp.where(order < certain[-1], jnp.minimum(whole, n - 1), drawn)
    if planted:  # but for rounding it is there
        ancestors = jnp.where(jnp.any(ancestors == 0), ancestors, jnp.where(jnp.arange(n, dtype=jnp.int32) == 0, 0, ancestors))
    return ancestors.astype(jnp.int32)


def arrange(ancestors: ArrayLike) -> jax.Array:
    """The same ancestors in another order: whoever has descendants stays in its slot, and only the slots of those without are overwritten.

    Args:
      ancestors: [n] int32.

    Returns:
      [n] int32, a permutation of `ancestors` with the most fixed points.
    """
    check_shapes("rl_bayes.arrange", ancestors=(ancestors, "n"))
    return sharding.placed(_arrange, lambda _: jax.P(), jnp.asarray(ancestors).astype(jnp.int32))


def _arrange(ancestors: jax.Array) -> jax.Array:
    n = ancestors.shape[0]
    slots = jnp.arange(n, dtype=jnp.int32)
    counts = jnp.zeros(n, jnp.int32).at[ancestors].add(1)
    vacant = counts == 0
    rank = jnp.cumsum(vacant, dtype=jnp.int32) - 1
    surplus = jnp.cumsum(jnp.maximum(counts - 1, 0), dtype=jnp.int32)
    return jnp.where(vacant, jnp.searchsorted(surplus, rank, side="right").astype(jnp.int32), slots)


def _invert(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
    """The index at which the cumulative weights pass each uniform; never one without weight."""
    cumulative = jnp.cumsum(weights)
    total = cumulative[-1]
    cumulative = cumulative / jnp.where(total > 0, total, jnp.ones_like(total))
    below_one = float(np.nextafter(np.asarray(1, weights.dtype), np.asarray(0, weights.dtype)))
    index = jnp.searchsorted(cumulative, jnp.minimum(uniforms, below_one), side="right")
    return jnp.minimum(index, weights.shape[0] - 1).astype(jnp.int32)
