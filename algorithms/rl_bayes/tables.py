"""Policies and twists given as tables, one row per prefix: a decoder for `smc` and `sampling.generate`, and ancestral samples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from janax.algorithms.rl_bayes.exact import Space, sequences
from janax.algorithms.rl_bayes.target import Sequences
from janax.jaxlib_ext import dtypes, sampling
from janax.jaxlib_ext.checks import check_shapes

__all__ = ["sample_rows", "table_cache", "table_decode_fn"]


def table_decode_fn(space: Space, *, prompt_length: int = 1) -> sampling.DecodeFn:
    """A decode_fn of the contract of `janax.jaxlib_ext.sampling` whose params are rows: [p v], or [c p v] with the prompt's first token as context.

    Args:
      space: The space. Static.
      prompt_length: Tokens that come before the first one of the space: every prompt has so many. Static.

    Returns:
      (params, cache, tokens, num_tokens=None, prefix=None) -> (rows [b v], cache); the cache, from `table_cache`, holds the tokens. Behind the
      space's length the rows are zeros.
    """
    v, offsets = space.vocab_size, np.array([space.offset(t) for t in range(space.length)] + [0], np.int32)

    def fn(
        params: jax.Array, cache: sampling.Cache, tokens: ArrayLike, num_tokens: ArrayLike | None = None, prefix: Any = None
    ) -> tuple[jax.Array, sampling.Cache]:
        tokens, params = jnp.asarray(tokens).astype(jnp.int32), jnp.asarray(params)
        b, t = tokens.shape
        count = jnp.full(b, t, jnp.int32) if num_tokens is None else jnp.asarray(num_tokens).astype(jnp.int32)
        held = cache.k.shape[2]
        place = jnp.where(
            jnp.arange(t, dtype=jnp.int32)[None] < count[:, None], cache.length[:, None] + jnp.arange(t, dtype=jnp.int32)[None], held
        )
        k = cache.k.at[0, jnp.arange(b, dtype=jnp.int32)[:, None], place, 0, 0].set(tokens.astype(cache.k.dtype), mode="drop")
        new = sampling.Cache(k=k, v=cache.v, length=cache.length + count)
        text, lengths = k[0, :, :, 0, 0].astype(jnp.int32), new.length
        if prefix is not None:
            each = b // prefix.length.shape[0]
            before = jnp.repeat(prefix.k[0, :, :, 0, 0].astype(jnp.int32), each, axis=0, total_repeat_length=b)
            start = jnp.repeat(prefix.length, each, total_repeat_length=b)
            both = jnp.concatenate([before, text], axis=1)
            at = jnp.arange(both.shape[1], dtype=jnp.int32)[None]
            source = jnp.where(at < start[:, None], at, at - start[:, None] + before.shape[1])
            text, lengths = jnp.take_along_axis(both, jnp.minimum(source, both.shape[1] - 1), axis=1), start + lengths
        depth = lengths - prompt_length
        at = jnp.arange(text.shape[1], dtype=jnp.int32)[None]
        inside = (at >= prompt_length) & (at < lengths[:, None])
        power = jnp.where(inside, lengths[:, None] - 1 - at, 0)
        number = jnp.sum(jnp.where(inside, text * v ** jnp.minimum(power, space.length), 0), axis=1, dtype=jnp.int32)
        valid = (depth >= 0) & (depth < space.length)
        row = jnp.where(valid, jnp.asarray(offsets)[jnp.clip(depth, 0, space.length)] + number, 0)
        rows = params[row] if params.ndim == 2 else params[text[:, 0], row]
        return jnp.where(valid[:, None], rows, jnp.zeros_like(rows)), new

    return fn


def table_cache(rows: int, capacity: int) -> sampling.Cache:
    """An empty cache for `table_decode_fn`: `rows` rows of up to `capacity` tokens, prompt included."""
    k = jnp.zeros((1, rows, capacity, 1, 1), jnp.int32)
    return sampling.Cache(k=k, v=jnp.zeros_like(k), length=jnp.zeros(rows, jnp.int32))


def sample_rows(key: jax.Array, space: Space, rows: ArrayLike, *, num_samples: int) -> tuple[Sequences, jax.Array]:
    """Independent samples of a policy given by its rows; with `posterior_rows`, exact samples of the posterior.

    Args:
      key: [] typed key.
      space: The space. Static.
      rows: [p v] from `log_rows` or `posterior_rows`.
      num_samples: n. Static.

    Returns:
      The sequences [n], and their places [n] int32 among the x of the space. A policy that forbids everything gives the first token always.
    """
    check_shapes("rl_bayes.sample_rows", rows=(rows, f"{space.num_prefixes} {space.vocab_size}"))
    rows = dtypes.at_least_float32(rows)
    place = jnp.zeros(num_samples, jnp.int32)
    for t, key_t in enumerate(jax.random.split(key, space.length)):
        noise = jax.random.gumbel(key_t, (num_samples, space.vocab_size), rows.dtype)
        token = jnp.argmax(rows[space.offset(t) + place] + noise, axis=1).astype(jnp.int32)
        place = place * space.vocab_size + token
    everything = sequences(space)
    return Sequences(jnp.asarray(everything.tokens)[place], jnp.asarray(everything.num_tokens)[place]), place
