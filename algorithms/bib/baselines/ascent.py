"""Gradient ascent on the relaxed design, the plainest way to use a differentiable proxy."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from janax.algorithms.bib import relaxation as relaxed
from janax.algorithms.bib.baselines import _common
from janax.algorithms.bib.baselines._common import SELECTIONS, ScoreFn
from janax.algorithms.bib.baselines.designs import Archive, Designs, archive, hand_out
from janax.jaxlib_ext import checks

__all__ = ["RELAXATIONS", "gradient_ascent"]

RELAXATIONS = (*relaxed.RELAXATIONS, "free")
"""What the model reads of the variables z [l v]. straight_through: one-hot rows of the largest, differentiated as softmax(z); soft: softmax(z); free:
z itself, which leaves the simplex, as in design-baselines (whose models are trained on such coordinates)."""


def gradient_ascent(
    score_fn: ScoreFn,
    params: Any,
    starts: ArrayLike,
    *,
    num_letters: int,
    num_steps: int = 100,
    learning_rate: ArrayLike = 0.1,
    relaxation: str = "straight_through",
    transform: optax.GradientTransformation | None = None,
    smoothing: ArrayLike | None = None,
    start_variables: ArrayLike | None = None,
    select: str = "last",
) -> Designs:
    """Ascends the predicted score from each start on its own: z <- z + learning_rate transform(d score / d z); the design is argmax z.

    For an ensemble, hand over `ensemble_score` with reduce "mean", "min" or "lcb". Design-baselines' setting: relaxation="free",
    transform=optax.identity(), learning_rate = 0.01 sqrt(l v), 200 steps.

    Args:
      score_fn: (params, x [l v]) -> [].
      params: Its parameters.
      starts: [m l] integers, usually `best_offline(...).tokens`.
      num_letters: v. Static.
      num_steps: Steps. Static.
      learning_rate: [] of a step. Traced.
      relaxation: One of `RELAXATIONS`. Static.
      transform: Direction from gradient, per design; None is Adam's (0.9, 0.999, 1e-8), `optax.identity()` the gradient itself. Static.
      smoothing: [] weight w of the one-hot row in the start, w onehot + (1 - w)/v, whose logarithm z starts from (itself, if free). None is 0.6, or
        1 if free; below 1 otherwise. Traced.
      start_variables: [m l v] z to start from instead, e.g. `vmap(init_logits)`; its argmax should be `starts`.
      select: One of `SELECTIONS`. Static.

    Returns:
      `Designs` with a trajectory [num_steps + 1 m] of predictions for the argmax sequences.

    Raises:
      ValueError: on shapes that do not agree or an unknown option.

    Reference: Trabucco et al., arXiv:2202.08450 (design-baselines); straight-through form as in arXiv:2301.02931.
    """
    name = "baselines.gradient_ascent"
    starts = _common.sequences(name, "starts", starts, num_letters)
    checks.check_shapes(name, starts=(starts, "m l"), start_variables=(start_variables, f"m l {num_letters}"))
    checks.one_of(name, "relaxation", relaxation, RELAXATIONS)
    checks.one_of(name, "select", select, SELECTIONS)
    _common.at_least(name, 0, num_steps=num_steps)
    transform = optax.scale_by_adam() if transform is None else transform
    dtype = _common.row_dtype(params)
    if start_variables is None:
        weight = jnp.asarray((1.0 if relaxation == "free" else 0.6) if smoothing is None else smoothing).astype(dtype)
        rows = weight * jax.nn.one_hot(starts, num_letters, dtype=dtype) + (1 - weight) / num_letters
        z = rows if relaxation == "free" else jnp.log(rows)
    else:
        z = jnp.asarray(start_variables).astype(dtype)
    rate = jnp.asarray(learning_rate).astype(dtype)
    m = starts.shape[0]

    def predicted_soft(z_one: jax.Array) -> jax.Array:
        x = z_one if relaxation == "free" else relaxed.relax_tokens(z_one, relaxation=relaxation)
        return _common.scalar(score_fn, params, x)

    def look(z: jax.Array, visited: Archive | None, value: jax.Array | None) -> tuple[jax.Array, jax.Array, Archive | None]:
        tokens = relaxed.read_out(z)
        predicted = _common.predict(score_fn, params, tokens, num_letters) if value is None else value
        if select != "last":
            visited = archive(tokens, predicted, m, visited)
        return tokens, predicted, visited

    def step(carry: tuple, nothing: None) -> tuple[tuple, jax.Array]:
        z, state, visited = carry
        value, gradient = jax.vmap(jax.value_and_grad(predicted_soft))(z)
        _, predicted, visited = look(z, visited, value if relaxation == "straight_through" else None)
        direction, state = jax.vmap(transform.update)(gradient, state, z)
        return (jax.tree.map(lambda old, change: old + rate * change, z, direction), state, visited), predicted

    visited = None if select == "last" else look(z, None, None)[2]
    (z, _, visited), path = jax.lax.scan(step, (z, jax.vmap(transform.init)(z), visited), None, length=num_steps)
    tokens, predicted, visited = look(z, visited, None)
    return hand_out(select, tokens, predicted, visited, jnp.concatenate([path.astype(predicted.dtype), predicted[None]]))
