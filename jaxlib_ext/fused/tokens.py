"""Log-probabilities of given tokens and statistics of their distributions, with gradients for any cotangent or for weights known beforehand."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.typing import ArrayLike

from janax.jaxlib_ext.checks import check_shapes
from janax.jaxlib_ext.fused import online, parts

__all__ = ["TokenStatistics", "statistics", "token_log_probs", "weighted_nll"]


class TokenStatistics(NamedTuple):
    """What the distribution at each position says about a token and about itself; all differentiable.

    Attributes:
      log_probs: [...] log-probability of the given token, in nats.
      entropy: [...] entropy of the distribution, in nats.
      logsumexp: [...] log-normaliser of the logits.
    """

    log_probs: jax.Array
    entropy: jax.Array
    logsumexp: jax.Array


def token_log_probs(
    h: ArrayLike,
    w: ArrayLike,
    tokens: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    softcap: float | None = None,
    temperature: ArrayLike = 1.0,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
    keep_expectation: bool = False,
    transposed: bool = False,
    axis_name: str | None = None,
) -> jax.Array:
    """Log-probability of given tokens: z_y - log sum_v exp(z_v) with z = cap(h w + bias) / temperature.

    Differentiable in h, w, bias and temperature, reverse mode, once. The gradient with respect to a logit is c_n (1[v = y_n] - p_nv), c the
    cotangent of the result.

    Args:
      h: [... d] hidden states, one per token. Batches come as leading axes; `jax.vmap` would make one gradient of `w` per example.
      w: [d v] unembedding; [v d] if `transposed`.
      tokens: [...] integer ids, already shifted: `tokens` at a position is what the hidden state there predicts.
      bias: [v] added to h w; -inf forbids a token, also under a soft cap.
      softcap: c in cap(x) = c tanh(x / c), Gemma 2's final soft-capping; None for none. Static.
      temperature: [] > 0, divides the capped logits. Traced.
      vocab_chunk: Vocabulary entries handled at a time, about; chosen from the shapes if None. Static.
      token_chunk: Tokens handled at a time, about. If None, 1024 for up to 8192 tokens, and all for more: they may lie on a mesh, where each
        step sums w's gradient over devices, and a chunk of logits is not much larger than `h`. Static.
      keep_expectation: Under differentiation, compute sum_v p_v w_v [n d] with the forward pass and keep it: h then needs nothing backward.
        Worth it where `w` is frozen. Static.
      transposed: `w` is [v d], as embeddings and PyTorch's layers are stored: no chunk is then copied on the way to the product with its
        gradient, on CPU a tenth of the whole time. Static.
      axis_name: Inside `jax.shard_map`, the mesh axis over which the vocabulary of `w` and `bias` is sharded. Static.

    Returns:
      [...] in nats, float32 or wider; -inf, with zero gradients, for a forbidden token and for an id outside the vocabulary. Gradients have
      the dtypes of their arguments and are summed in at least float32; the gradient's chunk of logits takes part in the matrix products in
      the dtype of h and w.

    Raises:
      ValueError: if shapes disagree, ids are not integers, a static argument is out of range, or `axis_name` is used where the mesh axis
        is not tracked (check_vma=False).

    Reference: the chunked loss with recomputation is that of Wijmans et al., arXiv:2411.09009, here exact (no block is skipped).
    """
    options = parts.Options(softcap, False, keep_expectation, vocab_chunk, token_chunk, transposed)
    return _token_statistics("token_log_probs", options, h, w, tokens, bias, temperature, axis_name)[0]


def statistics(
    h: ArrayLike,
    w: ArrayLike,
    tokens: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    softcap: float | None = None,
    temperature: ArrayLike = 1.0,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
    transposed: bool = False,
    axis_name: str | None = None,
) -> TokenStatistics:
    """As `token_log_probs`, with the entropy and the log-normaliser from the same pass; all three are differentiable, in the same products.

    H = log Z - sum_v p_v z_v; its gradient with respect to a logit is -p_v (log p_v + H).

    Args:
      h: [... d] hidden states.
      w: [d v] unembedding; [v d] if `transposed`.
      tokens: [...] integer ids.
      bias: [v] or None.
      softcap: Final soft-capping, or None. Static.
      temperature: [] > 0. Traced. Entropy and log-normaliser are those of the tempered distribution.
      vocab_chunk: As in `token_log_probs`. Static.
      token_chunk: As in `token_log_probs`. Static.
      transposed: As in `token_log_probs`. Static.
      axis_name: As in `token_log_probs`. Static.

    Returns:
      Log-probabilities, entropies and log-normalisers [...], float32 or wider. Where every token is forbidden: -inf, 0 and -inf.

    Raises:
      ValueError: as `token_log_probs`.
    """
    options = parts.Options(softcap, True, False, vocab_chunk, token_chunk, transposed)
    log_probs, normalizer, mean = _token_statistics("statistics", options, h, w, tokens, bias, temperature, axis_name)
    assert mean is not None
    nothing = jnp.isneginf(normalizer)
    entropy = jnp.where(nothing, jnp.zeros_like(mean), jnp.where(nothing, jnp.zeros_like(mean), normalizer) - mean)
    return TokenStatistics(log_probs=log_probs, entropy=entropy, logsumexp=normalizer)


def weighted_nll(
    h: ArrayLike,
    w: ArrayLike,
    tokens: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    softcap: float | None = None,
    temperature: ArrayLike = 1.0,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
    transposed: bool = False,
    axis_name: str | None = None,
) -> jax.Array:
    """The weighted negative log-likelihood -sum_n weights_n log p(y_n), whose gradients are made along with the value.

    As the weights are known beforehand, each chunk of tokens is differentiated at once, while its logits are there: 3 products instead of
    the 4 of `token_log_probs`. The price: the gradients of h and w wait, in memory, for the backward pass (w's in float32 at least while it
    is summed), and w's is read and written once per chunk of tokens. With tokens sharded under `jit` it is also summed over devices once
    per chunk: there `token_log_probs`, or this function inside `jax.shard_map`, communicates less.

    Without differentiation nothing but the value is computed.

    Args:
      h: [... d] hidden states.
      w: [d v] unembedding; [v d] if `transposed`.
      tokens: [...] integer ids, already shifted.
      weights: [...] one per token; where it is 0 the token does not matter. For a mean over a mask: mask / max(sum(mask), 1).
      bias: [v] or None.
      softcap: Final soft-capping, or None. Static.
      temperature: [] > 0. Traced.
      vocab_chunk: Columns of w's gradient added at a time. Static.
      token_chunk: Tokens per chunk, whose logits [token_chunk v] are held: an eighth, between 256 and 1024, if None. Static.
      transposed: As in `token_log_probs`. Static.
      axis_name: As in `token_log_probs`. Static.

    Returns:
      [] in nats, float32 or wider; inf if a token of non-zero weight is forbidden or outside the vocabulary (such tokens give no gradient).

    Raises:
      ValueError: as `token_log_probs`.

    Reference: gradients within the forward pass as in Hsu et al., arXiv:2410.10989 (Liger kernels).
    """
    name = "weighted_nll"
    options = parts.Options(softcap, False, False, vocab_chunk, token_chunk, transposed)
    check_shapes(name, tokens=(tokens, "..."), weights=(weights, "..."))
    *arrays, _ = parts.prepare(name, options, h, w, bias, tokens, temperature)
    each = jnp.asarray(weights).astype(parts.accumulator(*arrays[:2])).reshape(-1)
    # What belongs to a token is the same on all shards of the vocabulary, and so is the gradient with respect to its weight.
    each = parts.vary(each, frozenset[str]().union(*map(parts.varying, jax.tree.leaves(arrays))) - {axis_name})
    hidden, head, offsets, ids, heat, _ = parts.agree(name, axis_name, (*arrays, each))
    return _nll(options, axis_name, hidden, head, offsets, parts.localise(ids, head.shape[options.axis], axis_name), each, heat)


# --- any cotangent per token


def _token_statistics(
    name: str, options: parts.Options, h: Any, w: Any, tokens: Any, bias: Any, temperature: Any, axis_name: str | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Log-probabilities, log-normalisers and mean logits (None without `with_mean`), [...]."""
    *arrays, leading = parts.prepare(name, options, h, w, bias, tokens, temperature)
    h, w, bias, tokens, temperature = parts.agree(name, axis_name, tuple(arrays))
    local = parts.localise(tokens, w.shape[options.axis], axis_name)
    target, normalizer, mean = cast(tuple[Any, Any, Any], _statistics(options, h, w, bias, local, temperature))
    log_probs, normalizer, mean, _ = online.finish(axis_name, w.shape[options.axis], local, target, normalizer, mean)
    return log_probs.reshape(leading), normalizer.reshape(leading), None if mean is None else mean.reshape(leading)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(options: parts.Options, h: Any, w: Any, bias: Any, tokens: Any, temperature: Any) -> tuple[Any, Any, Any]:
    """(target, logsumexp, mean) [n] of the vocabulary at hand; h [n d], w [d v] or [v d], tokens [n] (ids elsewhere give target 0)."""
    return _statistics_forward(options, h, w, bias, tokens, temperature)[0]


def _statistics_forward(
    options: parts.Options, h: Any, w: Any, bias: Any, tokens: Any, temperature: Any, *, expectation: bool = False
) -> tuple[tuple[Any, Any, Any], Any]:
    vocabulary = parts.Vocabulary.of(options, w, bias, temperature)
    chunks = parts.token_chunks(h.shape[0], options.token_chunk)

    def some(h: jax.Array, tokens: jax.Array) -> tuple[Any, ...]:
        running = online.walk(options, h, tokens, vocabulary, expectation=expectation)
        mean, expected = (None if x is None else running.mean(x) for x in (running.first, running.expectation))
        return running.target, running.logsumexp, mean, expected

    zero = jnp.zeros_like(tokens, dtype=parts.accumulator(h, w))
    out = (zero, zero, zero if options.with_mean else None, jnp.zeros_like(h, dtype=zero.dtype) if expectation else None)
    out = chunks.loop(lambda out, step: parts.put_rows(chunks, out, some(*parts.rows(chunks, (h, tokens), step)), step), out)
    return out[:3], out[3]


def _statistics_fwd(options: parts.Options, h: Any, w: Any, bias: Any, tokens: Any, temperature: Any) -> tuple[Any, Any]:
    keep = options.keep_expectation and not options.with_mean
    out, expected = _statistics_forward(options, h, w, bias, tokens, temperature, expectation=keep)
    return out, (h, w, bias, tokens, temperature, out, expected)


class _Sums(NamedTuple):
    """Gradients being summed: h [n d] or None, w as the vocabulary holds it, or [g c d] of one chunk, bias [g r] or None, temperature []."""

    h: Any
    w: jax.Array
    bias: Any
    temperature: jax.Array


def _statistics_bwd(options: parts.Options, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    h, w, bias, tokens, temperature, (target, normalizer, mean), expected = residuals
    to_target, to_normalizer, _ = cotangents
    dtype = normalizer.dtype
    vocabulary = parts.Vocabulary.of(options, w, bias, temperature)
    vocab = vocabulary.chunks
    chunks = parts.token_chunks(h.shape[0], options.token_chunk)
    base = jnp.where(jnp.isneginf(normalizer), jnp.zeros_like(normalizer), normalizer)

    def column(x: jax.Array) -> jax.Array:
        return x[:, None, None]

    def pull(rows: Any, window: Any, step: Any) -> tuple[jax.Array, jax.Array]:
        """(gradient of the tile's h w [m g c], its part of -temperature times the temperature's gradient [])."""
        h, tokens, base, mean, to_target, to_normalizer, to_mean = rows
        tile = vocabulary.tile(options.softcap, h, tokens, window, step)
        p = jnp.exp(tile.z - column(base))
        factor = column(to_normalizer)
        if mean is not None:
            factor = factor + column(to_mean) * (1 + tile.finite - column(mean))
        dz = p * factor + tile.chosen.astype(dtype) * column(to_target)
        return jnp.where(jnp.isneginf(tile.z), jnp.zeros_like(dz), dz) * tile.slope, jnp.sum(dz * tile.finite)

    def body(sums: _Sums, step: Any) -> _Sums:
        window: Any = vocabulary.window(step)

        def some(inner: _Sums, token_step: Any) -> _Sums:
            part, ids, row_base, row_mean, row_cotangents = parts.rows(chunks, (h, tokens, base, mean, cotangents), token_step)
            if chunks.overlaps:  # rows met before have had their say
                fresh = chunks.fresh(token_step).reshape(-1).astype(dtype)
                row_cotangents = jax.tree.map(lambda x: x * fresh, row_cotangents)
            dx, temper = pull((part, ids, row_base, row_mean, *row_cotangents), window, step)
            to_h = inner.h
            if to_h is not None:
                old = parts.rows(chunks, to_h, token_step)
                to_h = parts.put_rows(chunks, to_h, old + vocabulary.back(dx, window[0], old), token_step)
            return _Sums(
                h=to_h,
                w=inner.w + vocabulary.outer(dx, part, window[0]),
                bias=None if inner.bias is None else inner.bias + jnp.sum(dx, axis=0),
                temperature=inner.temperature + temper,
            )

        wide = functools.partial(jnp.zeros_like, dtype=dtype)
        to_bias = None if bias is None else wide(window[1])
        chunk = chunks.loop(some, _Sums(sums.h, wide(vocabulary.rows(window[0])), to_bias, sums.temperature))
        return _Sums(
            h=chunk.h,
            w=vocabulary.add(sums.w, chunk.w, step, add=vocab.overlaps),
            bias=None if sums.bias is None else parts.accumulate(vocab, sums.bias, chunk.bias, step, 0, add=vocab.overlaps),
            temperature=chunk.temperature,
        )

    start = _Sums(
        h=jnp.zeros_like(h, dtype=dtype) if expected is None else None,
        w=jnp.zeros_like(vocabulary.w),
        bias=None if vocabulary.bias is None else jnp.zeros_like(vocabulary.bias),
        temperature=jnp.zeros_like(temperature),
    )
    sums = vocab.loop(body, start)
    to_h = sums.h
    if to_h is None:
        to_h = to_normalizer[:, None] * expected + to_target[:, None] * _chosen_rows(options, w, tokens, target, temperature)
    to_bias = None if sums.bias is None else sums.bias.reshape(-1)
    return to_h.astype(h.dtype), sums.w.reshape(w.shape), to_bias, None, -sums.temperature / temperature


def _chosen_rows(options: parts.Options, w: jax.Array, tokens: jax.Array, target: jax.Array, temperature: jax.Array) -> jax.Array:
    """[n d] derivative of the target logit with respect to h; 0 where the token is elsewhere."""
    found = (tokens >= 0) & (tokens < w.shape[options.axis])
    slope = 1 / temperature
    if options.softcap is not None:
        finite = jnp.where(jnp.isneginf(target), jnp.zeros_like(target), target)
        slope = (1 - jnp.square(finite * temperature / options.softcap)) * slope
    slope = jnp.where(found & ~jnp.isneginf(target), slope, jnp.zeros_like(target))
    placement = None
    if AxisType.Explicit in jax.typeof(w).sharding.mesh.axis_types:
        spec = jax.typeof(tokens).sharding.spec[0]
        placement = jax.P(spec, None) if options.transposed else jax.P(None, spec)
    index = jnp.where(found, tokens, jnp.zeros_like(tokens))
    rows = (w.at[index] if options.transposed else w.at[:, index]).get(mode="clip", out_sharding=placement)
    rows = rows if options.transposed else rows.T
    return slope[:, None] * rows.astype(target.dtype)


_statistics.defvjp(_statistics_fwd, _statistics_bwd)


# --- weights known beforehand


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _nll(
    options: parts.Options, axis_name: str | None, h: Any, w: Any, bias: Any, tokens: Any, weights: Any, temperature: Any
) -> jax.Array:
    (target, normalizer, _), _ = _statistics_forward(options, h, w, bias, tokens, temperature)
    return _loss(weights, online.finish(axis_name, w.shape[options.axis], tokens, target, normalizer)[0])


def _loss(weights: jax.Array, log_probs: jax.Array) -> jax.Array:
    return -jnp.sum(weights * jnp.where(weights != 0, log_probs, jnp.zeros_like(log_probs)))


def _nll_fwd(
    options: parts.Options, axis_name: str | None, h: Any, w: Any, bias: Any, tokens: Any, weights: Any, temperature: Any
) -> tuple[jax.Array, Any]:
    n, dtype = h.shape[0], weights.dtype
    vocabulary = parts.Vocabulary.of(options, w, bias, temperature)
    chunks = parts.token_chunks(n, options.token_chunk or min(max(n // 8, 256), 1024))

    def body(carry: tuple[_Sums, jax.Array], step: Any) -> tuple[_Sums, jax.Array]:
        sums, log_probs = carry
        part, ids, weight = parts.rows(chunks, (h, tokens, weights), step)
        if chunks.overlaps:
            weight = weight * chunks.fresh(step).reshape(-1).astype(dtype)
        x = vocabulary.logits(part, vocabulary.w)  # all that is as long as the vocabulary

        tile_of = functools.partial(vocabulary.tile_of, options.softcap, x, ids)
        running = online.over_logits(vocabulary, tile_of, jnp.zeros_like(ids, dtype=dtype), by_chunks=True)
        log_p, normalizer, _, possible = online.finish(axis_name, w.shape[options.axis], ids, running.target, running.logsumexp)
        weight = jnp.where(possible, weight, jnp.zeros_like(weight))
        base = jnp.where(jnp.isneginf(normalizer), jnp.zeros_like(normalizer), normalizer)

        def slopes(tile: parts.Tile) -> jax.Array:
            """Derivatives with respect to the tile's logits."""
            p = jnp.exp(tile.z - parts.beside(base, tile.z))
            return parts.beside(weight, tile.z) * (p - tile.chosen.astype(dtype))

        def temper(total: jax.Array, step: Any) -> jax.Array:
            tile = tile_of(step)
            return total - jnp.sum(slopes(tile) * tile.finite) / temperature

        tile = tile_of(None)
        dx = jnp.where(jnp.isneginf(tile.z), jnp.zeros_like(tile.z), slopes(tile) * tile.slope)
        to_h, to_w, to_bias = vocabulary.gradients(dx, part, sums.w, sums.bias)
        # Rows met before have weight 0 now: their gradient is added, not written over.
        to_h = parts.put_rows(chunks, sums.h, parts.rows(chunks, sums.h, step) + to_h, step)
        to_temperature = vocabulary.chunks.loop(temper, sums.temperature)
        return _Sums(to_h, to_w, to_bias, to_temperature), parts.put_rows(chunks, log_probs, log_p, step)

    start = _Sums(
        h=jnp.zeros_like(h, dtype=dtype),
        w=jnp.zeros_like(vocabulary.w, dtype=dtype),
        bias=None if vocabulary.bias is None else jnp.zeros_like(vocabulary.bias, dtype=dtype),
        temperature=jnp.zeros_like(temperature),
    )
    sums, log_probs = chunks.loop(body, (start, jnp.zeros_like(weights)))
    to_bias = None if bias is None or sums.bias is None else sums.bias.reshape(-1).astype(bias.dtype)
    gradients = (sums.h.astype(h.dtype), sums.w.reshape(w.shape).astype(w.dtype), to_bias, sums.temperature)
    return _loss(weights, log_probs), (gradients, log_probs)


def _nll_bwd(options: parts.Options, axis_name: str | None, residuals: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    del options, axis_name
    (to_h, to_w, to_bias, to_temperature), log_probs = residuals
    scale = lambda x: None if x is None else (cotangent * x.astype(cotangent.dtype)).astype(x.dtype)  # noqa: E731
    possible = ~jnp.isneginf(log_probs)
    to_weights = -cotangent * jnp.where(possible, log_probs, jnp.zeros_like(log_probs))
    return scale(to_h), scale(to_w), scale(to_bias), None, to_weights, scale(to_temperature)


_nll.defvjp(_nll_fwd, _nll_bwd)
