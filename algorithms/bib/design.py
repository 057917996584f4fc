"""The optimisation of BIB: from the logits of a start to those of a design, by forward loss, backward loss, or both with an adapted weight.

    step(t):  phi = features(z);  g_f, g_b, g_a = gradients of L_f, L_b, f_aux by z
              gamma <- adapted (`adaptive.gamma_update`);  g = gamma g_f + (1 - gamma) g_b
              eta <- adapted from the second step on (`adaptive.eta_update`);  z <- z - eta Adam(g)

One `design` is one sequence, or several that explain the data together when z has a leading axis; `jax.vmap` makes a batch of it, over tasks too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.algorithms.bib import adaptive, relaxation
from janax.jaxlib_ext import dtypes, sharding
from janax.jaxlib_ext.checks import one_of

__all__ = ["MODES", "DesignInfo", "DesignState", "Objectives", "Settings", "Trajectory", "design", "init", "step"]

MODES = ("forward", "backward", "both")


class Objectives(NamedTuple):
    """The three functions of a design's features phi ([d], or [m d] for joint designs); each gives a scalar.

    Attributes:
      forward: L_f, e.g. `functools.partial(bib.forward_loss, proxy)`; any objective to descend will do (a negative lower bound).
      backward: L_b, e.g. `functools.partial(bib.backward_loss, proxy)`.
      auxiliary: f_aux, to ascend, in the scores' unit.
    """

    forward: Callable[[jax.Array], jax.Array]
    backward: Callable[[jax.Array], jax.Array]
    auxiliary: Callable[[jax.Array], jax.Array]


class Settings(NamedTuple):
    """Float hyperparameters, all traced; the defaults are the public code's.

    Attributes:
      learning_rate: eta's base.
      gamma: Weight of the forward loss at the start, or all along if it is not adapted.
      gamma_rate: Learning rate of gamma.
      inner_rate: eta in gamma's hyper-gradient, which stays when the learning rate is adapted.
      meta_rate: Step of Adaptive-eta.
      eta_low: Least eta.
      eta_high: Largest eta.
      trust: Weight of the expected number of changed letters, sum_l 1 - p[l, start_l], added to the loss; 0 is none.
    """

    learning_rate: ArrayLike = 0.1
    gamma: ArrayLike = 0.5
    gamma_rate: ArrayLike = 0.1
    inner_rate: ArrayLike = 0.1
    meta_rate: ArrayLike = 0.01
    eta_low: ArrayLike = 1e-4
    eta_high: ArrayLike = 0.5
    trust: ArrayLike = 0.0


_DEFAULTS = Settings()


class DesignState(NamedTuple):
    """What the next step needs.

    Attributes:
      z: [... l v] logits.
      adam: Their moments.
      gamma: Weight of the forward loss with its Adam.
      eta: [] learning rate of the last step.
      start: [... l] int32 letters of the start.
    """

    z: jax.Array
    adam: adaptive.AdamState
    gamma: adaptive.GammaState
    eta: jax.Array
    start: jax.Array


class DesignInfo(NamedTuple):
    """What one step saw, before it moved.

    Attributes:
      tokens: [... l] int32 letters before the step.
      forward: [] L_f.
      backward: [] L_b.
      auxiliary: [] f_aux.
      gamma: [] the weight that the step used.
      eta: [] its learning rate.
    """

    tokens: jax.Array
    forward: jax.Array
    backward: jax.Array
    auxiliary: jax.Array
    gamma: jax.Array
    eta: jax.Array


class Trajectory(NamedTuple):
    """A design and how it came about.

    Attributes:
      tokens: [... l] int32 letters at the end.
      state: The last state.
      path: [t+1 ... l] int32 letters before every step and after the last.
      info: `DesignInfo` with a leading axis of steps.
    """

    tokens: jax.Array
    state: DesignState
    path: jax.Array
    info: DesignInfo


def init(z: ArrayLike, *, settings: Settings = _DEFAULTS) -> DesignState:
    """The state before the first step, from logits z [... l v] (`bib.init_logits`)."""
    z = jnp.asarray(z)
    rate = sharding.scalar_like(z, settings.learning_rate, dtypes.floor_dtype(z.dtype))
    return DesignState(z, adaptive.adam_init(z), adaptive.gamma_init(settings.gamma, z), rate, relaxation.read_out(z))


class _Gradients(NamedTuple):
    values: tuple[jax.Array, jax.Array, jax.Array]
    forward: jax.Array
    backward: jax.Array
    auxiliary: jax.Array


def _gradients(
    z: jax.Array,
    feature_fn: Callable[[jax.Array], jax.Array],
    objectives: Objectives,
    needed: tuple[bool, bool, bool] = (True, True, False),
) -> _Gradients:
    """Values of the three functions and the needed gradients by z (else zeros), by one pass through the features and one back for each."""
    phi, back = jax.vjp(feature_fn, z)
    values, gradients = [], []
    for objective, wanted in zip(objectives, needed):
        value, slope = jax.value_and_grad(objective)(phi)
        values.append(value.astype(z.dtype))
        gradients.append(back(slope.astype(phi.dtype))[0] if wanted else jnp.zeros_like(z))
    return _Gradients((values[0], values[1], values[2]), *gradients)


def _trust(z: jax.Array, start: jax.Array) -> jax.Array:
    p = jax.nn.softmax(z, axis=-1)
    return jnp.sum(1 - jnp.sum(p * jax.nn.one_hot(start, z.shape[-1], dtype=p.dtype), axis=-1))


def step(
    state: DesignState,
    feature_fn: Callable[[jax.Array], jax.Array],
    objectives: Objectives,
    *,
    settings: Settings = _DEFAULTS,
    mode: str = "both",
    gamma_rule: str | None = None,
    eta_rule: str | None = None,
    lookahead: int = 3,
    accumulate: bool = False,
) -> tuple[DesignState, DesignInfo]:
    """One step of the design.

    Args:
      state: From `init` or the last step.
      feature_fn: (z) -> phi: relaxation and network together. Static.
      objectives: The three functions of phi. Static.
      settings: Float hyperparameters. Traced.
      mode: One of `MODES`: which losses are descended. Static.
      gamma_rule: How gamma is adapted, one of `RULES`; None keeps it. With one loss there is nothing to adapt. Static.
      eta_rule: How eta is adapted from the second step on; None keeps it. Static.
      lookahead: Steps K of the rule "lookahead". Static.
      accumulate: Adaptive-eta starts from the last eta instead of the base. Static.

    Returns:
      The new state and what was seen.

    Raises:
      ValueError: for an unknown mode or rule, or a gamma rule with one loss.

    Reference: arXiv:2301.02931, official code ("frozen"); the exact forms are exact where `feature_fn` is smooth, not through an argmax.
    """
    one_of("bib.step", "mode", mode, MODES)
    for name, rule in (("gamma_rule", gamma_rule), ("eta_rule", eta_rule)):
        one_of("bib.step", name, rule, (*adaptive.RULES, None))
    if gamma_rule is not None and mode != "both":
        raise ValueError(f"bib.step: 'gamma_rule' is {gamma_rule!r} with mode {mode!r}, expected None: there is one loss only")
    if lookahead < 1:
        raise ValueError(f"bib.step: 'lookahead' must be at least 1, got {lookahead}")
    z = state.z
    losses = (mode != "backward", mode != "forward")
    found = _gradients(z, feature_fn, objectives, (*losses, "frozen" in (gamma_rule, eta_rule)))
    wide = state.eta.dtype  # of all scalars and of Adam, float32 or wider
    extra = (settings.trust * jax.grad(_trust)(z, state.start)).astype(z.dtype)

    def aux_gradient(moved: jax.Array) -> jax.Array:
        """Gradient of f_aux where z has moved by so much downhill."""
        return jax.grad(lambda z: objectives.auxiliary(feature_fn(z)).astype(z.dtype))((z - moved).astype(z.dtype)).astype(wide)

    def combined(gamma: ArrayLike, found: _Gradients) -> jax.Array:
        if mode == "forward":
            return found.forward
        if mode == "backward":
            return found.backward
        gamma = jnp.asarray(gamma)
        return (gamma * found.forward + (1 - gamma) * found.backward).astype(found.forward.dtype)

    def ahead(gamma: jax.Array, eta: jax.Array) -> jax.Array:
        """f_aux after K Adam steps with these constants."""

        def move(carry: tuple, _: None) -> tuple[tuple, None]:
            z, adam = carry
            pull = (settings.trust * jax.grad(_trust)(z, state.start)).astype(z.dtype)
            direction, adam = adaptive.adam_direction(adam, combined(gamma, _gradients(z, feature_fn, objectives, (*losses, False))) + pull)
            return ((z - eta * direction).astype(z.dtype), adam), None

        (last, _), _ = jax.lax.scan(move, (z, state.adam), length=lookahead)
        return objectives.auxiliary(feature_fn(last)).astype(wide)

    gamma, inner = state.gamma, jnp.asarray(settings.inner_rate, wide)
    if gamma_rule is not None:
        change = found.forward - found.backward
        g = combined(gamma.gamma, found) + extra
        if gamma_rule == "frozen":
            slope = -inner * adaptive.inner_product(found.auxiliary, change)
        elif gamma_rule == "exact":
            slope = -inner * adaptive.inner_product(aux_gradient(inner * g), change)
        elif gamma_rule == "adam":
            direction, tangent = adaptive.adam_direction(state.adam, g)[0], adaptive.gamma_tangent(state.adam, g, change)
            slope = -inner * adaptive.inner_product(aux_gradient(inner * direction), tangent)
        else:
            slope = jax.jvp(lambda gamma: ahead(gamma, inner), (gamma.gamma,), (jnp.ones_like(gamma.gamma),))[1]
        gamma = adaptive.gamma_update(gamma, slope, rate=settings.gamma_rate)

    g = combined(gamma.gamma, found) + extra
    direction, adam = adaptive.adam_direction(state.adam, g)
    base = state.eta if accumulate else jnp.asarray(settings.learning_rate, wide)
    eta = base
    if eta_rule is not None:
        if eta_rule == "frozen":
            slope = -adaptive.inner_product(found.auxiliary, direction)
        elif eta_rule == "exact":
            slope = -adaptive.inner_product(aux_gradient(base * g), g)
        elif eta_rule == "adam":
            slope = -adaptive.inner_product(aux_gradient(base * direction), direction)
        else:
            slope = jax.jvp(lambda eta: ahead(gamma.gamma, eta), (base,), (jnp.ones_like(base),))[1]
        moved = adaptive.eta_update(slope, base, meta_rate=settings.meta_rate, low=settings.eta_low, high=settings.eta_high)
        eta = jnp.where(state.adam.count == 0, base, moved.astype(wide))
    new = DesignState((z - eta * direction).astype(z.dtype), adam, gamma, eta, state.start)
    return new, DesignInfo(relaxation.read_out(z), *found.values, gamma.gamma, eta)


def design(
    z: ArrayLike,
    feature_fn: Callable[[jax.Array], jax.Array],
    objectives: Objectives,
    *,
    num_steps: int = 100,
    settings: Settings = _DEFAULTS,
    mode: str = "both",
    gamma_rule: str | None = "frozen",
    eta_rule: str | None = None,
    lookahead: int = 3,
    accumulate: bool = False,
    compatibility: str | None = None,
) -> Trajectory:
    """All steps for one design; the result is what the last logits spell, not the best on the way.

        run = jax.vmap(lambda z: bib.design(z, feature_fn, objectives))(bib_logits)          # [m l v], one gamma each

    Args:
      z: [l v] logits of the start, or [m l v] of designs that are optimised jointly.
      feature_fn: (z) -> phi. Static.
      objectives: The three functions of phi. Static.
      num_steps: T; the paper's code has 100 for DNA, 25 for proteins. Static.
      settings: Float hyperparameters. Traced.
      mode: As in `step`. Static.
      gamma_rule: As in `step`; left out where `mode` has one loss. Static.
      eta_rule: As in `step`. Static.
      lookahead: As in `step`. Static.
      accumulate: As in `step`. Static.
      compatibility: "public_code": the path's first entry is overwritten by the first step's result, as there. Static.

    Returns:
      The design and its way.

    Raises:
      ValueError: as `step`, and if `num_steps` is below one.
    """
    if num_steps < 1:
        raise ValueError(f"bib.design: 'num_steps' must be at least 1, got {num_steps}")
    one_of("bib.design", "compatibility", compatibility, (None, "public_code"))
    gamma_rule = gamma_rule if mode == "both" else None

    def body(state: DesignState, _: None) -> tuple[DesignState, Any]:
        return step(
            state, feature_fn, objectives, settings=settings, mode=mode, gamma_rule=gamma_rule, eta_rule=eta_rule, lookahead=lookahead,
            accumulate=accumulate,
        )  # fmt: skip

    state, info = jax.lax.scan(body, init(z, settings=settings), length=num_steps)
    tokens = relaxation.read_out(state.z)
    path = jnp.concatenate([info.tokens, tokens[None]])
    if compatibility == "public_code":
        path = jnp.concatenate([path[1:2], path[1:]])
    return Trajectory(tokens, state, path, info)
