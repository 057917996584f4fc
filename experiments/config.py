"""Configuration shared by the experiments: frozen dataclasses that check themselves, and their JSON form.

An experiment nests these in its own frozen dataclass. The fields below are named in messages the way the command line names them
(`optimizer.learning_rate`, `train.num_steps`, `mesh.data`), so an experiment calls its fields `optimizer`, `train`, `mesh` and `lora`.
Importing this module imports neither JAX nor NumPy: the command line builds its help from it.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from janax.experiments.errors import UserError

__all__ = [
    "LoraConfig",
    "MeshConfig",
    "OptimizerConfig",
    "TrainConfig",
    "check",
    "differences",
    "environment",
    "flatten",
    "from_dict",
    "read_json",
    "to_dict",
    "write_json",
]

T = TypeVar("T")

_MISSING = "absent"


def check(ok: bool, field: str, requirement: str, value: object, hint: str) -> None:
    """Raises ValueError in the house form: "optimizer.learning_rate must be positive, got -1.0; try 3e-4"."""
    if not ok:
        raise ValueError(f"{field} must be {requirement}, got {value!r}; try {hint}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam or AdamW with clipping, warmup and decay; built by `training.make_optimizer`."""

    name: Literal["adamw", "adam"] = "adamw"
    """adamw decays the weights apart from the gradient; adam does not decay them."""
    learning_rate: float = 3e-4
    """Peak learning rate, reached after the warmup."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warmup: half a cosine down to `final_fraction`, or no change."""
    warmup_steps: int = 100
    """Optimizer steps of linear warmup from zero; 0 for none."""
    final_fraction: float = 0.0
    """Learning rate at the last step, as a fraction of the peak (cosine only)."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """AdamW's decay, multiplied by the learning rate; biases, norms and other arrays with fewer than two axes are left out."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 switches clipping off."""

    def __post_init__(self) -> None:
        check(0 < self.learning_rate < math.inf, "optimizer.learning_rate", "positive", self.learning_rate, "3e-4")
        check(self.warmup_steps >= 0, "optimizer.warmup_steps", "at least 0", self.warmup_steps, "100")
        check(0 <= self.final_fraction <= 1, "optimizer.final_fraction", "between 0 and 1", self.final_fraction, "0.1")
        check(0 <= self.beta1 < 1, "optimizer.beta1", "in [0, 1)", self.beta1, "0.9")
        check(0 <= self.beta2 < 1, "optimizer.beta2", "in [0, 1)", self.beta2, "0.999")
        check(self.epsilon > 0, "optimizer.epsilon", "positive", self.epsilon, "1e-8")
        check(self.weight_decay >= 0, "optimizer.weight_decay", "at least 0", self.weight_decay, "0.01")
        check(self.clip_norm >= 0, "optimizer.clip_norm", "at least 0", self.clip_norm, "1.0, or 0 for no clipping")
        check(
            self.name == "adamw" or self.weight_decay == 0,
            "optimizer.weight_decay",
            "0 with optimizer.name adam",
            self.weight_decay,
            "--optimizer.name adamw",
        )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters instead of all parameters."""

    rank: int = 0
    """Rank of the adapters; 0 trains all parameters."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Which projections get one, by their Hugging Face names."""

    def __post_init__(self) -> None:
        check(self.rank >= 0, "lora.rank", "at least 0", self.rank, "8")
        check(self.alpha > 0, "lora.alpha", "above 0", self.alpha, "16")
        check(bool(self.targets), "lora.targets", "one name or more", self.targets, "q_proj v_proj")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Lengths of the mesh axes; built by `training.make_mesh`. The defaults use every device for the batch, and one device as it is."""

    data: int = -1
    """Devices along the batch; -1 takes those that are left."""
    model: int = 1
    """Devices along heads, hidden units and vocabulary."""

    def __post_init__(self) -> None:
        check(self.data == -1 or self.data >= 1, "mesh.data", "positive or -1", self.data, "-1 for all devices")
        check(self.model == -1 or self.model >= 1, "mesh.model", "positive or -1", self.model, "1")
        check((self.data, self.model) != (-1, -1), "mesh.model", "positive when mesh.data is -1", self.model, "1")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop; see `training.fit`."""

    num_steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 128
    """Examples in a step, over all micro-batches, devices and hosts."""
    accumulation: int = 1
    """Micro-batches that a step is computed in; saves memory, leaves the result as it is."""
    ema_decay: float = 0.0
    """Decay of the moving average of the parameters; 0 keeps none."""
    checkpoint_every: int = 500
    """Steps between checkpoints (and evaluations); the last step always has one."""
    keep_last: int = 2
    """How many of the newest checkpoints stay on disk."""
    keep_best: int = 0
    """How many of the best checkpoints stay as well."""
    log_every: int = 20
    """Steps between metrics rows; the last step always has one."""
    seed: int = 0
    """Seed of the parameters, the noise and the order of the data."""

    def __post_init__(self) -> None:
        for name, hint in (("num_steps", 1000), ("batch_size", 128), ("accumulation", 1), ("checkpoint_every", 500), ("keep_last", 2)):
            check(getattr(self, name) >= 1, f"train.{name}", "at least 1", getattr(self, name), str(hint))
        check(self.log_every >= 1, "train.log_every", "at least 1", self.log_every, "20")
        check(0 <= self.ema_decay < 1, "train.ema_decay", "in [0, 1)", self.ema_decay, "0.999, or 0 for none")
        check(self.keep_best >= 0, "train.keep_best", "at least 0", self.keep_best, "1")
        check(0 <= self.seed < 2**32, "train.seed", "between 0 and 2**32 - 1", self.seed, "0")
        check(
            self.batch_size % self.accumulation == 0,
            "train.accumulation",
            f"a divisor of train.batch_size ({self.batch_size})",
            self.accumulation,
            str(max(d for d in range(1, min(self.accumulation, self.batch_size) + 1) if self.batch_size % d == 0)),
        )


def to_dict(config: Any) -> Any:
    """A configuration as JSON values: dataclasses become dictionaries, tuples lists, paths strings."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    return os.fspath(config) if isinstance(config, os.PathLike) else config


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """The configuration that `to_dict` wrote, checked again by its `__post_init__`.

    Args:
      kind: The dataclass.
      values: Its fields; a missing one takes its default.

    Returns:
      An instance of `kind`.

    Raises:
      ValueError: if a field is unknown, or a value is refused.
    """
    return _build(kind, values, kind.__name__)


def _build(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be an object, got {value!r}")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - {field.name for field in dataclasses.fields(kind)})
        if unknown:
            raise ValueError(f"{where} has no field {unknown[0]!r}")
        return kind(**{name: _build(hints[name], entry, f"{where}.{name}") for name, entry in value.items()})
    if origin is typing.Annotated:
        return _build(arguments[0], value, where)
    if origin in (Union, types.UnionType) and value is not None:
        options = [option for option in arguments if option is not type(None)]
        return _build(options[0], value, where) if len(options) == 1 else value
    if value is None:
        return None
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if len(arguments) == 2 and arguments[1] is Ellipsis else list(arguments)
        return tuple(_build(entry_kind, entry, where) for entry_kind, entry in zip(kinds, value))
    if origin is dict:
        return {key: _build(arguments[1], entry, where) for key, entry in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return Path(value) if kind is Path and isinstance(value, str) else value


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names: {"train": {"seed": 0}} gives {"train.seed": 0}."""
    if not isinstance(values, Mapping):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted fields in which two configurations (as `to_dict` writes them) differ, with both values."""
    flat_old, flat_new = flatten(_finite(old)), flatten(_finite(new))
    names = [*flat_new, *(name for name in flat_old if name not in flat_new)]
    pairs = {name: (flat_old.get(name, _MISSING), flat_new.get(name, _MISSING)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def environment() -> dict[str, Any]:
    """Versions, platform and devices of this process, for config.json. Initialises JAX."""
    import jax

    versions = {"python": platform.python_version()}
    for package in ("janax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    devices = jax.devices()
    return {
        "versions": versions,
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "num_processes": jax.process_count(),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Any) -> None:
    """Writes JSON in one atomic step: a reader sees the old file or the new one. Nan and infinity become null."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(_finite(to_dict(value)), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
      UserError: if the file cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON; was it edited by hand? Start afresh in another --workdir") from error
