"""Encoders of DNA and proteins trained here: on the binding tables of other proteins, or on sequences with masks.

    trained = pretraining.dna(0, without=("SIX6_REF_R1",))                            # two minutes on two CPU cores
    phi = pretraining.all_features(trained, tasks.all_sequences(8))                    # [65536 64] float64
    quality = pretraining.ridge_quality(phi, *tasks.tfbind8("SIX6_REF_R1", "half"))    # after design: it asks the oracle

No table of a protein that is a design task is seen, in any replicate, and what is held out for validation are pairs of reverse complements, never
one strand of a pair. A seed decides on split, parameters and batches; the same seed gives the same bits on the same machine.
"""

import contextlib
import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from janax.experiments import config as configs
from janax.experiments.bib import tasks
from janax.experiments.session import Session
from janax.jaxlib_ext import sharding
from janax.models import encoder, sequence
from janax.models.sequence import Batch, SequenceModel

__all__ = [
    "BOUND",
    "MASKED",
    "REGRESSION",
    "Objective",
    "Recipe",
    "Trained",
    "all_features",
    "bound_sequences",
    "dna",
    "initial_params",
    "kept",
    "protein",
    "ridge_quality",
    "train",
]

BOUND = 0.35
"""E-score above which a protein is taken to bind an 8-mer."""
_CHUNK = 100  # steps between two looks at the clock
_PIECE = 4096  # sequences whose features are computed at a time
_ENCODER_SCALE = 0.02  # of encoder.init


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised: regression * (squared error) + masked * (cross-entropy in nats), both on the same sequences.

    Attributes:
      regression: Weight of the tables' squared error, in units of their variance.
      masked: Weight of the masked tokens' cross-entropy.
      span: Tokens masked in a row.
      num_spans: Spans in a sequence.
      both_strands: Regress on the mean of the two strands' features.
    """

    regression: float = 0.0
    masked: float = 0.0
    span: int = 3
    num_spans: int = 1
    both_strands: bool = False

    def __post_init__(self) -> None:
        if min(self.regression, self.masked) < 0 or not self.regression + self.masked:
            raise ValueError(
                f"Objective: 'regression' is {self.regression} and 'masked' {self.masked}, expected one above 0 and none below"
            )


REGRESSION = Objective(regression=1.0)
MASKED = Objective(masked=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long and how fast: AdamW, cosine from `learning_rate` to zero.

    Attributes:
      num_steps: Optimizer steps.
      batch_size: Sequences in a step.
      learning_rate: At the first step.
      weight_decay: Of kernels and embeddings, times the learning rate.
      scale: Standard deviation of the initial kernels and embeddings.
    """

    num_steps: int = 2000
    batch_size: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    scale: float = 0.05

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "learning_rate", "scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"Recipe: {name!r} must be positive, got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise ValueError(f"Recipe: 'weight_decay' must be at least 0, got {self.weight_decay}")


class Trained(NamedTuple):
    """An encoder and how well it does on what was held out.

    Attributes:
      model: Network and tokens.
      params: Of the encoder.
      info: "r2" of the tables' values and/or "nats" and "accuracy" of masked tokens on held-out sequences, and "sequences", the number trained on.
    """

    model: SequenceModel
    params: Any
    info: dict[str, float]


def initial_params(model: SequenceModel, key: jax.Array, *, scale: float = 0.05) -> dict[str, Any]:
    """Random parameters of the encoder: kernels and embeddings normal(scale), biases 0, norms 1."""
    factor = np.float32(scale / _ENCODER_SCALE)
    return jax.tree_util.tree_map_with_path(lambda path, x: x * factor if _is_weight(path) else x, encoder.init(model.config, key))


def _is_weight(path: tuple[Any, ...]) -> bool:
    return sharding.path_string(path).endswith(("kernel", "embed/tokens", "embed/positions", "embed/types"))


# Training.


def _loss(model: SequenceModel, objective: Objective, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    loss, info = jnp.zeros(()), {}
    if objective.regression:
        error, found = sequence.regression_loss(model, params, batch, both_strands=objective.both_strands)
        loss, info = loss + objective.regression * error, info | {"r2": found["r2"]}
    if objective.masked:
        spans = {"span": objective.span, "num_spans": objective.num_spans}
        nats, found = sequence.masked_loss(model, params["encoder"], batch, key, **spans)
        loss, info = loss + objective.masked * nats, info | {"nats": nats, "accuracy": found["accuracy"]}
    return loss, info


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(recipe.learning_rate, recipe.num_steps)

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: _is_weight(path), params)

    return optax.adamw(schedule, weight_decay=recipe.weight_decay, mask=decays)


@functools.partial(jax.jit, static_argnames=("model", "objective", "recipe"), donate_argnames=("state",))
def _steps(
    model: SequenceModel, objective: Objective, recipe: Recipe, state: Any, data: Batch, rows: jax.Array, key: jax.Array
) -> tuple[Any, jax.Array]:
    """As many steps as there are batches of row numbers, [steps batch]; the state is (params, moments, step). Returns the mean loss too."""
    optimizer = _optimizer(recipe)
    gradient = jax.value_and_grad(functools.partial(_loss, model, objective), has_aux=True)

    def step(state: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
        params, moments, number = state
        batch = jax.tree.map(lambda x: x[rows], data)
        (loss, _), grads = gradient(params, batch, jax.random.fold_in(key, number))
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments, number + 1), loss

    state, losses = jax.lax.scan(step, state, rows)
    return state, jnp.mean(losses)


# These run once: LLVM need not optimise them, which would take seconds.
@functools.partial(jax.jit, static_argnames=("model", "recipe", "num_targets"), compiler_options={"xla_backend_optimization_level": 0})
def _start(model: SequenceModel, recipe: Recipe, num_targets: int, key: jax.Array) -> Any:
    params: dict[str, Any] = {"encoder": initial_params(model, key, scale=recipe.scale)}
    if num_targets:
        params["readout"] = sequence.init_readout(model, num_targets)
    return params, _optimizer(recipe).init(params), jnp.zeros((), jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "objective"), compiler_options={"xla_backend_optimization_level": 0})
def _held_out(model: SequenceModel, objective: Objective, params: Any, data: Batch, key: jax.Array) -> dict[str, jax.Array]:
    return _loss(model, objective, params, data, key)[1]


def train(
    model: SequenceModel,
    objective: Objective,
    recipe: Recipe,
    training: Batch,
    validation: Batch,
    *,
    seed: int,
    session: Session | None = None,
    name: str = "pre-training",
) -> Trained:
    """Trains an encoder, everything but the order of rows inside compiled loops of many steps.

    Args:
      model: Network and tokens.
      objective: What is minimised.
      recipe: How long and how fast.
      training: Sequences [n l], with standardised targets [n m] if the objective regresses.
      validation: Sequences that are held out, likewise.
      seed: Decides on parameters, order and masks.
      session: Shows progress and stops between two loops if the run was asked to.
      name: What the progress bar says.

    Returns:
      The encoder; the readout is thrown away.

    Raises:
      FloatingPointError: if the loss is not finite.
      StoppedError: if the session was asked to stop.
    """
    if objective.regression and (training.targets is None or validation.targets is None):
        raise ValueError("train: the objective regresses, and 'training' or 'validation' has no targets")
    key_init, key_steps, key_validation = jax.random.split(jax.random.key(seed), 3)
    num_targets = training.targets.shape[1] if objective.regression else 0
    training, validation = (
        jax.tree.map(jnp.asarray, x if objective.regression else x._replace(targets=None)) for x in (training, validation)
    )
    rows = _order(len(training.letters), seed, recipe)
    chunk = max(size for size in range(1, min(_CHUNK, recipe.num_steps) + 1) if recipe.num_steps % size == 0)
    state = _start(model, recipe, num_targets, key_init)
    line = contextlib.nullcontext() if session is None else session.progress(name, recipe.num_steps, unit="step")
    with line as bar:
        for done in range(0, recipe.num_steps, chunk):
            if session is not None:
                session.check_stop()
            state, loss = _steps(model, objective, recipe, state, training, rows[done : done + chunk], key_steps)
            if not math.isfinite(loss):
                raise FloatingPointError(f"{name}: the loss is {loss} after {done + chunk} steps; lower the learning rate")
            if bar is not None:
                bar.update(done + chunk, lambda: f"loss {float(loss):.3f}")  # noqa: B023
    info = _held_out(model, objective, state[0], validation, key_validation)
    return Trained(model, state[0]["encoder"], {key: float(x) for key, x in info.items()} | {"sequences": float(len(training.letters))})


def _order(count: int, seed: int, recipe: Recipe) -> np.ndarray:
    """[steps batch] int32: the rows shuffled anew for every pass."""
    rng = np.random.default_rng((seed, 1))
    wanted = recipe.num_steps * recipe.batch_size
    passes = [rng.permutation(count) for _ in range(-(-wanted // count))]
    return np.concatenate(passes)[:wanted].reshape(recipe.num_steps, recipe.batch_size).astype(np.int32)


# Data.


def bound_sequences(panel: tasks.Panel, threshold: float = BOUND) -> np.ndarray:
    """[p 2 8] int32: the pairs that any protein of the panel binds, E-score above the threshold."""
    return panel.pairs[np.any(panel.scores > threshold, axis=1)]


def dna(
    seed: int,
    *,
    without: Sequence[str],
    model: SequenceModel = sequence.DNA_KMERS,
    objective: Objective = REGRESSION,
    recipe: Recipe | None = None,
    held_out: int = 1500,
    session: Session | None = None,
) -> Trained:
    """An encoder of 8-mers, trained on what other proteins bind.

    With a regression in the objective: all 8-mers, whose E-scores for every table are standardised over the training pairs. With masks only: the
    8-mers that one of the proteins binds, for in all 8-mers together every letter is equally likely. Both strands are shown, each as a sequence of
    its own.

    Args:
      seed: Decides on split, parameters and batches.
      without: The design tasks; every table of their proteins is left out (`tasks.panel`).
      model: Network and tokens.
      objective: What is minimised.
      recipe: None is that of the regression, or of masks: batch 256, 2,500 steps.
      held_out: Pairs kept for validation, a tenth of them at most.
      session: Shows progress.

    Returns:
      The encoder.

    Reference: the corpus and recipe are this library's own; arXiv:2301.02931 has DNABERT in this place.
    """
    panel = tasks.panel(without)
    regress = objective.regression > 0
    if recipe is None:
        recipe = Recipe() if regress else Recipe(num_steps=2500, batch_size=256)
    pairs = panel.pairs if regress else bound_sequences(panel)
    order = np.random.default_rng((seed, 0)).permutation(len(pairs))
    held_out = min(held_out, len(pairs) // 10)
    parts = {"validation": order[:held_out], "training": order[held_out:]}
    scores = panel.scores
    mean, deviation = scores[parts["training"]].mean(axis=0), scores[parts["training"]].std(axis=0)

    def batch(rows: np.ndarray) -> Batch:
        targets = np.repeat((scores[rows] - mean) / deviation, 2, axis=0) if regress else None
        return Batch(pairs[rows].reshape(-1, pairs.shape[-1]), None, targets)

    what = "DNA encoder, " + " and ".join(word for word, on in (("tables", regress), ("masks", objective.masked > 0)) if on)
    return train(model, objective, recipe, batch(parts["training"]), batch(parts["validation"]), seed=seed, session=session, name=what)


def protein(
    seed: int,
    tokens: np.ndarray,
    *,
    model: SequenceModel = sequence.PROTEIN_SMALL,
    recipe: Recipe | None = None,
    share: float = 0.15,
    session: Session | None = None,
) -> Trained:
    """An encoder of a protein's variants, trained to fill in masked residues; one sequence in twenty is held out.

    Args:
      seed: Decides on split, parameters, batches and masks.
      tokens: [n l] variants without their scores, e.g. those of the offline part.
      model: Network and tokens.
      recipe: None is batch 64, 500 steps.
      share: Of the residues that are masked.
      session: Shows progress.

    Returns:
      The encoder.
    """
    order = np.random.default_rng((seed, 0)).permutation(len(tokens))
    held_out = min(max(1, len(tokens) // 20), 512)
    objective = Objective(masked=1.0, span=1, num_spans=max(1, round(share * tokens.shape[1])))
    parts = [Batch(tokens[rows]) for rows in (order[held_out:], order[:held_out])]
    recipe = Recipe(num_steps=500, batch_size=64, scale=_ENCODER_SCALE) if recipe is None else recipe
    return train(model, objective, recipe, *parts, seed=seed, session=session, name="protein encoder, masks")


def kept(directory: Path, model: SequenceModel, compute: Callable[[], Trained]) -> Trained:
    """What `compute` gives, kept in a directory in Hugging Face's layout: a resumed run reads it instead of training again.

    Args:
      directory: Made when the encoder is complete.
      model: What `compute` trains.
      compute: Trains.

    Returns:
      The encoder as read from the directory, the first time as well.

    Raises:
      ValueError: if the directory holds another network.
    """
    if not (directory / "info.json").exists():
        trained = compute()
        temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        sequence.save(temporary, trained.model, trained.params)
        configs.write_json(temporary / "info.json", trained.info)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    there, params = sequence.load(directory, model.alphabet.letters, framed=model.alphabet.framed)
    numerics = {name: getattr(there.config, name) for name in ("dtype", "remat", "scan_layers")}  # not part of the layout
    if there != dataclasses.replace(model, config=dataclasses.replace(model.config, **numerics)):
        raise ValueError(f"{directory}: holds another network than the one asked for; delete the directory")
    return Trained(model, params, configs.read_json(directory / "info.json"))


# What features are worth.


@functools.partial(jax.jit, static_argnames=("model", "both_strands"))
def _features(model: SequenceModel, both_strands: bool, params: Any, pieces: jax.Array) -> jax.Array:
    return jax.lax.map(lambda letters: sequence.features(model, params, letters, both_strands=both_strands), pieces)


def all_features(trained: Trained, tokens: np.ndarray, *, both_strands: bool = False) -> np.ndarray:
    """[n d] float64: the features of many sequences, computed in float32, a few thousand at a time."""
    size = min(_PIECE, len(tokens))
    count = -(-len(tokens) // size)
    padded = np.concatenate([tokens, np.repeat(tokens[-1:], count * size - len(tokens), axis=0)])
    phi = np.asarray(_features(trained.model, both_strands, trained.params, padded.reshape(count, size, -1)), np.float64)
    return phi.reshape(count * size, -1)[: len(tokens)]


def ridge_quality(phi: np.ndarray, offline: tasks.Offline, oracle: tasks.Oracle, *, rel_ridge: float = 1e-6) -> dict[str, float]:
    """How a ridge on these features, fitted to the offline rows, ranks all sequences. It asks the oracle for all of them: not for design.

    w = (Phi' Phi + lambda I)^-1 Phi' y with lambda = rel_ridge tr(Phi Phi') / N and y standardised; float64, no intercept, no centring.

    Args:
      phi: [v^l d] features of `tasks.all_sequences(l)`.
      offline: The rows to fit.
      oracle: True scores.
      rel_ridge: The ridge, in units of the mean squared norm of the features.

    Returns:
      "spearman", the rank correlation over all sequences, and "top_max" and "top_median", highest and median score of the 128 best predicted.
    """
    static, v = phi[tasks.codes(offline.tokens, len(offline.letters))], len(offline.letters)
    y = (offline.scores - offline.scores.mean()) / offline.scores.std(ddof=1)
    gram = static.T @ static
    w = np.linalg.solve(gram + rel_ridge * np.trace(gram) / len(static) * np.eye(len(gram)), static.T @ y)
    predicted, true = phi @ w, oracle(tasks.all_sequences(offline.tokens.shape[1], v))
    top = true[np.argsort(-predicted, kind="stable")[:128]]
    return {"spearman": tasks.spearman(predicted, true), "top_max": float(top.max()), "top_median": float(np.median(top))}
