"""The user's scored sequences: read from CSV, TSV or FASTA, checked, cleaned, and what was done said."""

import csv
import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from janax.experiments.design.config import Config
from janax.experiments.errors import UserError

__all__ = ["ALPHABETS", "FEWEST", "Table", "letters_of", "read"]

ALPHABETS = {"dna": "ACGT", "protein": "ACDEFGHIKLMNPQRSTVWY"}
FEWEST = 20
"""Distinct sequences with scores that a fit needs."""
_SEQUENCE_NAMES = ("sequence", "seq", "sequences", "design", "mutated_sequence", "dna", "protein")
_SCORE_NAMES = ("score", "fitness", "y", "target", "value", "activity", "label", "dms_score", "measurement")
_MISSING = ("", "na", "n/a", "nan", "none", "null", "-", "?")


class Table(NamedTuple):
    """Distinct sequences with their scores, higher is better.

    Attributes:
      letters: The alphabet.
      tokens: [n l] int32; beyond a sequence's length the number of letters, v.
      lengths: [n] int32.
      scores: [n] float64; negated where lower was better.
      notes: What was left out or averaged, a sentence each.
    """

    letters: str
    tokens: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray
    notes: list[str]

    def texts(self, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
        """Rows of tokens as text."""
        return ["".join(self.letters[i] for i in row[:length]) for row, length in zip(tokens, lengths)]


def letters_of(alphabet: str) -> str:
    """The letters of `--alphabet`.

    Raises:
      UserError: if it is neither a name nor a file of at least two different letters.
    """
    if alphabet.lower() in ALPHABETS:
        return ALPHABETS[alphabet.lower()]
    path = Path(alphabet)
    if not path.is_file():
        raise UserError(f"--alphabet {alphabet}: neither dna nor protein nor a file; give a text file that holds the letters, e.g. ACGU")
    letters = "".join(path.read_text(encoding="utf-8").split()).upper()
    if len(letters) < 2 or len(set(letters)) != len(letters):
        raise UserError(f"--alphabet {alphabet}: holds {letters!r}; expected at least two letters, each once")
    return letters


def read(config: Config) -> Table:
    """The table of `config.data`.

    Raises:
      UserError: if it cannot be used; the message names the row or the column and the mend.
    """
    letters = letters_of(config.alphabet)
    if not config.data.is_file():
        raise UserError(f"--data {config.data}: no such file; give a .csv, .tsv or FASTA file of sequences with scores")
    text = config.data.read_text(encoding="utf-8-sig", errors="replace")
    fasta = text.lstrip().startswith(">")
    rows = _fasta(config, text) if fasta else _columns(config, text)
    return _clean(config, letters, rows)


class _Row(NamedTuple):
    where: str
    sequence: str
    score: str


def _fasta(config: Config, text: str) -> list[_Row]:
    rows = []
    for record in text.split(">")[1:]:
        header, _, body = record.partition("\n")
        found = re.findall(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|NA", re.split(r"[\s|;,=]+", header.strip())[-1] or "")
        rows.append(
            _Row(f"record {header.split()[0] if header.split() else len(rows) + 1}", "".join(body.split()), found[-1] if found else "")
        )
    if not any(row.score for row in rows):
        raise UserError(f"--data {config.data}: no header ends in a score; write `>name 1.23` or `>name score=1.23`, or give a .csv file")
    return rows


def _columns(config: Config, text: str) -> list[_Row]:
    delimiter = "\t" if config.data.suffix.lower() == ".tsv" or "\t" in text.partition("\n")[0] else ","
    table = [row for row in csv.reader(text.splitlines(), delimiter=delimiter, skipinitialspace=True) if any(cell.strip() for cell in row)]
    if len(table) < 2:
        raise UserError(f"--data {config.data}: holds no rows below a header; expected columns of sequences and scores")
    header, body = [name.strip() for name in table[0]], table[1:]
    short = next((i for i, row in enumerate(body) if len(row) < len(header)), None)
    if short is not None:
        raise UserError(f"--data {config.data}: row {short + 2} has {len(body[short])} cells, expected {len(header)} as in the header")
    numeric = [i for i in range(len(header)) if _mostly(body, i, _number)]
    wordy = [i for i in range(len(header)) if _mostly(body, i, lambda x: x.isalpha())]
    sequence = _column(config, header, config.sequence_column, _SEQUENCE_NAMES, wordy, "sequence")
    score = _column(config, header, config.score_column, _SCORE_NAMES, numeric, "score")
    return [_Row(f"row {i + 2}", "".join(row[sequence].split()), row[score].strip()) for i, row in enumerate(body)]


def _mostly(body: list[list[str]], column: int, good: object) -> bool:
    cells = [row[column].strip() for row in body[:200] if row[column].strip().lower() not in _MISSING]
    return bool(cells) and sum(bool(good(cell)) for cell in cells) > 0.8 * len(cells)  # type: ignore[operator]


def _number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _column(config: Config, header: list[str], given: str, names: tuple[str, ...], likely: list[int], what: str) -> int:
    if given:
        if given not in header:
            raise UserError(f"--{what}-column {given}: the file's columns are {', '.join(header)}")
        return header.index(given)
    named = [i for i, name in enumerate(header) if name.lower() in names]
    for candidates in (named, likely):
        if len(candidates) == 1:
            return candidates[0]
    raise UserError(f"--data {config.data}: which column holds the {what}s? Say --{what}-column NAME; the columns are {', '.join(header)}")


def _clean(config: Config, letters: str, rows: list[_Row]) -> Table:
    notes: list[str] = []
    scored = [row for row in rows if row.score.lower() not in _MISSING and row.sequence]
    if len(scored) < len(rows):
        notes.append(f"{len(rows) - len(scored)} rows without a score or a sequence were left out.")
    bad = next((row for row in scored if not _number(row.score)), None)
    if bad is not None:
        raise UserError(f"--data {config.data}: {bad.where} has the score {bad.score!r}, expected a finite number, or an empty cell")
    known = [row for row in scored if not set(row.sequence.upper()) - set(letters)]
    if len(known) < len(scored):
        first = next(row for row in scored if set(row.sequence.upper()) - set(letters))
        strange = min(set(first.sequence.upper()) - set(letters))
        if config.unknown == "error":
            raise UserError(
                f"--data {config.data}: {first.where} holds {strange!r}, which is none of {letters} ({len(scored) - len(known)} rows hold such "
                "letters); mend it, or leave these rows out by --unknown drop"
            )
        notes.append(f"{len(scored) - len(known)} rows with letters other than {letters} were left out.")
    measured: dict[str, list[float]] = {}
    for row in known:
        measured.setdefault(row.sequence.upper(), []).append(float(row.score))
    repeated = {sequence: values for sequence, values in measured.items() if len(values) > 1}
    if repeated:
        spread = max(max(values) - min(values) for values in repeated.values())
        notes.append(f"{len(repeated)} sequences stand there more than once, with scores up to {spread:.4g} apart; they have the mean.")
    if len(measured) < FEWEST:
        raise UserError(
            f"--data {config.data}: {len(measured)} different sequences have scores, and a fit that can be judged needs {FEWEST}; measure more"
        )
    sequences = list(measured)
    scores = np.array([float(np.mean(values)) for values in measured.values()])
    if np.ptp(scores) == 0:
        raise UserError(f"--data {config.data}: all scores are {scores[0]:g}; there is nothing to learn from")
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    if len(set(lengths.tolist())) > 1:
        most, _ = Counter(lengths.tolist()).most_common(1)[0]
        notes.append(
            f"Sequences are {lengths.min()} to {lengths.max()} letters long (most {most}); letters are substituted only, so a design has the "
            "length of the measured sequence it starts from."
        )
    tokens = np.full((len(sequences), lengths.max()), len(letters), np.int32)
    number = {letter: i for i, letter in enumerate(letters)}
    for i, sequence in enumerate(sequences):
        tokens[i, : len(sequence)] = [number[letter] for letter in sequence]
    return Table(letters, tokens, lengths, -scores if config.minimize else scores, notes)
