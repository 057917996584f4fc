"""Vocabularies of encoders in Hugging Face's directory layout, token by token: vocab.txt, or the model of tokenizer.json."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from janax.models.loading import files

__all__ = ["load_vocabulary", "save_vocabulary"]

_LINES = "vocab.txt"
_TOKENIZER = "tokenizer.json"


def load_vocabulary(directory: str | os.PathLike[str]) -> tuple[str, ...]:
    """The tokens in the order of their ids.

    Args:
      directory: Holds vocab.txt, one token a line, or tokenizer.json with a vocabulary of words.

    Returns:
      One string an id; "" for ids that no token has.

    Raises:
      ValueError: naming the file, if there is none of them, it cannot be read, or it names a token or an id twice.
    """
    directory = Path(directory)
    path = directory / _LINES
    if path.is_file():
        try:
            tokens = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read ({error})") from error
        tokens = [token.strip() for token in (tokens[:-1] if tokens[-1] == "" else tokens)]
        pairs = list(enumerate(tokens))
    elif (directory / _TOKENIZER).is_file():
        path = directory / _TOKENIZER
        pairs = _pairs(path)
    else:
        raise ValueError(f"{directory}: there is no {_LINES} and no {_TOKENIZER}, of which one gives the tokens their ids")
    found: dict[int, str] = {}
    for number, token in pairs:
        if found.setdefault(number, token) != token:
            raise ValueError(f"{path}: id {number} stands for {found[number]!r} and for {token!r}")
    named = [token for token in found.values() if token]
    for token in named:
        if len(named) != len(set(named)) and named.count(token) > 1:
            raise ValueError(f"{path}: token {token!r} stands there twice")
    return tuple(found.get(i, "") for i in range(max(found, default=-1) + 1))


def _pairs(path: Path) -> list[tuple[int, str]]:
    content = files.read_json(path)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict):
        kind = model.get("type") if isinstance(model, dict) else None
        raise ValueError(f'{path}: the model is {json.dumps(kind)}, expected one with a vocabulary of words, such as "WordPiece"')
    added = [(entry["id"], entry["content"]) for entry in content.get("added_tokens") or ()]
    return [(number, token) for token, number in vocabulary.items()] + added


def save_vocabulary(directory: str | os.PathLike[str], vocabulary: Sequence[str]) -> None:
    """Writes vocab.txt, which `load_vocabulary` reads back.

    Raises:
      ValueError: if a token holds white space or stands there twice.
    """
    for token in vocabulary:
        if token != "".join(token.split()):
            raise ValueError(f"save_vocabulary: token {token!r} holds white space, which a line cannot")
    named = [token for token in vocabulary if token]
    if len(set(named)) != len(named):
        raise ValueError("save_vocabulary: a token stands in 'vocabulary' twice")
    Path(directory).mkdir(parents=True, exist_ok=True)
    (Path(directory) / _LINES).write_text("".join(f"{token}\n" for token in vocabulary), encoding="utf-8")
