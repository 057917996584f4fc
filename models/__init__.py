"""Networks to plug into the algorithms: Flax modules used functionally, with the layouts of public checkpoints."""

from janax import _lazy_modules

__all__ = ["cache", "dit", "encoder", "gguf", "loading", "lora", "mlp", "presets", "sequence", "tokenizers", "transformer", "unet"]

__getattr__, __dir__ = _lazy_modules(__name__, __all__)
