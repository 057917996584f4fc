"""Encoders of DNA and protein sequences: letters in, one vector per sequence out; masked and multi-task pre-training losses.

    model = sequence.DNA_KMERS                                        # or model, params = sequence.load(directory, sequence.AMINO_ACIDS)
    params = encoder.init(model.config, jax.random.key(0))
    letters, _ = sequence.encode(model.alphabet, ["AGGTATCA"])        # [b l] numbers of letters
    phi = sequence.features(model, params, letters)                   # [b d] mean of the last layer over k-mers or residues
    phi = sequence.features(model, params, rows)                      # [l v] probabilities of letters, differentiable; one sequence: [d]

A network has tokens of its own, numbered as its makers chose; the sequences here are numbered by `Alphabet.letters`, "ACGT" and
"ACDEFGHIKLMNPQRSTVWY". An `Alphabet` is the bridge: the token of every letter, or of every run of k letters, whose number is the base-v number of
its letters, first letter highest. All of it is data, so a vocabulary file can be turned into one (`alphabet`).
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from janax.jaxlib_ext import checks, dtypes, kmers, masking, sharding
from janax.models import encoder, loading, presets

__all__ = [
    "AMINO_ACIDS",
    "DNA",
    "DNABERT_3",
    "DNABERT_VOCABULARY",
    "DNA_KMERS",
    "DNA_LETTERS",
    "DNA_VOCABULARY",
    "ESM2_8M",
    "ESM2_650M",
    "ESM2_VOCABULARY",
    "PROTBERT",
    "PROTBERT_VOCABULARY",
    "PROTEIN_SMALL",
    "PROTEIN_VOCABULARY",
    "Alphabet",
    "Batch",
    "SequenceModel",
    "Tokens",
    "alphabet",
    "encode",
    "features",
    "features_fn",
    "init_readout",
    "load",
    "masked_loss",
    "regression_loss",
    "reverse_complement",
    "save",
    "tokenize",
]

DNA = "ACGT"
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
_COMPLEMENT = {"A": "T", "C": "G", "G": "C", "T": "A"}

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
DNABERT_VOCABULARY = (*_SPECIAL, *map("".join, itertools.product("ATCG", repeat=3)))
"""69 tokens, letters in the order A, T, C, G: the 3-mer (i, j, k) has the id 5 + 16 i + 4 j + k."""
DNA_VOCABULARY = (*_SPECIAL, *"ATCG")
PROTBERT_VOCABULARY = (*_SPECIAL, *"LAGVESIKRDTPNQFYMHCWXUBZO")
"""30 tokens, the twenty residues at 5 to 24, then X, U, B, Z, O."""
ESM2_VOCABULARY = ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO", ".", "-", "<null_1>", "<mask>")
"""33 tokens, the twenty residues at 4 to 23."""
PROTEIN_VOCABULARY = (*_SPECIAL, *AMINO_ACIDS)

_ROLES = {
    "pad": ("[PAD]", "<pad>"),
    "mask": ("[MASK]", "<mask>"),
    "start": ("[CLS]", "<cls>", "<s>"),
    "end": ("[SEP]", "<eos>", "</s>", "<sep>"),
}
_UNKNOWN = ("X", "N", "[UNK]", "<unk>")  # any residue, any base, and the token for what is none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alphabet:
    """Letters of sequences and their tokens. Hashable, so it can be a static argument of `jax.jit`; made by `alphabet`.

    Attributes:
      letters: The v letters in the order of their numbers.
      k: Letters in a token; a sequence of l letters has l - k + 1 tokens, each beginning one letter after the other.
      ids: [v^k] token of every run of k letters, by its base-v number.
      vocab_size: Number of tokens of the network.
      pad: Token that stands where there is nothing.
      unknown: Token of a letter that is none of `letters`, and of a run with such a letter.
      mask: Token for what is to be predicted.
      start: Token before every sequence; None if the network reads sequences bare.
      end: Token behind every sequence; None likewise.
    """

    letters: str
    k: int = 1
    ids: tuple[int, ...]
    vocab_size: int
    pad: int
    unknown: int
    mask: int
    start: int | None = None
    end: int | None = None

    def __post_init__(self) -> None:
        if not self.letters or len(set(self.letters)) != len(self.letters):
            raise ValueError(f"Alphabet: 'letters' is {self.letters!r}, expected different letters")
        if self.k < 1 or len(self.ids) != len(self.letters) ** self.k:
            raise ValueError(f"Alphabet: 'ids' has {len(self.ids)} entries, expected v^k with v={len(self.letters)} and k={self.k}")
        if (self.start is None) != (self.end is None):
            raise ValueError(f"Alphabet: 'start' is {self.start} and 'end' {self.end}, expected both or neither")
        named = {"pad": self.pad, "unknown": self.unknown, "mask": self.mask, "start": self.start, "end": self.end}
        for name, token in (*(("ids", token) for token in self.ids), *named.items()):
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"Alphabet: {name!r} holds {token}, expected tokens below 'vocab_size' {self.vocab_size}")

    @property
    def framed(self) -> bool:
        """Whether a start and an end token are put around sequences."""
        return self.start is not None

    @property
    def complement(self) -> tuple[int, ...] | None:
        """[v] the number of every letter's complementary letter, for DNA; None for anything else."""
        if set(self.letters) != set(DNA):
            return None
        return tuple(self.letters.index(_COMPLEMENT[letter]) for letter in self.letters)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceModel:
    """A network and what its tokens mean. Hashable.

    Attributes:
      config: The network.
      alphabet: Its tokens.
    """

    config: encoder.EncoderConfig
    alphabet: Alphabet

    def __post_init__(self) -> None:
        if self.config.vocab_size != self.alphabet.vocab_size:
            raise ValueError(f"SequenceModel: the network has {self.config.vocab_size} tokens, the alphabet {self.alphabet.vocab_size}")
        if self.config.mask_token not in (None, self.alphabet.mask):
            raise ValueError(f"SequenceModel: 'mask_token' of the network is {self.config.mask_token}, the alphabet's {self.alphabet.mask}")


class Tokens(NamedTuple):
    """What a network reads.

    Attributes:
      tokens: [b t] int32 tokens, or [b t vocab_size] rows of probabilities.
      segment_ids: [b t] int32, 1 where there is a token and 0 for padding; None if there is no padding.
      mask: [b t] 1 at tokens of letters, 0 at start, end and padding.
    """

    tokens: jax.Array
    segment_ids: jax.Array | None
    mask: jax.Array


class Batch(NamedTuple):
    """Sequences to learn from.

    Attributes:
      letters: [b l] numbers of letters.
      lengths: [b] letters of each; None if all have l.
      targets: [b m] values to predict; None for masked losses.
    """

    letters: Any
    lengths: Any = None
    targets: Any = None


def alphabet(vocabulary: Sequence[str], letters: str, *, k: int | None = None, framed: bool = True) -> Alphabet:
    """The alphabet of a vocabulary.

    Args:
      vocabulary: The network's tokens in the order of their ids. Special tokens are known by their usual names, [PAD] or <pad> and so on; the
        unknown letter is X (any residue) or N (any base) if that is a token and no letter, else [UNK] or <unk>.
      letters: How sequences are numbered, e.g. "ACGT".
      k: Letters in a token; None is the smallest k for which all v^k runs are tokens.
      framed: Put start and end tokens around sequences, as BERT and ESM were trained.

    Returns:
      The alphabet; `vocab_size` is the length of `vocabulary`.

    Raises:
      ValueError: naming the token that is missing.
    """
    places = {token: i for i, token in enumerate(vocabulary)}
    sizes = range(1, 12) if k is None else (k,)
    runs: list[str] = []
    for size in sizes:
        if len(letters) ** size > len(vocabulary):
            break
        runs = ["".join(run) for run in itertools.product(letters, repeat=size)]
        if all(run in places for run in runs):
            break
    missing = [run for run in runs if run not in places]
    if missing or not runs:
        what = f"{missing[0]!r} and {len(missing) - 1} more runs" if missing else f"any run of {k or 1} letters of {letters!r}"
        raise ValueError(f"alphabet: 'vocabulary' of {len(vocabulary)} tokens lacks {what}; is it one of letters or k-mers?")

    def find(role: str, names: Sequence[str]) -> int:
        for name in names:
            if name in places:
                return places[name]
        raise ValueError(f"alphabet: 'vocabulary' has no token for {role!r}, expected one of {', '.join(names)}")

    roles = {role: find(role, names) for role, names in _ROLES.items() if framed or role not in ("start", "end")}
    return Alphabet(
        letters=letters,
        k=len(runs[0]),
        ids=tuple(places[run] for run in runs),
        vocab_size=len(vocabulary),
        unknown=find("unknown", [name for name in _UNKNOWN if name not in letters]),
        **roles,
    )


DNA_KMERS = SequenceModel(config=presets.DNA_KMERS, alphabet=alphabet(DNABERT_VOCABULARY, DNA, framed=False))
"""3-mers, without start and end tokens."""
DNA_LETTERS = SequenceModel(config=presets.DNA_LETTERS, alphabet=alphabet(DNA_VOCABULARY, DNA, framed=False))
"""Single letters, without start and end tokens."""
DNABERT_3 = SequenceModel(config=presets.DNABERT_3, alphabet=alphabet(DNABERT_VOCABULARY, DNA))
PROTBERT = SequenceModel(config=presets.PROTBERT, alphabet=alphabet(PROTBERT_VOCABULARY, AMINO_ACIDS))
ESM2_8M = SequenceModel(config=presets.ESM2_8M, alphabet=alphabet(ESM2_VOCABULARY, AMINO_ACIDS))
ESM2_650M = SequenceModel(config=presets.ESM2_650M, alphabet=ESM2_8M.alphabet)
PROTEIN_SMALL = SequenceModel(config=presets.PROTEIN_SMALL, alphabet=alphabet(PROTEIN_VOCABULARY, AMINO_ACIDS, framed=False))
"""Single residues, without start and end tokens."""


def load(
    directory: str | os.PathLike[str], letters: str, *, framed: bool = True, shardings: loading.Shardings | None = None
) -> tuple[SequenceModel, dict[str, Any]]:
    """A published encoder of sequences: DNABERT, ProtBERT, ESM-2 and others of their layouts.

    Args:
      directory: In Hugging Face's layout, with vocab.txt or tokenizer.json.
      letters: How sequences are numbered, `DNA` or `AMINO_ACIDS`.
      framed: See `alphabet`.
      shardings: See `loading.load_encoder`.

    Returns:
      The model and its parameters.

    Raises:
      ValueError: naming the file and what is wrong with it.
    """
    config, params = loading.load_encoder(directory, shardings=shardings)
    vocabulary = loading.load_vocabulary(directory)
    if len(vocabulary) > config.vocab_size:
        raise ValueError(f"{directory}: there are {len(vocabulary)} tokens in the vocabulary, and {config.vocab_size} in the network")
    vocabulary += ("",) * (config.vocab_size - len(vocabulary))  # rows of the embedding that no token has
    try:
        return SequenceModel(config=config, alphabet=alphabet(vocabulary, letters, framed=framed)), params
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def save(directory: str | os.PathLike[str], model: SequenceModel, params: Mapping[str, Any]) -> None:
    """Writes an encoder and its vocabulary in Hugging Face's layout; `load` reads them back.

    Raises:
      ValueError: if the layout cannot express the network, or `params` does not belong to it.
    """
    loading.save_encoder(directory, model.config, params)
    mine = model.alphabet
    vocabulary = [""] * mine.vocab_size
    for token, run in zip(mine.ids, itertools.product(mine.letters, repeat=mine.k)):
        vocabulary[token] = "".join(run)
    esm = model.config.norm == "pre"
    roles = {"pad": mine.pad, "mask": mine.mask, "start": mine.start, "end": mine.end}
    for role, token in roles.items():
        if token is not None:
            vocabulary[token] = _ROLES[role][1 if esm else 0]
    vocabulary[mine.unknown] = vocabulary[mine.unknown] or ("<unk>" if esm else "[UNK]")
    loading.save_vocabulary(directory, vocabulary)


# Sequences to tokens.


def encode(alphabet: Alphabet, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sequences as numbers of letters; a host function.

    Args:
      alphabet: Gives the numbers.
      texts: Sequences, in capitals or not.

    Returns:
      [b l] int32 numbers of letters, v for a letter that is none of the alphabet's (X, U, Z, O, B of proteins) and behind the end; and [b] int32
      lengths.

    Raises:
      ValueError: if there are no texts, or one is shorter than k letters.
    """
    lengths = np.array([len(text) for text in texts], np.int32)
    if not len(lengths) or lengths.min() < alphabet.k:
        raise ValueError(
            f"encode: 'texts' has lengths {lengths.tolist()[:8]}, expected at least one text, of {alphabet.k} letters or more each"
        )
    numbers = {letter: i for i, letter in enumerate(alphabet.letters)}
    letters = np.full((len(texts), lengths.max()), len(alphabet.letters), np.int32)
    for row, text in zip(letters, texts):
        row[: len(text)] = [numbers.get(letter, len(numbers)) for letter in text.upper()]
    return letters, lengths


def tokenize(alphabet: Alphabet, x: ArrayLike, lengths: ArrayLike | None = None) -> Tokens:
    """What a network reads of sequences.

    Args:
      alphabet: The network's tokens. Static.
      x: [b l] integer numbers of letters, v or more for an unknown one; [b l v] floating probabilities of letters; or [b l-k+1 v^k] floating
        probabilities of k-mers.
      lengths: [b] letters of each sequence, at least k, the rest being padding whatever stands there; None if all have l.

    Returns:
      Tokens, or rows of probabilities for rows.

    Raises:
      ValueError: on other shapes, or sequences of fewer than k letters.
    """
    words = _words("tokenize", alphabet, x)
    count = None if lengths is None else _counts("tokenize", alphabet, words, lengths)[:, None]
    if alphabet.framed:
        start, end = (
            jnp.broadcast_to(_one(token, words, alphabet), (len(words), 1, *words.shape[2:])) for token in (alphabet.start, alphabet.end)
        )
        words = jnp.concatenate([start, words, end], axis=1)
    framed = int(alphabet.framed)
    place = jnp.arange(words.shape[1], dtype=jnp.int32)[None] - framed  # 0 at the first token of letters
    if count is None:
        inside = (place >= 0) & (place < words.shape[1] - 2 * framed)
        return Tokens(words, None, jnp.broadcast_to(inside, words.shape[:2]).astype(jnp.float32))
    behind = [(place >= count, alphabet.pad)] if alphabet.end is None else [(place == count, alphabet.end), (place > count, alphabet.pad)]
    for where, token in behind:
        words = jnp.where(jnp.expand_dims(where, tuple(range(2, words.ndim))), _one(token, words, alphabet), words)
    mask = (place >= 0) & (place < count)
    return Tokens(words, (place < count + framed).astype(jnp.int32), mask.astype(jnp.float32))


def _words(function: str, alphabet: Alphabet, x: ArrayLike) -> jax.Array:
    """Tokens of letters only: [b t] int32, or rows [b t vocab_size] for rows."""
    x, v, k = jnp.asarray(x), len(alphabet.letters), alphabet.k
    if jnp.issubdtype(x.dtype, jnp.integer):
        if x.ndim != 2 or x.shape[1] < k:
            raise ValueError(f"{function}: 'x' has shape {x.shape}, expected numbers of letters [b l] with l of at least {k}")
        number, known = jnp.zeros((), jnp.int32), jnp.ones((), bool)
        for j in range(k):
            letter = x[:, j : x.shape[1] - k + 1 + j].astype(jnp.int32)
            number, known = number * v + letter, known & (letter >= 0) & (letter < v)
        return jnp.where(known, jnp.take(np.array(alphabet.ids, np.int32), jnp.where(known, number, 0), axis=0), alphabet.unknown)
    if x.ndim != 3 or x.shape[2] not in (v, v**k) or not jnp.issubdtype(x.dtype, jnp.floating):
        rows = f"[b l {v}]" if k == 1 else f"[b l {v}] or [b l-{k - 1} {v**k}]"
        raise ValueError(
            f"{function}: 'x' has dtype {x.dtype} and shape {x.shape}, expected integers [b l] or floating rows of probabilities {rows}"
        )
    rows = kmers.soft_kmers(x, k=k) if x.shape[2] == v else x
    places = np.zeros((v**k, alphabet.vocab_size))
    places[np.arange(v**k), alphabet.ids] = 1
    return jnp.einsum("btw,wv->btv", rows, jnp.asarray(places, rows.dtype), precision=jax.lax.Precision.HIGHEST)


def _one(token: int | None, words: jax.Array, alphabet: Alphabet) -> jax.Array:
    """A token as [1 1] or as a row [1 1 vocab_size], like the words."""
    if words.ndim == 2:
        return jnp.full((1, 1), token, words.dtype)  # type: ignore[arg-type]
    return (jnp.arange(alphabet.vocab_size) == token).astype(words.dtype)[None, None]


def _counts(function: str, alphabet: Alphabet, words: jax.Array, lengths: ArrayLike) -> jax.Array:
    """[b] int32 tokens of each sequence."""
    lengths = jnp.asarray(lengths)
    checks.require_integers(function, lengths=lengths)
    checks.check_shapes(function, x=(words[..., 0] if words.ndim == 3 else words, "b t"), lengths=(lengths, "b"))
    return lengths.astype(jnp.int32) - (alphabet.k - 1)


def reverse_complement(alphabet: Alphabet, x: ArrayLike, lengths: ArrayLike | None = None) -> jax.Array:
    """The other strand of DNA, read in its own direction.

    Args:
      alphabet: Of DNA. Static.
      x: [b l], [b l v] or [b l-k+1 v^k], see `tokenize`; unknown letters stay unknown.
      lengths: [b] letters of each sequence; None if all have l. What is behind stays behind.

    Returns:
      Like x.

    Raises:
      ValueError: if the letters are not those of DNA.
    """
    if alphabet.complement is None:
        raise ValueError(f"reverse_complement: letters {alphabet.letters!r} have no complements, expected those of DNA, {DNA!r}")
    x, v, k = jnp.asarray(x), len(alphabet.letters), alphabet.k
    other = np.array(alphabet.complement, np.int32)
    if x.ndim == 2:
        known = (x >= 0) & (x < v)
        x = jnp.where(known, jnp.take(other, jnp.where(known, x, 0), axis=0).astype(x.dtype), x)
    else:
        runs = np.indices((v,) * (k if x.shape[2] == v**k else 1)).reshape(-1, x.shape[2])  # letters of every run, first one first
        x = jnp.take(x, v ** np.arange(len(runs)) @ other[runs], axis=2)  # the first letter goes to the last place, whose power is 0
    if lengths is None:
        return x[:, ::-1]
    short = k - 1 if x.ndim == 3 and x.shape[2] == v**k else 0
    last = jnp.asarray(lengths).astype(jnp.int32)[:, None] - 1 - short
    place = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    source = jnp.where(place <= last, last - place, place)
    return jnp.take_along_axis(x, jnp.expand_dims(source, tuple(range(2, x.ndim))), axis=1)


# Features and losses.


def features(
    model: SequenceModel, params: Mapping[str, Any], x: ArrayLike, lengths: ArrayLike | None = None, *, both_strands: bool = False
) -> jax.Array:
    """One vector per sequence: the mean of the last layer over the tokens of letters; start, end and padding do not count.

    phi(x) = 1/t sum_l h_l. Differentiable in rows of probabilities; a one-hot row gives what its letter gives.

    Args:
      model: Network and tokens. Static.
      params: As `encoder.init` gives them for `model.config`.
      x: [b l] integer numbers of letters, [b l v] probabilities of letters, or [b l-k+1 v^k] probabilities of k-mers; one sequence without b.
      lengths: [b] letters of each sequence, at least k, [] for one; None if all have l.
      both_strands: Average over DNA and its reverse complement, which makes the features those of the pair. Static.

    Returns:
      [b d], or [d] for one sequence, float32 or wider.

    Raises:
      ValueError: on other shapes, a sequence longer than the network's positions, or if `params` does not belong to the model.

    Reference: arXiv:2301.02931, whose code pools DNABERT and ProtBERT so (evaluation mode, frozen).
    """
    x = jnp.asarray(x)
    single = x.ndim == (1 if jnp.issubdtype(x.dtype, jnp.integer) else 2)
    if single:
        x, lengths = x[None], None if lengths is None else jnp.asarray(lengths)[None]

    def call(x: jax.Array, params: Mapping[str, Any], lengths: jax.Array | None) -> jax.Array:
        def pooled(x: jax.Array) -> jax.Array:
            tokens = tokenize(model.alphabet, x, lengths)
            _check_length("features", model, tokens)
            h = encoder.hidden(model.config, params, tokens.tokens, tokens.segment_ids)
            return masking.masked_mean(h, tokens.mask[..., None], axis=1)

        if not both_strands:
            return pooled(x)
        return jnp.mean(jax.vmap(pooled)(jnp.stack([x, reverse_complement(model.alphabet, x, lengths)])), axis=0)

    phi = sharding.placed(call, lambda spec: jax.P(*spec(x)[:1], None), x, params, lengths)
    return phi[0] if single else phi


def features_fn(model: SequenceModel, *, both_strands: bool = False) -> Callable[..., jax.Array]:
    """`features` as `features_fn(params, x, lengths=None) -> [b d]`."""
    return functools.partial(features, model, both_strands=both_strands)


def _check_length(function: str, model: SequenceModel, tokens: Tokens) -> None:
    if model.config.positions == "learned" and tokens.mask.shape[1] > model.config.max_length:
        raise ValueError(f"{function}: 'x' makes {tokens.mask.shape[1]} tokens, the network has positions for {model.config.max_length}")


def masked_loss(
    model: SequenceModel, params: Mapping[str, Any], batch: Batch, key: jax.Array, *, span: int = 1, num_spans: int = 1
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Masked language modelling: the mean cross-entropy of tokens that were replaced by the mask, in nats.

    In every sequence `num_spans` different places are drawn, uniformly among those with `span` tokens from there on; those tokens are masked. For
    k-mers a span of k hides one letter whole, since every k-mer that holds it is masked; a shorter span is read off from the neighbours.

    Args:
      model: Network and tokens. Static.
      params: As `encoder.init` gives them; the network has a head.
      batch: Sequences; targets are not looked at.
      key: PRNG key.
      span: Tokens masked in a row. Static.
      num_spans: Places drawn; spans may overlap, and a sequence with fewer places has them all. Static.

    Returns:
      The loss [] in nats, and info: "accuracy", the share of masked tokens that are the likeliest, and "weight", their number.

    Raises:
      ValueError: if no sequence of this length has such a span, or as in `features`.

    Reference: Devlin et al., arXiv:1810.04805 (always [MASK], never a random or the true token); spans as in DNABERT.
    """
    if not jnp.issubdtype(jnp.result_type(batch.letters), jnp.integer):
        raise ValueError(f"masked_loss: 'letters' has dtype {jnp.result_type(batch.letters)}, expected integer numbers of letters")
    _, length = np.shape(batch.letters)
    places = length - model.alphabet.k + 1 - span + 1
    if span < 1 or not 1 <= num_spans <= max(places, 0):
        raise ValueError(
            f"masked_loss: 'span' {span} and 'num_spans' {num_spans} do not fit sequences with {max(places, 0)} places for a span"
        )

    def call(letters: jax.Array, params: Mapping[str, Any], lengths: jax.Array | None, key: jax.Array) -> Any:
        tokens = tokenize(model.alphabet, letters, lengths)
        _check_length("masked_loss", model, tokens)
        index = jnp.arange(tokens.mask.shape[1], dtype=jnp.int32)[None, None]
        last = jnp.sum(tokens.mask, axis=1).astype(jnp.int32)[:, None] - span  # the last place that has a whole span
        draw = jax.random.uniform(key, (len(letters), places))
        draw, first = jax.lax.top_k(jnp.where(jnp.arange(places, dtype=jnp.int32)[None] <= last, draw, -1.0), num_spans)
        first = (first + int(model.alphabet.framed))[..., None]
        masked = jnp.any((index >= first) & (index < first + span) & (draw >= 0)[..., None], axis=1)
        shown = jnp.where(masked, model.alphabet.mask, tokens.tokens)
        z = encoder.logits(model.config, params, shown, tokens.segment_ids)
        own = jnp.sum(jnp.where(jnp.arange(z.shape[-1])[None, None] == tokens.tokens[..., None], z, 0.0), axis=-1)
        right = (jnp.argmax(z, axis=-1) == tokens.tokens).astype(z.dtype)
        loss = masking.masked_mean(jax.nn.logsumexp(z, axis=-1) - own, masked)
        return loss, {"accuracy": masking.masked_mean(right, masked), "weight": jnp.sum(masked.astype(z.dtype))}

    scalars = (jax.P(), {"accuracy": jax.P(), "weight": jax.P()})
    return sharding.placed(call, lambda spec: scalars, jnp.asarray(batch.letters), params, batch.lengths, key)


def init_readout(model: SequenceModel, num_targets: int) -> dict[str, jax.Array]:
    """The linear readout of `regression_loss`, all zero: kernel [d m] and bias [m], float32."""
    return {"kernel": jnp.zeros((model.config.width, num_targets), jnp.float32), "bias": jnp.zeros(num_targets, jnp.float32)}


def regression_loss(
    model: SequenceModel, params: Mapping[str, Any], batch: Batch, key: jax.Array | None = None, *, both_strands: bool = False
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Multi-task regression: the mean squared error of a linear readout of the features, over sequences and tasks.

    Args:
      model: Network and tokens. Static.
      params: {"encoder": as `encoder.init` gives them, "readout": as `init_readout` does}.
      batch: Sequences and targets [b m], standardised by the caller; nan is a target that is missing.
      key: Not used: the loss is deterministic.
      both_strands: See `features`. Static.

    Returns:
      The loss [], and info: "r2", 1 - squared error / squared deviation of each task from its mean in the batch, both summed, and "weight", the
      number of targets.

    Raises:
      ValueError: if the targets do not fit the readout, or as in `features`.
    """
    del key
    kernel, bias, targets = params["readout"]["kernel"], params["readout"]["bias"], jnp.asarray(batch.targets)
    phi = features(model, params["encoder"], batch.letters, batch.lengths, both_strands=both_strands)
    checks.check_shapes("regression_loss", features=(phi, "b d"), kernel=(kernel, "d m"), bias=(bias, "m"), targets=(targets, "b m"))

    def call(phi: jax.Array, targets: jax.Array, kernel: jax.Array, bias: jax.Array) -> Any:
        targets = dtypes.at_least_float32(targets)
        there = ~jnp.isnan(targets)
        targets = jnp.where(there, targets, 0)
        error = jnp.square(phi @ kernel.astype(phi.dtype) + bias.astype(phi.dtype)[None] - targets)
        spread = jnp.square(targets - masking.masked_mean(targets, there, axis=0)[None])
        total = masking.masked_sum(spread, there)
        r2 = 1 - masking.masked_sum(error, there) / jnp.where(total == 0, jnp.ones_like(total), total)
        return masking.masked_mean(error, there), {"r2": r2, "weight": jnp.sum(there.astype(error.dtype))}

    return sharding.placed(call, lambda spec: (jax.P(), {"r2": jax.P(), "weight": jax.P()}), phi, targets, kernel, bias)
