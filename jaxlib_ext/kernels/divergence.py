"""The inner block of the fused divergences, from the logits of both sides: everything that is as long as the vocabulary in one kernel.

    sums = divergence.block(REVERSE_KL, x, y, platform="tpu", temperature=2.0)       # or "gpu"; interpret=True runs them on CPU

Rows are read twice, first for the normalisers, then for the values and the slopes, which are written once. On TPU a grid walks rows, the two
readings and the vocabulary in this order, with the sums in vector memory; on GPUs each Triton program does so for a few rows in two loops.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.extend.core import primitives
from jax.typing import ArrayLike

from janax.jaxlib_ext.checks import check_shapes, one_of
from janax.jaxlib_ext.divergence import Generator, numerics, terms_and_slopes

__all__ = ["BlockSums", "block"]

_TPU_ROWS, _TPU_COLUMNS = 64, 1024  # five tiles in flight, twice: 2.5 MiB of 16 (v5e) or more of vector memory
_GPU_ROWS, _GPU_COLUMNS = 2, 1024


class BlockSums(NamedTuple):
    """What the block gives for m tokens and v entries of the vocabulary.

    Attributes:
      logsumexp: [m] the student's log-normaliser; -inf where all is forbidden.
      teacher_logsumexp: [m] the teacher's.
      values: [m] sum_v q f(p / q).
      kappa: [m] sum of the slopes.
      slopes: [m v] derivative of the values with respect to log p_v as if these were free; 0 where p forbids the token.
    """

    logsumexp: jax.Array
    teacher_logsumexp: jax.Array
    values: jax.Array
    kappa: jax.Array
    slopes: jax.Array


class _Static(NamedTuple):
    """What the kernels are specialised to: the generator without its parameters, soft caps, sizes, and which biases there are."""

    tree: Any
    softcap: float | None
    teacher_softcap: float | None
    v: int
    biased: tuple[bool, bool]


def block(
    generator: Generator,
    x: jax.Array,
    y: jax.Array,
    *,
    platform: str,
    bias: jax.Array | None = None,
    teacher_bias: jax.Array | None = None,
    temperature: ArrayLike = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    interpret: bool = False,
) -> BlockSums:
    """Normalisers, values sum_v q f(p / q) and slopes of softmax(cap(x + bias) / temperature) = p and the teacher's q, by rows, on one device.

    Args:
      generator: f.
      x: [m v] the student's h w, float32.
      y: [m v] the teacher's, float32.
      platform: "tpu", or "gpu" (CUDA, by Triton). Static.
      bias: [v] added to x; -inf forbids a token.
      teacher_bias: [v] the same for y.
      temperature: [] > 0, divides the capped logits of both. Traced.
      softcap: c in cap(x) = c tanh(x / c), or None. Static.
      teacher_softcap: The teacher's. Static.
      interpret: Run the kernel on CPU. Static.

    Returns:
      Sums and slopes, in nats, float32. Not differentiated: `fused.divergence` makes the gradient of them.

    Raises:
      ValueError: if shapes disagree, x and y are not float32, or the platform is another.
    """
    one_of("block", "platform", platform, ("tpu", "gpu"))
    check_shapes("block", x=(x, "m v"), y=(y, "m v"), bias=(bias, "v"), teacher_bias=(teacher_bias, "v"), temperature=(temperature, ""))
    if x.dtype != jnp.float32 or y.dtype != jnp.float32:
        raise ValueError(f"block: 'x' and 'y' have dtypes {x.dtype.name} and {y.dtype.name}, expected float32")
    leaves, tree = jax.tree.flatten(generator)
    numbers = jnp.stack([jnp.asarray(number, jnp.float32) for number in (temperature, *leaves)])
    static = _Static(tree, softcap, teacher_softcap, x.shape[1], (bias is not None, teacher_bias is not None))
    rows = [jnp.asarray(b, jnp.float32)[None] for b in (bias, teacher_bias) if b is not None]
    call = _on_tpu if platform == "tpu" else _on_gpu
    out = call(static, numbers, x, y, rows, interpret=interpret)
    logsumexp, teacher, values, kappa = (column[:, 0] for column in out[:4])
    return BlockSums(logsumexp, teacher, values, kappa, out[4])


def _on_tpu(static: _Static, numbers: jax.Array, x: jax.Array, y: jax.Array, rows: list[jax.Array], *, interpret: bool) -> Any:
    from jax.experimental.pallas import tpu as pltpu

    m, v = x.shape
    height, width = min(_TPU_ROWS, -(-m // 8) * 8), min(_TPU_COLUMNS, -(-v // 128) * 128)
    grid = (pl.cdiv(m, height), 2, pl.cdiv(v, width))

    def kernel(numbers: Any, x: Any, y: Any, *refs: Any) -> None:
        biases, (lse_p, lse_q, values, kappa, slopes), scratch = refs[: len(rows)], refs[len(rows) : len(rows) + 5], refs[len(rows) + 5 :]
        reading, column = pl.program_id(1), pl.program_id(2)
        given = [numbers[k] for k in range(numbers.shape[0])]
        ids = jax.lax.broadcasted_iota(jnp.int32, (height, width), 1) + column * width
        z = _tempered(static, given, (x[...], y[...]), [ref[...] for ref in biases], ids)

        @pl.when((reading == 0) & (column == 0))
        def _():
            for ref, value in zip(scratch, (-jnp.inf, 0.0, -jnp.inf, 0.0)):
                ref[...] = jnp.full((height, 1), value, jnp.float32)

        @pl.when(reading == 0)
        def _():
            for z_side, largest, total in zip(z, scratch[::2], scratch[1::2]):
                largest[...], total[...] = _fold((largest[...], total[...]), z_side)

        @pl.when((reading == 1) & (column == 0))
        def _():
            for out, largest, total in zip((lse_p, lse_q), scratch[::2], scratch[1::2]):
                out[...] = _logsumexp(largest[...], total[...])
            values[...] = jnp.zeros((height, 1), jnp.float32)
            kappa[...] = jnp.zeros((height, 1), jnp.float32)

        @pl.when(reading == 1)
        def _():
            value, slope = _terms(static, given, z, (lse_p[...], lse_q[...]))
            slopes[...] = slope
            values[...] += jnp.sum(value, axis=1, keepdims=True)
            kappa[...] += jnp.sum(slope, axis=1, keepdims=True)

    tile = pl.BlockSpec((height, width), lambda i, p, j: (i, j))
    row = pl.BlockSpec((height, 1), lambda i, p, j: (i, 0))
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            tile,
            tile,
            *(pl.BlockSpec((1, width), lambda i, p, j: (0, j)) for _ in rows),
        ],
        out_specs=[row] * 4
        + [pl.BlockSpec((height, width), lambda i, p, j: (i, p * j))],  # stays at the first tile while nothing is written
        out_shape=_outputs(m, v),
        scratch_shapes=[pltpu.VMEM((height, 1), jnp.float32)] * 4,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
    )(numbers, x, y, *rows)


def _on_gpu(static: _Static, numbers: jax.Array, x: jax.Array, y: jax.Array, rows: list[jax.Array], *, interpret: bool) -> Any:
    from jax.experimental.pallas import triton as plgpu  # imports Triton's dialect, which TPU installations may lack

    m, v = x.shape
    height, width = _GPU_ROWS, _GPU_COLUMNS

    def kernel(numbers: Any, x: Any, y: Any, *refs: Any) -> None:
        biases, (lse_p, lse_q, values, kappa, slopes) = refs[: len(rows)], refs[len(rows) :]
        first = pl.program_id(0) * height
        given = [numbers[k] for k in range(numbers.shape[0])]
        rows_in = first + jnp.arange(height) < m

        def tile(column: Any) -> tuple[tuple[jax.Array, jax.Array], Any, jax.Array]:
            at = (pl.ds(first, height), pl.ds(column * width, width))
            ids = jax.lax.broadcasted_iota(jnp.int32, (height, width), 1) + column * width
            inside = rows_in[:, None] & (ids < v)
            raw = [plgpu.load(ref.at[at], mask=inside, other=0.0) for ref in (x, y)]
            added = [plgpu.load(ref.at[pl.ds(0, 1), at[1]], mask=ids[:1] < v, other=0.0) for ref in biases]
            return _tempered(static, given, (raw[0], raw[1]), added, ids), at, inside

        def normalise(column: Any, sums: Any) -> Any:
            z, _, _ = tile(column)
            return tuple(_fold(side, z_side) for side, z_side in zip(sums, z))

        steps = pl.cdiv(v, width)
        start = (jnp.full((height, 1), -jnp.inf, jnp.float32), jnp.zeros((height, 1), jnp.float32))
        student, teacher = jax.lax.fori_loop(0, steps, normalise, (start, start))
        bases = _logsumexp(*student), _logsumexp(*teacher)

        def collect(column: Any, sums: Any) -> Any:
            z, at, inside = tile(column)
            value, slope = _terms(static, given, z, bases)
            plgpu.store(slopes.at[at], slope, mask=inside)
            return sums[0] + jnp.sum(value, axis=1, keepdims=True), sums[1] + jnp.sum(slope, axis=1, keepdims=True)

        totals = jax.lax.fori_loop(0, steps, collect, (start[1], start[1]))
        for ref, value in zip((lse_p, lse_q, values, kappa), (*bases, *totals)):
            plgpu.store(ref.at[pl.ds(first, height), pl.ds(0, 1)], value, mask=rows_in[:, None])

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(m, height),),
        out_shape=_outputs(m, v),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(numbers, x, y, *rows)


# --- what both kernels are made of


def _outputs(m: int, v: int) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((m, 1), jnp.float32)] * 4 + [jax.ShapeDtypeStruct((m, v), jnp.float32)]


def _tempered(
    static: _Static, given: list[jax.Array], raw: tuple[jax.Array, jax.Array], biases: list[jax.Array], ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Capped logits over the temperature, -inf outside the vocabulary and where forbidden."""
    left = list(biases)
    out = []
    for x, cap, biased in zip(raw, (static.softcap, static.teacher_softcap), static.biased):
        allowed = ids < static.v
        if biased:
            bias = left.pop(0)
            forbidden = bias == -jnp.inf
            x = x + jnp.where(forbidden, 0.0, bias)
            allowed = allowed & ~forbidden
        x = x if cap is None else cap * jnp.tanh(x / cap)
        out.append(jnp.where(allowed, x / given[0], -jnp.inf))
    return out[0], out[1]


def _fold(sums: tuple[jax.Array, jax.Array], z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(largest, total) [m 1] with one tile more."""
    largest, total = sums
    new = jnp.maximum(largest, jnp.max(z, axis=1, keepdims=True))
    base = jnp.where(new == -jnp.inf, 0.0, new)
    return new, total * jnp.exp(largest - base) + jnp.sum(jnp.exp(z - base), axis=1, keepdims=True)


def _logsumexp(largest: jax.Array, total: jax.Array) -> jax.Array:
    return jnp.where(total > 0, largest + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)


def _terms(
    static: _Static, given: list[jax.Array], z: tuple[jax.Array, jax.Array], bases: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """(q f(p / q), its derivative with respect to log p) by entries; zeros where either side forbids everything."""
    generator = jax.tree.unflatten(static.tree, given[1:])
    valid = (bases[0] > -jnp.inf) & (bases[1] > -jnp.inf)
    log_p, log_q = (
        jnp.where(side == -jnp.inf, numerics.FORBIDDEN, side - jnp.where(base == -jnp.inf, 0.0, base)) for side, base in zip(z, bases)
    )

    def value_and_slope(log_p: jax.Array, log_q: jax.Array, *parameters: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = jax.tree.unflatten(jax.tree.structure(generator), parameters)
        return terms_and_slopes(own, log_p, log_q)

    value, slope = _without_expm1(value_and_slope)(log_p, log_q, *given[1:])
    return jnp.where(valid, value, 0.0), jnp.where(valid & (z[0] > -jnp.inf), slope, 0.0)


def _without_expm1(f: Callable[..., Any]) -> Callable[..., Any]:
    """f with exp(x) - 1 as 2 tanh(x/2) / (1 - tanh(x/2)), which keeps its digits: TPU kernels have no such operation."""

    def run(jaxpr: Any, constants: Any, *arguments: Any) -> list[Any]:
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments)))
        read = lambda atom: atom.val if hasattr(atom, "val") else known[atom]  # noqa: E731
        for equation in jaxpr.eqns:
            values = [read(atom) for atom in equation.invars]
            inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
            if equation.primitive is primitives.expm1_p:
                half = jnp.tanh(0.5 * values[0])
                out = [2 * half / (1 - half)]
            elif inner is not None:
                out = run(inner.jaxpr, inner.consts, *values)
            else:
                out = equation.primitive.bind(*values, **equation.params)
                out = out if equation.primitive.multiple_results else [out]
            known.update(zip(equation.outvars, out))
        return [read(atom) for atom in jaxpr.outvars]

    @functools.wraps(f)
    def wrapped(*arguments: Any) -> tuple[Any, ...]:
        closed = jax.make_jaxpr(f)(*arguments)
        return tuple(run(closed.jaxpr, closed.consts, *arguments))

    return wrapped
