"""The posterior's preference form: r(x) = beta log(p*(x) / pi0(x)) + beta log Z, and log Z cancels in a comparison of two answers.

Reference: Rafailov et al., arXiv:2305.18290 (DPO); Azar et al., arXiv:2310.12036 (IPO).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import sharding
from janax.jaxlib_ext.checks import check_shapes
from janax.jaxlib_ext.divergence.numerics import widest

__all__ = ["PreferenceInfo", "dpo_loss", "implied_reward", "ipo_loss", "population_preferences"]


class PreferenceInfo(NamedTuple):
    """No gradients, each [].

    Attributes:
      margin: Mean implied reward of the preferred answer less that of the other, beta (d0(x_w) - d0(x_l)).
      accuracy: Share of pairs with a positive margin, ties half.
      kept: Number of pairs that count; a pair with an impossible answer does not.
    """

    margin: jax.Array
    accuracy: jax.Array
    kept: jax.Array


def implied_reward(log_pi: ArrayLike, log_prior: ArrayLike, *, beta: ArrayLike) -> jax.Array:
    """beta (log pi - log pi0) [...]: the reward, up to beta log Z, whose posterior pi is."""
    check_shapes("rl_bayes.implied_reward", log_pi=(log_pi, "..."), log_prior=(log_prior, "..."))
    log_pi, log_prior = widest(log_pi, log_prior)
    return jnp.asarray(beta).astype(log_pi.dtype) * (log_pi - jax.lax.stop_gradient(log_prior))


def dpo_loss(
    log_pi_w: ArrayLike,
    log_pi_l: ArrayLike,
    log_prior_w: ArrayLike,
    log_prior_l: ArrayLike,
    *,
    beta: ArrayLike,
    label: ArrayLike = 1.0,
    weights: ArrayLike | None = None,
) -> tuple[jax.Array, PreferenceInfo]:
    """-mean [label log sigmoid(margin) + (1 - label) log sigmoid(-margin)], margin = beta (d0(x_w) - d0(x_l)), d0 = log pi - log pi0.

    At pi = p*_beta the margin is r(x_w) - r(x_l) whatever beta, and with labels drawn from the Bradley-Terry law of r the gradient vanishes.

    Args:
      log_pi_w: [n] log pi of the preferred answers, differentiated; sums over tokens.
      log_pi_l: [n] of the others.
      log_prior_w: [n] log pi0 of the preferred answers.
      log_prior_l: [n] of the others.
      beta: [] the beta of p*. Traced.
      label: [] or [n] probability that x_w is preferred. Traced.
      weights: [n] summing to 1, for exact expectations.

    Returns:
      The loss [], float32 or wider, and `PreferenceInfo`.

    Raises:
      ValueError: if shapes do not agree.
    """
    margin, share, kept = _margin("rl_bayes.dpo_loss", log_pi_w, log_pi_l, log_prior_w, log_prior_l, weights)
    margin = jnp.asarray(beta).astype(margin.dtype) * margin
    target = jnp.broadcast_to(jnp.asarray(label).astype(margin.dtype), margin.shape)
    each = target * jax.nn.softplus(-margin) + (1 - target) * jax.nn.softplus(margin)
    return jnp.sum(share * each), _info(margin, share, kept)


def ipo_loss(
    log_pi_w: ArrayLike,
    log_pi_l: ArrayLike,
    log_prior_w: ArrayLike,
    log_prior_l: ArrayLike,
    *,
    beta: ArrayLike,
    weights: ArrayLike | None = None,
) -> tuple[jax.Array, PreferenceInfo]:
    """mean (d0(x_w) - d0(x_l) - 1 / (2 beta))^2; beta is IPO's tau. Arguments and results as in `dpo_loss`."""
    gap, share, kept = _margin("rl_bayes.ipo_loss", log_pi_w, log_pi_l, log_prior_w, log_prior_l, weights)
    weight = jnp.asarray(beta).astype(gap.dtype)
    return jnp.sum(share * jnp.square(gap - 0.5 / weight)), _info(weight * gap, share, kept)


def population_preferences(log_q: ArrayLike, reward: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """All pairs of an enumerable space, for losses without sampling noise: dpo_loss(log_pi[i], log_pi[j], ..., label=label, weights=weights).

    Args:
      log_q: [x] the law that draws the two answers independently.
      reward: [x] the Bradley-Terry reward: x_i beats x_j with probability sigmoid(r_i - r_j).

    Returns:
      (i, j, label, weights), each [x^2]: first and second answer, probability that the first wins, probability of the pair.
    """
    check_shapes("rl_bayes.population_preferences", log_q=(log_q, "x"), reward=(reward, "x"))
    return sharding.placed(_pairs, lambda _: jax.P(), log_q, reward)


def _pairs(log_q: ArrayLike, reward: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    log_q, reward = widest(log_q, reward)
    n = reward.shape[0]
    index = jnp.arange(n * n, dtype=jnp.int32)
    i, j = index // n, index % n
    return i, j, jax.nn.sigmoid(reward[i] - reward[j]), jnp.exp(log_q[i] + log_q[j])


def _margin(
    name: str,
    log_pi_w: ArrayLike,
    log_pi_l: ArrayLike,
    log_prior_w: ArrayLike,
    log_prior_l: ArrayLike,
    weights: ArrayLike | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    arrays = {"log_pi_w": log_pi_w, "log_pi_l": log_pi_l, "log_prior_w": log_prior_w, "log_prior_l": log_prior_l, "weights": weights}
    check_shapes(name, **{key: (value, "n") for key, value in arrays.items()})
    a, b, c, d = widest(log_pi_w, log_pi_l, log_prior_w, log_prior_l)
    c, d = jax.lax.stop_gradient((c, d))
    kept = ~(jnp.isneginf(a) | jnp.isneginf(b) | jnp.isneginf(c) | jnp.isneginf(d))
    share = jnp.full_like(c, 1 / c.shape[0]) if weights is None else jnp.asarray(weights).astype(c.dtype)
    a, b, c, d = (jnp.where(kept, x, jnp.zeros_like(x)) for x in (a, b, c, d))
    return (a - c) - (b - d), jnp.where(kept, share, jnp.zeros_like(share)), kept


def _info(margin: jax.Array, share: jax.Array, kept: jax.Array) -> PreferenceInfo:
    mass = jnp.sum(share)
    mass = jnp.where(mass > 0, mass, jnp.ones_like(mass))
    info = PreferenceInfo(
        margin=jnp.sum(share * margin) / mass,
        accuracy=jnp.sum(share * 0.5 * (1 + jnp.sign(margin))) / mass,
        kept=jnp.sum(kept, dtype=jnp.int32),
    )
    return jax.lax.stop_gradient(info)
