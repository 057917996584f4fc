"""BDIA-DDIM and O-BELM: the exactly invertible two-step samplers (the heart of the paper).

    sampling   z_{i-1} = A_i z_{i+1} + B_i z_i + C_i eps(z_i, t_i)
    inversion  z_{i+1} = (z_{i-1} - B_i z_i - C_i eps(z_i, t_i)) / A_i

One network evaluation per step, at the same point in both directions. BDIA and O-BELM differ in the table (A, B, C) only. A state is the PAIR
of two neighbouring levels: without the second one the inversion is not exact.
"""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from janax.algorithms.bdia import diagnostics, loop
from janax.algorithms.bdia.grid import Grid, checked, climbed, move_coefficients, sigma_bar
from janax.algorithms.bdia.prediction import NoiseFn, evaluator
from janax.jaxlib_ext import checks, dtypes

__all__ = [
    "COORDS",
    "BdiaCoeffs",
    "BdiaState",
    "EditInfo",
    "belm_coefficients",
    "coefficients",
    "decode",
    "edit",
    "encode",
    "sample",
    "step",
    "unstep",
]

COORDS = ("vp", "ve", "native")


class BdiaState(NamedTuple):
    """Two neighbouring diffusion states; exact inversion needs both.

    Attributes:
      z_i: [...] state at level i (i = 0 is data, i = N is noise).
      z_ip1: [...] state at level i + 1.
    """

    z_i: jax.Array
    z_ip1: jax.Array


class BdiaCoeffs(NamedTuple):
    """The three-term table; row k belongs to level i = k + 1.

    Attributes:
      a: [N-1] weight of z_{i+1}; > 0 where the step is to be inverted.
      b: [N-1] weight of z_i.
      c: [N-1] weight of eps(z_i, t_i).
    """

    a: ArrayLike
    b: ArrayLike
    c: ArrayLike


class EditInfo(NamedTuple):
    """What a round trip reports.

    Attributes:
      encoded: The pair at levels (M - 1, M).
      latent_rms: [] root mean square of the encoded state, float32 or wider; far from sqrt(alpha_M^2 E x^2 + sigma_M^2) tells of an
        encoding that has left the prior (a large guidance weight) or blown up (a gamma that is too small).
      finite: [] whether every value of the result is finite.
    """

    encoded: BdiaState
    latent_rms: jax.Array
    finite: jax.Array


def coefficients(grid: Grid, gamma: ArrayLike, *, coords: str = "vp") -> BdiaCoeffs:
    """The BDIA table, from alpha and sigma alone, in float64.

      A_i = gamma_i w_i
      B_i = alpha_{i-1}/alpha_i - A_i alpha_{i+1}/alpha_i
      C_i = (sigma_{i-1} - alpha_{i-1}/alpha_i sigma_i) - A_i (sigma_{i+1} - alpha_{i+1}/alpha_i sigma_i)

    gamma = 0 is DDIM (not invertible); gamma = 1 a leapfrog, second order on smooth grids, without any damping. Few steps or data near a thin
    manifold want a small gamma, many steps or smooth data allow 1; for inversion 0.9 to 1 (see `diagnostics.minimum_gamma`).

    BDIA depends on the scaling of the state in which it is applied, which w_i expresses for a state kept in the grid's own scaling:
      vp      w_i = s_{i-1}/s_{i+1}, s = sqrt(alpha^2 + sigma^2)   as if z/s were integrated; smaller error and rounding on EDM grids; default
      ve      w_i = alpha_{i-1}/alpha_{i+1}                        as if z/alpha were integrated
      native  w_i = 1                                              the grid's own: equal to vp on VP grids and to ve on EDM grids

    Args:
      grid: N + 1 levels.
      gamma: Scalar, or [N-1] with gamma[k] for level k + 1; in [0, 1] as a constant. A traced gamma is allowed (no recompilation over a
        sweep, `vmap` over gammas works), and then computed in its own dtype.
      coords: Static.

    Returns:
      (A, B, C), each [N-1]; float64 NumPy unless gamma is a JAX array.

    Raises:
      ValueError: if gamma lies outside [0, 1], has a wrong shape, or the grid is not monotone.

    Reference: Zhang et al., arXiv:2307.10829; in this form arXiv:2410.07273, eq. 24-25.
    """
    grid = checked("coefficients", grid, invertible_top=False)
    checks.one_of("coefficients", "coords", coords, COORDS)
    if np.ndim(gamma) > 1 or (np.ndim(gamma) == 1 and np.shape(gamma) != (grid.num_steps - 1,)):
        raise ValueError(f"coefficients: 'gamma' has shape {np.shape(gamma)}, expected [] or [{grid.num_steps - 1}], one per level 1..N-1")
    if checks.is_concrete(gamma):
        values = np.asarray(gamma)
        if np.any(~((values >= 0) & (values <= 1))):
            raise ValueError(f"coefficients: 'gamma' is {values[~((values >= 0) & (values <= 1))].ravel()[0]}, expected within [0, 1]")
    scale = {"vp": np.hypot(grid.alpha, grid.sigma), "ve": grid.alpha, "native": np.ones_like(grid.alpha)}[coords]
    if scale[-1] == 0:
        raise ValueError("coefficients: coords='ve' divides by alpha, which is 0 at the top level; use coords='vp' or clip the grid")
    if isinstance(gamma, jax.Array):
        gamma = dtypes.at_least_float32(gamma)
        return _table(grid, gamma * jnp.asarray(scale[:-2] / scale[2:], gamma.dtype))
    return _table(grid, np.asarray(gamma, np.float64) * (scale[:-2] / scale[2:]))


def belm_coefficients(grid: Grid) -> BdiaCoeffs:
    """The O-BELM table: the A_i that cancels the h^2 term of the local error, with h_i = sb_i - sb_{i-1}.

      A_i = (h_i / h_{i+1})^2 alpha_{i-1} / alpha_{i+1}

    Second order on any grid and without a hyperparameter; the same as BDIA with gamma_i = A_i in the grid's own coordinates. A_i may exceed 1
    (it does in 22 of 49 steps on the usual linspace grid), which amplifies in the sampling direction.

    Args:
      grid: N + 1 levels, all different.

    Returns:
      (A, B, C), each [N-1], float64 NumPy.

    Raises:
      ValueError: if a level is repeated (h_i = 0) or the top level has alpha 0.

    Reference: Wang et al., arXiv:2410.07273, eq. 18-19 (O-BELM).
    """
    grid = checked("belm_coefficients", grid, strict=True)
    h = np.diff(sigma_bar(grid))
    return _table(grid, np.square(h[:-1] / h[1:]) * grid.alpha[:-2] / grid.alpha[2:])


def _table(grid: Grid, a: Any) -> BdiaCoeffs:
    """B and C follow from A: z_{i-1} = A [z_{i+1} - Move(z_i; i -> i+1)] + Move(z_i; i -> i-1)."""
    level = np.arange(1, grid.num_steps)
    down_z, down_eps = move_coefficients(grid, level, level - 1)
    up_z, up_eps = move_coefficients(grid, level, level + 1)
    if isinstance(a, jax.Array):
        down_z, down_eps, up_z, up_eps = (jnp.asarray(x, a.dtype) for x in (down_z, down_eps, up_z, up_eps))
    return BdiaCoeffs(a=a, b=down_z - a * up_z, c=down_eps - a * up_eps)


def step(state: BdiaState, eps_i: jax.Array, coeffs_i: BdiaCoeffs) -> BdiaState:
    """One sampling step, level i to i - 1: z_{i-1} = a_i z_{i+1} + b_i z_i + c_i eps_i.

    Args:
      state: The pair (z_i, z_{i+1}).
      eps_i: [...] predicted noise at (z_i, t_i), guidance already applied.
      coeffs_i: Scalars (a_i, b_i, c_i), each [], one row of the table.

    Returns:
      The pair (z_{i-1}, z_i), in the state's dtype.

    Raises:
      ValueError: if the arrays differ in shape, or the state is not a pair.

    Reference: Zhang et al., arXiv:2307.10829; in this form arXiv:2410.07273, eq. 24.
    """
    z_i, z_ip1 = _pair("step", state)
    checks.check_shapes("step", z_i=(z_i, "..."), z_ip1=(z_ip1, "..."), eps_i=(eps_i, "..."))
    a_i, b_i, c_i = (jnp.asarray(x).astype(z_i.dtype) for x in coeffs_i)
    return BdiaState(z_i=a_i * z_ip1 + b_i * z_i + c_i * eps_i.astype(z_i.dtype), z_ip1=z_i)


def unstep(state: BdiaState, eps_i: jax.Array, coeffs_i: BdiaCoeffs) -> BdiaState:
    """The inverse of `step`, level i to i + 1: z_{i+1} = (z_{i-1} - b_i z_i - c_i eps_i) / a_i.

    Args:
      state: The pair (z_{i-1}, z_i).
      eps_i: [...] predicted noise at (z_i, t_i): the very same evaluation as in `step`.
      coeffs_i: Scalars (a_i, b_i, c_i); a_i = 0 gives inf or nan.

    Returns:
      The pair (z_i, z_{i+1}).

    Raises:
      ValueError: if the arrays differ in shape, or the state is not a pair.

    Reference: arXiv:2410.07273, eq. 25.
    """
    z_im1, z_i = _pair("unstep", state)
    checks.check_shapes("unstep", z_im1=(z_im1, "..."), z_i=(z_i, "..."), eps_i=(eps_i, "..."))
    a_i, b_i, c_i = (jnp.asarray(x).astype(z_i.dtype) for x in coeffs_i)
    return BdiaState(z_i=z_i, z_ip1=(z_im1 - b_i * z_i - c_i * eps_i.astype(z_i.dtype)) / a_i)


def sample(
    noise_fn: NoiseFn,
    params: Any,
    z_N: jax.Array,
    grid: Grid,
    coeffs: BdiaCoeffs,
    *,
    cond: Any = None,
    z_Nm1: jax.Array | None = None,
    gradient: str = "autodiff",
) -> BdiaState:
    """Noise to data. The first step is plain DDIM, then the three-term rule; N network evaluations.

    Args:
      noise_fn: (params, z, t, cond) -> eps; t is a scalar of the grid's `time`. Static.
      params: Its parameters.
      z_N: [...] noise at the top level, sigma_N times a standard normal if variance exploding.
      grid: N + 1 levels.
      coeffs: Table of `coefficients` or `belm_coefficients`.
      cond: Passed on to the network; left out of its call if None.
      z_Nm1: [...] the state at level N - 1, to replace the DDIM step (e.g. by a better first step).
      gradient: "autodiff" stores every state; "reversible" rebuilds them, in memory independent of N, with respect to params, z_N, cond and
        coeffs (reverse mode only). Static.

    Returns:
      The pair (z_0, z_1) in the dtype of z_N; hand both to `encode` to return to the noise.

    Raises:
      ValueError: on wrong shapes, or gradient="reversible" with a table whose inverse the dtype does not bear.

    Reference: Zhang et al., arXiv:2307.10829 and BDIAddim.py of the repository (start-up).
    """
    grid = checked("sample", grid, invertible_top=z_Nm1 is None)
    dtype, z_N = z_N.dtype, dtypes.at_least_float32(z_N)
    if z_Nm1 is None:
        top = grid.num_steps
        scale, slope = move_coefficients(grid, np.array(top), np.array(top - 1))
        eps = evaluator("sample", noise_fn)(params, z_N, jnp.asarray(grid.time[top], z_N.dtype), cond)
        z_Nm1 = jnp.asarray(scale, z_N.dtype) * z_N + jnp.asarray(slope, z_N.dtype) * eps
    checks.check_shapes("sample", z_N=(z_N, "..."), z_Nm1=(z_Nm1, "..."))
    state = BdiaState(z_i=z_Nm1.astype(z_N.dtype), z_ip1=z_N)
    state = _run("sample", noise_fn, params, state, grid, coeffs, cond, levels=grid.num_steps, down=True, gradient=gradient)
    return BdiaState(*(z.astype(dtype) for z in state))


def encode(
    noise_fn: NoiseFn,
    params: Any,
    z_0: jax.Array | BdiaState,
    grid: Grid,
    coeffs: BdiaCoeffs,
    *,
    cond: Any = None,
    num_levels: int | None = None,
    gradient: str = "autodiff",
    unstable: str = "warn",
) -> BdiaState:
    """Data to noise, the exact inverse of `decode`.

    z_1 is one DDIM-inversion step from z_0 (or given), then the inverse rule for i = 1..M-1; M network evaluations.

    Args:
      noise_fn: As in `sample`; the same function, conditions and weights as in the other direction, without clipping of x0 or dropout. Static.
      params: Its parameters.
      z_0: [...] data, or the pair (z_0, z_1) that `sample` and `decode` return, to go back the way it came.
      grid: N + 1 levels.
      coeffs: Table with a > 0.
      cond: Passed on to the network.
      num_levels: M in 2..N, N by default: how far to go. Static.
      gradient: "autodiff" or "reversible", see `sample`. Static.
      unstable: What to do if undoing the table in this dtype would amplify rounding errors beyond 1e-3 of the state: "warn", "raise" or
        "ignore". Known only for a table that is not traced. Static.

    Returns:
      The pair (z_{M-1}, z_M), in float32 or wider whatever came in: the pair is what has to be exact. Keep BOTH. nan in z_0 gives nan.

    Raises:
      ValueError: on wrong shapes, nan in a concrete z_0, an a_i that is not positive, or (unstable="raise") a gamma too small for N and dtype.

    Reference: arXiv:2410.07273, eq. 25; start-up as in the official repository. The BELM repository drops eps from the first step (its issue
    13), which biases the latents; this is not reproduced.
    """
    grid = checked("encode", grid, invertible_top=False)
    levels = climbed("encode", num_levels, grid, lowest=2)
    checks.one_of("encode", "unstable", unstable, ("warn", "raise", "ignore"))
    rows = _rows("encode", coeffs, grid, levels)
    if checks.is_concrete(rows.a) and not np.all(np.asarray(rows.a) > 0):
        level = int(np.argmax(~(np.asarray(rows.a) > 0))) + 1
        raise ValueError(
            f"encode: 'coeffs' has a = {float(np.asarray(rows.a)[level - 1]):g} at level {level}, which cannot be inverted; "
            "use gamma in (0, 1] (gamma = 0 is DDIM: see ddim_invert or fixed_point_invert)"
        )
    if isinstance(z_0, tuple):
        state = BdiaState(*(dtypes.at_least_float32(z) for z in _pair("encode", z_0)))
        checks.check_shapes("encode", z_0=(state.z_i, "..."), z_1=(state.z_ip1, "..."))
        checks.require_finite("encode", z_0=state.z_i, z_1=state.z_ip1)
    else:
        checks.require_finite("encode", z_0=z_0)
        z_0 = dtypes.at_least_float32(z_0)
        scale, slope = move_coefficients(grid, np.array(0), np.array(1))
        eps = evaluator("encode", noise_fn)(params, z_0, jnp.asarray(grid.time[0], z_0.dtype), cond)
        state = BdiaState(z_i=z_0, z_ip1=jnp.asarray(scale, z_0.dtype) * z_0 + jnp.asarray(slope, z_0.dtype) * eps)
    if unstable != "ignore" and checks.is_concrete(rows.a):
        amplification = float(diagnostics.amplification(rows, Grid(*(x[: levels + 1] for x in grid))).encode)
        if amplification * float(jnp.finfo(state.z_i.dtype).eps) > 1e-3:
            sentence = (
                f"encode: {levels} levels with this gamma amplify rounding errors {amplification:.1e} times, too much for {state.z_i.dtype}; "
                f"use gamma >= {diagnostics.minimum_gamma(levels, state.z_i.dtype):.2f}, fewer levels, or float64"
            )
            if unstable == "raise":
                raise ValueError(sentence)
            warnings.warn(sentence, stacklevel=2)
    return _run("encode", noise_fn, params, state, grid, rows, cond, levels=levels, down=False, gradient=gradient)


def decode(
    noise_fn: NoiseFn,
    params: Any,
    state: BdiaState,
    grid: Grid,
    coeffs: BdiaCoeffs,
    *,
    cond: Any = None,
    num_levels: int | None = None,
    gradient: str = "autodiff",
) -> BdiaState:
    """A pair of noisy states to data, the exact inverse of `encode`; M - 1 network evaluations.

    Args:
      noise_fn: As in `sample`. Static.
      params: Its parameters.
      state: The pair (z_{M-1}, z_M).
      grid: N + 1 levels.
      coeffs: The same table as for `encode`.
      cond: Passed on to the network; another one than at encoding makes an edit.
      num_levels: M in 2..N, N by default; the one given to `encode`. Static.
      gradient: "autodiff" or "reversible", see `sample`. Static.

    Returns:
      The pair (z_0, z_1), in the dtype of the state.

    Raises:
      ValueError: if the second state is missing, or on wrong shapes.
    """
    grid = checked("decode", grid, invertible_top=False)
    levels = climbed("decode", num_levels, grid, lowest=2)
    state = _pair("decode", state)
    dtype = state.z_i.dtype
    checks.check_shapes("decode", z_i=(state.z_i, "..."), z_ip1=(state.z_ip1, "..."))
    state = BdiaState(*(dtypes.at_least_float32(z) for z in state))
    state = _run("decode", noise_fn, params, state, grid, coeffs, cond, levels=levels, down=True, gradient=gradient)
    return BdiaState(*(z.astype(dtype) for z in state))


def edit(
    noise_fn: NoiseFn,
    params: Any,
    z_0: jax.Array,
    grid: Grid,
    coeffs: BdiaCoeffs,
    *,
    source: Any,
    target: Any,
    strength: float = 0.8,
) -> tuple[jax.Array, EditInfo]:
    """Round-trip editing: encode under one condition, decode under another, through the exact pair.

    M = int(N strength) levels up with `source`, down with `target`, same guidance weight and table both ways. `source` equal to `target` gives
    z_0 back to rounding.

    Args:
      noise_fn: As in `sample`; for guidance `guided(noise_fn)` with `Guidance` conditions. Static.
      params: Its parameters.
      z_0: [...] data (in latent models: a sample of the autoencoder's posterior).
      grid: N + 1 levels; the published settings use N = 50.
      coeffs: Table with a > 0; gamma 0.94 in the official notebook, 0.92 to 1 recommended.
      source: Condition that describes z_0.
      target: Condition that describes the wish.
      strength: Share of the levels to climb, in (0, 1]; 0.8 in the official code. Static.

    Returns:
      The edited z_0 [...] and `EditInfo`.

    Raises:
      ValueError: as `encode`, or on a strength that gives fewer than two levels.

    Reference: the official repository's BDIA_editing (arXiv:2307.10829).
    """
    grid = checked("edit", grid, invertible_top=False)
    if not 0 < strength <= 1 or int(grid.num_steps * strength) < 2:
        raise ValueError(f"edit: 'strength' is {strength}, expected within (0, 1] and at least two of the {grid.num_steps} levels")
    levels = int(grid.num_steps * strength)
    encoded = encode(noise_fn, params, z_0, grid, coeffs, cond=source, num_levels=levels)
    decoded = decode(noise_fn, params, encoded, grid, coeffs, cond=target, num_levels=levels)
    info = EditInfo(
        encoded=encoded,
        latent_rms=jnp.sqrt(jnp.mean(jnp.square(encoded.z_ip1))),
        finite=jnp.all(jnp.isfinite(decoded.z_i)) & jnp.all(jnp.isfinite(encoded.z_ip1)),
    )
    return decoded.z_i.astype(z_0.dtype), info


def _pair(function: str, state: Any) -> BdiaState:
    if not isinstance(state, tuple) or len(state) != 2 or any(z is None for z in state):
        raise ValueError(
            f"{function}: 'state' must be the pair BdiaState(z_i, z_ip1) of two neighbouring levels, got {type(state).__name__}; "
            "exact inversion needs both states, so keep what encode and sample return"
        )
    return BdiaState(*state)


def _rows(function: str, coeffs: BdiaCoeffs, grid: Grid, levels: int) -> BdiaCoeffs:
    """The rows of levels 1..M-1; rows for M-1 levels are taken as they are."""
    if not isinstance(coeffs, tuple) or len(coeffs) != 3:
        raise ValueError(
            f"{function}: 'coeffs' must be BdiaCoeffs(a, b, c) from coefficients or belm_coefficients, got {type(coeffs).__name__}"
        )
    length = checks.check_shapes(function, a=(coeffs[0], "rows"), b=(coeffs[1], "rows"), c=(coeffs[2], "rows"))["rows"]
    if length not in (grid.num_steps - 1, levels - 1):
        raise ValueError(f"{function}: 'coeffs' has {length} rows, expected {grid.num_steps - 1}, one per level 1..N-1 of 'grid'")
    return BdiaCoeffs(*(x[: levels - 1] for x in coeffs))  # type: ignore[index]


def _run(
    function: str,
    noise_fn: NoiseFn,
    params: Any,
    state: BdiaState,
    grid: Grid,
    coeffs: BdiaCoeffs,
    cond: Any,
    *,
    levels: int,
    down: bool,
    gradient: str,
) -> BdiaState:
    """The scan over levels M-1..1 (down: `step`) or 1..M-1 (up: `unstep`)."""
    dtype = state.z_i.dtype
    rows = _rows(function, coeffs, grid, levels)
    order = slice(None, None, -1) if down else slice(None)
    xs = (jnp.asarray(grid.time[1:levels][order], dtype), BdiaCoeffs(*(jnp.asarray(x[order]).astype(dtype) for x in rows)))  # type: ignore[index]
    evaluate = evaluator(function, noise_fn)
    forward, backward = (step, unstep) if down else (unstep, step)

    def apply(rule: Any, pivot: str) -> Any:
        def apply_rule(bundle: Any, state: BdiaState, x: Any) -> BdiaState:
            params, cond = bundle
            t, coeffs_i = x
            return rule(state, evaluate(params, getattr(state, pivot), t, cond), coeffs_i)

        return apply_rule

    # Both rules evaluate the network at the state that they share: z_i is the lower of the pair before `step` and the upper one after it.
    before, after = ("z_i", "z_ip1") if down else ("z_ip1", "z_i")

    def unstep_vjp(bundle: Any, new_state: BdiaState, x: Any, cotangent: BdiaState) -> Any:
        t, coeffs_i = x
        z_i = getattr(new_state, after)
        eps, pull_network = jax.vjp(lambda bundle, z, t: evaluate(bundle[0], z, t, bundle[1]), bundle, z_i, t)
        old_state = backward(new_state, eps, coeffs_i)
        _, pull_rule = jax.vjp(forward, old_state, eps, coeffs_i)
        to_state, to_eps, to_coeffs = pull_rule(cotangent)
        to_bundle, to_z, to_t = pull_network(to_eps)
        to_state = to_state._replace(**{before: getattr(to_state, before) + to_z})
        return old_state, (to_bundle, to_state, (to_t, to_coeffs))

    amplification = None
    if checks.is_concrete(rows.a):
        report = diagnostics.amplification(rows, Grid(*(x[: levels + 1] for x in grid)))
        amplification = float(report.encode if down else report.decode)
    return loop.run(
        function,
        apply(forward, before),
        apply(backward, after),
        (params, cond),
        state,
        xs,
        gradient=gradient,
        unstep_vjp=unstep_vjp,
        amplification=amplification,
    )
