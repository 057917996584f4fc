"""What the baselines share: predictions of whole populations, checks, the choice of what is handed out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import checks, dtypes

ScoreFn = Callable[[Any, jax.Array], jax.Array]
"""(params, x [l v]) -> []: the predicted score of ONE design, rows of probabilities (one-hot for a sequence)."""

SELECTIONS = ("last", "distinct", "best")
"""last: the final designs, repeats and all, as in the literature; distinct: repeats replaced by the next-best distinct designs on the way; best: the
best distinct ones of all that were visited."""


def row_dtype(params: Any) -> jnp.dtype:
    """The dtype of rows: the widest floating one among the parameters, at least float32; JAX's default if there is none."""
    floating = [jnp.result_type(leaf) for leaf in jax.tree.leaves(params) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    if not floating:
        return jnp.zeros(()).dtype
    return jnp.dtype(jnp.float64) if jnp.dtype(jnp.float64) in floating else jnp.dtype(jnp.float32)


def scalar(score_fn: ScoreFn, params: Any, x: jax.Array) -> jax.Array:
    """The score of one design, checked to be a number and widened to float32."""
    score = score_fn(params, x)
    if jnp.shape(score) != ():
        raise ValueError(f"baselines: 'score_fn' returned shape {jnp.shape(score)} for one design, expected []")
    return dtypes.at_least_float32(score)


def predict(score_fn: ScoreFn, params: Any, tokens: jax.Array, num_letters: int, batch_size: int | None = None) -> jax.Array:
    """[n] predictions of the sequences [n l]; all at once, or `batch_size` at a time."""
    dtype = row_dtype(params)

    def one(sequence: jax.Array) -> jax.Array:
        return scalar(score_fn, params, jax.nn.one_hot(sequence, num_letters, dtype=dtype))

    return jax.vmap(one)(tokens) if batch_size is None else jax.lax.map(one, tokens, batch_size=batch_size)


def sequences(name: str, argument: str, tokens: ArrayLike, num_letters: int) -> jax.Array:
    """[n l] int32, checked."""
    checks.check_shapes(name, **{argument: (tokens, "n l")})
    checks.require_integers(name, **{argument: tokens})
    if num_letters < 2:
        raise ValueError(f"{name}: 'num_letters' is {num_letters}, expected at least 2")
    tokens = jnp.asarray(tokens)
    if min(tokens.shape) < 1:
        raise ValueError(f"{name}: {argument!r} has shape {tokens.shape}, expected at least one sequence and one position")
    return tokens.astype(jnp.int32)


def at_least(name: str, least: int, **counts: int) -> None:
    """Raises ValueError where a count is too small."""
    for argument, count in counts.items():
        if count < least:
            raise ValueError(f"{name}: {argument!r} is {count}, expected at least {least}")


def at_most(name: str, argument: str, count: int, bound: str, most: int) -> None:
    """Raises ValueError where a count is beyond another one."""
    if count > most:
        raise ValueError(f"{name}: {argument!r} is {count}, expected at most the {most} of {bound!r}")
