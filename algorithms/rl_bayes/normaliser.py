"""What a training run carries beside its parameters: running log Z per context, baselines over a window, divergences seen from the proposal.

state = init_log_z()
state = update_log_z(state, log_target - log_q)          # every batch: each P / q is unbiased for Z whatever q was at the time
loss, info = fdpg_loss(log_pi, log_target, log_q, log_z=current_log_z(state))
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import dtypes, logprobs, sharding
from janax.jaxlib_ext.checks import check_shapes
from janax.jaxlib_ext.divergence.numerics import widest

__all__ = [
    "LogZState",
    "Monitor",
    "WindowState",
    "adapt_proposal",
    "batch_log_z",
    "current_log_z",
    "init_log_z",
    "init_window",
    "log_mixture",
    "monitor",
    "update_log_z",
    "update_window",
    "window_mean",
]


class LogZState(NamedTuple):
    """Sums over all samples drawn, in log space.

    Attributes:
      log_sum: [] or [c], log of the sum of P / q.
      count: [] or [c], number of samples, discounted as the sum is.
    """

    log_sum: jax.Array
    count: jax.Array


def init_log_z(num_contexts: int | None = None, dtype: Any = jnp.float32) -> LogZState:
    """Nothing seen: log Z is -inf. One entry per context if there are several. Both arguments are static."""
    shape = () if num_contexts is None else (num_contexts,)
    return LogZState(log_sum=jnp.full(shape, -jnp.inf, dtype), count=jnp.zeros(shape, dtype))


def update_log_z(state: LogZState, log_weights: ArrayLike, context_ids: ArrayLike | None = None, *, decay: ArrayLike = 1.0) -> LogZState:
    """Adds a batch of log P - log q.

    Args:
      state: The sums.
      log_weights: [n] log P(x) - log q(x), with q the law that drew x: tempered or truncated sampling changes it. -inf counts as zero.
      context_ids: [n] integers, the context of each sample, if the state has one entry per context.
      decay: [] in (0, 1], what becomes of the old sums; 1 is the mean over everything, as in the published code. Traced.

    Returns:
      The new state.

    Raises:
      ValueError: if contexts are given without entries for them, or the other way round.
    """
    check_shapes("rl_bayes.update_log_z", log_weights=(log_weights, "n"), context_ids=(context_ids, "n"))
    if (context_ids is None) != (state.log_sum.ndim == 0):
        raise ValueError(
            f"rl_bayes.update_log_z: 'state' has shape {state.log_sum.shape}, expected "
            + ("[] without 'context_ids'" if context_ids is None else "[c] with 'context_ids'")
        )
    log_w = dtypes.at_least_float32(log_weights).astype(state.log_sum.dtype)
    log_w = jax.lax.stop_gradient(log_w)
    if context_ids is None:
        new, seen = logprobs.log_normalizer(log_w), jnp.asarray(log_w.shape[0], state.count.dtype)
    else:
        mine = jnp.asarray(context_ids).astype(jnp.int32)[None] == jnp.arange(state.log_sum.shape[0], dtype=jnp.int32)[:, None]
        new = logprobs.log_normalizer(jnp.where(mine, log_w[None], -jnp.inf))
        seen = jnp.sum(mine, axis=1).astype(state.count.dtype)
    decay = jnp.asarray(decay).astype(state.log_sum.dtype)
    return LogZState(log_sum=jnp.logaddexp(state.log_sum + jnp.log(decay), new), count=decay * state.count + seen)


def current_log_z(state: LogZState) -> jax.Array:
    """log of the mean of P / q, [] or [c]; -inf if nothing was drawn or nothing had positive P."""
    drawn = state.count > 0
    return jnp.where(drawn, state.log_sum - jnp.log(jnp.where(drawn, state.count, jnp.ones_like(state.count))), -jnp.inf)


def batch_log_z(log_weights: ArrayLike, *, epsilon: ArrayLike = 0.0) -> jax.Array:
    """log(mean exp(log_weights) + epsilon) over the last axis: Z of a batch, [... n] -> [...]; epsilon 1e-4 in CDPG's code. No gradient."""
    log_w = jax.lax.stop_gradient(dtypes.at_least_float32(log_weights))
    mean = logprobs.log_normalizer(log_w) - jnp.log(jnp.asarray(log_w.shape[-1], log_w.dtype))
    return jnp.logaddexp(mean, jnp.log(jnp.asarray(epsilon).astype(log_w.dtype)))


def log_mixture(log_probs: ArrayLike, log_shares: ArrayLike) -> jax.Array:
    """log q_mix(x) of samples that came from several proposals (balance heuristic), so that old samples stay usable.

    Args:
      log_probs: [k n] log q_k(x_n).
      log_shares: [k] log of the share of the samples that each proposal drew.

    Returns:
      [n] float32 or wider.
    """
    check_shapes("rl_bayes.log_mixture", log_probs=(log_probs, "k n"), log_shares=(log_shares, "k"))
    log_probs, log_shares = widest(log_probs, log_shares)
    return logprobs.log_normalizer((log_probs + log_shares[:, None]).T)


class WindowState(NamedTuple):
    """The last pseudo-rewards, for a baseline.

    Attributes:
      values: [w] a ring.
      place: [] int32, where the next one goes.
      count: [] int32, how many there are, at most w.
    """

    values: jax.Array
    place: jax.Array
    count: jax.Array


def init_window(size: int = 1024, dtype: Any = jnp.float32) -> WindowState:
    """An empty window of `size` pseudo-rewards (1024 in naver/disco). Static."""
    return WindowState(values=jnp.zeros(size, dtype), place=jnp.zeros((), jnp.int32), count=jnp.zeros((), jnp.int32))


def update_window(state: WindowState, rewards: ArrayLike) -> WindowState:
    """Takes in pseudo-rewards [n]; what is not finite is left out, so that one violated constraint does not spoil the baseline for good."""
    check_shapes("rl_bayes.update_window", rewards=(rewards, "n"))
    return sharding.placed(_update_window, lambda _: jax.P(), state, rewards)


def _update_window(state: WindowState, rewards: ArrayLike) -> WindowState:
    rewards = jax.lax.stop_gradient(dtypes.at_least_float32(rewards)).astype(state.values.dtype)
    size = state.values.shape[0]
    good = jnp.isfinite(rewards)
    rank = jnp.cumsum(good, dtype=jnp.int32)
    total = rank[-1]
    late = good & (total - rank < size)
    place = jnp.where(late, (state.place + rank - 1) % size, size)
    return WindowState(
        values=state.values.at[place].set(rewards, mode="drop"),
        place=(state.place + total) % size,
        count=jnp.minimum(state.count + total, size),
    )


def window_mean(state: WindowState) -> jax.Array:
    """The mean over the window [], 0 while it is empty: the first batch has no baseline. Biased by O(1/w) only if it holds the batch itself."""
    inside = jnp.arange(state.values.shape[0], dtype=jnp.int32) < state.count
    total = jnp.sum(jnp.where(inside, state.values, jnp.zeros_like(state.values)))
    return total / jnp.maximum(state.count, 1).astype(total.dtype)


class Monitor(NamedTuple):
    """How far policy and proposal are from the target, seen from the proposal's samples; each [].

    Attributes:
      kl_p_pi: KL(p || pi).
      kl_p_q: KL(p || q).
      tv_p_pi: total variation of p and pi.
      tv_p_q: total variation of p and q.
      ess: effective number of samples under P / q.
    """

    kl_p_pi: jax.Array
    kl_p_q: jax.Array
    tv_p_pi: jax.Array
    tv_p_q: jax.Array
    ess: jax.Array


def monitor(log_target: ArrayLike, log_q: ArrayLike, log_pi: ArrayLike, *, log_z: ArrayLike) -> Monitor:
    """The estimators of GDC and disco: KL(p || m) = -log Z + mean((P / q) (log P - log m)) / Z; TV(p, pi) = mean|pi / q - P / (Z q)| / 2.

    Args:
      log_target: [n] log P of samples of q; -inf contributes nothing to a KL.
      log_q: [n] under the proposal.
      log_pi: [n] under the policy.
      log_z: [] log Z, as a rule from all samples so far. Traced.

    Returns:
      The monitor; KLs are inf and TVs 1/2 mean if log Z is -inf.

    Raises:
      ValueError: if shapes do not agree.

    Reference: Khalifa et al., arXiv:2012.11635, Algorithm 1.
    """
    check_shapes("rl_bayes.monitor", log_target=(log_target, "n"), log_q=(log_q, "n"), log_pi=(log_pi, "n"), log_z=(log_z, ""))
    log_target, log_q, log_pi, log_z = widest(log_target, log_q, log_pi, log_z)
    alive, known = ~jnp.isneginf(log_target), ~jnp.isneginf(log_z)
    base = jnp.where(known, log_z, jnp.zeros_like(log_z))
    safe = jnp.where(alive, log_target, jnp.zeros_like(log_target))
    p_over_q = jnp.where(alive, jnp.exp(jnp.where(alive, safe - log_q, jnp.zeros_like(safe)) - base), jnp.zeros_like(safe))

    def kl(log_m: jax.Array) -> jax.Array:
        gap = jnp.where(alive, safe - log_m, jnp.zeros_like(safe))
        return jnp.where(known, jnp.mean(p_over_q * gap) - base, jnp.inf)

    log_w = log_target - log_q
    return Monitor(
        kl_p_pi=kl(log_pi),
        kl_p_q=kl(log_q),
        tv_p_pi=0.5 * jnp.mean(jnp.abs(jnp.exp(log_pi - log_q) - p_over_q)),
        tv_p_q=0.5 * jnp.mean(jnp.abs(1 - p_over_q)),
        ess=jnp.exp(_twice_minus(log_w)),
    )


def _twice_minus(log_w: jax.Array) -> jax.Array:
    """2 lse(w) - lse(2 w), -inf where there is no weight."""
    one, two = logprobs.log_normalizer(log_w), logprobs.log_normalizer(2 * log_w)
    some = ~jnp.isneginf(one)
    return jnp.where(some, 2 * jnp.where(some, one, jnp.zeros_like(one)) - jnp.where(some, two, jnp.zeros_like(two)), -jnp.inf)


def adapt_proposal(proposal: Any, params: Any, seen: Monitor, *, by: str = "kl") -> tuple[Any, jax.Array]:
    """KL-adaptive DPG: the policy becomes the proposal when it is closer to the target.

    Args:
      proposal: Parameters of q, any tree of arrays.
      params: Parameters of pi, a tree of the same shapes.
      seen: What `monitor` says.
      by: "kl" or "tv". Static.

    Returns:
      The proposal to go on with, and whether it was replaced [].

    Raises:
      ValueError: if `by` is neither.
    """
    if by not in ("kl", "tv"):
        raise ValueError(f"rl_bayes.adapt_proposal: 'by' is {by!r}, expected one of 'kl', 'tv'")
    better = seen.kl_p_pi < seen.kl_p_q if by == "kl" else seen.tv_p_pi < seen.tv_p_q
    return jax.tree.map(lambda old, new: jnp.where(better, new, old), proposal, params), better
