"""diffusers' `DiTTransformer2DModel`."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from janax.models import dit
from janax.models.loading import entries, files
from janax.models.loading.entries import Entry

__all__ = ["load_dit", "save_dit"]

_CONFIG_FILE = "config.json"
_WEIGHTS = "diffusion_pytorch_model"

_POSITIONS = "pos_embed.pos_embed"  # not a weight; written by early versions
_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is the class of the first published checkpoints
_FIXED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "dropout": 0.0,
}
_DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
    **_FIXED,
}


def _dense(
    path: tuple[str, ...],
    names: list[str],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    layers: int | None = None,
    copies: int | None = None,
) -> list[Entry]:
    """Kernel [*inputs *outputs] and bias [*outputs] of linear layers; several names are stacked on the first output axis."""
    each = dict.fromkeys(names, (1, *outputs[1:]) if len(names) > 1 else outputs)
    return [
        entries.linear(path, each, inputs, out_first=False, layers=layers, copies=copies),
        entries.bias(path, each, layers=layers, copies=copies),
    ]


def _embedder_entries(config: dit.DiTConfig) -> list[Entry]:
    d, layers, copies = config.width, config.depth if config.block_embedders else 1, config.depth
    prefix = "transformer_blocks.{}.norm1.emb."
    table = prefix + "class_embedder.embedding_table.weight"
    return [
        *_dense(("embedders", "time_in"), [prefix + "timestep_embedder.linear_1"], (256,), (d,), layers, copies),
        *_dense(("embedders", "time_out"), [prefix + "timestep_embedder.linear_2"], (d,), (d,), layers, copies),
        entries.plain(("embedders", "table"), table, (config.num_classes + 1, d), layers=layers, copies=copies),
    ]


def _entries(config: dit.DiTConfig) -> list[Entry]:
    d, p, layers = config.width, config.patch_size, config.depth
    head = (config.heads, d // config.heads)
    block = "transformer_blocks.{}."
    patch = entries.plain(("patch", "kernel"), "pos_embed.proj.weight", (d, config.channels, p, p))
    return [
        dataclasses.replace(patch, parts=(dataclasses.replace(patch.parts[0], order=(2, 3, 1, 0)),)),
        entries.plain(("patch", "bias"), "pos_embed.proj.bias", (d,)),
        *_embedder_entries(config),
        *_dense(("blocks", "modulation"), [block + "norm1.linear"], (d,), (6, d), layers),
        *_dense(("blocks", "qkv"), [block + f"attn1.to_{name}" for name in "qkv"], (d,), (3, *head), layers),
        *_dense(("blocks", "projection"), [block + "attn1.to_out.0"], head, (d,), layers),
        *_dense(("blocks", "expand"), [block + "ff.net.0.proj"], (d,), (config.hidden,), layers),
        *_dense(("blocks", "contract"), [block + "ff.net.2"], (config.hidden,), (d,), layers),
        *_dense(("final_modulation",), ["proj_out_1"], (d,), (2, d)),
        *_dense(("final",), ["proj_out_2"], (d,), (p, p, config.out_channels)),
    ]


def _read_config(path: Path) -> dit.DiTConfig:
    content = files.read_json(path)
    if content.get("_class_name") not in _CLASSES:
        raise ValueError(f"{path}: '_class_name' is {content.get('_class_name')!r}, expected {_CLASSES[0]!r}")
    fields = _DEFAULTS | {name: value for name, value in content.items() if name in _DEFAULTS}
    for name, value in _FIXED.items():
        if fields[name] != value:
            raise ValueError(f"{path}: {name!r} is {fields[name]!r}, only {value!r} is supported")
    for name in (
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "num_layers",
        "sample_size",
        "patch_size",
        "num_embeds_ada_norm",
    ):
        if not isinstance(fields[name], int) or isinstance(fields[name], bool):
            raise ValueError(f"{path}: {name!r} is {fields[name]!r}, expected an integer")
    channels, out_channels = fields["in_channels"], fields["out_channels"]
    if out_channels not in (None, channels, 2 * channels):
        raise ValueError(f"{path}: 'out_channels' is {out_channels!r}, expected 'in_channels' ({channels}) or twice that")
    try:
        return dit.DiTConfig(
            image_size=fields["sample_size"],
            channels=channels,
            patch_size=fields["patch_size"],
            width=fields["num_attention_heads"] * fields["attention_head_dim"],
            depth=fields["num_layers"],
            heads=fields["num_attention_heads"],
            num_classes=fields["num_embeds_ada_norm"],
            learn_sigma=out_channels == 2 * channels,
            mlp_norm_eps=float(fields["norm_eps"]),
            frequency_shift=1,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def load_dit(directory: str | os.PathLike[str], *, shardings: entries.Shardings | None = None) -> tuple[dit.DiTConfig, dict[str, Any]]:
    """A DiT from the directory layout of diffusers' `DiTTransformer2DModel`.

    That layout repeats the time and label embedders in every block. Where all copies are equal to the bit, as in the published checkpoints,
    one is kept; otherwise the config has `block_embedders` and every block keeps its own. Compute dtype, remat and scan are not part of the
    layout: set them by `dataclasses.replace(config, dtype="bfloat16")`. The config has `frequency_shift=1` as diffusers computes it; the
    published checkpoints were trained with 0, so replace it by 0 for the paper's own numbers.

    Args:
      directory: Holds config.json and diffusion_pytorch_model.safetensors, or its parts and index (float32, float16 or bfloat16; read as float32).
      shardings: From the tree of shapes to the tree of `NamedSharding`s, e.g. `lambda tree: sharding.shardings(tree, dit.SHARDING_RULES,
        mesh)`. Every parameter is placed as soon as it is read, so that the host holds one (stacked over layers) at a time. Without it the
        parameters are on the default device.

    Returns:
      The config and the parameters, as `dit.init` lays them out.

    Raises:
      ValueError: naming the file and the tensor or setting that is missing, of another shape, unexpected or not supported.
    """
    directory = Path(directory)
    config = _read_config(directory / _CONFIG_FILE)
    with files.open_safetensors(directory, _WEIGHTS) as source:
        entries.check(source, _entries(config), lambda name: name == _POSITIONS)
        if _POSITIONS in source.names:
            positions = dit.position_embedding(config.image_size // config.patch_size, config.width)[None]
            stored = source.get(_POSITIONS, (slice(None),) * len(source.shape(_POSITIONS)))
            if stored.shape != positions.shape or not np.allclose(stored, positions, rtol=0, atol=1e-4):
                raise ValueError(f"{source.path}: tensor {_POSITIONS!r} is not the fixed sine-cosine embedding")
        for name, shape in (pair for entry in _embedder_entries(config) for pair in dataclasses.replace(entry, copies=1).names()):
            whole = (slice(None),) * len(shape)
            copies = (source.get(name.replace(".0.", f".{layer}.", 1), whole).tobytes() for layer in range(config.depth))
            first = next(copies)
            if any(copy != first for copy in copies):
                config = dataclasses.replace(config, block_embedders=True)
                break
        tree = jax.eval_shape(lambda key: dit.init(config, key), jax.random.key(0))
        return config, entries.load(source, _entries(config), tree, shardings, np.float32)


def save_dit(directory: str | os.PathLike[str], config: dit.DiTConfig, params: Mapping[str, Any]) -> None:
    """Writes a DiT in the directory layout of diffusers' `DiTTransformer2DModel`, float32; `load_dit` reads it back bit for bit.

    Args:
      directory: Made if it is not there; an older checkpoint in it is replaced.
      config: The network. Its dtype, remat and scan_layers are not stored.
      params: Parameters on any devices this process can address.

    Raises:
      ValueError: if the layout cannot express the config, or `params` does not belong to it.
    """
    if config.frequency_shift != 1:
        raise ValueError("save_dit: diffusers computes time frequencies with 'frequency_shift' 1, got 0")
    if config.hidden != 4 * config.width:
        raise ValueError(f"save_dit: diffusers' DiT has 'mlp_ratio' 4, got {config.mlp_ratio}")
    dit.check_params("save_dit", config, params)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    entries.save(directory / f"{_WEIGHTS}.safetensors", _entries(config), params, np.float32)
    content = {
        "_class_name": _CLASSES[0],
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": config.channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": config.image_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": config.mlp_norm_eps,
        **_FIXED,
    }
    files.write_json(directory / _CONFIG_FILE, content)
