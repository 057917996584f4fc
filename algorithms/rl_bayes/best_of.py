"""Best-of-N: draw N from the prior, keep the largest reward, ties uniformly. Its exact law and divergence, the usual bound, and its target.

With level masses m(v) = pi0{r = v}, F(v) = pi0{r <= v} and F-(v) = pi0{r < v}:
    pi_N(x) = pi0(x) (F^N - F-^N) / m at v = r(x)                  KL(pi_N || pi0) = sum_v (F^N - F-^N) log[(F^N - F-^N) / m]
    KL <= log N - (N-1)/N, tight only where every level has little mass: far too large for binary rewards, where KL <= -log Z
For continuous rewards pi_N ~ pi0 exp((N-1) log F(r)): the posterior for the reward log F(r) with beta = 1 / (N-1). Reference: Beirami et al.,
arXiv:2401.01879; the law and the divergence with ties are elementary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import dtypes, logprobs, sharding
from janax.jaxlib_ext.checks import check_shapes
from janax.jaxlib_ext.divergence.numerics import widest

__all__ = [
    "BestOfN",
    "best_of_n",
    "best_of_n_bound",
    "best_of_n_kl_estimate",
    "best_of_n_potential",
    "binary_best_of_n_kl",
    "select_best",
]


class BestOfN(NamedTuple):
    """The exact law.

    Attributes:
      log_probs: [x] log pi_N.
      kl: [] KL(pi_N || pi0), nats.
      bound: [] log N - (N-1)/N, an upper bound of it; not its value.
      gap_bound: [] 2 N (N-1) exp(-H_2), at most which the bound is off if all rewards differ, H_2 = -log sum pi0^2.
      reward: [] E_pi_N[r].
      win_rate: [] probability that it beats one draw from the prior, ties counted half; at most N / (N+1).
    """

    log_probs: jax.Array
    kl: jax.Array
    bound: jax.Array
    gap_bound: jax.Array
    reward: jax.Array
    win_rate: jax.Array


def best_of_n(log_prior: ArrayLike, reward: ArrayLike, *, num_samples: ArrayLike) -> BestOfN:
    """The law of best-of-N over an enumerable space, its divergence from the prior, and what it earns.

    Args:
      log_prior: [x] log pi0, summing to one.
      reward: [x] rewards; equal ones are ties, -inf is allowed for what is worst.
      num_samples: [] N >= 1, any number. Traced.

    Returns:
      The law; exact for any ties. 1 - F is summed from the top, so N may be large.

    Raises:
      ValueError: if shapes do not agree.
    """
    check_shapes("rl_bayes.best_of_n", log_prior=(log_prior, "x"), reward=(reward, "x"), num_samples=(num_samples, ""))
    return sharding.placed(_best_of_n, lambda _: jax.P(), log_prior, reward, num_samples)


def _best_of_n(log_prior: ArrayLike, reward: ArrayLike, num_samples: ArrayLike) -> BestOfN:
    log_prior, reward = widest(log_prior, reward)
    n = reward.shape[0]
    count = jnp.asarray(num_samples).astype(log_prior.dtype)
    there = ~jnp.isneginf(log_prior)
    prior = jnp.where(there, jnp.exp(jnp.where(there, log_prior, jnp.zeros_like(log_prior))), jnp.zeros_like(log_prior))

    order = jnp.argsort(reward)
    ordered, mass = reward[order], prior[order]
    level = jnp.cumsum(jnp.concatenate([jnp.zeros(1, jnp.int32), (ordered[1:] != ordered[:-1]).astype(jnp.int32)]))
    level_mass = jax.ops.segment_sum(mass, level, num_segments=n)  # m; 0 where there are fewer levels
    at_most = jnp.cumsum(level_mass)
    above = jnp.concatenate([jnp.cumsum(level_mass[::-1])[::-1][1:], jnp.zeros_like(level_mass[:1])])  # 1 - F
    real = level_mass > 0
    below = at_most - level_mass
    high = above < 0.5
    log_f = jnp.where(high, jnp.log1p(-jnp.where(high, above, 0.0)), jnp.log(jnp.where(high | ~real, jnp.ones_like(at_most), at_most)))
    share = jnp.where(real, level_mass / jnp.where(real, at_most, jnp.ones_like(at_most)), 0.5)
    lowest = share >= 1
    log_rest = jnp.log1p(-jnp.where(lowest, 0.5, share))  # log(F- / F)
    log_grown = count * log_f + jnp.where(lowest, 0.0, jnp.log(-jnp.expm1(count * jnp.where(lowest, -1.0, log_rest))))  # log(F^N - F-^N)
    log_gain = jnp.where(real, log_grown - jnp.log(jnp.where(real, level_mass, jnp.ones_like(level_mass))), 0.0)
    grown = jnp.where(real, jnp.exp(log_grown), jnp.zeros_like(log_grown))

    of_x = jnp.zeros(n, jnp.int32).at[order].set(level)
    log_probs = jnp.where(there, log_prior + log_gain[of_x], -jnp.inf)
    chosen = jnp.where(there, jnp.exp(jnp.where(there, log_probs, jnp.zeros_like(log_probs))), jnp.zeros_like(log_probs))
    paid = chosen > 0
    collision = jnp.sum(jnp.square(prior))
    return BestOfN(
        log_probs=log_probs,
        kl=jnp.sum(grown * log_gain),
        bound=best_of_n_bound(count),
        gap_bound=2 * count * (count - 1) * collision,
        reward=jnp.sum(jnp.where(paid, chosen * jnp.where(paid, reward, jnp.zeros_like(reward)), jnp.zeros_like(reward))),
        win_rate=jnp.sum(grown * (below + 0.5 * level_mass)),
    )


def best_of_n_bound(num_samples: ArrayLike) -> jax.Array:
    """log N - (N-1)/N [...], which KL(pi_N || pi0) does not exceed. Reference: Beirami et al., arXiv:2401.01879, Theorem 3.1."""
    count = jnp.asarray(num_samples)
    count = count.astype(dtypes.floor_dtype(jnp.promote_types(count.dtype, jnp.result_type(float))))
    return jnp.log(count) - (count - 1) / count


def best_of_n_kl_estimate(log_prior_chosen: ArrayLike, *, num_samples: ArrayLike) -> jax.Array:
    """KL(pi_N || pi0) estimated from the sample that was kept, with e = pi0(y); its mean over samples is the estimate.

    (1-e)^N (log N + (N-1) log(1-e) - (N-1)/N) + (1 - (1-e)^N) log((1 - (1-e)^N) / e). For rewards without ties.

    Args:
      log_prior_chosen: [...] log pi0(y) of the sequences that won.
      num_samples: [] N >= 1. Traced.

    Returns:
      [...] nats.

    Reference: Beirami et al., arXiv:2401.01879.
    """
    log_e, count = widest(log_prior_chosen, num_samples)
    certain = log_e >= 0
    log_e = jnp.where(certain, -1.0, log_e)
    log_rest = jnp.log1p(-jnp.exp(log_e))
    stays = jnp.exp(count * log_rest)
    grown = -jnp.expm1(count * log_rest)
    positive = grown > 0
    log_gain = jnp.where(positive, jnp.log(jnp.where(positive, grown, jnp.ones_like(grown))) - log_e, 0.0)
    value = stays * (jnp.log(count) + (count - 1) * log_rest - (count - 1) / count) + grown * log_gain
    small = log_e < jnp.log(float(jnp.finfo(log_e.dtype).tiny)) + 8  # e has no digits left: the bound is the value
    return jnp.where(certain, 0.0, jnp.where(small, best_of_n_bound(count), value))


def binary_best_of_n_kl(log_z: ArrayLike, *, num_samples: ArrayLike) -> jax.Array:
    """KL(pi_N || pi0) [...] for a reward in {0, 1} with success rate Z [...]: that of Bernoulli(1 - (1-Z)^N) from Bernoulli(Z), at most -log Z."""
    log_z, count = widest(log_z, num_samples)
    sure = log_z >= 0
    log_z = jnp.where(sure, -1.0, log_z)
    log_rest = jnp.log1p(-jnp.exp(log_z))
    log_fail = count * log_rest
    log_grown = jnp.log(-jnp.expm1(log_fail))
    return jnp.where(sure, 0.0, jnp.exp(log_grown) * (log_grown - log_z) + jnp.exp(log_fail) * (log_fail - log_rest))


def best_of_n_potential(reward: ArrayLike, prior_rewards: ArrayLike, *, num_samples: ArrayLike) -> jax.Array:
    """phi = (N-1) log F(r), the target that best-of-N distillation (BOND, variational best-of-N) aims at; F from samples of the prior.

    Args:
      reward: [...] rewards of the x in question.
      prior_rewards: [k] rewards of samples of pi0.
      num_samples: [] N. Traced.

    Returns:
      [...] log-potential; -inf below all prior samples (for N > 1).
    """
    check_shapes("rl_bayes.best_of_n_potential", prior_rewards=(prior_rewards, "k"))
    return sharding.placed(_potential, lambda _: jax.P(), reward, prior_rewards, num_samples)


def _potential(reward: ArrayLike, prior_rewards: ArrayLike, num_samples: ArrayLike) -> jax.Array:
    reward, prior_rewards, count = widest(reward, prior_rewards, num_samples)
    below = jnp.searchsorted(jnp.sort(prior_rewards), reward, side="right").astype(reward.dtype)
    some = below > 0
    log_f = jnp.log(jnp.where(some, below, jnp.ones_like(below)) / prior_rewards.shape[0])
    return jnp.where(some | (count <= 1), (count - 1) * log_f, -jnp.inf)


def select_best(key: jax.Array, rewards: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Which of N samples is kept: a largest reward, ties uniformly.

    Args:
      key: [] typed key.
      rewards: [n] rewards.

    Returns:
      Its index [] int32, and whether there was a choice at all [] (False if all rewards are -inf).
    """
    check_shapes("rl_bayes.select_best", rewards=(rewards, "n"))
    (rewards,) = widest(rewards)
    best = jnp.max(rewards)
    noise = jax.random.uniform(key, rewards.shape, rewards.dtype)
    return jnp.argmax(jnp.where(rewards == best, noise, -1.0)).astype(jnp.int32), ~jnp.isneginf(logprobs.log_normalizer(rewards))
