"""The data of `janax distill`: rows of packed tokens, prompts for the student's own completions, and which batch is which."""

import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from janax.experiments import text
from janax.experiments.distill.config import Config
from janax.experiments.errors import UserError
from janax.experiments.session import Session

__all__ = ["Batches", "Corpus", "prepare"]

_SHORTEST_BUCKET = 16


class Corpus(NamedTuple):
    """Tokens.

    Attributes:
      train: Rows to train on.
      held_out: Rows to evaluate on.
      prompts: [n p] prompts of the training lines that have one, padded on the right; none where nothing is sampled.
      prompt_lengths: [n] their lengths.
      example: The beginning of a held-out text, to try the student with; empty if the texts are chats.
    """

    train: text.Rows
    held_out: text.Rows
    prompts: np.ndarray
    prompt_lengths: np.ndarray
    example: str


def prepare(config: Config, session: Session, tokenizer: Any) -> Corpus:
    """Reads, tokenises and packs the data once per run directory; a resumed run finds the arrays where the first left them.

    Raises:
      UserError: naming the file and line, or what the data lack.
    """
    path = session.workdir / "text" / "rows.npz"
    if path.exists():
        with np.load(path) as stored:
            arrays = dict(stored)
        if str(arrays["digest"]) != _digest(config.data):
            raise UserError(f"--data {config.data} has changed since this run began; choose another --workdir, or delete the directory")
        return _corpus(arrays)
    arrays = _read(config, session, tokenizer)
    corpus = _corpus(arrays)
    Batches(config, corpus)  # what is wrong with the data is told before anything of them is kept
    if session.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name("partial.npz")
        np.savez_compressed(partial, **arrays)
        partial.replace(path)
    return corpus


def _corpus(arrays: dict[str, Any]) -> Corpus:
    train, held_out = (text.Rows(*(arrays[f"{part}_{field}"] for field in text.Rows._fields)) for part in ("train", "held_out"))
    return Corpus(train, held_out, arrays["prompts"], arrays["prompt_lengths"], str(arrays["example"]))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _read(config: Config, session: Session, tokenizer: Any) -> dict[str, Any]:
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("the tokenizer has no token for the end of a text; set eos_token in its tokenizer_config.json")
    session.say(f"distill: reading {config.data}")
    render = functools.partial(text.render_chat, tokenizer) if tokenizer.chat_template else None
    documents = text.read_documents(config.data, render, field="--data")
    train, held_out = text.hold_out(documents, config.held_out_share, f"--data {config.data}")
    session.say(f"distill: tokenising {len(train)} texts, and {len(held_out)} held out")
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    rows = {name: text.pack(part, encode, end, config.sequence_length) for name, part in (("train", train), ("held_out", held_out))}
    if not rows["held_out"].mask.any():
        raise UserError(f"the {len(held_out)} texts held out of --data {config.data} have no token that counts; give other lines, or more")
    arrays: dict[str, Any] = {f"{part}_{field}": getattr(rows[part], field) for part in rows for field in text.Rows._fields}
    prompts = _prompts(config, session, train, encode, end) if config.on_policy_share > 0 else []
    arrays["prompts"] = np.full((len(prompts), max(map(len, prompts), default=0)), end, np.int32)
    for row, prompt in zip(arrays["prompts"], prompts):
        row[: len(prompt)] = prompt
    arrays["prompt_lengths"] = np.asarray([len(prompt) for prompt in prompts], np.int32)
    arrays["digest"] = np.asarray(_digest(config.data))
    arrays["example"] = np.asarray(_example(held_out[0], tokenizer.all_special_tokens))
    return arrays


def _before_answer(document: text.Document) -> tuple[str, ...]:
    """The pieces before the last one that the model has to write."""
    last = max((i for i, trained in enumerate(document.trained) if trained), default=0)
    return document.pieces[:last]


def _example(document: text.Document, special: list[str]) -> str:
    whole = "".join(_before_answer(document) or document.pieces)
    return "" if any(token in whole for token in special) else " ".join(whole.split()[:8])


def _prompts(config: Config, session: Session, documents: list[text.Document], encode: text.Encode, end: int) -> list[list[int]]:
    """Begun as `text.pack` begins a text, so that prompts look alike in both kinds of batches."""
    given = [[end, *(token for piece in pieces for token in encode(piece))] for pieces in map(_before_answer, documents) if pieces]
    if not given:
        raise UserError(
            f'on_policy_share {config.on_policy_share} needs prompts, and --data {config.data} has none: give lines with "prompt" and '
            f'"completion" or with "messages", or set --on-policy-share 0'
        )
    room = config.sequence_length - config.max_new_tokens
    fitting = [prompt for prompt in given if len(prompt) <= room]
    if not fitting:
        raise UserError(
            f"no prompt in --data {config.data} has at most {room} tokens, what sequence_length {config.sequence_length} leaves beside "
            f"max_new_tokens {config.max_new_tokens}; try --sequence-length {min(map(len, given)) + config.max_new_tokens}"
        )
    left_out = len(documents) - len(fitting)
    session.say(
        f"distill: {len(fitting)} prompts to sample from" + (f"; {left_out} texts have none, or too long a one" if left_out else "")
    )
    return fitting


class Batches:
    """position -> batch, a pure function of seed and position.

    A batch of the data is {"tokens", "segment_ids", "mask"}, each [b t], with empty prompts [b 0]; one for the student's own completions
    is {"prompts": [b p], "prompt_lengths": [b]} with empty rows. So the arrays' shapes say which is which, and a program is compiled for
    each: prompts are padded to powers of two. Which kind it is, is drawn for every batch.

    Args:
      config: Sizes, seed and the share of either kind.
      corpus: From `prepare`.

    Attributes:
      positions: Token positions of all batches given so far, sampled ones at their longest.
      given: How many batches that were.
    """

    def __init__(self, config: Config, corpus: Corpus):
        self._config, self._corpus, self.positions, self.given = config, corpus, 0, 0
        size, seed = config.train.batch_size, config.train.seed
        self._rows = text.batches(corpus.train, size, seed, field="sequence_length") if config.on_policy_share < 1 else None
        if config.on_policy_share > 0 and len(corpus.prompts) < size:
            raise UserError(f"there are {len(corpus.prompts)} prompts, fewer than train.batch_size {size}; lower it, or give more lines")
        self._chosen = text.order(len(corpus.prompts), size, seed) if config.on_policy_share > 0 else None

    def __call__(self, position: int) -> dict[str, np.ndarray]:
        size, share = self._config.train.batch_size, self._config.on_policy_share
        empty = np.zeros((size, 0), np.int32)
        if self._chosen is not None and np.random.default_rng((self._config.train.seed, position, 1)).random() < share:
            chosen = self._chosen(position)
            lengths = self._corpus.prompt_lengths[chosen]
            width = min(_bucket(int(lengths.max())), self._config.sequence_length - self._config.max_new_tokens)
            prompts = np.zeros((size, width), np.int32)
            held = min(width, self._corpus.prompts.shape[1])
            prompts[:, :held] = self._corpus.prompts[chosen, :held]
            batch = {"tokens": empty, "segment_ids": empty, "mask": empty.astype(bool), "prompts": prompts, "prompt_lengths": lengths}
            width += self._config.max_new_tokens
        else:
            assert self._rows is not None, "with a share of 1 every batch is sampled"
            batch = {**self._rows(position), "prompts": empty, "prompt_lengths": np.zeros(size, np.int32)}
            width = batch["tokens"].shape[1]
        self.positions, self.given = self.positions + size * width, self.given + 1
        return batch


def _bucket(length: int) -> int:
    return max(_SHORTEST_BUCKET, 1 << (length - 1).bit_length())
