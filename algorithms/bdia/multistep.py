"""BELM with k steps: the exactly invertible linear multistep rule of the highest order, of which O-BELM is k = 2.

    zb_{i-1} = sum_{j=1..k} a_j zb_{i-1+j} + sum_{j=1..k-1} b_j h_{i-1+j} eps_{i-1+j}

is explicit in both directions, because eps is asked at neither end. Its 2 k - 1 numbers make it exact for polynomials of degree 2 k - 2. That
is one order more than a stable explicit k-step rule can have as soon as k > 2 (Dahlquist's barrier): on even steps k = 3 has the root -9.9, so
errors grow tenfold per step. It is here to be measured, over few steps and in float64; what one samples with is k = 2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from janax.algorithms.bdia import loop
from janax.algorithms.bdia.grid import Grid, checked, climbed, move_coefficients, sigma_bar
from janax.algorithms.bdia.prediction import NoiseFn, evaluator
from janax.jaxlib_ext import checks, dtypes

__all__ = [
    "MultistepCoeffs",
    "MultistepState",
    "multistep_coefficients",
    "multistep_decode",
    "multistep_encode",
    "multistep_roots",
    "multistep_sample",
]


class MultistepCoeffs(NamedTuple):
    """The table of a k-step rule; row r belongs to level i = r + 1, column j to level i + j.

    Attributes:
      a: [N+1-k, k] weights of z_i .. z_{i+k-1}; the last column must not vanish where the step is to be inverted.
      c: [N+1-k, k-1] weights of eps_i .. eps_{i+k-2}.
    """

    a: np.ndarray
    c: np.ndarray


class MultistepState(NamedTuple):
    """k neighbouring states, and the noise predictions between their ends; both are needed to go on in either direction.

    Attributes:
      z: [k ...] states at levels m .. m+k-1.
      eps: [k-2 ...] eps at levels m+1 .. m+k-2.
    """

    z: jax.Array
    eps: jax.Array


def _rule(sb: np.ndarray, alpha: np.ndarray, level: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(a [k], c [k-1]) in z variables at one level: Hermite extrapolation to sb_{i-1} from the values above it and the slopes between."""
    reach = sb[level + k - 1] - sb[level - 1]
    u = (sb[level : level + k] - sb[level - 1]) / reach
    power = np.arange(2 * k - 1)[:, None]
    slopes = power * u[None, :-1] ** np.maximum(power - 1, 0)
    solution = np.linalg.solve(np.concatenate([u[None] ** power, slopes], axis=1), np.eye(2 * k - 1)[0])
    return alpha[level - 1] * solution[:k] / alpha[level : level + k], alpha[level - 1] * reach * solution[k:]


def multistep_coefficients(grid: Grid, k: int) -> MultistepCoeffs:
    """The k-step BELM table. With d_j = sb_{i-1+j} - sb_{i-1}, solves for every l = 0 .. 2k-2

      sum_j a_j d_j^l + l sum_j b_j h_{i-1+j} d_j^(l-1) = [l = 0]

    and returns the weights in z: a_j alpha_{i-1}/alpha_{i-1+j} and b_j h_{i-1+j} alpha_{i-1}.

    Args:
      grid: N + 1 levels, all different.
      k: Number of earlier states, 2 <= k <= N; 2 is O-BELM. Static.

    Returns:
      The table, float64 NumPy.

    Raises:
      ValueError: on a repeated level, alpha_N = 0, or a k out of range.

    Reference: Wang et al., arXiv:2410.07273, eq. 28 (k = 3).
    """
    grid = checked("multistep_coefficients", grid, strict=True)
    if not 2 <= k <= grid.num_steps:
        raise ValueError(f"multistep_coefficients: 'k' is {k}, expected between 2 and the {grid.num_steps} steps of 'grid'")
    rows = [_rule(sigma_bar(grid), grid.alpha, level, k) for level in range(1, grid.num_steps + 2 - k)]
    return MultistepCoeffs(a=np.stack([a for a, _ in rows]), c=np.stack([c for _, c in rows]))


def multistep_roots(coeffs: MultistepCoeffs, grid: Grid) -> np.ndarray:
    """[N+1-k] largest modulus of the roots of r^k = sum_j a_j r^(k-j), the rule on eps = 0 in zb: above 1, errors grow by it every step."""
    k = coeffs.a.shape[1]
    level = np.arange(1, len(coeffs.a) + 1)[:, None]
    ratio = grid.alpha[level + np.arange(k)] / grid.alpha[level - 1]
    return np.array([np.abs(np.roots(np.concatenate([[1.0], -row]))).max() for row in coeffs.a * ratio])


def multistep_sample(
    noise_fn: NoiseFn, params: Any, z_N: jax.Array, grid: Grid, *, k: int, cond: Any = None, gradient: str = "autodiff"
) -> MultistepState:
    """Noise to data. DDIM gives the first step, rules of 2 .. k-1 steps the next, then the k-step rule; N evaluations.

    Args:
      noise_fn: (params, z, t, cond) -> eps. Static.
      params: Its parameters.
      z_N: [...] state at the top level.
      grid: N + 1 levels, all different.
      k: As in `multistep_coefficients`. Static.
      cond: Passed on to the network.
      gradient: "autodiff" or "reversible". Static.

    Returns:
      The state with m = 0, in the dtype of z_N; `z[0]` is the sample.

    Raises:
      ValueError: as `multistep_coefficients`.
    """
    coeffs = multistep_coefficients(grid, k)
    grid = checked("multistep_sample", grid, strict=True)
    dtype, z = z_N.dtype, dtypes.at_least_float32(z_N)
    evaluate = evaluator("multistep_sample", noise_fn)
    ask = lambda z, level: evaluate(params, z, jnp.asarray(grid.time[level], z.dtype), cond)  # noqa: E731
    top = grid.num_steps
    scale, slope = move_coefficients(grid, np.array(top), np.array(top - 1))
    states, slopes = [_scaled(scale, z) + _scaled(slope, ask(z, top)), z], []  # lowest level first
    for steps in range(2, k):
        level = top + 1 - steps
        a, c = _rule(sigma_bar(grid), grid.alpha, level, steps)
        slopes.insert(0, ask(states[0], level))
        states.insert(0, sum(map(_scaled, [*a, *c], states + slopes), jnp.zeros_like(z)))
    state = MultistepState(z=jnp.stack(states), eps=jnp.stack(slopes) if slopes else jnp.zeros((0, *z.shape), z.dtype))
    state = _run("multistep_sample", noise_fn, params, state, grid, coeffs, cond, top, gradient, down=True)
    return MultistepState(*(x.astype(dtype) for x in state))


def multistep_encode(
    noise_fn: NoiseFn,
    params: Any,
    z_0: jax.Array | MultistepState,
    grid: Grid,
    *,
    k: int,
    cond: Any = None,
    num_levels: int | None = None,
    gradient: str = "autodiff",
) -> MultistepState:
    """Data to noise, the exact inverse of `multistep_decode`.

    Args:
      noise_fn: As in `multistep_sample`. Static.
      params: Its parameters.
      z_0: [...] data, continued by DDIM inversion and the inverse rules of 2 .. k-1 steps; or the state with m = 0, to go back the way it came.
      grid: N + 1 levels, all different.
      k: As in `multistep_coefficients`. Static.
      cond: Passed on to the network.
      num_levels: M in k..N, N by default. Static.
      gradient: "autodiff" or "reversible". Static.

    Returns:
      The state whose highest level is M, in float32 or wider.

    Raises:
      ValueError: as `multistep_coefficients`; on nan in a concrete z_0, or a state of another k.
    """
    coeffs = multistep_coefficients(grid, k)
    grid = checked("multistep_encode", grid, strict=True)
    levels = climbed("multistep_encode", num_levels, grid, lowest=k)
    if isinstance(z_0, tuple):
        state = MultistepState(*(dtypes.at_least_float32(x) for x in z_0))
        checks.require_finite("multistep_encode", z=state.z, eps=state.eps)
    else:
        checks.require_finite("multistep_encode", z_0=z_0)
        z = dtypes.at_least_float32(z_0)
        evaluate = evaluator("multistep_encode", noise_fn)
        ask = lambda z, level: evaluate(params, z, jnp.asarray(grid.time[level], z.dtype), cond)  # noqa: E731
        scale, slope = move_coefficients(grid, np.array(0), np.array(1))
        states, slopes = [z, _scaled(scale, z) + _scaled(slope, ask(z, 0))], []
        for steps in range(2, k):
            a, c = _rule(sigma_bar(grid), grid.alpha, 1, steps)
            slopes.append(ask(states[-1], steps - 1))
            known = sum(map(_scaled, [*a[:-1], *c], states[1:] + slopes), jnp.zeros_like(z))
            states.append(_scaled(1 / a[-1], states[0] - known))
        state = MultistepState(z=jnp.stack(states), eps=jnp.stack(slopes) if slopes else jnp.zeros((0, *z.shape), z.dtype))
    return _run("multistep_encode", noise_fn, params, state, grid, coeffs, cond, levels, gradient, down=False)


def multistep_decode(
    noise_fn: NoiseFn,
    params: Any,
    state: MultistepState,
    grid: Grid,
    *,
    k: int,
    cond: Any = None,
    num_levels: int | None = None,
    gradient: str = "autodiff",
) -> MultistepState:
    """A state whose highest level is M (N by default) to data, the exact inverse of `multistep_encode`; arguments as there."""
    coeffs = multistep_coefficients(grid, k)
    grid = checked("multistep_decode", grid, strict=True)
    levels = climbed("multistep_decode", num_levels, grid, lowest=k)
    state = MultistepState(*(dtypes.at_least_float32(x) for x in state))
    return _run("multistep_decode", noise_fn, params, state, grid, coeffs, cond, levels, gradient, down=True)


def _scaled(weight: ArrayLike, x: jax.Array) -> jax.Array:
    return jnp.asarray(weight, x.dtype) * x


def _run(
    function: str,
    noise_fn: NoiseFn,
    params: Any,
    state: MultistepState,
    grid: Grid,
    coeffs: MultistepCoeffs,
    cond: Any,
    levels: int,
    gradient: str,
    *,
    down: bool,
) -> MultistepState:
    k = coeffs.a.shape[1]
    expected = (k, *state.z.shape[1:]), (k - 2, *state.z.shape[1:])
    if (state.z.shape, state.eps.shape) != expected:
        raise ValueError(f"{function}: 'state' has shapes {state.z.shape} and {state.eps.shape}, expected [{k} ...] and [{k - 2} ...]")
    evaluate = evaluator(function, noise_fn)
    row = np.arange(levels + 1 - k)  # row r steps from lowest level r + 1 down to r
    row = row[::-1] if down else row
    times = grid.time[row + 1], grid.time[row + k - 1]  # of the state that is new to each direction
    xs = tuple(jnp.asarray(x, state.z.dtype) for x in (*times, coeffs.a[row], coeffs.c[row]))

    def combine(weights: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.tensordot(weights, values, axes=1, precision=jax.lax.Precision.HIGHEST)

    def down_step(bundle: Any, state: MultistepState, x: Any) -> MultistepState:
        t, _, a, c = x
        eps = jnp.concatenate([evaluate(bundle[0], state.z[0], t, bundle[1])[None], state.eps])
        new = combine(a, state.z) + combine(c, eps)
        return MultistepState(z=jnp.concatenate([new[None], state.z[:-1]]), eps=eps[:-1])

    def up_step(bundle: Any, state: MultistepState, x: Any) -> MultistepState:
        _, t, a, c = x
        eps = jnp.concatenate([state.eps, evaluate(bundle[0], state.z[-1], t, bundle[1])[None]])
        new = (state.z[0] - combine(a[:-1], state.z[1:]) - combine(c, eps)) / a[-1]
        return MultistepState(z=jnp.concatenate([state.z[1:], new[None]]), eps=eps[1:])

    rules = (down_step, up_step) if down else (up_step, down_step)
    return loop.run(function, *rules, (params, cond), state, xs, gradient=gradient)
