"""EDICT: exact inversion by two coupled chains, at two network evaluations per step; the method BDIA is compared with."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from janax.algorithms.bdia import loop
from janax.algorithms.bdia.grid import Grid, checked, climbed, move_coefficients
from janax.algorithms.bdia.prediction import NoiseFn, evaluator
from janax.jaxlib_ext import checks, dtypes

__all__ = ["ORDERS", "EdictState", "edict_decode", "edict_encode", "edict_log_determinant", "edict_sample"]

ORDERS = ("paper", "alternate")


class EdictState(NamedTuple):
    """The two chains at one level.

    Attributes:
      x: [...] first chain; the result to take.
      y: [...] second chain.
    """

    x: jax.Array
    y: jax.Array


def edict_sample(
    noise_fn: NoiseFn,
    params: Any,
    z_N: jax.Array,
    grid: Grid,
    *,
    p: ArrayLike = 0.93,
    order: str = "paper",
    cond: Any = None,
    gradient: str = "autodiff",
) -> EdictState:
    """Noise to data: `edict_decode` from x = y = z_N. 2 N network evaluations.

    Args:
      noise_fn: (params, z, t, cond) -> eps. Static.
      params: Its parameters.
      z_N: [...] noise at the top level.
      grid: N + 1 levels.
      p: Mixing weight in (0, 1]; 0.93 by default, 0.90 to 0.97 recommended. Traced.
      order: Which chain moves first, see `edict_decode`. Static.
      cond: Passed on to the network.
      gradient: "autodiff" or "reversible" (memory independent of N). Static.

    Returns:
      Both chains at level 0, in the dtype of z_N.

    Reference: Wallace et al., arXiv:2211.12446.
    """
    dtype = z_N.dtype
    state = edict_decode(noise_fn, params, EdictState(x=z_N, y=z_N), grid, p=p, order=order, cond=cond, gradient=gradient)
    return EdictState(*(z.astype(dtype) for z in state))


def edict_decode(
    noise_fn: NoiseFn,
    params: Any,
    state: EdictState,
    grid: Grid,
    *,
    p: ArrayLike = 0.93,
    order: str = "paper",
    cond: Any = None,
    num_levels: int | None = None,
    gradient: str = "autodiff",
) -> EdictState:
    """Level M to 0. With a = alpha_{i-1}/alpha_i, b = sigma_{i-1} - a sigma_i, both evaluations at t_i:

      x' = a x + b eps(y);  y' = a y + b eps(x');  x_{i-1} = p x' + (1-p) y';  y_{i-1} = p y' + (1-p) x_{i-1}

    Args:
      noise_fn: (params, z, t, cond) -> eps. Static.
      params: Its parameters.
      state: Both chains at level M.
      grid: N + 1 levels.
      p: Mixing weight in (0, 1]. Traced.
      order: "paper", as above at every step; "alternate", as the released code: at the k-th step from level M, k odd, y moves first (the
        mixing does not alternate). The two differ strongly under guidance. Static.
      cond: Passed on to the network.
      num_levels: M, N by default. Static.
      gradient: "autodiff" or "reversible" (memory independent of M). Static.

    Returns:
      Both chains at level 0, float32 or wider.

    Raises:
      ValueError: on wrong shapes, a missing second chain, an unknown order or a p outside (0, 1].

    Reference: Wallace et al., arXiv:2211.12446, eq. 11-14; github salesforce/EDICT for the alternation.
    """
    return _run("edict_decode", noise_fn, params, state, grid, p, order, cond, num_levels, gradient, down=True)


def edict_encode(
    noise_fn: NoiseFn,
    params: Any,
    z_0: jax.Array | EdictState,
    grid: Grid,
    *,
    p: ArrayLike = 0.93,
    order: str = "paper",
    cond: Any = None,
    num_levels: int | None = None,
    gradient: str = "autodiff",
) -> EdictState:
    """Level 0 to M, the exact inverse of `edict_decode`:

      y' = (y - (1-p) x)/p;  x' = (x - (1-p) y')/p;  y_i = (y' - b eps(x'))/a;  x_i = (x' - b eps(y_i))/a

    A rounding error grows by p^-2 per step in the difference x - y: 1.4e3 for p = 0.93 and 50 steps.

    Args:
      noise_fn: As in `edict_decode`. Static.
      params: Its parameters.
      z_0: [...] data, used for both chains, or both chains at level 0.
      grid: N + 1 levels.
      p: Mixing weight in (0, 1]. Traced.
      order: As in `edict_decode`. Static.
      cond: Passed on to the network.
      num_levels: M, N by default. Static.
      gradient: "autodiff" or "reversible" (memory independent of M). Static.

    Returns:
      Both chains at level M, float32 or wider.

    Raises:
      ValueError: as `edict_decode`; nan in a concrete z_0.
    """
    state = EdictState(*z_0) if isinstance(z_0, tuple) else EdictState(x=z_0, y=z_0)
    checks.require_finite("edict_encode", x=state.x, y=state.y)
    return _run("edict_encode", noise_fn, params, state, grid, p, order, cond, num_levels, gradient, down=False)


def edict_log_determinant(grid: Grid, num_dims: int, *, p: float = 0.93) -> float:
    """log |det| of the map of both chains from level N to 0: sum over steps of D (2 log a + 2 log p), nats; `num_dims` is D of one chain."""
    a = grid.alpha[:-1] / grid.alpha[1:]
    return float(num_dims * np.sum(2 * np.log(a) + 2 * np.log(p)))


def _run(
    function: str,
    noise_fn: NoiseFn,
    params: Any,
    state: EdictState,
    grid: Grid,
    p: ArrayLike,
    order: str,
    cond: Any,
    num_levels: int | None,
    gradient: str,
    *,
    down: bool,
) -> EdictState:
    grid = checked(function, grid)
    checks.one_of(function, "order", order, ORDERS)
    if not isinstance(state, tuple) or len(state) != 2 or any(z is None for z in state):
        raise ValueError(f"{function}: 'state' must be EdictState(x, y), both chains; got {type(state).__name__}")
    checks.check_shapes(function, x=(state[0], "..."), y=(state[1], "..."))
    p_value = np.asarray(p) if checks.is_concrete(p) else None
    if p_value is not None and not np.all((p_value > 0) & (p_value <= 1)):
        raise ValueError(f"{function}: 'p' is {p}, expected within (0, 1]; 0.93 is the published default")
    levels = climbed(function, num_levels, grid, lowest=1)
    state = EdictState(*(dtypes.at_least_float32(z) for z in state))
    dtype = state.x.dtype
    p = jnp.asarray(p).astype(dtype)
    level = np.arange(levels, 0, -1) if down else np.arange(1, levels + 1)
    a, b = move_coefficients(grid, level, level - 1)
    swap = (levels - level) % 2 == 1 if order == "alternate" else np.zeros(levels, bool)
    evaluate = evaluator(function, noise_fn)

    def exchange(swap: jax.Array, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
        if order == "paper":
            return first, second
        return jnp.where(swap, second, first), jnp.where(swap, first, second)

    def decode_step(bundle: Any, state: EdictState, x: Any) -> EdictState:
        params, cond, p = bundle
        t, a, b, swap = x
        first, second = exchange(swap, state.x, state.y)
        first = a * first + b * evaluate(params, second, t, cond)
        second = a * second + b * evaluate(params, first, t, cond)
        x_new, y_new = exchange(swap, first, second)
        x_new = p * x_new + (1 - p) * y_new
        y_new = p * y_new + (1 - p) * x_new
        return EdictState(x=x_new, y=y_new)

    def encode_step(bundle: Any, state: EdictState, x: Any) -> EdictState:
        params, cond, p = bundle
        t, a, b, swap = x
        y_new = (state.y - (1 - p) * state.x) / p
        x_new = (state.x - (1 - p) * y_new) / p
        first, second = exchange(swap, x_new, y_new)
        second = (second - b * evaluate(params, first, t, cond)) / a
        first = (first - b * evaluate(params, second, t, cond)) / a
        x_new, y_new = exchange(swap, first, second)
        return EdictState(x=x_new, y=y_new)

    xs = (*(jnp.asarray(v, dtype) for v in (grid.time[level], a, b)), jnp.asarray(swap))
    amplification = float(np.max(p_value)) ** (-2 * levels) if p_value is not None and down else None
    rules = (decode_step, encode_step) if down else (encode_step, decode_step)
    return loop.run(function, *rules, (params, cond, p), state, xs, gradient=gradient, amplification=amplification)
