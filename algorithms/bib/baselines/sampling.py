"""CbAS: a generative model of sequences, moved by importance-weighted refits towards what the proxy scores highly (Brookes et al., arXiv:1901.10060).

    x_i ~ q_t ,   gamma_t = max(gamma_{t-1}, quantile_Q f(x_i)) ,   w_i = p_0(x_i) / q_t(x_i) P(y >= gamma_t | x_i) ,   q_{t+1} = fit(x_i, w_i)

p_0 is the model of the offline data, which the ratio keeps the search close to; without it (`ratio_power` 0) this is DbAS. The generative model is
three functions of a tree of parameters; the default treats positions as independent and is fitted in closed form.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.stats
from jax.typing import ArrayLike

from janax.algorithms.bib.baselines import _common
from janax.algorithms.bib.baselines._common import SELECTIONS, ScoreFn
from janax.algorithms.bib.baselines.designs import Designs, archive, hand_out
from janax.jaxlib_ext import checks, dtypes

__all__ = ["FitFn", "LogProbFn", "SampleFn", "cbas", "importance_weights", "site_fit", "site_log_prob", "site_refit", "site_sample"]

SampleFn = Callable[[Any, jax.Array], jax.Array]
"""(model, key) -> tokens [l]."""
LogProbFn = Callable[[Any, jax.Array], jax.Array]
"""(model, tokens [l]) -> [], nats."""
FitFn = Callable[[Any, jax.Array, jax.Array], Any]
"""(model, tokens [n l], weights [n]) -> the next model; it may start from the last one."""


# --- independent positions


def site_fit(tokens: ArrayLike, weights: ArrayLike | None = None, *, num_letters: int, smoothing: ArrayLike = 0.05) -> jax.Array:
    """Weighted maximum likelihood for independent positions: p = (1 - smoothing) frequency + smoothing / v.

    Args:
      tokens: [n l] integers.
      weights: [n] at least 0; None is equal ones. If all are 0 the model is uniform.
      num_letters: v. Static.
      smoothing: [] in (0, 1]; keeps every letter possible. Traced.

    Returns:
      [l v] log-probabilities, float32 or wider.

    Raises:
      ValueError: on shapes that do not agree.
    """
    name = "baselines.site_fit"
    tokens = _common.sequences(name, "tokens", tokens, num_letters)
    checks.check_shapes(name, tokens=(tokens, "n l"), weights=(weights, "n"))
    uniform = jnp.full((tokens.shape[1], num_letters), -jnp.log(jnp.asarray(float(num_letters))))
    weights = jnp.ones(tokens.shape[0], uniform.dtype) if weights is None else dtypes.at_least_float32(weights)
    return site_refit(uniform.astype(weights.dtype), tokens, weights, smoothing=smoothing)


def site_refit(model: jax.Array, tokens: jax.Array, weights: jax.Array, *, smoothing: ArrayLike = 0.05) -> jax.Array:
    """As `site_fit`, with the former model [l v] in place of the uniform one if no weight is above 0; a `FitFn`."""
    hits = jax.nn.one_hot(tokens, model.shape[-1], dtype=weights.dtype)
    total = jnp.sum(weights)
    frequency = jnp.einsum("n,nlv->lv", weights, hits) / jnp.where(total > 0, total, 1)
    share = jnp.asarray(smoothing).astype(weights.dtype)
    fitted = jnp.log((1 - share) * frequency + share / model.shape[-1])
    return jnp.where(total > 0, fitted.astype(model.dtype), model)


def site_sample(model: jax.Array, key: jax.Array) -> jax.Array:
    """One sequence [l] of the model [l v]; a `SampleFn`."""
    return jax.random.categorical(key, model, axis=-1).astype(jnp.int32)


def site_log_prob(model: jax.Array, tokens: jax.Array) -> jax.Array:
    """log p(tokens [l]) under the model [l v], in nats; a `LogProbFn`."""
    return jnp.sum(jnp.take_along_axis(model, tokens[:, None], axis=-1))


# --- the method


def importance_weights(
    log_prior: ArrayLike,
    log_model: ArrayLike,
    predicted: ArrayLike,
    level: ArrayLike,
    *,
    spread: ArrayLike = 0.0,
    ratio_power: ArrayLike = 1.0,
    weight_power: ArrayLike = 1.0,
) -> jax.Array:
    """w = [(p_0 / q)^ratio_power P(y >= level | x)]^weight_power with P = Phi((predicted - level) / spread), over the largest of them.

    Args:
      log_prior: [n] log p_0(x), nats.
      log_model: [n] log q(x) of the model that x was drawn from, nats.
      predicted: [n] mean of y given x.
      level: [] gamma.
      spread: [] or [n] standard deviation of y given x; where it is 0, P is 1 from the level on and 0 below.
      ratio_power: [] 1 is CbAS, 0 is DbAS. Traced.
      weight_power: [] Traced.

    Returns:
      [n] in [0, 1], the largest 1 unless all are 0; float32 or wider.

    Raises:
      ValueError: on shapes that do not agree.

    Reference: arXiv:1901.10060.
    """
    name = "baselines.importance_weights"
    checks.check_shapes(name, log_prior=(log_prior, "n"), log_model=(log_model, "n"), predicted=(predicted, "n"), level=(level, ""))
    predicted = dtypes.at_least_float32(predicted)
    dtype = predicted.dtype
    level, deviation, ratio, power = (jnp.asarray(x).astype(dtype) for x in (level, spread, ratio_power, weight_power))
    deviation = jnp.broadcast_to(deviation, predicted.shape)
    soft = jax.scipy.stats.norm.logcdf((predicted - level) / jnp.where(deviation > 0, deviation, 1))
    hard = jnp.where(predicted >= level, jnp.zeros_like(predicted), -jnp.inf)
    log_w = ratio * (jnp.asarray(log_prior).astype(dtype) - jnp.asarray(log_model).astype(dtype)) + jnp.where(deviation > 0, soft, hard)
    log_w = power * log_w
    largest = jnp.max(log_w)
    return jnp.exp(log_w - jnp.where(jnp.isneginf(largest), jnp.zeros_like(largest), largest))


def cbas(
    score_fn: ScoreFn,
    params: Any,
    key: jax.Array,
    prior: Any,
    *,
    num_letters: int,
    num_designs: int = 128,
    num_iters: int = 20,
    num_samples: int = 1024,
    quantile: ArrayLike = 0.9,
    spread: ArrayLike | ScoreFn = 0.0,
    ratio_power: ArrayLike = 1.0,
    weight_power: ArrayLike = 1.0,
    sample_fn: SampleFn = site_sample,
    log_prob_fn: LogProbFn = site_log_prob,
    fit_fn: FitFn = site_refit,
    select: str = "last",
    batch_size: int | None = None,
) -> Designs:
    """Conditioning by adaptive sampling; the designs are samples of the last model.

    Args:
      score_fn: (params, x [l v]) -> [].
      params: Its parameters.
      key: Typed key.
      prior: p_0, the generative model of the offline data: `site_fit(tokens)`, or the parameters of your own.
      num_letters: v. Static.
      num_designs: m <= num_samples. Static.
      num_iters: Refits. Static.
      num_samples: n of each iteration. Static.
      quantile: [] Q in (0, 1) of the predictions that sets the level, which never falls. Traced.
      spread: [] standard deviation s of y given x, P(y >= gamma | x) = Phi((f(x) - gamma) / s), or (params, x) -> [] for one per design; 0 is a
        threshold. Traced, or static if a function.
      ratio_power: [] power of p_0 / q_t: 1 is CbAS, 0 is DbAS. Traced.
      weight_power: [] power of the whole weight; design-baselines has 0.2, which flattens it. Traced.
      sample_fn: (model, key) -> tokens [l]. Static.
      log_prob_fn: (model, tokens [l]) -> []. Static.
      fit_fn: (model, tokens [n l], weights [n]) -> model; the weights are at most 1 and may all be 0. Static.
      select: One of `SELECTIONS`. Static.
      batch_size: Sequences scored at a time; None is all. Static.

    Returns:
      `Designs` with a trajectory [num_iters + 1 m]: m samples of each model.

    Raises:
      ValueError: on sizes out of range or an unknown option.

    Reference: arXiv:1901.10060; weights as in its equation for conditioning on the set y >= gamma_t.
    """
    name = "baselines.cbas"
    checks.one_of(name, "select", select, SELECTIONS)
    _common.at_least(name, 1, num_designs=num_designs)
    _common.at_least(name, 0, num_iters=num_iters)
    _common.at_least(name, 2, num_letters=num_letters)
    _common.at_most(name, "num_designs", num_designs, "num_samples", num_samples)
    dtype = _common.row_dtype(params)

    def draw(model: Any, key_draw: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens = jax.vmap(sample_fn, in_axes=(None, 0))(model, jax.random.split(key_draw, num_samples)).astype(jnp.int32)
        return tokens, _common.predict(score_fn, params, tokens, num_letters, batch_size)

    def deviation(tokens: jax.Array) -> ArrayLike:
        spread_fn = spread
        if not callable(spread_fn):
            return spread_fn
        return jax.vmap(lambda s: _common.scalar(spread_fn, params, jax.nn.one_hot(s, num_letters, dtype=dtype)))(tokens)

    log_probs = jax.vmap(log_prob_fn, in_axes=(None, 0))

    def step(carry: tuple, key_step: jax.Array) -> tuple[tuple, jax.Array]:
        model, level, visited = carry
        tokens, predicted = draw(model, key_step)
        if select != "last":
            visited = archive(tokens, predicted, num_designs, visited)
        level = jnp.maximum(level, jnp.quantile(predicted, jnp.asarray(quantile).astype(predicted.dtype)))
        weights = importance_weights(
            log_probs(prior, tokens),
            log_probs(model, tokens),
            predicted,
            level,
            spread=deviation(tokens),
            ratio_power=ratio_power,
            weight_power=weight_power,
        )
        return (fit_fn(model, tokens, weights), level, visited), predicted[:num_designs]

    key_first, key_steps, key_last = jax.random.split(key, 3)
    visited = None if select == "last" else archive(*draw(prior, key_first), num_designs)
    level = jnp.full((), -jnp.inf, jax.eval_shape(draw, prior, key_last)[1].dtype)
    (model, _, visited), path = jax.lax.scan(step, (prior, level, visited), jax.random.split(key_steps, num_iters))
    tokens, predicted = draw(model, key_last)
    if select != "last":
        visited = archive(tokens, predicted, num_designs, visited)
    tokens, predicted = tokens[:num_designs], predicted[:num_designs]
    return hand_out(select, tokens, predicted, visited, jnp.concatenate([path, predicted[None]]))
