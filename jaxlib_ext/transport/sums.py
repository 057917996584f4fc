"""Sums of n m exponentials, which all that Sinkhorn does is made of, and what they are sums of; tile by tile if the cost is made from points.

All arrays carry the same leading axes, one problem each.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = [
    "CostFn",
    "History",
    "Hyper",
    "Pulled",
    "Source",
    "Spec",
    "exponent",
    "exponent_range",
    "finite",
    "is_on",
    "lse_cols",
    "lse_rows",
    "pull",
    "safe_log",
    "tile_sums",
    "times",
    "transposed_times",
    "weights",
]

CostFn = Callable[[jax.Array, jax.Array], jax.Array]
Source = tuple[jax.Array, ...]
History = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


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


def exponent_range(dtype: Any) -> float:
    """Exponents up to this leave room in the range of the dtype for what they are multiplied with: 60 in float32, 600 in float64."""
    return 60.0 if dtype == jnp.float32 else 600.0


def is_on(log_weights: jax.Array) -> jax.Array:
    """[... n] whether a point has weight."""
    return ~jnp.isneginf(log_weights)


def finite(log_weights: jax.Array) -> jax.Array:
    """log weights, 0 where there is none."""
    return jnp.where(is_on(log_weights), log_weights, jnp.zeros_like(log_weights))


def weights(log_weights: jax.Array) -> jax.Array:
    """The weights themselves."""
    return jnp.where(is_on(log_weights), jnp.exp(finite(log_weights)), jnp.zeros_like(log_weights))


def exponent(log_weights: jax.Array, potential: jax.Array, epsilon: jax.Array, *, weighted: bool = True) -> jax.Array:
    """log weight + potential / epsilon [... n] (or without the weight); -inf for a point without weight."""
    scaled = potential / epsilon[..., None]
    return jnp.where(is_on(log_weights), scaled + finite(log_weights) if weighted else scaled, jnp.full_like(scaled, -jnp.inf))


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
    total = times(terms, ones) if axis == -1 else transposed_times(terms, ones)
    return safe_log(total) + jnp.where(total > 0, jnp.squeeze(top, axis), jnp.zeros_like(total))


def safe_log(total: jax.Array) -> jax.Array:
    """log of a sum, 0 where it is 0."""
    return jnp.log(jnp.where(total > 0, total, jnp.ones_like(total)))


def lse_rows(spec: Spec, source: Source, epsilon: jax.Array, beta: jax.Array) -> jax.Array:
    """log sum_j exp(beta_j - C_ij / epsilon) [... n]."""
    of = lambda cost: _log_sum(beta[..., None, :] - cost / epsilon[..., None, None], axis=-1)  # noqa: E731
    if spec.cost_fn is None:
        return of(source[0])
    cost_fn, (x, y) = spec.cost_fn, source
    return _join(jax.lax.map(lambda tile: of(cost_fn(tile, y)), _tiles(_block(spec, x), x, -2)), -1, x.shape[-2])


def lse_cols(spec: Spec, source: Source, epsilon: jax.Array, alpha: jax.Array) -> jax.Array:
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
    return safe_log(total) + jnp.where(total > 0, top, jnp.zeros_like(top))


def _placed(matrix: jax.Array) -> bool:
    """Whether the type of the array names mesh axes; a contraction would then have to be told where its result lies, a sum need not."""
    return any(axis is not None for axis in jax.typeof(matrix).sharding.spec)


def times(matrix: jax.Array, v: jax.Array) -> jax.Array:
    """sum_j K_ij v_j [... n]."""
    if _placed(matrix):
        return jnp.sum(matrix * v[..., None, :], axis=-1)
    return jnp.matmul(matrix, v[..., :, None], precision=jax.lax.Precision.HIGHEST)[..., 0]


def transposed_times(matrix: jax.Array, u: jax.Array) -> jax.Array:
    """sum_i K_ij u_i [... m]."""
    if _placed(matrix):
        return jnp.sum(matrix * u[..., :, None], axis=-2)
    return jnp.matmul(u[..., None, :], matrix, precision=jax.lax.Precision.HIGHEST)[..., 0, :]


class Pulled(NamedTuple):
    """Sums of W_ij = exp(alpha_i + beta_j - C_ij / epsilon) sum_k left_ki right_kj, and the cotangent of the source for dC = W."""

    rows: jax.Array
    cols: jax.Array
    source: Source | None


def pull(
    spec: Spec,
    source: Source,
    epsilon: jax.Array,
    alpha: jax.Array,
    beta: jax.Array,
    left: tuple[jax.Array, ...],
    right: tuple[jax.Array, ...],
    cotangent: Source | None,
) -> Pulled:
    """The sums, and the cotangent added to the given one (None for none). It is what every backward pass is made of."""

    def of(cost: jax.Array, alpha: jax.Array, left: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        plan = jnp.exp(alpha[..., :, None] + beta[..., None, :] - cost / epsilon[..., None, None])
        rows = sum((a * times(plan, b) for a, b in zip(left, right)), start=jnp.zeros_like(alpha))
        cols = sum((b * transposed_times(plan, a) for a, b in zip(left, right)), start=jnp.zeros_like(beta))
        return rows, cols, plan * sum(a[..., :, None] * b[..., None, :] for a, b in zip(left, right))

    if spec.cost_fn is None:
        rows, cols, weighted = of(source[0], alpha, left)
        return Pulled(rows, cols, None if cotangent is None else (cotangent[0] + weighted,))
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
    return Pulled(_join(rows, -1, x.shape[-2]), cols, given)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(held: bool, cost: jax.Array, alpha: jax.Array, beta: jax.Array, epsilon: jax.Array) -> tuple[jax.Array, ...]:
    """`tile_sums` of a cost at hand."""
    del held
    plan = jnp.exp(alpha[..., :, None] + beta[..., None, :] - cost / epsilon[..., None, None])
    total = jnp.sum(times(plan * cost, jnp.ones_like(beta)), axis=-1)
    return total, times(plan, jnp.ones_like(beta)), transposed_times(plan, jnp.ones_like(alpha))


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
    to_alpha, to_beta = times(to_exponent, jnp.ones_like(beta)), transposed_times(to_exponent, jnp.ones_like(alpha))
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
