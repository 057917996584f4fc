"""Checked arguments, and chunks of tokens and of the vocabulary as the fused functions take them."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from janax.jaxlib_ext import dtypes
from janax.jaxlib_ext.checks import check_shapes, require_integers

__all__ = [
    "Chunks",
    "Options",
    "Tile",
    "Vocabulary",
    "accumulate",
    "accumulator",
    "agree",
    "beside",
    "dot",
    "localise",
    "placed",
    "prepare",
    "put_rows",
    "rows",
    "token_chunks",
    "vary",
    "varying",
    "vocab_chunks",
]

_GROUPS = 16  # equal parts of the vocabulary in a chunk: the lengths of a mesh axis that may shard it divide this
_LANES = 128  # windows are multiples of a TPU's vector width
_TOKEN_GROUPS = 256


# --- arguments


class Options(NamedTuple):
    """The static arguments. `with_mean`: also sum_v p_v z_v, for the entropy."""

    softcap: float | None
    with_mean: bool
    keep_expectation: bool
    vocab_chunk: int | None
    token_chunk: int | None
    transposed: bool

    @property
    def axis(self) -> int:
        """Which axis of w is the vocabulary."""
        return 0 if self.transposed else 1


def accumulator(*arrays: jax.Array) -> Any:
    """The dtype to accumulate in: float64 if any is, else float32."""
    wide = any(dtypes.floor_dtype(x.dtype) == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def prepare(name: str, options: Options, h: Any, w: Any, bias: Any, tokens: Any, temperature: Any, *, prefix: str = "") -> tuple[Any, ...]:
    """Checked: h [n d] and w [d v] or [v d] of one dtype, bias [v] or None, int32 tokens [n] or None, temperature [], and the leading axes of h.

    `prefix` stands before the names of h, w, bias and softcap in messages.
    """
    axes = check_shapes(
        name,
        **{
            f"{prefix}h": (h, "... d"),
            f"{prefix}w": (w, "v d" if options.transposed else "d v"),
            "tokens": (tokens, "..."),
            f"{prefix}bias": (bias, "v"),
            "temperature": (temperature, ""),
        },
    )
    for argument, value in (("vocab_chunk", options.vocab_chunk), ("token_chunk", options.token_chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: {argument!r} is {value}, expected at least 1")
    if options.softcap is not None and not options.softcap > 0:
        raise ValueError(f"{name}: '{prefix}softcap' is {options.softcap}, expected a positive number or None")
    if axes["v"] == 0:
        raise ValueError(f"{name}: '{prefix}w' has shape {jnp.shape(w)}, expected at least one token")
    h, w = jnp.asarray(h), jnp.asarray(w)
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (h, w)):
        names = f"'{prefix}h' and '{prefix}w'"
        raise ValueError(f"{name}: {names} have dtypes {h.dtype.name} and {w.dtype.name}, expected floating-point arrays")
    if h.dtype != w.dtype:
        h, w = h.astype(accumulator(h, w)), w.astype(accumulator(h, w))
    if bias is not None and not jnp.issubdtype(jnp.result_type(bias), jnp.floating):
        bias = dtypes.at_least_float32(bias)
    bias = None if bias is None else jnp.asarray(bias)
    if tokens is not None:
        require_integers(name, tokens=tokens)
        tokens = jnp.asarray(tokens).astype(jnp.int32).reshape(-1)
    return h.reshape(-1, axes["d"]), w, bias, tokens, jnp.asarray(temperature).astype(accumulator(h, w)), h.shape[:-1]


def varying(x: Any) -> frozenset[str]:
    """The mesh axes over which a value inside `jax.shard_map` differs between devices (the attribute's place depends on the version)."""
    kind = jax.typeof(x)
    return frozenset(getattr(getattr(kind, "mat", None), "varying", None) or getattr(kind, "vma", ()))


def agree(name: str, axis_name: str | None, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inside `shard_map`, makes all arrays differ over the same mesh axes; the transpose of that is the sum over devices of a gradient."""
    axes = frozenset[str]().union(*(varying(x) for x in jax.tree.leaves(arrays)))
    arrays = jax.tree.map(lambda x: vary(x, axes | ({axis_name} if axis_name else set())), arrays)
    if axis_name is not None and axis_name not in varying(arrays[0]):
        raise ValueError(f"{name}: 'axis_name' is {axis_name!r}, expected an axis of a surrounding jax.shard_map with check_vma=True")
    return arrays


def vary(x: Any, axes: frozenset[str]) -> Any:
    """x, made to differ between devices along these axes too."""
    missing = tuple(sorted(axes - varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def localise(tokens: jax.Array, v: int, axis_name: str | None) -> jax.Array:
    """Ids counted from the first token of this device's part of the vocabulary, of length v."""
    return tokens if axis_name is None else tokens - jax.lax.axis_index(axis_name).astype(jnp.int32) * v


# --- chunks


class Chunks(NamedTuple):
    """An axis of groups x inner entries, walked in `count` steps; a step takes one window of the inner axis in every group.

    The last window is moved back to end with the axis, so it may repeat entries (`fresh` tells). A mesh axis whose length divides `groups`
    shards every step evenly.
    """

    groups: int
    inner: int
    width: int
    count: int

    @classmethod
    def of(cls, size: int, target: int, groups: int, multiple: int) -> "Chunks":
        groups, target = math.gcd(size, groups) if size else 1, max(target, 1)
        while groups > target:
            groups = groups // next(p for p in range(2, groups + 1) if groups % p == 0)
        inner = size // groups
        width = max(target // groups, 1)
        width = min(-(-width // multiple) * multiple if width >= multiple else width, inner)
        return cls(groups, inner, width, max(-(-inner // width), 1) if width else 1)

    @property
    def overlaps(self) -> bool:
        return self.count * self.width != self.inner

    def start(self, step: Any) -> jax.Array:
        return jnp.minimum(step * self.width, self.inner - self.width)

    def split(self, x: jax.Array, axis: int) -> jax.Array:
        """[... size ...] as [... groups inner ...]."""
        return x.reshape(*x.shape[:axis], self.groups, self.inner, *x.shape[axis + 1 :])

    def window(self, x: jax.Array, step: Any, axis: int) -> jax.Array:
        """[... groups inner ...] -> [... groups width ...]; `axis` is that of the groups."""
        return x if self.count == 1 else jax.lax.dynamic_slice_in_dim(x, self.start(step), self.width, axis + 1)

    def put(self, x: jax.Array, new: jax.Array, step: Any, axis: int) -> jax.Array:
        return new if self.count == 1 else jax.lax.dynamic_update_slice_in_dim(x, new, self.start(step), axis + 1)

    def ids(self, step: Any) -> jax.Array:
        """[groups width] positions on the whole axis."""
        grid = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (self.groups, self.width))
        return grid(0) * self.inner + grid(1) + self.start(step)

    def fresh(self, step: Any) -> jax.Array:
        """[groups width] whether no earlier step had the entry."""
        return jax.lax.broadcasted_iota(jnp.int32, (self.groups, self.width), 1) + self.start(step) >= step * self.width

    def loop(self, body: Callable[[Any, Any], Any], carry: Any) -> Any:
        """carry <- body(carry, step) over all steps."""
        if self.count == 1:
            return body(carry, jnp.int32(0))
        return jax.lax.scan(lambda carry, step: (body(carry, step), None), carry, jnp.arange(self.count, dtype=jnp.int32))[0]


def vocab_chunks(options: Options, v: int) -> Chunks:
    """Windows over the vocabulary."""
    target = options.vocab_chunk or min(max(v // 32, 1024), 2048)
    return Chunks.of(v, min(target, v), _GROUPS, _LANES)


def token_chunks(n: int, target: int | None) -> Chunks:
    """Windows over the tokens."""
    target = target or (1024 if n <= 8192 else n)
    return Chunks.of(n, min(target, n), _TOKEN_GROUPS, 1)


def rows(chunks: Chunks, arrays: Any, step: Any) -> Any:
    """The tokens of a step, [n ...] -> [m ...]."""
    if chunks.count == 1:
        return arrays

    def pick(x: jax.Array) -> jax.Array:
        window = chunks.window(chunks.split(x, 0), step, 0)
        return window.reshape(-1, *x.shape[1:])

    return jax.tree.map(pick, arrays)


def put_rows(chunks: Chunks, arrays: Any, new: Any, step: Any) -> Any:
    """Undoes `rows`: writes the results of a step into arrays of all tokens."""
    if chunks.count == 1:
        return new

    def put(x: jax.Array, y: jax.Array) -> jax.Array:
        y = y.reshape(chunks.groups, chunks.width, *x.shape[1:])
        return chunks.put(chunks.split(x, 0), y, step, 0).reshape(x.shape)

    return jax.tree.map(put, arrays, new)


def dot(a: jax.Array, b: jax.Array, axes: Sequence[Sequence[int]], like: jax.Array | None = None) -> jax.Array:
    """Contraction accumulated in float32 or wider. `like`: where axes are explicit, the result is placed as this array."""
    placement = None if like is None else jax.typeof(like).sharding
    if placement is not None and AxisType.Explicit not in placement.mesh.axis_types:
        placement = None
    dimensions = ((tuple(axes[0]), tuple(axes[1])), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=accumulator(a, b), out_sharding=placement)


def placed(x: jax.Array, like: jax.Array) -> jax.Array:
    """Where axes are explicit, gives the axes of `x` that have the lengths of those of `like` their placement."""
    placement = jax.typeof(like).sharding
    if AxisType.Explicit not in placement.mesh.axis_types:
        return x
    return jax.sharding.reshard(x, jax.P(*(axis if n == m else None for axis, n, m in zip(placement.spec, x.shape, like.shape))))


# --- one chunk of logits


class Tile(NamedTuple):
    """The logits of some tokens over one chunk of the vocabulary, [m g c], or over all of it, [m v].

    Attributes:
      z: logits; -inf where forbidden or already seen in an earlier chunk.
      slope: as z, or [], dz / d(h w).
      chosen: where the token given is.
    """

    z: jax.Array
    slope: jax.Array
    chosen: jax.Array

    @property
    def finite(self) -> jax.Array:
        """z with 0 for -inf, to be multiplied by a probability of 0."""
        return jnp.where(jnp.isneginf(self.z), jnp.zeros_like(self.z), self.z)


class Vocabulary(NamedTuple):
    """The unembedding in the form in which chunks are taken: w [d g r], or [g r d], bias [g r] or None, temperature []."""

    chunks: Chunks
    axis: int
    w: jax.Array
    bias: jax.Array | None
    temperature: jax.Array

    @classmethod
    def of(cls, options: Options, w: jax.Array, bias: jax.Array | None, temperature: jax.Array) -> "Vocabulary":
        chunks = vocab_chunks(options, w.shape[options.axis])
        return cls(chunks, options.axis, chunks.split(w, options.axis), None if bias is None else chunks.split(bias, 0), temperature)

    def window(self, step: Any) -> tuple[jax.Array, jax.Array | None]:
        """w [d g c] or [g c d] and bias [g c] of a step."""
        return self.chunks.window(self.w, step, self.axis), None if self.bias is None else self.chunks.window(self.bias, step, 0)

    def flat(self, w: jax.Array) -> jax.Array:
        """A window, or all of w, with its vocabulary as one axis: of three axes the compiler would transpose or copy some."""
        return w.reshape(w.shape[0], -1) if self.axis else w.reshape(-1, w.shape[2])

    def logits(self, h: jax.Array, w: jax.Array) -> jax.Array:
        """h w of a window, or of all of w, as one axis."""
        return dot(h, self.flat(w), ((1,), (1 - self.axis,)))

    def back(self, dx: jax.Array, w: jax.Array, like: jax.Array) -> jax.Array:
        """sum_v dx_v w_v [m d] over a window, or all of w."""
        return dot(dx.astype(w.dtype).reshape(dx.shape[0], -1), self.flat(w), ((1,), (self.axis,)), like=like)

    def outer(self, dx: jax.Array, h: jax.Array, w: jax.Array) -> jax.Array:
        """sum_m dx_m h_m over a window w, [g c d]."""
        flat = dx.astype(w.dtype).reshape(dx.shape[0], -1)
        return dot(flat, h, ((0,), (0,)), like=self.rows(w).reshape(-1, h.shape[1])).reshape(*dx.shape[1:], h.shape[1])

    def gradients(self, dx: jax.Array, h: jax.Array, to_w: jax.Array, to_bias: jax.Array | None) -> tuple[jax.Array, jax.Array, Any]:
        """The gradient of h [m d], and those of w and bias added to the sums given, from the derivatives dx [m v] with respect to h w."""
        split = self.chunks.split(dx, 1)

        def add(sums: tuple[jax.Array, Any], step: Any) -> tuple[jax.Array, Any]:
            to_w, to_bias = sums
            new = self.chunks.window(split, step, 1)
            if self.chunks.overlaps:
                new = jnp.where(self.chunks.fresh(step)[None], new, jnp.zeros_like(new))
            if to_bias is not None:
                to_bias = accumulate(self.chunks, to_bias, jnp.sum(new, axis=0), step, 0, add=True)
            return self.add(to_w, self.outer(new, h, self.window(step)[0]), step, add=True), to_bias

        return self.back(dx, self.w, h), *self.chunks.loop(add, (to_w, to_bias))

    def rows(self, w: jax.Array) -> jax.Array:
        """A window as [g c d]."""
        return jnp.transpose(w, (1, 2, 0)) if self.axis else w

    def add(self, sums: jax.Array, rows: jax.Array, step: Any, *, add: bool) -> jax.Array:
        """Writes or adds the gradient of a window [g c d] to that of w."""
        return accumulate(self.chunks, sums, jnp.transpose(rows, (2, 0, 1)) if self.axis else rows, step, self.axis, add=add)

    def capped(self, softcap: float | None, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(cap(x) / temperature, its derivative) for x = h w + bias of any shape."""
        heat = 1 / self.temperature  # multiplied by: divisions are made once and kept, as long as the vocabulary
        if softcap is None:
            return x * heat, heat
        bounded = jnp.tanh(x / softcap)
        return bounded * (softcap * heat), (1 - bounded * bounded) * heat

    def tile(self, softcap: float | None, h: jax.Array, tokens: jax.Array, window: tuple[jax.Array, jax.Array | None], step: Any) -> Tile:
        """The tile of a window."""
        x = self.logits(h, window[0])
        return self._tile(softcap, x.reshape(h.shape[0], self.chunks.groups, self.chunks.width), tokens, window[1], step)

    def tile_of(self, softcap: float | None, x: jax.Array, tokens: jax.Array, step: Any) -> Tile:
        """The tile of a step with h w = x [m v]; of all of the vocabulary if it is None."""
        if step is not None:
            x = self.chunks.window(self.chunks.split(x, 1), step, 1)
            return self._tile(softcap, x, tokens, self.window(step)[1], step)
        return self._tile(softcap, x, tokens, None if self.bias is None else self.bias.reshape(-1), None)

    def _tile(self, softcap: float | None, x: jax.Array, tokens: jax.Array, bias: jax.Array | None, step: Any) -> Tile:
        barrier = None  # like an x: -inf where there is nothing to be counted, else 0: added, so that its placement need not be that of x
        if bias is not None:
            bias = bias.astype(x.dtype)
            barrier = jnp.where(jnp.isneginf(bias), bias, jnp.zeros_like(bias))
            x = x + jnp.where(jnp.isneginf(bias), jnp.zeros_like(bias), bias)[None]
        z, slope = self.capped(softcap, x)
        ids = jax.lax.iota(jnp.int32, x.shape[1]) if step is None else self.chunks.ids(step)
        if step is not None and self.chunks.overlaps:
            fresh = self.chunks.fresh(step)
            ids = jnp.where(fresh, ids, jnp.full_like(ids, jnp.iinfo(ids.dtype).min))
            seen = jnp.where(fresh, jnp.zeros_like(ids, dtype=z.dtype), -jnp.inf)
            barrier = seen if barrier is None else barrier + seen
        if barrier is not None:
            z = z + barrier[None]
        return Tile(z, slope, placed(ids[None], z) == beside(tokens, z))


def beside(x: jax.Array, z: jax.Array) -> jax.Array:
    """Numbers of tokens [m] with axes to be broadcast against z [m ...]."""
    return x.reshape(-1, *(1,) * (z.ndim - 1))


def accumulate(chunks: Chunks, sums: jax.Array, new: Any, step: Any, axis: int, *, add: bool) -> jax.Array:
    """Writes the window of a step, or adds to it where windows overlap or are met more than once."""
    new = new.astype(sums.dtype)
    return chunks.put(sums, chunks.window(sums, step, axis) + new if add else new, step, axis)
