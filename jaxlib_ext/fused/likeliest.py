"""The likeliest tokens, merged over chunks of the vocabulary."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.typing import ArrayLike

from janax.jaxlib_ext.fused import online, parts
from janax.jaxlib_ext.logprobs import TopK

__all__ = ["top_k"]


def top_k(
    h: ArrayLike,
    w: ArrayLike,
    k: int,
    *,
    bias: ArrayLike | None = None,
    softcap: float | None = None,
    temperature: ArrayLike = 1.0,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
    transposed: bool = False,
    axis_name: str | None = None,
) -> TopK:
    """The k likeliest tokens at each position, merged over chunks of the vocabulary. Not differentiated: see `token_log_probs` for that.

    On a mesh under `jit`, a backend whose compiler does not partition top-k (the CPU's) gathers each chunk of logits, though never `w`; inside
    `jax.shard_map` with `axis_name` only the candidates travel.

    Args:
      h: [... d] hidden states.
      w: [d v] unembedding; [v d] if `transposed`; with `axis_name`, this device's part.
      k: Number of tokens, between 1 and v. Static.
      bias: [v] or None.
      softcap: Final soft-capping, or None. Static.
      temperature: [] > 0. Traced.
      vocab_chunk: As in `token_log_probs`. Static.
      token_chunk: As in `token_log_probs`. Static.
      transposed: As in `token_log_probs`. Static.
      axis_name: As in `token_log_probs`. Static.

    Returns:
      Log-probabilities (float32 or wider) and ids (int32) [... k], in order; of equal ones the lower id first.

    Raises:
      ValueError: as `token_log_probs`, and if k is not between 1 and v.
    """
    options = parts.Options(softcap, False, False, vocab_chunk, token_chunk, transposed)
    *arrays, leading = parts.prepare("top_k", options, h, w, bias, None, temperature)
    v = jnp.shape(w)[options.axis] * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    if not 1 <= k <= v:
        raise ValueError(f"top_k: 'k' is {k}, expected 1 to v={v}")
    hidden, head, offsets, _, heat = jax.lax.stop_gradient(parts.agree("top_k", axis_name, tuple(arrays)))
    log_probs, tokens = _top_k(options, k, axis_name, hidden, head, offsets, heat)
    return TopK(log_probs=log_probs.reshape(*leading, k), tokens=tokens.reshape(*leading, k))


# --- the likeliest tokens


class _Candidates(NamedTuple):
    """The best k' entries of each of the g groups so far, [m g k'], and the running normaliser."""

    values: jax.Array
    ids: jax.Array
    running: online.Running


def _best(k: int, values: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The k largest along the last axis; of equal ones the earlier."""
    values, order = jax.lax.top_k(values, min(k, values.shape[-1]))
    return values, jnp.take_along_axis(ids, order, axis=-1)


def _top_k(
    options: parts.Options, k: int, axis_name: str | None, h: Any, w: Any, bias: Any, temperature: Any
) -> tuple[jax.Array, jax.Array]:
    vocabulary = parts.Vocabulary.of(options, w, bias, temperature)
    vocab = vocabulary.chunks
    chunks = parts.token_chunks(h.shape[0], options.token_chunk)
    v = w.shape[options.axis]
    kept = min(k, vocab.inner)
    offset = jnp.int32(0) if axis_name is None else jax.lax.axis_index(axis_name).astype(jnp.int32) * v

    def some(h: jax.Array, nowhere: jax.Array) -> tuple[jax.Array, jax.Array]:
        def body(state: _Candidates, step: Any) -> _Candidates:
            window = vocabulary.window(step)
            tile = vocabulary.tile(options.softcap, h, nowhere, window, step)
            ids = parts.placed(jnp.broadcast_to(vocab.ids(step)[None], tile.z.shape), tile.z)
            values, ids = _best(kept, tile.z, ids)
            values, ids = (jnp.concatenate(pair, axis=-1) for pair in ((state.values, values), (state.ids, ids)))
            return _Candidates(*_best(kept, values, ids), online.fold(state.running, tile, vocabulary, window[0]))

        zero = jnp.zeros_like(nowhere, dtype=parts.accumulator(h, w))
        first = vocabulary.tile(options.softcap, h, nowhere, vocabulary.window(jnp.int32(0)), jnp.int32(0)).z[..., :1]
        empty = jnp.broadcast_to(jnp.full_like(first, -jnp.inf), (*first.shape[:-1], kept))
        state = vocab.loop(body, _Candidates(empty, jnp.full_like(empty, v, dtype=jnp.int32), online.start(zero)))
        values, ids = (_whole(x, h) for x in (state.values, state.ids))
        values, ids = _best(k, values, ids + offset)
        normalizer = state.running.logsumexp
        if axis_name is not None:
            values, ids = (_gather(axis_name, x) for x in (values, ids))
            values, ids = _best(k, values, ids)
            normalizer, _ = online.over_shards(axis_name, normalizer)
        base = jnp.where(jnp.isneginf(normalizer), jnp.zeros_like(normalizer), normalizer)
        return values - base[:, None], ids

    nowhere = jnp.full_like(h[:, 0], -1, dtype=jnp.int32)
    if chunks.count == 1:
        return some(h, nowhere)
    empty = jnp.broadcast_to(nowhere[:, None], (h.shape[0], k))
    out = (jnp.zeros_like(empty, dtype=parts.accumulator(h, w)), jnp.zeros_like(empty))
    if axis_name is not None:  # the result is the same on all shards, and its buffer has to say so
        out = jax.tree.map(lambda x: jax.lax.pmax(x, axis_name), out)
    return chunks.loop(lambda out, step: parts.put_rows(chunks, out, some(*parts.rows(chunks, (h, nowhere), step)), step), out)


def _whole(x: jax.Array, like: jax.Array) -> jax.Array:
    """[m g k] -> [m (g k)], with the groups of all devices at hand."""
    placement = jax.typeof(x).sharding
    if AxisType.Explicit in placement.mesh.axis_types:
        x = jax.sharding.reshard(x, jax.P(jax.typeof(like).sharding.spec[0], None, None))
    return x.reshape(x.shape[0], -1)


def _gather(axis_name: str, x: jax.Array) -> jax.Array:
    """[m k] on each shard -> [m (shards k)] on all, known to be equal there."""
    mine = jnp.arange(jax.lax.axis_size(axis_name)) == jax.lax.axis_index(axis_name)
    spread = jnp.where(mine[None, :, None], x[:, None, :], jnp.zeros_like(x[:, None, :]))
    return jax.lax.psum(spread, axis_name).reshape(x.shape[0], -1)
