"""Attention of a decoder, in parts that share one softmax: over a text itself, over a cache, over a prefix that several rows share.

form = Form(softcap=None, chunked=False)
part = over(form, windows, queries, keys)                # masks are made here, once for all layers
y = joined([part(kind, q, k, v)], q.dtype)               # [b t kv g h]: kv key-value heads, each serving g query heads
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from janax.jaxlib_ext.kernels import attention as kernels

__all__ = ["FAR", "Form", "Part", "Side", "capped", "joined", "over", "over_itself", "pick"]

FAR = 2**30  # a window that hides nothing
_NEVER = -1e30  # a logit that softmax takes for no chance, and still finite
_CHUNK = 256  # queries at a time where they are chunked
_GROUPS, _GROUP_SIZE = 4, 128  # so many groups of queries at most, of so many queries at least, each over the keys before its end


class Form(NamedTuple):
    """How scores are made: capped as c tanh(score / c) or not, for all queries at once or in chunks of them."""

    softcap: float | None
    chunked: bool


class Side(NamedTuple):
    """What decides who sees whom, for queries or keys [b or 1, t]: order, place in the text, and text (None if there is one only)."""

    rank: jax.Array
    position: jax.Array
    segment: jax.Array | None = None


class Part(NamedTuple):
    """Attention over some of the keys: sum of exp(score - peak) v [b t kv g h], the peak [b t kv g] and the sum of the exponentials."""

    values: jax.Array
    peak: jax.Array
    total: jax.Array


def _visible(query: Side, key: Side, window: ArrayLike) -> jax.Array:
    """[b or 1, t, s] whether a query sees a key: not a later one, nor one of another text, nor one outside the window."""
    (later, place, text), (earlier, source, other) = query, key
    seen = (earlier[:, None, :] <= later[:, :, None]) & (place[:, :, None] - source[:, None, :] < window)
    return seen if text is None or other is None else seen & (text[:, :, None] == other[:, None, :])


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array, softcap: float | None) -> jax.Array:
    """[b kv g t s] in float32 of q [b t kv g h], k [b s kv h] and mask [b or 1, t, s]."""
    q, k = q.transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 1, 3)  # heads before tokens: faster on CPU
    scores = capped(jnp.einsum("bkgth,bksh->bkgts", q, k.astype(q.dtype), preferred_element_type=jnp.float32), softcap)
    return jnp.where(mask[:, None, None], scores, _NEVER)


def _weighted(weights: jax.Array, v: jax.Array, dtype: DTypeLike) -> jax.Array:
    """[b t kv g h] in float32: sums of v [b s kv h] by weights [b kv g t s], multiplied in `dtype`."""
    weights, v = weights.astype(dtype), v.astype(dtype).transpose(0, 2, 1, 3)
    return jnp.moveaxis(jnp.einsum("bkgts,bksh->bkgth", weights, v, preferred_element_type=jnp.float32), 3, 1)


def _dot_part(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, softcap: float | None) -> Part:
    """q [b t kv g h], k and v [b s kv h], mask [b or 1, t, s]."""
    scores = _scores(q, k, mask, softcap)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - peak)
    return Part(_weighted(weights, v, q.dtype), *(jnp.moveaxis(x, 3, 1) for x in (peak[..., 0], jnp.sum(weights, axis=-1))))


def _whole(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, softcap: float | None) -> jax.Array:
    """Attention over all keys at once. Normalised before the product, its derivative needs no second one with the values."""
    return _weighted(jax.nn.softmax(_scores(q, k, mask, softcap), axis=-1), v, q.dtype).astype(q.dtype)


def _reduce_part(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, softcap: float | None) -> Part:
    """The same for one query (t = 1) as plain sums, which read keys and values where they are: on CPU, the products would copy them first."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.where(mask[:, 0, :, None, None], capped(jnp.sum(q * k[:, :, :, None], axis=-1), softcap), _NEVER)  # [b s kv g]
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp(scores - peak)
    return Part(jnp.sum(weights[..., None] * v[:, :, :, None], axis=1, keepdims=True), peak, jnp.sum(weights, axis=1, keepdims=True))


def capped(x: jax.Array, softcap: float | None) -> jax.Array:
    """c tanh(x / c), or x where there is no cap."""
    return x if softcap is None else softcap * jnp.tanh(x / softcap)


def over(form: Form, windows: Sequence[int], query: Side, key: Side) -> Callable[..., Part]:
    """Attention of these queries over these keys as a function of the layer's kind and of q, k and v; the masks are made here, once."""
    softcap, t = form.softcap, query.rank.shape[1]
    if form.chunked and t > _CHUNK:
        return functools.partial(_chunked_part, windows, query, key, softcap)
    masks = jnp.stack([_visible(query, key, window) for window in windows])

    def part(kind: ArrayLike, q: jax.Array, k: jax.Array, v: jax.Array) -> Part:
        args = (q, k, v, pick(masks, kind))
        if t > 1:
            return _dot_part(*args, softcap)
        dot, reduce = (functools.partial(one, softcap=softcap) for one in (_dot_part, _reduce_part))
        return jax.lax.platform_dependent(*args, cpu=reduce, default=dot)

    return part


def over_itself(form: Form, windows: Sequence[int], side: Side, *, scanned: bool, counted: bool) -> Callable[..., jax.Array]:
    """Causal attention of texts over themselves: a few groups of queries, each over the keys before its end.

    The backward pass makes the scores again: they are large, and on CPU to store them takes longer. Where they are chunked, accelerators
    have kernels that make none; those measure windows along the row, so with a window they want positions that are `counted` there.
    """
    t = side.rank.shape[1]
    groups = max(1, min(_GROUPS, t // _GROUP_SIZE))
    spans = list(itertools.pairwise(t * i // groups for i in range(groups + 1)))

    def cut(low: int, high: int) -> Side:
        return jax.tree.map(lambda x: x[:, low:high], side)

    sides = [(cut(low, high), cut(0, high)) for low, high in spans]
    chunked = form.chunked and t > _CHUNK
    overs = [over(form, windows, query, key) for query, key in sides] if chunked else []
    masks = [] if chunked else [jnp.stack([_visible(query, key, window) for window in windows]) for query, key in sides]

    def attention(kind: ArrayLike, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        @functools.partial(jax.checkpoint, prevent_cse=not scanned)
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            rows = [(q[:, low:high], k[:, :high], v[:, :high]) for low, high in spans]
            if chunked:
                return jnp.concatenate([joined([part(kind, *row)], q.dtype) for part, row in zip(overs, rows)], axis=1)
            return jnp.concatenate([_whole(*row, pick(mask, kind), form.softcap) for mask, row in zip(masks, rows)], axis=1)

        def by_kernel(window: int) -> Callable[..., jax.Array]:
            hides = window < t
            options = {"window": window if hides else None, "softcap": form.softcap}
            usable = form.chunked and (counted or not hides)
            kernel = lambda q, k, v: kernels.causal(attend, q, k, v, side.segment, **options)  # noqa: E731
            return kernel if usable else attend

        branches = [by_kernel(window) for window in windows]
        return jax.lax.switch(kind, branches, q, k, v) if len(branches) > 1 and form.chunked else branches[0](q, k, v)

    return attention


def _chunked_part(
    windows: Sequence[int], query: Side, key: Side, softcap: float | None, kind: ArrayLike, q: jax.Array, k: jax.Array, v: jax.Array
) -> Part:
    """`_dot_part` for a few queries at a time, masks included, which the backward pass makes again: memory grows as s, not as t s."""
    window, t = pick(jnp.asarray(windows), kind), q.shape[1]
    chunks = -(-t // _CHUNK)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, chunks * _CHUNK - t), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, _CHUNK, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], chunks * _CHUNK, *x.shape[3:])[:, :t]

    @jax.checkpoint
    def one(xs: tuple[jax.Array, Side]) -> Part:
        return _dot_part(xs[0], k, v, _visible(xs[1], key, window), softcap)

    return jax.tree.map(join, jax.lax.map(one, jax.tree.map(split, (q, query))))


def joined(parts: Sequence[Part], dtype: DTypeLike) -> jax.Array:
    """One softmax over the keys of all parts, [b t kv g h]."""
    peak = functools.reduce(jnp.maximum, (part.peak for part in parts))
    shares = [jnp.exp(part.peak - peak) for part in parts] if len(parts) > 1 else [jnp.ones_like(peak)]
    values = sum(part.values * share[..., None] for part, share in zip(parts, shares))
    total = sum(part.total * share for part, share in zip(parts, shares))
    return (values / jnp.asarray(total)[..., None]).astype(dtype)


def pick(stack: jax.Array, kind: ArrayLike) -> jax.Array:
    """Entry `kind` of a stack; a stack of one has no choice, and a number known to Python is a plain slice."""
    return stack[0] if len(stack) == 1 else stack[kind] if isinstance(kind, int) else jax.lax.dynamic_index_in_dim(stack, kind, 0, False)
