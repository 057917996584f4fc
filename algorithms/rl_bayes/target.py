"""Targets: p(x) = pi0(x) exp(phi(x)) / Z, the modelling half; every method of inference needs log pi0 and the log-potential phi only.

    target = exp_reward(reward_fn, beta=0.5)                       # phi = r / beta: the optimum of E_pi[r] - beta KL(pi || pi0)
    target = product(constraint(accept_fn), target)                # phi = log b + r / beta
    fit = fit_lambdas(features, moments, log_weights)              # min KL(c || pi0) subject to E_c[features] = moments
    target = linear(features_fn, fit.lambdas)                      # phi = lambda . features
    log_target = log_unnormalised(target, log_prior, x)            # log P(x); -inf where a constraint is violated

What x is, is between the caller and the functions; samplers and spaces of this package hand over `Sequences`. The functions take a whole
batch of x and give one number each. Reference: Korbak et al., arXiv:2205.11275, sections 4 and 5; Khalifa et al., arXiv:2012.11635.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import dtypes, logprobs
from janax.jaxlib_ext.checks import check_shapes, one_of
from janax.jaxlib_ext.divergence.numerics import widest

__all__ = [
    "Sequences",
    "Target",
    "classifier",
    "constraint",
    "exp_reward",
    "infilling",
    "linear",
    "log_potential",
    "log_unnormalised",
    "product",
    "tempered",
    "uncertain_reward",
]


class Sequences(NamedTuple):
    """Token sequences of different lengths.

    Attributes:
      tokens: [... t] ids; what stands from `num_tokens` on is padding.
      num_tokens: [...] tokens of each sequence, its end-of-sequence token included.
    """

    tokens: jax.Array
    num_tokens: jax.Array

    @property
    def mask(self) -> jax.Array:
        """[... t] whether a token counts."""
        steps = jax.lax.broadcasted_iota(jnp.int32, jnp.shape(self.tokens), jnp.ndim(self.tokens) - 1)
        return steps < jnp.asarray(self.num_tokens).astype(jnp.int32)[..., None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """log P(x) = prior_power log pi0(x) + sum of terms fn(params, x[, context]).

    A pytree: rewards' parameters, beta and lambdas are leaves, so a sweep over beta is a `vmap` over targets.

    Attributes:
      terms: Functions (params, x) -> [...], or (params, x, context) -> [...] where a context is given; -inf is allowed. Static.
      params: Their parameters, one entry per term.
      prior_power: [] 1 but for tempered targets.
    """

    terms: tuple[Callable[..., jax.Array], ...] = dataclasses.field(metadata={"static": True})
    params: tuple[Any, ...]
    prior_power: Any = 1.0


def log_potential(target: Target, x: Any, context: Any = None, *, log_prior: ArrayLike | None = None) -> jax.Array:
    """phi(x) = log P(x) - log pi0(x).

    Args:
      target: The target.
      x: Whatever its functions take, a whole batch.
      context: Handed to the functions if not None. Targets of several contexts: `jax.vmap` over x and context.
      log_prior: [...] log pi0(x), wanted if the target is tempered.

    Returns:
      [...] float32 or wider, -inf where P is zero.

    Raises:
      ValueError: if the terms differ in shape.
    """
    total = None
    for term, params in zip(target.terms, target.params):
        value = dtypes.at_least_float32(term(params, x) if context is None else term(params, x, context))
        if total is not None and total.shape != value.shape:
            raise ValueError(f"rl_bayes.log_potential: a term has shape {value.shape}, expected {total.shape} as the first")
        total = value if total is None else jnp.add(*widest(total, value))
    plain = isinstance(target.prior_power, float) and target.prior_power == 1.0
    if log_prior is not None and not plain:
        extra = dtypes.at_least_float32(log_prior)
        possible = ~jnp.isneginf(extra)
        power = jnp.asarray(target.prior_power).astype(extra.dtype) - 1
        extra = jnp.where(possible, power * jnp.where(possible, extra, jnp.zeros_like(extra)), jnp.zeros_like(extra))
        total = extra if total is None else jnp.add(*widest(total, extra))
    if total is None:
        raise ValueError("rl_bayes.log_potential: 'target' is tempered and has no terms, expected 'log_prior'")
    return total


def log_unnormalised(target: Target, log_prior: ArrayLike, x: Any, context: Any = None) -> jax.Array:
    """log P(x) = log pi0(x) + phi(x) [...]; -inf where either is. Arguments as in `log_potential`."""
    phi = log_potential(target, x, context, log_prior=log_prior)
    return jnp.add(*widest(log_prior, phi))


def exp_reward(reward_fn: Callable[..., jax.Array], *, beta: ArrayLike, params: Any = None) -> Target:
    """P = pi0 exp(r / beta), the optimum of E_pi[r] - beta KL(pi || pi0).

    Args:
      reward_fn: (params, x[, context]) -> [...] rewards. Static.
      beta: [] > 0, in units of the reward. Traced.
      params: Parameters of the reward.
    """
    return Target(terms=(_Scaled(reward_fn),), params=((params, 1.0, beta),))


def constraint(accept_fn: Callable[..., jax.Array], *, params: Any = None) -> Target:
    """P = pi0 b with b in {0, 1} (or booleans), 1 for what is acceptable: ratios of acceptable x stay those of pi0; KL(p || pi0) = -log Z."""
    return Target(terms=(_Accepted(accept_fn),), params=(params,))


def classifier(log_prob_fn: Callable[..., jax.Array], *, inverse_temperature: ArrayLike = 1.0, params: Any = None) -> Target:
    """P = pi0 p(attribute | x)^inverse_temperature; log_prob_fn: (params, x[, context]) -> [...] log p(attribute | x)."""
    return Target(terms=(_Scaled(log_prob_fn),), params=((params, inverse_temperature, 1.0),))


def infilling(suffix_log_prob_fn: Callable[..., jax.Array], *, params: Any = None) -> Target:
    """P = pi0(x) pi0(suffix | x): what may stand before a given suffix; the function gives log pi0(suffix | x)."""
    return classifier(suffix_log_prob_fn, params=params)


def linear(features_fn: Callable[..., jax.Array], lambdas: ArrayLike, *, params: Any = None) -> Target:
    """P = pi0 exp(lambda . features), the form of every moment-constrained target.

    Args:
      features_fn: (params, x[, context]) -> [... k]. Static.
      lambdas: [k] from `fit_lambdas`. Traced.
      params: Parameters of the features.
    """
    return Target(terms=(_Linear(features_fn),), params=((params, lambdas),))


def tempered(power: ArrayLike) -> Target:
    """P = pi0^power; with `product`, pi0^power exp(phi). Multiplying several, their powers minus 1 add."""
    return Target(terms=(), params=(), prior_power=power)


def uncertain_reward(reward_fn: Callable[..., jax.Array], *, beta: ArrayLike, kind: str = "lower", params: Any = None) -> Target:
    """A target that trusts a reward less where an ensemble disagrees.

    Args:
      reward_fn: (params, x[, context]) -> [... k], the rewards of k members. Static.
      beta: [] > 0. Traced.
      kind: "lower": phi = mean r / beta - var r / (2 beta^2), with the population variance; "evidence": phi = log mean exp(r / beta). Static.
      params: Parameters of the ensemble.

    Raises:
      ValueError: on an unknown kind.
    """
    one_of("rl_bayes.uncertain_reward", "kind", kind, ("lower", "evidence"))
    return Target(terms=(_Ensemble(reward_fn, kind),), params=((params, beta),))


def product(*targets: Target) -> Target:
    """The product of experts: potentials add, terms of all.

    Raises:
      ValueError: without targets.
    """
    if not targets:
        raise ValueError("rl_bayes.product: no target given, expected at least one")
    power = targets[0].prior_power
    for one in targets[1:]:
        power = power + one.prior_power - 1.0
    return Target(
        terms=tuple(term for one in targets for term in one.terms),
        params=tuple(params for one in targets for params in one.params),
        prior_power=power,
    )


@dataclasses.dataclass(frozen=True)
class _Scaled:
    fn: Callable[..., jax.Array]

    def __call__(self, params: Any, *args: Any) -> jax.Array:
        params, factor, divisor = params
        value = dtypes.at_least_float32(self.fn(params, *args))
        return value * jnp.asarray(factor).astype(value.dtype) / jnp.asarray(divisor).astype(value.dtype)


@dataclasses.dataclass(frozen=True)
class _Accepted:
    fn: Callable[..., jax.Array]

    def __call__(self, params: Any, *args: Any) -> jax.Array:
        accepted = jnp.asarray(self.fn(params, *args)).astype(bool)
        return jnp.where(accepted, 0.0, -jnp.inf).astype(dtypes.floor_dtype(jnp.result_type(float)))


@dataclasses.dataclass(frozen=True)
class _Linear:
    fn: Callable[..., jax.Array]

    def __call__(self, params: Any, *args: Any) -> jax.Array:
        params, lambdas = params
        features, lambdas = widest(self.fn(params, *args), lambdas)
        check_shapes("rl_bayes.linear", features=(features, "... k"), lambdas=(lambdas, "k"))
        return jnp.tensordot(features, lambdas, axes=1)


@dataclasses.dataclass(frozen=True)
class _Ensemble:
    fn: Callable[..., jax.Array]
    kind: str

    def __call__(self, params: Any, *args: Any) -> jax.Array:
        params, beta = params
        rewards = dtypes.at_least_float32(self.fn(params, *args))
        scaled = rewards / jnp.asarray(beta).astype(rewards.dtype)
        if self.kind == "evidence":
            return logprobs.log_normalizer(scaled) - jnp.log(jnp.asarray(scaled.shape[-1], scaled.dtype))
        return jnp.mean(scaled, axis=-1) - 0.5 * jnp.var(scaled, axis=-1)
