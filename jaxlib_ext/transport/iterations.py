"""The Sinkhorn iterations, without their derivatives.

One iteration, in the order f, g, with weights a, b and penalties that shrink an update by s = rho / (rho + epsilon) (1 if balanced):

    phi_i = -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon)       f <- (1 - w) f + w (s phi + c)
    psi_j = -epsilon log sum_i a_i exp((f_i - C_ij) / epsilon)       g <- (1 - w) g + w (s psi + d)

c = d = 0, but (s - 1) epsilon log a and (s - 1) epsilon log b where the entropy is relative to the counting measure.

Two ways to the same numbers. Log domain: a maximum and a sum of n m exponentials per update, always safe. Kernel: K = exp(-C / epsilon) is
made once and an update is a product with it; only where max |C| / epsilon is moderate and the potentials turn out to be.

All arrays carry the same leading axes, one problem each. A choice between the two ways is made for all problems of a call together, also
under `jax.vmap`, whose axis becomes a leading axis.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from janax.jaxlib_ext.transport import sums
from janax.jaxlib_ext.transport.sums import History, Hyper, Source, Spec

__all__ = [
    "Updates",
    "as_one_solve",
    "epsilon_at",
    "iterate",
    "kernel_updates",
    "log_updates",
    "residual",
    "shrink_of",
    "symmetric_potential",
]


def epsilon_at(spec: Spec, hyper: Hyper, t: jax.Array) -> jax.Array:
    """The regularisation of step t = 0, 1, ...: max(epsilon, start decay^t)."""
    if not spec.scaled:
        return hyper.epsilon
    return jnp.maximum(hyper.epsilon, hyper.epsilon_start * hyper.epsilon_decay ** t.astype(hyper.epsilon.dtype))


def shrink_of(spec: Spec, hyper: Hyper, epsilon: jax.Array) -> jax.Array:
    """s = rho / (rho + epsilon), 1 if balanced."""
    return 1 / (1 + epsilon / hyper.rho) if spec.unbalanced else jnp.ones_like(epsilon)


def _target(spec: Spec, hyper: Hyper, epsilon: jax.Array, log_weights: jax.Array, raw: jax.Array) -> jax.Array:
    """s raw + c: what an update without relaxation gives; 0 for a point without weight."""
    if spec.unbalanced:
        shrink = shrink_of(spec, hyper, epsilon)[..., None]
        raw = shrink * raw
        if spec.counting:
            raw = raw + (shrink - 1) * epsilon[..., None] * sums.finite(log_weights)
    return jnp.where(sums.is_on(log_weights), raw, jnp.zeros_like(raw))


class Updates(NamedTuple):
    """The two reductions, in the log domain or with a kernel."""

    rows: Callable[[jax.Array, jax.Array], jax.Array]
    cols: Callable[[jax.Array, jax.Array], jax.Array]


def log_updates(spec: Spec, source: Source) -> Updates:
    """The reductions in the log domain."""
    return Updates(functools.partial(sums.lse_rows, spec, source), functools.partial(sums.lse_cols, spec, source))


def kernel_updates(kernel: jax.Array) -> Updates:
    """log sums with K [... n m] at hand."""
    return Updates(
        lambda epsilon, beta: sums.safe_log(sums.times(kernel, jnp.exp(beta))),
        lambda epsilon, alpha: sums.safe_log(sums.transposed_times(kernel, jnp.exp(alpha))),
    )


def _raw(lse: Callable[..., jax.Array], epsilon: jax.Array, log_weights: jax.Array, given: jax.Array) -> jax.Array:
    return -epsilon[..., None] * lse(epsilon, sums.exponent(log_weights, given, epsilon))


def residual(spec: Spec, hyper: Hyper, updates: Updates, log_a: jax.Array, log_b: jax.Array, f: jax.Array, g: jax.Array) -> jax.Array:
    """sum_i |a_i exp((f_i - f_i^next) / epsilon) - a_i| [...], for a balanced problem the violation |P 1 - a| of the row marginals.

    Relaxed iterations leave the columns open as well: theirs is added.
    """
    epsilon = hyper.epsilon

    def one(log_weights: jax.Array, old: jax.Array, raw: jax.Array) -> jax.Array:
        new = _target(spec, hyper, epsilon, log_weights, raw)
        return jnp.sum(jnp.abs(jnp.exp(sums.exponent(log_weights, old - new, epsilon)) - sums.weights(log_weights)), axis=-1)

    error = one(log_a, f, _raw(updates.rows, epsilon, log_b, g))
    return error + one(log_b, g, _raw(updates.cols, epsilon, log_a, f)) if spec.relaxed else error


def _step(spec: Spec, hyper: Hyper, updates: Updates, log_a: jax.Array, log_b: jax.Array) -> Callable[..., Any]:
    """((f, g), t) -> ((f, g), (f, phi, g, psi))."""

    def move(epsilon: jax.Array, log_weights: jax.Array, old: jax.Array, raw: jax.Array) -> jax.Array:
        new = _target(spec, hyper, epsilon, log_weights, raw)
        if not spec.relaxed:
            return new
        w = hyper.relaxation[..., None]
        return (1 - w) * old + w * new

    def step(carry: tuple[jax.Array, jax.Array], t: jax.Array) -> tuple[tuple[jax.Array, jax.Array], History]:
        f, g = carry
        epsilon = epsilon_at(spec, hyper, t)
        phi = _raw(updates.rows, epsilon, log_b, g)
        f = move(epsilon, log_a, f, phi)
        psi = _raw(updates.cols, epsilon, log_a, f)
        g = move(epsilon, log_b, g, psi)
        return (f, g), (f, phi, g, psi)

    return step


def _loop(
    spec: Spec,
    hyper: Hyper,
    step: Callable[..., Any],
    error_of: Callable[[Any], jax.Array],
    carry: Any,
    *,
    keep: bool,
    differentiable: bool,
) -> tuple[Any, jax.Array, Any]:
    """(last carry, iterations [...] made for each problem, history [t ...] of all steps or None).

    With a tolerance, a problem that has reached it keeps its carry while the others go on, and the loop ends with the last of them (under
    `differentiable` all steps run, the idle ones without effect).
    """
    every = spec.check_every
    if not every:
        run = step if keep else lambda carry, t: (step(carry, t)[0], None)
        carry, history = jax.lax.scan(run, carry, jnp.arange(spec.num_iters, dtype=jnp.int32))
        return carry, jnp.zeros_like(hyper.epsilon, dtype=jnp.int32) + spec.num_iters, history

    chunks = -(-spec.num_iters // every)

    def chunk(state: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
        carry, t, done, iterations = state

        def guarded(carry: Any, i: jax.Array) -> tuple[Any, Any]:
            new, entry = step(carry, i)
            active = ~done & (i < spec.num_iters)
            return jax.tree.map(lambda a, b: jnp.where(active[..., None], a, b), new, carry), entry if keep else None

        carry, entries = jax.lax.scan(guarded, carry, t + jnp.arange(every, dtype=jnp.int32))
        t = t + every
        iterations = jnp.where(done, iterations, jnp.minimum(t, spec.num_iters))
        small = error_of(jax.lax.stop_gradient(carry)) <= hyper.tolerance
        if spec.scaled:
            small &= epsilon_at(spec, hyper, t - 1) <= hyper.epsilon
        return (carry, t, done | small, iterations), entries

    none = jnp.zeros_like(hyper.epsilon, dtype=jnp.int32)
    state = (carry, jnp.zeros((), jnp.int32), none > 0, none)
    if differentiable:
        (carry, _, _, iterations), _ = jax.lax.scan(lambda state, _: (chunk(state)[0], None), state, length=chunks)
        return carry, iterations, None

    def body(loop: tuple[Any, Any]) -> tuple[Any, Any]:
        state, history = loop
        new, entries = chunk(state)
        return new, jax.tree.map(lambda all_, some: jax.lax.dynamic_update_slice_in_dim(all_, some, state[1], axis=0), history, entries)

    history = (carry[0], carry[0], carry[1], carry[1]) if keep else None
    history = jax.tree.map(lambda x: jnp.broadcast_to(jnp.zeros_like(x), (chunks * every, *x.shape)), history)
    unfinished = lambda loop: (loop[0][1] < spec.num_iters) & ~jnp.all(loop[0][2])  # noqa: E731
    (carry, _, _, iterations), history = jax.lax.while_loop(unfinished, body, (state, history))
    return carry, iterations, history


def _zeros(log_weights: jax.Array) -> jax.Array:
    return jnp.zeros_like(log_weights)


def iterate(spec: Spec, keep: bool, source: Source, log_a: jax.Array, log_b: jax.Array, hyper: Hyper) -> tuple[Any, ...]:
    """(f, g, iterations, history [... t n] or None) without a derivative."""

    def run(updates: Updates) -> tuple[Any, ...]:
        step = _step(spec, hyper, updates, log_a, log_b)
        error_of = lambda carry: residual(spec, hyper, updates, log_a, log_b, *carry)  # noqa: E731
        carry, iterations, history = _loop(
            spec, hyper, step, error_of, (_zeros(log_a), _zeros(log_b)), keep=keep, differentiable=spec.derivative == "unrolled"
        )
        return *carry, iterations, jax.tree.map(lambda x: jnp.moveaxis(x, 0, -2), history)

    by_logs = lambda: run(log_updates(spec, source))  # noqa: E731
    if spec.domain == "log" or spec.cost_fn is not None or spec.scaled or spec.derivative == "unrolled":
        return by_logs()
    exponents = source[0] / hyper.epsilon[..., None, None]
    if spec.domain == "kernel":
        return run(kernel_updates(jnp.exp(-exponents)))

    limit = sums.exponent_range(source[0].dtype)
    safe = jnp.max(jnp.abs(exponents)) <= limit
    for log_weights in (log_a, log_b):
        safe &= jnp.min(sums.finite(log_weights)) >= -limit
    found = run(kernel_updates(jnp.exp(-jnp.where(safe, exponents, jnp.zeros_like(exponents)))))
    for potential in found[:2]:
        safe &= jnp.max(jnp.abs(potential / hyper.epsilon[..., None])) <= limit  # false for nan
    return jax.lax.cond(safe, lambda: found, by_logs)


def as_one_solve(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` of trees of arrays that all have leading axes; an axis of `jax.vmap` becomes one more of them."""

    @custom_vmap
    def call(*args: Any) -> Any:
        return fn(*args)

    @call.def_vmap
    def _(size: int, batched: Any, *args: Any) -> Any:
        args = jax.tree.map(lambda x, is_batched: x if is_batched else jnp.broadcast_to(x, (size, *x.shape)), args, tuple(batched))
        out = as_one_solve(fn)(*args)
        return out, jax.tree.map(lambda _: True, out)

    return call


# --- one set of points against itself


def symmetric_potential(spec: Spec, source: Source, log_a: jax.Array, hyper: Hyper) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(f [... n], iterations, error) of a symmetric cost with equal weights: f <- (f + update) / 2. Not differentiated."""
    source, log_a, hyper = jax.lax.stop_gradient((source, log_a, hyper))
    updates = log_updates(spec, source)

    def update(f: jax.Array, epsilon: jax.Array) -> jax.Array:
        return _target(spec, hyper, epsilon, log_a, _raw(updates.rows, epsilon, log_a, f))

    def step(carry: tuple[jax.Array], t: jax.Array) -> tuple[tuple[jax.Array], None]:
        return (0.5 * (carry[0] + update(carry[0], epsilon_at(spec, hyper, t))),), None

    def error_of(carry: tuple[jax.Array]) -> jax.Array:
        masses = jnp.exp(sums.exponent(log_a, carry[0] - update(carry[0], hyper.epsilon), hyper.epsilon))
        return jnp.sum(jnp.abs(masses - sums.weights(log_a)), axis=-1)

    carry, iterations, _ = _loop(spec, hyper, step, error_of, (_zeros(log_a),), keep=False, differentiable=False)
    return carry[0], iterations, error_of(carry)
