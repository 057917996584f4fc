"""Tasks of offline sequence design: what a method may see, the oracle that it may not, and what is reported of its designs. NumPy only.

    offline, oracle = tasks.tfbind8("SIX6_REF_R1", "lowest5000")
    with oracle.sealed():                                       # a query from here raises
        designs = my_method(offline, tasks.starts(offline))     # [m l], most trusted first
    report = tasks.offline_report(oracle(designs), designs, y_min=offline.y_min, y_max=offline.y_max)

An `Offline` holds the rows of the offline split and of the whole table no more than its lowest and highest score, which normalise reports; the
`Oracle` is another object. Wherever scores tie, the row that stands first in the table comes first.

TFBind8 has 65,792 rows: both strands of the 32,896 pairs of reverse complements, so that palindromes stand there twice. It comes with the package.
The protein sets, whose terms are not clear enough to ship them, are read from a directory: avgfp/avgfp.npz, aav/aav2_28mer.npz, e4b/e4b.npz.
"""

import contextlib
import importlib.resources
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from janax.experiments.errors import UserError

__all__ = [
    "AMINO_ACIDS",
    "DNA",
    "FACTORS",
    "PROTEINS",
    "SPLITS",
    "Library",
    "Offline",
    "Oracle",
    "Panel",
    "Problem",
    "Report",
    "all_sequences",
    "average_duplicates",
    "codes",
    "hamming",
    "lower_half",
    "nearest",
    "offline_report",
    "offline_rows",
    "panel",
    "protein",
    "published_dual",
    "replace_duplicates",
    "reverse_complement",
    "spearman",
    "starts",
    "strings",
    "table_problem",
    "tfbind8",
    "tfbind10",
]

DNA = "ACGT"
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
FACTORS = ("SIX6_REF_R1", "PAX4_REF_R1", "POU3F4_REF_R1")
PROTEINS = {"avgfp": "avgfp/avgfp.npz", "aav": "aav/aav2_28mer.npz", "e4b": "e4b/e4b.npz"}
SPLITS = ("half", "lowest5000")
_LOWEST = 5000
_REGRET_AT = (1, 10, 100)
_REPLICATE = "_REF_R"  # SIX6_REF_R1: replicate 1 of the reference allele of SIX6


class Offline(NamedTuple):
    """All that a design method may see.

    Attributes:
      name: Of the task.
      letters: The alphabet; token i is `letters[i]`.
      tokens: [n l] int32, the offline designs in the table's order.
      scores: [n] float64, their scores.
      y_min: Lowest score of the whole table, for normalising reports.
      y_max: Highest score of the whole table, likewise.
    """

    name: str
    letters: str
    tokens: np.ndarray
    scores: np.ndarray
    y_min: float
    y_max: float


class Library(NamedTuple):
    """Sequences with measured scores, all of them; no oracle.

    Attributes:
      name: Of the protein.
      letters: The alphabet.
      tokens: [n l] int32, distinct.
      scores: [n] float64, mean over the rows that had this sequence.
      wildtype: [l] int32.
    """

    name: str
    letters: str
    tokens: np.ndarray
    scores: np.ndarray
    wildtype: np.ndarray


class Panel(NamedTuple):
    """Binding tables of many proteins over the same sequences.

    Attributes:
      names: [tables] tuple, protein and replicate.
      pairs: [p 2 8] int32, both strands of every pair of reverse complements; equal for palindromes.
      scores: [p tables] float32 E-scores, the same for both strands.
    """

    names: tuple[str, ...]
    pairs: np.ndarray
    scores: np.ndarray


class Oracle:
    """True scores of designs, counted, and closed while methods design.

    Attributes:
      name: For messages.
      num_queries: Designs that were scored so far.
    """

    def __init__(self, name: str, score_fn: Callable[[np.ndarray], np.ndarray], *, num_letters: int, length: int):
        """An oracle.

        Args:
          name: For messages.
          score_fn: tokens [m l] -> scores [m].
          num_letters: Size v of the alphabet.
          length: Length l of a design.
        """
        self.name, self.num_queries = name, 0
        self._score_fn, self._num_letters, self._length, self._sealed = score_fn, num_letters, length, False

    def __call__(self, designs: ArrayLike) -> np.ndarray:
        """Scores [m] float64 of designs [m l].

        Raises:
          ValueError: on anything but tokens of this task.
          RuntimeError: while the oracle is sealed.
        """
        if self._sealed:
            raise RuntimeError(f"oracle of {self.name}: queried while methods design; offline scores are all they may use")
        tokens = _tokens("oracle", designs, self._num_letters)
        if tokens.shape[1] != self._length:
            raise ValueError(f"oracle: 'designs' has shape {tokens.shape}, expected [m l] with l={self._length}")
        self.num_queries += len(tokens)
        return np.asarray(self._score_fn(tokens), np.float64)

    @contextlib.contextmanager
    def sealed(self) -> Iterator[None]:
        """Within, every query raises RuntimeError."""
        before, self._sealed = self._sealed, True
        try:
            yield
        finally:
            self._sealed = before


class Problem(NamedTuple):
    """A task with an exact oracle."""

    offline: Offline
    oracle: Oracle


class Report(NamedTuple):
    """What became of one run's designs; scores normalised to (y - y_min) / (y_max - y_min). JSON by `_asdict()`.

    Attributes:
      count: Number m of designs, copies included.
      max: Highest score, the "100th percentile".
      median: The "50th percentile".
      mean: Mean score.
      distinct: Number of different designs.
      regret: By number of designs k (of "1", "10", "100", those up to m): 1 - the best score of the first k.
      from_start: Mean Hamming distance between a design and its start; None without starts.
      unmoved: Number of designs equal to their start; None without starts.
      to_training: Mean Hamming distance between a design and the nearest offline sequence; None without them.
      known: Number of designs that are offline sequences; None without them.
    """

    count: int
    max: float
    median: float
    mean: float
    distinct: int
    regret: dict[str, float]
    from_start: float | None = None
    unmoved: int | None = None
    to_training: float | None = None
    known: int | None = None


# Sequences.


def all_sequences(length: int, num_letters: int = 4) -> np.ndarray:
    """[v^l l] int32: every sequence, row i being the base-v number i, first letter highest."""
    return np.indices((num_letters,) * length, dtype=np.int32).reshape(length, -1).T.copy()


def codes(tokens: ArrayLike, num_letters: int = 4) -> np.ndarray:
    """[n l] to [n] int64: the base-v numbers of sequences, the row in `all_sequences`."""
    array = _tokens("codes", tokens, num_letters)
    return array.astype(np.int64) @ num_letters ** np.arange(array.shape[1] - 1, -1, -1, dtype=np.int64)


def reverse_complement(tokens: np.ndarray) -> np.ndarray:
    """[... l] of the letters A, C, G, T: the other strand, read in its own direction."""
    return 3 - tokens[..., ::-1]


def strings(tokens: ArrayLike, letters: str) -> list[str]:
    """[n l] tokens as texts."""
    alphabet = np.array(list(letters))
    return ["".join(row) for row in alphabet[_tokens("strings", tokens, len(letters))]]


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n l] and [n l] to [n]: the number of places where two sequences differ."""
    return np.sum(np.asarray(a) != np.asarray(b), axis=-1)


def nearest(designs: np.ndarray, training: np.ndarray) -> np.ndarray:
    """[m l] and [n l] to [m]: Hamming distance of every design to the nearest training sequence."""
    places = np.ascontiguousarray(np.asarray(training, np.uint8).T)  # sums run along the longer axis
    found = [np.min(np.add.reduce(places != design[:, None], axis=0, dtype=np.int32)) for design in np.asarray(designs, np.uint8)]
    return np.array(found, np.int64)


# Tasks.


def offline_rows(scores: np.ndarray, split: str) -> np.ndarray:
    """Rows of a table that make up an offline split, in the table's order.

    Args:
      scores: [n] of all rows.
      split: "half", all rows at or below the median, or "lowest5000", the 5,000 lowest, of equal scores those that stand first.

    Returns:
      [k] int64 row numbers, ascending.

    Raises:
      ValueError: if there is no such split, or there are fewer rows.
    """
    if split == "half":
        return np.flatnonzero(scores <= np.median(scores))
    if split != "lowest5000":
        raise ValueError(f"offline_rows: 'split' is {split!r}, expected one of {', '.join(map(repr, SPLITS))}")
    if len(scores) < _LOWEST:
        raise ValueError(f"offline_rows: 'scores' has {len(scores)} rows, expected at least {_LOWEST} for 'lowest5000'; take 'half'")
    return np.sort(np.argsort(scores, kind="stable")[:_LOWEST])


def table_problem(
    name: str, scores: ArrayLike, *, letters: str = DNA, split: str = "half", order: np.ndarray | None = None, scaled: bool = True
) -> Problem:
    """The task of a complete table.

    Args:
      name: Of the task.
      scores: [v^l] score of every sequence, by its base-v number; floating.
      letters: The alphabet of v letters.
      split: See `offline_rows`.
      order: [n] the sequences' numbers in the table's order, repetitions allowed; None is each once, ascending.
      scaled: Scale the scores to [0, 1] first, as Design-Bench's tables are; the identity on one that is. False leaves them.

    Returns:
      The offline part, and the oracle of all sequences.

    Raises:
      ValueError: if the number of scores is no power of v, or one is not finite.
    """
    table = np.asarray(scores)
    length = round(np.log(max(table.size, 1)) / np.log(len(letters)))
    if table.ndim != 1 or table.size != len(letters) ** length or not length:
        raise ValueError(f"table_problem: 'scores' has shape {table.shape}, expected [v^l] with v={len(letters)}: one score a sequence")
    if not np.issubdtype(table.dtype, np.floating) or not np.all(np.isfinite(table)):
        raise ValueError(f"table_problem: 'scores' of {name!r} must be finite floating-point numbers")
    if scaled and (table.min() != 0 or table.max() != 1):
        table = (table - table.min()) / (table.max() - table.min())
    order = np.arange(len(table)) if order is None else np.asarray(order)
    rows = order[offline_rows(table[order], split)]
    tokens = all_sequences(length, len(letters))[rows]
    offline = Offline(name, letters, tokens, table[rows].astype(np.float64), float(table.min()), float(table.max()))
    return Problem(offline, Oracle(name, lambda x: table[codes(x, len(letters))], num_letters=len(letters), length=length))


def tfbind8(factor: str = "SIX6_REF_R1", split: str = "half") -> Problem:
    """TFBind8: 8-mers that a transcription factor binds, measured for all 65,536.

    Args:
      factor: "SIX6_REF_R1" (the benchmark's), "PAX4_REF_R1" or "POU3F4_REF_R1".
      split: "half", Design-Bench's rows at or below the median of 65,792 (32,898 of them for SIX6), or "lowest5000", BIB's reduced set.

    Returns:
      The offline part, scores in [0, 1], and the exact oracle.

    Raises:
      ValueError: if there is no such factor or split.

    Reference: Trabucco et al., arXiv:2202.08450 (TFBind8-Exact-v0); data in experiments/data/tfbind8.
    """
    if factor not in FACTORS:
        raise ValueError(f"tfbind8: 'factor' is {factor!r}, expected one of {', '.join(map(repr, FACTORS))}")
    with _packaged("tfbind8.npz") as file, np.load(file) as data:
        scores = data["score" if factor == FACTORS[0] else f"score_{factor}"]
        return table_problem(f"tfbind8/{factor}/{split}", scores, split=split, order=data["bench_order"])


def tfbind10(data_dir: Path | None, split: str = "half") -> Problem:
    """TFBind10 (pho4), from a table that the user has: tfbind10/tfbind10.npz with `score` [4^10] float, by base-4 number in A, C, G, T.

    Raises:
      UserError: if the directory does not hold it.
      ValueError: if the table is of another kind.
    """
    with np.load(_given(data_dir, "tfbind10/tfbind10.npz")) as data:
        return table_problem(f"tfbind10/pho4/{split}", data["score"], split=split)


def protein(name: str, data_dir: Path | None) -> Library:
    """Measured variants of a protein; sequences that were measured more than once have the mean of their scores.

    Args:
      name: "avgfp" (237 residues, 51,715 variants, log brightness), "aav" (28 residues, 42,340, packaging) or "e4b" (102, 91,031, activity).
      data_dir: Directory that holds the files of `PROTEINS`.

    Returns:
      All variants. There is no exact oracle of the others.

    Raises:
      ValueError: if there is no such protein.
      UserError: if the directory does not hold its file.
    """
    if name not in PROTEINS:
        raise ValueError(f"protein: 'name' is {name!r}, expected one of {', '.join(map(repr, PROTEINS))}")
    with np.load(_given(data_dir, PROTEINS[name])) as data:
        tokens, scores = average_duplicates(data["tokens"], data["score"])
        return Library(name, "".join(data["alphabet"]), tokens.astype(np.int32), scores, data["wildtype"].astype(np.int32))


def lower_half(library: Library, scores: ArrayLike | None = None) -> Offline:
    """The offline part of a protein: the sequences at or below the median score.

    Args:
      library: From `protein`.
      scores: [n] in place of the measured scores: BIB has a learned oracle score all sequences before it takes the half. None keeps them.

    Returns:
      The half, in the library's order; y_min and y_max are those of all n.

    Raises:
      ValueError: if there is not one score a sequence.
    """
    y = library.scores if scores is None else np.asarray(scores, np.float64)
    if y.shape != library.scores.shape:
        raise ValueError(f"lower_half: 'scores' has shape {y.shape}, expected [n] with n={len(library.scores)} sequences")
    rows = offline_rows(y, "half")
    return Offline(library.name, library.letters, library.tokens[rows], y[rows], float(y.min()), float(y.max()))


def average_duplicates(tokens: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n l], [n] to distinct rows in the order of their first appearance, with the mean of their scores, float64."""
    distinct, first, group = np.unique(tokens, axis=0, return_index=True, return_inverse=True)
    means = np.bincount(group.ravel(), np.asarray(scores, np.float64)) / np.bincount(group.ravel())
    order = np.argsort(first)
    return distinct[order], means[order]


def panel(without: Sequence[str]) -> Panel:
    """The 57 binding tables, less every replicate of the proteins that are design tasks.

    Args:
      without: Names of tables, as of `FACTORS`, or of proteins ("SIX6"): all tables of the same protein are left out. Their scores would tell
        the answer: replicates correlate at 0.95.

    Returns:
      What is left: 55 tables without SIX6, 51 without SIX6, PAX4 and POU3F4.

    Raises:
      ValueError: if a protein is not among the tables.
    """
    proteins = {name.partition(_REPLICATE)[0] for name in ([without] if isinstance(without, str) else without)}
    with _packaged("tf_panel_ref.npz") as file, np.load(file) as data:
        names = [str(name) for name in data["names"]]
        known = {name.partition(_REPLICATE)[0] for name in names}
        if proteins - known:
            raise ValueError(f"panel: 'without' names {min(proteins - known)!r}, expected some of {', '.join(sorted(known))}")
        kept = [i for i, name in enumerate(names) if name.partition(_REPLICATE)[0] not in proteins]
        sequences = all_sequences(8)
        pairs = np.stack([sequences[data["canonical_code"]], sequences[data["revcomp_code"]]], axis=1)
        return Panel(tuple(names[i] for i in kept), pairs, (data["escore_1e5"][kept].T / 1e5).astype(np.float32))


def published_dual(data_dir: Path | None) -> np.ndarray:
    """[32898] float64: (K + lambda I)^-1 y as BDI's authors published it for TFBind8's half split, from tfbind8/bdi_published_dual.npz.

    It has no licence and is not shipped.

    Raises:
      UserError: if the directory does not hold it.
    """
    with np.load(_given(data_dir, "tfbind8/bdi_published_dual.npz")) as data:
        return data["dual"]


def starts(offline: Offline, count: int = 128) -> np.ndarray:
    """[count] rows of the highest-scoring offline designs, best first.

    Raises:
      ValueError: if there are fewer.
    """
    if count > len(offline.scores):
        raise ValueError(f"starts: 'count' is {count}, expected at most the {len(offline.scores)} offline designs")
    return np.argsort(-offline.scores, kind="stable")[:count]


# Reports.


def replace_duplicates(designs: ArrayLike, ranking: ArrayLike) -> np.ndarray:
    """Designs with every copy replaced by the best-ranked sequence that is not there yet.

    Args:
      designs: [m l]; of equal ones the first stays in its place.
      ranking: [n l] other sequences, best first by what the method knows.

    Returns:
      [m l] distinct designs.

    Raises:
      ValueError: if the ranking is too short.
    """
    chosen = np.array(designs)
    taken: set[bytes] = set()
    copies = []
    for i, design in enumerate(chosen):
        if design.tobytes() in taken:
            copies.append(i)
        taken.add(design.tobytes())
    for candidate in np.asarray(ranking, chosen.dtype):
        if not copies:
            break
        if candidate.tobytes() not in taken:
            taken.add(candidate.tobytes())
            chosen[copies.pop(0)] = candidate
    if copies:
        raise ValueError(f"replace_duplicates: 'ranking' ends with {len(copies)} copies left to replace; give more sequences")
    return chosen


def offline_report(
    scores: ArrayLike,
    designs: ArrayLike,
    *,
    y_min: float,
    y_max: float,
    starts: ArrayLike | None = None,
    training: ArrayLike | None = None,
) -> Report:
    """What is said of one run's designs.

    Copies count as often as they stand there: 128 copies of one good design have a high median. See `distinct`, and report the designs of
    `replace_duplicates` beside these.

    Args:
      scores: [m] the oracle's.
      designs: [m l] tokens, the most trusted first: the regret at k is that of the first k.
      y_min: Lowest score of the whole table.
      y_max: Highest score of the whole table.
      starts: [m l] where each design started.
      training: [n l] the offline sequences.

    Returns:
      The report.

    Raises:
      ValueError: if the shapes do not fit, or there are no designs.
    """
    raw, tokens = np.asarray(scores, np.float64), np.asarray(designs)
    if tokens.ndim != 2 or raw.shape != tokens.shape[:1] or not len(raw):
        raise ValueError(f"offline_report: 'scores' has shape {raw.shape} and 'designs' {tokens.shape}, expected [m] and [m l]")
    for name, other, wanted in (("starts", starts, tokens.shape), ("training", training, tokens.shape[1:])):
        if other is not None and np.shape(other)[-len(wanted) :] != wanted:
            raise ValueError(f"offline_report: {name!r} has shape {np.shape(other)}, which does not fit 'designs' {tokens.shape}")
    if not y_max > y_min:
        raise ValueError(f"offline_report: 'y_max' must be above 'y_min', got {y_max} and {y_min}")
    y = (raw - y_min) / (y_max - y_min)
    moved = None if starts is None else hamming(tokens, np.asarray(starts))
    distance = None if training is None else nearest(tokens, np.asarray(training))
    return Report(
        count=len(y),
        max=float(y.max()),
        median=float(np.median(y)),
        mean=float(y.mean()),
        distinct=len(np.unique(tokens, axis=0)),
        regret={str(k): float(1 - y[:k].max()) for k in _REGRET_AT if k <= len(y)},
        from_start=None if moved is None else float(moved.mean()),
        unmoved=None if moved is None else int(np.sum(moved == 0)),
        to_training=None if distance is None else float(distance.mean()),
        known=None if distance is None else int(np.sum(distance == 0)),
    )


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation of [n] and [n]; equal values share the mean of their ranks. nan if either is constant."""
    if np.ndim(a) != 1 or np.shape(a) != np.shape(b):
        raise ValueError(f"spearman: 'a' has shape {np.shape(a)} and 'b' {np.shape(b)}, expected [n] twice")
    x, y = (_ranks(np.asarray(values, np.float64)) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt(np.sum(x * x) * np.sum(y * y))
    return float(np.sum(x * y) / scale) if scale else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def _tokens(function: str, tokens: ArrayLike, num_letters: int) -> np.ndarray:
    array = np.asarray(tokens)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{function}: tokens have shape {array.shape} and dtype {array.dtype}, expected [n l] integers")
    if array.size and (array.min() < 0 or array.max() >= num_letters):
        raise ValueError(f"{function}: tokens are between {array.min()} and {array.max()}, expected 0 to {num_letters - 1}")
    return array


def _packaged(name: str) -> IO[bytes]:
    return (importlib.resources.files("janax.experiments") / "data" / "tfbind8" / name).open("rb")


def _given(data_dir: Path | None, name: str) -> Path:
    if data_dir is None:
        raise UserError(f"{name} does not come with the package; name the directory that holds it by --data-dir")
    path = Path(data_dir) / name
    if not path.is_file():
        raise UserError(f"--data-dir {data_dir} has no {name}; name a directory that has it")
    return path
