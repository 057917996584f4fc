"""Token-level forms of KL-regularised RL: reward-to-go, KL penalties and what their gradients are, PPO with a penalty, adaptive beta.

Losses here take [n t] per-token arrays of n sequences with a mask over their tokens, and divide sums over tokens by n (or n t), never by the
number of tokens of a sequence: a length-normalised objective has another optimum.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import divergence, masking
from janax.jaxlib_ext.checks import check_shapes, one_of
from janax.jaxlib_ext.divergence.numerics import widest

__all__ = [
    "PpoInfo",
    "adaptive_beta",
    "gae",
    "penalised_rewards",
    "ppo_penalty_loss",
    "reward_to_go",
    "token_kl",
    "token_kl_rl_loss",
]


class PpoInfo(NamedTuple):
    """What a PPO step saw; no gradients, each [].

    Attributes:
      policy_loss: The clipped surrogate.
      value_loss: The clipped squared error of values.
      kl: Mean over sequences of log pi_old - log pi0, the estimate of KL(pi || pi0) in nats per sequence.
      clipped: Share of tokens whose ratio was cut.
    """

    policy_loss: jax.Array
    value_loss: jax.Array
    kl: jax.Array
    clipped: jax.Array


def token_kl(log_pi: ArrayLike, log_prior: ArrayLike, mask: ArrayLike, *, estimator: str = "k3") -> jax.Array:
    """KL(pi || pi0) [n] from per-token log-probabilities of samples of pi, summed over tokens, k = log pi - log pi0.

    estimator   term              value                as a loss, its mean gradient is that of
    "k1"        k                 unbiased             nothing: 0 in expectation
    "k2"        k^2 / 2           biased               sum_t KL(pi || pi0) along given prefixes
    "k3"        exp(-k) - 1 + k   unbiased, >= 0       KL(pi0 || pi), the other direction

    Args:
      log_pi: [n t] differentiated.
      log_prior: [n t] a constant.
      mask: [n t] non-zero where a token counts.
      estimator: Static.

    Returns:
      [n] nats per sequence.

    Raises:
      ValueError: if shapes differ, or on an unknown estimator.
    """
    check_shapes("rl_bayes.token_kl", log_pi=(log_pi, "n t"), log_prior=(log_prior, "n t"), mask=(mask, "n t"))
    one_of("rl_bayes.token_kl", "estimator", estimator, ("k1", "k2", "k3"))
    term = {"k1": divergence.k1, "k2": divergence.k2, "k3": divergence.k3}[estimator]
    inside = jnp.asarray(mask).astype(bool)
    log_pi, log_prior = (jnp.where(inside, x, jnp.zeros_like(x)) for x in widest(log_pi, log_prior))
    return jnp.sum(term(log_pi, log_prior), axis=1)


def penalised_rewards(log_pi: ArrayLike, log_prior: ArrayLike, reward: ArrayLike, mask: ArrayLike, *, beta: ArrayLike) -> jax.Array:
    """[n t] per-token rewards -beta (log pi - log pi0), with r [n] added at each sequence's last token; 0 in padding, no gradient."""
    check_shapes(
        "rl_bayes.penalised_rewards", log_pi=(log_pi, "n t"), log_prior=(log_prior, "n t"), reward=(reward, "n"), mask=(mask, "n t")
    )
    log_pi, log_prior, reward = (jax.lax.stop_gradient(x) for x in widest(log_pi, log_prior, reward))
    inside = jnp.asarray(mask).astype(bool)
    steps = jnp.arange(inside.shape[1], dtype=jnp.int32)[None]
    last = steps == jnp.max(jnp.where(inside, steps, -1), axis=1, keepdims=True)
    gap = jnp.where(inside, log_pi, jnp.zeros_like(log_pi)) - jnp.where(inside, log_prior, jnp.zeros_like(log_pi))
    return -jnp.asarray(beta).astype(gap.dtype) * gap + jnp.where(last & inside, reward[:, None], jnp.zeros_like(gap))


def reward_to_go(rewards: ArrayLike, *, gamma: ArrayLike = 1.0) -> jax.Array:
    """[n t] sum_{s >= t} gamma^(s-t) rewards_s: what a token's action can still change."""
    check_shapes("rl_bayes.reward_to_go", rewards=(rewards, "n t"))
    (rewards,) = widest(rewards)
    factor = jnp.asarray(gamma).astype(rewards.dtype)

    def step(after: jax.Array, now: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = now + factor * after
        return total, total

    _, out = jax.lax.scan(step, jnp.zeros_like(rewards[:, 0]), rewards.T, reverse=True)
    return out.T


def token_kl_rl_loss(
    log_pi: ArrayLike,
    log_prior: ArrayLike,
    reward: ArrayLike,
    mask: ArrayLike,
    *,
    beta: ArrayLike,
    baseline: str = "none",
) -> jax.Array:
    """KL-regularised RL on samples of pi with reward-to-go: a token's advantage leaves out the penalties of earlier tokens.

    The same expected gradient as `kl_rl_loss`, with less variance. Value: minus the estimate of J; gradient -mean_n sum_t A_nt grad log pi_nt.

    Args:
      log_pi: [n t] differentiated.
      log_prior: [n t].
      reward: [n].
      mask: [n t] non-zero where a token counts.
      beta: [] >= 0. Traced.
      baseline: "none", or "leave_one_out": the mean at the same position over all other samples (0 where they have ended). Static.

    Returns:
      [] loss, float32 or wider.

    Raises:
      ValueError: if shapes differ, or on an unknown baseline.
    """
    name = "rl_bayes.token_kl_rl_loss"
    one_of(name, "baseline", baseline, ("none", "leave_one_out"))
    rewards = penalised_rewards(log_pi, log_prior, reward, mask, beta=beta)
    inside = jnp.asarray(mask).astype(bool)
    advantages = reward_to_go(rewards)
    n = advantages.shape[0]
    if baseline == "leave_one_out" and n > 1:
        advantages = advantages - (jnp.sum(advantages, axis=0, keepdims=True) - advantages) / (n - 1)
    (log_pi,) = widest(log_pi)
    log_pi = jnp.where(inside, log_pi, jnp.zeros_like(log_pi))
    surrogate = -jnp.sum(jnp.where(inside, advantages, jnp.zeros_like(advantages)).astype(log_pi.dtype) * log_pi) / n
    return divergence.with_value(surrogate, -jnp.sum(rewards) / n)


def gae(rewards: ArrayLike, values: ArrayLike, mask: ArrayLike, *, gamma: ArrayLike = 1.0, lam: ArrayLike = 0.95) -> jax.Array:
    """Generalised advantages [n t]: sum_s (gamma lam)^s delta_{t+s}, delta_t = r_t + gamma V_{t+1} - V_t, V = 0 behind the end; no gradient.

    Reference: Schulman et al., arXiv:1506.02438.
    """
    check_shapes("rl_bayes.gae", rewards=(rewards, "n t"), values=(values, "n t"), mask=(mask, "n t"))
    rewards, values = (jax.lax.stop_gradient(x) for x in widest(rewards, values))
    inside = jnp.asarray(mask).astype(bool)
    values, rewards = (jnp.where(inside, x, jnp.zeros_like(x)) for x in (values, rewards))
    gamma = jnp.asarray(gamma).astype(values.dtype)
    following = jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], axis=1)
    out = reward_to_go(rewards + gamma * following - values, gamma=gamma * jnp.asarray(lam).astype(values.dtype))
    return jnp.where(inside, out, jnp.zeros_like(out))


def ppo_penalty_loss(
    log_pi: ArrayLike,
    log_old: ArrayLike,
    log_prior: ArrayLike,
    reward: ArrayLike,
    mask: ArrayLike,
    values: ArrayLike,
    old_values: ArrayLike,
    *,
    beta: ArrayLike,
    gamma: ArrayLike = 1.0,
    lam: ArrayLike = 0.95,
    clip: ArrayLike = 0.2,
    value_clip: ArrayLike = 0.2,
    value_coefficient: ArrayLike = 0.1,
) -> tuple[jax.Array, PpoInfo]:
    """PPO on the penalised reward r at the last token and -beta (log pi_old - log pi0) at each; fine-tuning from human preferences.

    policy: mean over tokens of max(-A rho, -A clip(rho, 1 -+ clip)), rho = pi / pi_old; value: half the mean of the larger of (V - R)^2 and the
    same with V held within value_clip of the old values, R = A + V_old. The mean divides by n t, padding included, so that long and short
    answers count alike per token and the target stays p*.

    Args:
      log_pi: [n t] of the policy being trained, differentiated.
      log_old: [n t] when the tokens were drawn.
      log_prior: [n t] of the prior.
      reward: [n] of each sequence.
      mask: [n t] non-zero where a token counts.
      values: [n t] of the critic before each token, differentiated.
      old_values: [n t] when the tokens were drawn.
      beta: [] penalty, see `adaptive_beta`. Traced, as are all that follow.
      gamma: [] discount.
      lam: [] of GAE.
      clip: [] of the ratio.
      value_clip: [] of the values.
      value_coefficient: [] weight of the value loss.

    Returns:
      The loss [] and `PpoInfo`. Advantages are not whitened.

    Raises:
      ValueError: if shapes differ.

    Reference: Ziegler et al., arXiv:1909.08593, constants as in naver/gdc; Schulman et al., arXiv:1707.06347.
    """
    per_token = {"log_pi": log_pi, "log_old": log_old, "log_prior": log_prior, "mask": mask, "values": values, "old_values": old_values}
    check_shapes("rl_bayes.ppo_penalty_loss", **{k: (v, "n t") for k, v in per_token.items()}, reward=(reward, "n"))
    log_pi, log_old, log_prior, values, old_values = widest(log_pi, log_old, log_prior, values, old_values)
    inside = jnp.asarray(mask).astype(bool)
    log_pi, log_old, log_prior, values, old_values = (
        jnp.where(inside, x, jnp.zeros_like(x)) for x in (log_pi, log_old, log_prior, values, old_values)
    )
    log_old, old_values = jax.lax.stop_gradient((log_old, old_values))
    clip, value_clip, weight = (jnp.asarray(x).astype(log_pi.dtype) for x in (clip, value_clip, value_coefficient))
    advantages = gae(penalised_rewards(log_old, log_prior, reward, inside, beta=beta), old_values, inside, gamma=gamma, lam=lam)
    advantages = advantages.astype(log_pi.dtype)
    returns = advantages + old_values
    ratio = jnp.exp(log_pi - log_old)
    held = jnp.clip(ratio, 1 - clip, 1 + clip)
    policy = jnp.maximum(-advantages * ratio, -advantages * held)
    near = jnp.clip(values, old_values - value_clip, old_values + value_clip)
    value = 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(near - returns))
    policy_loss, value_loss = (jnp.sum(jnp.where(inside, x, jnp.zeros_like(x))) / x.size for x in (policy, value))
    info = PpoInfo(
        policy_loss=policy_loss,
        value_loss=value_loss,
        kl=jnp.mean(jnp.sum(log_old - log_prior, axis=1)),
        clipped=masking.masked_mean(jnp.abs(ratio - 1) > clip, inside),
    )
    return policy_loss + weight * value_loss, jax.lax.stop_gradient(info)


def adaptive_beta(
    beta: ArrayLike, kl: ArrayLike, *, num_samples: ArrayLike, target_kl: ArrayLike = 6.0, horizon: ArrayLike = 10000.0
) -> jax.Array:
    """beta (1 + clip(KL / target - 1, -0.2, 0.2) num_samples / horizon) [], all traced; starts at 0.2 in the code. It moves the target p* in time.

    Reference: Ziegler et al., arXiv:1909.08593.
    """
    beta, kl, target, count, span = widest(beta, kl, target_kl, num_samples, horizon)
    return beta * (1 + jnp.clip(kl / target - 1, -0.2, 0.2) * count / span)
