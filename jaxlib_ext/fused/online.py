"""Softmax on the fly: sums over the vocabulary that are kept relative to the largest logit met so far."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from janax.jaxlib_ext.fused import parts

__all__ = ["Running", "finish", "fold", "over_logits", "over_shards", "start", "walk"]


class Running(NamedTuple):
    """Sums over the chunks so far, relative to the largest logit: what a fused function folds over the vocabulary.

    Attributes:
      largest: [m] maximum of the logits, -inf at first.
      total: [m] sum exp(z - largest).
      target: [m] logit of the token given, 0 until it is met.
      first: [m] sum exp(z - largest) z, or None.
      expectation: [m d] sum exp(z - largest) slope w, or None.
    """

    largest: jax.Array
    total: jax.Array
    target: jax.Array
    first: jax.Array | None
    expectation: jax.Array | None

    @property
    def logsumexp(self) -> jax.Array:
        nothing = self.total == 0
        return jnp.where(nothing, -jnp.inf, self.largest + jnp.log(jnp.where(nothing, jnp.ones_like(self.total), self.total)))

    def mean(self, sums: jax.Array) -> jax.Array:
        """A weighted sum divided by the total; 0 where everything is forbidden."""
        total = jnp.where(self.total == 0, jnp.ones_like(self.total), self.total)
        return sums / total.reshape(-1, *(1,) * (sums.ndim - 1))


def start(zero: jax.Array, *, first: bool = False, expectation: jax.Array | None = None) -> Running:
    """Nothing met yet."""
    return Running(jnp.full_like(zero, -jnp.inf), zero, zero, zero if first else None, expectation)


def fold(running: Running, tile: parts.Tile, vocabulary: parts.Vocabulary, w: jax.Array) -> Running:
    """The sums with one chunk of the vocabulary more, or all of it; w is the chunk's part of the unembedding, for the expectation."""
    entries = tuple(range(1, tile.z.ndim))
    largest = jnp.maximum(running.largest, jnp.max(tile.z, axis=entries))
    base = jnp.where(jnp.isneginf(largest), jnp.zeros_like(largest), largest)
    scale, weight = jnp.exp(running.largest - base), jnp.exp(tile.z - parts.beside(base, tile.z))
    first, expectation = running.first, running.expectation
    if first is not None:
        first = first * scale + jnp.sum(weight * tile.finite, axis=entries)
    if expectation is not None:
        expectation = expectation * scale[:, None] + vocabulary.back(weight * tile.slope, w, expectation)
    return Running(
        largest=largest,
        total=running.total * scale + jnp.sum(weight, axis=entries),
        target=running.target + jnp.sum(jnp.where(tile.chosen, tile.z, jnp.zeros_like(tile.z)), axis=entries),
        first=first,
        expectation=expectation,
    )


def walk(options: parts.Options, h: jax.Array, tokens: jax.Array, vocabulary: parts.Vocabulary, *, expectation: bool = False) -> Running:
    """Folds all chunks of the vocabulary for some tokens, h [m d]."""
    zero = jnp.zeros_like(tokens, dtype=parts.accumulator(h, vocabulary.w))
    first = start(zero, first=options.with_mean, expectation=jnp.zeros_like(h, dtype=zero.dtype) if expectation else None)

    def body(running: Running, step: Any) -> Running:
        window = vocabulary.window(step)
        return fold(running, vocabulary.tile(options.softcap, h, tokens, window, step), vocabulary, window[0])

    return vocabulary.chunks.loop(body, first)


def over_logits(vocabulary: parts.Vocabulary, tile: Callable[[Any], parts.Tile], zero: jax.Array, *, by_chunks: bool) -> Running:
    """The sums over logits that are at hand, `tile(step)`: at once if these are bare products and nothing else is asked of them, else by chunks."""

    def add(running: Running, step: Any) -> Running:
        return fold(running, tile(step), vocabulary, vocabulary.w)

    return vocabulary.chunks.loop(add, start(zero)) if by_chunks else add(start(zero), None)


def over_shards(axis_name: str, normalizer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The log-normaliser of the whole vocabulary, and the probability of this device's part. Plain operations, with their derivatives."""
    largest = jax.lax.pmax(jax.lax.stop_gradient(normalizer), axis_name)
    base = jnp.where(jnp.isneginf(largest), jnp.zeros_like(largest), largest)
    empty = jnp.isneginf(normalizer)
    share = jnp.exp(jnp.where(empty, jnp.zeros_like(normalizer), normalizer - base))
    share = jnp.where(empty, jnp.zeros_like(share), share)
    total = jax.lax.psum(share, axis_name)
    nothing = total == 0
    total = jnp.where(nothing, jnp.ones_like(total), total)
    return jnp.where(nothing, -jnp.inf, base + jnp.log(total)), share / total


def finish(
    axis_name: str | None, v: int, tokens: jax.Array, target: jax.Array, normalizer: jax.Array, mean: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """(log-probabilities, log-normaliser, mean logit, whether the token is possible) [m] of the whole vocabulary from the v tokens at hand."""
    found = (tokens >= 0) & (tokens < v)
    zero = jnp.zeros_like(target)
    if axis_name is not None:
        target = jax.lax.psum(jnp.where(found, target, zero), axis_name)
        found = jax.lax.psum(found.astype(jnp.int32), axis_name) > 0
        normalizer, share = over_shards(axis_name, normalizer)
        mean = None if mean is None else jax.lax.psum(share * mean, axis_name)
        zero = jnp.zeros_like(target)
    possible = found & ~jnp.isneginf(target)
    log_probs = jnp.where(possible, target, zero) - jnp.where(possible, normalizer, zero)
    return jnp.where(possible, log_probs, -jnp.inf), normalizer, mean, possible
