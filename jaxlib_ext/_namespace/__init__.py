"""janax: bidirectional methods for generative models, as pure JAX functions.

    from janax.algorithms import bdia      # a paper: its equations as functions
    from janax.jaxlib_ext import sharding  # what one would wish to find in jax.lax
    from janax.models import dit           # networks to plug in; yours fit as well

Importing this package imports neither JAX nor a device: the sub-packages load when they are first used.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from janax import algorithms, experiments, jaxlib_ext, models

__all__ = ["__version__", "algorithms", "experiments", "jaxlib_ext", "models"]

__version__ = "0.1.0"


def _lazy_modules(package: str, names: list[str]) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """PEP 562 `__getattr__` and `__dir__` of a package whose modules load on first use."""

    def get(name: str) -> ModuleType:
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted(names)


__getattr__, _ = _lazy_modules(__name__, __all__[1:])


def __dir__() -> list[str]:
    return sorted(__all__)
