"""From free parameters to sequences and back: straight-through letters and k-mers (BIB), standardised log-odds (BDI)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from janax.jaxlib_ext import dtypes, kmers
from janax.jaxlib_ext.checks import check_shapes, one_of, require_integers

__all__ = [
    "RELAXATIONS",
    "LogOdds",
    "from_log_odds",
    "init_logits",
    "log_odds",
    "log_odds_scale",
    "read_out",
    "relax_kmers",
    "relax_tokens",
    "straight_through",
]

RELAXATIONS = ("straight_through", "soft")
"""straight_through: one-hot rows forward, the gradient of the probabilities backward (the paper's); soft: the probabilities both ways."""


@jax.custom_jvp
def straight_through(p: jax.Array) -> jax.Array:
    """One-hot rows of the largest entries of p [... v], exactly 0 and 1 (the first of equal ones); the derivative is that of p."""
    return jax.nn.one_hot(jnp.argmax(p, axis=-1), p.shape[-1], dtype=p.dtype)


@straight_through.defjvp
def _straight_through_jvp(primals: tuple, tangents: tuple) -> tuple:
    return straight_through(*primals), tangents[0]


def relax_tokens(z: ArrayLike, *, relaxation: str = "straight_through") -> jax.Array:
    """Rows that a network reads instead of letters: x = onehot(argmax z), differentiated as p = softmax(z).

    Args:
      z: [... l v] logits of the letters.
      relaxation: One of `RELAXATIONS`. Static.

    Returns:
      [... l v] rows that sum to one.

    Raises:
      ValueError: for an unknown relaxation.

    Reference: arXiv:2301.02931, official code (proteins).
    """
    one_of("bib.relax_tokens", "relaxation", relaxation, RELAXATIONS)
    p = jax.nn.softmax(dtypes.at_least_float32(z), axis=-1)
    return straight_through(p) if relaxation == "straight_through" else p


def relax_kmers(z: ArrayLike, *, k: int = 3, relaxation: str = "straight_through") -> jax.Array:
    """Rows of k-mers that a network reads: s = soft_kmers(softmax(z)), onehot(argmax s) forward, the derivative of s.

    The k-mers of the argmax are those of the letters' argmax, because s is a product.

    Args:
      z: [... l v] logits of the letters.
      k: Letters in a k-mer. Static.
      relaxation: One of `RELAXATIONS`. Static.

    Returns:
      [... l-k+1 v^k] rows that sum to one.

    Raises:
      ValueError: for an unknown relaxation, or if k does not fit.

    Reference: arXiv:2301.02931, official code (DNA).
    """
    one_of("bib.relax_kmers", "relaxation", relaxation, RELAXATIONS)
    s = kmers.soft_kmers(jax.nn.softmax(dtypes.at_least_float32(z), axis=-1), k=k)
    return straight_through(s) if relaxation == "straight_through" else s


def init_logits(
    key: jax.Array, tokens: ArrayLike, *, num_letters: int, scale: ArrayLike = 0.01, noise: ArrayLike | None = None
) -> jax.Array:
    """Logits whose argmax is a given sequence: a draw of N(0, scale^2), with each row's largest entry swapped to the sequence's letter.

    Args:
      key: PRNG key. The official code's DNA run shares one draw between all designs (`vmap` with one key), its protein run does not.
      tokens: [l] letters of the sequence.
      num_letters: v. Static.
      scale: [] standard deviation. Traced.
      noise: [l v] the draw itself, instead of the key's.

    Returns:
      [l v] float32 logits, or as `noise`.

    Raises:
      ValueError: on wrong shapes, or letters that are no integers.

    Reference: arXiv:2301.02931, official code.
    """
    require_integers("bib.init_logits", tokens=tokens)
    l = check_shapes("bib.init_logits", tokens=(tokens, "l"), noise=(noise, f"l {num_letters}"))["l"]
    tokens = jnp.asarray(tokens).astype(jnp.int32)
    z = scale * jax.random.normal(key, (l, num_letters)) if noise is None else dtypes.at_least_float32(noise)
    largest = jnp.argmax(z, axis=-1)
    index = jnp.arange(num_letters)[None]
    here, there = index == tokens[:, None], index == largest[:, None]
    top = jnp.max(z, axis=-1, keepdims=True)
    own = jnp.sum(jnp.where(here, z, 0), axis=-1, keepdims=True)
    return jnp.where(here, top, jnp.where(there, own, z))


def read_out(z: ArrayLike) -> jax.Array:
    """[... l] int32 letters of logits [... l v]: the largest, the first of equal ones."""
    return jnp.argmax(jnp.asarray(z), axis=-1).astype(jnp.int32)


# --- BDI's


class LogOdds(NamedTuple):
    """Mean and standard deviation (ddof 0) of the offline set's log-odds, by coordinate.

    Attributes:
      mean: [l (v-1)].
      std: [l (v-1)]; 1 where a coordinate never varies.
    """

    mean: jax.Array
    std: jax.Array


def log_odds(tokens: ArrayLike, *, num_letters: int, smoothing: float = 0.6) -> jax.Array:
    """Sequences as free vectors: log soft[1:] - log soft[0] per position, soft = smoothing onehot + (1 - smoothing) / v.

    Args:
      tokens: [... l] letters.
      num_letters: v. Static.
      smoothing: Weight of the one-hot row. Static.

    Returns:
      [... l (v-1)], in float64 where it is enabled.

    Reference: Design-Bench, as used by BDI (arXiv:2209.07507).
    """
    require_integers("bib.log_odds", tokens=tokens)
    dtype = dtypes.widest_dtype()
    soft = smoothing * jax.nn.one_hot(tokens, num_letters, dtype=dtype) + (1 - smoothing) / num_letters
    log_soft = jnp.log(soft)
    z = log_soft[..., 1:] - log_soft[..., :1]
    return z.reshape(*z.shape[:-2], -1)


def log_odds_scale(z: ArrayLike) -> LogOdds:
    """Mean and standard deviation over rows z [n d]."""
    z = dtypes.at_least_float32(z)
    check_shapes("bib.log_odds_scale", z=(z, "n d"))
    std = jnp.std(z, axis=0)
    return LogOdds(jnp.mean(z, axis=0), jnp.where(std > 0, std, 1))


def from_log_odds(x: ArrayLike, scale: LogOdds, *, num_letters: int) -> jax.Array:
    """[... l] int32 letters of standardised vectors x [... l (v-1)]: undo the standardisation, put 0 in front, take the largest."""
    check_shapes("bib.from_log_odds", mean=(scale.mean, "d"), std=(scale.std, "d"), x=(x, "... d"))
    rows = jnp.asarray(x).reshape(-1, jnp.shape(x)[-1])
    z = rows * scale.std[None] + scale.mean[None]
    z = z.reshape(*jnp.shape(x)[:-1], -1, num_letters - 1)
    return read_out(jnp.concatenate([jnp.zeros_like(z[..., :1]), z], axis=-1))
