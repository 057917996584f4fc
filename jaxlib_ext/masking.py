"""Reductions that count only what the mask keeps, and stay finite when it keeps nothing."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import dtypes

__all__ = ["masked_mean", "masked_sum", "masked_variance"]


def masked_sum(x: ArrayLike, mask: ArrayLike, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Sum of `x` over the entries with a non-zero mask.

    Args:
      x: [...] values; those under a zero mask may be inf or nan and do not matter, nor do their gradients.
      mask: [...] broadcastable to `x`; used as a weight, so fractions are allowed.
      axis: Axes to reduce, all by default. Static.

    Returns:
      The reduced array, float32 or wider.
    """
    x, mask = dtypes.at_least_float32(x), jnp.asarray(mask)
    mask = jnp.broadcast_to(mask.astype(x.dtype), x.shape)
    return jnp.sum(jnp.where(mask != 0, x, jnp.zeros_like(x)) * mask, axis=axis)


def masked_mean(x: ArrayLike, mask: ArrayLike, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Mean of `x` weighted by `mask`; 0 where the mask sums to zero.

    Args:
      x: [...] values.
      mask: [...] broadcastable to `x`, non-negative weights.
      axis: Axes to reduce, all by default. Static.

    Returns:
      sum(x mask) / sum(mask), float32 or wider.
    """
    x = dtypes.at_least_float32(x)
    weight = jnp.sum(jnp.broadcast_to(jnp.asarray(mask).astype(x.dtype), x.shape), axis=axis)
    return masked_sum(x, mask, axis) / jnp.where(weight == 0, jnp.ones_like(weight), weight)


def masked_variance(x: ArrayLike, mask: ArrayLike, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Population variance of `x` weighted by `mask`; 0 where the mask sums to zero. Arguments as in `masked_mean`."""
    x, mask = dtypes.at_least_float32(x), jnp.asarray(mask)
    mean = masked_mean(x, mask, axis)
    mean = jnp.broadcast_to(mean if axis is None else jnp.expand_dims(mean, axis), x.shape)
    kept = jnp.broadcast_to(mask.astype(x.dtype), x.shape) != 0
    return masked_mean(jnp.square(jnp.where(kept, x - mean, jnp.zeros_like(x))), mask, axis)
