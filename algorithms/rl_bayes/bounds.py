"""Certified statements about log Z and about divergences from p, from samples: bounds from both sides, with standard errors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import dtypes
from janax.jaxlib_ext.checks import check_shapes
from janax.jaxlib_ext.divergence.numerics import widest

__all__ = ["KlEstimate", "Sandwich", "kl_from_samples", "sandwich"]


class Sandwich(NamedTuple):
    """log Z from both sides; each [...].

    Attributes:
      lower: Mean of log Z estimates from the algorithm, at most log Z in expectation.
      upper: Mean of those with an exact sample planted, at least log Z in expectation.
      lower_error: Standard error of the mean.
      upper_error: Standard error of the mean.
      midpoint: (lower + upper) / 2.
      gap: upper - lower, which bounds the symmetrised KL of one returned sample and p.
    """

    lower: jax.Array
    upper: jax.Array
    lower_error: jax.Array
    upper_error: jax.Array
    midpoint: jax.Array
    gap: jax.Array


def sandwich(lower: ArrayLike, upper: ArrayLike) -> Sandwich:
    """Bidirectional bounds from runs of `smc` without and with planted exact samples.

    Args:
      lower: [... s] log Z of s runs.
      upper: [... s] log Z of s runs, each with its own exact sample of p planted; samples of a trained policy give no bound.

    Returns:
      The bounds over the last axis; -inf below if a run has lost all particles.

    Reference: Zhao et al., arXiv:2404.17546, Prop. 5.1.
    """
    check_shapes("rl_bayes.sandwich", lower=(lower, "... s"), upper=(upper, "... z"))
    (low, low_error), (high, high_error) = (_mean_and_error(dtypes.at_least_float32(x)) for x in (lower, upper))
    return Sandwich(lower=low, upper=high, lower_error=low_error, upper_error=high_error, midpoint=0.5 * (low + high), gap=high - low)


class KlEstimate(NamedTuple):
    """Both directions; each [].

    Attributes:
      q_p: KL(q || p); inf if a sample of q has P = 0.
      p_q: KL(p || q).
      q_p_error: Standard error, for the given log Z.
      p_q_error: Standard error, for the given log Z.
    """

    q_p: jax.Array
    p_q: jax.Array
    q_p_error: jax.Array
    p_q_error: jax.Array


def kl_from_samples(
    log_target_q: ArrayLike, log_q_q: ArrayLike, log_target_p: ArrayLike, log_q_p: ArrayLike, *, log_z: ArrayLike
) -> KlEstimate:
    """KL(q || p) = E_q[log q - log P] + log Z and KL(p || q) = E_p[log P - log q] - log Z, for a q with a density (a policy, a proposal).

    Args:
      log_target_q: [n] log P of samples of q.
      log_q_q: [n] log q of the same.
      log_target_p: [k] log P of EXACT samples of p; samples of an approximation do not do.
      log_q_p: [k] log q of the same.
      log_z: [] log Z, e.g. the midpoint of `sandwich`: its error enters the two with opposite signs. Traced.

    Returns:
      The estimates, nats.

    Reference: Zhao et al., arXiv:2404.17546, section 5.
    """
    check_shapes(
        "rl_bayes.kl_from_samples",
        log_target_q=(log_target_q, "n"),
        log_q_q=(log_q_q, "n"),
        log_target_p=(log_target_p, "k"),
        log_q_p=(log_q_p, "k"),
        log_z=(log_z, ""),
    )
    target_q, q_q, target_p, q_p, log_z = widest(log_target_q, log_q_q, log_target_p, log_q_p, log_z)
    (reverse, reverse_error), (forward, forward_error) = (_mean_and_error(x) for x in (q_q - target_q, target_p - q_p))
    return KlEstimate(q_p=reverse + log_z, p_q=forward - log_z, q_p_error=reverse_error, p_q_error=forward_error)


def _mean_and_error(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    n = x.shape[-1]
    mean = jnp.mean(x, axis=-1)
    finite = jnp.isfinite(mean)
    gap = jnp.where(finite[..., None], x - jnp.where(finite, mean, jnp.zeros_like(mean))[..., None], jnp.zeros_like(x))
    return mean, jnp.where(finite, jnp.sqrt(jnp.sum(jnp.square(gap), axis=-1) / max(n - 1, 1) / n), jnp.inf)
