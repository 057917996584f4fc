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
    memory: int = 0,
    average_last: int = 1,
    cond: Any = None,
    num_levels: int | None = None,
) -> tuple[jax.Array, FixedPointInfo]:
    """Inverts unmodified DDIM by solving z_{i-1} = a z_i + b eps(z_i, t_i) for z_i: z_i <- g(z_i) = (z_{i-1} - b eps(z_i, t_i)) / a, K times.

    Starts from z_i = z_{i-1}; one iteration is `ddim_invert(convention="target")`. Converges to the exact inverse where |b/a d eps/dz| < 1.

    Two ways to help it, both off by default:
      memory = m > 0     Anderson acceleration (AIDI): the next iterate is sum_l w_l g(z^(l)) over the last m + 1 iterates, whose weights, adding
                         to one, minimise |sum_l w_l (g(z^(l)) - z^(l))|
      average_last = n   ReNoise: the mean of the last n iterates, which damps an iteration that circles instead of settling

    Args:
      noise_fn: (params, z, t, cond) -> eps. Static.
      params: Its parameters.
      z_0: [...] data. Weights of `memory` are shared by everything in the array: map over examples with `jax.vmap` to give each its own.
      grid: N + 1 levels.
      num_iters: K network evaluations per step. Static.
      memory: m, below `num_iters`; 1 to 5 is usual. Static.
      average_last: n, at most `num_iters`. Static.
      cond: Passed on to the network.
      num_levels: Level to climb to, N by default. Static.

    Returns:
      z_M [...] in the dtype of z_0, and the residuals.

    Raises:
      ValueError: if `num_iters`, `memory` or `average_last` is out of range.

    Reference: Pan et al., arXiv:2309.04907 (AIDI); Garibi et al., arXiv:2403.14602 (ReNoise); Walker and Ni, doi:10.1137/10078356X (Anderson).
    """
    grid = checked("fixed_point_invert", grid)
    if num_iters < 1:
        raise ValueError(f"fixed_point_invert: 'num_iters' is {num_iters}, expected at least 1")
    if not 0 <= memory < num_iters:
        raise ValueError(f"fixed_point_invert: 'memory' is {memory}, expected from 0 to below num_iters = {num_iters}")
    if not 1 <= average_last <= num_iters:
        raise ValueError(f"fixed_point_invert: 'average_last' is {average_last}, expected from 1 to num_iters = {num_iters}")
    checks.require_finite("fixed_point_invert", z_0=z_0)
    level = np.arange(1, climbed("fixed_point_invert", num_levels, grid, lowest=1) + 1)
    dtype, z = z_0.dtype, dtypes.at_least_float32(z_0)
    evaluate = evaluator("fixed_point_invert", noise_fn)

    def body(z_im1: jax.Array, x: Any) -> tuple[jax.Array, jax.Array]:
        t, scale, slope = x

        def iterate(carry: Any, k: jax.Array) -> tuple[Any, None]:
            z, _, history, total = carry
            image = (z_im1 - slope * evaluate(params, z, t, cond)) / scale
            new, history = _anderson(z, image, history, k) if memory else (image, history)
            return (new, z, history, total + jnp.where(k >= num_iters - average_last, new, 0)), None

        history = tuple(jnp.zeros((memory + 1, *z_im1.shape), z_im1.dtype) for _ in range(2)) if memory else ()
        carry = (z_im1, z_im1, history, jnp.zeros_like(z_im1))
        (z, previous, _, total), _ = jax.lax.scan(iterate, carry, jnp.arange(num_iters))
        return (z if average_last == 1 else total / average_last), jnp.sqrt(jnp.mean(jnp.square(z - previous)))

    z, residual = jax.lax.scan(body, z, _moves(grid, level, level - 1, level, z.dtype))
    return z.astype(dtype), FixedPointInfo(residual=residual)


def _anderson(z: jax.Array, image: jax.Array, history: Any, k: jax.Array) -> tuple[jax.Array, Any]:
    """The next iterate from the last images and their residuals, `history` = (images, residuals), each [m+1 ...], written round robin."""
    images, residuals = history
    slot = k % images.shape[0]
    images, residuals = images.at[slot].set(image), residuals.at[slot].set(image - z)
    filled = jnp.arange(images.shape[0]) <= k
    flat = residuals.reshape(images.shape[0], -1)
    gram = jnp.matmul(flat, flat.T, precision=jax.lax.Precision.HIGHEST)
    # Weights w = G^-1 1 / (1^T G^-1 1); empty slots are cut off by a unit diagonal and a zero right-hand side. Near convergence the residuals
    # are parallel to rounding: a ridge at the rounding unit of G keeps the weights bounded, as truncating the least-squares problem would.
    both = filled[:, None] & filled[None, :]
    ridge = 10 * jnp.finfo(z.dtype).eps * jnp.trace(gram) + jnp.finfo(z.dtype).tiny
    system = jnp.where(both, gram, 0) + jnp.diag(jnp.where(filled, ridge, 1))
    weights = jnp.linalg.solve(system / jnp.max(jnp.abs(system)), filled.astype(z.dtype))
    weights = weights / jnp.sum(weights)
    return jnp.tensordot(weights, images, axes=1, precision=jax.lax.Precision.HIGHEST), (images, residuals)
