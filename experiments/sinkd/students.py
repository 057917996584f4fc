"""Many students of one teacher: a weighted sum of losses by name, and a training loop over all seeds at once.

The names, each a mean over the rows of a batch:

    labels     cross-entropy of the labels               kd         KL(teacher || student), as soft cross-entropy
    rkl        KL(student || teacher)                    js         Jensen-Shannon                  akl        adaptive KL
    skew       skew KL, a tenth of the teacher mixed in  tvd        total variation                 paired     L1 of each row, sample by sample
    sinkd      <P, C>, the paper's; with an anchor, a price on leaving one's own row                debiased   Sinkhorn divergence

Which losses are computed is static; their weights, the temperatures, epsilon and the anchor are arguments of the compiled program, and rows of
weights share one program.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from janax.algorithms import sinkd
from janax.experiments.sinkd.config import ObjectiveConfig
from janax.jaxlib_ext import divergence

__all__ = ["Data", "Network", "Numbers", "Row", "batches_of", "logits_of", "loss_terms", "numbers_of", "train_students", "train_teacher"]

_DIVERGENCES = {"rkl": "reverse_kl", "js": "js", "akl": "adaptive_kl", "skew": "skew_kl", "tvd": "total_variation"}
_EVAL_ROWS = 256


class Network(NamedTuple):
    """A classifier as functions: `init`: key -> params; `apply`: (params, inputs [n ...]) -> logits [n v]."""

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, Any], jax.Array]


class Data(NamedTuple):
    """What students learn from.

    Attributes:
      inputs: Tree of [n ...] inputs of all rows.
      labels: [n] classes.
      teacher_logits: [n v].
      train: [m] numbers of the rows to train on.
      validation: [k] rows to choose by.
      test: [l] rows to report on.
    """

    inputs: Any
    labels: Any
    teacher_logits: Any
    train: Any
    validation: Any
    test: Any


class Numbers(NamedTuple):
    """Traced constants of the losses; the anchor is that of a row."""

    temperature: Any
    transport_temperature: Any
    epsilon: Any
    anchor: Any = 0.0


class Row(NamedTuple):
    """An objective: weights of the losses by name, in the unit of a mean over rows, and the anchor of "sinkd"."""

    name: str
    weights: Mapping[str, float]
    anchor: float = 0.0


def numbers_of(objective: ObjectiveConfig) -> Numbers:
    """The configured constants."""
    return Numbers(objective.temperature, objective.transport_temperature, objective.epsilon)


def loss_terms(
    names: tuple[str, ...], student: jax.Array, teacher: jax.Array, labels: jax.Array, numbers: Numbers, *, num_iters: int
) -> jax.Array:
    """The named losses [len(names)] of a batch.

    Args:
      names: See the head of the file. Static.
      student: [n v] logits.
      teacher: [n v] logits, a constant.
      labels: [n] classes.
      numbers: Constants. Traced.
      num_iters: Sinkhorn iterations; those of the debiased value too. Static.

    Returns:
      [len(names)] float32.
    """
    transport = {"temperature": numbers.transport_temperature, "epsilon": numbers.epsilon, "num_iters": num_iters}

    def one(name: str) -> jax.Array:
        if name == "labels":
            return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(student, labels))
        if name == "kd":
            return sinkd.distillation_loss(student, teacher, temperature=numbers.temperature)
        if name == "paired":
            return sinkd.sample_loss(student, teacher, temperature=numbers.transport_temperature)
        if name == "sinkd":
            return sinkd.loss(student, teacher, anchor=numbers.anchor, **transport)[0]
        if name == "debiased":
            return sinkd.loss(student, teacher, value="debiased", **transport)[0]
        return jnp.mean(divergence.per_token(_DIVERGENCES[name], student, teacher, temperature=numbers.temperature))

    return jnp.stack([one(name) for name in names])


def train_teacher(
    network: Network, seed: int, inputs: Any, labels: np.ndarray, *, num_steps: int, batch_size: int, learning_rate: float
) -> Any:
    """Parameters of a network trained on labelled rows by Adam, whose rate falls to zero over the second half."""
    batches = batches_of(np.arange(len(labels), dtype=np.int32), seed, num_steps, batch_size)
    params = _init(network, jax.random.split(jax.random.key(seed), 1))
    trained = _train_on_labels(network, params, inputs, labels, batches[None], np.float32(learning_rate))
    return jax.tree.map(lambda x: x[0], trained)


def train_students(
    network: Network,
    names: tuple[str, ...],
    rows: Sequence[Row],
    numbers: Numbers,
    data: Data,
    *,
    num_seeds: int,
    num_steps: int,
    batch_size: int,
    num_train: int,
    num_iters: int,
    learning_rate: float,
) -> dict[str, dict[str, list[float]]]:
    """One student per row and seed, each on training examples of its own, all in one vectorised loop.

    A seed decides on examples, parameters and batches, for every row in the same way: runs can be compared in pairs.

    Args:
      network: The student.
      names: The losses that are computed, those of all rows among them.
      rows: What to train by.
      numbers: Constants.
      data: What to learn from.
      num_seeds: Students of each row.
      num_steps: Of Adam.
      batch_size: Examples of a batch.
      num_train: How many of the training examples a student sees.
      num_iters: Sinkhorn iterations.
      learning_rate: Adam's.

    Returns:
      Row's name -> "validation" and "test" accuracies [seeds].
    """
    for row in rows:
        if unknown := set(row.weights) - set(names):
            raise ValueError(f"train_students: row {row.name!r} has a weight for {min(unknown)!r}, expected one of {', '.join(names)}")
    weights = np.asarray([[row.weights.get(name, 0.0) for name in names] for row in rows], np.float32)
    anchors = np.asarray([row.anchor for row in rows], np.float32)
    numbers = Numbers(*(np.float32(x) for x in numbers))
    batches = []
    for seed in range(1, num_seeds + 1):
        mine = np.random.default_rng(seed).permutation(np.asarray(data.train))[:num_train]
        batches.append(batches_of(mine, seed, num_steps, batch_size))
    start = _init(network, jax.random.split(jax.random.key(1), num_seeds))
    rate = np.float32(learning_rate)
    trained = _train_on_teacher(network, names, num_iters, start, weights, anchors, numbers, data, np.stack(batches), rate)
    found: dict[str, dict[str, list[float]]] = {}
    for i, row in enumerate(rows):
        right = np.asarray(_right(network, jax.tree.map(lambda x: x[i], trained), data))  # noqa: B023
        parts = {part: right[:, np.asarray(getattr(data, part))].mean(axis=1) for part in ("validation", "test")}
        found[row.name] = {part: values.tolist() for part, values in parts.items()}
    return found


def batches_of(rows: np.ndarray, seed: int, num_steps: int, batch_size: int) -> np.ndarray:
    """[steps batch] the rows in an order shuffled anew for every pass."""
    rng = np.random.default_rng((seed, 1))
    passes = -(-num_steps * batch_size // len(rows))
    order = np.concatenate([rng.permutation(rows) for _ in range(passes)])
    return order[: num_steps * batch_size].reshape(num_steps, batch_size).astype(np.int32)


# Runs once: LLVM need not optimise, which would take seconds.
@functools.partial(jax.jit, static_argnames=("network",), compiler_options={"xla_backend_optimization_level": 0})
def _init(network: Network, keys: jax.Array) -> Any:
    return jax.vmap(network.init)(keys)


@functools.partial(jax.jit, static_argnames=("network",))
def _train_on_labels(network: Network, params: Any, inputs: Any, labels: jax.Array, batches: jax.Array, learning_rate: jax.Array) -> Any:
    """Parameters of as many networks as there are sequences of batches [networks steps batch]."""

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        logits = network.apply(params, _pick(inputs, rows))
        return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)[rows]))

    steps = batches.shape[1]
    rate = optax.schedules.linear_schedule(learning_rate, 0.0, steps - steps // 2, steps // 2)  # type: ignore[arg-type]
    return jax.vmap(lambda params, batches: _adam(loss, params, batches, rate))(params, batches)


@functools.partial(jax.jit, static_argnames=("network", "names", "num_iters"))
def _train_on_teacher(
    network: Network,
    names: tuple[str, ...],
    num_iters: int,
    start: Any,
    weights: jax.Array,
    anchors: jax.Array,
    numbers: Numbers,
    data: Data,
    batches: jax.Array,
    learning_rate: jax.Array,
) -> Any:
    """Parameters [rows seeds ...] from starts [seeds ...], weights [rows names], anchors [rows] and batches [seeds steps batch]."""

    def one(params: Any, batches: jax.Array, weights: jax.Array, anchor: jax.Array) -> Any:
        constants = numbers._replace(anchor=anchor)

        def loss(params: Any, rows: jax.Array) -> jax.Array:
            logits = network.apply(params, _pick(data.inputs, rows))
            terms = loss_terms(names, logits, data.teacher_logits[rows], data.labels[rows], constants, num_iters=num_iters)
            return jnp.sum(weights * terms)

        return _adam(loss, params, batches, learning_rate)

    return jax.vmap(lambda w, a: jax.vmap(lambda p, b: one(p, b, w, a))(start, batches))(weights, anchors)


def _adam(loss: Callable[[Any, jax.Array], jax.Array], params: Any, batches: jax.Array, learning_rate: Any) -> Any:
    optimizer = optax.adam(learning_rate)

    def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0][0]


def _pick(tree: Any, rows: ArrayLike) -> Any:
    return jax.tree.map(lambda x: x[rows], tree)


@functools.partial(jax.jit, static_argnames=("network",))
def _logits(network: Network, params: Any, inputs: Any) -> jax.Array:
    """[networks n v] of many networks, params [networks ...]; inputs in pieces, so that memory stays small."""
    count = len(jax.tree.leaves(inputs)[0])
    size = min(_EVAL_ROWS, count)
    pieces = jax.tree.map(lambda x: x[jnp.minimum(jnp.arange(-(-count // size) * size), count - 1)].reshape(-1, size, *x.shape[1:]), inputs)
    found = jax.lax.map(lambda piece: jax.vmap(lambda p: network.apply(p, piece))(params), pieces)  # [pieces networks size v]
    return jnp.moveaxis(found, 1, 0).reshape(found.shape[1], -1, found.shape[-1])[:, :count]


def _right(network: Network, params: Any, data: Data) -> np.ndarray:
    """[networks n] whether the likeliest class is the label's; computed for validation and test rows, false elsewhere."""
    rows = np.concatenate([np.asarray(data.validation), np.asarray(data.test)])
    logits = _logits(network, params, _pick(data.inputs, rows))
    right = np.zeros((len(logits), len(data.labels)), bool)
    right[:, rows] = np.asarray(jnp.argmax(logits, axis=-1)) == np.asarray(data.labels)[rows][None]
    return right


def logits_of(network: Network, params: Any, inputs: Any) -> np.ndarray:
    """Logits [n v] of all inputs."""
    return np.asarray(_logits(network, jax.tree.map(lambda x: x[None], params), inputs))[0]
