"""Steps chosen by the error: an adaptive solve that hands over its levels as a `Grid`.

An exact inverse has to take the very same steps back, so here a step size is not something a sampler decides while it runs. One adaptive solve
of d zb / d sb = eps picks the levels, for this network and these starting points; then any sampler of the package runs on them, both ways.

    grid, info = bdia.adaptive_grid(noise_fn, params, z_N, bdia.vp_levels(alphas_cumprod), sb_max=14.6)
    table = bdia.coefficients(grid, gamma=0.96)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from janax.algorithms.bdia.grid import Grid, Levels
from janax.algorithms.bdia.prediction import NoiseFn, evaluator
from janax.jaxlib_ext import checks, dtypes

__all__ = ["AdaptiveInfo", "adaptive_grid"]

_NODES = (0.5, 0.75, 1.0)
_ERROR = (2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8)  # third order minus the embedded second order


class AdaptiveInfo(NamedTuple):
    """What the solve cost and where it ended.

    Attributes:
      num_rejected: Steps tried again with a smaller size.
      num_evaluations: Network evaluations, three per step tried and one at the start.
      z_0: [...] the solution at the lowest level, third order.
    """

    num_rejected: int
    num_evaluations: int
    z_0: jax.Array


def adaptive_grid(
    noise_fn: NoiseFn,
    params: Any,
    z_N: jax.Array,
    levels: Levels,
    *,
    sb_max: float,
    sb_min: float = 0.0,
    rtol: float = 1e-2,
    atol: float = 1e-2,
    max_steps: int = 1000,
    cond: Any = None,
) -> tuple[Grid, AdaptiveInfo]:
    """Levels at which a third-order solve of the probability flow keeps its local error below atol + rtol rms(zb).

    Bogacki-Shampine 3(2) pair; the next step is .9 h (tolerance / error)^(1/3), within h/5 and 5 h. The error is a root mean square over the
    whole array, so one grid serves the batch. Runs on the host (its result is a table, like every grid): it cannot be traced. Pass a jitted
    `noise_fn`.

    Args:
      noise_fn: (params, z, t, cond) -> eps.
      params: Its parameters.
      z_N: [...] concrete states at the top level.
      levels: sigma-bar -> (alpha, time): `vp_levels(alphas_cumprod)`, `edm_levels`, `flow_levels`.
      sb_max: sigma / alpha of the top level.
      sb_min: That of the lowest; 0 is data.
      rtol: Relative tolerance.
      atol: Absolute tolerance, in units of z / alpha.
      max_steps: Bound on the number of accepted steps.
      cond: Passed on to the network.

    Returns:
      The grid, data first, and `AdaptiveInfo`.

    Raises:
      ValueError: on tolerances that are not positive, a traced or non-finite z_N, sb_min >= sb_max, or a solve that needs more steps.

    Reference: Bogacki and Shampine, doi:10.1016/0893-9659(89)90079-7; adaptive reversible sampling in Blasingame and Liu, arXiv:2502.08834.
    """
    if not checks.is_concrete(z_N):
        raise ValueError("adaptive_grid: 'z_N' is traced; the grid is a host table, so call this outside jit and close over its result")
    if not (rtol > 0 and atol > 0 and 0 <= sb_min < sb_max):
        raise ValueError(f"adaptive_grid: expected rtol, atol > 0 and 0 <= sb_min < sb_max, got {rtol}, {atol}, {sb_min}, {sb_max}")
    checks.require_finite("adaptive_grid", z_N=z_N)
    evaluate = evaluator("adaptive_grid", noise_fn)

    def slope(zb: jax.Array, sb: float) -> jax.Array:
        alpha, time = (float(x) for x in levels(np.asarray(sb, np.float64)))
        return evaluate(params, jnp.asarray(alpha, zb.dtype) * zb, jnp.asarray(time, zb.dtype), cond)

    rms = lambda x: float(jnp.sqrt(jnp.mean(jnp.square(x))))  # noqa: E731
    sb, h = sb_max, 0.1 * (sb_max - sb_min)
    zb = dtypes.at_least_float32(z_N) / float(levels(np.asarray(sb_max, np.float64))[0])
    first, visited, rejected, evaluations = slope(zb, sb), [sb_max], 0, 1
    while sb > sb_min:
        if len(visited) > max_steps:
            raise ValueError(f"adaptive_grid: {max_steps} steps reach sigma/alpha {sb:.3g} only; raise rtol, atol or 'max_steps'")
        h = min(h, sb - sb_min)
        k2 = slope(zb - _NODES[0] * h * first, sb - _NODES[0] * h)
        k3 = slope(zb - _NODES[1] * h * k2, sb - _NODES[1] * h)
        new = zb - h * (2 / 9 * first + 1 / 3 * k2 + 4 / 9 * k3)
        below = sb - h if h < sb - sb_min else sb_min
        last = slope(new, below)
        evaluations += 3
        error = h * rms(sum(weight * k for weight, k in zip(_ERROR, (first, k2, k3, last)))) / (atol + rtol * max(rms(zb), rms(new)))
        if not np.isfinite(error):
            raise ValueError(f"adaptive_grid: the network's output is not finite near sigma/alpha = {below:.3g}")
        if error <= 1:
            zb, sb, first = new, below, last
            visited.append(sb)
        else:
            rejected += 1
        h *= float(np.clip(0.9 * max(error, 1e-9) ** (-1 / 3), 0.2, 5.0))
    if len(visited) < 3:  # a grid has two steps at least
        visited.insert(1, 0.5 * (visited[0] + visited[-1]))
    bars = np.asarray(visited[::-1], np.float64)
    alpha, time = levels(bars)
    z_0 = jnp.asarray(alpha[0], zb.dtype) * zb
    return Grid(alpha, bars * alpha, time), AdaptiveInfo(num_rejected=rejected, num_evaluations=evaluations, z_0=z_0.astype(z_N.dtype))
