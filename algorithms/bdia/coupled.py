"""Other algebraically reversible solvers: reversible Heun, and the McCallum-Foster coupling (in exponential variables: Rex) of any Runge-Kutta
method.

They invert exactly like BDIA; what differs is order, stability and cost. y = z / w is integrated against a clock s:
  prediction="noise"   w = alpha, s = sigma / alpha, dy/ds = eps
  prediction="data"    w = sigma, s = alpha / sigma, dy/ds = x0hat    (needs sigma_0 > 0)

With `churn` = tau > 0 the coupled solver follows the reverse diffusion instead of the flow: d zb = (1 + tau^2) eps d sb + tau sqrt(2 sb) dW,
whose noise does not depend on the state. Each step's increment is drawn from the key and the level, so that the inverse can draw it again
and no path is stored. In the variables above, with r = tau^2:
  prediction="noise"   dy = (1 + r) eps ds + dM                      Var M over a step = r |sb_i^2 - sb_{i-1}^2|
  prediction="data"    w = alpha sb^(1+r), s = sb^-(1+r), dy = x0hat ds + dM      Var M = |sb_i^(-2r) - sb_{i-1}^(-2r)|
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from janax.algorithms.bdia import loop
from janax.algorithms.bdia.grid import Grid, Levels, checked, climbed, edm_levels, flow_levels, move_coefficients, sigma_bar
from janax.algorithms.bdia.prediction import NoiseFn, evaluator
from janax.jaxlib_ext import checks, dtypes

__all__ = [
    "DOPRI5",
    "EULER",
    "HEUN",
    "MIDPOINT",
    "RALSTON",
    "RK4",
    "SSPRK3",
    "TSIT5",
    "CoupledState",
    "ReversibleHeunState",
    "Tableau",
    "coupled_decode",
    "coupled_encode",
    "coupled_sample",
    "reversible_heun_decode",
    "reversible_heun_encode",
    "reversible_heun_sample",
]


class ReversibleHeunState(NamedTuple):
    """Reversible Heun at one level.

    Attributes:
      z: [...] the solution; the result to take.
      z_hat: [...] the auxiliary chain at which the network is evaluated.
      eps: [...] eps(z_hat, t) at this level.
    """

    z: jax.Array
    z_hat: jax.Array
    eps: jax.Array


def reversible_heun_sample(
    noise_fn: NoiseFn, params: Any, z_N: jax.Array, grid: Grid, *, cond: Any = None, gradient: str = "autodiff"
) -> ReversibleHeunState:
    """Noise to data: `reversible_heun_decode` from z_hat = z = z_N. N + 1 evaluations, second order.

    Args:
      noise_fn: (params, z, t, cond) -> eps. Static.
      params: Its parameters.
      z_N: [...] state at the top level.
      grid: N + 1 levels.
      cond: Passed on to the network.
      gradient: "autodiff" or "reversible" (memory independent of N). Static.

    Returns:
      The state at level 0, in the dtype of z_N.

    Reference: Kidger et al., arXiv:2105.13493, algorithm 1.
    """
    dtype, z = z_N.dtype, dtypes.at_least_float32(z_N)
    checked("reversible_heun_sample", grid)
    eps = evaluator("reversible_heun_sample", noise_fn)(params, z, jnp.asarray(grid.time[-1], z.dtype), cond)
    state = reversible_heun_decode(noise_fn, params, ReversibleHeunState(z, z, eps), grid, cond=cond, gradient=gradient)
    return ReversibleHeunState(*(x.astype(dtype) for x in state))


def reversible_heun_encode(
    noise_fn: NoiseFn,
    params: Any,
    z_0: jax.Array | ReversibleHeunState,
    grid: Grid,
    *,
    cond: Any = None,
    num_levels: int | None = None,
    gradient: str = "autodiff",
) -> ReversibleHeunState:
    """Data to noise, the exact inverse of `reversible_heun_decode`; starts from z_hat = z = z_0 if only data is given.

    Args:
      noise_fn: As in `reversible_heun_sample`. Static.
      params: Its parameters.
      z_0: [...] data, or the state at level 0.
      grid: N + 1 levels.
      cond: Passed on to the network.
      num_levels: M, N by default. Static.
      gradient: "autodiff" or "reversible". Static.

    Returns:
      The state at level M, float32 or wider.
    """
    if not isinstance(z_0, tuple):
        checks.require_finite("reversible_heun_encode", z_0=z_0)
        z = dtypes.at_least_float32(z_0)
        checked("reversible_heun_encode", grid)
        eps = evaluator("reversible_heun_encode", noise_fn)(params, z, jnp.asarray(grid.time[0], z.dtype), cond)
        z_0 = ReversibleHeunState(z, z, eps)
    return _reversible_heun("reversible_heun_encode", noise_fn, params, z_0, grid, cond, num_levels, gradient, down=False)


def reversible_heun_decode(
    noise_fn: NoiseFn,
    params: Any,
    state: ReversibleHeunState,
    grid: Grid,
    *,
    cond: Any = None,
    num_levels: int | None = None,
    gradient: str = "autodiff",
) -> ReversibleHeunState:
    """Level M to 0. In y = z / alpha with d = sb' - sb and f = eps(y_hat):  y_hat' = 2 y - y_hat + d f;  f' = eps(y_hat');
    y' = y + d (f + f') / 2.  One evaluation per step. Arguments as in `reversible_heun_encode`; returns float32 or wider."""
    return _reversible_heun("reversible_heun_decode", noise_fn, params, state, grid, cond, num_levels, gradient, down=True)


def _reversible_heun(
    function: str,
    noise_fn: NoiseFn,
    params: Any,
    state: Any,
    grid: Grid,
    cond: Any,
    num_levels: int | None,
    gradient: str,
    *,
    down: bool,
) -> ReversibleHeunState:
    grid = checked(function, grid)
    if not isinstance(state, tuple) or len(state) != 3:
        raise ValueError(f"{function}: 'state' must be ReversibleHeunState(z, z_hat, eps), got {type(state).__name__}")
    state = ReversibleHeunState(*(dtypes.at_least_float32(x) for x in state))
    checks.check_shapes(function, z=(state.z, "..."), z_hat=(state.z_hat, "..."), eps=(state.eps, "..."))
    dtype = state.z.dtype
    level = _level_range(function, num_levels, grid, down=down)
    evaluate = evaluator(function, noise_fn)
    # Always tabulated downwards, level -> level - 1, so that both directions use the very same numbers.
    scale, slope = move_coefficients(grid, level, level - 1)
    xs = tuple(jnp.asarray(x, dtype) for x in (grid.time[level], grid.time[level - 1], scale, slope))

    def down_step(bundle: Any, state: ReversibleHeunState, x: Any) -> ReversibleHeunState:
        params, cond = bundle
        _, t_below, scale, slope = x
        z_hat = scale * (2 * state.z - state.z_hat) + slope * state.eps
        eps = evaluate(params, z_hat, t_below, cond)
        return ReversibleHeunState(z=scale * state.z + slope * (state.eps + eps) / 2, z_hat=z_hat, eps=eps)

    def up_step(bundle: Any, state: ReversibleHeunState, x: Any) -> ReversibleHeunState:
        params, cond = bundle
        t, _, scale, slope = x
        z_hat = (2 * state.z - state.z_hat - slope * state.eps) / scale
        eps = evaluate(params, z_hat, t, cond)
        return ReversibleHeunState(z=(state.z - slope * (state.eps + eps) / 2) / scale, z_hat=z_hat, eps=eps)

    rules = (down_step, up_step) if down else (up_step, down_step)
    return loop.run(function, *rules, (params, cond), state, xs, gradient=gradient)


def _level_range(function: str, num_levels: int | None, grid: Grid, *, down: bool) -> np.ndarray:
    levels = climbed(function, num_levels, grid, lowest=1)
    return np.arange(levels, 0, -1) if down else np.arange(1, levels + 1)


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method: k_j = F(y + h sum_l a_jl k_l, s + c_j h), y' = y + h sum_j b_j k_j.

    Attributes:
      a: Row j has j entries (the first row is empty).
      b: Weights, adding to 1.
      c: Nodes, c_0 = 0.
      order: Order of accuracy.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    order: int


EULER = Tableau(a=((),), b=(1.0,), c=(0.0,), order=1)
MIDPOINT = Tableau(a=((), (1 / 2,)), b=(0.0, 1.0), c=(0.0, 1 / 2), order=2)
HEUN = Tableau(a=((), (1.0,)), b=(1 / 2, 1 / 2), c=(0.0, 1.0), order=2)
RALSTON = Tableau(a=((), (2 / 3,)), b=(1 / 4, 3 / 4), c=(0.0, 2 / 3), order=2)
SSPRK3 = Tableau(a=((), (1.0,), (1 / 4, 1 / 4)), b=(1 / 6, 1 / 6, 2 / 3), c=(0.0, 1.0, 1 / 2), order=3)
RK4 = Tableau(a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6), c=(0.0, 1 / 2, 1 / 2, 1.0), order=4)
DOPRI5 = Tableau(
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    ),
    b=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
    order=5,
)
TSIT5 = Tableau(
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
    ),
    b=(0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774),
    c=(0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0),
    order=5,
)


class CoupledState(NamedTuple):
    """The two chains of the McCallum-Foster coupling at one level.

    Attributes:
      x: [...] the solution; the result to take.
      x_hat: [...] the partner.
    """

    x: jax.Array
    x_hat: jax.Array


def coupled_sample(
    noise_fn: NoiseFn,
    params: Any,
    z_N: jax.Array,
    grid: Grid,
    *,
    tableau: Tableau = MIDPOINT,
    zeta: ArrayLike = 0.999,
    prediction: str = "noise",
    levels: Levels | None = None,
    churn: float = 0.0,
    key: jax.Array | None = None,
    cond: Any = None,
    gradient: str = "autodiff",
) -> CoupledState:
    """Noise to data: `coupled_decode` from x = x_hat = z_N. 2 stages x N network evaluations.

    Args:
      noise_fn: (params, z, t, cond) -> eps. Static.
      params: Its parameters.
      z_N: [...] state at the top level.
      grid: N + 1 levels.
      tableau: Base method, e.g. EULER, MIDPOINT, HEUN, RALSTON, SSPRK3, RK4, DOPRI5, TSIT5. Static.
      zeta: Coupling in (0, 1]; 1 has no stability region, errors of the inverse grow by 1/zeta per step. Traced.
      prediction: "noise" (for inversion) or "data" (reported to blow up latents). Static.
      levels: sigma-bar -> (alpha, time) for stages between levels: `vp_levels(alphas_cumprod)`, `edm_levels`, `flow_levels`; by default told
        from the grid, with time interpolated between its levels (then that interpolation bounds the accuracy). Static.
      churn: tau >= 0: 0 follows the probability flow, 1 the reverse diffusion of the forward process. Static.
      key: Draws the noise of every step anew, the same in both directions; needed where churn > 0.
      cond: Passed on to the network.
      gradient: "autodiff" or "reversible" (memory independent of N). Static.

    Returns:
      Both chains at level 0, in the dtype of z_N.

    Reference: McCallum and Foster, arXiv:2410.11648; in these variables Blasingame and Liu, arXiv:2502.08834 (Rex).
    """
    dtype = z_N.dtype
    state = coupled_decode(
        noise_fn,
        params,
        CoupledState(z_N, z_N),
        grid,
        tableau=tableau,
        zeta=zeta,
        prediction=prediction,
        levels=levels,
        churn=churn,
        key=key,
        cond=cond,
        gradient=gradient,
    )
    return CoupledState(*(x.astype(dtype) for x in state))


def coupled_decode(
    noise_fn: NoiseFn,
    params: Any,
    state: CoupledState,
    grid: Grid,
    *,
    tableau: Tableau = MIDPOINT,
    zeta: ArrayLike = 0.999,
    prediction: str = "noise",
    levels: Levels | None = None,
    churn: float = 0.0,
    key: jax.Array | None = None,
    cond: Any = None,
    num_levels: int | None = None,
    gradient: str = "autodiff",
) -> CoupledState:
    """Level M to 0. With Psi_h(s, x) the increment of y = x / w that the base method makes from clock s to s + h:

      x' = (w'/w) (zeta x + (1 - zeta) x_hat) + w' Psi_h(s, x_hat);   x_hat' = (w'/w) x_hat - w' Psi_{-h}(s', x')

    Args:
      noise_fn: As in `coupled_sample`. Static.
      params: Its parameters.
      state: Both chains at level M.
      grid: N + 1 levels.
      tableau: As in `coupled_sample`. Static.
      zeta: As in `coupled_sample`. Traced.
      prediction: As in `coupled_sample`. Static.
      levels: As in `coupled_sample`. Static.
      churn: As in `coupled_sample`. Static.
      key: As in `coupled_sample`; the same key undoes the run.
      cond: Passed on to the network.
      num_levels: M, N by default. Static.
      gradient: "autodiff" or "reversible". Static.

    Returns:
      Both chains at level 0, float32 or wider.

    Raises:
      ValueError: on wrong shapes, an unknown option, a zeta outside (0, 1], a repeated level, prediction="data" with sigma_0 = 0, or a churn
        without a key.
    """
    return _coupled(
        "coupled_decode",
        noise_fn,
        params,
        state,
        grid,
        tableau,
        zeta,
        prediction,
        levels,
        churn,
        key,
        cond,
        num_levels,
        gradient,
        down=True,
    )


def coupled_encode(
    noise_fn: NoiseFn,
    params: Any,
    z_0: jax.Array | CoupledState,
    grid: Grid,
    *,
    tableau: Tableau = MIDPOINT,
    zeta: ArrayLike = 0.999,
    prediction: str = "noise",
    levels: Levels | None = None,
    churn: float = 0.0,
    key: jax.Array | None = None,
    cond: Any = None,
    num_levels: int | None = None,
    gradient: str = "autodiff",
) -> CoupledState:
    """Level 0 to M, the exact inverse of `coupled_decode`:

      x_hat = (w/w') x_hat' + w Psi_{-h}(s', x');   x = ((w/w') x' - (1 - zeta) x_hat - w Psi_h(s, x_hat)) / zeta

    Takes data for both chains, or both chains at level 0; the other arguments as in `coupled_decode`. Returns float32 or wider.
    """
    state = z_0 if isinstance(z_0, tuple) else CoupledState(z_0, z_0)
    checks.require_finite("coupled_encode", x=state[0], x_hat=state[1])
    return _coupled(
        "coupled_encode",
        noise_fn,
        params,
        state,
        grid,
        tableau,
        zeta,
        prediction,
        levels,
        churn,
        key,
        cond,
        num_levels,
        gradient,
        down=False,
    )


def _coupled(
    function: str,
    noise_fn: NoiseFn,
    params: Any,
    state: Any,
    grid: Grid,
    tableau: Tableau,
    zeta: ArrayLike,
    prediction: str,
    levels: Levels | None,
    churn: float,
    key: jax.Array | None,
    cond: Any,
    num_levels: int | None,
    gradient: str,
    *,
    down: bool,
) -> CoupledState:
    grid = checked(function, grid, strict=True)
    checks.one_of(function, "prediction", prediction, ("noise", "data"))
    if not isinstance(state, tuple) or len(state) != 2:
        raise ValueError(f"{function}: 'state' must be CoupledState(x, x_hat), got {type(state).__name__}")
    checks.check_shapes(function, x=(state[0], "..."), x_hat=(state[1], "..."))
    if prediction == "data" and grid.sigma[0] == 0:
        raise ValueError(
            f"{function}: prediction='data' runs on the clock alpha/sigma, which is inf at sigma_0 = 0; use 'noise' or sigma_0 > 0"
        )
    if checks.is_concrete(zeta) and not np.all((np.asarray(zeta) > 0) & (np.asarray(zeta) <= 1)):
        raise ValueError(f"{function}: 'zeta' is {zeta}, expected within (0, 1]; 0.999 is the published default")
    if not churn >= 0 or (churn > 0 and key is None):
        raise ValueError(f"{function}: 'churn' is {churn}, expected 0, or above 0 together with a 'key' that draws the noise")
    state = CoupledState(*(dtypes.at_least_float32(x) for x in state))
    dtype = state.x.dtype
    level = _level_range(function, num_levels, grid, down=down)
    evaluate = evaluator(function, noise_fn)
    place = levels or _levels_of(function, grid)

    sb, power = sigma_bar(grid), 1 + churn**2
    if prediction == "noise":
        clock, inverse_clock, weigh = sb, lambda s: s, lambda alpha, at: alpha
        variance = churn**2 * (sb[level] ** 2 - sb[level - 1] ** 2)
    else:
        clock, inverse_clock, weigh = sb**-power, lambda s: s ** (-1 / power), lambda alpha, at: alpha * at**power
        variance = sb[level - 1] ** (-2 * churn**2) - sb[level] ** (-2 * churn**2)

    def stages(source: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
        """[steps stages] the network's alpha, sigma, time and weight w at the base method's nodes between two levels, and the clock's step."""
        h, nodes = (clock[target] - clock[source])[:, None], np.asarray(tableau.c)[None, :]
        at = inverse_clock(clock[source][:, None] + nodes * h)
        alpha, time = place(at)
        sigma = at * alpha
        for node, index in ((0.0, source), (1.0, target)):  # at the levels themselves: the grid's own numbers
            here = np.broadcast_to(nodes == node, at.shape)
            alpha, sigma, time = (np.where(here, own[index][:, None], x) for own, x in zip(grid, (alpha, sigma, time)))
            at = np.where(here, sb[index][:, None], at)
        return {"alpha": alpha, "sigma": sigma, "time": time, "weight": weigh(alpha, at), "h": h[:, 0]}

    tables = {"psi": stages(level, level - 1), "back": stages(level - 1, level)}
    weight = weigh(grid.alpha, sb)
    xs = jax.tree.map(lambda x: jnp.asarray(x, dtype), (weight[level], weight[level - 1], tables, np.sqrt(variance)))
    xs = (*xs, jnp.asarray(level, jnp.int32))

    def noise(bundle: Any, like: jax.Array, scale: jax.Array, level: jax.Array) -> jax.Array | None:
        """The martingale's increment on the way down from a level: the same whenever and in whatever direction it is asked for."""
        if key is None or not churn:
            return None
        step_key = jax.random.fold_in(jax.random.wrap_key_data(bundle[3], impl=jax.random.key_impl(key)), level)
        return scale * jax.random.normal(step_key, like.shape, like.dtype)

    def increment(bundle: Any, y: jax.Array, table: dict[str, jax.Array], noise: jax.Array | None, sign: int) -> jax.Array:
        params, cond = bundle[:2]
        slopes: list[jax.Array] = []
        for j, row in enumerate(tableau.a):
            point = y if noise is None else y + sign * tableau.c[j] * noise
            for weight_jl, slope in zip(row, slopes):
                if weight_jl:
                    point = point + table["h"] * weight_jl * slope
            z = table["weight"][j] * point
            eps = evaluate(params, z, table["time"][j], cond)
            slopes.append(power * eps if prediction == "noise" else (z - table["sigma"][j] * eps) / table["alpha"][j])
        total = sum((b * slope for b, slope in zip(tableau.b, slopes) if b), jnp.zeros_like(y))
        return table["h"] * total if noise is None else table["h"] * total + sign * noise

    def down_step(bundle: Any, state: CoupledState, x: Any) -> CoupledState:
        zeta, (above, below, table, scale, level) = bundle[2], x
        kick = noise(bundle, state.x, scale, level)
        mixed = zeta * state.x + (1 - zeta) * state.x_hat
        new = (below / above) * mixed + below * increment(bundle, state.x_hat / above, table["psi"], kick, 1)
        new_hat = (below / above) * state.x_hat - below * increment(bundle, new / below, table["back"], kick, -1)
        return CoupledState(x=new, x_hat=new_hat)

    def up_step(bundle: Any, state: CoupledState, x: Any) -> CoupledState:
        zeta, (above, below, table, scale, level) = bundle[2], x
        kick = noise(bundle, state.x, scale, level)
        old_hat = (above / below) * state.x_hat + above * increment(bundle, state.x / below, table["back"], kick, -1)
        rest = (above / below) * state.x - above * increment(bundle, old_hat / above, table["psi"], kick, 1)
        return CoupledState(x=(rest - (1 - zeta) * old_hat) / zeta, x_hat=old_hat)

    amplification = float(np.min(np.asarray(zeta))) ** -len(level) if down and checks.is_concrete(zeta) else None
    rules = (down_step, up_step) if down else (up_step, down_step)
    bundle = (params, cond, jnp.asarray(zeta).astype(dtype), None if key is None else jax.random.key_data(key))
    return loop.run(function, *rules, bundle, state, xs, gradient=gradient, amplification=amplification)


def _levels_of(function: str, grid: Grid) -> Levels:
    """Tells alpha between the levels from the kind of grid, and interpolates time between them (in log sb above level 1)."""
    sb = sigma_bar(grid)
    if np.allclose(grid.alpha, 1.0, atol=1e-12):
        if np.allclose(grid.time[1:], grid.sigma[1:], atol=1e-12):
            return edm_levels
        alpha_of = np.ones_like
    elif np.allclose(grid.alpha + grid.sigma, 1.0, atol=1e-12):
        if np.allclose(grid.time[1:], grid.sigma[1:], atol=1e-12):
            return flow_levels
        alpha_of = lambda s: 1.0 / (1.0 + s)  # noqa: E731
    elif np.allclose(grid.alpha**2 + grid.sigma**2, 1.0, atol=1e-12):
        alpha_of = lambda s: 1.0 / np.sqrt(1.0 + s**2)  # noqa: E731
    else:
        raise ValueError(f"{function}: 'grid' is neither VP, VE nor flow; give `levels`, a function of sigma-bar to (alpha, time)")

    def levels(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.interp(s, sb[:2], grid.time[:2]), np.interp(np.log(np.maximum(s, sb[1])), np.log(sb[1:]), grid.time[1:])
        return alpha_of(s), np.where(s < sb[1], low, high)

    return levels
