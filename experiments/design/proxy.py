"""What the designs go by: features by several networks, a ridge on each, and leave-one-out to choose and to say how far to trust it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from janax.experiments.bib import pretraining, tasks
from janax.experiments.design.config import Config
from janax.experiments.design.table import Table
from janax.experiments.errors import UserError
from janax.experiments.session import Session
from janax.jaxlib_ext import ridge
from janax.models import sequence

__all__ = ["RIDGES", "Chosen", "Features", "Trial", "choose", "compute"]

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
_ENOUGH = 1000
"""Sequences from which on a language model of them is trained."""
_PIECE = 256


class Features(NamedTuple):
    """A way to make vectors of sequences.

    Attributes:
      name: For people.
      params: Of the network; an empty dictionary for letters.
      apply: (params, rows [l v] of probabilities, length []) -> [d].
    """

    name: str
    params: Any
    apply: Callable[[Any, jax.Array, jax.Array], jax.Array]


class Trial(NamedTuple):
    """Leave-one-out figures of one way at its best ridge.

    Attributes:
      name: Of the features.
      width: Length d of the vectors.
      rel_ridge: The ridge.
      r2: 1 - mean squared leave-one-out error / variance.
      spearman: Rank correlation of leave-one-out predictions.
    """

    name: str
    width: int
    rel_ridge: float
    r2: float
    spearman: float


class Chosen(NamedTuple):
    """The features with the least leave-one-out error, and its errors.

    Attributes:
      features: The way.
      phi: [n d] float64 features of the data.
      rel_ridge: The ridge.
      residuals: [n] leave-one-out errors, in units of the scores.
      trials: All that were tried.
    """

    features: Features
    phi: np.ndarray
    rel_ridge: float
    residuals: np.ndarray
    trials: list[Trial]


def compute(features: Features, tokens: np.ndarray, lengths: np.ndarray, num_letters: int) -> np.ndarray:
    """[n d] float64 features of sequences."""

    @jax.jit
    def run(params: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        def one(args: tuple[jax.Array, jax.Array]) -> jax.Array:
            return features.apply(params, jax.nn.one_hot(args[0], num_letters, dtype=jnp.float32), args[1])

        return jax.lax.map(one, (tokens, lengths), batch_size=_PIECE)

    return np.asarray(run(features.params, jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32)), np.float64)


def choose(table: Table, config: Config, session: Session) -> Chosen:
    """Tries all ways that suit the data; float64 is enabled within for fits."""
    mean, std = table.scores.mean(), table.scores.std(ddof=1)
    trials, best = [], None
    for features in _ways(table, config, session):
        session.check_stop()
        phi = compute(features, table.tokens, table.lengths, len(table.letters))
        ridges = np.array(RIDGES if config.rel_ridge is None else (config.rel_ridge,))
        with jax.enable_x64(True):
            found = jax.jit(ridge.leave_one_out)(phi, (table.scores - mean) / std, ridges)
        k = int(found.best)
        residuals = np.asarray(found.residuals[k]) * std
        left = table.scores - residuals
        r2 = 1 - float(np.mean(residuals**2)) / float(np.var(table.scores))
        trials.append(Trial(features.name, phi.shape[1], float(ridges[k]), r2, tasks.spearman(left, table.scores)))
        if best is None or r2 > max(trial.r2 for trial in trials[:-1]):
            best = (features, phi, float(ridges[k]), residuals)
    assert best is not None
    return Chosen(*best, trials)


def _ways(table: Table, config: Config, session: Session) -> list[Features]:
    longest = table.tokens.shape[1]
    ways = []
    if len(set(table.lengths.tolist())) == 1:
        ways.append(Features("letters at their places", {}, lambda params, rows, length: rows.reshape(-1)))
    model = _small(table.letters, longest)
    key = jax.random.key(config.seed)
    ways.append(_network("a random network", model, pretraining.initial_params(model, key)))
    if len(table.scores) >= _ENOUGH:
        objective = pretraining.Objective(masked=1.0, span=1, num_spans=max(1, round(0.15 * longest)))
        recipe = pretraining.Recipe(num_steps=200, batch_size=64, scale=0.02)
        order = np.random.default_rng(config.seed).permutation(len(table.scores))
        cut = max(1, len(order) // 20)
        parts = [sequence.Batch(table.tokens[rows], table.lengths[rows]) for rows in (order[cut:], order[:cut])]
        train = functools.partial(
            pretraining.train, model, objective, recipe, *parts, seed=config.seed, session=session, name="language model of the sequences"
        )
        trained = pretraining.kept(session.workdir / "encoder", model, train)
        ways.append(_network("a language model of these sequences", trained.model, trained.params))
    if config.encoder:
        try:
            given, params = sequence.load(config.encoder, table.letters)
        except (OSError, ValueError) as error:
            raise UserError(f"--encoder {config.encoder}: {error}") from error
        ways.append(_network(f"the network in {config.encoder}", given, params))
    return ways


def _small(letters: str, longest: int) -> sequence.SequenceModel:
    vocabulary = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters)
    base = sequence.PROTEIN_SMALL.config
    config = dataclasses.replace(base, vocab_size=len(vocabulary), max_length=max(base.max_length, longest))
    return sequence.SequenceModel(config=config, alphabet=sequence.alphabet(vocabulary, letters, framed=False))


def _network(name: str, model: sequence.SequenceModel, params: Any) -> Features:
    def apply(params: Any, rows: jax.Array, length: jax.Array) -> jax.Array:
        return sequence.features(model, params, rows, length)

    return Features(name, params, apply)
