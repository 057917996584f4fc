"""Second-order samplers and BDIA on top of them: Heun (EDM), BDIA-EDM in three variants, DPM-Solver++ 2M and BDIA on it.

All work in zb = z / alpha and sb = sigma / alpha, which on EDM grids is the state itself; d zb / d sb = eps.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from janax.algorithms.bdia.grid import Grid, checked, climbed, sigma_bar
from janax.algorithms.bdia.prediction import NoiseFn, evaluator
from janax.algorithms.bdia.two_step import COORDS, BdiaState, coefficients
from janax.jaxlib_ext import checks, dtypes

__all__ = [
    "VARIANTS",
    "bdia_dpm_solver_2m_sample",
    "bdia_heun_decode",
    "bdia_heun_encode",
    "bdia_heun_sample",
    "dpm_solver_2m_sample",
    "heun_sample",
]

VARIANTS = ("euler", "heun", "reuse")


class _Ode:
    """eps as a function of zb at a level, and the increments of zb between neighbouring levels; tables cast to the state's dtype."""

    def __init__(self, function: str, noise_fn: NoiseFn, params: Any, grid: Grid, cond: Any, dtype: Any):
        evaluate = evaluator(function, noise_fn)
        self.alpha, self.sb, self.time = (jnp.asarray(x, dtype) for x in (grid.alpha, sigma_bar(grid), grid.time))
        self.slope = lambda zb, i: evaluate(params, self.alpha[i] * zb, self.time[i], cond)

    def heun(self, zb: jax.Array, slope_i: jax.Array, i: ArrayLike, j: ArrayLike) -> jax.Array:
        d = self.sb[j] - self.sb[i]
        return d * (slope_i + self.slope(zb + d * slope_i, j)) / 2


def heun_sample(noise_fn: NoiseFn, params: Any, z_N: jax.Array, grid: Grid, *, cond: Any = None) -> jax.Array:
    """EDM's deterministic sampler: Heun steps in sb; the last one is Euler where sigma_0 = 0. 2 N - 1 network evaluations then, else 2 N.

    Args:
      noise_fn: (params, z, t, cond) -> eps = (z - D(z; sigma)) / sigma. Static.
      params: Its parameters.
      z_N: [...] state at the top level.
      grid: N + 1 levels.
      cond: Passed on to the network.

    Returns:
      z_0 [...] in the dtype of z_N.

    Reference: Karras et al., arXiv:2206.00364, algorithm 2 without churn.
    """
    grid = checked("heun_sample", grid)
    dtype, z = z_N.dtype, dtypes.at_least_float32(z_N)
    ode = _Ode("heun_sample", noise_fn, params, grid, cond, z.dtype)
    euler_end = grid.sigma[0] == 0

    def body(zb: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        return zb + ode.heun(zb, ode.slope(zb, i), i, i - 1), None

    zb, _ = jax.lax.scan(body, z / ode.alpha[-1], jnp.arange(grid.num_steps, int(euler_end), -1))
    if euler_end:
        zb = zb + (ode.sb[0] - ode.sb[1]) * ode.slope(zb, 1)
    return (ode.alpha[0] * zb).astype(dtype)


def _mixing(function: str, grid: Grid, gamma: ArrayLike, coords: str, dtype: Any) -> jax.Array:
    """[N-1] weight of zb_{i+1}: gamma sc_{i+1} / sc_{i-1}, with z = sc zb in the coordinates where gamma is applied."""
    checks.one_of(function, "coords", coords, COORDS)
    if checks.is_concrete(gamma) and not np.all((np.asarray(gamma) >= 0) & (np.asarray(gamma) <= 1)):
        raise ValueError(f"{function}: 'gamma' is {gamma}, expected within [0, 1]")
    scale = {"vp": grid.alpha / np.hypot(grid.alpha, grid.sigma), "ve": np.ones_like(grid.alpha), "native": grid.alpha}[coords]
    return jnp.asarray(gamma).astype(dtype) * jnp.asarray(scale[2:] / scale[:-2], dtype)


def _increments(ode: _Ode, zb: jax.Array, i: Any, variant: str, remembered: Any, last: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(forward, backward, slope) at level i: the Heun increment down to i - 1 and the variant's increment up to i + 1."""
    slope = ode.slope(zb, i)
    forward = (ode.sb[i - 1] - ode.sb[i]) * slope if last else ode.heun(zb, slope, i, i - 1)
    rise = ode.sb[i + 1] - ode.sb[i]
    if variant == "euler":
        backward = rise * slope
    elif variant == "heun":
        backward = ode.heun(zb, slope, i, i + 1)
    else:
        backward = rise * (slope + remembered) / 2
    return forward, backward, slope


def bdia_heun_sample(
    noise_fn: NoiseFn,
    params: Any,
    z_N: jax.Array,
    grid: Grid,
    *,
    gamma: ArrayLike = 1.0,
    variant: str = "reuse",
    coords: str = "ve",
    cond: Any = None,
) -> BdiaState:
    """BDIA-EDM: zb_{i-1} = zb_{i+1} - (1-a)(zb_{i+1} - zb_i) - a Back_i + Fwd_i, with Heun increments; the first step is plain Heun.

    The paper's exact definition of the backward increment could not be found; three readings (d_i is the slope at level i):
      euler  Back = (sb_{i+1} - sb_i) d_i                   no extra evaluation, explicitly invertible, first order
      heun   Back = Heun increment from z_i up to level i+1  one extra evaluation, explicitly invertible, second order
      reuse  Back = (sb_{i+1} - sb_i)(d_i + d_{i+1}) / 2     d_{i+1} remembered: no extra evaluation, second order, NOT explicitly invertible
    "reuse" with gamma 0.5 to 0.8 beats Heun at equal cost; take "heun" where exact inversion is wanted.

    Args:
      noise_fn: (params, z, t, cond) -> eps. Static.
      params: Its parameters.
      z_N: [...] state at the top level.
      grid: N + 1 levels.
      gamma: Scalar or [N-1], in [0, 1]. Traced.
      variant: "euler", "heun" or "reuse". Static.
      coords: Scaling in which gamma is applied, see `coefficients`; "ve" is EDM's own and makes a_i = gamma. Static.
      cond: Passed on to the network.

    Returns:
      The pair (z_0, z_1) in the dtype of z_N.

    Raises:
      ValueError: on an unknown option or a gamma outside [0, 1].

    Reference: Zhang et al., arXiv:2307.10829 (BDIA-EDM).
    """
    grid = checked("bdia_heun_sample", grid)
    checks.one_of("bdia_heun_sample", "variant", variant, VARIANTS)
    dtype, z = z_N.dtype, dtypes.at_least_float32(z_N)
    ode = _Ode("bdia_heun_sample", noise_fn, params, grid, cond, z.dtype)
    top, zb_N = grid.num_steps, z / ode.alpha[-1]
    slope = ode.slope(zb_N, top)
    zb = zb_N + ode.heun(zb_N, slope, top, top - 1)
    state = BdiaState(z_i=ode.alpha[top - 1] * zb, z_ip1=z)
    state = _heun_down("bdia_heun_sample", ode, state, slope, grid, gamma, variant, coords, top)
    return BdiaState(*(z.astype(dtype) for z in state))


def bdia_heun_encode(
    noise_fn: NoiseFn,
    params: Any,
    z_0: jax.Array | BdiaState,
    grid: Grid,
    *,
    gamma: ArrayLike = 1.0,
    variant: str = "heun",
    coords: str = "ve",
    cond: Any = None,
    num_levels: int | None = None,
) -> BdiaState:
    """Data to noise, the exact inverse of `bdia_heun_decode`: zb_{i+1} = (zb_{i-1} - (1-a) zb_i + a Back_i - Fwd_i) / a.

    z_1 is one upward increment of the variant from z_0, or given.

    Args:
      noise_fn: As in `bdia_heun_sample`. Static.
      params: Its parameters.
      z_0: [...] data, or the pair (z_0, z_1).
      grid: N + 1 levels.
      gamma: Scalar or [N-1], in (0, 1]. Traced.
      variant: "euler" or "heun". Static.
      coords: As in `bdia_heun_sample`. Static.
      cond: Passed on to the network.
      num_levels: M in 2..N, N by default. Static.

    Returns:
      The pair (z_{M-1}, z_M), float32 or wider.

    Raises:
      ValueError: for variant "reuse", which is not explicitly invertible; for gamma = 0; nan in a concrete z_0.
    """
    grid = checked("bdia_heun_encode", grid)
    if variant == "reuse":
        raise ValueError("bdia_heun_encode: variant='reuse' needs the slope at the state it looks for; use 'heun' or 'euler' to invert")
    checks.one_of("bdia_heun_encode", "variant", variant, VARIANTS[:2])
    if checks.is_concrete(gamma) and not np.all(np.asarray(gamma) > 0):
        raise ValueError(f"bdia_heun_encode: 'gamma' is {gamma}, expected within (0, 1] for inversion")
    levels = climbed("bdia_heun_encode", num_levels, grid, lowest=2)
    if isinstance(z_0, tuple):
        state = BdiaState(*(dtypes.at_least_float32(z) for z in z_0))
        checks.require_finite("bdia_heun_encode", z_0=state.z_i, z_1=state.z_ip1)
        ode = _Ode("bdia_heun_encode", noise_fn, params, grid, cond, state.z_i.dtype)
    else:
        checks.require_finite("bdia_heun_encode", z_0=z_0)
        z = dtypes.at_least_float32(z_0)
        ode = _Ode("bdia_heun_encode", noise_fn, params, grid, cond, z.dtype)
        zb = z / ode.alpha[0]
        slope = ode.slope(zb, 0)
        rise = (ode.sb[1] - ode.sb[0]) * slope if variant == "euler" else ode.heun(zb, slope, 0, 1)
        state = BdiaState(z_i=z, z_ip1=ode.alpha[1] * (zb + rise))
    a = jnp.broadcast_to(_mixing("bdia_heun_encode", grid, gamma, coords, state.z_i.dtype), (grid.num_steps - 1,))

    def up(state: tuple[jax.Array, jax.Array], i: Any, *, last: bool) -> tuple[jax.Array, jax.Array]:
        zb_im1, zb_i = state
        forward, backward, _ = _increments(ode, zb_i, i, variant, None, last)
        weight = a[i - 1]
        return zb_i, (zb_im1 - (1 - weight) * zb_i + weight * backward - forward) / weight

    carry = (state.z_i / ode.alpha[0], state.z_ip1 / ode.alpha[1])
    carry = up(carry, 1, last=bool(grid.sigma[0] == 0))
    carry, _ = jax.lax.scan(lambda carry, i: (up(carry, i, last=False), None), carry, jnp.arange(2, levels))
    return BdiaState(z_i=ode.alpha[levels - 1] * carry[0], z_ip1=ode.alpha[levels] * carry[1])


def bdia_heun_decode(
    noise_fn: NoiseFn,
    params: Any,
    state: BdiaState,
    grid: Grid,
    *,
    gamma: ArrayLike = 1.0,
    variant: str = "heun",
    coords: str = "ve",
    cond: Any = None,
    num_levels: int | None = None,
) -> BdiaState:
    """A pair (z_{M-1}, z_M) to data, the inverse of `bdia_heun_encode`; arguments as there. Returns (z_0, z_1) in the dtype of the state."""
    grid = checked("bdia_heun_decode", grid)
    checks.one_of("bdia_heun_decode", "variant", variant, VARIANTS[:2])
    if not isinstance(state, tuple) or len(state) != 2:
        raise ValueError("bdia_heun_decode: 'state' must be the pair BdiaState(z_i, z_ip1); exact inversion needs both states")
    dtype = state[0].dtype
    state = BdiaState(*(dtypes.at_least_float32(z) for z in state))
    ode = _Ode("bdia_heun_decode", noise_fn, params, grid, cond, state.z_i.dtype)
    levels = climbed("bdia_heun_decode", num_levels, grid, lowest=2)
    state = _heun_down("bdia_heun_decode", ode, state, None, grid, gamma, variant, coords, levels)
    return BdiaState(*(z.astype(dtype) for z in state))


def _heun_down(
    function: str,
    ode: _Ode,
    state: BdiaState,
    remembered: jax.Array | None,
    grid: Grid,
    gamma: ArrayLike,
    variant: str,
    coords: str,
    levels: int,
) -> BdiaState:
    a = jnp.broadcast_to(_mixing(function, grid, gamma, coords, state.z_i.dtype), (grid.num_steps - 1,))

    def down(carry: Any, i: Any, *, last: bool) -> Any:
        zb_i, zb_ip1, remembered = carry
        forward, backward, slope = _increments(ode, zb_i, i, variant, remembered, last)
        weight = a[i - 1]
        zb_im1 = zb_ip1 - (1 - weight) * (zb_ip1 - zb_i) - weight * backward + forward
        return zb_im1, zb_i, (slope if variant == "reuse" else remembered)

    carry = (state.z_i / ode.alpha[levels - 1], state.z_ip1 / ode.alpha[levels], remembered if variant == "reuse" else None)
    carry, _ = jax.lax.scan(lambda carry, i: (down(carry, i, last=False), None), carry, jnp.arange(levels - 1, 1, -1))
    zb_0, zb_1, _ = down(carry, 1, last=bool(grid.sigma[0] == 0))
    return BdiaState(z_i=ode.alpha[0] * zb_0, z_ip1=ode.alpha[1] * zb_1)


def dpm_solver_2m_sample(
    noise_fn: NoiseFn,
    params: Any,
    z_N: jax.Array,
    grid: Grid,
    *,
    cond: Any = None,
    lower_order_final: bool | None = None,
) -> jax.Array:
    """DPM-Solver++ 2M in data prediction, multistep, one network evaluation per step; not invertible, the strong baseline for pure sampling.

      lam = log(alpha/sigma), hh = lam_{i-1} - lam_i, r = (lam_i - lam_{i+1}) / hh
      Dbar = (1 + 1/(2r)) x0hat_i - 1/(2r) x0hat_{i+1};   z_{i-1} = (sigma_{i-1}/sigma_i) z_i - alpha_{i-1} (e^{-hh} - 1) Dbar

    The first step is first order (equal to DDIM), and so is the last where sigma_0 = 0 (there r = 0).

    Args:
      noise_fn: (params, z, t, cond) -> eps. Static.
      params: Its parameters.
      z_N: [...] state at the top level.
      grid: N + 1 levels, all different.
      cond: Passed on to the network.
      lower_order_final: Take the last step first order; None: only where sigma_0 = 0. (Public schedulers also do it for N < 15.) Static.

    Returns:
      z_0 [...] in the dtype of z_N.

    Raises:
      ValueError: if a level is repeated, or lower_order_final=False with sigma_0 = 0.

    Reference: Lu et al., arXiv:2211.01095, algorithm 2.
    """
    grid = checked("dpm_solver_2m_sample", grid, strict=True)
    if lower_order_final is None:
        lower_order_final = bool(grid.sigma[0] == 0)
    if grid.sigma[0] == 0 and not lower_order_final:
        raise ValueError(
            "dpm_solver_2m_sample: 'lower_order_final' must not be False on a grid with sigma_0 = 0, where log(alpha/sigma) is inf"
        )
    dtype, z = z_N.dtype, dtypes.at_least_float32(z_N)
    level = np.arange(grid.num_steps, 0, -1)
    shrink, gain = _data_move(grid, level, level - 1)
    extra = np.zeros(grid.num_steps)  # 1 / (2 r)
    extra[1:] = _half_ratio(grid, level[1:])
    if lower_order_final:
        extra[-1] = 0.0
    evaluate = evaluator("dpm_solver_2m_sample", noise_fn)

    def body(carry: tuple[jax.Array, jax.Array], x: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
        z, previous = carry
        t, alpha, sigma, shrink, gain, extra = x
        x0 = (z - sigma * evaluate(params, z, t, cond)) / alpha
        return (shrink * z + gain * ((1 + extra) * x0 - extra * previous), x0), None

    xs = tuple(jnp.asarray(x, z.dtype) for x in (grid.time[level], grid.alpha[level], grid.sigma[level], shrink, gain, extra))
    return jax.lax.scan(body, (z, jnp.zeros_like(z)), xs)[0][0].astype(dtype)


def _data_move(grid: Grid, source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(m, k) of z_j = m z_i + k x0hat: m = sigma_j/sigma_i, k = -alpha_j (e^{-(lam_j - lam_i)} - 1), finite where sigma_j = 0."""
    shrink = grid.sigma[target] / grid.sigma[source]
    return shrink, grid.alpha[target] - shrink * grid.alpha[source]


def _half_ratio(grid: Grid, level: np.ndarray) -> np.ndarray:
    """1 / (2 r) with r = (lam_i - lam_{i+1}) / (lam_{i-1} - lam_i), lam = log(alpha/sigma); inf where sigma_{i-1} = 0."""
    with np.errstate(divide="ignore"):
        lam = -np.log(sigma_bar(grid))
    return 0.5 * (lam[level - 1] - lam[level]) / (lam[level] - lam[level + 1])


def bdia_dpm_solver_2m_sample(
    noise_fn: NoiseFn,
    params: Any,
    z_N: jax.Array,
    grid: Grid,
    *,
    gamma: ArrayLike = 0.5,
    coords: str = "vp",
    cond: Any = None,
) -> BdiaState:
    """BDIA on DPM-Solver++ 2M, a sampler only: one evaluation per step, and not explicitly invertible, since a step needs x0hat_{i+1}.

      z_{i-1} = a_i (z_{i+1} - Up_i) + Down_i
      Down_i = (sigma_{i-1}/sigma_i) z_i - alpha_{i-1} (e^{-hh} - 1) Dbar    as in `dpm_solver_2m_sample`
      Up_i   = (sigma_{i+1}/sigma_i) z_i - alpha_{i+1} (e^{hh'} - 1) (x0hat_i + x0hat_{i+1}) / 2,   hh' = lam_i - lam_{i+1}

    Both increments use the same line through x0hat_i and the remembered x0hat_{i+1}; a_i = gamma w_i as in `coefficients`. The repository says
    that BDIA can be applied to DPM-Solver++ and not how: this reading is ours, and gamma = 0 is `dpm_solver_2m_sample`.

    Args:
      noise_fn: (params, z, t, cond) -> eps. Static.
      params: Its parameters.
      z_N: [...] state at the top level.
      grid: N + 1 levels, all different.
      gamma: Scalar or [N-1], in [0, 1]. Traced.
      coords: As in `coefficients`. Static.
      cond: Passed on to the network.

    Returns:
      The pair (z_0, z_1) in the dtype of z_N.

    Raises:
      ValueError: if a level is repeated, on an unknown option or a gamma outside [0, 1].

    Reference: Zhang et al., arXiv:2307.10829; Lu et al., arXiv:2211.01095, algorithm 2.
    """
    grid = checked("bdia_dpm_solver_2m_sample", grid, strict=True)
    weight = coefficients(grid, gamma, coords=coords).a
    dtype, z = z_N.dtype, dtypes.at_least_float32(z_N)
    evaluate = evaluator("bdia_dpm_solver_2m_sample", noise_fn)
    data = lambda z, t, alpha, sigma: (z - sigma * evaluate(params, z, t, cond)) / alpha  # noqa: E731
    levels = np.stack([grid.time, grid.alpha, grid.sigma], axis=1)

    x0 = data(z, *jnp.asarray(levels[-1], z.dtype))
    shrink, gain = _data_move(grid, np.array(grid.num_steps), np.array(grid.num_steps - 1))
    below = jnp.asarray(shrink, z.dtype) * z + jnp.asarray(gain, z.dtype) * x0

    def body(carry: tuple[jax.Array, jax.Array, jax.Array], x: Any) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        z_ip1, z_i, previous = carry
        level, a, extra, (shrink, gain), (swell, loss) = x
        x0 = data(z_i, *level)
        down = shrink * z_i + gain * ((1 + extra) * x0 - extra * previous)
        up = swell * z_i + loss * (x0 + previous) / 2
        return (z_i, a * (z_ip1 - up) + down, x0), None

    level = np.arange(grid.num_steps - 1, 0, -1)
    extra = _half_ratio(grid, level)
    extra = np.where(np.isfinite(extra), extra, 0.0)  # first order into sigma_0 = 0
    xs = (levels[level], weight[::-1], extra, _data_move(grid, level, level - 1), _data_move(grid, level, level + 1))  # type: ignore[index]
    xs = jax.tree.map(lambda x: jnp.asarray(x, z.dtype), xs)
    (z_1, z_0, _), _ = jax.lax.scan(body, (z, below, x0), xs)
    return BdiaState(z_i=z_0.astype(dtype), z_ip1=z_1.astype(dtype))
