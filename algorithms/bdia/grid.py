"""Grids of noise levels, and what samplers read off them.

Level i = 0 is data, i = N is noise; z_i = alpha_i x + sigma_i eps. With sb = sigma / alpha, h_i = sb_i - sb_{i-1} and zb = z / alpha the
probability-flow ODE is d zb / d sb = eps(z, t): every sampler of this package is a quadrature of that. Grids and coefficient tables are
float64 NumPy, made once on the host and cast where they are used.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from janax.jaxlib_ext import checks

__all__ = [
    "Grid",
    "Levels",
    "checked",
    "climbed",
    "edm_grid",
    "edm_levels",
    "flow_grid",
    "flow_levels",
    "move_coefficients",
    "sigma_bar",
    "vp_grid",
    "vp_levels",
]

Levels = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Maps sigma-bar to (alpha, time) between the levels of a grid, for solvers that evaluate the network there. NumPy, float64."""


class Grid(NamedTuple):
    """Noise levels of a sampler, from data to noise.

    Attributes:
      alpha: [N+1] signal scale alpha_i, float64 NumPy; index 0 is data.
      sigma: [N+1] noise scale sigma_i.
      time: [N+1] what the network is told at level i, in its own unit (a discrete step, a noise level, a time in [0, 1]).
    """

    alpha: np.ndarray
    sigma: np.ndarray
    time: np.ndarray

    @property
    def num_steps(self) -> int:
        """N, the number of steps between the N + 1 levels."""
        return len(self.alpha) - 1


def vp_grid(
    alphas_cumprod: ArrayLike,
    num_steps: int,
    spacing: str = "linspace",
    offset: int = 0,
    final: str = "one",
    *,
    time_0: float | None = None,
) -> Grid:
    """Levels of a discrete variance-preserving schedule: alpha^2 = alphabar(t), sigma^2 = 1 - alphabar(t).

    Levels 1..N sit at training steps t_i, level 0 below them:
      linspace  t_i = round((i - 1) (T - 1) / (N - 1))            the top level is T - 1
      leading   t_i = (i - 1) (T // N) + offset                   Stable Diffusion: offset 1; the official editing code: offset 0
      trailing  t_i = round(i T / N) - 1                          the top level is T - 1
    The next level is always the next listed time (some public schedulers step by T // N instead, which is right for `leading` only).

    Args:
      alphas_cumprod: [T] alphabar, decreasing. A cumulative product taken in float32 is off by 1e-6 relative: make it in float64.
      num_steps: N >= 2, at most T. Static.
      spacing: "linspace", "leading" or "trailing".
      offset: Added to the `leading` times.
      final: Level 0 is "one": alpha 1, sigma 0 (`set_alpha_to_one=True`), or "first": alphabar(0) (`set_alpha_to_one=False`).
      time_0: What the network is told at level 0, which only the start of an encoding asks for. 0 by default. Other conventions: 1 (BELM),
        -T/N (the official editing code), the time of level 1 (the "target" convention).

    Returns:
      The grid, N + 1 levels.

    Raises:
      ValueError: on an unknown option, a schedule that is not decreasing in (0, 1], or too many steps.

    Reference: Zhang et al., arXiv:2307.10829 and its repository (spacings, offsets); Song et al., arXiv:2010.02502 (DDIM).
    """
    table = np.asarray(alphas_cumprod, np.float64)
    checks.check_shapes("vp_grid", alphas_cumprod=(table, "T"))
    checks.one_of("vp_grid", "spacing", spacing, ("linspace", "leading", "trailing"))
    checks.one_of("vp_grid", "final", final, ("one", "first"))
    total = len(table)
    if not (np.all(table > 0) and np.all(table <= 1) and np.all(np.diff(table) < 0)):
        raise ValueError("vp_grid: 'alphas_cumprod' must decrease strictly within (0, 1]; pass the cumulative product of 1 - beta")
    if not 2 <= num_steps <= total:
        raise ValueError(f"vp_grid: 'num_steps' is {num_steps}, expected between 2 and the {total} steps of 'alphas_cumprod'")
    index = np.arange(1, num_steps + 1)
    if spacing == "linspace":
        steps = np.round(np.linspace(0, total - 1, num_steps))
    elif spacing == "leading":
        steps = (index - 1) * (total // num_steps) + offset
    else:
        steps = np.round(index * (total / num_steps)) - 1
    steps = steps.astype(np.int64)
    if steps[0] < 0 or steps[-1] >= total:
        raise ValueError(f"vp_grid: 'offset' {offset} moves the times to {steps[0]}..{steps[-1]}, outside 0..{total - 1}")
    alphabar = np.concatenate([[1.0 if final == "one" else table[0]], table[steps]])
    time = np.concatenate([[0.0 if time_0 is None else time_0], steps])
    return Grid(alpha=np.sqrt(alphabar), sigma=np.sqrt(1.0 - alphabar), time=time.astype(np.float64))


def edm_grid(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, *, time_0: float | None = None) -> Grid:
    """Variance-exploding levels of EDM: alpha = 1, sigma_k = (smax^(1/rho) + k/(n-1) (smin^(1/rho) - smax^(1/rho)))^rho, then 0.

    Args:
      num_steps: n >= 2; the grid has n + 1 levels, the lowest of which is sigma 0. Static.
      sigma_min: Smallest positive level.
      sigma_max: Level of pure noise; start from sigma_max times a standard normal.
      rho: Concentration of the levels near data.
      time_0: What the network is told at level 0 (see `vp_grid`); by default 0, its noise level. A data-predicting network cannot be asked
        there for the noise, which is 0/0: give `time_0=sigma_min` to encode with one.

    Returns:
      The grid; the network's time is sigma.

    Raises:
      ValueError: if the levels would not increase.

    Reference: Karras et al., arXiv:2206.00364, eq. 5 and table 1.
    """
    if num_steps < 2:
        raise ValueError(f"edm_grid: 'num_steps' is {num_steps}, expected at least 2")
    if not 0 < sigma_min < sigma_max or rho <= 0:
        raise ValueError(f"edm_grid: expected 0 < sigma_min < sigma_max and rho > 0, got {sigma_min}, {sigma_max}, {rho}")
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigma = (top + np.arange(num_steps) / (num_steps - 1) * (bottom - top)) ** rho
    sigma = np.concatenate([[0.0], sigma[::-1]])
    time = sigma.copy()
    if time_0 is not None:
        time[0] = time_0
    return Grid(alpha=np.ones_like(sigma), sigma=sigma, time=time)


def flow_grid(num_steps: int, t_max: float = 1.0 - 1e-3, t_min: float = 0.0, *, shift: float = 1.0) -> Grid:
    """Levels of flow matching and rectified flow: z = (1 - t) x + t eps, evenly spaced in t before the shift.

    Args:
      num_steps: N >= 2. Static.
      t_max: Top time. Below 1 by default, since at t = 1 alpha is 0 and noise prediction cannot tell the data; the velocity solvers of
        `flow` take t_max = 1 as well.
      t_min: Bottom time.
      shift: s > 0 maps t to s t / (1 + (s - 1) t), which moves levels towards noise for s > 1 (Stable Diffusion 3: 3).

    Returns:
      The grid; the network's time is t.

    Raises:
      ValueError: if the times would not increase within [0, 1].

    Reference: Esser et al., arXiv:2403.03206 (shift).
    """
    if num_steps < 2 or not 0 <= t_min < t_max <= 1 or shift <= 0:
        raise ValueError(
            f"flow_grid: expected num_steps >= 2, 0 <= t_min < t_max <= 1 and shift > 0, got {num_steps}, {t_min}, {t_max}, {shift}"
        )
    t = np.linspace(t_min, t_max, num_steps + 1)
    t = shift * t / (1 + (shift - 1) * t)
    return Grid(alpha=1.0 - t, sigma=t, time=t.copy())


def checked(function: str, grid: Grid, *, strict: bool = False, invertible_top: bool = True) -> Grid:
    """The grid as float64 NumPy after the checks every method needs.

    Args:
      function: The caller's name, for messages.
      grid: What the user gave.
      strict: Refuse a level that is repeated, for methods that divide by the step.
      invertible_top: Refuse alpha_N = 0, for methods that divide by it.

    Raises:
      ValueError: if the grid is traced, has uneven lengths, holds nan, or sigma/alpha does not increase.
    """
    if not isinstance(grid, tuple) or len(grid) != 3:
        raise ValueError(
            f"{function}: 'grid' is a {type(grid).__name__}, expected Grid(alpha, sigma, time); see vp_grid, edm_grid, flow_grid"
        )
    if not all(checks.is_concrete(x) for x in grid):
        raise ValueError(f"{function}: 'grid' is traced; close over it, since its tables are made in float64 on the host")
    alpha, sigma, time = (np.asarray(x, np.float64) for x in grid)
    checks.check_shapes(function, alpha=(alpha, "levels"), sigma=(sigma, "levels"), time=(time, "levels"))
    if len(alpha) < 3:
        raise ValueError(f"{function}: 'grid' has {len(alpha)} levels, expected at least 3 (two steps)")
    if not (np.all(np.isfinite(alpha)) and np.all(np.isfinite(sigma)) and np.all(np.isfinite(time))):
        raise ValueError(f"{function}: 'grid' holds nan or inf")
    if np.any(alpha < 0) or np.any(sigma < 0) or np.any(alpha[:-1] == 0):
        raise ValueError(f"{function}: 'grid' needs alpha > 0 (below the top) and sigma >= 0")
    if invertible_top and alpha[-1] == 0:
        raise ValueError(f"{function}: 'grid' has alpha = 0 at the top level, where the signal is gone; clip it (flow_grid: t_max=1-1e-3)")
    rise = np.diff(np.arctan2(sigma, alpha))  # as sigma / alpha, and finite where alpha is 0
    if np.any(rise < 0):
        level = int(np.argmax(rise < 0))
        raise ValueError(f"{function}: 'grid' is not monotone: sigma/alpha falls from level {level} to {level + 1}; order it data to noise")
    if strict and np.any(rise == 0):
        level = int(np.argmax(rise == 0))
        raise ValueError(
            f"{function}: 'grid' repeats a level ({level} and {level + 1}), and this method divides by the step; drop one of them"
        )
    return Grid(alpha, sigma, time)


def climbed(function: str, num_levels: int | None, grid: Grid, *, lowest: int) -> int:
    """M, how many levels a partial run climbs: `num_levels`, or N if it is None; raises ValueError outside lowest..N."""
    levels = grid.num_steps if num_levels is None else num_levels
    if not lowest <= levels <= grid.num_steps:
        raise ValueError(f"{function}: 'num_levels' is {num_levels}, expected between {lowest} and the {grid.num_steps} steps of 'grid'")
    return levels


def sigma_bar(grid: Grid) -> np.ndarray:
    """[N+1] sb_i = sigma_i / alpha_i, the clock of the ODE d zb / d sb = eps."""
    return grid.sigma / grid.alpha


def move_coefficients(grid: Grid, source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(m, k) of Move(z, eps; i -> j) = m z + k eps = alpha_j x0hat + sigma_j eps, for arrays of levels i and j.

    m = alpha_j / alpha_i and k = sigma_j - m sigma_i.
    """
    scale = grid.alpha[target] / grid.alpha[source]
    return scale, grid.sigma[target] - scale * grid.sigma[source]


def vp_levels(alphas_cumprod: ArrayLike) -> Levels:
    """Variance-preserving levels anywhere: alpha = 1 / sqrt(1 + sb^2) exactly, time by linear interpolation in log sb between training steps."""
    table = np.asarray(alphas_cumprod, np.float64)
    log_sb = 0.5 * (np.log1p(-table) - np.log(table))

    def levels(sb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        time = np.interp(np.log(np.maximum(sb, 1e-300)), log_sb, np.arange(len(table), dtype=np.float64))
        return 1.0 / np.sqrt(1.0 + sb**2), time

    return levels


def edm_levels(sb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variance-exploding levels anywhere: alpha 1, time sigma."""
    return np.ones_like(sb), sb


def flow_levels(sb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flow-matching levels anywhere: t = sb / (1 + sb), alpha = 1 - t."""
    return 1.0 / (1.0 + sb), sb / (1.0 + sb)
