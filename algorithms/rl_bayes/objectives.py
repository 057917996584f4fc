"""Variational inference: f-DPG for every divergence, DPG / GDC / CDPG / alpha-DPG, REINFORCE and KL-regularised RL, as losses over samples.

One estimator covers them: grad D_f(pi || p) = E_q[(pi / q) f'(pi / p) grad log pi], REINFORCE with the pseudo-reward R = -f'(pi / p). The
gradient of a loss is that estimate; its value is an estimate of what is minimised (the two are joined by stop-gradients). All losses
take sequence log-probabilities, SUMS over tokens, of n samples of one context; a batch of contexts is a `vmap`. All return the same info, so
`lax.switch` chooses among them under `jit` and `vmap`.

With `weights` the mean over samples becomes a weighted one. Given all x of a space, log_q = log q(x) and weights q(x), a loss is exact: its
gradient is the exact gradient.

    loss, info = fdpg_loss(log_pi, log_target, log_q, log_z=log_z, divergence=JS, baseline="leave_one_out")
    loss, info = kl_rl_loss(log_pi, log_prior, reward, beta=0.5, baseline="leave_one_out")

Baselines: "none"; "batch_mean", biased by O(1/n); "leave_one_out", the mean of all other samples, unbiased; or a number, e.g. `window_mean`.
Where a hard constraint is violated (log P = -inf) the pseudo-reward is -f'(inf); if that is infinite and there is no `floor`, the sample is left
out and counted in `info.dropped`. A log Z of -inf gives loss and gradient zero and `info.skipped`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.algorithms.rl_bayes import divergences
from janax.algorithms.rl_bayes.divergences import JS, FDivergence
from janax.algorithms.rl_bayes.normaliser import batch_log_z
from janax.jaxlib_ext import divergence as family
from janax.jaxlib_ext import dtypes, logprobs
from janax.jaxlib_ext.checks import check_shapes, one_of
from janax.jaxlib_ext.divergence.numerics import exp, widest

__all__ = [
    "ObjectiveInfo",
    "alpha_dpg_loss",
    "cdpg_loss",
    "dpg_loss",
    "fdpg_loss",
    "kl_rl_loss",
    "pseudo_rewards",
    "reinforce_loss",
    "token_log_probs",
]

_BASELINES = ("none", "batch_mean", "leave_one_out")


class ObjectiveInfo(NamedTuple):
    """The same for every loss over samples; no gradients, each [].

    Attributes:
      value: Estimate of what is minimised (a divergence, or minus an objective).
      log_z: The log Z that was used, or that the loss implies; 0 where there is none.
      reward: Mean (pseudo-)reward of the samples that count.
      ess: Effective number of samples of the weights pi / q.
      dead: Share of samples with P = 0.
      dropped: Number of samples left out because their pseudo-reward is infinite.
      clipped: Share of samples whose pseudo-reward was cut.
      skipped: Whether there was nothing to learn from.
    """

    value: jax.Array
    log_z: jax.Array
    reward: jax.Array
    ess: jax.Array
    dead: jax.Array
    dropped: jax.Array
    clipped: jax.Array
    skipped: jax.Array


def token_log_probs(logits: ArrayLike, tokens: ArrayLike, num_tokens: ArrayLike) -> jax.Array:
    """[n t] log pi(x_t | x_<t), 0 in the padding; their sum is what the losses take, never their mean, which would change the target.

    Args:
      logits: [n t v] the logits that predict tokens[:, t] (already shifted).
      tokens: [n t] ids.
      num_tokens: [n] tokens of each sequence.
    """
    check_shapes("rl_bayes.token_log_probs", logits=(logits, "n t v"), tokens=(tokens, "n t"), num_tokens=(num_tokens, "n"))
    inside = jnp.arange(jnp.shape(tokens)[1], dtype=jnp.int32)[None] < jnp.asarray(num_tokens).astype(jnp.int32)[:, None]
    ids = jnp.where(inside, jnp.asarray(tokens), 0)
    return jnp.where(inside, logprobs.token_log_probs(logits, ids), 0.0)


def pseudo_rewards(
    log_pi: ArrayLike,
    log_target: ArrayLike,
    *,
    log_z: ArrayLike,
    divergence: FDivergence | ArrayLike = JS,
    floor: ArrayLike | None = None,
) -> jax.Array:
    """R = -f'(pi / p) of f-DPG, -f'(inf) where the target is zero (-inf for RKL and CHI2R without a floor), no gradient.

    Args:
      log_pi: [n] log-probabilities under the policy.
      log_target: [n] log P, unnormalised.
      log_z: [] log Z. Traced.
      divergence: One of `divergences`, or an integer [] that chooses from `FAMILY`. Traced.
      floor: [] least log P. Traced.

    Returns:
      [n] float32 or wider.
    """
    check_shapes("rl_bayes.pseudo_rewards", log_pi=(log_pi, "n"), log_target=(log_target, "n"), log_z=(log_z, ""), floor=(floor, ""))
    log_pi, log_target, log_z = (jax.lax.stop_gradient(x) for x in widest(log_pi, log_target, log_z))
    return _pseudo_rewards(log_pi, _floored(log_target, floor), log_z, divergence)


def fdpg_loss(
    log_pi: ArrayLike,
    log_target: ArrayLike,
    log_q: ArrayLike | None = None,
    *,
    log_z: ArrayLike,
    divergence: FDivergence | ArrayLike = JS,
    baseline: str | ArrayLike = "none",
    floor: ArrayLike | None = None,
    max_reward: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> tuple[jax.Array, ObjectiveInfo]:
    """f-DPG: the gradient of D_f(pi || p), from samples of pi or of any q that covers it. Couples the n samples.

    Args:
      log_pi: [n] log pi(x), differentiated.
      log_target: [n] log P(x), unnormalised; -inf is allowed.
      log_q: [n] under the law that drew the samples; None if that is pi now.
      log_z: [] log Z, see `normaliser`. Traced.
      divergence: One of `divergences`, or an integer [] that chooses from `FAMILY`. Traced.
      baseline: See the head of the file; a name is static, a number traced.
      floor: [] least log P, for RKL and CHI2R under hard constraints. Traced.
      max_reward: [] pseudo-rewards are cut there. Traced.
      weights: [n] summing to 1, for exact expectations.

    Returns:
      The loss [], an estimate of D_f whose gradient is the estimator's; and `ObjectiveInfo`.

    Raises:
      ValueError: if shapes do not agree, or on an unknown baseline.

    Reference: Go et al., arXiv:2302.08215, Theorem 1.
    """
    name = "rl_bayes.fdpg_loss"
    _check(name, log_pi, weights, log_target=log_target, log_q=log_q)
    log_pi, log_target, log_q, mean_weights = _prepare(log_pi, log_target, log_q, weights)
    log_z = jax.lax.stop_gradient(jnp.asarray(log_z).astype(log_pi.dtype))
    fixed, target = jax.lax.stop_gradient(log_pi), _floored(log_target, floor)
    known = ~jnp.isneginf(log_z)
    rewards = _pseudo_rewards(fixed, target, log_z, divergence)
    counted = jnp.isfinite(rewards) & ~jnp.isneginf(fixed)
    rewards = jnp.where(counted, rewards, jnp.zeros_like(rewards))
    rewards, clipped = _cut(rewards, max_reward)
    advantages = rewards - _baseline(name, baseline, rewards, counted, mean_weights)
    ratio = jnp.where(counted, exp(jnp.where(counted, fixed - log_q, jnp.zeros_like(fixed))), jnp.zeros_like(fixed))
    base = jnp.where(known, log_z, jnp.zeros_like(log_z))
    each = divergences.divergence_terms(divergence, fixed - log_q, jnp.where(jnp.isneginf(target), -jnp.inf, target - base - log_q))
    value = _mean(jnp.where(counted, each, jnp.zeros_like(each)), mean_weights)
    extra = {"log_z": log_z, "dead": jnp.isneginf(log_target), "counted": counted, "clipped": clipped, "rewards": rewards}
    return _finish(log_pi, ratio * advantages, ratio, value, mean_weights, ~known, **extra)


def dpg_loss(
    log_pi: ArrayLike,
    log_target: ArrayLike,
    log_q: ArrayLike | None = None,
    *,
    log_z: ArrayLike,
    baseline: str | ArrayLike = "none",
    scale: str = "normalised",
    weights: ArrayLike | None = None,
) -> tuple[jax.Array, ObjectiveInfo]:
    """DPG, the gradient of KL(p || pi): -(1/Z) E_q[(P / q - B pi / q) grad log pi]. On- and off-policy; GDC is this with a moment target.

    Args:
      log_pi: [n] log pi(x), differentiated.
      log_target: [n] log P(x); -inf contributes nothing.
      log_q: [n] under the law that drew the samples; None if that is pi now.
      log_z: [] log Z. Traced.
      baseline: As in `fdpg_loss` (of P / (Z pi)), or "z": B = Z, the advantage P / pi - Z of arXiv:2206.00761, off-policy P / q - Z pi / q. At
        pi = p the estimator then has no variance.
      scale: "normalised", or "unnormalised" for the step of GDC's code, without 1/Z: learning rates must then grow as 1/Z. Static.
      weights: As in `fdpg_loss`.

    Returns:
      The loss [], an estimate of KL(p || pi), whose gradient is the estimator's; and `ObjectiveInfo`.

    Raises:
      ValueError: as `fdpg_loss`, and on an unknown scale.

    Reference: Parshakova et al., arXiv:1912.08517; Khalifa et al., arXiv:2012.11635, Algorithm 1; Korbak et al., arXiv:2206.00761.
    """
    name = "rl_bayes.dpg_loss"
    one_of(name, "scale", scale, ("normalised", "unnormalised"))
    _check(name, log_pi, weights, log_target=log_target, log_q=log_q)
    log_pi, log_target, log_q, mean_weights = _prepare(log_pi, log_target, log_q, weights)
    log_z = jax.lax.stop_gradient(jnp.asarray(log_z).astype(log_pi.dtype))
    fixed, known, alive = jax.lax.stop_gradient(log_pi), ~jnp.isneginf(log_z), ~jnp.isneginf(log_target)
    counted = ~jnp.isneginf(fixed)
    base = jnp.where(known, log_z, jnp.zeros_like(log_z))
    ratio = jnp.where(counted, exp(jnp.where(counted, fixed - log_q, jnp.zeros_like(fixed))), jnp.zeros_like(fixed))
    both = alive & counted
    target = jnp.where(both, log_target - base, jnp.zeros_like(fixed))
    p_over_q = jnp.where(both, exp(target - jnp.where(both, log_q, jnp.zeros_like(log_q))), jnp.zeros_like(fixed))
    rewards = jnp.where(both, exp(target - jnp.where(both, fixed, jnp.zeros_like(fixed))), jnp.zeros_like(fixed))
    if isinstance(baseline, str) and baseline == "z":
        level = jnp.ones_like(rewards)
    else:
        level = _baseline(name, baseline, rewards, counted, mean_weights, others=("z",))
    coefficients = p_over_q - jnp.where(ratio > 0, ratio * level, jnp.zeros_like(ratio))
    value = _mean(p_over_q * jnp.where(both, target - jnp.where(both, fixed, jnp.zeros_like(fixed)), jnp.zeros_like(fixed)), mean_weights)
    if scale == "unnormalised":
        coefficients = coefficients * jnp.exp(base)
    extra = {"log_z": log_z, "dead": ~alive, "counted": counted, "clipped": jnp.zeros_like(alive), "rewards": rewards}
    return _finish(log_pi, coefficients, ratio, value, mean_weights, ~known, **extra)


def cdpg_loss(
    log_pi: ArrayLike,
    log_target: ArrayLike,
    log_q: ArrayLike | None = None,
    *,
    epsilon: ArrayLike = 1e-4,
    baseline: str | ArrayLike = "none",
) -> tuple[jax.Array, ObjectiveInfo]:
    """Conditional DPG for one context: `dpg_loss` with Z_c + epsilon, Z_c the mean of P / q over the context's own n samples.

    For E_c CE(p_c, pi(. | c)), `vmap` over contexts and take the mean. Without 1/Z_c easy contexts dominate.

    Args:
      log_pi: [n] log pi(x | c), differentiated.
      log_target: [n] log P_c(x).
      log_q: [n] as in `dpg_loss`.
      epsilon: [] added to Z_c; 1e-4 in the published code. Traced.
      baseline: As in `dpg_loss`.

    Returns:
      As `dpg_loss`; `info.log_z` is log(Z_c + epsilon).

    Raises:
      ValueError: as `dpg_loss`.

    Reference: Korbak et al., arXiv:2112.00791.
    """
    check_shapes("rl_bayes.cdpg_loss", log_pi=(log_pi, "n"), log_target=(log_target, "n"), log_q=(log_q, "n"))
    first, second = widest(log_target, log_pi if log_q is None else log_q)
    return dpg_loss(log_pi, log_target, log_q, log_z=batch_log_z(first - second, epsilon=epsilon), baseline=baseline)


def alpha_dpg_loss(
    log_pi: ArrayLike,
    log_target: ArrayLike,
    log_q: ArrayLike | None = None,
    *,
    log_z: ArrayLike,
    alpha: ArrayLike,
    max_reward: ArrayLike = 10.0,
    baseline: str | ArrayLike = "leave_one_out",
    weights: ArrayLike | None = None,
) -> tuple[jax.Array, ObjectiveInfo]:
    """alpha-DPG as its code has it: R = min((p / pi)^(1 - alpha) - 1, M), without the factor 1 / (1 - alpha) of the divergence.

    So the gradient is (1 - alpha) times that of `fdpg_loss` with `divergences.alpha` (M infinite), small for alpha near 1: with Adam it does not
    matter. Where it does, use `fdpg_loss(..., divergence=alpha(a), max_reward=M / (1 - a))`.

    Args:
      log_pi: [n] log pi(x), differentiated.
      log_target: [n] log P(x) = log pi0 + log of the verifier's 0 or 1.
      log_q: [n] as in `fdpg_loss`.
      log_z: [] log Z_c, in the code that of the context's batch with a least value of 1e-4. Traced.
      alpha: [] in [0, 1); 0 is DPG, towards 1 KL-RL. Traced.
      max_reward: [] M. Traced.
      baseline: As in `fdpg_loss`.
      weights: As in `fdpg_loss`.

    Returns:
      As `fdpg_loss`; the value is the divergence times (1 - alpha).

    Raises:
      ValueError: as `fdpg_loss`.

    Reference: arXiv:2512.05962 (naver/alpha-dpg); its branch for alpha = 1 subtracts a constant that the cut does not ignore, and is not copied.
    """
    order = dtypes.at_least_float32(alpha)
    kind = divergences.alpha(order)
    scaled = FDivergence(generator=kind.generator, scale=1 - order, slope_at_inf=jnp.ones_like(order), value_at_zero=kind.value_at_zero)
    return fdpg_loss(log_pi, log_target, log_q, log_z=log_z, divergence=scaled, baseline=baseline, max_reward=max_reward, weights=weights)


def reinforce_loss(
    log_pi: ArrayLike,
    reward: ArrayLike,
    log_q: ArrayLike | None = None,
    *,
    baseline: str | ArrayLike = "none",
    weights: ArrayLike | None = None,
) -> tuple[jax.Array, ObjectiveInfo]:
    """REINFORCE: -E_pi[r], whose optimum is a point mass on the best x. With reward exp(log P) it is GDC's REINFORCE_P(x).

    Args:
      log_pi: [n] log pi(x), differentiated.
      reward: [n] rewards; samples with -inf are left out.
      log_q: [n] as in `fdpg_loss`.
      baseline: As in `fdpg_loss`.
      weights: As in `fdpg_loss`.

    Returns:
      The loss [], minus the mean reward, with gradient -E_q[(pi / q) (r - B) grad log pi]; and `ObjectiveInfo`.

    Raises:
      ValueError: as `fdpg_loss`.
    """
    name = "rl_bayes.reinforce_loss"
    _check(name, log_pi, weights, reward=reward, log_q=log_q)
    log_pi, reward, log_q, mean_weights = _prepare(log_pi, reward, log_q, weights)
    return _policy_gradient(name, log_pi, reward, jnp.isneginf(reward), log_q, baseline, mean_weights)


def kl_rl_loss(
    log_pi: ArrayLike,
    log_prior: ArrayLike,
    reward: ArrayLike,
    log_q: ArrayLike | None = None,
    *,
    beta: ArrayLike,
    baseline: str | ArrayLike = "none",
    floor: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> tuple[jax.Array, ObjectiveInfo]:
    """KL-regularised RL: minus J = E_pi[r] - beta KL(pi || pi0), with the reward r' = r + beta (log pi0 - log pi) held constant.

    grad J = E_pi[(r' - B) grad log pi] = -beta grad KL(pi || p*): reverse-KL inference of p* = pi0 exp(r / beta) / Z, without an estimate of Z.

    Args:
      log_pi: [n] log pi(x), differentiated.
      log_prior: [n] log pi0(x).
      reward: [n] rewards; -inf violates a constraint.
      log_q: [n] as in `fdpg_loss`.
      beta: [] >= 0; 0 is `reinforce_loss`. Traced.
      baseline: As in `fdpg_loss`.
      floor: [] least reward, so that violations push away. Traced.
      weights: As in `fdpg_loss`.

    Returns:
      The loss [], minus the estimate of J; and `ObjectiveInfo`.

    Raises:
      ValueError: as `fdpg_loss`.

    Reference: Korbak et al., arXiv:2205.11275, section 3.
    """
    name = "rl_bayes.kl_rl_loss"
    _check(name, log_pi, weights, log_prior=log_prior, reward=reward, log_q=log_q)
    log_pi, reward, log_q, mean_weights = _prepare(log_pi, reward, log_q, weights)
    log_prior = jax.lax.stop_gradient(jnp.asarray(log_prior).astype(log_pi.dtype))
    beta = jnp.asarray(beta).astype(log_pi.dtype)
    reward = reward if floor is None else jnp.maximum(reward, jnp.asarray(floor).astype(reward.dtype))
    fixed = jax.lax.stop_gradient(log_pi)
    both = ~jnp.isneginf(fixed) & ~jnp.isneginf(log_prior)
    gap = jnp.where(both, jnp.where(both, log_prior, jnp.zeros_like(fixed)) - jnp.where(both, fixed, jnp.zeros_like(fixed)), 0.0)
    dead = jnp.isneginf(reward) | (jnp.isneginf(log_prior) & (beta > 0))
    total = jnp.where(dead, jnp.zeros_like(reward), reward) + beta * gap
    return _policy_gradient(name, log_pi, total, dead, log_q, baseline, mean_weights)


def _check(name: str, log_pi: ArrayLike, weights: ArrayLike | None, **arrays: ArrayLike | None) -> None:
    specs = {key: (value, "n") for key, value in arrays.items()}
    check_shapes(name, log_pi=(log_pi, "n"), **specs, weights=(weights, "n"))


def _prepare(
    log_pi: ArrayLike, other: ArrayLike, log_q: ArrayLike | None, weights: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """All in one dtype; the law that drew the samples, and the weights of the mean. Only log pi carries a gradient."""
    log_pi, other, law = widest(log_pi, other, log_pi if log_q is None else log_q)
    share = jnp.full_like(law, 1 / law.shape[0]) if weights is None else jnp.asarray(weights).astype(law.dtype)
    law = jnp.where(jnp.isneginf(law), jnp.zeros_like(law), law)  # drawn all the same: its weight decides
    other, law, share = (jax.lax.stop_gradient(x) for x in (other, law, share))
    return log_pi, other, law, share


def _mean(x: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(weights > 0, weights * jnp.where(weights > 0, x, jnp.zeros_like(x)), jnp.zeros_like(x)))


def _floored(log_target: jax.Array, floor: ArrayLike | None) -> jax.Array:
    return log_target if floor is None else jnp.maximum(log_target, jnp.asarray(floor).astype(log_target.dtype))


def _pseudo_rewards(log_pi: jax.Array, log_target: jax.Array, log_z: jax.Array, kind: FDivergence | ArrayLike) -> jax.Array:
    alive, known, there = ~jnp.isneginf(log_target), ~jnp.isneginf(log_z), ~jnp.isneginf(log_pi)
    l = jnp.where(there, log_pi, jnp.zeros_like(log_pi)) - jnp.where(alive, log_target, jnp.zeros_like(log_target))
    l = l + jnp.where(known, log_z, jnp.zeros_like(log_z))
    slope = jnp.where(alive, divergences.f_prime(kind, l), divergences.f_prime_inf(kind).astype(l.dtype))
    return -slope


def _cut(rewards: jax.Array, max_reward: ArrayLike | None) -> tuple[jax.Array, jax.Array]:
    if max_reward is None:
        return rewards, jnp.zeros_like(rewards, dtype=bool)
    most = jnp.asarray(max_reward).astype(rewards.dtype)
    return jnp.minimum(rewards, most), rewards > most


def _baseline(
    name: str, baseline: str | ArrayLike, rewards: jax.Array, counted: jax.Array, weights: jax.Array, others: tuple[str, ...] = ()
) -> jax.Array:
    """[n] what is subtracted from each reward."""
    if not isinstance(baseline, str):
        return jnp.broadcast_to(jax.lax.stop_gradient(jnp.asarray(baseline).astype(rewards.dtype)), rewards.shape)
    one_of(name, "baseline", baseline, _BASELINES + others)
    if baseline == "none":
        return jnp.zeros_like(rewards)
    share = jnp.where(counted, weights, jnp.zeros_like(weights))
    total, mass = jnp.sum(share * rewards), jnp.sum(share)
    if baseline == "batch_mean":
        level = total / jnp.where(mass > 0, mass, jnp.ones_like(mass))
        return jnp.broadcast_to(level, rewards.shape)
    rest = mass - share
    some = rest > 8 * float(jnp.finfo(rest.dtype).eps) * mass
    return jnp.where(some, (total - share * rewards) / jnp.where(some, rest, jnp.ones_like(rest)), jnp.zeros_like(rewards))


def _policy_gradient(
    name: str,
    log_pi: jax.Array,
    reward: jax.Array,
    dead: jax.Array,
    log_q: jax.Array,
    baseline: str | ArrayLike,
    weights: jax.Array,
) -> tuple[jax.Array, ObjectiveInfo]:
    fixed = jax.lax.stop_gradient(log_pi)
    counted = ~dead & ~jnp.isneginf(fixed)
    reward = jnp.where(counted, reward, jnp.zeros_like(reward))
    ratio = jnp.where(counted, exp(jnp.where(counted, fixed - log_q, jnp.zeros_like(fixed))), jnp.zeros_like(fixed))
    advantages = reward - _baseline(name, baseline, reward, counted, weights)
    zero = jnp.zeros((), reward.dtype)
    extra = {"log_z": zero, "dead": dead, "counted": counted, "clipped": jnp.zeros_like(dead), "rewards": reward}
    skipped = ~jnp.any(counted)
    return _finish(log_pi, ratio * advantages, ratio, -_mean(ratio * reward, weights), weights, skipped, **extra)


def _finish(
    log_pi: jax.Array,
    coefficients: jax.Array,
    ratio: jax.Array,
    value: jax.Array,
    weights: jax.Array,
    skipped: jax.Array,
    *,
    log_z: jax.Array,
    dead: jax.Array,
    counted: jax.Array,
    clipped: jax.Array,
    rewards: jax.Array,
) -> tuple[jax.Array, ObjectiveInfo]:
    """The value with the gradient -mean(coefficients grad log pi)."""
    use = counted & ~skipped
    coefficients = jax.lax.stop_gradient(jnp.where(use, coefficients, jnp.zeros_like(coefficients)))
    surrogate = -_mean(coefficients * jnp.where(use, log_pi, jnp.zeros_like(log_pi)), weights)
    value = jax.lax.stop_gradient(jnp.where(skipped, jnp.zeros_like(value), value))
    dtype, share = value.dtype, jnp.where(counted, weights, jnp.zeros_like(weights))
    relative = ratio / jnp.maximum(jnp.max(ratio), float(jnp.finfo(dtype).tiny))
    mass, square = _mean(relative, weights), _mean(jnp.square(relative), weights)
    info = ObjectiveInfo(
        value=value,
        log_z=log_z.astype(dtype),
        reward=jnp.sum(share * rewards) / jnp.maximum(jnp.sum(share), float(jnp.finfo(dtype).tiny)),
        ess=ratio.shape[0] * jnp.where(square > 0, jnp.square(mass) / jnp.where(square > 0, square, jnp.ones_like(square)), 0.0),
        dead=jnp.sum(jnp.where(dead, weights, jnp.zeros_like(weights))),
        dropped=jnp.sum(~counted, dtype=jnp.int32),
        clipped=jnp.sum(jnp.where(clipped, weights, jnp.zeros_like(weights))),
        skipped=skipped,
    )
    return family.with_value(surrogate, value), jax.lax.stop_gradient(info)
