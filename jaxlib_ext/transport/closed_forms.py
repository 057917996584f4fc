"""Unregularised transport where sorting solves it: on the line, and for the L1 cost between distributions over two classes."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import dtypes
from janax.jaxlib_ext.checks import check_shapes

__all__ = ["l1_two_classes", "wasserstein_1d"]


def wasserstein_1d(
    x: ArrayLike, y: ArrayLike, log_a: ArrayLike | None = None, log_b: ArrayLike | None = None, *, power: float = 1.0
) -> jax.Array:
    """min over plans of sum_ij P_ij |x_i - y_j|^power on the line: sorted points are matched in order, O(n log n).

    The value is the integral over u in (0, 1) of |F^-1(u) - G^-1(u)|^power, F and G the distribution functions. Its gradient goes through the
    permutation of the sort.

    Args:
      x: [... n] points.
      y: [... m] points.
      log_a: [... n] log weights that sum to one in probability; uniform if None. Points of weight 0 do not matter.
      log_b: [... m] same for y.
      power: At least 1, for which the order is optimal. Static.

    Returns:
      [...] float32 or wider (the power is not undone). 0 if a side has no weight at all.

    Raises:
      ValueError: if shapes do not agree or `power` is below 1.

    Reference: Peyre and Cuturi, Computational Optimal Transport, arXiv:1803.00567, section 2.6.
    """
    check_shapes("wasserstein_1d", x=(x, "... n"), y=(y, "... m"), log_a=(log_a, "... n"), log_b=(log_b, "... m"))
    if not power >= 1:
        raise ValueError(f"wasserstein_1d: 'power' is {power}, expected at least 1")
    x, y = dtypes.at_least_float32(x), dtypes.at_least_float32(y)
    wide = jnp.promote_types(x.dtype, y.dtype)
    x, y = x.astype(wide), y.astype(wide)
    if log_a is None and log_b is None and x.shape[-1] == y.shape[-1]:
        if not x.shape[-1]:
            return jnp.zeros_like(jnp.sum(x, axis=-1))
        return jnp.mean(_power(jnp.sort(x, axis=-1) - jnp.sort(y, axis=-1), power), axis=-1)

    (x, until_x), (y, until_y) = _quantiles(x, log_a), _quantiles(y, log_b)
    levels = jnp.sort(jnp.concatenate([until_x, until_y], axis=-1), axis=-1)
    lengths = jnp.diff(levels, axis=-1, prepend=jnp.zeros_like(levels[..., :1]))
    at = levels - 0.5 * lengths  # inside each piece both quantile functions are constant
    below = lambda until: jnp.sum(until[..., None, :] < jax.lax.stop_gradient(at)[..., :, None], axis=-1, dtype=jnp.int32)  # noqa: E731
    pick = lambda points, until: jnp.take_along_axis(points, jnp.minimum(below(until), points.shape[-1] - 1), axis=-1)  # noqa: E731
    gaps = _power(pick(x, until_x) - pick(y, until_y), power)
    both = (until_x[..., -1] > 0) & (until_y[..., -1] > 0)
    return jnp.where(both, jnp.sum(lengths * gaps, axis=-1), jnp.zeros_like(gaps[..., 0]))


def l1_two_classes(p: ArrayLike, q: ArrayLike, log_a: ArrayLike | None = None, log_b: ArrayLike | None = None) -> jax.Array:
    """min over plans of sum_ij P_ij |p_i - q_j|_1 for rows over two classes: |p_i - q_j|_1 = 2 |p_i0 - q_j0|, transport on the line.

    Args:
      p: [... n 2] rows of probabilities.
      q: [... m 2] rows of probabilities.
      log_a: [... n] log weights of the rows of p, as in `wasserstein_1d`.
      log_b: [... m] same for q.

    Returns:
      [...] float32 or wider. For unit masses (a sum over n rows instead of a mean) multiply by n.

    Raises:
      ValueError: if shapes do not agree or there are not two classes.
    """
    check_shapes("l1_two_classes", p=(p, "... n 2"), q=(q, "... m 2"), log_a=(log_a, "... n"), log_b=(log_b, "... m"))
    p, q = dtypes.at_least_float32(p), dtypes.at_least_float32(q)
    return 2 * wasserstein_1d(p[..., 0], q[..., 0], log_a, log_b)


def _power(x: jax.Array, power: float) -> jax.Array:
    """|x|^power, with derivative 0 at 0."""
    if power == 1:
        return jnp.abs(x)
    if power == 2:
        return jnp.square(x)
    zero = x == 0
    return jnp.where(zero, jnp.zeros_like(x), jnp.abs(jnp.where(zero, jnp.ones_like(x), x)) ** power)


def _quantiles(x: jax.Array, log_weights: ArrayLike | None) -> tuple[jax.Array, jax.Array]:
    """Sorted points and the distribution function at each; points without weight go last, at no length."""
    if log_weights is None:
        log_weights = jnp.zeros_like(x) - jnp.log(jnp.asarray(x.shape[-1], x.dtype))
    log_weights = jnp.asarray(log_weights).astype(x.dtype)
    on = ~jnp.isneginf(log_weights)
    weights = jnp.where(on, jnp.exp(jnp.where(on, log_weights, jnp.zeros_like(log_weights))), jnp.zeros_like(log_weights))
    order = jnp.argsort(jnp.where(on, x, jnp.full_like(x, jnp.inf)), axis=-1)
    points = jnp.take_along_axis(jnp.where(on, x, jnp.zeros_like(x)), order, axis=-1)
    return points, jnp.cumsum(jnp.take_along_axis(weights, order, axis=-1), axis=-1)
