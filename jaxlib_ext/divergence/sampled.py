"""Divergences estimated at sampled tokens, from log-probabilities: values, losses with a stated gradient, weights and control variates."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import checks
from janax.jaxlib_ext.divergence import numerics
from janax.jaxlib_ext.divergence.generators import FORWARD_KL, Generator, f, f_prime, terms

__all__ = [
    "control_variate",
    "from_behaviour",
    "from_policy",
    "from_reference",
    "importance_weights",
    "k1",
    "k2",
    "k3",
    "with_value",
]


def from_reference(generator: Generator, log_p: ArrayLike, log_q: ArrayLike) -> jax.Array:
    """f(u) at tokens sampled from q (stored, teacher's): mean and pathwise gradient are those of D_f(p || q).

    E_q[f(u)] = D_f and E_q[u f'(u) grad log p] = grad D_f, exactly. With FORWARD_KL the term is u - 1 - l, with gradient (u - 1) grad log p:
    the cross-entropy -l with the control variate u - 1, zero where p = q.

    Args:
      generator: f.
      log_p: [...] log-probabilities of the sampled tokens under p, differentiated.
      log_q: [...] under q; a constant.

    Returns:
      [...] one term per token, float32 or wider. Per prefix; only forward KL adds up to the divergence of whole sequences.

    Raises:
      ValueError: if the shapes differ.
    """
    return f(generator, _log_ratio("from_reference", log_p, log_q))


def from_policy(generator: Generator, log_p: ArrayLike, log_q: ArrayLike, *, baseline: ArrayLike = 0.0) -> jax.Array:
    """At tokens sampled from p: the value f(u) / u >= 0, and the score-function gradient f'(u) grad log p.

    E_p[f(u) / u] = D_f and E_p[f'(u) grad log p] = grad D_f; the value is not what is differentiated. With REVERSE_KL: value k3, gradient
    l grad log p, that of k2.

    Args:
      generator: f.
      log_p: [...] log-probabilities of the sampled tokens under p, differentiated.
      log_q: [...] under q; a constant.
      baseline: [] or [...] subtracted from f'(u), a constant that must not depend on the token (`expected_f_prime`); the expected gradient
        stays.

    Returns:
      [...] float32 or wider.

    Raises:
      ValueError: if the shapes differ.
    """
    return _score("from_policy", generator, log_p, log_q, None, baseline)


def from_behaviour(
    generator: Generator,
    log_p: ArrayLike,
    log_q: ArrayLike,
    log_behaviour: ArrayLike,
    *,
    max_weight: ArrayLike | None = None,
    baseline: ArrayLike = 0.0,
) -> jax.Array:
    """As `from_policy`, at tokens sampled from a third distribution b (the rollout's), with weights w = p / b.

    Value w f(u) / u, gradient w (f'(u) - baseline) grad log p, w a constant: both unbiased unless weights are cut.

    Args:
      generator: f.
      log_p: [...] log-probabilities under p, differentiated.
      log_q: [...] under q; a constant.
      log_behaviour: [...] under b; a constant.
      max_weight: [] cut of w; None for none. Traced.
      baseline: As in `from_policy`.

    Returns:
      [...] float32 or wider.

    Raises:
      ValueError: if the shapes differ.
    """
    weights = importance_weights(log_p, log_behaviour, max_weight=max_weight)
    return _score("from_behaviour", generator, log_p, log_q, weights, baseline)


def importance_weights(log_p: ArrayLike, log_behaviour: ArrayLike, *, max_weight: ArrayLike | None = None) -> jax.Array:
    """min(p / b, max_weight) [...], a constant for the gradient; 0 where p forbids the token."""
    weights = jax.lax.stop_gradient(numerics.exp(_log_ratio("importance_weights", log_p, log_behaviour, "log_behaviour")))
    return weights if max_weight is None else jnp.minimum(weights, jnp.asarray(max_weight).astype(weights.dtype))


def k1(log_p: ArrayLike, log_q: ArrayLike) -> jax.Array:
    """l = log p - log q at tokens sampled from p. As a value: unbiased for KL(p || q), of either sign, high variance.

    As a loss: gradient grad log p, whose mean is 0: NO regularisation. It belongs, detached, into a reward or advantage (A - beta l), where
    it gives the gradient of KL(p || q). Only p is differentiated, here and in `k2`, `k3`.
    """
    return _log_ratio("k1", log_p, log_q)


def k2(log_p: ArrayLike, log_q: ArrayLike) -> jax.Array:
    """l^2 / 2 at tokens sampled from p. As a value: biased for KL(p || q), low variance.

    As a loss: gradient l grad log p, whose mean is the gradient of KL(p || q) (reverse), unbiased.
    """
    return 0.5 * jnp.square(_log_ratio("k2", log_p, log_q))


def k3(log_p: ArrayLike, log_q: ArrayLike) -> jax.Array:
    """1 / u - 1 + l at tokens sampled from p. As a value: unbiased for KL(p || q), never negative, low variance.

    As a loss: gradient (1 - 1 / u) grad log p, whose mean is the gradient of KL(q || p): the FORWARD divergence, estimated on p's samples.
    For the value of k3 with the gradient of reverse KL: `from_policy(REVERSE_KL, ...)` or `with_value(k2(...), k3(...))`.
    """
    l = _log_ratio("k3", log_p, log_q)
    return f(FORWARD_KL, -l)


def with_value(surrogate: jax.Array, value: ArrayLike) -> jax.Array:
    """The value of `value` [...] with the gradient of `surrogate` [...] (straight-through)."""
    checks.check_shapes("with_value", surrogate=(surrogate, "..."), value=(value, "..."))
    constant = jax.lax.stop_gradient(jnp.asarray(value).astype(surrogate.dtype))
    return surrogate - jax.lax.stop_gradient(surrogate) + constant


def control_variate(
    values: ArrayLike,
    control: ArrayLike,
    *,
    coefficient: ArrayLike | None = None,
    leave_one_out: bool = True,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """values - c control, for a control of mean zero: the same mean with less variance. Couples the n samples.

    The best c is Cov(values, control) / Var(control); it is estimated from the samples and held constant. With tokens from q: values f(u),
    control u - 1. With tokens from p, for KL(p || q): values l, control 1 / u - 1, c near -1; `k3` is c = -1.

    Args:
      values: [n] one per sample, differentiated.
      control: [n] of mean zero under the distribution sampled from, differentiated.
      coefficient: [] a given c; None to estimate it. Traced.
      leave_one_out: Estimate the c of a sample from all others, which leaves the mean unbiased; otherwise one c from all, biased by O(1/n).
        Static.
      mask: [n] non-zero where a sample counts; elsewhere the result is 0.

    Returns:
      [n] float32 or wider. c is 0 where fewer than three samples (two for one c), or a constant control, do not determine it.

    Raises:
      ValueError: if the shapes differ.
    """
    checks.check_shapes("control_variate", values=(values, "n"), control=(control, "n"), mask=(mask, "n"))
    values, control = numerics.widest(values, control)
    kept = jnp.ones_like(values) if mask is None else jnp.asarray(mask).astype(bool).astype(values.dtype)
    values, control = (jnp.where(kept != 0, x, jnp.zeros_like(x)) for x in (values, control))
    if coefficient is not None:
        return values - jnp.asarray(coefficient).astype(values.dtype) * control
    y, x = (jax.lax.stop_gradient(z) for z in (values, control))
    n = jnp.sum(kept)
    y, x = (kept * (z - jnp.sum(z) / jnp.maximum(n, 1)) for z in (y, x))
    covariance, variance = jnp.sum(x * y), jnp.sum(x * x)
    least = 64 * float(jnp.finfo(x.dtype).eps) * variance
    if leave_one_out:
        others = n / jnp.maximum(n - 1, 1)
        covariance, variance = covariance - others * x * y, variance - others * x * x
    known = (variance > least) & (n > (2 if leave_one_out else 1))
    return values - jnp.where(known, covariance / jnp.where(known, variance, jnp.ones_like(variance)), 0.0) * control


def _log_ratio(name: str, log_p: ArrayLike, log_q: ArrayLike, other: str = "log_q") -> jax.Array:
    """log p - log q with q a constant; 0 where both forbid the token."""
    checks.check_shapes(name, **{"log_p": (log_p, "..."), other: (log_q, "...")})
    log_p, log_q = (numerics.without_infinities(x) for x in numerics.widest(log_p, log_q))
    return log_p - jax.lax.stop_gradient(log_q)


def _score(
    name: str, generator: Generator, log_p: ArrayLike, log_q: ArrayLike, weights: jax.Array | None, baseline: ArrayLike
) -> jax.Array:
    l = _log_ratio(name, log_p, log_q)
    constant = jax.tree.map(jax.lax.stop_gradient, generator)
    fixed = jax.lax.stop_gradient(l)
    score = f_prime(constant, fixed) - jax.lax.stop_gradient(jnp.asarray(baseline).astype(l.dtype))
    value = terms(constant, jnp.zeros_like(l), -fixed)  # f(u) / u
    if weights is not None:
        score, value = score * weights.astype(l.dtype), value * weights.astype(l.dtype)
    return score * (l - fixed) + value
