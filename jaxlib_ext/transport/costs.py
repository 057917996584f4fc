"""Ground costs between two sets of points, as functions (x [... n d], y [... m d]) -> C [... n m] that never hold an [n, m, d] array."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import dtypes
from janax.jaxlib_ext.checks import check_shapes

__all__ = ["hellinger", "l1", "squared_euclidean"]


def l1(x: ArrayLike, y: ArrayLike) -> jax.Array:
    """C_ij = sum_v |x_iv - y_jv|; between rows of probabilities it is twice the total variation, 2 - 2 sum_v min(x_iv, y_jv).

    The coordinates are walked one after another, forward and backward, so memory is that of C. The differences themselves are added rather
    than the minima: the same work, and exactly 0 for equal rows. The derivative of |.| at 0 is taken to be 0.

    Args:
      x: [... n d] points.
      y: [... m d] points.

    Returns:
      [... n m] float32 or wider. Differentiable in both, reverse mode, once.

    Raises:
      ValueError: if the shapes do not agree.
    """
    check_shapes("l1", x=(x, "... n d"), y=(y, "... m d"))
    return _l1(*_common(x, y))


def squared_euclidean(x: ArrayLike, y: ArrayLike) -> jax.Array:
    """C_ij = |x_i|^2 + |y_j|^2 - 2 <x_i, y_j>, one matrix product; rounding may leave a tiny negative number where x_i = y_j.

    Args:
      x: [... n d] points.
      y: [... m d] points.

    Returns:
      [... n m] float32 or wider.

    Raises:
      ValueError: if the shapes do not agree.
    """
    check_shapes("squared_euclidean", x=(x, "... n d"), y=(y, "... m d"))
    x, y = _common(x, y)
    inner = jnp.einsum("...nd,...md->...nm", x, y, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(jnp.square(x), axis=-1)[..., :, None] + jnp.sum(jnp.square(y), axis=-1)[..., None, :] - 2 * inner


def hellinger(p: ArrayLike, q: ArrayLike) -> jax.Array:
    """C_ij = 1 - sum_v sqrt(p_iv q_jv), the squared Hellinger distance of rows of probabilities; one matrix product.

    Args:
      p: [... n v] probabilities. Where one is 0 its gradient is taken to be 0 (the true one is infinite).
      q: [... m v] probabilities.

    Returns:
      [... n m] float32 or wider.

    Raises:
      ValueError: if the shapes do not agree.
    """
    check_shapes("hellinger", p=(p, "... n v"), q=(q, "... m v"))
    roots = [jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, jnp.ones_like(x))), jnp.zeros_like(x)) for x in _common(p, q)]
    return 1 - jnp.einsum("...nv,...mv->...nm", *roots, precision=jax.lax.Precision.HIGHEST)


def _common(x: ArrayLike, y: ArrayLike) -> tuple[jax.Array, jax.Array]:
    x, y = dtypes.at_least_float32(x), dtypes.at_least_float32(y)
    wide = dtypes.floor_dtype(jnp.float64 if jnp.float64 in (x.dtype, y.dtype) else jnp.float32)
    return x.astype(wide), y.astype(wide)


def _columns(x: jax.Array) -> jax.Array:
    """[... n d] -> [d ... n]: coordinates first, to be scanned."""
    return jnp.moveaxis(x, -1, 0)


@jax.custom_vjp
def _l1(x: jax.Array, y: jax.Array) -> jax.Array:
    zero = jnp.zeros_like(jnp.sum(x, axis=-1)[..., :, None] + jnp.sum(y, axis=-1)[..., None, :])
    add = lambda total, xy: (total + jnp.abs(xy[0][..., :, None] - xy[1][..., None, :]), None)  # noqa: E731
    return jax.lax.scan(add, zero, (_columns(x), _columns(y)))[0]


def _l1_fwd(x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _l1(x, y), (x, y)


def _l1_bwd(points: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    def coordinate(_: None, xy: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        signed = jnp.sign(xy[0][..., :, None] - xy[1][..., None, :]) * cotangent
        return None, (jnp.sum(signed, axis=-1), -jnp.sum(signed, axis=-2))

    _, (to_x, to_y) = jax.lax.scan(coordinate, None, (_columns(points[0]), _columns(points[1])))
    return jnp.moveaxis(to_x, 0, -1), jnp.moveaxis(to_y, 0, -1)


_l1.defvjp(_l1_fwd, _l1_bwd)
