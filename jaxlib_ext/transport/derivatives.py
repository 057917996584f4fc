"""The derivatives of the potentials: of the T steps as they were made, or of their fixed point.

The backward pass of the steps goes the same two ways as the iterations. With K relative to the last potentials, R_t and Q_t (the derivatives
of an update) are K scaled by rows and columns: T steps cost 2 T products with K, and their n m gradients are one product of rank 2 T.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from janax.jaxlib_ext.transport import sums
from janax.jaxlib_ext.transport.iterations import as_one_solve, epsilon_at, iterate, shrink_of
from janax.jaxlib_ext.transport.sums import History, Hyper, Source, Spec

__all__ = ["potentials"]

_MAX_CG_ITERS = 500


def potentials(spec: Spec, source: Source, log_a: jax.Array, log_b: jax.Array, hyper: Hyper) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(f [... n], g [... m], iterations [...]), differentiable in the source and the log-weights as the specification says."""
    if spec.derivative == "unrolled":
        return iterate(spec, False, source, log_a, log_b, hyper)[:3]
    if spec.derivative == "envelope":
        source, log_a, log_b, hyper = jax.lax.stop_gradient((source, log_a, log_b, hyper))
        return as_one_solve(lambda *args: iterate(spec, False, *args)[:3])(source, log_a, log_b, hyper)
    return (_exact if spec.derivative == "exact" else _implicit)(spec, source, log_a, log_b, hyper)


# --- the derivative of the T steps themselves, from the potentials of each step


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exact(spec: Spec, source: Source, log_a: jax.Array, log_b: jax.Array, hyper: Hyper) -> tuple[jax.Array, jax.Array, jax.Array]:
    return as_one_solve(lambda *args: iterate(spec, False, *args)[:3])(source, log_a, log_b, hyper)


def _exact_fwd(spec: Spec, *args: Any) -> tuple[Any, Any]:
    found = as_one_solve(functools.partial(iterate, spec, True))(*args)
    return found[:3], (args, found)


def _exact_bwd(spec: Spec, residuals: Any, cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
    (source, log_a, log_b, hyper), (f, _, iterations, history) = residuals
    arrays = (source, log_a, log_b, hyper, f, iterations, history, cotangents[0], cotangents[1])
    found = as_one_solve(functools.partial(_steps_back, spec))(*arrays)
    return *found, jax.tree.map(jnp.zeros_like, hyper)


_exact.defvjp(_exact_fwd, _exact_bwd)


class _Entry(NamedTuple):
    """Steps of the history [t ...]: what the two updates of a step gave and what they had been given.

    Attributes:
      t: [t] number of the step.
      active: [t ...] whether the problem still moved.
      f: [t ... n] given to the second update.
      phi: [t ... n] what the first gave, before penalty and relaxation.
      psi: [t ... m] what the second gave.
      g_before: [t ... m] given to the first.
    """

    t: jax.Array
    active: jax.Array
    f: jax.Array
    phi: jax.Array
    psi: jax.Array
    g_before: jax.Array


class _Problem(NamedTuple):
    source: Source
    log_a: jax.Array
    log_b: jax.Array
    hyper: Hyper


def _steps_back(
    spec: Spec,
    source: Source,
    log_a: jax.Array,
    log_b: jax.Array,
    hyper: Hyper,
    f_last: jax.Array,
    iterations: jax.Array,
    history: History,
    to_f: jax.Array,
    to_g: jax.Array,
) -> tuple[Source, jax.Array, jax.Array]:
    """Cotangents of (source, log a, log b) from those of the last potentials."""
    problem = _Problem(source, log_a, log_b, hyper)
    all_f, all_phi, all_g, all_psi = (jnp.moveaxis(x, -2, 0) for x in history)
    times = jnp.arange(all_f.shape[0], dtype=jnp.int32)
    column = times.reshape(-1, *[1] * iterations.ndim)
    active, final = column < iterations[None], column == iterations[None] - 1
    psi_last = jnp.sum(jnp.where(final[..., None], all_psi, jnp.zeros_like(all_psi)), axis=0)
    g_before = jnp.concatenate([jnp.zeros_like(all_g[:1]), all_g[:-1]], axis=0)

    def settled(x: jax.Array, last: jax.Array, log_weights: jax.Array) -> jax.Array:
        """Steps that did not take place, and points without weight, stand where the last step is: nothing there may overflow."""
        return jnp.where(active[..., None] & sums.is_on(log_weights)[None], x, last[None])

    entries = _Entry(
        t=times,
        active=active,
        f=settled(all_f, f_last, log_a),
        phi=settled(all_phi, f_last, log_a),
        psi=settled(all_psi, psi_last, log_b),
        g_before=settled(g_before, psi_last, log_b),
    )
    carry = (to_f, to_g, jnp.zeros_like(log_a), jnp.zeros_like(log_b), jax.tree.map(jnp.zeros_like, source))
    by_logs = lambda: _back_by_logs(spec, problem, iterations, entries, carry)  # noqa: E731
    if spec.domain == "log" or spec.cost_fn is not None or spec.scaled:
        return by_logs()

    epsilon, limit = hyper.epsilon[..., None], sums.exponent_range(source[0].dtype)
    drift = entries._replace(
        f=(entries.f - f_last[None]) / epsilon[None],
        phi=(entries.phi - f_last[None]) / epsilon[None],
        psi=(entries.psi - psi_last[None]) / epsilon[None],
        g_before=(entries.g_before - psi_last[None]) / epsilon[None],
    )
    by_kernel = lambda: _back_by_kernel(spec, problem, iterations, drift, carry, f_last, psi_last)  # noqa: E731
    if spec.domain == "kernel":
        return by_kernel()
    largest = lambda x, y: jnp.maximum(jnp.max(jnp.abs(x)), jnp.max(jnp.abs(y)))  # noqa: E731
    safe = largest(drift.f, drift.phi) + largest(drift.psi, drift.g_before) <= limit
    for log_weights in (log_a, log_b):
        safe &= jnp.min(sums.finite(log_weights)) >= -limit
    return jax.lax.cond(safe, by_kernel, by_logs)


def _walk_back(
    spec: Spec,
    problem: _Problem,
    iterations: jax.Array,
    entries: _Entry,
    carry: Any,
    rows_of: Callable[..., Any],
    cols_of: Callable[..., Any],
    collect: Callable[..., Source],
) -> tuple[Source, jax.Array, jax.Array]:
    """The steps from the last to the first.

    With Q_ij = a_i exp((f_i + psi_j - C_ij) / epsilon) and R_ij = b_j exp((phi_i + g_j - C_ij) / epsilon), columns of Q and rows of R summing
    to one: y = w s gbar; fbar <- fbar - Q y; x = w s fbar; gbar <- (1 - w) gbar - R^T x; fbar <- (1 - w) fbar; Cbar gains Q y_j + R x_i.

    Args:
      spec: Static options.
      problem: Its arrays.
      iterations: [...] steps made.
      entries: The history, in the form that the functions want.
      carry: Cotangents of (f, g, log a, log b, source).
      rows_of: (source cotangent, entry, y) -> (Q y, source cotangent, by-product).
      cols_of: (source cotangent, entry, x) -> (R^T x, source cotangent, by-product).
      collect: (source cotangent, by-products [t ...]) -> source cotangent, called once per chunk of steps.

    Returns:
      Cotangents of (source, log a, log b).
    """
    hyper = problem.hyper

    def back(carry: Any, entry: _Entry) -> tuple[Any, Any]:
        to_f, to_g, to_log_a, to_log_b, to_source = carry
        epsilon = epsilon_at(spec, hyper, entry.t)
        epsilon, shrink = epsilon[..., None], shrink_of(spec, hyper, epsilon)[..., None]
        w = jnp.where(entry.active[..., None], hyper.relaxation[..., None] if spec.relaxed else jnp.ones_like(epsilon), 0 * epsilon)
        y = w * shrink * to_g
        q_y, to_source, products_q = rows_of(to_source, entry, y)
        to_f = to_f - q_y
        x = w * shrink * to_f
        r_x, to_source, products_r = cols_of(to_source, entry, x)
        to_log_a, to_log_b = to_log_a - epsilon * q_y, to_log_b - epsilon * r_x
        if spec.counting and spec.unbalanced:
            offset = (shrink - 1) * epsilon * w
            to_log_a, to_log_b = to_log_a + offset * to_f, to_log_b + offset * to_g
        return ((1 - w) * to_f, (1 - w) * to_g - r_x, to_log_a, to_log_b, to_source), (products_q, products_r)

    def chunk(carry: Any, entries: _Entry) -> Any:
        carry, products = jax.lax.scan(back, carry, entries, reverse=True)
        return *carry[:4], collect(carry[4], products)

    every = spec.check_every
    if not every:
        carry = chunk(carry, entries)
    else:

        def body(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            first = state[0] - every
            part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, every, axis=0), entries)
            return first, chunk(state[1], part)

        made = -(-jnp.max(iterations) // every) * every
        carry = jax.lax.while_loop(lambda state: state[0] > 0, body, (made, carry))[1]
    _, _, to_log_a, to_log_b, to_source = carry
    on_a, on_b = sums.is_on(problem.log_a), sums.is_on(problem.log_b)
    return to_source, jnp.where(on_a, to_log_a, jnp.zeros_like(to_log_a)), jnp.where(on_b, to_log_b, jnp.zeros_like(to_log_b))


def _back_by_logs(spec: Spec, problem: _Problem, iterations: jax.Array, entries: _Entry, carry: Any) -> tuple[Source, jax.Array, jax.Array]:
    """Q and R made again, of exponentials, in every step."""
    source, log_a, log_b, hyper = problem

    def rows_of(to_source: Source, entry: _Entry, y: jax.Array) -> tuple[Any, ...]:
        epsilon = epsilon_at(spec, hyper, entry.t)
        alpha, beta = sums.exponent(log_a, entry.f, epsilon), sums.exponent(log_b, entry.psi, epsilon, weighted=False)
        pulled = sums.pull(spec, source, epsilon, alpha, beta, (jnp.ones_like(alpha),), (y,), to_source)
        return pulled.rows, pulled.source, None

    def cols_of(to_source: Source, entry: _Entry, x: jax.Array) -> tuple[Any, ...]:
        to_source, entry = jax.lax.optimization_barrier((to_source, entry))  # one matrix of exponentials at a time
        epsilon = epsilon_at(spec, hyper, entry.t)
        alpha, beta = sums.exponent(log_a, entry.phi, epsilon, weighted=False), sums.exponent(log_b, entry.g_before, epsilon)
        pulled = sums.pull(spec, source, epsilon, alpha, beta, (x,), (jnp.ones_like(beta),), to_source)
        return pulled.cols, pulled.source, None

    return _walk_back(spec, problem, iterations, entries, carry, rows_of, cols_of, lambda to_source, _: to_source)


def _back_by_kernel(
    spec: Spec, problem: _Problem, iterations: jax.Array, drift: _Entry, carry: Any, f_last: jax.Array, psi_last: jax.Array
) -> tuple[Source, jax.Array, jax.Array]:
    """Q and R as one kernel, relative to the last potentials, scaled by rows and columns; the gradient of C as one matrix product."""
    source, log_a, log_b, hyper = problem
    epsilon = hyper.epsilon
    alpha, beta = sums.exponent(log_a, f_last, epsilon, weighted=False), sums.exponent(log_b, psi_last, epsilon, weighted=False)
    kernel = jnp.exp(alpha[..., :, None] + beta[..., None, :] - source[0] / epsilon[..., None, None])
    scales = drift._replace(
        f=jnp.exp(drift.f) * sums.weights(log_a)[None],
        phi=jnp.exp(drift.phi),
        psi=jnp.exp(drift.psi),
        g_before=jnp.exp(drift.g_before) * sums.weights(log_b)[None],
    )

    def rows_of(to_source: Source, entry: _Entry, y: jax.Array) -> tuple[Any, ...]:
        right = entry.psi * y
        return entry.f * sums.times(kernel, right), to_source, (entry.f, right)

    def cols_of(to_source: Source, entry: _Entry, x: jax.Array) -> tuple[Any, ...]:
        left = entry.phi * x
        return entry.g_before * sums.transposed_times(kernel, left), to_source, (left, entry.g_before)

    def collect(to_source: Source, products: Any) -> Source:
        left, right = (jnp.concatenate(pair, axis=0) for pair in zip(*products))
        return (to_source[0] + jnp.einsum("k...n,k...m->...nm", left, right, precision=jax.lax.Precision.HIGHEST),)

    to_source, to_log_a, to_log_b = _walk_back(spec, problem, iterations, scales, carry, rows_of, cols_of, collect)
    return (kernel * to_source[0],), to_log_a, to_log_b


# --- the derivative of the fixed point


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _implicit(spec: Spec, source: Source, log_a: jax.Array, log_b: jax.Array, hyper: Hyper) -> tuple[jax.Array, jax.Array, jax.Array]:
    return as_one_solve(lambda *args: iterate(spec, False, *args)[:3])(source, log_a, log_b, hyper)


def _implicit_fwd(spec: Spec, *args: Any) -> tuple[Any, Any]:
    found = _implicit(spec, *args)
    return found, (args, found)


def _implicit_bwd(spec: Spec, residuals: Any, cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
    """Solves [diag(r), s P; s P^T, diag(c)] [u; v] = [fbar; gbar], r and c the sums of P, by conjugate gradients on v; Cbar = s P (u_i + v_j).

    In z = sqrt(c) v the matrix is 1 - s^2 M^T M with M = P / sqrt(r c): symmetric, eigenvalues between 0 and 1. A balanced problem has the
    null vector sqrt(c), the constant that f may lend to g; the cotangents are projected as if <a, f> were 0.
    """
    (source, log_a, log_b, hyper), (f, g, _) = residuals
    epsilon = hyper.epsilon
    on_a, on_b = sums.is_on(log_a), sums.is_on(log_b)
    to_f, to_g = (jnp.where(on, x, jnp.zeros_like(x)) for on, x in ((on_a, cotangents[0]), (on_b, cotangents[1])))
    alpha, beta = sums.exponent(log_a, f, epsilon), sums.exponent(log_b, g, epsilon)
    shrink = shrink_of(spec, hyper, epsilon)[..., None]
    plain = sums.pull(spec, source, epsilon, alpha, beta, (jnp.ones_like(alpha),), (jnp.ones_like(beta),), None)
    rows, cols = (jnp.where(x > 0, x, jnp.ones_like(x)) for x in (plain.rows, plain.cols))
    live = on_b & (plain.cols > 0)
    if not spec.unbalanced:
        a = sums.weights(log_a)
        mass = jnp.sum(a, axis=-1, keepdims=True)
        gap = jnp.sum(to_f, axis=-1, keepdims=True) - jnp.sum(to_g, axis=-1, keepdims=True)
        to_f = to_f - a * gap / jnp.where(mass > 0, mass, jnp.ones_like(mass))

    if spec.cost_fn is None:
        kernel = jnp.exp(alpha[..., :, None] + beta[..., None, :] - source[0] / epsilon[..., None, None])
        times, transposed = functools.partial(sums.times, kernel), functools.partial(sums.transposed_times, kernel)
    else:
        times = lambda v: sums.pull(spec, source, epsilon, alpha, beta, (jnp.ones_like(alpha),), (v,), None).rows  # noqa: E731
        transposed = lambda u: sums.pull(spec, source, epsilon, alpha, beta, (u,), (jnp.ones_like(beta),), None).cols  # noqa: E731

    root = jnp.where(live, jnp.sqrt(cols), jnp.ones_like(cols))
    null = jnp.where(live, root, jnp.zeros_like(root))
    null = null / jnp.maximum(jnp.sqrt(jnp.sum(null * null, axis=-1, keepdims=True)), jnp.finfo(null.dtype).tiny)

    def project(z: jax.Array) -> jax.Array:
        z = jnp.where(live, z, jnp.zeros_like(z))
        return z if spec.unbalanced else z - null * jnp.sum(null * z, axis=-1, keepdims=True)

    apply = lambda z: project(z - shrink * shrink * transposed(times(z / root) / rows) / root)  # noqa: E731
    right = project((to_g - shrink * transposed(to_f / rows)) / root)
    v = _conjugate_gradients(apply, right, limit=min(_MAX_CG_ITERS, 4 * right.shape[-1] + 8)) / root
    u = jnp.where(on_a, (to_f - shrink * times(v)) / rows, jnp.zeros_like(rows))

    ones = (jnp.ones_like(u), jnp.ones_like(v))
    no_gradient = jax.tree.map(jnp.zeros_like, source)
    pulled = sums.pull(spec, source, epsilon, alpha, beta, (shrink * u, shrink * ones[0]), (ones[1], v), no_gradient)
    # f does not depend on its own weight, only g does, and the other way round; the sums above count both.
    to_log_a = epsilon[..., None] * (plain.rows * shrink * u - pulled.rows)
    to_log_b = epsilon[..., None] * (plain.cols * shrink * v - pulled.cols)
    if spec.counting and spec.unbalanced:
        offset = (shrink - 1) * epsilon[..., None]
        to_log_a, to_log_b = to_log_a + offset * plain.rows * u, to_log_b + offset * plain.cols * v
    to_log_a, to_log_b = (jnp.where(on, x, jnp.zeros_like(x)) for on, x in ((on_a, to_log_a), (on_b, to_log_b)))
    return pulled.source, to_log_a, to_log_b, jax.tree.map(jnp.zeros_like, hyper)


_implicit.defvjp(_implicit_fwd, _implicit_bwd)


def _conjugate_gradients(apply: Callable[[jax.Array], jax.Array], right: jax.Array, *, limit: int) -> jax.Array:
    """Solves apply(z) = right [... m] for a symmetric positive semi-definite map; each problem stops at rounding or when it gains no more."""
    unit = jnp.finfo(right.dtype).eps
    dot = lambda x, y: jnp.sum(x * y, axis=-1, keepdims=True)  # noqa: E731
    goal = (4 * unit) ** 2 * dot(right, right)

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        k, z, r, p, size, done = state
        image = apply(p)
        curvature = dot(p, image)
        usable = ~done & (curvature > unit * dot(p, p))
        step = jnp.where(usable, size / jnp.where(usable, curvature, jnp.ones_like(curvature)), jnp.zeros_like(size))
        z, r = z + step * p, r - step * image
        new = dot(r, r)
        p = jnp.where(usable, r + new / jnp.where(size > 0, size, jnp.ones_like(size)) * p, p)
        return k + 1, z, r, p, new, ~usable | (new <= goal)

    size = dot(right, right)
    state = (jnp.zeros((), jnp.int32), jnp.zeros_like(right), right, right, size, size <= goal)
    return jax.lax.while_loop(lambda s: (s[0] < limit) & ~jnp.all(s[5]), body, state)[1]
