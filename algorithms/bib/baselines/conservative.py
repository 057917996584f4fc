"""COMs: a proxy trained to be conservative where its own ascent leads (Trabucco et al., arXiv:2107.06882).

L = mean (f(x) - y)^2 + alpha o ,      o = mean f(x_T) - mean f(x)           x_T: T ascent steps on f from the data x
alpha rises while o is above a target, falls while it is below               `dual_step`

fit = baselines.fit_coms(key, tokens, scores, num_letters=4)
designs = baselines.coms(baselines.mlp_score, fit.params, starts, num_letters=4)
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from janax.algorithms.bib.baselines import _common
from janax.algorithms.bib.baselines._common import ScoreFn
from janax.algorithms.bib.baselines.ascent import gradient_ascent
from janax.algorithms.bib.baselines.designs import Designs
from janax.algorithms.bib.baselines.mlp import InitFn, mlp_init, mlp_score
from janax.jaxlib_ext import checks, dtypes

__all__ = ["ADVERSARIES", "DUAL_RULES", "ComsFit", "ComsInfo", "DualState", "coms", "coms_loss", "dual_init", "dual_step", "fit_coms"]

ADVERSARIES = ("last", "path")
"""Where the proxy is pressed down: at the end of the ascent, as in the paper, or all along it."""

DUAL_RULES = ("log_adam", "projected")
"""How `dual_step` moves the multiplier: Adam on its logarithm, as in the code, or plain projected dual ascent."""


class ComsInfo(NamedTuple):
    """The parts of the loss; no gradients.

    Attributes:
      squared_error: [] mean (f(x) - y)^2.
      overestimation: [] o, in units of the scores; what `dual_step` reads.
      shift: [] root mean square change of the rows by the ascent.
    """

    squared_error: jax.Array
    overestimation: jax.Array
    shift: jax.Array


class DualState(NamedTuple):
    """The Lagrange multiplier and its optimiser.

    Attributes:
      alpha: [] weight of the overestimation, at least 0.
      log_alpha: [] its logarithm, what Adam moves.
      moments: State of Adam.
    """

    alpha: jax.Array
    log_alpha: jax.Array
    moments: Any


class ComsFit(NamedTuple):
    """A conservative proxy.

    Attributes:
      params: Its parameters.
      alpha: [num_steps] the multiplier used in each step.
      info: `ComsInfo` of each step, [num_steps].
    """

    params: Any
    alpha: jax.Array
    info: ComsInfo


def coms_loss(
    score_fn: ScoreFn,
    params: Any,
    x: ArrayLike,
    scores: ArrayLike,
    *,
    alpha: ArrayLike,
    num_ascent_steps: int = 50,
    ascent_rate: ArrayLike = 0.05,
    adversary: str = "last",
    through_ascent: bool = False,
) -> tuple[jax.Array, ComsInfo]:
    """Squared error plus alpha times the overestimation; a mean over the batch, whose rows do not interact.

    Args:
      score_fn: (params, x [l v]) -> [].
      params: Its parameters, to differentiate for.
      x: [b l v] rows of the batch; the ascent leaves the simplex.
      scores: [b] standardised scores.
      alpha: [] multiplier, a constant here. Traced.
      num_ascent_steps: T >= 1. Static.
      ascent_rate: [] x <- x + ascent_rate df/dx. Traced.
      adversary: One of `ADVERSARIES`. Static.
      through_ascent: Whether the ascent itself is differentiated for params; the released code does not. Static.

    Returns:
      The loss [] and `ComsInfo`.

    Raises:
      ValueError: on shapes that do not agree, an unknown adversary, or no ascent step.

    Reference: arXiv:2107.06882; design-baselines, coms_cleaned (whose entropy bonus, 0 in its runs, is left out).
    """
    name = "baselines.coms_loss"
    checks.check_shapes(name, x=(x, "b l v"), scores=(scores, "b"))
    checks.one_of(name, "adversary", adversary, ADVERSARIES)
    _common.at_least(name, 1, num_ascent_steps=num_ascent_steps)
    x = dtypes.at_least_float32(x)
    scores = dtypes.at_least_float32(scores)
    rate = jnp.asarray(ascent_rate).astype(x.dtype)
    adversarial = params if through_ascent else jax.lax.stop_gradient(params)

    def all_scores(tree: Any, rows: jax.Array) -> jax.Array:
        return jax.vmap(lambda row: _common.scalar(score_fn, tree, row))(rows)

    uphill = jax.grad(lambda rows: jnp.sum(all_scores(adversarial, rows)))

    def climb(rows: jax.Array, _: None) -> tuple[jax.Array, jax.Array | None]:
        rows = rows + rate * uphill(rows)
        return rows, rows if adversary == "path" else None

    end, path = jax.lax.scan(climb, x, None, length=num_ascent_steps)
    found = end[None] if path is None else path
    found = found if through_ascent else jax.lax.stop_gradient(found)
    predicted = all_scores(params, x)
    over = jnp.mean(jax.vmap(all_scores, in_axes=(None, 0))(params, found)) - jnp.mean(predicted)
    error = jnp.mean(jnp.square(predicted - scores.astype(predicted.dtype)))
    info = ComsInfo(squared_error=error, overestimation=over, shift=jnp.sqrt(jnp.mean(jnp.square(end - x))))
    weight = jax.lax.stop_gradient(jnp.asarray(alpha).astype(error.dtype))
    return error + weight * over, jax.lax.stop_gradient(info)


def dual_init(alpha: ArrayLike = 0.1) -> DualState:
    """A multiplier to start from, [] and above 0."""
    alpha = dtypes.at_least_float32(alpha)
    return DualState(alpha=alpha, log_alpha=jnp.log(alpha), moments=optax.scale_by_adam().init(alpha))


def dual_step(
    state: DualState, overestimation: ArrayLike, *, target: ArrayLike = 2.0, learning_rate: ArrayLike = 0.01, rule: str = "log_adam"
) -> DualState:
    """One step of dual ascent: alpha rises if the overestimation is above the target and falls if it is below.

    Args:
      state: From `dual_init`.
      overestimation: [] o of the batch.
      target: [] tau, what is allowed. Traced.
      learning_rate: [] of the dual step. Traced.
      rule: "log_adam": Adam on log alpha with the gradient alpha (tau - o) of alpha (tau - o), as in the code; "projected": alpha <-
        max(0, alpha + learning_rate (o - tau)), plain dual ascent. Static.

    Returns:
      The next `DualState`.

    Raises:
      ValueError: for an unknown rule or an `overestimation` that is no scalar.

    Reference: arXiv:2107.06882; design-baselines, coms_cleaned.
    """
    name = "baselines.dual_step"
    checks.one_of(name, "rule", rule, DUAL_RULES)
    checks.check_shapes(name, overestimation=(overestimation, ""))
    dtype = state.alpha.dtype
    excess = jnp.asarray(overestimation).astype(dtype) - jnp.asarray(target).astype(dtype)
    rate = jnp.asarray(learning_rate).astype(dtype)
    if rule == "projected":
        alpha = jnp.maximum(state.alpha + rate * excess, 0)
        return DualState(alpha=alpha, log_alpha=jnp.log(jnp.maximum(alpha, jnp.finfo(dtype).tiny)), moments=state.moments)
    direction, moments = optax.scale_by_adam().update(state.alpha * excess, state.moments)
    log_alpha = state.log_alpha + rate * jnp.asarray(direction).astype(dtype)
    return DualState(alpha=jnp.exp(log_alpha), log_alpha=log_alpha, moments=moments)


def fit_coms(
    key: jax.Array,
    tokens: ArrayLike,
    scores: ArrayLike,
    *,
    num_letters: int,
    num_steps: int = 1500,
    batch_size: int = 128,
    learning_rate: ArrayLike = 1e-3,
    alpha: ArrayLike = 0.1,
    target: ArrayLike = 2.0,
    dual_rate: ArrayLike = 0.01,
    num_ascent_steps: int = 50,
    ascent_rate: ArrayLike | None = None,
    adversary: str = "last",
    widths: Sequence[int] = (256, 256),
    score_fn: ScoreFn = mlp_score,
    init_fn: InitFn | None = None,
) -> ComsFit:
    """Trains a conservative proxy by Adam, the multiplier beside it, in one scan; an ensemble of them by `vmap` over keys.

    Args:
      key: Typed key.
      tokens: [n l] integers, the offline sequences.
      scores: [n] standardised scores.
      num_letters: v. Static.
      num_steps: Steps. Static.
      batch_size: Rows of a batch, drawn with replacement. Static.
      learning_rate: [] of Adam. Traced.
      alpha: [] first multiplier. Traced.
      target: [] tau, in standard deviations of the offline scores. Traced.
      dual_rate: [] step of log alpha. Traced.
      num_ascent_steps: T. Each costs a gradient of the batch. Static.
      ascent_rate: [] per step; None is 0.05 sqrt(l v). Traced.
      adversary: One of `ADVERSARIES`. Static.
      widths: Hidden units of the perceptron. Static.
      score_fn: The proxy. Static.
      init_fn: key -> its parameters; None is the perceptron's. Static.

    Returns:
      `ComsFit`.

    Raises:
      ValueError: on shapes that do not agree, sizes below one, or a `score_fn` without its `init_fn`.

    Reference: arXiv:2107.06882. The released code's discrete tasks have 2 x 2048 units, learning rate 3e-4, 50 epochs of batch 128, alpha 0.1, dual
    rate 0.01, tau 2 and 50 steps of 2 sqrt(d) on standardised log-odds; an earlier file of its repository has tau -2 and steps of 0.05 sqrt(d).
    """
    name = "baselines.fit_coms"
    tokens = _common.sequences(name, "tokens", tokens, num_letters)
    n, l = checks.check_shapes(name, tokens=(tokens, "n l"), scores=(scores, "n")).values()
    _common.at_least(name, 1, num_steps=num_steps, batch_size=batch_size)
    if init_fn is None:
        if score_fn is not mlp_score:
            raise ValueError(f"{name}: give 'init_fn' with a 'score_fn' of your own")
        init_fn = functools.partial(mlp_init, num_letters=num_letters, length=l, widths=widths)
    rate = 0.05 * math.sqrt(l * num_letters) if ascent_rate is None else ascent_rate

    key_init, key_batches = jax.random.split(key)
    params = init_fn(key_init)
    dtype = _common.row_dtype(params)
    measured = dtypes.at_least_float32(scores).astype(dtype)
    adam = optax.scale_by_adam()
    step_size = jnp.asarray(learning_rate).astype(dtype)

    def step(carry: tuple, t: jax.Array) -> tuple[tuple, tuple[jax.Array, ComsInfo]]:
        params, state, dual = carry
        index = jax.random.randint(jax.random.fold_in(key_batches, t), (batch_size,), 0, n)
        x = jax.nn.one_hot(tokens[index], num_letters, dtype=dtype)

        def loss(tree: Any) -> tuple[jax.Array, ComsInfo]:
            options = {"alpha": dual.alpha, "num_ascent_steps": num_ascent_steps, "ascent_rate": rate, "adversary": adversary}
            return coms_loss(score_fn, tree, x, measured[index], **options)

        gradient, info = jax.grad(loss, has_aux=True)(params)
        direction, state = adam.update(gradient, state, params)
        params = jax.tree.map(lambda p, u: p - step_size.astype(p.dtype) * u, params, direction)
        return (params, state, dual_step(dual, info.overestimation, target=target, learning_rate=dual_rate)), (dual.alpha, info)

    start = (params, adam.init(params), dual_init(jnp.asarray(alpha).astype(dtype)))
    (params, _, _), (alphas, info) = jax.lax.scan(step, start, jnp.arange(num_steps))
    return ComsFit(params=params, alpha=alphas, info=info)


def coms(
    score_fn: ScoreFn,
    params: Any,
    starts: ArrayLike,
    *,
    num_letters: int,
    num_steps: int = 50,
    ascent_rate: ArrayLike | None = None,
    select: str = "last",
) -> Designs:
    """Designs of a conservative proxy: the very ascent that it was trained against, from the best offline designs.

    Args:
      score_fn: (params, x [l v]) -> [].
      params: From `fit_coms`.
      starts: [m l] integers.
      num_letters: v. Static.
      num_steps: Steps. Static.
      ascent_rate: [] per step; None is 0.05 sqrt(l v). Traced.
      select: As in `gradient_ascent`. Static.

    Returns:
      `Designs` with a trajectory [num_steps + 1 m].

    Raises:
      ValueError: as `gradient_ascent`.

    Reference: arXiv:2107.06882.
    """
    starts = _common.sequences("baselines.coms", "starts", starts, num_letters)
    rate = 0.05 * math.sqrt(starts.shape[1] * num_letters) if ascent_rate is None else ascent_rate
    return gradient_ascent(
        score_fn,
        params,
        starts,
        num_letters=num_letters,
        num_steps=num_steps,
        learning_rate=rate,
        relaxation="free",
        transform=optax.identity(),
        select=select,
    )
