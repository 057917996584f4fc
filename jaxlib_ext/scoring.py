"""Scores of token sequences under a language model: log P(tokens), log P(target | context), per row or for ragged lists packed into rows.

    packed = scoring.pack(contexts, targets, row_length=1024)                                     # on the host, NumPy
    scores = scoring.score_tokens(hidden_fn, unembed, params, packed.tokens, packed.mask, segment_ids=packed.segment_ids,
                                  positions=packed.positions, num_segments=packed.num_segments)   # under jit, any model
    scores = scoring.unpack(packed, scores)                                                       # one entry per pair again

A model is a pair of callables: hidden_fn(params, tokens, segment_ids=None, positions=None) -> [b t d], causal, and the unembedding w [d v]
(or params -> w). Segment ids say which tokens of a row belong together; 0 is padding, which nothing attends to.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from janax.jaxlib_ext import checks, fused

__all__ = ["Packed", "Scores", "fit_rows", "pack", "score_tokens", "unpack"]


class Scores(NamedTuple):
    """Log-probabilities of the tokens that count.

    Attributes:
      sum: [b], or [b s] with segments: sum of the log-probabilities, in nats; float32 or wider. Segment i is column i - 1.
      mean: of the same shape: sum / count, 0 where nothing counts.
      count: of the same shape: number of tokens that count, int32.
      per_token: [b t] log P(tokens[t] given what precedes it in its segment) where it counts, else 0.
    """

    sum: jax.Array
    mean: jax.Array
    count: jax.Array
    per_token: jax.Array


def score_tokens(
    hidden_fn: Callable[..., jax.Array],
    unembed: Callable[[Any], ArrayLike] | ArrayLike,
    params: Any,
    tokens: ArrayLike,
    mask: ArrayLike,
    *,
    segment_ids: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    num_segments: int | None = None,
    max_scored: int | None = None,
    bias: ArrayLike | None = None,
    softcap: float | None = None,
    temperature: ArrayLike = 1.0,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
) -> Scores:
    """Sums, means and counts of log P(tokens[t] | tokens[<t]) over the positions where mask[t] is set.

    The shift by one is done here: the hidden state at t - 1 predicts tokens[t], and mask[t] belongs to tokens[t]. The first token of a row,
    or of a segment, has nothing before it and never counts. The logits are not held: see `fused`.

    Args:
      hidden_fn: (params, tokens, segment_ids=None, positions=None) -> [b t d], causal within segments. Static.
      unembed: w [d v], or params -> w.
      params: Parameters of `hidden_fn`; differentiable.
      tokens: [b t] integer ids.
      mask: [b t] non-zero where the token counts.
      segment_ids: [b t] 1, 2, ... for the sequences of a row, 0 for padding, which does not count; None: one sequence per row.
      positions: [b t] positions within the segments, handed to `hidden_fn`.
      num_segments: s, the largest segment id; wanted with `segment_ids`. Higher ids are left out of sum, mean and count. Static.
      max_scored: If given, only that many positions of a row are multiplied by w: with short targets after long contexts the head then costs
        little. A row in which more tokens count gets nan throughout. Static.
      bias: As in `fused.token_log_probs`.
      softcap: As in `fused.token_log_probs`. Static.
      temperature: [] > 0. Traced.
      vocab_chunk: As in `fused.token_log_probs`. Static.
      token_chunk: As in `fused.token_log_probs`. Static.

    Returns:
      The scores. A token that counts and is impossible gives -inf.

    Raises:
      ValueError: if shapes disagree, ids are not integers, or only one of `segment_ids` and `num_segments` is given.
    """
    name = "score_tokens"
    shape = checks.check_shapes(
        name, tokens=(tokens, "b t"), mask=(mask, "b t"), segment_ids=(segment_ids, "b t"), positions=(positions, "b t")
    )
    if (segment_ids is None) != (num_segments is None):
        given, wanted = ("num_segments", "segment_ids") if segment_ids is None else ("segment_ids", "num_segments")
        raise ValueError(f"{name}: {given!r} is given without {wanted!r}, expected both or neither")
    for argument, value in (("num_segments", num_segments), ("max_scored", max_scored)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: {argument!r} is {value}, expected at least 1")
    checks.require_integers(name, tokens=tokens)
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
    segments = None if segment_ids is None else jnp.asarray(segment_ids)
    h = hidden_fn(params, tokens, segment_ids=segments, positions=positions)
    checks.check_shapes(name, tokens=(tokens, "b t"), hidden_fn=(h, "b t d"))
    w = unembed(params) if callable(unembed) else unembed

    counts = (mask != 0) & (jnp.arange(shape["t"]) > 0)[None]
    if segments is not None:
        counts &= (segments != 0) & (segments == jnp.roll(segments, 1, axis=1))
    # Position t - 1 speaks about t; the last position speaks about nothing, and what it says is dropped.
    spoken, ahead = jnp.roll(tokens, -1, axis=1), jnp.roll(counts, -1, axis=1)
    options: dict[str, Any] = {"bias": bias, "softcap": softcap, "temperature": temperature}
    options |= {"vocab_chunk": vocab_chunk, "token_chunk": token_chunk}
    if max_scored is None or max_scored >= shape["t"]:
        log_probs = fused.token_log_probs(h, w, spoken, **options)
    else:
        order = jnp.argsort(~ahead, axis=1, stable=True)[:, :max_scored]
        chosen = fused.token_log_probs(
            jnp.take_along_axis(h, order[:, :, None], axis=1), w, jnp.take_along_axis(spoken, order, axis=1), **options
        )
        rank = jnp.cumsum(ahead.astype(jnp.int32), axis=1) - 1
        log_probs = jnp.take_along_axis(chosen, jnp.clip(rank, 0, max_scored - 1), axis=1)
        many = jnp.sum(ahead, axis=1, keepdims=True) > max_scored
        log_probs = jnp.where(many, jnp.full_like(log_probs, jnp.nan), log_probs)
    per_token = jnp.roll(log_probs, 1, axis=1)
    per_token = jnp.where(counts, per_token, jnp.zeros_like(per_token))
    if segments is None:
        total, count = jnp.sum(per_token, axis=1), jnp.sum(counts, axis=1, dtype=jnp.int32)
    else:
        assert num_segments is not None
        of_segment = segments[:, :, None] == jnp.arange(1, num_segments + 1, dtype=segments.dtype)[None, None]  # [b t s]
        value = per_token[:, :, None]
        total = jnp.sum(jnp.where(of_segment, value, jnp.zeros_like(value)), axis=1)
        count = jnp.sum(of_segment & counts[:, :, None], axis=1, dtype=jnp.int32)
    mean = total / jnp.maximum(count, 1).astype(total.dtype)
    return Scores(sum=total, mean=mean, count=count, per_token=per_token)


class Packed(NamedTuple):
    """Ragged (context, target) pairs as rows of equal length: host arrays, and where each pair went.

    Attributes:
      tokens: [r t] ids; 0 in padding.
      segment_ids: [r t] 1, 2, ... within a row; 0 in padding.
      positions: [r t] positions that start again at 0 in each segment.
      mask: [r t] 1 on the tokens of targets.
      row: [p] row of each pair, in the order given.
      segment: [p] its segment id there.
      start: [p] its first column there.
      context_length: [p] tokens of its context.
      length: [p] tokens of context and target.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    row: np.ndarray
    segment: np.ndarray
    start: np.ndarray
    context_length: np.ndarray
    length: np.ndarray

    @property
    def num_segments(self) -> int:
        """Segments to be told apart in a row: a power of two, so that few shapes occur."""
        return 1 << (max(int(self.segment.max(initial=1)), 1) - 1).bit_length()

    @property
    def max_scored(self) -> int:
        """Target tokens in the row that has most, rounded up to a multiple of 64: `max_scored` of `score_tokens`."""
        return _round_up(max(int(self.mask.sum(axis=1).max(initial=1)), 1), 64)


def pack(
    contexts: Sequence[Sequence[int] | np.ndarray],
    targets: Sequence[Sequence[int] | np.ndarray],
    row_length: int,
    *,
    multiple: int = 64,
    row_multiple: int = 1,
) -> Packed:
    """Packs pairs into rows, see `fit_rows`. Host only.

    Few shapes come out, so little is compiled: rows are as long as the fullest of them needs, at most `row_length`, and always a multiple of
    `multiple`.

    Args:
      contexts: Ids of each context; never empty, as the first token of a target must have something before it.
      targets: Ids of each target, as many lists; may be empty (score 0, count 0).
      row_length: Tokens per row, at least the longest pair; rounded up to `multiple`.
      multiple: What row lengths are multiples of.
      row_multiple: What the number of rows is a multiple of, e.g. the length of the mesh axis of the batch; filled up with padding.

    Returns:
      The rows, and the place of each pair.

    Raises:
      ValueError: if the lists differ in length, are empty, a context is empty, or a pair is longer than a row.
    """
    if len(contexts) != len(targets) or not contexts:
        raise ValueError(f"pack: 'contexts' has {len(contexts)} entries and 'targets' {len(targets)}, expected the same number, at least 1")
    for argument, value in (("row_length", row_length), ("multiple", multiple), ("row_multiple", row_multiple)):
        if value < 1:
            raise ValueError(f"pack: {argument!r} is {value}, expected at least 1")
    pairs = [(_ids("contexts", i, a), _ids("targets", i, b)) for i, (a, b) in enumerate(zip(contexts, targets))]
    context_length, length = np.array([len(a) for a, _ in pairs]), np.array([len(a) + len(b) for a, b in pairs])
    if context_length.min() == 0:
        first = int(np.argmin(context_length))
        raise ValueError(f"pack: 'contexts'[{first}] is empty, expected at least one token (a beginning-of-text token will do)")
    limit = _round_up(row_length, multiple)
    if length.max() > limit:
        longest = int(np.argmax(length))
        raise ValueError(f"pack: pair {longest} has {length[longest]} tokens, expected at most {limit}, from 'row_length' = {row_length}")

    row, segment, start = fit_rows(length, limit)
    used = np.zeros(row.max() + 1, np.int32)
    np.maximum.at(used, row, start + length)

    shape = (_round_up(len(used), row_multiple), _round_up(int(used.max()), multiple))
    tokens, segment_ids, positions, mask = (np.zeros(shape, np.int32) for _ in range(4))
    for i, pair in enumerate(pairs):
        here = (row[i], slice(start[i], start[i] + length[i]))
        tokens[here] = np.concatenate(pair)
        segment_ids[here] = segment[i]
        positions[here] = np.arange(length[i])
        mask[row[i], start[i] + context_length[i] : start[i] + length[i]] = 1
    return Packed(tokens, segment_ids, positions, mask, row, segment, start, context_length, length)


def fit_rows(lengths: ArrayLike, row_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places pieces in rows, longest first, each in the fullest row that has room for it (best-fit decreasing). Host only.

    Args:
      lengths: [p] tokens of each piece, none longer than a row.
      row_length: Tokens of a row.

    Returns:
      (row, segment, start), each [p] int32: the row of each piece, its number there counted from 1, and its first column.

    Raises:
      ValueError: if a piece is longer than a row.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.size and lengths.max() > row_length:
        raise ValueError(f"fit_rows: 'lengths' has {lengths.max()}, expected at most 'row_length' = {row_length}")
    row, segment, start = (np.zeros(len(lengths), np.int32) for _ in range(3))
    members: list[int] = []
    with_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # the rows that have so many tokens of room left
    for i in np.argsort(-lengths, kind="stable"):
        length = int(lengths[i])
        room = next((room for room in range(length, row_length + 1) if with_room[room]), None)
        if room is None:
            members.append(0)
            row[i], room = len(members) - 1, row_length
        else:
            row[i] = with_room[room].pop()
        members[row[i]] += 1
        segment[i], start[i] = members[row[i]], row_length - room
        with_room[room - length].append(int(row[i]))
    return row, segment, start


def unpack(packed: Packed, scores: Scores) -> Scores:
    """The scores of packed rows, one entry per pair in the order given to `pack`. Host only.

    Returns:
      sum, mean and count [p]; per_token [p u], u the longest target, the first entries of each row being the target's and the rest 0.
    """
    pick = lambda x: np.asarray(x)[packed.row, packed.segment - 1]  # noqa: E731
    values, lengths = np.asarray(scores.per_token), packed.length - packed.context_length
    per_token = np.zeros((len(lengths), int(lengths.max(initial=0))), values.dtype)
    for i, n in enumerate(lengths):
        first = packed.start[i] + packed.context_length[i]
        per_token[i, :n] = values[packed.row[i], first : first + n]
    return Scores(sum=pick(scores.sum), mean=pick(scores.mean), count=pick(scores.count), per_token=per_token)  # type: ignore[arg-type]


def _ids(argument: str, index: int, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"pack: {argument!r}[{index}] has shape {array.shape} and dtype {array.dtype}, expected a list of integer ids")
    return array.astype(np.int32)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
