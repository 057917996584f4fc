"""Sampling from language models: truncated distributions, prefill and decode with a preallocated cache, rows that end at different times.

The model comes as a callable that appends tokens to a cache and says what may come next; prefill and decode are the same call:

    decode_fn(params, cache, tokens [b t], num_tokens=None [b], prefix=None) -> (logits [b v], cache)

It appends the first num_tokens[row] of `tokens` (all t if None, none if 0) behind the cache's length[row] and returns the logits after the
last of them (anything where there is none). Rows i n, ..., i n + n - 1 of a cache of g n rows go on from row i of `prefix`, a cache of g rows
that is read and never copied.

    generation = sampling.generate(decode_fn, params, key, cache, prompts, num_tokens, sampling=..., max_new_tokens=64, stop_tokens=[2])
    generation, info = sampling.generate_many(...)        # more prompts than rows fit: finished rows make room for the next prompt
    state = sampling.init(...); state = sampling.advance(decode_fn, params, state, num_steps=8)         # the same in pieces, to stream

Randomness: a token is drawn with the key fold_in(fold_in(key, request), position), where `request` numbers the (prompt, sample) pairs and
`position` counts the tokens before it, prefix included. So the same key gives the same tokens whatever shares the batch, in whatever order
slots are refilled, in however many pieces, on whatever mesh: as far as decode_fn gives a row the same logits there. Two logits-plus-noise
that agree to within decode_fn's rounding may fall either way.
"""

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from janax.jaxlib_ext import checks, dtypes

__all__ = [
    "Cache",
    "DecodeFn",
    "DecodeState",
    "Generation",
    "RefillInfo",
    "SamplingParams",
    "StopFn",
    "advance",
    "branch",
    "generate",
    "generate_many",
    "halt",
    "init",
    "pad_sequences",
    "result",
    "stop_strings",
    "stream",
    "truncate",
]

DecodeFn = Callable[..., tuple[jax.Array, "Cache"]]
StopFn = Callable[[int, np.ndarray], int | None]


class Cache(NamedTuple):
    """Keys and values of the tokens that each row has seen; the memory is allocated once.

    Attributes:
      k: [l b s kv h] keys: layers, rows, positions, key-value heads, head width.
      v: [l b s kv h] values.
      length: [b] int32, how many positions of each row are valid.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array


class SamplingParams(NamedTuple):
    """How to choose the next token; every field is traced, so new values do not compile anew. See `truncate`.

    Attributes:
      temperature: [] divides the logits; 0 is greedy.
      top_k: [] number of most probable tokens to keep, 0 for all.
      top_p: [] probability mass to keep, 1 for all.
      min_p: [] least probability to keep, as a fraction of the greatest one, 0 for all.
    """

    temperature: ArrayLike = 1.0
    top_k: ArrayLike = 0
    top_p: ArrayLike = 1.0
    min_p: ArrayLike = 0.0


class Generation(NamedTuple):
    """What was sampled. Entries from num_tokens on are padding: the pad token, log-probability 0.

    Attributes:
      tokens: [b m] int32, the token or sequence that ended a row included.
      num_tokens: [b] int32.
      log_probs: [b m] log-probability of each token under the policy, log_softmax of the raw logits, float32, nats.
      sampling_log_probs: [b m] the same under the truncated distribution that the token was drawn from.
      finished: [b] whether the row came to a stop token or sequence; False if it was cut off at its length or its cache's.
    """

    tokens: jax.Array
    num_tokens: jax.Array
    log_probs: jax.Array
    sampling_log_probs: jax.Array
    finished: jax.Array


class DecodeState(NamedTuple):
    """A batch of rows under way.

    Attributes:
      cache: Holds all tokens of a row but the last one sampled.
      prefix: Cache that the rows go on from, or None.
      key: [] the key that every draw is folded from.
      sampling: The sampling parameters.
      stop_tokens: [s] int32.
      stop_sequences: [q w] int32, right-aligned, -1 in front.
      pad_token: [] int32.
      request_ids: [b] int32, numbers the rows' random streams.
      positions: [b] int32, how many tokens of the row come before the next one.
      recent: [b w] int32, the last tokens sampled, -1 where there is none.
      tokens: [b m] int32, as in `Generation`, and so the next four.
      num_tokens: [b] int32.
      log_probs: [b m] float32.
      sampling_log_probs: [b m] float32.
      finished: [b] bool.
      done: [b] bool, no more tokens for this row, for whatever reason.
    """

    cache: Cache
    prefix: Cache | None
    key: jax.Array
    sampling: SamplingParams
    stop_tokens: jax.Array
    stop_sequences: jax.Array
    pad_token: jax.Array
    request_ids: jax.Array
    positions: jax.Array
    recent: jax.Array
    tokens: jax.Array
    num_tokens: jax.Array
    log_probs: jax.Array
    sampling_log_probs: jax.Array
    finished: jax.Array
    done: jax.Array


class RefillInfo(NamedTuple):
    """How full the batch was.

    Attributes:
      num_steps: [] int32, calls of decode_fn with one token per row.
      num_refills: [] int32, calls of decode_fn with prompts.
      busy_steps: [] int32, sum over the steps of the rows that were still being written.
      slot_steps: [] int32, sum over the steps of the rows that were computed.
      utilisation: [] float32, busy_steps / slot_steps, 1 if there was no step.
    """

    num_steps: jax.Array
    num_refills: jax.Array
    busy_steps: jax.Array
    slot_steps: jax.Array
    utilisation: jax.Array


_PER_ROW = ("request_ids", "positions", "recent", "tokens", "num_tokens", "log_probs", "sampling_log_probs", "finished", "done")
_VARYING = ("cache", *_PER_ROW)


def truncate(
    logits: jax.Array,
    *,
    temperature: ArrayLike = 1.0,
    top_k: ArrayLike | None = None,
    top_p: ArrayLike = 1.0,
    min_p: ArrayLike = 0.0,
) -> jax.Array:
    """Log-probabilities of the distribution that is sampled from: temperature, then top-k, top-p and min-p, each on what the last one left.

    With p = softmax(logits / temperature):
      top-k keeps the tokens at least as probable as the k-th; tokens tied with it are kept too, so there may be more than k;
      top-p keeps the smallest set of the most probable tokens whose share of the mass that top-k left is at least top_p, and at least one
        token; of tokens tied at its edge the lower ids are kept;
      min-p keeps the tokens with p >= min_p max(p).
    Order and rules are those of Hugging Face transformers, where ties at top-p's edge fall as the sort leaves them. Here there is no sort:
    thresholds are found by bisection over the bits of the logits, some 80 reductions over the vocabulary whatever k and p are, which may be
    sharded over it. Reaching top_p or min_p to within 8 rounding units counts as reaching it, so that probabilities (.4, .3, .2, .1) with
    top_p = .7 keep two tokens.

    Args:
      logits: [v] unnormalised log-probabilities; -inf marks a forbidden token.
      temperature: [] >= 0; 0 puts all mass on the first of the largest logits. Traced, as are the others.
      top_k: [] integer; 0 or less, or None, keeps all.
      top_p: [] 1 or more keeps all; 0 or less keeps one token.
      min_p: [] in [0, 1].

    Returns:
      [v] log-probabilities, float32 or wider, -inf outside the kept set; nan if all logits are -inf and the temperature is above 0.
      Differentiable in the logits and the temperature with the kept set held fixed. One distribution per call: batch with `jax.vmap`.

    Raises:
      ValueError: if `logits` is not one-dimensional or a parameter is not a scalar.

    Reference: Fan et al., arXiv:1805.04833 (top-k); Holtzman et al., arXiv:1904.09751 (top-p); Nguyen et al., arXiv:2407.01082 (min-p).
    """
    checks.check_shapes(
        "sampling.truncate", logits=(logits, "v"), temperature=(temperature, ""), top_k=(top_k, ""), top_p=(top_p, ""), min_p=(min_p, "")
    )
    logits = dtypes.at_least_float32(logits)
    temperature, top_p, min_p = (jnp.asarray(x).astype(logits.dtype) for x in (temperature, top_p, min_p))
    forbidden = jnp.isneginf(logits)
    ids = jnp.zeros_like(logits, dtype=jnp.int32) + jnp.arange(logits.shape[0], dtype=jnp.int32)  # placed as the logits are
    # gap = log(max p / p) >= 0: its bits, read as an integer, order the tokens from most to least probable.
    gap = (jax.lax.stop_gradient(jnp.max(logits)) - jnp.where(forbidden, jnp.zeros_like(logits), logits)) / jnp.where(
        temperature > 0, temperature, jnp.ones_like(temperature)
    )
    infinite = jnp.full_like(gap, jnp.inf)
    gap = jnp.where(forbidden, infinite, gap)
    gap = jnp.where(temperature > 0, gap, jnp.where(ids == jnp.argmax(logits), jnp.zeros_like(gap), infinite))

    fixed = jax.lax.stop_gradient(gap)
    integer, num_bits = (jnp.int64, 63) if gap.dtype == jnp.float64 else (jnp.int32, 31)
    rank = jax.lax.bitcast_convert_type(fixed, integer)
    weight, slack = jnp.exp(-fixed), 1 - 8 * jnp.finfo(gap.dtype).eps

    def most_probable(kept: jax.Array) -> jax.Array:
        k = jnp.asarray(top_k).astype(jnp.int32)
        edge = _least(lambda r: jnp.sum((rank <= r).astype(jnp.int32)) >= k, num_bits, rank)
        return kept & (rank <= edge)

    def nucleus(kept: jax.Array) -> jax.Array:
        mass = jnp.where(kept, weight, jnp.zeros_like(weight))
        total = lambda chosen: jnp.sum(jnp.where(chosen, mass, jnp.zeros_like(mass)))  # noqa: E731
        target = jnp.maximum(jnp.sum(mass) * top_p * slack, jnp.finfo(mass.dtype).tiny)
        edge = _least(lambda r: total(rank <= r) >= target, num_bits, rank)
        last = _least(lambda i: total((rank < edge) | ((rank == edge) & (ids <= i))) >= target, logits.shape[0].bit_length(), ids)
        return kept & ((rank < edge) | ((rank == edge) & (ids <= last)))

    kept = weight >= jnp.minimum(min_p, 1) * slack
    others = (
        kept | True
    )  # all, placed as the logits are; min-p looks at the greatest probability alone, so it may as well be taken first and joined last
    if top_k is not None:
        others = jax.lax.cond(jnp.asarray(top_k) > 0, most_probable, lambda kept: kept, others)
    others = jax.lax.cond(top_p < 1, nucleus, lambda kept: kept, others)
    return jax.nn.log_softmax(jnp.where(kept & others, -gap, -infinite))


def _least(reached: Callable[[jax.Array], jax.Array], num_bits: int, like: jax.Array) -> jax.Array:
    """The least integer of `num_bits` bits, in the dtype of `like`, for which the monotone `reached` holds; all ones if none."""

    dtype, zero = like.dtype, jnp.max(like) & 0  # not a constant, or explicit axes would not know where a batched loop's carry lies

    def bit(i: jax.Array, low: jax.Array) -> jax.Array:
        half = jnp.left_shift(jnp.ones((), dtype), (num_bits - 1 - i).astype(dtype))
        return jnp.where(reached(low + (half - 1)), low, low + half)

    return jax.lax.fori_loop(0, num_bits, bit, zero)


def _draw(
    key: jax.Array, request_ids: jax.Array, positions: jax.Array, logits: jax.Array, sampling: SamplingParams
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One token per row by Gumbel-max, its log-probability under the policy and under the truncated distribution, each [b]."""
    logits = dtypes.at_least_float32(logits)
    ids = jnp.zeros_like(logits, dtype=jnp.int32) + jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
    pick = lambda x, token: jnp.sum(jnp.where(ids == token[:, None], x, jnp.zeros_like(x)), axis=1)  # noqa: E731

    def noisy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_q = jax.vmap(functools.partial(truncate, **sampling._asdict()))(logits)
        keys = jax.vmap(lambda request, position: jax.random.fold_in(jax.random.fold_in(key, request), position))(request_ids, positions)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
        token = jnp.argmax(log_q + noise, axis=1).astype(jnp.int32)
        return token, pick(log_q, token)

    def greedy(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        token = jnp.argmax(logits, axis=1).astype(jnp.int32)
        return token, jnp.zeros_like(token, dtype=logits.dtype)

    token, sampling_log_prob = jax.lax.cond(sampling.temperature > 0, noisy, greedy, logits)  # type: ignore[operator]
    log_prob = pick(logits, token) - jax.nn.logsumexp(logits, axis=1)
    return token, log_prob.astype(jnp.float32), sampling_log_prob.astype(jnp.float32)


def _emit(state: DecodeState, logits: jax.Array, *, capacity: int) -> DecodeState:
    """Draws a token for every row that is not done, writes it down, and sees who ends; `capacity` is that of the cache to go on in."""
    active = ~state.done
    token, log_prob, sampling_log_prob = _draw(state.key, state.request_ids, state.positions, logits, state.sampling)
    steps = jnp.arange(state.tokens.shape[1], dtype=jnp.int32)[None]
    here = (steps == state.num_tokens[:, None]) & active[:, None]
    num_tokens = state.num_tokens + active.astype(jnp.int32)
    recent = jnp.where(active[:, None], jnp.concatenate([state.recent[:, 1:], token[:, None]], axis=1), state.recent)
    sequences = state.stop_sequences[None]
    ended = jnp.any(token[:, None] == state.stop_tokens[None], axis=1) | jnp.any(
        jnp.all((sequences < 0) | (sequences == recent[:, None]), axis=2) & jnp.any(sequences >= 0, axis=2), axis=1
    )
    cut_off = (num_tokens >= state.tokens.shape[1]) | (state.cache.length >= capacity)
    return state._replace(
        positions=state.positions + active.astype(jnp.int32),
        recent=recent,
        tokens=jnp.where(here, token[:, None], state.tokens),
        num_tokens=num_tokens,
        log_probs=jnp.where(here, log_prob[:, None], state.log_probs),
        sampling_log_probs=jnp.where(here, sampling_log_prob[:, None], state.sampling_log_probs),
        finished=state.finished | (active & ended),
        done=state.done | ended | cut_off,
    )


def _step(decode_fn: DecodeFn, params: Any, state: DecodeState) -> DecodeState:
    """Appends the last token of every row that is not done and draws the next one."""
    active = ~state.done
    tokens = jnp.maximum(state.recent[:, -1:], 0)  # -1 where nothing was sampled: such a row is done and appends nothing
    logits, cache = decode_fn(params, state.cache, tokens, num_tokens=active.astype(jnp.int32), prefix=state.prefix)
    return _emit(state._replace(cache=cache), logits, capacity=cache.k.shape[2])


def _blank(
    cache: Cache,
    positions: jax.Array,
    request_ids: jax.Array,
    *,
    key: jax.Array,
    prefix: Cache | None,
    sampling: SamplingParams,
    max_new_tokens: int,
    stop_tokens: ArrayLike | Sequence[int],
    stop_sequences: ArrayLike | None,
    pad_token: ArrayLike,
) -> DecodeState:
    """A state with nothing sampled. Arrays are made from `positions`, so that they lie where it lies."""
    no_sequences = np.zeros((0, 1), np.int32)
    sequences = jnp.asarray(no_sequences if stop_sequences is None else stop_sequences, jnp.int32)
    pad_token = jnp.asarray(pad_token, jnp.int32)

    def rows(width: int, dtype: Any) -> jax.Array:
        return jnp.broadcast_to(jnp.zeros_like(positions, dtype=dtype)[:, None], (positions.shape[0], width))

    return DecodeState(
        cache=cache,
        prefix=prefix,
        key=key,
        sampling=SamplingParams(
            temperature=jnp.asarray(sampling.temperature, jnp.float32),
            top_k=jnp.asarray(sampling.top_k, jnp.int32),
            top_p=jnp.asarray(sampling.top_p, jnp.float32),
            min_p=jnp.asarray(sampling.min_p, jnp.float32),
        ),
        stop_tokens=jnp.asarray(stop_tokens, jnp.int32),
        stop_sequences=sequences,
        pad_token=pad_token,
        request_ids=jnp.zeros_like(positions) + request_ids,
        positions=positions,
        recent=rows(sequences.shape[1], jnp.int32) - 1,
        tokens=rows(max_new_tokens, jnp.int32) + pad_token,
        num_tokens=jnp.zeros_like(positions),
        log_probs=rows(max_new_tokens, jnp.float32),
        sampling_log_probs=rows(max_new_tokens, jnp.float32),
        finished=jnp.zeros_like(positions, dtype=bool),
        done=jnp.zeros_like(positions, dtype=bool),
    )


def _repeat(x: jax.Array, n: int) -> jax.Array:
    """[b ...] -> [b n ...], each row n times in a row; stays sharded over b."""
    return x if n == 1 else jnp.broadcast_to(x[:, None], (x.shape[0], n, *x.shape[1:])).reshape(-1, *x.shape[1:])


def branch(cache: Cache, *, num_branches: int, capacity: int) -> Cache:
    """An empty cache for several continuations of every row of `cache`, to be used with `prefix=cache`.

    Score 16 targets after one shared context: prefill the context once, then `decode_fn` (or the model's own scoring function) over
    branch(cache, num_branches=16, capacity=target length) with prefix=cache. The context's keys and values are stored once.

    Args:
      cache: g rows.
      num_branches: n, continuations per row. Static.
      capacity: Positions of each new row. Static.

    Returns:
      A cache of g n rows and length zero, of the same dtype; rows i n, ..., i n + n - 1 belong to row i.

    Raises:
      ValueError: if a number is below one.
    """
    checks.check_shapes("sampling.branch", k=(cache.k, "l b s kv h"), v=(cache.v, "l b s kv h"), length=(cache.length, "b"))
    for name, value in (("num_branches", num_branches), ("capacity", capacity)):
        if value < 1:
            raise ValueError(f"sampling.branch: {name!r} is {value}, expected at least 1")

    def empty(x: jax.Array) -> jax.Array:
        layers, rows, _, heads, width = x.shape
        one = jnp.zeros_like(x[:, :, :1])[:, :, None]
        return jnp.broadcast_to(one, (layers, rows, num_branches, capacity, heads, width)).reshape(layers, -1, capacity, heads, width)

    return Cache(k=empty(cache.k), v=empty(cache.v), length=_repeat(jnp.zeros_like(cache.length), num_branches))


def _check_request(
    function: str,
    cache: Cache,
    prompts: ArrayLike,
    num_tokens: ArrayLike,
    *,
    max_new_tokens: int,
    room: int,
    stop_tokens: ArrayLike | Sequence[int],
    stop_sequences: ArrayLike | None,
) -> None:
    """What `init` and `generate_many` ask alike; `room` is how many sampled tokens the prompts' cache has to take."""
    checks.check_shapes(
        function,
        prompts=(prompts, "b t"),
        num_tokens=(num_tokens, "b"),
        stop_tokens=(stop_tokens, "s"),
        stop_sequences=(stop_sequences, "q w"),
    )
    checks.check_shapes(
        function, **{"cache.k": (cache.k, "l b s kv h"), "cache.v": (cache.v, "l b s kv h"), "cache.length": (cache.length, "b")}
    )
    if max_new_tokens < 1:
        raise ValueError(f"{function}: 'max_new_tokens' is {max_new_tokens}, expected at least 1")
    num_prompts, longest = np.shape(prompts)
    capacity = cache.k.shape[2]
    if num_prompts < 1 or longest < 1:
        raise ValueError(f"{function}: 'prompts' has shape {(num_prompts, longest)}, expected at least one prompt of one token")
    if longest > capacity:
        raise ValueError(f"{function}: 'prompts' are {longest} tokens long, but 'cache' has {capacity} positions per row")
    if longest + room > capacity:
        raise ValueError(
            f"{function}: 'cache' has {capacity} positions per row, expected at least {longest + room}: prompts of {longest} tokens and "
            f"'max_new_tokens'={max_new_tokens} less the last one, which is not stored"
        )
    if stop_sequences is not None and np.shape(stop_sequences)[1] < 1:
        raise ValueError(f"{function}: 'stop_sequences' has shape {np.shape(stop_sequences)}, expected at least one token per sequence")
    if checks.is_concrete(num_tokens):
        lengths = np.asarray(num_tokens)
        for row in np.flatnonzero((lengths < 1) | (lengths > longest))[:1]:
            raise ValueError(f"{function}: 'num_tokens' is {lengths[row]} in row {row}, expected 1 to {longest}: a prompt cannot be empty")


def _prefill(
    function: str, decode_fn: DecodeFn, params: Any, cache: Cache, prompts: jax.Array, num_tokens: jax.Array, prefix: Cache | None
) -> tuple[jax.Array, Cache]:
    logits, new = decode_fn(params, cache, prompts, num_tokens=num_tokens, prefix=prefix)
    checks.check_shapes(function, **{"prompts": (prompts, "b t"), "logits of decode_fn": (logits, "b v")})
    for name, before, after in zip(Cache._fields, cache, new):
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            raise ValueError(
                f"{function}: decode_fn returned cache.{name} as {after.dtype}{list(after.shape)}, "
                f"expected {before.dtype}{list(before.shape)} as it came"
            )
    return logits, new


def _prefix_length(prefix: Cache | None, rows: int) -> jax.Array | int:
    return 0 if prefix is None else _repeat(prefix.length, rows // prefix.length.shape[0])


def _check_prefix(function: str, prefix: Cache | None, rows: int) -> None:
    if prefix is not None and rows % prefix.length.shape[0]:
        raise ValueError(f"{function}: 'prefix' has {prefix.length.shape[0]} rows, expected a divisor of the cache's {rows}")


def init(
    decode_fn: DecodeFn,
    params: Any,
    key: jax.Array,
    cache: Cache,
    prompts: ArrayLike,
    num_tokens: ArrayLike,
    *,
    sampling: SamplingParams,
    max_new_tokens: int,
    stop_tokens: ArrayLike | Sequence[int] = (),
    stop_sequences: ArrayLike | None = None,
    num_samples: int = 1,
    request_ids: ArrayLike | None = None,
    prefix: Cache | None = None,
    pad_token: ArrayLike = 0,
) -> DecodeState:
    """Prefills the prompts and draws the first token of every row; arguments and conditions as in `generate`."""
    prompts_rows = np.shape(prompts)[0] if np.ndim(prompts) else 0
    shared = num_samples > 1 and prefix is None
    if num_samples < 1:
        raise ValueError(f"sampling.init: 'num_samples' is {num_samples}, expected at least 1")
    room = 0 if shared else max_new_tokens - 1
    _check_request(
        "sampling.init",
        cache,
        prompts,
        num_tokens,
        max_new_tokens=max_new_tokens,
        room=room,
        stop_tokens=stop_tokens,
        stop_sequences=stop_sequences,
    )
    rows = prompts_rows * num_samples
    cache_rows = prompts_rows if shared else rows
    if cache.k.shape[1] != cache_rows:
        raise ValueError(f"sampling.init: 'cache' has {cache.k.shape[1]} rows, expected {cache_rows}")
    _check_prefix("sampling.init", prefix, cache_rows)
    prompts, num_tokens = jnp.asarray(prompts, jnp.int32), jnp.asarray(num_tokens, jnp.int32)
    request_ids = jnp.arange(rows, dtype=jnp.int32) if request_ids is None else jnp.asarray(request_ids, jnp.int32)
    checks.check_shapes("sampling.init", request_ids=(request_ids, str(rows)))

    if not shared:
        prompts, num_tokens = _repeat(prompts, num_samples), _repeat(num_tokens, num_samples)
    nothing = (num_tokens < 1) | (cache.length + num_tokens > cache.k.shape[2])
    logits, cache = _prefill("sampling.init", decode_fn, params, cache, prompts, num_tokens, prefix)
    positions = cache.length + _prefix_length(prefix, cache_rows)
    if shared:
        logits, positions, nothing = (_repeat(x, num_samples) for x in (logits, positions, nothing))
        prefix, cache = cache, branch(cache, num_branches=num_samples, capacity=max(1, max_new_tokens - 1))
    state = _blank(
        cache,
        positions,
        request_ids,
        key=key,
        prefix=prefix,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        stop_sequences=stop_sequences,
        pad_token=pad_token,
    )
    return _emit(state._replace(done=nothing), logits, capacity=cache.k.shape[2])


def advance(decode_fn: DecodeFn, params: Any, state: DecodeState, *, num_steps: ArrayLike) -> DecodeState:
    """Decodes up to `num_steps` more tokens per row, fewer if all rows are done before.

    Any division into calls gives the same tokens. To follow a generation from the host, jit it once and look at the state in between:

        more = jax.jit(lambda params, state: sampling.advance(decode_fn, params, state, num_steps=8), donate_argnums=1)

    Args:
      decode_fn: See the module's docstring. Static.
      params: Its parameters.
      state: From `init` or an earlier call.
      num_steps: [] may be traced.

    Returns:
      The state with the tokens appended.
    """

    def more(carry: tuple[jax.Array, dict[str, Any]]) -> jax.Array:
        step, varying = carry
        return (step < num_steps) & ~jnp.all(varying["done"])

    def body(carry: tuple[jax.Array, dict[str, Any]]) -> tuple[jax.Array, dict[str, Any]]:
        step, varying = carry
        new = _step(decode_fn, params, state._replace(**varying))
        return step + 1, {name: getattr(new, name) for name in _VARYING}

    # The rest of the state does not go round the loop, so under `jit` it is handed back without a copy.
    first = jnp.zeros((), jnp.int32), {name: getattr(state, name) for name in _VARYING}
    return state._replace(**jax.lax.while_loop(more, body, first)[1])


def result(state: DecodeState) -> Generation:
    """What the rows have come to so far."""
    return Generation(**{name: getattr(state, name) for name in Generation._fields})


def generate(
    decode_fn: DecodeFn,
    params: Any,
    key: jax.Array,
    cache: Cache,
    prompts: ArrayLike,
    num_tokens: ArrayLike,
    *,
    sampling: SamplingParams,
    max_new_tokens: int,
    stop_tokens: ArrayLike | Sequence[int] = (),
    stop_sequences: ArrayLike | None = None,
    num_samples: int = 1,
    request_ids: ArrayLike | None = None,
    prefix: Cache | None = None,
    pad_token: ArrayLike = 0,
) -> Generation:
    """Continues every prompt until it stops, in one prefill and one decode loop that ends with the last row; `init`, then `advance`.

    n samples of a prompt share its keys and values: the prompts are prefilled once, in `cache`, which the samples then read as their
    prefix, each with a small cache of its own. If there is a `prefix` already, samples share that one and hold their prompts themselves.

    Args:
      decode_fn: See the module's docstring. Static.
      params: Its parameters.
      key: [] typed key; see the module's docstring for what is drawn with it.
      cache: Where the prompts go, behind what it holds; b rows (b num_samples if `prefix` is given) of at least t positions, t +
        max_new_tokens - 1 unless the samples have caches of their own. Its dtype is the dtype of the keys and values.
      prompts: [b t] token ids, right-padded. A row needs at least one token: the last one of an earlier turn will do.
      num_tokens: [b] tokens of each prompt.
      sampling: Temperature and truncation. Traced.
      max_new_tokens: m. Static.
      stop_tokens: [s] ids that end a row; -1 never does.
      stop_sequences: [q w] as `pad_sequences` writes them: token sequences that end a row. They are looked for in what is sampled, not across
        the end of the prompt. A string may be spelt by other tokens than its own encoding and may begin or end within one: where that
        matters, use `stream` with `stop_strings`, which look at the text, on the host, every few steps.
      num_samples: n, samples per prompt. Static.
      request_ids: [b num_samples] numbers of the rows' random streams, by default their index. Whoever splits a batch passes the parts of
        arange(whole batch) and gets the same tokens.
      prefix: g rows that the b num_samples rows go on from, in order; see the module's docstring.
      pad_token: [] what stands in `tokens` behind a row's end.

    Returns:
      The generation, b num_samples rows, sample j of prompt i in row i num_samples + j. A row without prompt tokens (num_tokens 0 under
      `jit`) gets none, and so does one whose prompt does not fit behind what its cache holds; a row whose cache is full ends there.

    Raises:
      ValueError: on inconsistent shapes, a cache that is too short for the prompts or the new tokens, `max_new_tokens` or `num_samples`
        below one, and, where num_tokens is not traced, an empty prompt.
    """
    state = init(
        decode_fn,
        params,
        key,
        cache,
        prompts,
        num_tokens,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        stop_sequences=stop_sequences,
        num_samples=num_samples,
        request_ids=request_ids,
        prefix=prefix,
        pad_token=pad_token,
    )
    return result(advance(decode_fn, params, state, num_steps=max_new_tokens))


def generate_many(
    decode_fn: DecodeFn,
    params: Any,
    key: jax.Array,
    cache: Cache,
    prompts: ArrayLike,
    num_tokens: ArrayLike,
    *,
    sampling: SamplingParams,
    max_new_tokens: int,
    stop_tokens: ArrayLike | Sequence[int] = (),
    stop_sequences: ArrayLike | None = None,
    request_ids: ArrayLike | None = None,
    prefix: Cache | None = None,
    pad_token: ArrayLike = 0,
    refill_at: int | None = None,
    drain_slots: Sequence[int] | None = None,
) -> tuple[Generation, RefillInfo]:
    """As `generate` for more prompts than the cache has rows: a finished row makes room for the next prompt, all in one program.

    When `refill_at` rows are finished (fewer at the end), their outputs are put away and as many prompts are prefilled in a cache of
    refill_at x t positions, which is then copied into the rows' places. That costs refill_at t tokens; decode_fn on the whole batch with
    num_tokens 0 for the rows under way would spare the copy and cost slots x t. The first prompts come in the same way. While rows wait, on
    average (refill_at - 1) / 2 of them are idle: refill_at / (2 slots) of the batch. When no prompt is left and the rows under way fit into
    the next of `drain_slots`, they move to a batch of that size, so that the longest answers do not drag the whole batch along.

    Args:
      decode_fn: See the module's docstring; it is traced once for prefill and 1 + len(drain_slots) times for decode. Static.
      params: Its parameters.
      key: [] typed key.
      cache: One row per slot, at least t + max_new_tokens - 1 positions. What it holds is overwritten.
      prompts: [n t] token ids, right-padded; for several samples of a prompt repeat its row.
      num_tokens: [n] tokens of each prompt.
      sampling: Temperature and truncation. Traced.
      max_new_tokens: m. Static.
      stop_tokens: As in `generate`, and so the next four, request_ids [n] and the results of empty prompts too.
      stop_sequences: See there.
      request_ids: See there.
      prefix: One row, which all prompts go on from.
      pad_token: See there.
      refill_at: Finished rows to wait for, by default a sixteenth of the slots, at least one. Static.
      drain_slots: Falling batch sizes for the end, by default one of half the slots; () keeps the whole batch. Static.

    Returns:
      The generation of n rows in the prompts' order, the same as that of `generate`, and how full the batch was.

    Raises:
      ValueError: as `generate`, and if `refill_at` or `drain_slots` is out of range, or `prefix` has several rows.
    """
    _check_request(
        "sampling.generate_many",
        cache,
        prompts,
        num_tokens,
        max_new_tokens=max_new_tokens,
        room=max_new_tokens - 1,
        stop_tokens=stop_tokens,
        stop_sequences=stop_sequences,
    )
    prompts, num_tokens = jnp.asarray(prompts, jnp.int32), jnp.asarray(num_tokens, jnp.int32)
    (n, longest), slots, capacity = prompts.shape, cache.k.shape[1], cache.k.shape[2]
    request_ids = jnp.arange(n, dtype=jnp.int32) if request_ids is None else jnp.asarray(request_ids, jnp.int32)
    checks.check_shapes("sampling.generate_many", request_ids=(request_ids, str(n)))
    refill_at = max(1, slots // 16) if refill_at is None else refill_at
    if not 1 <= refill_at <= slots:
        raise ValueError(f"sampling.generate_many: 'refill_at' is {refill_at}, expected 1 to {slots}, the cache's rows")
    drain = tuple(size for size in (slots // 2,) if size) if drain_slots is None else tuple(drain_slots)
    if any(not 1 <= small < large for large, small in zip((slots, *drain), drain)):
        raise ValueError(
            f"sampling.generate_many: 'drain_slots' is {drain}, expected falling sizes below the cache's {slots} rows and at least 1"
        )
    if prefix is not None and prefix.length.shape[0] != 1:
        raise ValueError(f"sampling.generate_many: 'prefix' has {prefix.length.shape[0]} rows, expected 1, shared by all prompts")
    blank = functools.partial(
        _blank,
        key=key,
        prefix=prefix,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        stop_sequences=stop_sequences,
        pad_token=pad_token,
    )

    def refill(loop: _Refill) -> _Refill:
        order = jnp.arange(refill_at, dtype=jnp.int32)
        upcoming = loop.upcoming + order
        into = jnp.nonzero(loop.state.done, size=refill_at, fill_value=slots)[0].astype(jnp.int32)
        into = jnp.where(upcoming < n, into, slots)  # out of range: dropped
        chosen = jnp.minimum(upcoming, n - 1)
        lengths = jnp.where(upcoming < n, num_tokens[chosen], 0)
        fresh_cache = Cache(
            k=jnp.zeros((cache.k.shape[0], refill_at, longest, *cache.k.shape[3:]), cache.k.dtype),
            v=jnp.zeros((cache.v.shape[0], refill_at, longest, *cache.v.shape[3:]), cache.v.dtype),
            length=jnp.zeros(refill_at, cache.length.dtype),
        )
        logits, fresh_cache = _prefill("sampling.generate_many", decode_fn, params, fresh_cache, prompts[chosen], lengths, prefix)
        fresh = blank(fresh_cache, fresh_cache.length + _prefix_length(prefix, refill_at), request_ids[chosen])
        fresh = _emit(fresh._replace(done=lengths < 1), logits, capacity=capacity)
        leaving = jnp.minimum(into, slots - 1)
        return _Refill(
            state=_put_rows(loop.state, into, fresh),
            owner=loop.owner.at[into].set(upcoming, mode="drop"),
            output=_put_away(loop.output, _take_rows(loop.state, leaving), jnp.where(into < slots, loop.owner[leaving], n)),
            upcoming=jnp.minimum(loop.upcoming + refill_at, n),
            info=loop.info._replace(num_refills=loop.info.num_refills + 1),
        )

    def decode(loop: _Refill, fewest: int) -> _Refill:
        """Steps until rows are to be refilled, or, when there is nothing left to fill them with, at most `fewest` are under way."""

        def go_on(carry: tuple[DecodeState, RefillInfo]) -> jax.Array:
            active = jnp.sum((~carry[0].done).astype(jnp.int32))
            rows, left = carry[0].done.shape[0], n - loop.upcoming
            return jnp.where(left > 0, rows - active < jnp.minimum(refill_at, left), active > fewest)

        def body(carry: tuple[DecodeState, RefillInfo]) -> tuple[DecodeState, RefillInfo]:
            state, info = carry
            info = info._replace(
                num_steps=info.num_steps + 1,
                busy_steps=info.busy_steps + jnp.sum((~state.done).astype(jnp.int32)),
                slot_steps=info.slot_steps + state.done.shape[0],
            )
            return _step(decode_fn, params, state), info

        state, info = jax.lax.while_loop(go_on, body, (loop.state, loop.info))
        return loop._replace(state=state, info=info)

    def shrink(loop: _Refill, size: int) -> _Refill:
        rows = loop.owner.shape[0]
        stay = jnp.nonzero(~loop.state.done, size=size, fill_value=rows)[0].astype(jnp.int32)
        index = jnp.minimum(stay, rows - 1)
        state = _take_rows(loop.state, index)
        return loop._replace(
            state=state._replace(done=state.done | (stay >= rows)),
            owner=jnp.where(stay < rows, loop.owner[index], n),
            output=_put_away(loop.output, loop.state, loop.owner),
        )

    zero = jnp.zeros((), jnp.int32)
    state = blank(cache._replace(length=jnp.zeros_like(cache.length)), jnp.zeros_like(cache.length), jnp.zeros_like(cache.length))
    loop = _Refill(
        state=state._replace(done=jnp.full_like(state.done, True)),
        owner=jnp.full((slots,), n, jnp.int32),
        output=result(blank(cache, jnp.zeros_like(num_tokens), request_ids)),
        upcoming=zero,
        info=RefillInfo(num_steps=zero, num_refills=zero, busy_steps=zero, slot_steps=zero, utilisation=jnp.ones((), jnp.float32)),
    )
    ladder = (*drain, 0)
    loop = jax.lax.while_loop(lambda loop: loop.upcoming < n, lambda loop: decode(refill(loop), ladder[0]), loop)
    for size, fewest in itertools.pairwise(ladder):
        loop = decode(shrink(loop, size), fewest)
    info = loop.info
    share = info.busy_steps.astype(jnp.float32) / jnp.maximum(info.slot_steps, 1).astype(jnp.float32)
    return _put_away(loop.output, loop.state, loop.owner), info._replace(
        utilisation=jnp.where(info.slot_steps > 0, share, info.utilisation)
    )


class _Refill(NamedTuple):
    """The loop of `generate_many`: rows under way, whose they are (n: nobody's), what is done, and the next prompt."""

    state: DecodeState
    owner: jax.Array
    output: Generation
    upcoming: jax.Array
    info: RefillInfo


def _take_rows(state: DecodeState, index: jax.Array) -> DecodeState:
    cache = Cache(k=state.cache.k[:, index], v=state.cache.v[:, index], length=state.cache.length[index])
    return state._replace(cache=cache, **{name: getattr(state, name)[index] for name in _PER_ROW})


def _put_rows(state: DecodeState, index: jax.Array, rows: DecodeState) -> DecodeState:
    """Writes `rows`, whose cache may have fewer positions, over the rows `index`; an index out of range is left out."""
    positions = rows.cache.k.shape[2]
    cache = Cache(
        k=state.cache.k.at[:, index, :positions].set(rows.cache.k, mode="drop"),
        v=state.cache.v.at[:, index, :positions].set(rows.cache.v, mode="drop"),
        length=state.cache.length.at[index].set(rows.cache.length, mode="drop"),
    )
    return state._replace(cache=cache, **{name: getattr(state, name).at[index].set(getattr(rows, name), mode="drop") for name in _PER_ROW})


def _put_away(output: Generation, state: DecodeState, owner: jax.Array) -> Generation:
    """Writes the rows' results where their owners have their place; owners out of range have none."""
    return jax.tree.map(lambda whole, rows: whole.at[owner].set(rows, mode="drop"), output, result(state))


def pad_sequences(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Token sequences as `generate` wants them: [q w] int32, right-aligned to the longest, -1 in front.

    Raises:
      ValueError: if a sequence is empty or holds a negative id.
    """
    for i, sequence in enumerate(sequences):
        if not len(sequence) or min(sequence) < 0:
            raise ValueError(f"sampling.pad_sequences: sequence {i} is {list(sequence)}, expected at least one token id, none negative")
    width = max((len(sequence) for sequence in sequences), default=1)
    return np.array([[-1] * (width - len(sequence)) + list(sequence) for sequence in sequences], np.int32).reshape(-1, width)


def halt(state: DecodeState, keep: ArrayLike) -> DecodeState:
    """Ends rows after their first keep[row] tokens: the rest becomes padding, also in the cache, and the row counts as finished.

    Args:
      state: Rows under way.
      keep: [b] int32; -1 leaves a row as it is, more than it has ends it where it is.

    Returns:
      The state. A halted row is not decoded any further.

    Raises:
      ValueError: if `keep` does not have one entry per row.
    """
    keep = jnp.asarray(keep, jnp.int32)
    checks.check_shapes("sampling.halt", done=(state.done, "b"), keep=(keep, "b"))
    num_tokens = jnp.where(keep < 0, state.num_tokens, jnp.minimum(keep, state.num_tokens))
    stays = jnp.arange(state.tokens.shape[1], dtype=jnp.int32)[None] < num_tokens[:, None]
    stored = jnp.maximum(state.num_tokens - 1, 0) - jnp.maximum(num_tokens - 1, 0)  # the last token is not in the cache
    return state._replace(
        cache=state.cache._replace(length=state.cache.length - stored),
        positions=state.positions - (state.num_tokens - num_tokens),
        tokens=jnp.where(stays, state.tokens, state.pad_token),
        num_tokens=num_tokens,
        log_probs=jnp.where(stays, state.log_probs, jnp.zeros_like(state.log_probs)),
        sampling_log_probs=jnp.where(stays, state.sampling_log_probs, jnp.zeros_like(state.sampling_log_probs)),
        finished=state.finished | (keep >= 0),
        done=state.done | (keep >= 0),
    )


def stream(advance_fn: Callable[[DecodeState], DecodeState], state: DecodeState, *, stop_fn: StopFn | None = None) -> Iterator[DecodeState]:
    """Drives a generation from the host and hands out the state after every piece, the first tokens included.

    What a row has said is tokens[row, :num_tokens[row]]. With `stop_fn` a row may end for reasons that only the text shows; it is cut where
    `stop_fn` says, so the outcome does not depend on the length of the pieces, only how much is computed in vain (less than one piece).

    Args:
      advance_fn: state -> state, as a rule a jitted `advance`; may donate its argument if the caller keeps nothing of an older state.
      state: From `init`.
      stop_fn: (row, its tokens so far) -> how many of them to keep, or None to go on; called for the rows that grew. See `stop_strings`.

    Yields:
      The state; the last one has `done` everywhere.
    """
    seen = np.zeros(state.done.shape, np.int32)
    while True:
        if stop_fn is not None:
            tokens, num_tokens = np.asarray(state.tokens), np.asarray(state.num_tokens)
            found = [stop_fn(row, tokens[row, : num_tokens[row]]) if num_tokens[row] > seen[row] else None for row in range(len(seen))]
            seen = num_tokens.copy()
            if any(keep is not None for keep in found):
                state = halt(state, np.array([-1 if keep is None else keep for keep in found], np.int32))
        finished = bool(np.all(np.asarray(state.done)))
        yield state
        if finished:
            return
        state = advance_fn(state)


def stop_strings(to_text: Callable[[list[int]], str], strings: Sequence[str]) -> StopFn:
    """A `stop_fn` for `stream`: ends a row with the first token by which its text contains one of the strings.

    Exact for any tokenizer, as it looks at the text: the string may begin and end within tokens, or be spelt by unusual ones. What the last
    token says beyond the string is for the caller to cut. Assumes that more tokens never take away a string that was there.

    Args:
      to_text: Token ids -> text, a tokenizer's `decode`.
      strings: What to look for.

    Returns:
      The function (row, tokens) -> tokens to keep, or None.

    Raises:
      ValueError: if a string is empty.
    """
    if not all(strings):
        raise ValueError(f"sampling.stop_strings: 'strings' is {list(strings)!r}, expected no empty string")

    def stop(row: int, tokens: np.ndarray) -> int | None:
        del row
        ids = [int(token) for token in tokens]
        said = lambda count: any(string in text for text in (to_text(ids[:count]),) for string in strings)  # noqa: E731
        return bisect.bisect_left(range(1, len(ids)), True, key=said) + 1 if ids and said(len(ids)) else None

    return stop
