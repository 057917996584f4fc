"""Shape and value checks whose messages name the function, the argument, what came and what was expected.

Everything here runs while JAX traces, so a check costs nothing at run time. Conditions on traced values cannot raise: functions that
depend on one document what happens, and `require_finite` speaks only where the value is at hand.
"""

from collections.abc import Sequence

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

__all__ = ["check_shapes", "is_concrete", "one_of", "require_finite", "require_integers"]


def check_shapes(function: str, **arguments: tuple[object, str]) -> dict[str, int]:
    """Checks shapes against the specs of the docstrings, with one length per letter over all arguments.

    A spec is a list of axes, "b t v", as written in brackets in the docstrings. An axis is a name (the same length wherever it stands), a
    number (just that length) or, at most once and at the front, "..." (any leading axes, the same for all arguments that have it). The
    empty spec is a scalar.

    Args:
      function: The caller's name, for the message.
      **arguments: name = (array, spec). Anything with a `shape` will do, tracers and ShapeDtypeStructs too; None is passed over.

    Returns:
      The length of every named axis.

    Raises:
      ValueError: naming the function, the argument, its shape, the expected one, and which argument fixed the expectation.
    """
    lengths: dict[str, int] = {}
    owners: dict[str, str] = {}
    leading: tuple[int, ...] | None = None
    for name, (array, spec) in arguments.items():
        if array is None:
            continue
        shape = tuple(array.shape) if hasattr(array, "shape") else np.shape(array)  # type: ignore[arg-type]
        axes = spec.split()
        open_front = bool(axes) and axes[0] == "..."
        axes = axes[1:] if open_front else axes
        split = len(shape) - len(axes)
        if split < 0 or (split > 0 and not open_front):
            raise ValueError(f"{function}: {name!r} has shape {shape}, expected [{spec}]")
        if open_front:
            if leading is None:
                leading, owners["..."] = shape[:split], name
            elif shape[:split] != leading:
                raise ValueError(f"{function}: {name!r} has shape {shape}, expected [{spec}] with ...={leading} from {owners['...']!r}")
        for axis, length in zip(axes, shape[split:]):
            expected = int(axis) if axis.isdigit() else lengths.setdefault(axis, length)
            owner = owners.setdefault(axis, name)
            if length != expected:
                source = "" if axis.isdigit() else f" with {axis}={expected} from {owner!r}"
                raise ValueError(f"{function}: {name!r} has shape {shape}, expected [{spec}]{source}")
    return lengths


def one_of(function: str, name: str, value: object, options: Sequence[object]) -> None:
    """Raises ValueError unless `value` is among `options`; the message lists them."""
    if value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise ValueError(f"{function}: {name!r} is {value!r}, expected one of {listed}")


def is_concrete(x: object) -> bool:
    """Whether the values of `x` are at hand (not a tracer, not an abstract array), so that a condition on them can be checked in Python."""
    return not isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)


def require_finite(function: str, **arguments: object) -> None:
    """Raises ValueError if a concrete argument holds nan or inf; under `jit` the values are not at hand and nothing is checked.

    Args:
      function: The caller's name, for the message.
      **arguments: name = array.
    """
    for name, array in arguments.items():
        if isinstance(array, jax.Array | np.ndarray) and is_concrete(array) and jnp.issubdtype(array.dtype, jnp.inexact):
            bad = int(jnp.sum(~jnp.isfinite(array)))
            if bad:
                raise ValueError(f"{function}: {name!r} holds {bad} non-finite values of {array.size}; clean the input first")


def require_integers(function: str, **arguments: ArrayLike) -> None:
    """Raises ValueError unless every argument has an integer dtype (booleans have not); for ids and indices."""
    for name, array in arguments.items():
        dtype = jnp.result_type(array)
        if not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(f"{function}: {name!r} has dtype {dtype.name}, expected integers")
