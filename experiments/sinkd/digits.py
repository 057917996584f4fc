"""Distillation on real images: a perceptron taught by a wider one on scikit-learn's 8x8 digits, by many losses and many seeds.

Data: scikit-learn's copy of the UCI optical digits (1797 images; BSD licence of scikit-learn, UCI repository CC BY 4.0), bundled with that
package. Pixels x / 8 - 1; by the permutation of seed 0, 1000 images to train on (students see few of them), 300 to choose by, 497 to report on.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janax.experiments.session import Session
from janax.experiments.sinkd import students
from janax.experiments.sinkd.config import Config, DigitsConfig
from janax.experiments.sinkd.students import Data, Network, Row

__all__ = ["ABLATED", "POINTWISE", "ablations", "data", "network", "rows", "study"]

POINTWISE = {"KD": "kd", "RKL": "rkl", "JS": "js", "AKL": "akl", "skew KL": "skew", "TVD": "tvd", "paired L1": "paired"}
ABLATED = ("KD", "KD + SinKD", "SinKD")


@functools.cache
def network(hidden: int) -> Network:
    """A perceptron with one hidden layer."""

    def init(key: jax.Array) -> dict[str, jax.Array]:
        key_in, key_out = jax.random.split(key)
        return {
            "in": jax.random.normal(key_in, (64, hidden)) / 8.0,
            "in_bias": jnp.zeros(hidden),
            "out": jax.random.normal(key_out, (hidden, 10)) / np.sqrt(hidden),
            "out_bias": jnp.zeros(10),
        }

    def apply(params: Any, images: jax.Array) -> jax.Array:
        h = jax.nn.relu(images @ params["in"] + params["in_bias"][None])
        return h @ params["out"] + params["out_bias"][None]

    return Network(init, apply)


def data(config: DigitsConfig) -> tuple[Data, dict[str, float]]:
    """The images with a trained teacher's logits, and the teacher's accuracies: "validation", "test"."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = (images[order] / 8.0 - 1.0).astype(np.float32), labels[order].astype(np.int32)
    train, validation, test = np.split(np.arange(len(images), dtype=np.int32), [1000, 1300])
    net = network(config.teacher_hidden)
    params = students.train_teacher(
        net,
        0,
        images[train],
        labels[train],
        num_steps=config.teacher_steps,
        batch_size=64,
        learning_rate=config.learning_rate,
    )
    logits = students.logits_of(net, params, images)
    right = logits.argmax(axis=-1) == labels
    found = Data(*(jnp.asarray(x) for x in (images, labels, logits, train, validation, test)))
    return found, {"validation": float(right[validation].mean()), "test": float(right[test].mean())}


def rows(config: Config) -> dict[str, list[Row]]:
    """The objectives, by the loss whose program they share.

    Every loss X comes as (1 - alpha) CE + alpha X, alone, and beside KD with each of the weights.
    """
    objective, digits = config.objective, config.digits
    found: dict[str, list[Row]] = {"kd": [Row("CE", {"labels": 1.0})]}

    def add(name: str, loss: str, anchor: float = 0.0) -> None:
        labels = {"labels": 1 - objective.alpha}
        group = found.setdefault(loss, [])
        group.append(Row(name, labels | {loss: objective.alpha}, anchor))
        if not anchor:
            group.append(Row(f"{name} alone", {loss: 1.0}))
        if loss != "kd":
            chosen = digits.weights
            if loss == "sinkd" and objective.weight not in chosen:
                chosen = (objective.weight, *chosen)
            beside = labels | {"kd": objective.alpha}
            group += [Row(f"KD + {name} {w:g}", beside | {loss: w * digits.batch_size}, anchor) for w in chosen]

    for name, loss in POINTWISE.items():
        if name in digits.losses:
            add(name, loss)
    add("SinKD", "sinkd")
    add("anchored", "sinkd", anchor=1.0)
    found["sinkd"] += [Row(f"anchored {anchor:g} alone", {"sinkd": 1.0}, anchor) for anchor in digits.anchors]
    if "debiased" in digits.losses:
        add("debiased", "debiased")
    return found


def study(config: Config, session: Session) -> dict[str, Any]:
    """Accuracies by objective and seed: "teacher", "rows": name -> {"validation": [seeds], "test": [seeds]}."""
    prepared = _Lazy(config.digits)
    found: dict[str, Any] = {"teacher": session.memo("digits-teacher", lambda: prepared.teacher, alone=True), "rows": {}}
    groups = rows(config)
    for group in session.track(list(groups), "digits"):
        compute = functools.partial(_train, config, prepared, group, groups[group], num_seeds=config.digits.num_seeds)
        found["rows"] |= session.memo(f"digits-{group}", compute, alone=True)
    return found


class _Lazy:
    """Data and teacher, made when the first student asks: a resumed run may not."""

    def __init__(self, config: DigitsConfig):
        self._config = config

    @functools.cached_property
    def _both(self) -> tuple[Data, dict[str, float]]:
        return data(self._config)

    @property
    def data(self) -> Data:
        return self._both[0]

    @property
    def teacher(self) -> dict[str, float]:
        return self._both[1]


def _train(
    config: Config,
    prepared: _Lazy,
    group: str,
    rows: Sequence[Row],
    *,
    num_seeds: int,
    batch_size: int | None = None,
    num_iters: int | None = None,
    **changed: float,
) -> dict[str, dict[str, list[float]]]:
    digits, objective = config.digits, config.objective
    return students.train_students(
        network(digits.hidden),
        tuple(dict.fromkeys(("labels", "kd", group))),
        rows,
        students.numbers_of(objective)._replace(**changed),
        prepared.data,
        num_seeds=num_seeds,
        num_steps=digits.num_steps,
        batch_size=digits.batch_size if batch_size is None else batch_size,
        num_train=digits.num_train,
        num_iters=objective.num_iters if num_iters is None else num_iters,
        learning_rate=digits.learning_rate,
    )


def ablations(config: Config, session: Session) -> dict[str, Any]:
    """Test accuracies over one constant at a time, of `ABLATED`: constant -> value -> variant -> [seeds].

    Seeds are those of the study, so differences are in pairs. The weight of the sum over rows is kept, so a larger batch has more of it.
    """
    chosen, prepared = config.ablations, _Lazy(config.digits)
    sweeps = {
        "batch_size": chosen.batch_sizes,
        "epsilon": chosen.epsilons,
        "num_iters": chosen.num_iters,
        "temperature": chosen.temperatures,
    }
    found: dict[str, Any] = {constant: {} for constant in sweeps}
    jobs = [(constant, value) for constant, values in sweeps.items() for value in values]
    for constant, value in session.track(jobs, "ablations"):
        compute = functools.partial(_ablate, config, prepared, {constant: value})
        found[constant][f"{value:g}"] = session.memo(f"ablation-{constant}-{value:g}", compute, alone=True)
    return found


def _ablate(config: Config, prepared: _Lazy, changed: dict[str, Any]) -> dict[str, list[float]]:
    alpha, size = config.objective.alpha, changed.get("batch_size", config.digits.batch_size)
    labels, kd, moved = {"labels": 1 - alpha}, {"kd": alpha}, {"sinkd": config.ablations.weight * size}
    weights = dict(zip(ABLATED, (labels | kd, labels | kd | moved, labels | {"sinkd": alpha})))
    if "temperature" in changed:  # KD's and the transport's: neither has an advantage
        changed = changed | {"transport_temperature": changed["temperature"]}
    found = _train(config, prepared, "sinkd", [Row(*row) for row in weights.items()], num_seeds=config.ablations.num_seeds, **changed)
    return {name: parts["test"] for name, parts in found.items()}
