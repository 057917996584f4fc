"""The common currency of the baselines: a batch of designs, what their model thinks of them, and how many of them differ."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.algorithms.bib.baselines import _common
from janax.algorithms.bib.baselines._common import SELECTIONS, ScoreFn
from janax.jaxlib_ext import checks, dtypes

__all__ = [
    "REDUCTIONS",
    "SELECTIONS",
    "Designs",
    "ScoreFn",
    "Selection",
    "best_offline",
    "best_predicted",
    "count_distinct",
    "distinct",
    "ensemble_score",
    "random_designs",
]

REDUCTIONS = ("mean", "min", "lcb")
"""mean of the members, the most pessimistic one, or the lower confidence bound mean - num_deviations standard deviation (ddof 0)."""

_COLUMNS = 8  # letters that one pass of the sort compares


class Designs(NamedTuple):
    """What every method returns, for the oracle to score once.

    Attributes:
      tokens: [m l] int32 sequences.
      predicted: [m] the model's scores of them, float32 or wider; of `best_offline`, the measured ones.
      trajectory: [t m] the model's scores of the m designs of the time: of the start, and after each of t - 1 steps.
      num_distinct: [] int32 how many of the m differ. Report it: candidates that are optimised independently collapse.
    """

    tokens: jax.Array
    predicted: jax.Array
    trajectory: jax.Array
    num_distinct: jax.Array


class Selection(NamedTuple):
    """Which of n candidates were chosen.

    Attributes:
      tokens: [m l].
      predicted: [m].
      index: [m] int32 rows of the candidates.
      num_distinct: [] int32, below m only if the candidates have no more; the rest are repeats of the best.
    """

    tokens: jax.Array
    predicted: jax.Array
    index: jax.Array
    num_distinct: jax.Array


# --- which ones differ


def _classes(tokens: jax.Array) -> jax.Array:
    """[n] numbers, equal exactly where the rows of [n l] are: rows sorted by a few columns after the other, each pass refining the last one."""
    n, l = tokens.shape
    width = min(l, _COLUMNS)
    passes = math.ceil(l / width)
    columns = jnp.pad(tokens, ((0, 0), (0, passes * width - l))).T.reshape(passes, width, n)

    def refine(ids: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
        keys = jax.lax.sort((ids, *block, jnp.arange(n, dtype=jnp.int32)), num_keys=width + 1)
        differs = functools.reduce(jnp.logical_or, [key[1:] != key[:-1] for key in keys[:-1]])
        number = jnp.concatenate([jnp.zeros_like(ids[:1]), jnp.cumsum(differs, dtype=jnp.int32)])
        return jnp.zeros_like(ids).at[keys[-1]].set(number), None

    return jax.lax.scan(refine, jnp.zeros(n, jnp.int32), columns)[0]


def count_distinct(tokens: ArrayLike) -> jax.Array:
    """How many of the rows differ.

    Args:
      tokens: [n l] integers.

    Returns:
      [] int32.

    Raises:
      ValueError: unless `tokens` is a table of integers.
    """
    return jnp.max(_classes(_common.sequences("baselines.count_distinct", "tokens", tokens, 2))) + 1


def distinct(tokens: ArrayLike, predicted: ArrayLike, num_designs: int, *, preferred: ArrayLike | None = None) -> Selection:
    """The best distinct designs among the visited ones; exact, of static shape.

    In the order of their predictions, ties by row, a sequence counts where it comes first. With `preferred`, those rows come before all others, so
    that with the final designs preferred, only their repeats are replaced, by the next-best designs elsewhere.

    Args:
      tokens: [n l] integers, the visited sequences.
      predicted: [n] their scores; nan counts as -inf.
      num_designs: m <= n. Static.
      preferred: [n] booleans, or None.

    Returns:
      `Selection` of m rows: first the distinct ones in order, then, if there are too few, repeats.

    Raises:
      ValueError: on shapes that do not agree or m > n.
    """
    name = "baselines.distinct"
    tokens = _common.sequences(name, "tokens", tokens, 2)
    checks.check_shapes(name, tokens=(tokens, "n l"), predicted=(predicted, "n"), preferred=(preferred, "n"))
    n = tokens.shape[0]
    _common.at_least(name, 1, num_designs=num_designs)
    _common.at_most(name, "num_designs", num_designs, "tokens", n)
    predicted = dtypes.at_least_float32(predicted)
    rank = jnp.arange(n, dtype=jnp.int32)
    late = jnp.zeros_like(rank) if preferred is None else (jnp.asarray(preferred) == 0).astype(jnp.int32)
    falling = -jnp.where(jnp.isnan(predicted), -jnp.inf, predicted)
    order = jax.lax.sort((late, falling, rank), num_keys=3)[-1]
    ids = _classes(tokens)[order]
    first = jax.ops.segment_min(rank, ids, num_segments=n)[ids]
    repeated = (first != rank).astype(jnp.int32)
    index = order[jax.lax.sort((repeated, rank), num_keys=2)[-1][:num_designs]]
    count = jnp.minimum(jnp.sum(1 - repeated, dtype=jnp.int32), num_designs)
    return Selection(tokens=tokens[index], predicted=predicted[index], index=index, num_distinct=count)


class Archive(NamedTuple):
    """The best distinct designs so far, [m l] and [m]."""

    tokens: jax.Array
    predicted: jax.Array


def archive(tokens: jax.Array, predicted: jax.Array, num_designs: int, former: Archive | None = None) -> Archive:
    """The best distinct ones of what came, and of the former archive; the same as one choice among all that ever came."""
    if former is not None:
        tokens, predicted = jnp.concatenate([former.tokens, tokens]), jnp.concatenate([former.predicted, predicted])
    chosen = distinct(tokens, predicted, num_designs)
    return Archive(chosen.tokens, chosen.predicted)


def hand_out(select: str, tokens: jax.Array, predicted: jax.Array, visited: Archive | None, trajectory: jax.Array) -> Designs:
    """The final m designs and the archive, which holds m, as `select` says."""
    m = tokens.shape[0]
    if select == "best" and visited is not None:
        tokens, predicted = visited
    elif visited is not None:
        chosen = distinct(
            jnp.concatenate([tokens, visited.tokens]),
            jnp.concatenate([predicted, visited.predicted]),
            m,
            preferred=jnp.arange(2 * m) < m,
        )
        tokens, predicted = chosen.tokens, chosen.predicted
    return Designs(tokens=tokens, predicted=predicted, trajectory=trajectory, num_distinct=count_distinct(tokens))


# --- ensembles


def ensemble_score(
    score_fn: ScoreFn | tuple[ScoreFn, ...], params: Any, x: jax.Array, *, reduce: str = "mean", num_deviations: ArrayLike = 1.0
) -> jax.Array:
    """One score of several members: mean, min, or mean - num_deviations std.

    A `score_fn` for every method here is `functools.partial(ensemble_score, member_fn, reduce="min")`, with the stacked parameters as params.

    Args:
      score_fn: (params, x) -> [] of one member; or a tuple of them, of different kinds. Static.
      params: Parameters stacked along a leading axis of members; or, for a tuple, as many trees.
      x: [l v] rows of one design.
      reduce: One of `REDUCTIONS`. Static.
      num_deviations: [] for "lcb". Traced.

    Returns:
      [] float32 or wider.

    Raises:
      ValueError: for an unknown reduction, or tuples of different lengths.
    """
    name = "baselines.ensemble_score"
    checks.one_of(name, "reduce", reduce, REDUCTIONS)
    if isinstance(score_fn, tuple):
        if not isinstance(params, tuple | list) or len(params) != len(score_fn):
            raise ValueError(f"{name}: 'params' must be as many trees as 'score_fn' has members, {len(score_fn)}")
        scores = jnp.stack([_common.scalar(fn, tree, x) for fn, tree in zip(score_fn, params)])
    else:
        scores = jax.vmap(lambda tree: _common.scalar(score_fn, tree, x))(params)
    if reduce == "min":
        return jnp.min(scores)
    mean = jnp.mean(scores)
    if reduce == "mean":
        return mean
    variance = jnp.mean(jnp.square(scores - mean))
    deviation = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)  # no infinite slope where members agree
    return mean - jnp.asarray(num_deviations).astype(mean.dtype) * deviation.astype(mean.dtype)


# --- designs without optimisation


def random_designs(score_fn: ScoreFn, params: Any, key: jax.Array, *, num_letters: int, length: int, num_designs: int = 128) -> Designs:
    """Uniformly random sequences.

    Args:
      score_fn: (params, x [l v]) -> [], for `predicted` only.
      params: Its parameters.
      key: Typed key.
      num_letters: v. Static.
      length: l. Static.
      num_designs: m. Static.

    Returns:
      `Designs`, with a trajectory [1 m].

    Raises:
      ValueError: on sizes below one (two letters).
    """
    _common.at_least("baselines.random_designs", 1, length=length, num_designs=num_designs)
    _common.at_least("baselines.random_designs", 2, num_letters=num_letters)
    tokens = jax.random.randint(key, (num_designs, length), 0, num_letters, dtype=jnp.int32)
    predicted = _common.predict(score_fn, params, tokens, num_letters)
    return hand_out("last", tokens, predicted, None, predicted[None])


def best_offline(tokens: ArrayLike, scores: ArrayLike, *, num_designs: int = 128) -> Designs:
    """The designs with the highest measured scores, where every optimisation starts; ties by row, repeats (palindromes) and all.

    Args:
      tokens: [n l] integers, the offline sequences.
      scores: [n] measured.
      num_designs: m <= n. Static.

    Returns:
      `Designs` with the measured scores in place of predictions, the best first, and a trajectory [1 m].

    Raises:
      ValueError: on shapes that do not agree or m > n.
    """
    name = "baselines.best_offline"
    tokens = _common.sequences(name, "tokens", tokens, 2)
    checks.check_shapes(name, tokens=(tokens, "n l"), scores=(scores, "n"))
    _common.at_least(name, 1, num_designs=num_designs)
    _common.at_most(name, "num_designs", num_designs, "tokens", tokens.shape[0])
    best, index = jax.lax.top_k(dtypes.at_least_float32(scores), num_designs)
    return hand_out("last", tokens[index], best, None, best[None])


def best_predicted(
    score_fn: ScoreFn, params: Any, tokens: ArrayLike, *, num_letters: int, num_designs: int = 128, batch_size: int | None = 4096
) -> Designs:
    """The best distinct ones of given candidates by their predictions: of an enumerable space, what the model would have at best.

    Args:
      score_fn: (params, x [l v]) -> [].
      params: Its parameters.
      tokens: [n l] integers, the candidates.
      num_letters: v. Static.
      num_designs: m <= n. Static.
      batch_size: Candidates scored at a time; None is all. Static.

    Returns:
      `Designs`, the best first, with a trajectory [1 m].

    Raises:
      ValueError: on shapes that do not agree or m > n.
    """
    name = "baselines.best_predicted"
    tokens = _common.sequences(name, "tokens", tokens, num_letters)
    size = None if batch_size is None else min(batch_size, tokens.shape[0])
    predicted = _common.predict(score_fn, params, tokens, num_letters, size)
    chosen = distinct(tokens, predicted, num_designs)
    return hand_out("last", chosen.tokens, chosen.predicted, None, chosen.predicted[None])
