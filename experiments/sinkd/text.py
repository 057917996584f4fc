"""Distillation on real text with transformers: which package is a docstring from? Encoders teach encoders, decoders teach decoders.

Data: the docstrings of packages that janax needs anyway, read from where they are installed (licences: `LICENCES`); nothing is shipped or fetched.
The packages' names (and "np", "plt") are taken out. Blocks of neighbouring docstrings go as a whole to training (70 %), validation (15 %) or test
(15 %), so that near copies stay together.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from janax.experiments import text as texts
from janax.experiments.session import Session
from janax.experiments.sinkd import students
from janax.experiments.sinkd.config import Config, TextConfig
from janax.experiments.sinkd.students import Data, Network, Row
from janax.models import encoder, transformer

__all__ = ["LICENCES", "LOSSES", "Corpus", "anonymous", "corpus", "network", "rows", "study"]

LOSSES = ("labels", "kd", "rkl", "js", "sinkd", "debiased")
LICENCES = {
    "flax": "Apache-2.0",
    "jax": "Apache-2.0",
    "matplotlib": "its own, of the PSF's kind",
    "numpy": "BSD-3-Clause",
    "optax": "Apache-2.0",
    "orbax": "Apache-2.0",
    "sklearn": "BSD-3-Clause",
}
_BLOCKS = 200
_SHARES = {"train": 140, "validation": 30, "test": 30}
_NAMES = re.compile(
    r"jaxlib|jax|flax|nnx|linen|optax|orbax|numpy|matplotlib|pyplot|mpl|scikit-learn|sklearn|scikit|(?<![a-z])(np|jnp|plt|ocp)(?=\W)", re.I
)


class Corpus(NamedTuple):
    """Texts as tokens.

    Attributes:
      tokens: [n t] int32, 0 for padding at the end.
      labels: [n] number of the package.
      parts: "train", "validation", "test" -> row numbers.
      vocab_size: Number of tokens.
      fingerprint: Of the texts.
    """

    tokens: np.ndarray
    labels: np.ndarray
    parts: dict[str, np.ndarray]
    vocab_size: int
    fingerprint: str


def anonymous(text: str) -> str:
    """The text without the packages' names."""
    return _NAMES.sub("_", text)


def corpus(config: TextConfig) -> Corpus:
    """Reads the docstrings, takes names out, splits by blocks and trains a tokenizer on the training part; the same installation, the same rows."""
    documents: list[str] = []
    labels: list[int] = []
    parts: dict[str, list[int]] = {part: [] for part in _SHARES}
    kinds = [part for part, share in _SHARES.items() for _ in range(share)]
    for label, package in enumerate(config.packages):
        found = [anonymous(text) for text in texts.docstrings(package)]
        order = np.random.default_rng(label).permutation(_BLOCKS)
        for block, members in enumerate(np.array_split(np.arange(len(found)), _BLOCKS)):
            parts[kinds[order[block]]] += [len(documents) + int(i) for i in members]
        documents += found
        labels += [label] * len(found)
    tokenizer = texts.train_tokenizer([documents[i] for i in parts["train"]], config.vocab_size)
    tokens = np.zeros((len(documents), config.sequence_length), np.int32)
    for row, document in zip(tokens, documents):
        ids = tokenizer.encode(document[: 8 * config.sequence_length]).ids[: config.sequence_length]
        row[: len(ids)] = ids
    return Corpus(
        tokens,
        np.asarray(labels, np.int32),
        {part: np.asarray(numbers, np.int32) for part, numbers in parts.items()},
        tokenizer.get_vocab_size(),
        texts.fingerprint(documents),
    )


@functools.cache
def network(kind: str, vocab_size: int, length: int, width: int, depth: int, num_classes: int) -> Network:
    """A transformer under a linear layer: over the mean of an encoder's states, or over a decoder's state at the last token."""
    heads = width // 16
    if kind == "encoder":
        shape = encoder.EncoderConfig(
            vocab_size=vocab_size,
            max_length=length,
            width=width,
            depth=depth,
            heads=heads,
            hidden=4 * width,
            norm="pre",
            final_norm=True,
            head=False,
        )
        start = functools.partial(encoder.init, shape)

        def summary(params: Any, tokens: jax.Array) -> jax.Array:
            segments = (tokens != 0).astype(jnp.int32)
            return encoder.pool(shape, params, encoder.hidden(shape, params, tokens, segments), segments).mean
    else:
        decoder = transformer.TransformerConfig(
            vocab_size=vocab_size,
            max_length=length,
            width=width,
            depth=depth,
            heads=heads,
            kv_heads=heads,
            head_width=16,
            hidden=4 * width,
            tied=True,
        )
        start = functools.partial(transformer.init, decoder)

        def summary(params: Any, tokens: jax.Array) -> jax.Array:
            segments = (tokens != 0).astype(jnp.int32)
            last = jnp.maximum(jnp.sum(segments, axis=1) - 1, 0)
            return jnp.take_along_axis(transformer.hidden(decoder, params, tokens, segments), last[:, None, None], axis=1)[:, 0]

    def init(key: jax.Array) -> dict[str, Any]:
        return {"body": start(key), "head": jnp.zeros((width, num_classes)), "bias": jnp.zeros(num_classes)}

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        return summary(params["body"], tokens) @ params["head"] + params["bias"][None]

    return Network(init, apply)


def rows(config: Config) -> list[Row]:
    """The objectives; X stands for (1 - alpha) CE + alpha X, and the term beside KD has the paper's weight, or 0.05 for a sum over rows."""
    alpha, size = config.objective.alpha, config.text.batch_size
    labels = {"labels": 1 - alpha}
    beside = labels | {"kd": alpha}
    return [
        Row("CE", {"labels": 1.0}),
        *(Row(name, labels | {loss: alpha}) for name, loss in (("KD", "kd"), ("RKL", "rkl"), ("JS", "js"), ("SinKD", "sinkd"))),
        Row("debiased", labels | {"debiased": alpha}),
        Row("anchored", labels | {"sinkd": alpha}, anchor=1.0),
        Row("KD + SinKD, paper's weight", beside | {"sinkd": config.objective.weight * size}),
        Row("KD + SinKD .05", beside | {"sinkd": 0.05 * size}),
    ]


def study(config: Config, session: Session) -> dict[str, Any]:
    """By network: "teacher" (its accuracies) and "rows": name -> {"validation": [seeds], "test": [seeds]}; and "corpus"."""
    prepared = _Prepared(config.text)
    found: dict[str, Any] = {"corpus": session.memo("text-corpus", prepared.facts, alone=True)}
    for kind in config.text.networks:
        teacher = session.memo(f"text-{kind}-teacher", lambda kind=kind: prepared.teacher(kind)[1], alone=True)
        done: dict[str, Any] = {}
        for row in session.track(rows(config), f"text, {kind}"):
            compute = functools.partial(_train, config, prepared, kind, row)
            done |= session.memo(f"text-{kind}-{row.name}", compute, alone=True)
        found[kind] = {"teacher": teacher, "rows": done}
    return found


class _Prepared:
    """Corpus and teachers, made when first asked for."""

    def __init__(self, config: TextConfig):
        self._config = config

    @functools.cached_property
    def corpus(self) -> Corpus:
        return corpus(self._config)

    def facts(self) -> dict[str, Any]:
        found = self.corpus
        counts = np.bincount(found.labels[found.parts["test"]], minlength=len(self._config.packages))
        return {
            "texts": dict(zip(self._config.packages, np.bincount(found.labels).tolist())),
            "parts": {part: len(numbers) for part, numbers in found.parts.items()},
            "majority": float(counts.max() / counts.sum()),
            "fingerprint": found.fingerprint,
        }

    def network(self, kind: str, width: int, depth: int) -> Network:
        return network(kind, self.corpus.vocab_size, self._config.sequence_length, width, depth, len(self._config.packages))

    @functools.cache  # noqa: B019
    def teacher(self, kind: str) -> tuple[Data, dict[str, float]]:
        """Data with the logits of a teacher of two blocks, and its accuracies."""
        config, found = self._config, self.corpus
        net, train = self.network(kind, config.teacher_width, 2), found.parts["train"]
        params = students.train_teacher(
            net,
            0,
            found.tokens[train],
            found.labels[train],
            num_steps=config.teacher_steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate / 5,
        )
        logits = students.logits_of(net, params, found.tokens)
        right = logits.argmax(axis=-1) == found.labels
        arrays = (found.tokens, found.labels, logits, *(found.parts[part] for part in _SHARES))
        return Data(*map(jnp.asarray, arrays)), {part: float(right[found.parts[part]].mean()) for part in ("validation", "test")}


def _train(config: Config, prepared: _Prepared, kind: str, row: Row) -> dict[str, dict[str, list[float]]]:
    settings = config.text
    return students.train_students(
        prepared.network(kind, settings.width, 1),
        LOSSES,
        [row],
        students.numbers_of(config.objective),
        prepared.teacher(kind)[0],
        num_seeds=settings.num_seeds,
        num_steps=settings.num_steps,
        batch_size=settings.batch_size,
        num_train=settings.num_train,
        num_iters=config.objective.num_iters,
        learning_rate=settings.learning_rate,
    )
