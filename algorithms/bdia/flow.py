"""Midpoint-type solvers used to invert rectified-flow models: RF-Solver, FireFlow, Uni-Inv. Accurate, cheap, not exact.

They integrate dz/dt = v(z, t) over given times, in either direction: pass the times reversed to go back. Any velocity field fits; for a noise
network `sigma_bar_velocity` gives the field of zb = z / alpha against sb = sigma / alpha.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from janax.algorithms.bdia.grid import Levels
from janax.algorithms.bdia.prediction import NoiseFn, evaluator
from janax.jaxlib_ext import checks, dtypes

__all__ = ["METHODS", "flow_solve", "sigma_bar_velocity"]

METHODS = ("euler", "midpoint", "fireflow", "uni")


def flow_solve(
    velocity_fn: Callable[..., jax.Array],
    params: Any,
    z: jax.Array,
    times: ArrayLike,
    *,
    method: str = "midpoint",
    cond: Any = None,
) -> jax.Array:
    """Integrates dz/dt = velocity_fn(params, z, t, cond) through `times`, with d = t' - t per step:

      euler     z' = z + d v(z, t)                                                                                   1 evaluation
      midpoint  z' = z + d v(z + d/2 v(z, t), t + d/2); RF-Solver's z + d v + d^2/2 (v_mid - v)/(d/2) is the same     2
      fireflow  as midpoint, but the half step uses the previous step's v_mid instead of v(z, t)                      1
      uni       z~ = z + d v_prev; v' = v(z~, t'); z' = z + d v', v' remembered (Uni-Inv: slope at the target level)  1

    `fireflow` and `uni` evaluate once more at the start, for the slope that is not there yet.

    Args:
      velocity_fn: (params, z, t, cond) -> dz/dt; for rectified flow v = eps - x. Static.
      params: Its parameters.
      z: [...] state at times[0].
      times: [N+1] monotone, falling to sample and rising to invert; turned into float64 on the host.
      method: One of `METHODS`. Static.
      cond: Passed on to the network.

    Returns:
      [...] state at times[-1], in the dtype of z.

    Raises:
      ValueError: on an unknown method, or times that are traced, not monotone or fewer than two.

    Reference: Wang et al., arXiv:2411.04746 (RF-Solver); Deng et al., arXiv:2412.07517 (FireFlow); Jiao et al., arXiv:2504.13109 (Uni-Inv).
    """
    checks.one_of("flow_solve", "method", method, METHODS)
    if not checks.is_concrete(times):
        raise ValueError("flow_solve: 'times' is traced; close over it")
    times = np.asarray(times, np.float64)
    rise = np.diff(times)
    if times.ndim != 1 or len(times) < 2 or not (np.all(rise > 0) or np.all(rise < 0)):
        raise ValueError("flow_solve: 'times' must be a strictly monotone [N+1] array with N >= 1")
    checks.require_finite("flow_solve", z=z)
    dtype, z = z.dtype, dtypes.at_least_float32(z)
    evaluate = evaluator("flow_solve", velocity_fn)

    def body(carry: Any, x: Any) -> tuple[Any, None]:
        z, slope = carry
        t, d = x
        if method == "euler":
            return (z + d * evaluate(params, z, t, cond), slope), None
        if method == "uni":
            slope = evaluate(params, z + d * slope, t + d, cond)
        else:
            start = evaluate(params, z, t, cond) if method == "midpoint" else slope
            slope = evaluate(params, z + d / 2 * start, t + d / 2, cond)
        return (z + d * slope, slope), None

    first = evaluate(params, z, jnp.asarray(times[0], z.dtype), cond) if method in ("fireflow", "uni") else jnp.zeros_like(z)
    xs = (jnp.asarray(times[:-1], z.dtype), jnp.asarray(rise, z.dtype))
    return jax.lax.scan(body, (z, first), xs)[0][0].astype(dtype)


def sigma_bar_velocity(noise_fn: NoiseFn, levels: Levels) -> Callable[..., jax.Array]:
    """The field d zb / d sb = eps of a noise network, for `flow_solve` with times = sigma_bar(grid) and z = zb = z / alpha.

    Args:
      noise_fn: (params, z, t, cond) -> eps.
      levels: sigma-bar -> (alpha, time), here applied to traced values: `edm_levels`, `flow_levels`, or one of your own in jax.numpy.

    Returns:
      velocity_fn(params, zb, sb, cond).
    """
    evaluate = evaluator("sigma_bar_velocity", noise_fn)

    def velocity_fn(params: Any, zb: jax.Array, sb: jax.Array, cond: Any = None) -> jax.Array:
        alpha, time = levels(sb)  # type: ignore[arg-type]
        return evaluate(params, jnp.asarray(alpha).astype(zb.dtype) * zb, jnp.asarray(time).astype(zb.dtype), cond)

    return velocity_fn
