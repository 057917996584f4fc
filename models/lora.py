"""Low-rank adapters (LoRA) of a decoder, as a second, small parameter tree.

    adapters = lora.init(config, key, rank=8)                                   # {"q_proj": {"a": [l r in], "b": [l out r]}, ...}
    merged = lora.merge(config, params, adapters, scale=alpha / rank)           # params with W + scale B A; differentiate through it
    lora.save_peft(directory, config, adapters, alpha=16.0, base="my-model")    # the layout of the PEFT library

Training differentiates `loss(merge(config, params, adapters, ...))` with respect to the adapters; merging for good is the same call. A fresh
adapter has B = 0 and changes nothing.

Reference: Hu et al., arXiv:2106.09685.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from janax.jaxlib_ext import checks, dtypes, sharding
from janax.models.transformer import TransformerConfig

__all__ = ["SHARDING_RULES", "TARGETS", "init", "load_peft", "merge", "save_peft"]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections that can have an adapter, by their Hugging Face names."""

SHARDING_RULES: sharding.Rules = (
    (r"/a$", jax.P(None, None, "data")),  # [l r in]
    (r"/b$", jax.P(None, "data")),  # [l out r]
)

_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


class _Place(NamedTuple):
    """Where a projection's kernel lies: the path of the stacked kernel, what of it, its sizes and its Hugging Face module."""

    path: tuple[str, str, str]
    part: tuple[Any, ...]
    outputs: int
    inputs: int
    module: str


def _places(config: TransformerConfig) -> dict[str, _Place]:
    d, hidden, head, g = config.width, config.hidden, config.head_width, config.queries
    qkv, all_rows = ("blocks", "qkv", "kernel"), slice(None)
    return {
        "q_proj": _Place(qkv, (all_rows, all_rows, slice(0, g)), config.heads * head, d, "self_attn"),
        "k_proj": _Place(qkv, (all_rows, all_rows, g), config.kv_heads * head, d, "self_attn"),
        "v_proj": _Place(qkv, (all_rows, all_rows, g + 1), config.kv_heads * head, d, "self_attn"),
        "o_proj": _Place(("blocks", "out", "kernel"), (), d, config.heads * head, "self_attn"),
        "gate_proj": _Place(("blocks", "gate", "kernel"), (), hidden, d, "mlp"),
        "up_proj": _Place(("blocks", "up", "kernel"), (), hidden, d, "mlp"),
        "down_proj": _Place(("blocks", "down", "kernel"), (), d, hidden, "mlp"),
    }


def _check(function: str, config: TransformerConfig, targets: Sequence[str]) -> dict[str, _Place]:
    if not config.gated or config.positions != "rope":
        raise ValueError(
            f"{function}: adapters are for gated decoders with rotary positions (Llama, Mistral, Qwen, Gemma), not this config"
        )
    for target in targets:
        checks.one_of(function, "targets", target, TARGETS)
    return {target: _places(config)[target] for target in TARGETS if target in targets}


def init(
    config: TransformerConfig, key: jax.Array, *, rank: int, targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj")
) -> dict[str, dict[str, jax.Array]]:
    """Fresh adapters: A uniform within +-1/sqrt(inputs), B zero.

    Args:
      config: The decoder. Static.
      key: PRNG key.
      rank: r >= 1. Static.
      targets: Which projections, of `TARGETS`. Static.

    Returns:
      A dictionary by target: a [l r in] and b [l out r], float32.

    Raises:
      ValueError: on an unknown target, a rank below one, or a decoder of another kind (GPT-2).
    """
    if rank < 1:
        raise ValueError(f"lora.init: 'rank' is {rank}, expected at least 1")
    places = _check("lora.init", config, targets)
    adapters = {}
    for place, (target, target_key) in zip(places.values(), zip(places, jax.random.split(key, len(places)))):
        limit = 1 / math.sqrt(place.inputs)
        a = jax.random.uniform(target_key, (config.depth, rank, place.inputs), jnp.float32, -limit, limit)
        adapters[target] = {"a": a, "b": jnp.zeros((config.depth, place.outputs, rank), jnp.float32)}
    return adapters


def merge(
    config: TransformerConfig, params: Mapping[str, Any], adapters: Mapping[str, Mapping[str, jax.Array]], *, scale: ArrayLike
) -> dict[str, Any]:
    """The parameters with W + scale B A in place of every adapted kernel W.

    Args:
      config: The decoder. Static.
      params: With stacked layers, as `transformer.init` and `loading.load_transformer` give them.
      adapters: As from `init`.
      scale: alpha / r. Traced.

    Returns:
      A new tree; kernels that have no adapter are shared with `params`. The product is taken in float32 or wider, the sum in the kernel's
      dtype.

    Raises:
      ValueError: on unknown targets or shapes that do not belong to the config.
    """
    places = _check("lora.merge", config, tuple(adapters))
    if not isinstance(params["blocks"], Mapping):
        raise ValueError("lora.merge: 'params' must have stacked layers; see transformer.stack_layers")
    blocks = {name: dict(value) for name, value in params["blocks"].items()}
    for target, place in places.items():
        a, b = (dtypes.at_least_float32(adapters[target][name]) for name in ("a", "b"))
        checks.check_shapes(f"lora.merge ({target})", a=(a, f"{config.depth} r {place.inputs}"), b=(b, f"{config.depth} {place.outputs} r"))
        _, block, leaf = place.path
        kernel = blocks[block][leaf]
        delta = jnp.asarray(scale).astype(b.dtype) * jnp.einsum("lor,lri->loi", b, a)
        if place.part:
            here = kernel[place.part]
            new = here + delta.reshape(here.shape).astype(kernel.dtype)
            blocks[block][leaf] = kernel.at[place.part].set(new)
        else:
            blocks[block][leaf] = kernel + delta.reshape(kernel.shape).astype(kernel.dtype)
    return {**params, "blocks": blocks}


def _names(place: _Place, target: str, layer: int) -> tuple[str, str]:
    prefix = f"base_model.model.model.layers.{layer}.{place.module}.{target}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def save_peft(
    directory: str | os.PathLike[str],
    config: TransformerConfig,
    adapters: Mapping[str, Mapping[str, jax.Array]],
    *,
    alpha: float,
    base: str = "",
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors as the PEFT library lays them out.

    Args:
      directory: Made if it is not there.
      config: The decoder.
      adapters: As from `init`.
      alpha: PEFT's lora_alpha; the scale is alpha / r.
      base: Name or path of the model that the adapters belong to.
    """
    import safetensors.numpy

    places = _check("lora.save_peft", config, tuple(adapters))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for target, place in places.items():
        a, b = (np.asarray(adapters[target][name], np.float32) for name in ("a", "b"))
        for layer in range(config.depth):
            tensors.update(zip(_names(place, target, layer), (np.ascontiguousarray(a[layer]), np.ascontiguousarray(b[layer]))))
    rank = int(next(iter(adapters.values()))["a"].shape[1])
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(places),
    }
    partial = directory / (_WEIGHTS_FILE + ".partial")
    safetensors.numpy.save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, directory / _WEIGHTS_FILE)
    (directory / _CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_peft(directory: str | os.PathLike[str], config: TransformerConfig) -> tuple[dict[str, dict[str, jax.Array]], float]:
    """Adapters in PEFT's layout, and their scale alpha / r.

    Raises:
      ValueError: naming the file and the tensor or setting that is missing, misshapen or not supported.
    """
    import safetensors.numpy

    directory = Path(directory)
    settings_path, weights_path = directory / _CONFIG_FILE, directory / _WEIGHTS_FILE
    for path in (settings_path, weights_path):
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
    try:
        settings = json.loads(settings_path.read_text(encoding="utf-8"))
        tensors = safetensors.numpy.load_file(weights_path)
    except (ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{directory}: not a complete adapter ({error})") from error
    for name, value in {"peft_type": "LORA", "bias": "none"}.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{settings_path}: {name!r} is {settings[name]!r}, only {value!r} is supported")
    for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"):
        if settings.get(name):
            raise ValueError(f"{settings_path}: {name!r} is not supported")
    rank, alpha, targets = (settings.get(name) for name in ("r", "lora_alpha", "target_modules"))
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or not isinstance(targets, list):
        raise ValueError(f"{settings_path}: expected numbers 'r' and 'lora_alpha' and a list 'target_modules'")
    adapters: dict[str, dict[str, jax.Array]] = {}
    for target, place in _check(f"{settings_path}", config, targets).items():
        shapes: dict[str, tuple[int, ...]] = {"a": (rank, place.inputs), "b": (place.outputs, rank)}
        stacked = {}
        for index, (letter, shape) in enumerate(shapes.items()):
            layers = [_tensor(tensors, _names(place, target, layer)[index], shape, weights_path) for layer in range(config.depth)]
            stacked[letter] = jnp.asarray(np.stack(layers))
        adapters[target] = stacked
    return adapters, alpha / rank


def _tensor(tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], path: Path) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"{path}: tensor {name!r} is missing, expected shape {shape}")
    if tensors[name].shape != shape:
        raise ValueError(f"{path}: tensor {name!r} has shape {tensors[name].shape}, expected {shape}")
    return np.asarray(tensors[name], np.float32)
