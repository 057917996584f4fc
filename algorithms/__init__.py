"""One module per paper. Every function takes callables and explicit parameters, and returns arrays."""

from janax import _lazy_modules

__all__ = ["bdia", "bib", "rl_bayes", "sinkd"]

__getattr__, __dir__ = _lazy_modules(__name__, __all__)
