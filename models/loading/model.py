"""A language model ready for use: configuration, parameters, tokenizer and the callables that algorithms take."""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.typing import DTypeLike

from janax.jaxlib_ext.sampling import Cache
from janax.models import cache, gguf, tokenizers, transformer
from janax.models.loading import files
from janax.models.loading.entries import Shardings
from janax.models.loading.transformer import load_transformer, read_transformer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Model", "load"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder with all that belongs to it. The callables are made of the config: `dataclasses.replace` it and they follow.

    Attributes:
      config: The network.
      params: Its parameters; move, shard or unstack them as you like.
      tokenizer: Of transformers; None if the checkpoint has none.
      stop_tokens: Tokens that end what the model writes, from its generation settings and tokenizer.
    """

    config: transformer.TransformerConfig
    params: dict[str, Any]
    tokenizer: "PreTrainedTokenizerBase | None" = None
    stop_tokens: tuple[int, ...] = ()

    @property
    def hidden_fn(self) -> Callable[..., jax.Array]:
        """(params, tokens, segment_ids=None, positions=None) -> [b t d]."""
        return transformer.hidden_fn(self.config)

    @property
    def logits_fn(self) -> Callable[..., jax.Array]:
        """(params, tokens, segment_ids=None, positions=None) -> [b t v]."""
        return transformer.logits_fn(self.config)

    @property
    def decode_fn(self) -> Callable[..., tuple[jax.Array, Cache]]:
        """(params, cache, tokens, num_tokens=None, prefix=None) -> (logits [b v], cache)."""
        return transformer.decode_fn(self.config)

    @property
    def unembed(self) -> Callable[[Any], jax.Array]:
        """params -> [d v]."""
        return functools.partial(transformer.unembed, self.config)


def load(name: str | os.PathLike[str], *, shardings: Shardings | None = None, dtype: DTypeLike | None = None) -> Model:
    """A language model by name or place.

    Args:
      name: "smollm2" (after `janax fetch smollm2`), a directory in Hugging Face's layout, or a GGUF file.
      shardings: As in `load_transformer`.
      dtype: Dtype of the parameters; None keeps that of the file (float32 for quantised weights).

    Returns:
      The model.

    Raises:
      ValueError: if there is no such model, or naming the file and tensor that is missing, of another shape or not supported.
    """
    path = cache.smollm2_path() if str(name) == cache.SMOLLM2.name else Path(name)
    if gguf.is_gguf(path):
        with gguf.GgufFile(path) as source:
            config, params = read_transformer(source.config, source, shardings=shardings, dtype=dtype)
            ends = source.config.get("eos_token_id")
        return _model(config, params, tokenizers.load_tokenizer(path), [ends])
    if not path.is_dir():
        known = ", ".join(repr(one.name) for one in cache.PUBLISHED)
        raise ValueError(f"{str(name)!r} is neither a directory, nor a GGUF file, nor one of {known}")
    config, params = load_transformer(path, shardings=shardings, dtype=dtype)
    tokenizer = tokenizers.load_tokenizer(path) if any((path / file).is_file() for file in _TOKENIZER_FILES) else None
    settings = [files.read_json(path / file) for file in ("config.json", "generation_config.json") if (path / file).is_file()]
    return _model(config, params, tokenizer, [one.get("eos_token_id") for one in settings])


def _model(config: transformer.TransformerConfig, params: dict[str, Any], tokenizer: Any, ends: list[Any]) -> Model:
    """Collects the tokens that end a text: a number or a list in each setting."""
    if tokenizer is not None:
        ends = [*ends, tokenizer.eos_token_id]
    numbers = {int(token) for end in ends if end is not None for token in (end if isinstance(end, list) else [end])}
    return Model(config=config, params=params, tokenizer=tokenizer, stop_tokens=tuple(sorted(numbers)))
