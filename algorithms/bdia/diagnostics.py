"""Why "exact" is algebraic only: how far rounding errors grow, when a two-step rule is stable, and the Jacobian of the pair map."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from janax.algorithms.bdia.grid import Grid
from janax.jaxlib_ext import checks

__all__ = ["Amplification", "amplification", "characteristic_roots", "log_determinant", "minimum_gamma", "stability_limit"]


class Amplification(NamedTuple):
    """Largest factor by which a run multiplies a rounding error made on the way, relative to the size of the states.

    Attributes:
      encode: [] data to noise: the largest product of 1/A over levels i..N-1, at least 1.
      decode: [] noise to data: the largest product of A over levels i..1, at least 1.
      total: [] product of 1/A over all levels, gamma^-(N-1) for BDIA; what noise -> data -> noise costs.
    """

    encode: Any
    decode: Any
    total: Any


def amplification(coeffs: Any, grid: Grid | None = None) -> Amplification:
    """How much the recurrence amplifies rounding errors in each direction.

    One inverse step divides by A_i, so an error at level i reaches the top multiplied by the product of 1/A above it; sampling multiplies by A
    instead. For BDIA with constant gamma the total is gamma^-(N-1): at N = 50, 7.4 for 0.96, 1.8e2 for 0.9, 5.6e14 for 0.5.

    Args:
      coeffs: Table (a, b, c), each [N-1]; only a is used. May be traced.
      grid: If given, factors are relative to the scale sqrt(alpha^2 + sigma^2) of the states, which matters where that grows along the grid
        (EDM); otherwise absolute.

    Returns:
      `Amplification`, in log space inside, so that it overflows to inf at worst.
    """
    xp = np if all(checks.is_concrete(x) and not isinstance(x, jax.Array) for x in coeffs) else jnp
    with np.errstate(divide="ignore", over="ignore"):
        log_a = xp.log(xp.asarray(coeffs[0]))
        if grid is not None:
            scale = np.log(np.hypot(np.asarray(grid.alpha, np.float64), np.asarray(grid.sigma, np.float64)))
            log_a = log_a + xp.asarray(scale[2:] - scale[:-2], log_a.dtype)
        up = -xp.cumsum(log_a[::-1])  # errors made at level i, on their way to the top
        down = xp.cumsum(log_a)  # and to data
        return Amplification(
            encode=xp.exp(xp.maximum(up.max(), 0.0)), decode=xp.exp(xp.maximum(down.max(), 0.0)), total=xp.exp(-xp.sum(log_a))
        )


def minimum_gamma(num_steps: int, dtype: DTypeLike, *, tolerance: float = 1e-3) -> float:
    """The smallest constant gamma whose inversion error stays below `tolerance`: (unit / tolerance)^(1 / (N - 1)).

    float32 and tolerance 1e-3: 0.83 for N = 50, 0.37 for N = 10.
    """
    if num_steps < 2:
        raise ValueError(f"minimum_gamma: 'num_steps' is {num_steps}, expected at least 2")
    return min(1.0, (float(jnp.finfo(dtype).eps) / tolerance) ** (1.0 / (num_steps - 1)))


def characteristic_roots(a: ArrayLike, w: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Roots of r^2 - (1 - a - (1 + a) w) r - a = 0: the sampling rule on eps = lambda zb with constant step h, w = h lambda >= 0.

    Args:
      a: [...] weight of zb_{i+1} in zb variables (gamma, up to the scaling of the state), in [0, 1].
      w: [...] stiffness h lambda; for data of standard deviation s, lambda <= 1 / (2 s).

    Returns:
      (principal, spurious), each [...]; at w = 0 they are 1 and -a.
    """
    a, w = jnp.asarray(a), jnp.asarray(w)
    middle = 0.5 * (1 - a - (1 + a) * w)
    root = jnp.sqrt(jnp.square(middle) + a)
    return middle + root, middle - root


def stability_limit(a: ArrayLike) -> Any:
    """The largest w = h lambda for which both roots stay in the unit disc: 2 (1 - a) / (1 + a); 0 for the leapfrog a = 1."""
    return 2.0 * (1.0 - a) / (1.0 + a)  # type: ignore[operator]


def log_determinant(coeffs: Any, num_dims: int, *, num_levels: int | None = None) -> Any:
    """log |det| of the sampling map of the pair, (z_M, z_{M-1}) -> (z_1, z_0): D sum_{i<M} log |A_i|, for any network.

    The block companion matrix of a step has determinant +-A_i^D whatever the network's derivative is. 0 for gamma = 1 in the grid's own
    coordinates: volume preserving. This gives the exact log-density of the augmented pair, not that of z_0 alone.

    Args:
      coeffs: Table (a, b, c), each [N-1].
      num_dims: D, the number of entries of one state. Static.
      num_levels: M, N by default. Static.

    Returns:
      [] nats; minus this for the encoding map.
    """
    rows = coeffs[0][: None if num_levels is None else num_levels - 1]
    xp = jnp if isinstance(rows, jax.Array) else np
    return num_dims * xp.sum(xp.log(xp.abs(rows)))
