"""Runs of k letters of relaxed sequences."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

__all__ = ["soft_kmers"]


def soft_kmers(rows: ArrayLike, *, k: int) -> jax.Array:
    """Probabilities of runs of k letters that are drawn independently: s[l, (i, j, ..)] = p[l, i] p[l + 1, j] ...

    Args:
      rows: [... l v] probabilities of letters.
      k: Letters of a run. Static.

    Returns:
      [... l-k+1 v^k]; runs by their base-v number, first letter highest.

    Raises:
      ValueError: if there are fewer than k places.

    Reference: arXiv:2301.02931, DNA.
    """
    rows = jnp.asarray(rows)
    length = rows.shape[-2] - k + 1 if rows.ndim > 1 else 0
    if k < 1 or length < 1:
        raise ValueError(f"soft_kmers: 'rows' has shape {rows.shape}, expected [... l v] with l of at least k={k}")
    found = rows[..., :length, :]
    for j in range(1, k):
        found = (found[..., :, None] * rows[..., j : j + length, None, :]).reshape(*found.shape[:-1], -1)
    return found
