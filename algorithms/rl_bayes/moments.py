"""Moment constraints (GDC): the multipliers of min KL(c || pi0) subject to E_c[features] = moments; and beta for a given divergence."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from janax.jaxlib_ext import dtypes, logprobs, sharding
from janax.jaxlib_ext.checks import check_shapes
from janax.jaxlib_ext.divergence.numerics import widest

__all__ = ["MomentFit", "beta_for_kl", "fit_lambdas"]


class MomentFit(NamedTuple):
    """How moment constraints came out.

    Attributes:
      lambdas: [k] multipliers; always finite, meaningful if `feasible`.
      log_z: [] log E_pi0[exp(lambda . features)] under the normalised weights.
      kl: [] KL(p || pi0) = lambda . moments - log Z, nats.
      moments: [k] what p has.
      prior_moments: [k] what pi0 has.
      error: [] largest |moments - wanted|.
      ess: [] effective number of points under p, at most n; of samples, below some tens nothing here is reliable.
      feasible: [] whether the constraints can be met and are: the wanted moments lie inside the convex hull of the points' features.
      occurs: [k] whether a feature varies among the points with weight.
      iterations: [] int32.
    """

    lambdas: jax.Array
    log_z: jax.Array
    kl: jax.Array
    moments: jax.Array
    prior_moments: jax.Array
    error: jax.Array
    ess: jax.Array
    feasible: jax.Array
    occurs: jax.Array
    iterations: jax.Array


def fit_lambdas(
    features: ArrayLike,
    moments: ArrayLike,
    log_weights: ArrayLike | None = None,
    *,
    tolerance: ArrayLike | None = None,
    max_iters: int = 100,
) -> MomentFit:
    """The I-projection: min KL(c || pi0) subject to E_c[features] = moments, whose solution is pi0 exp(lambda . features) / Z.

    Maximises the concave dual lambda . mu - log Z(lambda) by Newton's method, each step shortened by log(1 + d) / d with d its range over the
    points, which converges from anywhere. Features are whitened first; of affinely dependent ones the least multipliers are taken. Outside
    the hull of the points lambda diverges: `feasible` is False then, and on the hull's boundary too (a feature that must always be 1 is a
    `constraint`, not a moment).

    Args:
      features: [n k] features of the points: all x of a space, or samples.
      moments: [k] wanted moments. Traced.
      log_weights: [n] log pi0(x) for a whole space; log pi0(x) - log q(x) for samples of q; None if they come from pi0. -inf leaves one out.
      tolerance: [] largest error of a whitened moment; by default 1e-12 in float64, 1e-5 in float32. Traced.
      max_iters: Most Newton steps. Static.

    Returns:
      The fit. One problem per call: batch with `jax.vmap`, over moments or over contexts. Lambdas are differentiable in all arrays.

    Raises:
      ValueError: if shapes do not agree.

    Reference: Khalifa et al., arXiv:2012.11635, section 2.2; their code takes plain gradient steps.
    """
    name = "rl_bayes.fit_lambdas"
    check_shapes(name, features=(features, "n k"), moments=(moments, "k"), log_weights=(log_weights, "n"), tolerance=(tolerance, ""))
    return sharding.placed(functools.partial(_fit, max_iters), lambda _: jax.P(), features, moments, log_weights, tolerance)


def _fit(max_iters: int, features: ArrayLike, moments: ArrayLike, log_weights: ArrayLike | None, tolerance: ArrayLike | None) -> MomentFit:
    features, moments, log_w = widest(
        features, moments, np.zeros(np.shape(features)[0], np.float32) if log_weights is None else log_weights
    )
    dtype, k = features.dtype, features.shape[1]
    tol = jnp.asarray((1e-12 if dtype == jnp.float64 else 1e-5) if tolerance is None else tolerance).astype(dtype)
    kept = ~jnp.isneginf(log_w)
    log_w = jnp.where(kept, log_w - logprobs.log_normalizer(log_w), -jnp.inf)
    features = jnp.where(kept[:, None], features, jnp.zeros_like(features))

    frozen = jax.tree.map(jax.lax.stop_gradient, (features, moments, log_w))
    chart = _whiten(frozen[0], kept)
    beside = _dot(frozen[1] - chart.centre, chart.to_frame)
    in_span = jnp.all(chart.varies | (jnp.abs(beside) <= jnp.maximum(tol, 64 * k * float(jnp.finfo(dtype).eps))))
    wanted = _dot(frozen[1] - chart.centre, chart.to_white)
    coefficients, last, iterations = _newton(chart, wanted, frozen[2], tol, max_iters)
    # On the boundary of the hull the error vanishes too, but so does the variance across the face.
    inside = (last.error <= 10 * tol) & (last.curvature > (1e-13 if dtype == jnp.float64 else 1e-6))
    feasible = jnp.any(kept) & in_span & inside

    # One step more, with frozen curvature, carries the derivatives: d lambda = Cov^-1 (d mu - d E[features]).
    lambdas = _dot(chart.to_white, coefficients)
    residual = moments - _dot(_tilted(features, log_w, lambdas)[0], features)
    correction = _dot(chart.to_white, _dot(last.inverse, _dot(chart.to_white.T, residual)))
    lambdas = lambdas + jnp.where(feasible, correction, jnp.zeros_like(correction))

    p, log_z = _tilted(features, log_w, lambdas)
    prior, _ = _tilted(features, log_w, jnp.zeros_like(lambdas))
    reached, square = _dot(p, features), jnp.sum(jnp.square(p))
    return MomentFit(
        lambdas=lambdas,
        log_z=log_z,
        kl=jnp.sum(lambdas * reached) - log_z,
        moments=reached,
        prior_moments=_dot(prior, features),
        error=jnp.max(jnp.abs(reached - moments)),
        ess=jnp.where(square > 0, 1 / jnp.where(square > 0, square, jnp.ones_like(square)), jnp.zeros_like(square)),
        feasible=feasible,
        occurs=chart.occurs,
        iterations=iterations,
    )


class _Chart(NamedTuple):
    """Coordinates in which the points with weight have mean zero and unit covariance; white = (features - centre) to_white."""

    white: jax.Array
    centre: jax.Array
    to_white: jax.Array
    to_frame: jax.Array
    varies: jax.Array
    occurs: jax.Array


class _Last(NamedTuple):
    """A Newton step and what it says about where it starts."""

    step: jax.Array
    error: jax.Array
    reach: jax.Array
    curvature: jax.Array
    inverse: jax.Array


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def _tilted(features: jax.Array, log_w: jax.Array, lambdas: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The distribution w exp(lambda . features) / Z over the points, and log Z; zeros and -inf if no point has weight."""
    kept = ~jnp.isneginf(log_w)
    logits = jnp.where(kept, jnp.where(kept, log_w, jnp.zeros_like(log_w)) + _dot(features, lambdas), -jnp.inf)
    log_z = logprobs.log_normalizer(logits)
    some = jnp.where(jnp.isneginf(log_z), jnp.zeros_like(log_z), log_z)
    return jnp.where(kept, jnp.exp(jnp.where(kept, logits - some, jnp.zeros_like(logits))), jnp.zeros_like(logits)), log_z


def _whiten(features: jax.Array, kept: jax.Array) -> _Chart:
    eps, k = float(jnp.finfo(features.dtype).eps), features.shape[1]
    count = jnp.maximum(jnp.sum(kept), 1).astype(features.dtype)
    centre = jnp.sum(features, axis=0) / count
    spread = jnp.where(kept[:, None], features - centre[None], jnp.zeros_like(features))
    scale = jnp.sqrt(jnp.sum(jnp.square(spread), axis=0) / count)
    occurs = scale > 8 * eps * jnp.maximum(jnp.abs(centre), jnp.ones_like(centre))
    scale = jnp.where(occurs, scale, jnp.ones_like(scale))
    spread = jnp.where(occurs[None], spread / scale[None], jnp.zeros_like(spread))
    values, vectors = jnp.linalg.eigh(_dot(spread.T, spread) / count)
    varies = values > 64 * k * eps
    root = jnp.where(varies, jax.lax.rsqrt(jnp.where(varies, values, jnp.ones_like(values))), jnp.zeros_like(values))
    rotation = vectors * root[None]
    return _Chart(_dot(spread, rotation), centre, rotation / scale[:, None], vectors / scale[:, None], varies, occurs)


def _newton(chart: _Chart, wanted: jax.Array, log_w: jax.Array, tol: jax.Array, max_iters: int) -> tuple[jax.Array, _Last, jax.Array]:
    kept, tiny = ~jnp.isneginf(log_w), float(jnp.finfo(wanted.dtype).tiny) * 1e8
    null = jnp.sum(~chart.varies, dtype=jnp.int32)
    counts = (
        jnp.arange(wanted.shape[0], dtype=jnp.int32) >= null
    )  # eigenvalues ascend, and the first ones belong to directions without variance

    def look(coefficients: jax.Array) -> _Last:
        p, _ = _tilted(chart.white, log_w, coefficients)
        mean = _dot(p, chart.white)
        centred, gradient = chart.white - mean[None], wanted - mean
        lengths, axes = jnp.linalg.eigh(_dot((p[:, None] * centred).T, centred))
        usable = counts & (lengths > tiny)
        inverse = _dot(
            axes * jnp.where(usable, 1 / jnp.where(usable, lengths, jnp.ones_like(lengths)), jnp.zeros_like(lengths))[None], axes.T
        )
        step = _dot(inverse, gradient)
        along = _dot(chart.white, step)
        reach = jnp.max(jnp.where(kept, along, -jnp.inf), initial=-jnp.inf) - jnp.min(jnp.where(kept, along, jnp.inf), initial=jnp.inf)
        far = jnp.isfinite(reach) & (reach > 1e-12)
        d = jnp.where(far, reach, jnp.ones_like(reach))
        step = jnp.where(far, jnp.log1p(d) / d, jnp.ones_like(d)) * step
        return _Last(
            step=jnp.where(jnp.all(jnp.isfinite(step)), step, jnp.zeros_like(step)),
            error=jnp.max(jnp.abs(gradient), initial=0.0),
            reach=jnp.where(jnp.isfinite(reach), reach, jnp.zeros_like(reach)),
            curvature=jnp.min(jnp.where(counts, lengths, jnp.inf), initial=jnp.inf),
            inverse=inverse,
        )

    def go_on(carry: tuple[jax.Array, jax.Array, _Last]) -> jax.Array:
        iteration, _, last = carry
        return (iteration < max_iters) & ((last.error > tol) | (last.reach > jnp.sqrt(tol)))

    def body(carry: tuple[jax.Array, jax.Array, _Last]) -> tuple[jax.Array, jax.Array, _Last]:
        iteration, coefficients, last = carry
        coefficients = coefficients + last.step
        return iteration + 1, coefficients, look(coefficients)

    start = jnp.zeros_like(wanted)
    iterations, coefficients, last = jax.lax.while_loop(go_on, body, (jnp.zeros((), jnp.int32), start, look(start)))
    return coefficients, last, iterations


def beta_for_kl(rewards: ArrayLike, kl: ArrayLike, log_weights: ArrayLike | None = None, *, num_iters: int = 200) -> jax.Array:
    """The beta for which KL(p*_beta || pi0) has a given value: a point of the Pareto front of reward and divergence, where d E[r] / d KL = beta.

    Bisection over log beta; the divergence falls from -log pi0(best) to 0 as beta grows.

    Args:
      rewards: [n] rewards of all x, or of samples; -inf for what is excluded.
      kl: [] wanted divergence from the prior (without what is excluded), nats, > 0 and below the largest that there is. Traced.
      log_weights: [n] as in `fit_lambdas`.
      num_iters: Halvings. Static.

    Returns:
      [] beta; exp(-70) or exp(70) times the range of the rewards, the ends of the search, where there is none.

    Raises:
      ValueError: if shapes do not agree.
    """
    check_shapes("rl_bayes.beta_for_kl", rewards=(rewards, "n"), kl=(kl, ""), log_weights=(log_weights, "n"))
    rewards = dtypes.at_least_float32(rewards)
    wanted = jnp.asarray(kl).astype(rewards.dtype)
    log_w = jnp.zeros_like(rewards) if log_weights is None else dtypes.at_least_float32(log_weights).astype(rewards.dtype)
    kept = ~jnp.isneginf(log_w) & ~jnp.isneginf(rewards)
    log_w = jnp.where(kept, log_w, -jnp.inf)
    log_w = jnp.where(kept, log_w - logprobs.log_normalizer(log_w), -jnp.inf)
    top = jnp.max(jnp.where(kept, rewards, -jnp.inf))
    gaps = jnp.where(kept, rewards - top, jnp.zeros_like(rewards))
    unit = -jnp.min(gaps)
    gaps = gaps / jnp.where(unit > 0, unit, jnp.ones_like(unit))

    def divergence_at(log_beta: jax.Array) -> jax.Array:
        phi = gaps * jnp.exp(-log_beta)
        p, log_z = _tilted(gaps[:, None], log_w, jnp.exp(-log_beta)[None])
        return jnp.sum(p * phi) - log_z

    def halve(_: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        more = divergence_at(middle) > wanted
        return jnp.where(more, middle, low), jnp.where(more, high, middle)

    zero = jnp.zeros_like(wanted)
    low, high = jax.lax.fori_loop(0, num_iters, halve, (zero - 70.0, zero + 70.0))
    return jnp.exp(0.5 * (low + high)) * unit
