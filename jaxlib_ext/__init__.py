"""What one would wish to find in jax.lax and jax.nn: array functions, custom derivatives, placement, ahead-of-time compilation."""

from janax import _lazy_modules

__all__ = [
    "aot",
    "checks",
    "divergence",
    "dtypes",
    "fused",
    "kernels",
    "kmers",
    "logprobs",
    "masking",
    "ntk",
    "reversible",
    "ridge",
    "sampling",
    "scoring",
    "sharding",
    "transport",
]

__getattr__, __dir__ = _lazy_modules(__name__, __all__)
