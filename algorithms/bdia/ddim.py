"""DDIM and its inversions: the base solver, not exactly invertible, and the fixed-point iteration that inverts it at K times the cost."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from janax.algorithms.bdia.grid import Grid, checked, climbed, move_coefficients
from janax.algorithms.bdia.prediction import NoiseFn, evaluator
from janax.jaxlib_ext import checks, dtypes

__all__ = ["FixedPointInfo", "ddim_invert", "ddim_sample", "fixed_point_invert", "move"]


def move(z_i: jax.Array, eps_i: jax.Array, grid: Grid, source: int, target: int) -> jax.Array:
    """Move(z_i, eps_i; i -> j) = (alpha_j/alpha_i) z_i + (sigma_j - (alpha_j/alpha_i) sigma_i) eps_i = alpha_j x0hat + sigma_j eps_i.

    Args:
      z_i: [...] state at level `source`.
      eps_i: [...] noise predicted there.
      grid: N + 1 levels.
      source: i. Static.
      target: j. Static.

    Returns:
      [...] the DDIM state at level j.

    Reference: Song et al., arXiv:2010.02502, eq. 12 without noise.
    """
    checks.check_shapes("move", z_i=(z_i, "..."), eps_i=(eps_i, "..."))
    scale, slope = move_coefficients(checked("move", grid, invertible_top=False), np.array(source), np.array(target))
    return jnp.asarray(scale, z_i.dtype) * z_i + jnp.asarray(slope, z_i.dtype) * eps_i


def _moves(grid: Grid, source: np.ndarray, target: np.ndarray, at: np.ndarray, dtype: Any) -> tuple[jax.Array, ...]:
    scale, slope = move_coefficients(grid, source, target)
    return tuple(jnp.asarray(x, dtype) for x in (grid.time[at], scale, slope))


def ddim_sample(
    noise_fn: NoiseFn, params: Any, z_N: jax.Array, grid: Grid, *, cond: Any = None, num_levels: int | None = None
) -> jax.Array:
    """Noise to data by DDIM (first order): z_{i-1} = Move(z_i, eps(z_i, t_i); i -> i-1).

    Args:
      noise_fn: (params, z, t, cond) -> eps. Static.
      params: Its parameters.
      z_N: [...] state at the top level.
      grid: N + 1 levels.
      cond: Passed on to the network.
      num_levels: Level to start from, N by default. Static.

    Returns:
      z_0 [...] in the dtype of z_N. The same as `sample` with gamma = 0.

    Reference: Song et al., arXiv:2010.02502.
    """
    grid = checked("ddim_sample", grid)
    level = np.arange(climbed("ddim_sample", num_levels, grid, lowest=1), 0, -1)
    dtype, z = z_N.dtype, dtypes.at_least_float32(z_N)
    evaluate = evaluator("ddim_sample", noise_fn)

    def body(z: jax.Array, x: Any) -> tuple[jax.Array, None]:
        t, scale, slope = x
        return scale * z + slope * evaluate(params, z, t, cond), None

    return jax.lax.scan(body, z, _moves(grid, level, level - 1, level, z.dtype))[0].astype(dtype)


def ddim_invert(
    noise_fn: NoiseFn,
    params: Any,
    z_0: jax.Array,
    grid: Grid,
    *,
    convention: str = "current",
    cond: Any = None,
    num_levels: int | None = None,
) -> jax.Array:
    """Data to noise by DDIM steps taken upwards: z_{i+1} = Move(z_i, eps(z_i, t); i -> i+1). Approximate: O(1/N).

    Args:
      noise_fn: (params, z, t, cond) -> eps. Static.
      params: Its parameters.
      z_0: [...] data.
      grid: N + 1 levels.
      convention: The t of the network: "current" t_i, the level of the state; "target" t_{i+1}, as public inverse schedulers do (one
        fixed-point iteration, and free of the question what to ask at level 0). Static.
      cond: Passed on to the network.
      num_levels: Level to climb to, N by default. Static.

    Returns:
      z_M [...] in the dtype of z_0.

    Reference: Dhariwal and Nichol, arXiv:2105.05233 (reversed DDIM); Mokady et al., arXiv:2211.09794.
    """
    grid = checked("ddim_invert", grid)
    checks.one_of("ddim_invert", "convention", convention, ("current", "target"))
    checks.require_finite("ddim_invert", z_0=z_0)
    level = np.arange(climbed("ddim_invert", num_levels, grid, lowest=1))
    dtype, z = z_0.dtype, dtypes.at_least_float32(z_0)
    evaluate = evaluator("ddim_invert", noise_fn)

    def body(z: jax.Array, x: Any) -> tuple[jax.Array, None]:
        t, scale, slope = x
        return scale * z + slope * evaluate(params, z, t, cond), None

    at = level if convention == "current" else level + 1
    return jax.lax.scan(body, z, _moves(grid, level, level + 1, at, z.dtype))[0].astype(dtype)


class FixedPointInfo(NamedTuple):
    """How well the iteration ended.

    Attributes:
      residual: [M] root mean square of the last change at every level, lowest first.
    """

    residual: jax.Array


def fixed_point_invert(
    noise_fn: NoiseFn,
    params: Any,
    z_0: jax.Array,
    grid: Grid,
    *,
    num_iters: int = 5,
    cond: Any = None,
    num_levels: int | None = None,
) -> tuple[jax.Array, FixedPointInfo]:
    """Inverts unmodified DDIM by solving z_{i-1} = a z_i + b eps(z_i, t_i) for z_i: z_i <- (z_{i-1} - b eps(z_i, t_i)) / a, K times.

    Starts from z_i = z_{i-1}; one iteration is `ddim_invert(convention="target")`. Converges to the exact inverse where |b/a d eps/dz| < 1.

    Args:
      noise_fn: (params, z, t, cond) -> eps. Static.
      params: Its parameters.
      z_0: [...] data.
      grid: N + 1 levels.
      num_iters: K network evaluations per step. Static.
      cond: Passed on to the network.
      num_levels: Level to climb to, N by default. Static.

    Returns:
      z_M [...] in the dtype of z_0, and the residuals.

    Raises:
      ValueError: if `num_iters` is below one.

    Reference: Pan et al., arXiv:2309.04907 (AIDI, without its acceleration); Garibi et al., arXiv:2403.14602 (ReNoise, without averaging).
    """
    grid = checked("fixed_point_invert", grid)
    if num_iters < 1:
        raise ValueError(f"fixed_point_invert: 'num_iters' is {num_iters}, expected at least 1")
    checks.require_finite("fixed_point_invert", z_0=z_0)
    level = np.arange(1, climbed("fixed_point_invert", num_levels, grid, lowest=1) + 1)
    dtype, z = z_0.dtype, dtypes.at_least_float32(z_0)
    evaluate = evaluator("fixed_point_invert", noise_fn)

    def body(z_im1: jax.Array, x: Any) -> tuple[jax.Array, jax.Array]:
        t, scale, slope = x

        def iterate(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
            z, _previous = carry
            return ((z_im1 - slope * evaluate(params, z, t, cond)) / scale, z), None

        (z, previous), _ = jax.lax.scan(iterate, (z_im1, z_im1), length=num_iters)
        return z, jnp.sqrt(jnp.mean(jnp.square(z - previous)))

    z, residual = jax.lax.scan(body, z, _moves(grid, level, level - 1, level, z.dtype))
    return z.astype(dtype), FixedPointInfo(residual=residual)
