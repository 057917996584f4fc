"""Optimal transport with entropy: log-domain Sinkhorn and its derivatives, balanced or not, one problem or many at once.

    out = transport.sinkhorn(cost, epsilon=0.1, num_iters=20)                        # cost [... n m]; uniform weights
    out.cost, out.f, out.g, out.error, out.iterations, out.converged
    plan = transport.plan(cost, out.f, out.g, epsilon=0.1)

    transport.sinkhorn(cost, log_a, log_b, epsilon=0.1, num_iters=500, tolerance=1e-4, derivative="implicit")
    transport.sinkhorn_points(x, y, epsilon=0.1, num_iters=100)                      # [n m] is never held
    transport.sinkhorn_divergence(cost_xy, cost_xx, cost_yy, epsilon=0.1, num_iters=500, tolerance=1e-6)

Leading axes are problems, solved together in one vectorised loop; an axis of `jax.vmap` becomes one of them. With a tolerance the loop lasts
as long as the slowest problem; the others keep what they had when they reached it, and `iterations` tells each one's number. With a fixed
number of iterations nobody waits.

Four derivatives, with respect to the cost (or the points) and the log weights; epsilon, rho and the other numbers are held constant except
in "unrolled":

    exact       of the iterations as they were made, without storing them: O(T (n + m)) memory for T of them, equal to "unrolled" up to rounding
    implicit    of the fixed point, whatever led there: right when `error` is small; memory does not depend on T
    envelope    potentials held constant: `regularized` has its true gradient (the plan) when `error` is small; `cost` has the plan as gradient,
                as if the plan did not depend on the cost
    unrolled    by autodiff through every iteration: O(T n m) memory, for comparison and for gradients of the hyperparameters

Speed and memory: benchmarks/transport.py.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import dtypes
from janax.jaxlib_ext.checks import check_shapes, one_of
from janax.jaxlib_ext.transport import derivatives, sums
from janax.jaxlib_ext.transport.closed_forms import l1_two_classes, wasserstein_1d
from janax.jaxlib_ext.transport.costs import hellinger, l1, squared_euclidean
from janax.jaxlib_ext.transport.iterations import log_updates, residual, symmetric_potential
from janax.jaxlib_ext.transport.sums import CostFn

__all__ = [
    "DERIVATIVES",
    "CostFn",
    "SinkhornDivergence",
    "SinkhornOutput",
    "best_relaxation",
    "hellinger",
    "l1",
    "l1_two_classes",
    "plan",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_points",
    "squared_euclidean",
    "wasserstein_1d",
]

DERIVATIVES = ("exact", "implicit", "unrolled", "envelope")
_CONVERGED = 1e-3


class SinkhornOutput(NamedTuple):
    """How far the iterations came, and what they give; float32 or wider.

    The plan is P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon).

    Attributes:
      f: [... n] potential of the rows, in units of the cost; 0 for a row without weight.
      g: [... m] potential of the columns.
      cost: [...] sum_ij P_ij C_ij, the transport cost without the entropy.
      regularized: [...] the dual value. Balanced: <f, a> + <g, b>, which at convergence is sum_ij P_ij C_ij + epsilon KL(P | a b^T). Unbalanced:
        -rho <a, exp(-f / rho) - 1> - rho <b, exp(-g / rho) - 1> - epsilon (sum P - sum a sum b), which at convergence is
        <P, C> + epsilon KL(P | a b^T) + rho KL(P 1 | a) + rho KL(P^T 1 | b) with KL(p | q) = sum p log(p / q) - p + q.
      error: [...] sum_i |(P 1)_i - a_i|, the l1 violation of the row marginals. (The columns are met, up to rounding, as g is updated last;
        with over-relaxation their violation is added.) Unbalanced: the same of the plan that the next update of f would restore. No gradient.
      iterations: [...] int32, the number made.
      converged: [...] whether `error` is at most `tolerance`, or, where none was given, at most 1e-3 of the mass.
    """

    f: jax.Array
    g: jax.Array
    cost: jax.Array
    regularized: jax.Array
    error: jax.Array
    iterations: jax.Array
    converged: jax.Array


class SinkhornDivergence(NamedTuple):
    """The debiased value and how its three problems ended.

    Attributes:
      value: [...] OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2, with regularised values.
      error: [...] the largest of the three marginal errors.
      iterations: [...] int32, the largest of the three numbers.
      converged: [...] whether all three have.
    """

    value: jax.Array
    error: jax.Array
    iterations: jax.Array
    converged: jax.Array


def sinkhorn(
    cost: ArrayLike,
    log_a: ArrayLike | None = None,
    log_b: ArrayLike | None = None,
    *,
    epsilon: ArrayLike,
    num_iters: int,
    tolerance: ArrayLike | None = None,
    derivative: str = "exact",
    rho: ArrayLike | None = None,
    relaxation: ArrayLike | None = None,
    epsilon_start: ArrayLike | None = None,
    epsilon_decay: ArrayLike = 0.7,
    reference: str = "product",
    check_every: int = 10,
    domain: str = "auto",
) -> SinkhornOutput:
    """Entropic optimal transport between two histograms, or many pairs of them.

    min over P of <P, C> + epsilon KL(P | a b^T) with row sums a and column sums b, by alternating, f first,

        f_i = -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon),      g_j = -epsilon log sum_i a_i exp((f_i - C_ij) / epsilon)

    from g = 0. Numbers among the options may be scalars or one per problem.

    Weights of 1 for every point (`log_a` and `log_b` zeros, n = m) are the unit masses of kernel normalisation: dividing exp(-C / epsilon)
    by its row sums, then by its column sums, `num_iters` times gives the same plans, and `cost` is then a sum over n rows instead of a mean.

    Args:
      cost: [... n m] ground cost. Entries in a row or column without weight do not matter, not even nan; others must be finite.
      log_a: [... n] log weights of the rows; uniform, summing to one in probability, if None. -inf masks a row: its potential is 0, its part
        of the plan and of all gradients exactly 0. A problem without any weight on one side has potentials and costs 0.
      log_b: [... m] log weights of the columns, of the same sum (else a balanced problem has no solution and the potentials drift).
      epsilon: [] or [...] regularisation, in units of the cost, > 0. Traced.
      num_iters: Number of iterations, each of both updates; with a tolerance the largest number. Static.
      tolerance: [] or [...] `error` at which a problem stops. None for exactly `num_iters`. Traced.
      derivative: "exact", "implicit", "unrolled" or "envelope"; see the module. Static. Under "implicit" the derivative of a balanced
        problem's potentials is that of the ones with <f, a> = 0, and weights are taken to change at constant mass.
      rho: [] or [...] > 0: penalties rho KL(P 1 | a) + rho KL(P^T 1 | b) instead of the constraints; None for the constraints. Traced.
      relaxation: [] or [...] w in (0, 2): each update becomes (1 - w) old + w new. Above 1 it is faster near the solution; see `best_relaxation`.
        None for 1. Traced.
      epsilon_start: [] or [...] the first regularisation of a falling sequence, step t using max(epsilon, epsilon_start epsilon_decay^t);
        good: the largest cost. None for none. Traced.
      epsilon_decay: [] or [...] in (0, 1). Traced.
      reference: "product": entropy relative to a b^T. "counting": relative to the counting measure, sum_ij P_ij (log P_ij - 1); for a balanced
        problem the plans are the same. Potentials are those of the product form either way. Static.
      check_every: Iterations between two tests of `tolerance`. Static.
      domain: "log": a log-sum-exp per update, safe for any epsilon. "kernel": exp(-C / epsilon) is made once; several times faster, overflows
        for small epsilon. "auto": the kernel where it is safe (the largest |C| / epsilon at most 60 in float32 and 600 in float64, log
        weights above minus that, and the potentials found likewise) for all problems of the call, else logarithms. Static.

    Returns:
      Potentials, costs and how the solver ended. The time is O(num_iters n m).

    Raises:
      ValueError: on shapes that do not agree or a static argument out of range.

    Reference: Cuturi, arXiv:1306.0895; unbalanced: Chizat et al., arXiv:1607.05816; in SinKD (arXiv:2402.17110) as kernel normalisation.
    """
    name = "sinkhorn"
    axes = check_shapes(name, cost=(cost, "... n m"), log_a=(log_a, "... n"), log_b=(log_b, "... m"))
    spec = _spec(name, num_iters, tolerance, derivative, rho, relaxation, epsilon_start, reference, check_every, domain)
    cost = jnp.asarray(cost)
    wide = _wide(cost, log_a, log_b)
    cost = cost.astype(wide)
    if not axes["n"] or not axes["m"]:
        raise ValueError(f"{name}: 'cost' has shape {cost.shape}, expected at least one row and one column")
    on_rows, on_cols = (jnp.zeros_like(jnp.max(cost, axis=axis)) for axis in (-1, -2))  # placed as the cost
    log_a, log_b = _log_weights(log_a, on_rows), _log_weights(log_b, on_cols)
    live = ~jnp.isneginf(log_a)[..., :, None] & ~jnp.isneginf(log_b)[..., None, :]
    cost = jnp.where(live, cost, jnp.zeros_like(cost))
    hyper = _hyper(name, jnp.zeros_like(jnp.max(cost, axis=(-2, -1))), epsilon, rho, relaxation, tolerance, epsilon_start, epsilon_decay)
    return _solve(spec, (cost,), log_a, log_b, hyper)


def sinkhorn_points(
    x: ArrayLike,
    y: ArrayLike,
    log_a: ArrayLike | None = None,
    log_b: ArrayLike | None = None,
    *,
    cost_fn: CostFn = squared_euclidean,
    block: int = 256,
    epsilon: ArrayLike,
    num_iters: int,
    tolerance: ArrayLike | None = None,
    derivative: str = "exact",
    rho: ArrayLike | None = None,
    relaxation: ArrayLike | None = None,
    epsilon_start: ArrayLike | None = None,
    epsilon_decay: ArrayLike = 0.7,
    reference: str = "product",
    check_every: int = 10,
) -> SinkhornOutput:
    """`sinkhorn` between sets of points, for supports too large for their cost matrix: every update makes the cost again, tile by tile.

    Memory O(block m + T (n + m)), in both directions ("unrolled" excepted). Always in the log domain. Gradients go to x and y, with those
    of "exact" differentiating each tile once per update, those of the other two once.

    Args:
      x: [... n d] points. Masked ones (log weight -inf) must be finite.
      y: [... m d] points.
      log_a: [... n] as in `sinkhorn`.
      log_b: [... m] as in `sinkhorn`.
      cost_fn: (x [... k d], y [... m d]) -> C [... k m], differentiable; `squared_euclidean`, `l1`, `hellinger` or the caller's. Static.
      block: Rows of a tile; the walk is over x, so a mesh should shard y or leading axes. Static.
      epsilon: As in `sinkhorn`, like all that follow.
      num_iters: As there. Static.
      tolerance: As there.
      derivative: As there. Static.
      rho: As there.
      relaxation: As there.
      epsilon_start: As there.
      epsilon_decay: As there.
      reference: As there. Static.
      check_every: As there. Static.

    Returns:
      As `sinkhorn`.

    Raises:
      ValueError: as `sinkhorn`, and if `block` is below one.
    """
    name = "sinkhorn_points"
    axes = check_shapes(name, x=(x, "... n d"), y=(y, "... m d"), log_a=(log_a, "... n"), log_b=(log_b, "... m"))
    spec = _spec(name, num_iters, tolerance, derivative, rho, relaxation, epsilon_start, reference, check_every, "log")
    if block < 1:
        raise ValueError(f"{name}: 'block' is {block}, expected at least 1")
    if not axes["n"] or not axes["m"]:
        raise ValueError(f"{name}: 'x' and 'y' have shapes {jnp.shape(x)} and {jnp.shape(y)}, expected at least one point each")
    spec = spec._replace(cost_fn=cost_fn, block=block)
    x, y = jnp.asarray(x), jnp.asarray(y)
    wide = _wide(x, y, log_a, log_b)
    x, y = x.astype(wide), y.astype(wide)
    on_rows, on_cols = jnp.zeros_like(jnp.sum(x, axis=-1)), jnp.zeros_like(jnp.sum(y, axis=-1))
    log_a, log_b = _log_weights(log_a, on_rows), _log_weights(log_b, on_cols)
    hyper = _hyper(name, jnp.zeros_like(jnp.sum(on_rows, axis=-1)), epsilon, rho, relaxation, tolerance, epsilon_start, epsilon_decay)
    return _solve(spec, (x, y), log_a, log_b, hyper)


def plan(
    cost: ArrayLike, f: ArrayLike, g: ArrayLike, log_a: ArrayLike | None = None, log_b: ArrayLike | None = None, *, epsilon: ArrayLike
) -> jax.Array:
    """P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon); exactly 0 in rows and columns without weight.

    Args:
      cost: [... n m] ground cost.
      f: [... n] potential of the rows.
      g: [... m] potential of the columns.
      log_a: [... n] log weights, as they were given to `sinkhorn`.
      log_b: [... m] log weights.
      epsilon: [] or [...] regularisation. Traced.

    Returns:
      [... n m] float32 or wider.

    Raises:
      ValueError: on shapes that do not agree.
    """
    arguments = {"f": (f, "... n"), "g": (g, "... m"), "log_a": (log_a, "... n"), "log_b": (log_b, "... m")}
    check_shapes("plan", cost=(cost, "... n m"), **arguments)
    wide = _wide(cost, f, g, log_a, log_b)
    cost, f, g = (jnp.asarray(x).astype(wide) for x in (cost, f, g))
    log_a, log_b = _log_weights(log_a, jnp.zeros_like(f)), _log_weights(log_b, jnp.zeros_like(g))
    live = ~jnp.isneginf(log_a)[..., :, None] & ~jnp.isneginf(log_b)[..., None, :]
    epsilon = _per_problem("plan", "epsilon", epsilon, jnp.zeros_like(jnp.sum(f, axis=-1)))
    alpha, beta = sums.exponent(log_a, f, epsilon), sums.exponent(log_b, g, epsilon)
    return jnp.exp(alpha[..., :, None] + beta[..., None, :] - jnp.where(live, cost, jnp.zeros_like(cost)) / epsilon[..., None, None])


def sinkhorn_divergence(
    cost_xy: ArrayLike,
    cost_xx: ArrayLike,
    cost_yy: ArrayLike,
    log_a: ArrayLike | None = None,
    log_b: ArrayLike | None = None,
    *,
    epsilon: ArrayLike,
    num_iters: int,
    tolerance: ArrayLike | None = None,
    rho: ArrayLike | None = None,
    epsilon_start: ArrayLike | None = None,
    epsilon_decay: ArrayLike = 0.7,
    check_every: int = 10,
) -> SinkhornDivergence:
    """Debiased transport: OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 of the regularised values, plus epsilon (sum a - sum b)^2 / 2 if unbalanced.

    Zero where the two weighted sets are equal, positive otherwise for the usual costs; small epsilon gives OT, large epsilon the squared
    maximum mean discrepancy of the kernel -C (half of it, by its usual norm). Entropy is relative to a b^T. The two symmetric problems are
    solved by averaging, f <- (f + update) / 2.

    The derivative is the envelope's, P_xy and -P_xx / 2 with respect to the costs: as accurate as the problems are converged. Where y is a
    constant, pass `jax.lax.stop_gradient(cost_yy)` or a cost made of constants.

    Args:
      cost_xy: [... n m] cost between the sets.
      cost_xx: [... n n] symmetric cost within the first.
      cost_yy: [... m m] symmetric cost within the second.
      log_a: [... n] log weights, as in `sinkhorn`.
      log_b: [... m] log weights.
      epsilon: As in `sinkhorn`, like all that follow.
      num_iters: As there. Static.
      tolerance: As there, for each of the three problems.
      rho: As there.
      epsilon_start: As there.
      epsilon_decay: As there.
      check_every: As there. Static.

    Returns:
      The value and how the solver ended.

    Raises:
      ValueError: as `sinkhorn`.

    Reference: Feydy et al., arXiv:1810.08278; unbalanced: Sejourne et al., arXiv:1910.12958.
    """
    name = "sinkhorn_divergence"
    check_shapes(
        name,
        cost_xy=(cost_xy, "... n m"),
        cost_xx=(cost_xx, "... n n"),
        cost_yy=(cost_yy, "... m m"),
        log_a=(log_a, "... n"),
        log_b=(log_b, "... m"),
    )
    wide = _wide(cost_xy, cost_xx, cost_yy, log_a, log_b)
    cost_xy, cost_xx, cost_yy = (jnp.asarray(x).astype(wide) for x in (cost_xy, cost_xx, cost_yy))
    options: dict[str, Any] = {"tolerance": tolerance, "rho": rho, "epsilon_start": epsilon_start, "check_every": check_every}
    options |= {"epsilon": epsilon, "num_iters": num_iters, "epsilon_decay": epsilon_decay}
    between = sinkhorn(cost_xy, log_a, log_b, derivative="envelope", **options)
    spec = _spec(name, num_iters, tolerance, "envelope", rho, None, epsilon_start, "product", check_every, "log")
    value, error, iterations, converged = between.regularized, between.error, between.iterations, between.converged
    masses = []
    for cost, log_weights in ((cost_xx, log_a), (cost_yy, log_b)):
        log_weights = _log_weights(log_weights, jnp.zeros_like(jnp.max(cost, axis=-1)))
        on = ~jnp.isneginf(log_weights)
        cost = jnp.where(on[..., :, None] & on[..., None, :], cost, jnp.zeros_like(cost))
        hyper = _hyper(name, jnp.zeros_like(jnp.max(cost, axis=(-2, -1))), epsilon, rho, None, tolerance, epsilon_start, epsilon_decay)
        f, made, left = symmetric_potential(spec, (cost,), log_weights, hyper)
        within = _summary(spec, (cost,), log_weights, log_weights, hyper, f, f, made, left)
        value = value - 0.5 * within.regularized
        error, iterations = jnp.maximum(error, left), jnp.maximum(iterations, made)
        converged &= within.converged
        masses.append(jnp.sum(sums.weights(log_weights), axis=-1))
    if rho is not None:
        epsilon = _per_problem(name, "epsilon", epsilon, value)
        value = value + 0.5 * epsilon * jnp.square(masses[0] - masses[1])
    return SinkhornDivergence(value=value, error=error, iterations=iterations, converged=converged)


def best_relaxation(rate: ArrayLike) -> jax.Array:
    """The best constant over-relaxation, w = 2 / (1 + sqrt(1 - rate)), for a problem whose plain iterations converge at `rate`.

    Args:
      rate: [...] ratio of the errors of two successive plain iterations, late in a run; clipped to [0, 1 - 1e-6].

    Returns:
      [...] w in [1, 2).

    Reference: Lehmann et al., arXiv:2012.12562 (successive over-relaxation of Sinkhorn's iterations).
    """
    return 2 / (1 + jnp.sqrt(1 - jnp.clip(dtypes.at_least_float32(rate), 0.0, 1 - 1e-6)))


# --- arguments and results


def _spec(
    name: str,
    num_iters: int,
    tolerance: object,
    derivative: str,
    rho: object,
    relaxation: object,
    epsilon_start: object,
    reference: str,
    check_every: int,
    domain: str,
) -> sums.Spec:
    """Checked static options."""
    one_of(name, "derivative", derivative, DERIVATIVES)
    one_of(name, "reference", reference, ("product", "counting"))
    one_of(name, "domain", domain, ("auto", "log", "kernel"))
    for argument, value in (("num_iters", num_iters), ("check_every", check_every)):
        if value < 1:
            raise ValueError(f"{name}: {argument!r} is {value}, expected at least 1")
    if domain == "kernel" and (epsilon_start is not None or derivative == "unrolled"):
        raise ValueError(f"{name}: 'domain' is 'kernel', expected 'auto' or 'log' with 'epsilon_start' or derivative='unrolled'")
    return sums.Spec(
        num_iters=num_iters,
        check_every=0 if tolerance is None else min(check_every, num_iters),
        cost_fn=None,
        block=1,
        derivative=derivative,
        domain=domain,
        relaxed=relaxation is not None,
        unbalanced=rho is not None,
        counting=reference == "counting",
        scaled=epsilon_start is not None,
    )


def _wide(*arrays: Any) -> Any:
    """The dtype to compute in: float64 if any argument has it, else float32."""
    kinds = [dtypes.floor_dtype(jnp.asarray(x).dtype) for x in arrays if x is not None]
    return jnp.dtype(jnp.float64 if jnp.float64 in kinds else jnp.float32)


def _per_problem(name: str, argument: str, value: ArrayLike, zero: jax.Array) -> jax.Array:
    """A number, or one per problem, as an array with the leading axes."""
    shape = jnp.shape(value)
    if shape not in ((), zero.shape):
        raise ValueError(f"{name}: {argument!r} has shape {shape}, expected [] or the leading axes {zero.shape}")
    return jnp.asarray(value).astype(zero.dtype) + zero


def _hyper(name: str, zero: jax.Array, *values: ArrayLike | None) -> sums.Hyper:
    names = ("epsilon", "rho", "relaxation", "tolerance", "epsilon_start", "epsilon_decay")
    return sums.Hyper(*(_per_problem(name, key, 1.0 if value is None else value, zero) for key, value in zip(names, values)))


def _log_weights(log_weights: ArrayLike | None, zero: jax.Array) -> jax.Array:
    """Of the dtype and placement of `zero`; uniform if None."""
    if log_weights is None:
        return zero - jnp.log(jnp.asarray(zero.shape[-1], zero.dtype))
    return jnp.asarray(log_weights).astype(zero.dtype) + zero


def _solve(spec: sums.Spec, source: sums.Source, log_a: jax.Array, log_b: jax.Array, hyper: sums.Hyper) -> SinkhornOutput:
    f, g, iterations = derivatives.potentials(spec, source, log_a, log_b, hyper)
    return _summary(spec, source, log_a, log_b, hyper, f, g, iterations, None)


def _summary(
    spec: sums.Spec,
    source: sums.Source,
    log_a: jax.Array,
    log_b: jax.Array,
    hyper: sums.Hyper,
    f: jax.Array,
    g: jax.Array,
    iterations: jax.Array,
    error: jax.Array | None,
) -> SinkhornOutput:
    """Costs and error of the potentials; differentiable in all of them as far as `spec.derivative` lets it."""
    epsilon = hyper.epsilon if spec.derivative == "unrolled" else jax.lax.stop_gradient(hyper.epsilon)
    a, b = sums.weights(log_a), sums.weights(log_b)
    alpha, beta = sums.exponent(log_a, f, epsilon), sums.exponent(log_b, g, epsilon)
    total, rows, cols = sums.tile_sums(spec, source, epsilon, alpha, beta)
    mass, mass_a, mass_b = jnp.sum(rows, axis=-1), jnp.sum(a, axis=-1), jnp.sum(b, axis=-1)
    if spec.unbalanced:
        rho = (hyper.rho if spec.derivative == "unrolled" else jax.lax.stop_gradient(hyper.rho))[..., None]
        paid = -rho[..., 0] * (jnp.sum(a * jnp.expm1(-f / rho), axis=-1) + jnp.sum(b * jnp.expm1(-g / rho), axis=-1))
        regularized = paid - epsilon * (mass - mass_a * mass_b)
    else:
        regularized = jnp.sum(f * a, axis=-1) + jnp.sum(g * b, axis=-1) - epsilon * (mass - mass_b)
    if error is None and spec.unbalanced:
        error = residual(spec, hyper, log_updates(spec, source), log_a, log_b, f, g)
    elif error is None:
        error = jnp.sum(jnp.abs(rows - a), axis=-1)
        error = error + jnp.sum(jnp.abs(cols - b), axis=-1) if spec.relaxed else error
    error = jax.lax.stop_gradient(error)
    goal = hyper.tolerance if spec.check_every else _CONVERGED * mass_a
    return SinkhornOutput(
        f=f, g=g, cost=total, regularized=regularized, error=error, iterations=iterations, converged=error <= jax.lax.stop_gradient(goal)
    )
