"""The float32 floor: what is accumulated or exponentiated is never narrower than float32."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

__all__ = ["at_least_float32", "floor_dtype", "widest_dtype"]


def floor_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype to compute in: float64 stays, everything narrower (bf16, f16, integers, booleans) becomes float32.

    Raises:
      ValueError: if it is complex, whose imaginary part a cast would drop.
    """
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(f"floor_dtype: 'dtype' is {jnp.dtype(dtype).name}, expected a real type")
    return jnp.dtype(jnp.float64) if jnp.dtype(dtype) == jnp.float64 else jnp.dtype(jnp.float32)


def at_least_float32(x: ArrayLike) -> jax.Array:
    """`x` as float32, or float64 if it was that already. Works under strict dtype promotion."""
    x = jnp.asarray(x)
    return x.astype(floor_dtype(x.dtype))


def widest_dtype() -> jnp.dtype:
    """float64 where it is enabled (`jax.enable_x64`), else float32: for sums and solves that lose too many digits otherwise."""
    return jnp.dtype(jax.dtypes.canonicalize_dtype(jnp.float64))
