"""Text for language models: documents, a tokenizer trained on them, and rows of packed tokens.

The text that is always there is what ships with janax's own dependencies: the docstrings of their source files, real technical English with
code in it. Whole packages are held out, so that evaluation text was written by other people.
"""

import ast
import functools
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from janax.experiments.errors import UserError
from janax.jaxlib_ext import scoring

__all__ = [
    "Document",
    "Encode",
    "Rows",
    "batches",
    "docstrings",
    "fingerprint",
    "hold_out",
    "in_order",
    "order",
    "pack",
    "read_documents",
    "render_chat",
    "train_tokenizer",
]

_MODULES = {"orbax": "orbax.checkpoint"}
_SHORTEST = 150

Encode = Callable[[str], list[int]]


class Document(NamedTuple):
    """A text in pieces; `trained[i]` says whether piece i counts in the loss."""

    pieces: tuple[str, ...]
    trained: tuple[bool, ...]


def docstrings(package: str) -> list[str]:
    """The docstrings of a package's source files over 150 characters, each once, in the order of the files' names; nothing is imported."""
    module = _MODULES.get(package, package)
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"text.packages names {package!r}, which is not installed; pip install it, or name others")
    root = Path(next(iter(found.submodule_search_locations)))
    seen: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if {"tests", "test", "_vendored"} & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > _SHORTEST:
                    seen.setdefault(text)
    return list(seen)


def read_documents(
    path: Path, render: Callable[[list[dict[str, str]]], Document] | None = None, *, field: str = "text.path"
) -> list[Document]:
    """The documents of a .txt or .jsonl file, or of all of them in a directory.

    Args:
      path: A .txt file is one document; a line of a .jsonl file holds "text", or "prompt" and "completion", or "messages".
      render: Chat messages -> document, of a tokenizer's chat template; needed for "messages".
      field: What messages call the path.

    Returns:
      The documents, in the order of file names and lines.

    Raises:
      UserError: naming the file and line.
    """
    found = path.rglob("*") if path.is_dir() else [path]
    files = sorted(entry for entry in found if entry.is_file() and (entry.suffix in (".txt", ".jsonl") or entry == path))
    if not files:
        raise UserError(f"{field} {path} holds no .txt or .jsonl file; give a file, or a directory of them")
    documents: list[Document] = []
    for file in files:
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{field}: {file} cannot be read as UTF-8 text ({error})") from error
        if file.suffix != ".jsonl":
            documents.append(Document((content,), (True,)))
            continue
        for number, line in enumerate(content.split("\n"), 1):  # strings may hold other separators of lines
            if line.strip():
                documents.append(_parse(line, f"{file}:{number}", render))
    return [document for document in documents if any(piece.strip() for piece in document.pieces)]


def _parse(line: str, where: str, render: Callable[[list[dict[str, str]]], Document] | None) -> Document:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error})") from error
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return Document((record["text"],), (True,))
    if isinstance(record, dict) and isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        return Document((record["prompt"], record["completion"]), (False, True))
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        if render is None:
            raise UserError(f"{where} holds chat messages, and the tokenizer has no chat template; start from an instruction-tuned model")
        messages = record["messages"]
        if not messages or not all(isinstance(one, dict) and isinstance(one.get("content"), str) and "role" in one for one in messages):
            raise UserError(f'{where} holds a chat whose messages are not all objects with "role" and "content"')
        try:
            return render(messages)
        except jinja2.TemplateError as error:
            raise UserError(f"{where} holds a chat that the tokenizer's template refuses ({error})") from error
    raise UserError(f'{where} holds none of "text", "prompt" with "completion", or "messages"')


def render_chat(tokenizer: Any, messages: list[dict[str, str]]) -> Document:
    """A chat in the model's template; what the assistant says is trained on, with the end of its turn."""
    pieces, trained, before = [], [], ""

    def add(now: str, *, counts: bool) -> None:
        nonlocal before
        if not now.startswith(before):
            raise UserError(
                "the text holds chats that this model's template writes anew at every turn; give prompts and completions instead"
            )
        pieces.append(now[len(before) :])
        trained.append(counts)
        before = now

    render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    for count, message in enumerate(messages, 1):
        answers = message.get("role") == "assistant"
        if answers:
            add(render(messages[: count - 1], add_generation_prompt=True), counts=False)
        add(render(messages[:count]), counts=answers)
    return Document(tuple(pieces), tuple(trained))


def hold_out(documents: Sequence[Document], share: float, source: str) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and at least one kept for evaluation; `source` is what messages call their origin.

    Raises:
      UserError: if nothing would be left to train on.
    """
    shuffled = np.random.default_rng(0).permutation(len(documents))
    count = max(1, round(share * len(documents)))
    if count >= len(documents):
        raise UserError(f"{source} holds {len(documents)} documents, too few to hold {count} of them out; add text")
    return [documents[i] for i in shuffled[count:]], [documents[i] for i in shuffled[:count]]


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with one special token, `<|endoftext|>` (id 0), as a `tokenizers.Tokenizer`; digits are split one by one."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Rows(NamedTuple):
    """Packed rows.

    Attributes:
      tokens: [n t] int32.
      segment_ids: [n t] int32: 1, 2, ... for the documents of a row, 0 for padding.
      mask: [n t] bool, true where the token counts in the loss (never at a document's first token, which nothing predicts).
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    mask: np.ndarray


def pack(documents: Sequence[Document], encode: Encode, end: int, row_length: int) -> Rows:
    """Tokenised documents, each with the end token behind it, packed into rows; a longer one is cut into pieces of a row's length.

    Pieces go where `scoring.fit_rows` puts them.

    Args:
      documents: What to pack.
      encode: Text -> token ids, without special tokens.
      end: Token put behind every document, and before it as the context of its first token.
      row_length: Tokens per row.

    Returns:
      The rows, in an order that depends on the documents only.
    """
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    for document in documents:
        ids, counts = [end], [False]
        for text, trained in zip(document.pieces, document.trained):
            new = encode(text)
            ids += new
            counts += [trained] * len(new)
        ids.append(end)
        counts.append(document.trained[-1])
        tokens, mask = np.asarray(ids, np.int32), np.asarray(counts, bool)
        for start in range(0, len(tokens) - 1, row_length - 1):  # the last token of a piece is the context of the next
            cut = slice(start, start + row_length)
            if mask[cut][1:].any():
                pieces.append((tokens[cut], np.concatenate([[False], mask[cut][1:]])))
    row, segment, start = scoring.fit_rows(np.array([len(tokens) for tokens, _ in pieces], np.int64), row_length)
    shape = (int(row.max(initial=-1)) + 1, row_length)
    packed = Rows(np.full(shape, end, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool))
    for (tokens, mask), *here in zip(pieces, row, segment, start):
        where = here[0], slice(here[2], here[2] + len(tokens))
        packed.tokens[where], packed.segment_ids[where], packed.mask[where] = tokens, here[1], mask
    return packed


def batches(rows: Rows, batch_size: int, seed: int, *, field: str = "text.sequence_length") -> Callable[[int], dict[str, np.ndarray]]:
    """position -> batch: the rows in an order shuffled anew for every pass, a pure function of seed and position.

    Raises:
      UserError: if there are fewer rows than a batch has; `field` is what the message calls their length.
    """
    count = len(rows.tokens)
    if count < batch_size:
        raise UserError(f"the text fills {count} rows of {field}, fewer than train.batch_size {batch_size}; read more text")
    chosen = order(count, batch_size, seed)
    return lambda position: {name: getattr(rows, name)[chosen(position)] for name in Rows._fields}


def order(count: int, batch_size: int, seed: int) -> Callable[[int], np.ndarray]:
    """position -> numbers of the rows in that batch, each at most once in a pass."""
    per_pass = count // batch_size

    def chosen(position: int) -> np.ndarray:
        epoch, index = divmod(position, per_pass)
        return np.random.default_rng((seed, epoch)).permutation(count)[index * batch_size : (index + 1) * batch_size]

    return chosen


def in_order(rows: Rows, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """All rows as batches of one size, the last one filled up with padding."""
    short = -len(rows.tokens) % batch_size
    filled = {name: np.concatenate([x, np.zeros((short, *x.shape[1:]), x.dtype)]) for name, x in rows._asdict().items()}
    for start in range(0, len(filled["tokens"]), batch_size):
        yield {name: x[start : start + batch_size] for name, x in filled.items()}


def fingerprint(texts: Sequence[str]) -> str:
    """Twelve hexadecimal digits of the SHA-256 over the texts: the same for the same corpus."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:12]
