"""Log-probabilities, entropy and the likeliest tokens of categorical distributions given by their logits.

For logits that are at hand: one position, or a small vocabulary. From hidden states and an unembedding, without the array of logits, the
functions of the same names in `fused` do it. Everything is written as reductions over the vocabulary axis, so that it may be sharded.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import checks, dtypes

__all__ = ["TopK", "entropy", "log_normalizer", "token_log_probs", "top_k"]


class TopK(NamedTuple):
    """The likeliest tokens, in order of falling probability; of equally likely ones the lower id comes first.

    Attributes:
      log_probs: [... k] their log-probabilities under the whole distribution (not renormalised), in nats; float32 or wider.
      tokens: [... k] their ids, int32.
    """

    log_probs: jax.Array
    tokens: jax.Array


def log_normalizer(logits: ArrayLike) -> jax.Array:
    """log sum_v exp(logits_v) over the last axis; -inf with zero gradients where every logit is -inf.

    Args:
      logits: [... v] unnormalised log-probabilities.

    Returns:
      [...] float32 or wider.

    Raises:
      ValueError: if `logits` is a scalar.
    """
    checks.check_shapes("log_normalizer", logits=(logits, "... v"))
    base, log_total, nothing = _normalizer(dtypes.at_least_float32(logits))
    return jnp.where(nothing, -jnp.inf, base + log_total)


def token_log_probs(logits: ArrayLike, tokens: ArrayLike) -> jax.Array:
    """Log-probability of the given tokens, logits_y - log sum_v exp(logits_v).

    Args:
      logits: [... v] unnormalised log-probabilities; -inf marks a forbidden token.
      tokens: [...] integer ids.

    Returns:
      [...] in nats, float32 or wider; -inf, with zero gradients, for a forbidden token and for an id outside 0..v-1. Otherwise the
      gradient is 1[v = y] - p_v, which is 0 for forbidden logits.

    Raises:
      ValueError: if the shapes do not agree or the ids are not integers.
    """
    lengths = checks.check_shapes("token_log_probs", logits=(logits, "... v"), tokens=(tokens, "..."))
    checks.require_integers("token_log_probs", tokens=tokens)
    tokens, logits = jnp.asarray(tokens).astype(jnp.int32), dtypes.at_least_float32(logits)
    ids = jnp.zeros_like(logits, dtype=jnp.int32) + jax.lax.broadcasted_iota(
        jnp.int32, logits.shape, logits.ndim - 1
    )  # placed as the logits
    target = jnp.sum(jnp.where(ids == tokens[..., None], logits, jnp.zeros_like(logits)), axis=-1)
    possible = (tokens >= 0) & (tokens < lengths["v"]) & ~jnp.isneginf(target)
    base, log_total, _ = _normalizer(logits)
    zero = jnp.zeros_like(target)
    return jnp.where(possible, jnp.where(possible, target - base, zero) - jnp.where(possible, log_total, zero), -jnp.inf)


def entropy(logits: ArrayLike) -> jax.Array:
    """Shannon entropy -sum_v p_v log p_v of softmax(logits); a forbidden token contributes nothing, to the value or to a gradient.

    Args:
      logits: [... v] unnormalised log-probabilities; -inf marks a forbidden token.

    Returns:
      [...] in nats, between 0 and log v, float32 or wider; 0 where every token is forbidden.

    Raises:
      ValueError: if `logits` is a scalar.
    """
    checks.check_shapes("entropy", logits=(logits, "... v"))
    logits = dtypes.at_least_float32(logits)
    base, log_total, _ = _normalizer(logits)
    allowed = ~jnp.isneginf(logits)
    log_p = jnp.where(allowed, logits - base[..., None] - log_total[..., None], jnp.zeros_like(logits))
    return -jnp.sum(jnp.where(allowed, jnp.exp(log_p) * log_p, jnp.zeros_like(log_p)), axis=-1)


def top_k(logits: ArrayLike, k: int) -> TopK:
    """The k likeliest tokens and their log-probabilities.

    Args:
      logits: [... v] unnormalised log-probabilities; -inf marks a forbidden token. A sharded vocabulary is gathered: use `fused.top_k`.
      k: Number of tokens, between 1 and v. Static.

    Returns:
      Log-probabilities and ids [... k]; -inf where fewer than k tokens are allowed.

    Raises:
      ValueError: if `logits` is a scalar or k is not between 1 and v.
    """
    lengths = checks.check_shapes("top_k", logits=(logits, "... v"))
    if not 1 <= k <= lengths["v"]:
        raise ValueError(f"top_k: 'k' is {k}, expected 1 to v={lengths['v']}")
    logits = dtypes.at_least_float32(logits)
    values, tokens = jax.lax.top_k(logits, k)
    base, log_total, _ = _normalizer(logits)
    return TopK(log_probs=values - base[..., None] - log_total[..., None], tokens=tokens)


def _normalizer(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(the largest logit, log sum exp(logits - largest), whether all are forbidden) [...]; 0 and 0 if so.

    In two parts: their sum would round a log-probability to the precision of the logits.
    """
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, initial=-jnp.inf))
    nothing = jnp.isneginf(largest)
    base = jnp.where(nothing, jnp.zeros_like(largest), largest)
    allowed = ~jnp.isneginf(logits)
    terms = jnp.exp(jnp.where(allowed, logits - base[..., None], jnp.zeros_like(logits)))
    total = jnp.sum(jnp.where(allowed, terms, jnp.zeros_like(terms)), axis=-1)
    return base, jnp.log(jnp.where(nothing, jnp.ones_like(total), total)), nothing
