"""Tokenizers of public checkpoints as transformers gives them, from a directory or out of a GGUF file.

    tokenizer = tokenizers.load_tokenizer("Qwen2.5-0.5B-Instruct")                    # a directory: its own tokenizer.json
    tokenizer = tokenizers.load_tokenizer("SmolLM2-135M-Instruct.Q4_1.gguf")          # rebuilt from the file's metadata
    tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)

A GGUF file holds vocabulary and merges, but only the name of the rule that cuts text into pieces before they are merged. The rule decides the
tokens: SmolLM cuts off every digit first, so that in "a   7" the three spaces are one token; without that rule the last one goes with the 7.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from janax.models import gguf

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = ["byte_level_bpe", "load_tokenizer"]

# The names that GGUF files give to pre-tokenisers, with what they mean: single digits cut off before GPT-2's own expression, or
# another expression in its place.
_DIGITS_FIRST = ("smollm", "starcoder", "refact")
_GPT2 = ("gpt-2",)
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_EXPRESSIONS = {"qwen2": rf"{_WORDS}|\p{{N}}|{_TAIL}", "llama-bpe": rf"{_WORDS}|\p{{N}}{{1,3}}|{_TAIL}"}
_COMPOSED = ("qwen2",)  # text is brought to Unicode's composed form first
_WHOLE_FIRST = ("llama-bpe",)  # a piece that is in the vocabulary is not merged from its parts

_CONTROL, _USER_DEFINED = 3, 4  # kinds of token in a GGUF file


def load_tokenizer(path: str | os.PathLike[str]) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint, with its special tokens and chat template.

    Args:
      path: A directory in Hugging Face's layout, or a GGUF file with a byte-level BPE.

    Returns:
      A tokenizer of transformers.

    Raises:
      ValueError: if there is no tokenizer in it, or one of a kind that is not supported.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory")
    if path.is_dir():
        return _from_directory(path)
    with gguf.GgufFile(path) as file:
        return _from_metadata(file.metadata, path)


def byte_level_bpe(vocabulary: Sequence[str], merges: Sequence[str], *, pre_tokenizer: str, special: Sequence[int] = ()) -> "Tokenizer":
    """A byte-level BPE out of its parts.

    Args:
      vocabulary: The tokens in the order of their ids, bytes written as GPT-2 writes them.
      merges: Pairs "left right", the first merged first.
      pre_tokenizer: How text is cut before merging, under the name that GGUF files use: "smollm", "gpt-2", "qwen2", "llama-bpe".
      special: Ids of the tokens that are found in text before anything else and left out when decoding for people.

    Returns:
      A tokenizer of the library tokenizers; it adds no tokens of its own and no space in front.

    Raises:
      ValueError: if the name is unknown.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    bpe = models.BPE(
        vocab={token: i for i, token in enumerate(vocabulary)},
        merges=[(left, right) for left, _, right in (pair.partition(" ") for pair in merges)],
        ignore_merges=pre_tokenizer in _WHOLE_FIRST,
    )
    tokenizer = Tokenizer(bpe)
    if pre_tokenizer in _EXPRESSIONS:
        first = pre_tokenizers.Split(Regex(_EXPRESSIONS[pre_tokenizer]), "isolated")
        steps = [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    elif pre_tokenizer in (*_DIGITS_FIRST, *_GPT2):
        first = [pre_tokenizers.Digits(individual_digits=True)] if pre_tokenizer in _DIGITS_FIRST else []
        steps = [*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    else:
        known = ", ".join(sorted((*_DIGITS_FIRST, *_GPT2, *_EXPRESSIONS)))
        raise ValueError(f"byte_level_bpe: pre-tokenizer {pre_tokenizer!r} is not supported, expected one of {known}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if pre_tokenizer in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens([AddedToken(vocabulary[i], normalized=False, special=True) for i in special])
    return tokenizer


def _from_metadata(metadata: dict[str, Any], path: Path) -> "PreTrainedTokenizerBase":
    from tokenizers import AddedToken

    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(f"{path}: metadata 'tokenizer.ggml.model' is {kind!r}, only 'gpt2' (byte-level BPE) is supported")
    for name in ("tokens", "merges"):
        if not isinstance(metadata.get(f"tokenizer.ggml.{name}"), list):
            raise ValueError(f"{path}: metadata 'tokenizer.ggml.{name}' is missing")
    vocabulary: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds: list[int] = metadata.get("tokenizer.ggml.token_type") or []
    special, own = ([i for i, kind in enumerate(kinds) if kind == wanted] for wanted in (_CONTROL, _USER_DEFINED))
    try:
        tokenizer = byte_level_bpe(
            vocabulary,
            metadata["tokenizer.ggml.merges"],
            pre_tokenizer=metadata.get("tokenizer.ggml.pre", "gpt-2"),
            special=special,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tokenizer.add_tokens([AddedToken(vocabulary[i], normalized=False, special=False) for i in own])
    named = {}
    for field, stored in {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}.items():
        position = metadata.get(f"tokenizer.ggml.{stored}_token_id")
        if position is not None:
            named[field] = vocabulary[position]
    if metadata.get("tokenizer.ggml.add_bos_token") and "bos_token" in named:
        _add_bos(tokenizer, named["bos_token"])
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
        **({} if length is None else {"model_max_length": length}),
    )


def _add_bos(tokenizer: "Tokenizer", token: str) -> None:
    """Puts the token in front of every text."""
    from tokenizers import processors

    template = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, tokenizer.token_to_id(token))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])


def _from_directory(path: Path) -> "PreTrainedTokenizerBase":
    package = _transformers()
    # Where there is a tokenizer.json, it says everything: the classes that configurations name rebuild parts of it by their own rules, as
    # transformers 5 does for GPT2Tokenizer, the class of SmolLM's directories, whose digits it no longer cuts off.
    whole = (path / "tokenizer.json").is_file()
    kind = package.PreTrainedTokenizerFast if whole else package.AutoTokenizer
    try:
        return kind.from_pretrained(path, local_files_only=True)
    except Exception as error:  # damaged JSON gives any kind, also a bare Exception
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: no tokenizer that transformers can read; is tokenizer.json there? ({reason})") from error


def _transformers() -> Any:
    """The package, imported without its remark that PyTorch is absent."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        import transformers
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
    return transformers
