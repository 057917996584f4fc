"""Sampling-based inference from weights log w = log P - log q: importance sampling, rejection, quasi-rejection, independence Metropolis-Hastings.

    log_weights = log_unnormalised(target, log_prior, x) - log_q       # q: the law that drew x; for q = pi0 this is phi
    estimate = importance(log_weights)                                 # log Z, ESS
    plan = qrs_plan(log_weights, target_rate=0.1)                      # c with the acceptance wanted, and how far p_c is from p
    accepted = accept(key, log_weights, log_c=plan.log_c)

Quasi-rejection accepts with min(1, P / (c q)): the law of what is accepted is p_c = min(P, c q) / Z_c, the acceptance rate Z_c / c. It is
exact, and plain rejection, from c = max P / q on; with q = pi0 and a hard constraint c = 1. References: Eikema et al., arXiv:2112.05702
(QRS); the identity for the KL and the bound on the TV follow from p_c >= p wherever P <= c q.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.algorithms.rl_bayes.divergences import FDivergence, divergence_terms
from janax.jaxlib_ext import dtypes, logprobs, sharding
from janax.jaxlib_ext.checks import check_shapes
from janax.jaxlib_ext.divergence.numerics import widest

__all__ = [
    "Accepted",
    "Importance",
    "Qrs",
    "Rejection",
    "accept",
    "effective_sample_size",
    "importance",
    "independence_mh",
    "qrs",
    "qrs_plan",
    "rejection_sample",
    "snis",
]


class Importance(NamedTuple):
    """What weights say.

    Attributes:
      log_z: [] log of the mean weight; its exponential is unbiased for Z.
      ess: [] (sum w)^2 / sum w^2, 0 if no sample has weight; over n it tends to 1 / (1 + chi2(p || q)).
      weights: [n] normalised; zeros if there is no weight.
      empty: [] whether no sample has weight.
    """

    log_z: jax.Array
    ess: jax.Array
    weights: jax.Array
    empty: jax.Array


def effective_sample_size(log_weights: ArrayLike) -> jax.Array:
    """(sum w)^2 / sum w^2 over the last axis, [... n] -> [...]; 0 if there is no weight. No gradient."""
    check_shapes("rl_bayes.effective_sample_size", log_weights=(log_weights, "... n"))
    log_w = jax.lax.stop_gradient(dtypes.at_least_float32(log_weights))
    one, two = logprobs.log_normalizer(log_w), logprobs.log_normalizer(2 * log_w)
    some = ~jnp.isneginf(one)
    one, two = (jnp.where(some, x, jnp.zeros_like(x)) for x in (one, two))
    return jnp.where(some, jnp.exp(2 * one - two), jnp.zeros_like(one))


def importance(log_weights: ArrayLike) -> Importance:
    """Self-normalised importance sampling of one context's n samples; `log_weights` [n] = log P - log q, -inf for zero weight."""
    check_shapes("rl_bayes.importance", log_weights=(log_weights, "n"))
    log_w = dtypes.at_least_float32(log_weights)
    total = logprobs.log_normalizer(log_w)
    return Importance(
        log_z=total - jnp.log(jnp.asarray(log_w.shape[0], log_w.dtype)),
        ess=effective_sample_size(log_w),
        weights=_normalised(log_w, total),
        empty=jnp.isneginf(total),
    )


def snis(log_weights: ArrayLike, values: ArrayLike) -> jax.Array:
    """E_p[g] ~ sum w g / sum w over samples: [n], [n ...] -> [...]; 0 if there is no weight; biased by O(1/n). g may be anything where w = 0."""
    check_shapes("rl_bayes.snis", log_weights=(log_weights, "n"))
    log_w, values = widest(log_weights, values)
    if values.ndim < 1 or values.shape[0] != log_w.shape[0]:
        raise ValueError(f"rl_bayes.snis: 'values' has shape {values.shape}, expected [n ...] with n={log_w.shape[0]} from 'log_weights'")
    weights = _normalised(log_w, logprobs.log_normalizer(log_w))
    weights = weights.reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.sum(weights * jnp.where(weights > 0, values, jnp.zeros_like(values)), axis=0)


class Accepted(NamedTuple):
    """Which samples are kept.

    Attributes:
      mask: [n] bool.
      rate: [] share that was accepted; 0 if all were rejected.
      exceeded: [] share of samples with P > c q. 0: nothing contradicts that the accepted are exact samples of p.
    """

    mask: jax.Array
    rate: jax.Array
    exceeded: jax.Array


def accept(key: jax.Array, log_weights: ArrayLike, *, log_c: ArrayLike) -> Accepted:
    """Accepts each of n samples of q with probability min(1, P / (c q)).

    Args:
      key: [] typed key.
      log_weights: [n] log P - log q.
      log_c: [] log c; from max log P / q on the accepted are exact samples of p, below they follow p_c. Traced.

    Returns:
      What is accepted.
    """
    check_shapes("rl_bayes.accept", log_weights=(log_weights, "n"), log_c=(log_c, ""))
    log_w = dtypes.at_least_float32(log_weights)
    gap = log_w - jnp.asarray(log_c).astype(log_w.dtype)
    mask = jnp.log(jax.random.uniform(key, log_w.shape, log_w.dtype)) < gap  # log 0 = -inf is accepted unless P is 0
    mean = lambda x: jnp.mean(x.astype(log_w.dtype))  # noqa: E731
    return Accepted(mask=mask, rate=mean(mask), exceeded=mean(gap > 0))


class Rejection(NamedTuple):
    """Samples that were accepted, in the order in which they came.

    Attributes:
      samples: Tree of [s ...]; places from `num_accepted` on hold zeros.
      num_accepted: [] int32, at most s.
      num_proposed: [] int32, proposals made.
      rate: [] share of the proposals that were accepted: estimates Z_c / c.
      exceeded: [] int32, proposals with P > c q.
    """

    samples: Any
    num_accepted: jax.Array
    num_proposed: jax.Array
    rate: jax.Array
    exceeded: jax.Array


def rejection_sample(
    propose_fn: Callable[[jax.Array], tuple[Any, jax.Array]],
    key: jax.Array,
    *,
    log_c: ArrayLike,
    num_samples: int,
    max_rounds: int,
) -> Rejection:
    """Draws batches from q until enough are accepted, or `max_rounds` are over; see `accept`.

    Args:
      propose_fn: key -> (tree of [n ...] samples of q, log_weights [n]). Static.
      key: [] typed key; round i uses fold_in(key, i).
      log_c: [] see `accept`. Traced.
      num_samples: s, how many are wanted. Static.
      max_rounds: Most batches. Static.

    Returns:
      The samples, fewer than s if `max_rounds` did not suffice: none at all is no error.

    Raises:
      ValueError: if a number is below one.
    """
    for name, value in (("num_samples", num_samples), ("max_rounds", max_rounds)):
        if value < 1:
            raise ValueError(f"rl_bayes.rejection_sample: {name!r} is {value}, expected at least 1")
    shapes, weights = jax.eval_shape(propose_fn, key)
    check_shapes("rl_bayes.rejection_sample", **{"log_weights of propose_fn": (weights, "n")})
    buffer = jax.tree.map(lambda x: jnp.zeros((num_samples, *x.shape[1:]), x.dtype), shapes)

    def go_on(carry: tuple[jax.Array, jax.Array, jax.Array, jax.Array, Any]) -> jax.Array:
        step, filled = carry[:2]
        return (step < max_rounds) & (filled < num_samples)

    def body(carry: tuple[jax.Array, jax.Array, jax.Array, jax.Array, Any]) -> tuple[Any, ...]:
        step, filled, accepted, exceeded, buffer = carry
        key_propose, key_accept = jax.random.split(jax.random.fold_in(key, step))
        batch, log_w = propose_fn(key_propose)
        mask = accept(key_accept, log_w, log_c=log_c).mask
        rank = filled + jnp.cumsum(mask, dtype=jnp.int32) - 1
        place = jnp.where(mask, rank, num_samples)
        buffer = jax.tree.map(lambda whole, rows: whole.at[place].set(rows, mode="drop"), buffer, batch)
        count = jnp.sum(mask, dtype=jnp.int32)
        above = jnp.sum(log_w > jnp.asarray(log_c).astype(log_w.dtype), dtype=jnp.int32)
        return step + 1, jnp.minimum(filled + count, num_samples), accepted + count, exceeded + above, buffer

    zero = jnp.zeros((), jnp.int32)
    steps, filled, accepted, exceeded, buffer = jax.lax.while_loop(go_on, body, (zero, zero, zero, zero, buffer))
    proposed = steps * weights.shape[0]
    return Rejection(
        samples=buffer,
        num_accepted=filled,
        num_proposed=proposed,
        rate=accepted.astype(jnp.float32) / jnp.maximum(proposed, 1).astype(jnp.float32),
        exceeded=exceeded,
    )


class Qrs(NamedTuple):
    """Quasi-rejection sampling at one c; each [].

    Attributes:
      log_c: log c (disco calls c "beta"; it has nothing to do with the KL weight).
      rate: Acceptance Z_c / c; falls as c grows.
      tv: Total variation of p and p_c; falls as c grows.
      tv_bound: p{P > c q}, an upper bound of it.
      kl: KL(p || p_c) = log(Z_c / Z) + E_p[max(0, log(P / (c q)))]; falls as c grows.
      divergence: D_f(p_c || p) of the divergence asked for, else 0.
      log_z: log Z.
      log_z_c: log Z_c = log sum min(P, c q).
    """

    log_c: jax.Array
    rate: jax.Array
    tv: jax.Array
    tv_bound: jax.Array
    kl: jax.Array
    divergence: jax.Array
    log_z: jax.Array
    log_z_c: jax.Array


def qrs(log_weights: ArrayLike, *, log_c: ArrayLike, weights: ArrayLike | None = None, divergence: FDivergence | None = None) -> Qrs:
    """Acceptance and divergences of quasi-rejection sampling from weights of samples of q; exact over a whole space.

    Args:
      log_weights: [n] log P - log q of samples of q, or of all x (anything where q is 0).
      log_c: [] log c. Traced.
      weights: [n] summing to 1: q(x) for a whole space, None for samples.
      divergence: A further f-divergence of p_c from p.

    Returns:
      The numbers; with no weight at all, rate 0, TV 0, KL 0 and log Z -inf.
    """
    check_shapes("rl_bayes.qrs", log_weights=(log_weights, "n"), log_c=(log_c, ""), weights=(weights, "n"))
    log_w, log_c = widest(log_weights, log_c)
    share = jnp.full_like(log_w, 1 / log_w.shape[0]) if weights is None else jnp.asarray(weights).astype(log_w.dtype)
    used = (share > 0) & ~jnp.isneginf(log_w)
    log_share = jnp.log(jnp.where(used, share, jnp.ones_like(share)))
    safe = jnp.where(used, log_w, jnp.zeros_like(log_w))
    kept = jnp.minimum(safe, log_c)
    log_z, log_z_c = (logprobs.log_normalizer(jnp.where(used, log_share + x, -jnp.inf)) for x in (safe, kept))
    some = ~jnp.isneginf(log_z)
    base, base_c = (jnp.where(some, x, jnp.zeros_like(x)) for x in (log_z, log_z_c))
    p, p_c = (jnp.where(used, jnp.exp(log_share + x), jnp.zeros_like(x)) for x in (safe - base, kept - base_c))
    over = used & (safe > log_c)
    further = jnp.zeros_like(log_c)
    if divergence is not None:
        each = divergence_terms(divergence, jnp.where(used, kept - base_c, -jnp.inf), jnp.where(used, safe - base, -jnp.inf))
        further = jnp.sum(jnp.where(used, share * each, jnp.zeros_like(each)))
    return Qrs(
        log_c=log_c,
        rate=jnp.exp(log_z_c - log_c),
        tv=0.5 * jnp.sum(jnp.abs(p - p_c)),
        tv_bound=jnp.sum(jnp.where(over, p, jnp.zeros_like(p))),
        kl=jnp.where(some, base_c - base + jnp.sum(p * jnp.where(over, safe - log_c, jnp.zeros_like(safe))), jnp.zeros_like(base)),
        divergence=further,
        log_z=log_z,
        log_z_c=log_z_c,
    )


def qrs_plan(
    log_weights: ArrayLike,
    *,
    target_rate: ArrayLike | None = None,
    target_tv: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    num_iters: int = 100,
) -> Qrs:
    """The c that gives the acceptance rate, or the total variation, that is wanted, from one batch of weights, by bisection over log c.

    Args:
      log_weights: [n] as in `qrs`.
      target_rate: [] least acceptance: the largest c that has it, at most the largest weight. Traced.
      target_tv: [] greatest total variation: the smallest c that keeps it. Traced.
      weights: As in `qrs`.
      num_iters: Halvings. Static.

    Returns:
      As `qrs` at that c. Where no c attains the target the nearest end is returned, the least or largest weight: compare.

    Raises:
      ValueError: unless exactly one target is given.
    """
    if (target_rate is None) == (target_tv is None):
        raise ValueError("rl_bayes.qrs_plan: expected exactly one of 'target_rate' and 'target_tv'")
    log_w = dtypes.at_least_float32(log_weights)
    used = ~jnp.isneginf(log_w) if weights is None else ~jnp.isneginf(log_w) & (jnp.asarray(weights) > 0)
    some = jnp.any(used)
    low = jnp.where(some, jnp.min(jnp.where(used, log_w, jnp.inf)), 0.0)
    high = jnp.where(some, jnp.max(jnp.where(used, log_w, -jnp.inf)), 0.0)

    def small_enough(log_c: jax.Array) -> jax.Array:
        at = qrs(log_w, log_c=log_c, weights=weights)
        return at.rate >= jnp.asarray(target_rate).astype(at.rate.dtype) if target_rate is not None else at.tv > jnp.asarray(target_tv)

    def halve(_: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        up = small_enough(middle)
        return jnp.where(up, middle, low), jnp.where(up, high, middle)

    ends = jax.lax.fori_loop(0, num_iters, halve, (low, high))
    by_rate, by_tv = jnp.where(small_enough(high), high, ends[0]), jnp.where(small_enough(low), ends[1], low)
    log_c = by_tv if target_rate is None else by_rate
    return qrs(log_w, log_c=log_c, weights=weights)


def independence_mh(key: jax.Array, log_weights: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Independence Metropolis-Hastings over proposals in order: from state x, proposal x' is taken with probability min(1, w' / w).

    Args:
      key: [] typed key.
      log_weights: [n] log P - log q of n independent samples of q. The chain starts at the first; one without weight is left at once.

    Returns:
      [n] int32, which sample the chain is at after each proposal, and the share of the n - 1 proposals that were taken [].
    """
    check_shapes("rl_bayes.independence_mh", log_weights=(log_weights, "n"))
    return sharding.placed(_independence_mh, lambda _: jax.P(), key, log_weights)


def _independence_mh(key: jax.Array, log_weights: ArrayLike) -> tuple[jax.Array, jax.Array]:
    log_w = dtypes.at_least_float32(log_weights)
    n = log_w.shape[0]
    log_u = jnp.log(jax.random.uniform(key, (n,), log_w.dtype))

    def step(at: tuple[jax.Array, jax.Array], x: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, Any]:
        place, value = at
        index, proposed, log_u = x
        lost = jnp.isneginf(value)
        gap = jnp.where(lost, jnp.inf, proposed - jnp.where(lost, jnp.zeros_like(value), value))
        taken = log_u < gap
        new = jnp.where(taken, index, place), jnp.where(taken, proposed, value)
        return new, (new[0], taken)

    index = jnp.arange(n, dtype=jnp.int32)
    _, (places, taken) = jax.lax.scan(step, (index[0], log_w[0]), (index[1:], log_w[1:], log_u[1:]))
    return jnp.concatenate([index[:1], places]), jnp.sum(taken.astype(log_w.dtype)) / max(n - 1, 1)


def _normalised(log_w: jax.Array, total: jax.Array) -> jax.Array:
    some = ~jnp.isneginf(log_w)
    gap = jnp.where(some, jnp.where(some, log_w, jnp.zeros_like(log_w)) - jnp.where(jnp.isneginf(total), 0.0, total), 0.0)
    return jnp.where(some, jnp.exp(gap), jnp.zeros_like(gap))
