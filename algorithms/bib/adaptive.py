"""Adaptive-gamma and Adaptive-eta: the weight of the two losses and the learning rate, chosen by what an auxiliary model makes of the next step.

    outer   max f_aux(z')                 inner   z' = z - eta dir(gamma g_f + (1 - gamma) g_b)

Both hyper-gradients, d f_aux / d gamma and d f_aux / d eta, come in four forms:

    frozen      f_aux's gradient where the step begins, the step plain gradient descent: the public code's
    exact       its gradient where the plain step ends: exact for gradient descent
    adam        its gradient where the Adam step ends, through the moments: exact for the step that is taken
    lookahead   f_aux after K Adam steps, by a forward derivative along the whole way
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from janax.jaxlib_ext import dtypes, sharding
from janax.jaxlib_ext.checks import one_of

__all__ = [
    "RULES",
    "AdamState",
    "AdaptiveEtaState",
    "GammaState",
    "adam_direction",
    "adam_init",
    "adaptive_eta",
    "eta_update",
    "gamma_init",
    "gamma_tangent",
    "gamma_update",
    "inner_product",
]

RULES = ("frozen", "exact", "adam", "lookahead")


class AdamState(NamedTuple):
    """Moments of Adam.

    Attributes:
      m: Mean of the gradients, float32 or wider.
      v: Mean of their squares, likewise.
      count: [] int32 steps taken.
    """

    m: jax.Array
    v: jax.Array
    count: jax.Array


class GammaState(NamedTuple):
    """The weight of the forward loss, with its own Adam.

    Attributes:
      gamma: [] in [0, 1].
      adam: Moments of its hyper-gradient.
    """

    gamma: jax.Array
    adam: AdamState


def adam_init(z: ArrayLike, *, first_count: int = 0) -> AdamState:
    """Empty moments for `z`.

    Args:
      z: [...] what is optimised.
      first_count: Steps that the bias correction takes for done already; 1 is what the public BDI code does, whose first step has length
        .744 of the learning rate. Static.
    """
    zeros = jnp.zeros_like(dtypes.at_least_float32(z))
    return AdamState(zeros, zeros, sharding.scalar_like(zeros, first_count, jnp.int32))


def adam_direction(
    state: AdamState, g: jax.Array, *, b1: ArrayLike = 0.9, b2: ArrayLike = 0.999, eps: ArrayLike = 1e-8
) -> tuple[jax.Array, AdamState]:
    """mhat / (sqrt(vhat) + eps) after taking in the gradient g, without a learning rate, and the new moments.

    Args:
      state: Moments, like g.
      g: [...] gradient.
      b1: [] decay of the mean. Traced.
      b2: [] decay of the squares. Traced.
      eps: [] > 0. Traced.

    Returns:
      [...] direction in the moments' dtype, and the state.
    """
    count, g = state.count + 1, g.astype(state.m.dtype)
    b1, b2 = jnp.asarray(b1, g.dtype), jnp.asarray(b2, g.dtype)
    m, v = b1 * state.m + (1 - b1) * g, b2 * state.v + (1 - b2) * g * g
    mhat, vhat = (x / (1 - base ** count.astype(g.dtype)) for x, base in ((m, b1), (v, b2)))
    return mhat / (_root(vhat) + jnp.asarray(eps, g.dtype)), AdamState(m, v, count)


def _root(x: jax.Array) -> jax.Array:
    """sqrt with derivative 0 at 0, where the product of the chain rule is 0 and not 0 / 0."""
    some = x > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, x, 1)), 0)


def inner_product(a: Any, b: Any) -> jax.Array:
    """[] <a, b> over all leaves of two trees."""
    return jnp.asarray(sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))))


def gamma_tangent(state: AdamState, g: jax.Array, change: jax.Array, *, eps: ArrayLike = 1e-8) -> jax.Array:
    """d dir / d gamma of the Adam direction when the gradient g moves by `change` = g_f - g_b per unit of gamma.

    mhat' / (sqrt(vhat) + eps) - mhat vhat' / (2 sqrt(vhat) (sqrt(vhat) + eps)^2), mhat' and vhat' the derivatives of the corrected moments.

    Args:
      state: Moments before the step.
      g: [...] gradient.
      change: [...] its derivative.
      eps: [] Adam's. Traced.

    Returns:
      [...] derivative of the direction.
    """
    g, change = (x.astype(state.m.dtype) for x in (g, change))
    return jax.jvp(lambda g: adam_direction(state, g, eps=eps)[0], (g,), (change,))[1]


# --- gamma


def gamma_init(gamma: ArrayLike = 0.5, like: ArrayLike = 0.0) -> GammaState:
    """The state before the first step, of a design with variables `like`."""
    like = dtypes.at_least_float32(like)
    gamma = sharding.scalar_like(like, gamma, like.dtype)
    return GammaState(gamma, adam_init(gamma))


def gamma_update(state: GammaState, slope: ArrayLike, *, rate: ArrayLike = 0.1) -> GammaState:
    """One Adam step up d f_aux / d gamma, then clipped to [0, 1].

    Args:
      state: Before the step.
      slope: [] d f_aux / d gamma in any of its forms; in the frozen one -eta <g_a, g_f - g_b>.
      rate: [] learning rate of gamma. Traced.

    Returns:
      The new state; Adam makes the first move `rate` long whatever the slope's size.

    Reference: arXiv:2301.02931, official code.
    """
    direction, adam = adam_direction(state.adam, -jnp.asarray(slope, state.gamma.dtype))
    return GammaState(jnp.clip(state.gamma - rate * direction, 0, 1), adam)


# --- eta


def eta_update(
    slope: ArrayLike, base: ArrayLike = 0.1, *, meta_rate: ArrayLike = 0.01, low: ArrayLike = 1e-4, high: ArrayLike = 0.5
) -> jax.Array:
    """eta = clip(base + meta_rate d f_aux / d eta, low, high).

    Args:
      slope: [] d f_aux / d eta; in the frozen form -<g_a, dir>.
      base: [] learning rate to start from: a constant (the public code), or the last eta to accumulate. Traced.
      meta_rate: [] step. Traced.
      low: [] least eta. Traced.
      high: [] largest eta. Traced.

    Returns:
      [] eta.

    Reference: arXiv:2301.02931, official code.
    """
    return jnp.clip(base + meta_rate * jnp.asarray(slope), low, high)


class AdaptiveEtaState(NamedTuple):
    """State of `adaptive_eta`.

    Attributes:
      eta: [] the last learning rate.
      count: [] int32 steps taken.
    """

    eta: jax.Array
    count: jax.Array


def adaptive_eta(
    learning_rate: ArrayLike = 0.1,
    *,
    meta_rate: ArrayLike = 0.01,
    low: ArrayLike = 1e-4,
    high: ArrayLike = 0.5,
    accumulate: bool = False,
    rule: str = "exact",
    aux_fn: Callable[[Any], jax.Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adaptive-eta for any optimiser: it takes the place of the learning rate, last in a chain.

        optimizer = optax.chain(optax.scale_by_adam(), bib.adaptive_eta(0.1, aux_fn=aux))
        updates, state = optimizer.update(grads, state, params)

    What comes in is a direction of descent `dir`; what goes out is -eta dir. The first step has the base rate, as in the public code.

    Args:
      learning_rate: [] base.
      meta_rate: [] step of eta.
      low: [] least eta.
      high: [] largest.
      accumulate: Start from the last eta instead of the base. Static.
      rule: "frozen": the auxiliary gradient where the step begins; "exact": where the step with the base rate ends, whatever the optimiser
        (`step`'s "adam", if that is Adam). Static.
      aux_fn: (params) -> [], larger is better, in the scores' unit; or give `aux_grad`, its gradient at the parameters, to `update` (frozen
        only).

    Returns:
      An optax transformation whose `update` needs `params`, or with `aux_grad` none.

    Raises:
      ValueError: for another rule, or without `aux_fn` where it is needed.

    Reference: arXiv:2301.02931.
    """
    one_of("bib.adaptive_eta", "rule", rule, ("frozen", "exact"))
    if rule == "exact" and aux_fn is None:
        raise ValueError("bib.adaptive_eta: rule 'exact' needs 'aux_fn'; with 'aux_grad' at the parameters use rule='frozen'")

    def init(params: Any) -> AdaptiveEtaState:
        del params
        return AdaptiveEtaState(jnp.asarray(learning_rate, jnp.float32), jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, *, aux_grad: Any = None, **extra: Any) -> tuple[Any, AdaptiveEtaState]:
        del extra
        base = jnp.where(accumulate, state.eta, jnp.asarray(learning_rate, state.eta.dtype))
        if rule == "frozen" and aux_grad is not None:
            slope = -inner_product(aux_grad, updates)
        else:
            if params is None or aux_fn is None:
                raise ValueError("bib.adaptive_eta: 'params' and 'aux_fn' are needed unless update gets 'aux_grad'")
            at = params if rule == "frozen" else jax.tree.map(lambda p, d: p - (base * d).astype(p.dtype), params, updates)
            slope = -inner_product(jax.grad(aux_fn)(at), updates)
        moved = eta_update(slope.astype(state.eta.dtype), base, meta_rate=meta_rate, low=low, high=high)
        eta = jnp.where(state.count == 0, base, moved).astype(state.eta.dtype)
        return jax.tree.map(lambda d: (-eta * d).astype(d.dtype), updates), AdaptiveEtaState(eta, state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]
