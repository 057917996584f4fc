"""The Sinkhorn iterations and their derivatives; `janax.jaxlib_ext.transport` puts arguments and results around them.

One iteration, in the order f, g, with weights a, b and penalties that shrink an update by s = rho / (rho + epsilon) (1 if balanced):

    phi_i = -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon)       f <- (1 - w) f + w (s phi + c)
    psi_j = -epsilon log sum_i a_i exp((f_i - C_ij) / epsilon)       g <- (1 - w) g + w (s psi + d)

c = d = 0, but (s - 1) epsilon log a and (s - 1) epsilon log b where the entropy is relative to the counting measure.

Two ways to the same numbers. Log domain: a maximum and a sum of n m exponentials per update, always safe. Kernel: K = exp(-C / epsilon) is
made once and an update is a product with it; only where max |C| / epsilon is moderate and the potentials turn out to be. The backward pass
of the T steps has the same two ways, with K relative to the last potentials: R_t and Q_t (the derivatives of an update) are then K scaled
by rows and columns, T steps cost 2 T products with K, and their n m gradients are one product of rank 2 T.

All arrays carry the same leading axes, one problem each. A choice between the two ways is made for all problems of a call together, also
under `jax.vmap`, whose axis becomes a leading axis.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

__all__ = ["CostFn", "Hyper", "Source", "Spec", "exponent", "log_updates", "potentials", "residual", "symmetric_potential", "tile_sums"]

CostFn = Callable[[jax.Array, jax.Array], jax.Array]
Source = tuple[jax.Array, ...]
History = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

_MAX_CG_ITERS = 500


class Spec(NamedTuple):
    """What is static.

    Attributes:
      num_iters: Iterations, or their largest number.
      check_every: Iterations between two tests of convergence; 0 for none.
      cost_fn: None if the source is (C,); else C is cost_fn of tiles of the points (x, y).
      block: Rows of such a tile.
      derivative: "exact", "implicit", "unrolled" or "envelope".
      domain: "auto", "log" or "kernel".
      relaxed: Whether w is not 1.
      unbalanced: Whether there are penalties instead of constraints.
      counting: Whether the entropy is relative to the counting measure.
      scaled: Whether epsilon falls from a start value.
    """

    num_iters: int
    check_every: int
    cost_fn: CostFn | None
    block: int
    derivative: str
    domain: str
    relaxed: bool
    unbalanced: bool
    counting: bool
    scaled: bool


class Hyper(NamedTuple):
    """Traced numbers, one per problem [...]; what a call does not use is 1."""

    epsilon: jax.Array
    rho: jax.Array
    relaxation: jax.Array
    tolerance: jax.Array
    epsilon_start: jax.Array
    epsilon_decay: jax.Array


def _range(dtype: Any) -> float:
    """Exponents up to this leave room in the range of the dtype for what they are multiplied with: 60 in float32, 600 in float64."""
    return 60.0 if dtype == jnp.float32 else 600.0


def _on(log_weights: jax.Array) -> jax.Array:
    return ~jnp.isneginf(log_weights)


def _finite(log_weights: jax.Array) -> jax.Array:
    return jnp.where(_on(log_weights), log_weights, jnp.zeros_like(log_weights))


def _weights(log_weights: jax.Array) -> jax.Array:
    return jnp.where(_on(log_weights), jnp.exp(_finite(log_weights)), jnp.zeros_like(log_weights))


def exponent(log_weights: jax.Array, potential: jax.Array, epsilon: jax.Array, *, weighted: bool = True) -> jax.Array:
    """log weight + potential / epsilon [... n] (or without the weight); -inf for a point without weight."""
    scaled = potential / epsilon[..., None]
    return jnp.where(_on(log_weights), scaled + _finite(log_weights) if weighted else scaled, jnp.full_like(scaled, -jnp.inf))


# --- reductions of n m exponentials; tile by tile where the cost is computed from points


def _tiles(block: int, x: jax.Array, axis: int, fill: float = 0.0) -> jax.Array:
    """The axis (counted from the end) in blocks, blocks first, padded with `fill`."""
    at = x.ndim + axis
    short = -x.shape[at] % block
    if short:
        x = jnp.pad(x, [(0, short if i == at else 0) for i in range(x.ndim)], constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:at], -1, block, *x.shape[at + 1 :]), at, 0)


def _join(tiles: jax.Array, axis: int, length: int) -> jax.Array:
    """Undoes `_tiles`."""
    at = tiles.ndim - 1 + axis
    x = jnp.moveaxis(tiles, 0, at)
    x = x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=at)


def _block(spec: Spec, x: jax.Array) -> int:
    return min(spec.block, x.shape[-2])


def _log_sum(x: jax.Array, axis: int) -> jax.Array:
    """log sum exp along an axis; 0 where there is nothing to sum."""
    top = jax.lax.stop_gradient(jnp.max(x, axis=axis, keepdims=True))
    top = jnp.where(jnp.isneginf(top), jnp.zeros_like(top), top)
    terms = jnp.exp(x - top)
    ones = jnp.ones_like(jnp.max(terms, axis=-3 - axis))
    total = _times(terms, ones) if axis == -1 else _transposed_times(terms, ones)
    return _log(total) + jnp.where(total > 0, jnp.squeeze(top, axis), jnp.zeros_like(total))


def _log(total: jax.Array) -> jax.Array:
    return jnp.log(jnp.where(total > 0, total, jnp.ones_like(total)))


def _lse_rows(spec: Spec, source: Source, epsilon: jax.Array, beta: jax.Array) -> jax.Array:
    """log sum_j exp(beta_j - C_ij / epsilon) [... n]."""
    of = lambda cost: _log_sum(beta[..., None, :] - cost / epsilon[..., None, None], axis=-1)  # noqa: E731
    if spec.cost_fn is None:
        return of(source[0])
    cost_fn, (x, y) = spec.cost_fn, source
    return _join(jax.lax.map(lambda tile: of(cost_fn(tile, y)), _tiles(_block(spec, x), x, -2)), -1, x.shape[-2])


def _lse_cols(spec: Spec, source: Source, epsilon: jax.Array, alpha: jax.Array) -> jax.Array:
    """log sum_i exp(alpha_i - C_ij / epsilon) [... m]."""
    of = lambda cost, a: _log_sum(a[..., :, None] - cost / epsilon[..., None, None], axis=-2)  # noqa: E731
    if spec.cost_fn is None:
        return of(source[0], alpha)
    cost_fn, (x, y) = spec.cost_fn, source

    def add(so_far: tuple[jax.Array, jax.Array], tile: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, jax.Array], None]:
        top, total = so_far
        z = tile[1][..., :, None] - cost_fn(tile[0], y) / epsilon[..., None, None]
        new = jnp.maximum(top, jax.lax.stop_gradient(jnp.max(z, axis=-2)))
        base = jnp.where(jnp.isneginf(new), jnp.zeros_like(new), new)
        total = total * jnp.exp(jnp.where(jnp.isneginf(top), top, top - base)) + jnp.sum(jnp.exp(z - base[..., None, :]), axis=-2)
        return (new, total), None

    zero = jnp.zeros_like(jnp.sum(y, axis=-1)) + jnp.zeros_like(epsilon)[..., None]
    block = _block(spec, x)
    (top, total), _ = jax.lax.scan(
        add, (jnp.full_like(zero, -jnp.inf), zero), (_tiles(block, x, -2), _tiles(block, alpha, -1, fill=-jnp.inf))
    )
    return _log(total) + jnp.where(total > 0, top, jnp.zeros_like(top))


def _placed(matrix: jax.Array) -> bool:
    """Whether the type of the array names mesh axes; a contraction would then have to be told where its result lies, a sum need not."""
    return any(axis is not None for axis in jax.typeof(matrix).sharding.spec)


def _times(matrix: jax.Array, v: jax.Array) -> jax.Array:
    """sum_j K_ij v_j [... n]."""
    if _placed(matrix):
        return jnp.sum(matrix * v[..., None, :], axis=-1)
    return jnp.matmul(matrix, v[..., :, None], precision=jax.lax.Precision.HIGHEST)[..., 0]


def _transposed_times(matrix: jax.Array, u: jax.Array) -> jax.Array:
    """sum_i K_ij u_i [... m]."""
    if _placed(matrix):
        return jnp.sum(matrix * u[..., :, None], axis=-2)
    return jnp.matmul(u[..., None, :], matrix, precision=jax.lax.Precision.HIGHEST)[..., 0, :]


class _Pulled(NamedTuple):
    """Sums of W_ij = exp(alpha_i + beta_j - C_ij / epsilon) sum_k left_ki right_kj, and the cotangent of the source for dC = W."""

    rows: jax.Array
    cols: jax.Array
    source: Source | None


def _pull(
    spec: Spec,
    source: Source,
    epsilon: jax.Array,
    alpha: jax.Array,
    beta: jax.Array,
    left: tuple[jax.Array, ...],
    right: tuple[jax.Array, ...],
    cotangent: Source | None,
) -> _Pulled:
    """The sums, and the cotangent added to the given one (None for none). It is what every backward pass is made of."""

    def of(cost: jax.Array, alpha: jax.Array, left: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        plan = jnp.exp(alpha[..., :, None] + beta[..., None, :] - cost / epsilon[..., None, None])
        rows = sum((a * _times(plan, b) for a, b in zip(left, right)), start=jnp.zeros_like(alpha))
        cols = sum((b * _transposed_times(plan, a) for a, b in zip(left, right)), start=jnp.zeros_like(beta))
        return rows, cols, plan * sum(a[..., :, None] * b[..., None, :] for a, b in zip(left, right))

    if spec.cost_fn is None:
        rows, cols, weighted = of(source[0], alpha, left)
        return _Pulled(rows, cols, None if cotangent is None else (cotangent[0] + weighted,))
    cost_fn, (x, y), block = spec.cost_fn, source, _block(spec, source[0])

    def add(so_far: tuple[jax.Array, Any], tile: tuple[Any, ...]) -> tuple[tuple[jax.Array, Any], tuple[jax.Array, Any]]:
        cols, to_y = so_far
        if cotangent is None:
            rows, more, _ = of(cost_fn(tile[0], y), tile[1], tile[2])
            return (cols + more, None), (rows, None)
        cost, pull = jax.vjp(cost_fn, tile[0], y)
        rows, more, weighted = of(cost, tile[1], tile[2])
        to_x, more_y = pull(weighted)
        return (cols + more, to_y + more_y), (rows, to_x)

    tiles = (_tiles(block, x, -2), _tiles(block, alpha, -1, fill=-jnp.inf), tuple(_tiles(block, a, -1) for a in left))
    (cols, to_y), (rows, to_x) = jax.lax.scan(add, (jnp.zeros_like(beta), None if cotangent is None else cotangent[1]), tiles)
    given = None if cotangent is None else (cotangent[0] + _join(to_x, -2, x.shape[-2]), to_y)
    return _Pulled(_join(rows, -1, x.shape[-2]), cols, given)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(held: bool, cost: jax.Array, alpha: jax.Array, beta: jax.Array, epsilon: jax.Array) -> tuple[jax.Array, ...]:
    """`tile_sums` of a cost at hand."""
    del held
    plan = jnp.exp(alpha[..., :, None] + beta[..., None, :] - cost / epsilon[..., None, None])
    total = jnp.sum(_times(plan * cost, jnp.ones_like(beta)), axis=-1)
    return total, _times(plan, jnp.ones_like(beta)), _transposed_times(plan, jnp.ones_like(alpha))


def _sums_fwd(held: bool, *arrays: jax.Array) -> tuple[Any, Any]:
    return _sums(held, *arrays), arrays


def _sums_bwd(held: bool, arrays: tuple[jax.Array, ...], cotangents: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    to_total, to_rows, to_cols = cotangents
    to_total = to_total[..., None, None]

    def pulled(cost: jax.Array, alpha: jax.Array, beta: jax.Array, epsilon: jax.Array) -> tuple[jax.Array, jax.Array]:
        """P, and P times the cotangent of P: that of each exponent."""
        plan = jnp.exp(alpha[..., :, None] + beta[..., None, :] - cost / epsilon[..., None, None])
        to_plan = to_rows[..., :, None] + to_cols[..., None, :]
        return plan, plan * (to_plan if held else to_plan + to_total * cost)

    cost, alpha, beta, epsilon = arrays
    _, to_exponent = pulled(*arrays)
    to_alpha, to_beta = _times(to_exponent, jnp.ones_like(beta)), _transposed_times(to_exponent, jnp.ones_like(alpha))
    to_epsilon = jnp.sum(to_exponent * cost, axis=(-2, -1)) / jnp.square(epsilon)
    # Made once more rather than kept until the gradients of the potentials, which the solver needs first, have come back as more of it.
    plan, to_exponent = pulled(*jax.lax.optimization_barrier(arrays))
    return to_total * plan - to_exponent / epsilon[..., None, None], to_alpha, to_beta, to_epsilon


_sums.defvjp(_sums_fwd, _sums_bwd)


def tile_sums(spec: Spec, source: Source, epsilon: jax.Array, alpha: jax.Array, beta: jax.Array) -> tuple[jax.Array, ...]:
    """(sum_ij P C [...], P 1 [... n], P^T 1 [... m]) of P_ij = exp(alpha_i + beta_j - C_ij / epsilon); differentiable, made again backward.

    Under the envelope derivative P is held constant in the first of the three.
    """

    held = spec.derivative == "envelope"
    if spec.cost_fn is None:
        return _sums(held, source[0], alpha, beta, epsilon)
    cost_fn, (x, y), block = spec.cost_fn, source, _block(spec, source[0])

    @jax.checkpoint
    def add(so_far: tuple[jax.Array, jax.Array], tile: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        sums: Any = _sums(held, cost_fn(tile[0], y), tile[1], beta, epsilon)
        total, rows, cols = sums
        return (so_far[0] + total, so_far[1] + cols), rows

    start = (jnp.zeros_like(jnp.sum(beta, axis=-1)), jnp.zeros_like(beta))
    (total, cols), rows = jax.lax.scan(add, start, (_tiles(block, x, -2), _tiles(block, alpha, -1, fill=-jnp.inf)))
    return total, _join(rows, -1, x.shape[-2]), cols


# --- the iterations


def _epsilon_at(spec: Spec, hyper: Hyper, t: jax.Array) -> jax.Array:
    """The regularisation of step t = 0, 1, ...: max(epsilon, start decay^t)."""
    if not spec.scaled:
        return hyper.epsilon
    return jnp.maximum(hyper.epsilon, hyper.epsilon_start * hyper.epsilon_decay ** t.astype(hyper.epsilon.dtype))


def _shrink(spec: Spec, hyper: Hyper, epsilon: jax.Array) -> jax.Array:
    return 1 / (1 + epsilon / hyper.rho) if spec.unbalanced else jnp.ones_like(epsilon)


def _target(spec: Spec, hyper: Hyper, epsilon: jax.Array, log_weights: jax.Array, raw: jax.Array) -> jax.Array:
    """s raw + c: what an update without relaxation gives; 0 for a point without weight."""
    if spec.unbalanced:
        shrink = _shrink(spec, hyper, epsilon)[..., None]
        raw = shrink * raw
        if spec.counting:
            raw = raw + (shrink - 1) * epsilon[..., None] * _finite(log_weights)
    return jnp.where(_on(log_weights), raw, jnp.zeros_like(raw))


class _Updates(NamedTuple):
    """The two reductions, in the log domain or with a kernel."""

    rows: Callable[[jax.Array, jax.Array], jax.Array]
    cols: Callable[[jax.Array, jax.Array], jax.Array]


def log_updates(spec: Spec, source: Source) -> _Updates:
    """The reductions in the log domain."""
    return _Updates(functools.partial(_lse_rows, spec, source), functools.partial(_lse_cols, spec, source))


def _kernel_updates(kernel: jax.Array) -> _Updates:
    """log sums with K [... n m] at hand."""
    return _Updates(
        lambda epsilon, beta: _log(_times(kernel, jnp.exp(beta))),
        lambda epsilon, alpha: _log(_transposed_times(kernel, jnp.exp(alpha))),
    )


def _raw(lse: Callable[..., jax.Array], epsilon: jax.Array, log_weights: jax.Array, given: jax.Array) -> jax.Array:
    return -epsilon[..., None] * lse(epsilon, exponent(log_weights, given, epsilon))


def residual(spec: Spec, hyper: Hyper, updates: _Updates, log_a: jax.Array, log_b: jax.Array, f: jax.Array, g: jax.Array) -> jax.Array:
    """sum_i |a_i exp((f_i - f_i^next) / epsilon) - a_i| [...], for a balanced problem the violation |P 1 - a| of the row marginals.

    Relaxed iterations leave the columns open as well: theirs is added.
    """
    epsilon = hyper.epsilon

    def one(log_weights: jax.Array, old: jax.Array, raw: jax.Array) -> jax.Array:
        new = _target(spec, hyper, epsilon, log_weights, raw)
        return jnp.sum(jnp.abs(jnp.exp(exponent(log_weights, old - new, epsilon)) - _weights(log_weights)), axis=-1)

    error = one(log_a, f, _raw(updates.rows, epsilon, log_b, g))
    return error + one(log_b, g, _raw(updates.cols, epsilon, log_a, f)) if spec.relaxed else error


def _step(spec: Spec, hyper: Hyper, updates: _Updates, log_a: jax.Array, log_b: jax.Array) -> Callable[..., Any]:
    """((f, g), t) -> ((f, g), (f, phi, g, psi))."""

    def move(epsilon: jax.Array, log_weights: jax.Array, old: jax.Array, raw: jax.Array) -> jax.Array:
        new = _target(spec, hyper, epsilon, log_weights, raw)
        if not spec.relaxed:
            return new
        w = hyper.relaxation[..., None]
        return (1 - w) * old + w * new

    def step(carry: tuple[jax.Array, jax.Array], t: jax.Array) -> tuple[tuple[jax.Array, jax.Array], History]:
        f, g = carry
        epsilon = _epsilon_at(spec, hyper, t)
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
            small &= _epsilon_at(spec, hyper, t - 1) <= hyper.epsilon
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


def _iterate(spec: Spec, keep: bool, source: Source, log_a: jax.Array, log_b: jax.Array, hyper: Hyper) -> tuple[Any, ...]:
    """(f, g, iterations, history [... t n] or None) without a derivative."""

    def run(updates: _Updates) -> tuple[Any, ...]:
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
        return run(_kernel_updates(jnp.exp(-exponents)))

    limit = _range(source[0].dtype)
    safe = jnp.max(jnp.abs(exponents)) <= limit
    for log_weights in (log_a, log_b):
        safe &= jnp.min(_finite(log_weights)) >= -limit
    found = run(_kernel_updates(jnp.exp(-jnp.where(safe, exponents, jnp.zeros_like(exponents)))))
    for potential in found[:2]:
        safe &= jnp.max(jnp.abs(potential / hyper.epsilon[..., None])) <= limit  # false for nan
    return jax.lax.cond(safe, lambda: found, by_logs)


def _as_one_solve(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` of trees of arrays that all have leading axes; an axis of `jax.vmap` becomes one more of them."""

    @custom_vmap
    def call(*args: Any) -> Any:
        return fn(*args)

    @call.def_vmap
    def _(size: int, batched: Any, *args: Any) -> Any:
        args = jax.tree.map(lambda x, is_batched: x if is_batched else jnp.broadcast_to(x, (size, *x.shape)), args, tuple(batched))
        out = _as_one_solve(fn)(*args)
        return out, jax.tree.map(lambda _: True, out)

    return call


def potentials(spec: Spec, source: Source, log_a: jax.Array, log_b: jax.Array, hyper: Hyper) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(f [... n], g [... m], iterations [...]), differentiable in the source and the log-weights as the specification says."""
    if spec.derivative == "unrolled":
        return _iterate(spec, False, source, log_a, log_b, hyper)[:3]
    if spec.derivative == "envelope":
        source, log_a, log_b, hyper = jax.lax.stop_gradient((source, log_a, log_b, hyper))
        return _as_one_solve(lambda *args: _iterate(spec, False, *args)[:3])(source, log_a, log_b, hyper)
    return (_exact if spec.derivative == "exact" else _implicit)(spec, source, log_a, log_b, hyper)


# --- the derivative of the T steps themselves, from the potentials of each step


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exact(spec: Spec, source: Source, log_a: jax.Array, log_b: jax.Array, hyper: Hyper) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _as_one_solve(lambda *args: _iterate(spec, False, *args)[:3])(source, log_a, log_b, hyper)


def _exact_fwd(spec: Spec, *args: Any) -> tuple[Any, Any]:
    found = _as_one_solve(functools.partial(_iterate, spec, True))(*args)
    return found[:3], (args, found)


def _exact_bwd(spec: Spec, residuals: Any, cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
    (source, log_a, log_b, hyper), (f, _, iterations, history) = residuals
    arrays = (source, log_a, log_b, hyper, f, iterations, history, cotangents[0], cotangents[1])
    found = _as_one_solve(functools.partial(_steps_back, spec))(*arrays)
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
        return jnp.where(active[..., None] & _on(log_weights)[None], x, last[None])

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

    epsilon, limit = hyper.epsilon[..., None], _range(source[0].dtype)
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
        safe &= jnp.min(_finite(log_weights)) >= -limit
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
        epsilon = _epsilon_at(spec, hyper, entry.t)
        epsilon, shrink = epsilon[..., None], _shrink(spec, hyper, epsilon)[..., None]
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
    on_a, on_b = _on(problem.log_a), _on(problem.log_b)
    return to_source, jnp.where(on_a, to_log_a, jnp.zeros_like(to_log_a)), jnp.where(on_b, to_log_b, jnp.zeros_like(to_log_b))


def _back_by_logs(spec: Spec, problem: _Problem, iterations: jax.Array, entries: _Entry, carry: Any) -> tuple[Source, jax.Array, jax.Array]:
    """Q and R made again, of exponentials, in every step."""
    source, log_a, log_b, hyper = problem

    def rows_of(to_source: Source, entry: _Entry, y: jax.Array) -> tuple[Any, ...]:
        epsilon = _epsilon_at(spec, hyper, entry.t)
        alpha, beta = exponent(log_a, entry.f, epsilon), exponent(log_b, entry.psi, epsilon, weighted=False)
        pulled = _pull(spec, source, epsilon, alpha, beta, (jnp.ones_like(alpha),), (y,), to_source)
        return pulled.rows, pulled.source, None

    def cols_of(to_source: Source, entry: _Entry, x: jax.Array) -> tuple[Any, ...]:
        to_source, entry = jax.lax.optimization_barrier((to_source, entry))  # one matrix of exponentials at a time
        epsilon = _epsilon_at(spec, hyper, entry.t)
        alpha, beta = exponent(log_a, entry.phi, epsilon, weighted=False), exponent(log_b, entry.g_before, epsilon)
        pulled = _pull(spec, source, epsilon, alpha, beta, (x,), (jnp.ones_like(beta),), to_source)
        return pulled.cols, pulled.source, None

    return _walk_back(spec, problem, iterations, entries, carry, rows_of, cols_of, lambda to_source, _: to_source)


def _back_by_kernel(
    spec: Spec, problem: _Problem, iterations: jax.Array, drift: _Entry, carry: Any, f_last: jax.Array, psi_last: jax.Array
) -> tuple[Source, jax.Array, jax.Array]:
    """Q and R as one kernel, relative to the last potentials, scaled by rows and columns; the gradient of C as one matrix product."""
    source, log_a, log_b, hyper = problem
    epsilon = hyper.epsilon
    alpha, beta = exponent(log_a, f_last, epsilon, weighted=False), exponent(log_b, psi_last, epsilon, weighted=False)
    kernel = jnp.exp(alpha[..., :, None] + beta[..., None, :] - source[0] / epsilon[..., None, None])
    scales = drift._replace(
        f=jnp.exp(drift.f) * _weights(log_a)[None],
        phi=jnp.exp(drift.phi),
        psi=jnp.exp(drift.psi),
        g_before=jnp.exp(drift.g_before) * _weights(log_b)[None],
    )

    def rows_of(to_source: Source, entry: _Entry, y: jax.Array) -> tuple[Any, ...]:
        right = entry.psi * y
        return entry.f * _times(kernel, right), to_source, (entry.f, right)

    def cols_of(to_source: Source, entry: _Entry, x: jax.Array) -> tuple[Any, ...]:
        left = entry.phi * x
        return entry.g_before * _transposed_times(kernel, left), to_source, (left, entry.g_before)

    def collect(to_source: Source, products: Any) -> Source:
        left, right = (jnp.concatenate(pair, axis=0) for pair in zip(*products))
        return (to_source[0] + jnp.einsum("k...n,k...m->...nm", left, right, precision=jax.lax.Precision.HIGHEST),)

    to_source, to_log_a, to_log_b = _walk_back(spec, problem, iterations, scales, carry, rows_of, cols_of, collect)
    return (kernel * to_source[0],), to_log_a, to_log_b


# --- the derivative of the fixed point


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _implicit(spec: Spec, source: Source, log_a: jax.Array, log_b: jax.Array, hyper: Hyper) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _as_one_solve(lambda *args: _iterate(spec, False, *args)[:3])(source, log_a, log_b, hyper)


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
    on_a, on_b = _on(log_a), _on(log_b)
    to_f, to_g = (jnp.where(on, x, jnp.zeros_like(x)) for on, x in ((on_a, cotangents[0]), (on_b, cotangents[1])))
    alpha, beta = exponent(log_a, f, epsilon), exponent(log_b, g, epsilon)
    shrink = _shrink(spec, hyper, epsilon)[..., None]
    sums = _pull(spec, source, epsilon, alpha, beta, (jnp.ones_like(alpha),), (jnp.ones_like(beta),), None)
    rows, cols = (jnp.where(x > 0, x, jnp.ones_like(x)) for x in (sums.rows, sums.cols))
    live = on_b & (sums.cols > 0)
    if not spec.unbalanced:
        a = _weights(log_a)
        mass = jnp.sum(a, axis=-1, keepdims=True)
        gap = jnp.sum(to_f, axis=-1, keepdims=True) - jnp.sum(to_g, axis=-1, keepdims=True)
        to_f = to_f - a * gap / jnp.where(mass > 0, mass, jnp.ones_like(mass))

    if spec.cost_fn is None:
        kernel = jnp.exp(alpha[..., :, None] + beta[..., None, :] - source[0] / epsilon[..., None, None])
        times, transposed = functools.partial(_times, kernel), functools.partial(_transposed_times, kernel)
    else:
        times = lambda v: _pull(spec, source, epsilon, alpha, beta, (jnp.ones_like(alpha),), (v,), None).rows  # noqa: E731
        transposed = lambda u: _pull(spec, source, epsilon, alpha, beta, (u,), (jnp.ones_like(beta),), None).cols  # noqa: E731

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
    pulled = _pull(spec, source, epsilon, alpha, beta, (shrink * u, shrink * ones[0]), (ones[1], v), no_gradient)
    # f does not depend on its own weight, only g does, and the other way round; the sums above count both.
    to_log_a = epsilon[..., None] * (sums.rows * shrink * u - pulled.rows)
    to_log_b = epsilon[..., None] * (sums.cols * shrink * v - pulled.cols)
    if spec.counting and spec.unbalanced:
        offset = (shrink - 1) * epsilon[..., None]
        to_log_a, to_log_b = to_log_a + offset * sums.rows * u, to_log_b + offset * sums.cols * v
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


# --- one set of points against itself


def symmetric_potential(spec: Spec, source: Source, log_a: jax.Array, hyper: Hyper) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(f [... n], iterations, error) of a symmetric cost with equal weights: f <- (f + update) / 2. Not differentiated."""
    source, log_a, hyper = jax.lax.stop_gradient((source, log_a, hyper))
    updates = log_updates(spec, source)

    def update(f: jax.Array, epsilon: jax.Array) -> jax.Array:
        return _target(spec, hyper, epsilon, log_a, _raw(updates.rows, epsilon, log_a, f))

    def step(carry: tuple[jax.Array], t: jax.Array) -> tuple[tuple[jax.Array], None]:
        return (0.5 * (carry[0] + update(carry[0], _epsilon_at(spec, hyper, t))),), None

    def error_of(carry: tuple[jax.Array]) -> jax.Array:
        masses = jnp.exp(exponent(log_a, carry[0] - update(carry[0], hyper.epsilon), hyper.epsilon))
        return jnp.sum(jnp.abs(masses - _weights(log_a)), axis=-1)

    carry, iterations, _ = _loop(spec, hyper, step, error_of, (_zeros(log_a),), keep=False, differentiable=False)
    return carry[0], iterations, error_of(carry)
