"""Layouts of sequences, measured: a small decoder learns next tokens from a larger one by CE + 0.1 KL + w SinKD.

The points of the transport problem are next-token distributions at the positions of a batch: all of them ("flat"), those of one row
("per_sequence"), or groups of neighbours ("grouped"). Text: docstrings, as in `text`, packed into rows; blocks of neighbours go as a whole to one
part.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from janax.algorithms import sinkd
from janax.experiments import text as texts
from janax.experiments.session import Session
from janax.experiments.sinkd import students
from janax.experiments.sinkd.config import Config, LanguageConfig
from janax.jaxlib_ext import divergence
from janax.models import transformer

__all__ = ["OBJECTIVES", "study"]


class _Objective(NamedTuple):
    """What is added to the labels' cross-entropy; the layout alone is static."""

    layout: str = "tokens"
    kl: float = 0.1
    moved: float = 1.0
    anchor: float = 0.0


OBJECTIVES = {
    "CE": _Objective(kl=0.0, moved=0.0),
    "CE + KL": _Objective(moved=0.0),
    "token by token": _Objective(),
    "flat": _Objective("flat"),
    "per sequence": _Objective("per_sequence"),
    "per sequence, anchored": _Objective("per_sequence", anchor=1.0),
    "grouped": _Objective("grouped"),
}
"""CE, CE + 0.1 KL, and that with a distance between positions: of one position (the paired L1), of all, of a row, of a group."""

_HELD_OUT_ROWS = 256


class _Data(NamedTuple):
    tokens: jax.Array
    """[n t] rows to train on."""
    held_out: jax.Array
    """[k t] rows to report on."""
    teacher: Any
    """The teacher's parameters."""


def _shape(config: LanguageConfig, width: int, depth: int) -> transformer.TransformerConfig:
    return transformer.TransformerConfig(
        vocab_size=config.vocab_size,
        max_length=config.sequence_length,
        width=width,
        depth=depth,
        heads=width // 16,
        kv_heads=width // 16,
        head_width=16,
        hidden=4 * width,
        tied=True,
    )


class _Prepared:
    """Rows and teacher, made when first asked for."""

    def __init__(self, config: LanguageConfig):
        self._config = config

    @functools.cached_property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Training and held-out rows [n t]: every tenth block of neighbouring docstrings is held out."""
        parts: tuple[list[str], list[str]] = ([], [])
        for package in self._config.packages:
            found = texts.docstrings(package)
            for block, members in enumerate(np.array_split(np.arange(len(found)), 50)):
                parts[block % 10 == 9].extend(found[i] for i in members)
        tokenizer = texts.train_tokenizer(parts[0], self._config.vocab_size)
        length = self._config.sequence_length
        rows = []
        for documents in parts:
            ids = np.concatenate([[0, *tokenizer.encode(text).ids] for text in documents]).astype(np.int32)
            cut = ids[: len(ids) // length * length].reshape(-1, length)
            rows.append(cut[np.random.default_rng(0).permutation(len(cut))])
        return rows[0], rows[1][:_HELD_OUT_ROWS]

    @functools.cached_property
    def data(self) -> _Data:
        train, held_out = (jnp.asarray(rows) for rows in self.rows)
        config = self._config
        batches = students.batches_of(np.arange(len(train)), 0, config.teacher_steps, 4 * config.batch_size)
        start = _init(_shape(config, config.teacher_width, 2), jax.random.key(0))
        return _Data(train, held_out, _train_teacher(config, start, train, batches))

    def facts(self) -> dict[str, Any]:
        train, held_out = self.rows
        shape = _shape(self._config, self._config.teacher_width, 2)
        return {"rows": len(train), "held out": len(held_out), "teacher": float(_nll(shape, self.data.teacher, self.data.held_out))}


def _logits(shape: transformer.TransformerConfig, params: Any, tokens: jax.Array) -> jax.Array:
    return transformer.logits(shape, params, tokens)[:, :-1]


def _nll(shape: transformer.TransformerConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """Nats per token."""
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(_logits(shape, params, tokens), tokens[:, 1:]))


def _fit(loss: Any, params: Any, batches: jax.Array, learning_rate: Any) -> Any:
    """Adam, its rate falling to zero over the second half; loss(params, rows), batches [steps rows]."""
    steps = len(batches)
    optimizer = optax.adam(optax.schedules.linear_schedule(learning_rate, 0.0, steps - steps // 2, steps // 2))

    def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0][0]


# Runs once: LLVM need not optimise, which would take seconds.
@functools.partial(jax.jit, static_argnames=("shape",), compiler_options={"xla_backend_optimization_level": 0})
def _init(shape: transformer.TransformerConfig, key: jax.Array) -> Any:
    return transformer.init(shape, key)


@functools.partial(jax.jit, static_argnames=("config",))
def _train_teacher(config: LanguageConfig, start: Any, rows: jax.Array, batches: jax.Array) -> Any:
    shape = _shape(config, config.teacher_width, 2)
    return _fit(lambda params, chosen: _nll(shape, params, rows[chosen]), start, batches, config.learning_rate)


@functools.partial(jax.jit, static_argnames=("config", "layout"))
def _train_student(config: Config, layout: str, numbers: dict[str, jax.Array], start: Any, batches: jax.Array, data: _Data) -> jax.Array:
    """Held-out nats per token of a student."""
    settings, constants = config.language, config.objective
    teacher, student = _shape(settings, settings.teacher_width, 2), _shape(settings, settings.width, 1)

    def distance(s: jax.Array, t: jax.Array) -> jax.Array:
        tau = constants.transport_temperature
        if layout == "tokens":
            return 2 * jnp.mean(divergence.per_token("total_variation", s, t, temperature=tau))
        size = settings.group_size if layout == "grouped" else None
        moved, _ = sinkd.sequence_loss(
            s,
            t,
            jnp.ones(s.shape[:2]),
            layout=layout,
            group_size=size,
            anchor=numbers["anchor"],
            temperature=tau,
            epsilon=constants.epsilon,
            num_iters=constants.num_iters,
        )
        return moved

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        tokens = data.tokens[rows]
        s, t = _logits(student, params, tokens), _logits(teacher, data.teacher, tokens)
        total = jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(s, tokens[:, 1:]))
        total = total + numbers["kl"] * jnp.mean(divergence.forward_kl(s, t))
        return total + settings.weight * numbers["moved"] * distance(s, t)

    return _nll(student, _fit(loss, start, batches, settings.learning_rate), data.held_out)


def study(config: Config, session: Session) -> dict[str, Any]:
    """Held-out nats per token: "facts" (rows, the teacher's), "students": objective -> [seeds], the same seeds for all."""
    prepared = _Prepared(config.language)
    found: dict[str, Any] = {"facts": session.memo("language-facts", prepared.facts, alone=True), "students": {}}
    for name in session.track(list(OBJECTIVES), "language"):

        def run(objective: _Objective = OBJECTIVES[name]) -> list[float]:
            numbers = {field: np.float32(getattr(objective, field)) for field in ("kl", "moved", "anchor")}
            return [_student(config, objective.layout, numbers, seed, prepared) for seed in range(1, config.language.num_seeds + 1)]

        found["students"][name] = session.memo(f"language-{name}", run, alone=True)
    return found


def _student(config: Config, layout: str, numbers: dict[str, Any], seed: int, prepared: _Prepared) -> float:
    """A seed decides on rows, parameters and batches, for every objective in the same way."""
    settings, data = config.language, prepared.data
    mine = np.random.default_rng(seed).permutation(len(data.tokens))[: settings.num_train]
    batches = students.batches_of(mine, seed, settings.num_steps, settings.batch_size)
    start = _init(_shape(settings, settings.width, 1), jax.random.key(seed))
    return float(_train_student(config, layout, numbers, start, batches, data))
