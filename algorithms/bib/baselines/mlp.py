"""A multilayer perceptron on one-hot sequences in closed form, and ensembles of it (or of any other model) trained in one scan."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from janax.algorithms.bib.baselines import _common
from janax.algorithms.bib.baselines._common import ScoreFn
from janax.jaxlib_ext import checks, dtypes

__all__ = ["EnsembleFit", "InitFn", "Layer", "fit_ensemble", "mlp_init", "mlp_score"]

InitFn = Callable[[jax.Array], Any]
"""key -> parameters of one member."""


class Layer(NamedTuple):
    """y = x weight + bias.

    Attributes:
      weight: [a b].
      bias: [b].
    """

    weight: jax.Array
    bias: jax.Array


class EnsembleFit(NamedTuple):
    """A trained ensemble.

    Attributes:
      params: Parameters with a leading axis of members; `ensemble_score` reads them.
      losses: [num_steps num_members] mean squared errors of the batches, in units of the squared scores.
    """

    params: Any
    losses: jax.Array


def mlp_init(key: jax.Array, *, num_letters: int, length: int, widths: Sequence[int] = (256, 256)) -> tuple[Layer, ...]:
    """Parameters for `mlp_score`: weights N(0, 2 / inputs) where a ReLU follows, N(0, 1 / inputs) in the last layer, no biases.

    Args:
      key: Typed key.
      num_letters: v. Static.
      length: l. Static.
      widths: Hidden units of each layer. Static.

    Returns:
      One `Layer` per layer; 32-256-256-1 for l = 8, v = 4.

    Raises:
      ValueError: on a size below one.
    """
    _common.at_least("baselines.mlp_init", 1, num_letters=num_letters, length=length, widths=min(widths, default=1))
    sizes = (length * num_letters, *widths, 1)
    layers = []
    for i, key_layer in enumerate(jax.random.split(key, len(sizes) - 1)):
        gain = 2.0 if i < len(widths) else 1.0
        normal = jax.random.normal(key_layer, (sizes[i], sizes[i + 1]))
        layers.append(Layer(weight=math.sqrt(gain / sizes[i]) * normal, bias=jnp.zeros(sizes[i + 1], normal.dtype)))
    return tuple(layers)


def mlp_score(params: Sequence[Layer], x: jax.Array) -> jax.Array:
    """The perceptron's score of one design; a `ScoreFn`.

    Args:
      params: From `mlp_init`.
      x: [l v] rows.

    Returns:
      [] score.

    Raises:
      ValueError: if the rows do not have as many entries as the first layer has inputs.
    """
    h = jnp.reshape(x, (-1,))
    if h.shape[0] != params[0].weight.shape[0]:
        raise ValueError(
            f"baselines.mlp_score: 'x' has shape {jnp.shape(x)}, expected {params[0].weight.shape[0]} entries as from mlp_init"
        )
    for layer in params[:-1]:
        h = jax.nn.relu(h @ layer.weight + layer.bias)
    return (h @ params[-1].weight + params[-1].bias)[0]


def cosine_adam(learning_rate: ArrayLike, num_steps: int) -> optax.GradientTransformation:
    """Adam whose step falls from `learning_rate` to 0 as (1 + cos(pi t / num_steps)) / 2; the rate may be traced."""
    return optax.chain(
        optax.scale_by_adam(), optax.scale_by_learning_rate(lambda t: learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * t / num_steps)))
    )


def fit_ensemble(
    key: jax.Array,
    tokens: ArrayLike,
    scores: ArrayLike,
    *,
    num_letters: int,
    num_members: int = 5,
    num_steps: int = 1500,
    batch_size: int = 256,
    learning_rate: ArrayLike = 1e-3,
    widths: Sequence[int] = (256, 256),
    bootstrap: bool = False,
    score_fn: ScoreFn = mlp_score,
    init_fn: InitFn | None = None,
) -> EnsembleFit:
    """Regression by Adam with a cosine schedule; all members in one scan, each with its own start and its own batches.

    Batches are drawn with replacement. Standardise the scores first. The result `vmap`s over keys and over tasks of the same size.

    Args:
      key: Typed key.
      tokens: [n l] integers, the offline sequences.
      scores: [n] standardised scores.
      num_letters: v. Static.
      num_members: e. Static.
      num_steps: Steps. Static.
      batch_size: Rows of a batch. Static.
      learning_rate: [] of the first step. Traced.
      widths: Hidden units of the perceptron. Static.
      bootstrap: Whether each member sees a resample (with replacement) of the rows only. Static.
      score_fn: The member, (params, x [l v]) -> []. Static.
      init_fn: key -> its parameters; None is the perceptron's. Static.

    Returns:
      `EnsembleFit`.

    Raises:
      ValueError: on shapes that do not agree, sizes below one, or a `score_fn` without its `init_fn`.

    Reference: settings of the multilayer perceptrons that the method is compared with on TFBind8.
    """
    name = "baselines.fit_ensemble"
    tokens = _common.sequences(name, "tokens", tokens, num_letters)
    n, l = checks.check_shapes(name, tokens=(tokens, "n l"), scores=(scores, "n")).values()
    _common.at_least(name, 1, num_members=num_members, num_steps=num_steps, batch_size=batch_size)
    if init_fn is None:
        if score_fn is not mlp_score:
            raise ValueError(f"{name}: give 'init_fn' with a 'score_fn' of your own")
        init_fn = functools.partial(mlp_init, num_letters=num_letters, length=l, widths=widths)

    key_init, key_rows, key_batches = jax.random.split(key, 3)
    params = jax.vmap(init_fn)(jax.random.split(key_init, num_members))
    dtype = _common.row_dtype(params)
    scores = dtypes.at_least_float32(scores).astype(dtype)
    optimizer = cosine_adam(learning_rate, num_steps)
    resample = jax.vmap(lambda key_member: jax.random.randint(key_member, (n,), 0, n))
    rows = resample(jax.random.split(key_rows, num_members)) if bootstrap else None

    def loss(member: Any, index: jax.Array) -> jax.Array:
        x = jax.nn.one_hot(tokens[index], num_letters, dtype=dtype)
        predicted = jax.vmap(lambda row: _common.scalar(score_fn, member, row))(x)
        return jnp.mean(jnp.square(predicted - scores[index].astype(predicted.dtype)))

    def member_step(member: Any, state: Any, key_member: jax.Array, rows_member: jax.Array | None) -> tuple[Any, Any, jax.Array]:
        index = jax.random.randint(key_member, (batch_size,), 0, n)
        index = index if rows_member is None else rows_member[index]
        value, gradient = jax.value_and_grad(loss)(member, index)
        updates, state = optimizer.update(gradient, state, member)
        return optax.apply_updates(member, updates), state, value

    def step(carry: tuple, t: jax.Array) -> tuple[tuple, jax.Array]:
        keys = jax.random.split(jax.random.fold_in(key_batches, t), num_members)
        members, states = carry
        each = jax.vmap(member_step, in_axes=(0, 0, 0, None if rows is None else 0))
        members, states, values = each(members, states, keys, rows)
        return (members, states), values

    (params, _), losses = jax.lax.scan(step, (params, jax.vmap(optimizer.init)(params)), jnp.arange(num_steps))
    return EnsembleFit(params=params, losses=losses)
