"""After the gradients: exact search among neighbours, and a batch without copies."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.algorithms.bib import baselines
from janax.jaxlib_ext.checks import check_shapes, require_integers

__all__ = ["Refined", "Selected", "hamming", "neighbourhood_search", "refine", "select_diverse", "substitutions"]


class Refined(NamedTuple):
    """A sequence after local search.

    Attributes:
      tokens: [l] int32.
      score: [] its score.
      accepted: [rounds] whether the round changed it.
      path: [rounds l] int32 after each round.
    """

    tokens: jax.Array
    score: jax.Array
    accepted: jax.Array
    path: jax.Array


class Selected(NamedTuple):
    """A batch chosen from candidates.

    Attributes:
      index: [m] int32 into the candidates, in order of choice.
      valid: [m] whether a candidate was left that keeps the distance; the rest repeats the best.
    """

    index: jax.Array
    valid: jax.Array


def substitutions(tokens: ArrayLike, *, num_letters: int) -> jax.Array:
    """[l (v-1), l] int32: every sequence that differs from tokens [l] in one letter."""
    require_integers("bib.substitutions", tokens=tokens)
    l = check_shapes("bib.substitutions", tokens=(tokens, "l"))["l"]
    tokens = jnp.asarray(tokens, jnp.int32)
    place = jnp.repeat(jnp.arange(l), num_letters - 1)
    letter = (tokens[place] + 1 + jnp.tile(jnp.arange(num_letters - 1, dtype=jnp.int32), l)) % num_letters
    return jnp.where(jnp.arange(l)[None] == place[:, None], letter[:, None], tokens[None])


def hamming(a: ArrayLike, b: ArrayLike) -> jax.Array:
    """[n m] int32 numbers of places in which sequences a [n l] and b [m l] differ."""
    check_shapes("bib.hamming", a=(a, "n l"), b=(b, "m l"))
    return jnp.sum(jnp.asarray(a)[:, None, :] != jnp.asarray(b)[None, :, :], axis=-1, dtype=jnp.int32)


def refine(
    key: jax.Array,
    score_fn: Callable[[jax.Array], jax.Array],
    tokens: ArrayLike,
    *,
    num_letters: int,
    num_rounds: int = 8,
    num_candidates: int | None = None,
    temperature: ArrayLike = 0.0,
) -> Refined:
    """Local search by single substitutions: the most promising by the gradient are scored exactly, and the best is taken if it is better.

    The promise of writing letter a over letter o at place l is (d score / d x)[l, a] - (d score / d x)[l, o].

    Args:
      key: PRNG key, used where the temperature is above 0.
      score_fn: ([l v] one-hot rows) -> [], to be raised. Static.
      tokens: [l] where to start. One sequence: `jax.vmap` for more.
      num_letters: v. Static.
      num_rounds: Static.
      num_candidates: Substitutions scored exactly per round; None is all of them, which short sequences can afford. Static.
      temperature: [] in the score's unit: above 0, a candidate is drawn by softmax(promise / (2 temperature)) and accepted by Metropolis (with
        the candidates' own law both ways when all are scored). 0 is greedy. Traced.

    Returns:
      The best sequence met, with the way.

    Raises:
      ValueError: on wrong shapes, or numbers below one.

    Reference: Grathwohl et al., arXiv:2102.04509 (Gibbs with gradients).
    """
    require_integers("bib.refine", tokens=tokens)
    l = check_shapes("bib.refine", tokens=(tokens, "l"))["l"]
    total = l * (num_letters - 1)
    count = total if num_candidates is None else min(num_candidates, total)
    if count < 1 or num_rounds < 1:
        raise ValueError(f"bib.refine: 'num_candidates' and 'num_rounds' must be at least 1, got {num_candidates} and {num_rounds}")

    def one_hot(tokens: jax.Array) -> jax.Array:
        return jax.nn.one_hot(tokens, num_letters)

    def promises(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Neighbours [total l] and what the gradient expects of each [total]."""
        slope = jax.grad(lambda x: score_fn(x))(one_hot(tokens))
        gain = slope - jnp.sum(slope * one_hot(tokens), axis=-1, keepdims=True)
        place = jnp.repeat(jnp.arange(l), num_letters - 1)
        near = substitutions(tokens, num_letters=num_letters)
        return near, gain[place, near[jnp.arange(total), place]]

    def round_(carry: tuple, key: jax.Array) -> tuple[tuple, tuple]:
        now, score, best, best_score = carry
        near, promise = promises(now)
        _, chosen = jax.lax.top_k(promise, count)
        candidates = near[chosen]
        scores = jax.vmap(lambda t: score_fn(one_hot(t)))(candidates).astype(score.dtype)
        key_draw, key_accept = jax.random.split(key)
        heat = jnp.maximum(jnp.asarray(temperature, score.dtype), 1e-30)
        law = jax.nn.log_softmax(promise[chosen].astype(score.dtype) / (2 * heat))
        drawn = jax.random.categorical(key_draw, law)
        back_near, back = promises(candidates[drawn])
        returning = jnp.argmax(jnp.all(back_near == now[None], axis=1))
        back_law = jax.nn.log_softmax(back.astype(score.dtype) / (2 * heat))[returning]
        ratio = (scores[drawn] - score) / heat + back_law - law[drawn]
        greedy = jnp.argmax(scores)
        cold = jnp.asarray(temperature) <= 0
        pick = jnp.where(cold, greedy, drawn)
        take = jnp.where(cold, scores[greedy] > score, jnp.log(jax.random.uniform(key_accept)) < ratio)
        now, score = jnp.where(take, candidates[pick], now), jnp.where(take, scores[pick], score)
        better = score > best_score
        best, best_score = jnp.where(better, now, best), jnp.where(better, score, best_score)
        return (now, score, best, best_score), (take, now)

    start = jnp.asarray(tokens, jnp.int32)
    score = jnp.asarray(score_fn(one_hot(start)))
    (_, _, best, best_score), (accepted, path) = jax.lax.scan(round_, (start, score, start, score), jax.random.split(key, num_rounds))
    return Refined(best, best_score, accepted, path)


def neighbourhood_search(
    score_fn: Callable[[jax.Array], jax.Array], tokens: ArrayLike, *, num_letters: int, num_kept: int = 512, num_rounds: int = 4
) -> baselines.Selection:
    """The best distinct sequences among those given and, round by round, all single substitutions of the best so far.

    Args:
      score_fn: ([n l] int32 sequences) -> [n], to be raised. Static.
      tokens: [n l] where to start, copies allowed, e.g. all that a design visited.
      num_letters: v. Static.
      num_kept: Sequences whose neighbours are scored, and that are returned; at most n. Static.
      num_rounds: Static.

    Returns:
      The selection, best first; copies only if there are not so many distinct ones. `index` is of the last round's candidates.

    Raises:
      ValueError: on wrong shapes, or numbers below one.
    """
    require_integers("bib.neighbourhood_search", tokens=tokens)
    n, l = check_shapes("bib.neighbourhood_search", tokens=(tokens, "n l")).values()
    if not 1 <= num_kept <= n or num_rounds < 1:
        raise ValueError(
            f"bib.neighbourhood_search: 'num_kept' is {num_kept} and 'num_rounds' {num_rounds}, expected 1 to {n} and at least 1"
        )
    tokens = jnp.asarray(tokens, jnp.int32)
    # Scored once each: what was visited is mostly copies.
    unique = baselines.distinct(tokens, jnp.zeros_like(tokens[:, 0], dtype=jnp.float32), n).tokens
    kept = baselines.distinct(unique, score_fn(unique), num_kept)

    def round_(kept: baselines.Selection, _: None) -> tuple[baselines.Selection, None]:
        near = jax.vmap(lambda t: substitutions(t, num_letters=num_letters))(kept.tokens).reshape(-1, l)
        every = jnp.concatenate([kept.tokens, near])
        return baselines.distinct(every, jnp.concatenate([kept.predicted, score_fn(near)]), num_kept), None

    return jax.lax.scan(round_, kept, length=num_rounds)[0]


def select_diverse(
    quality: ArrayLike,
    tokens: ArrayLike,
    *,
    num_designs: int = 128,
    min_distance: int = 1,
    features: ArrayLike | None = None,
    diversity: ArrayLike = 0.0,
) -> Selected:
    """Greedy choice of a batch by quality + diversity x log-determinant, no two closer than a number of letters.

    With features each step takes the candidate with the largest quality_i + diversity log d_i^2, d_i its distance from the span of those already
    chosen (the greedy maximum of quality plus the log-determinant of a DPP's kernel phi phi^T + I).

    Args:
      quality: [n] larger is better.
      tokens: [n l] candidates, copies allowed.
      num_designs: m. Static.
      min_distance: Least Hamming distance between two designs; 1 forbids copies. Static.
      features: [n d] for the determinant; None where `diversity` is 0.
      diversity: [] weight, in the unit of quality. Traced.

    Returns:
      The choice.

    Raises:
      ValueError: on wrong shapes, or m above n.
    """
    lengths = check_shapes("bib.select_diverse", quality=(quality, "n"), tokens=(tokens, "n l"), features=(features, "n d"))
    n = lengths["n"]
    if not 1 <= num_designs <= n:
        raise ValueError(f"bib.select_diverse: 'num_designs' is {num_designs}, expected between 1 and the {n} candidates")
    if min_distance < 0:
        raise ValueError(f"bib.select_diverse: 'min_distance' must be at least 0, got {min_distance}")
    quality, tokens = jnp.asarray(quality), jnp.asarray(tokens)
    phi = jnp.zeros((n, 1), quality.dtype) if features is None else jnp.asarray(features, quality.dtype)
    kernel_own = jnp.sum(phi * phi, axis=1) + 1

    def body(carry: tuple, i: jax.Array) -> tuple[tuple, tuple]:
        free, left, rows = carry
        value = jnp.where(free, quality + diversity * jnp.log(jnp.maximum(left, 1e-30)), -jnp.inf)
        best = jnp.argmax(value)
        valid = free[best]
        best = jnp.where(valid, best, jnp.argmax(quality))
        free = free & (jnp.sum(tokens != tokens[best][None], axis=1) >= min_distance) & (jnp.arange(n) != best)
        # One more row of the Cholesky factor of the chosen kernel, for all candidates at once.
        across = phi @ phi[best] + (jnp.arange(n) == best)
        row = (across - rows.T @ rows[:, best]) / jnp.sqrt(jnp.maximum(left[best], 1e-30))
        row = jnp.where(valid, row, 0)
        return (free, left - row * row, rows.at[i].set(row)), (best.astype(jnp.int32), valid)

    start = (jnp.ones(n, bool), kernel_own, jnp.zeros((num_designs, n), quality.dtype))
    _, (index, valid) = jax.lax.scan(body, start, jnp.arange(num_designs))
    return Selected(index, valid)
