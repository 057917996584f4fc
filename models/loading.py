"""Weights from and to the directory layouts of public checkpoints, one safetensors tensor at a time.

    config, params = loading.load_dit("DiT-XL-2-256/transformer")
    config, params = loading.load_dit(directory, shardings=lambda tree: sharding.shardings(tree, dit.SHARDING_RULES, mesh))
    loading.save_dit(directory, config, params)

A family is a table of entries, one per parameter: the public names, their shape, and how they become the parameter. Reading, checking,
stacking over layers, placing and writing are the same for all families.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from janax.jaxlib_ext import sharding
from janax.models import dit

__all__ = ["load_dit", "save_dit"]

_CONFIG_FILE = "config.json"
_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_DTYPES = ("F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Entry:
    """One parameter and the tensors it is made of.

    Attributes:
      path: Where the parameter stands in the tree.
      names: Names of the tensors; "{}" stands for the layer.
      shape: Shape of each of those tensors.
      read: The tensors, in order, to the parameter of one layer.
      write: The reverse.
      layers: Length of the parameter's leading layer axis, or None if it has none.
      copies: Number of layers the file has; more than `layers` = 1 means that the layers of the file share the parameter.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    shape: tuple[int, ...]
    read: Callable[[list[np.ndarray]], np.ndarray]
    write: Callable[[np.ndarray], list[np.ndarray]]
    layers: int | None = None
    copies: int | None = None

    def names_of(self, layer: int) -> list[str]:
        return [name.format(layer) for name in self.names]

    def all_names(self) -> list[str]:
        return [name for layer in range(self.copies or self.layers or 1) for name in self.names_of(layer)]


class _File:
    """An open safetensors file whose errors name the tensor and the file."""

    def __init__(self, path: Path, handle: Any):
        self._path, self._handle = path, handle
        self.names = frozenset(handle.keys())

    def check(self, entries: Sequence[_Entry], ignored: Sequence[str] = ()) -> None:
        """Every expected tensor is there, in shape, and nothing else is."""
        expected = {name: entry.shape for entry in entries for name in entry.all_names()}
        for name, shape in expected.items():
            if name not in self.names:
                raise ValueError(f"{self._path}: tensor {name!r} is missing, expected shape {shape}")
            view = self._handle.get_slice(name)
            if tuple(view.get_shape()) != shape:
                raise ValueError(f"{self._path}: tensor {name!r} has shape {tuple(view.get_shape())}, expected {shape}")
            if view.get_dtype() not in _DTYPES:
                raise ValueError(f"{self._path}: tensor {name!r} has dtype {view.get_dtype()}, expected one of {', '.join(_DTYPES)}")
        extra = sorted(self.names - expected.keys() - set(ignored))
        if extra:
            others = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
            raise ValueError(f"{self._path}: tensor {extra[0]!r}{others} is not part of the architecture in {_CONFIG_FILE}")

    def get(self, name: str) -> np.ndarray:
        """One tensor as float32."""
        return np.asarray(self._handle.get_tensor(name)).astype(np.float32, copy=False)

    def parameter(self, entry: _Entry) -> np.ndarray:
        """The parameter, with its layer axis if it has one."""
        if entry.layers is None:
            return np.ascontiguousarray(entry.read([self.get(name) for name in entry.names]))
        first = entry.read([self.get(name) for name in entry.names_of(0)])
        result = np.empty((entry.layers, *first.shape), np.float32)
        result[0] = first
        for layer in range(1, entry.layers):
            result[layer] = entry.read([self.get(name) for name in entry.names_of(layer)])
        return result


@contextlib.contextmanager
def _open(path: Path) -> Iterator[_File]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        handle = safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error
    with handle as opened:
        yield _File(path, opened)


def _load(
    file: _File, entries: Sequence[_Entry], tree: Any, shardings: Callable[[Any], Any] | None, ignored: Sequence[str] = ()
) -> dict[str, Any]:
    """The entries as a nested dict, each parameter placed as soon as it is read; `tree` is its shapes."""
    file.check(entries, ignored)
    targets = None if shardings is None else shardings(tree)
    params: dict[str, Any] = {}
    for entry in entries:
        value = file.parameter(entry)
        *parents, last = entry.path
        node, target = params, targets
        for name in parents:
            node, target = node.setdefault(name, {}), None if target is None else target[name]
        node[last] = jax.numpy.asarray(value) if target is None else sharding.place(value, target[last])
    return params


def _save(path: Path, entries: Sequence[_Entry], params: Mapping[str, Any]) -> None:
    tensors: dict[str, np.ndarray] = {}
    for entry in entries:
        value: Any = params
        for name in entry.path:
            value = value[name]
        value = np.asarray(value).astype(np.float32, copy=False)
        for layer in range(entry.copies or entry.layers or 1):
            one = value if entry.layers is None else value[min(layer, entry.layers - 1)]
            tensors.update(zip(entry.names_of(layer), map(np.ascontiguousarray, entry.write(one))))
    partial = path.with_name(path.name + ".partial")  # a save that is interrupted leaves the old file whole
    safetensors.numpy.save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, path)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _dense(
    path: tuple[str, ...],
    names: Sequence[str],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    *,
    layers: int | None = None,
    copies: int | None = None,
) -> list[_Entry]:
    """Kernel [*inputs *outputs] and bias [*outputs] of PyTorch linear layers; several names are stacked on the first output axis."""
    stacked, each = len(names) > 1, outputs[1:] if len(names) > 1 else outputs
    rows, columns, axis = math.prod(each), math.prod(inputs), len(inputs)

    def read_kernel(tensors: list[np.ndarray]) -> np.ndarray:
        kernels = [tensor.T.reshape(inputs + each) for tensor in tensors]
        return np.stack(kernels, axis=axis) if stacked else kernels[0]

    def write_kernel(kernel: np.ndarray) -> list[np.ndarray]:
        kernels = np.moveaxis(kernel, axis, 0) if stacked else kernel[None]
        return [one.reshape(columns, rows).T for one in kernels]

    def read_bias(tensors: list[np.ndarray]) -> np.ndarray:
        return np.stack(tensors).reshape(outputs)

    def write_bias(bias: np.ndarray) -> list[np.ndarray]:
        return list(bias.reshape(len(names), rows))

    shared = {"layers": layers, "copies": copies}
    weights, biases = (tuple(f"{name}.{kind}" for name in names) for kind in ("weight", "bias"))
    return [
        _Entry(path=(*path, "kernel"), names=weights, shape=(rows, columns), read=read_kernel, write=write_kernel, **shared),
        _Entry(path=(*path, "bias"), names=biases, shape=(rows,), read=read_bias, write=write_bias, **shared),
    ]


# DiT: diffusers' DiTTransformer2DModel.

_POSITIONS = "pos_embed.pos_embed"  # not a weight; written by early versions
_DIT_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is the class of the first published checkpoints
_DIT_FIXED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "dropout": 0.0,
}
_DIT_DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
    **_DIT_FIXED,
}


def _dit_embedder_entries(config: dit.DiTConfig) -> list[_Entry]:
    d, layers = config.width, config.depth if config.block_embedders else 1
    prefix = "transformer_blocks.{}.norm1.emb."
    table = _Entry(
        path=("embedders", "table"),
        names=(prefix + "class_embedder.embedding_table.weight",),
        shape=(config.num_classes + 1, d),
        read=lambda tensors: tensors[0],
        write=lambda value: [value],
        layers=layers,
        copies=config.depth,
    )
    return [
        *_dense(("embedders", "time_in"), [prefix + "timestep_embedder.linear_1"], (256,), (d,), layers=layers, copies=config.depth),
        *_dense(("embedders", "time_out"), [prefix + "timestep_embedder.linear_2"], (d,), (d,), layers=layers, copies=config.depth),
        table,
    ]


def _dit_entries(config: dit.DiTConfig) -> list[_Entry]:
    d, p, layers = config.width, config.patch_size, config.depth
    head = (config.heads, d // config.heads)
    block = "transformer_blocks.{}."
    patch = _Entry(
        path=("patch", "kernel"),
        names=("pos_embed.proj.weight",),
        shape=(d, config.channels, p, p),
        read=lambda tensors: tensors[0].transpose(2, 3, 1, 0),
        write=lambda kernel: [kernel.transpose(3, 2, 0, 1)],
    )
    patch_bias = _Entry(
        path=("patch", "bias"),
        names=("pos_embed.proj.bias",),
        shape=(d,),
        read=lambda tensors: tensors[0],
        write=lambda bias: [bias],
    )
    return [
        patch,
        patch_bias,
        *_dit_embedder_entries(config),
        *_dense(("blocks", "modulation"), [block + "norm1.linear"], (d,), (6, d), layers=layers),
        *_dense(("blocks", "qkv"), [block + f"attn1.to_{name}" for name in "qkv"], (d,), (3, *head), layers=layers),
        *_dense(("blocks", "projection"), [block + "attn1.to_out.0"], head, (d,), layers=layers),
        *_dense(("blocks", "expand"), [block + "ff.net.0.proj"], (d,), (config.hidden,), layers=layers),
        *_dense(("blocks", "contract"), [block + "ff.net.2"], (config.hidden,), (d,), layers=layers),
        *_dense(("final_modulation",), ["proj_out_1"], (d,), (2, d)),
        *_dense(("final",), ["proj_out_2"], (d,), (p, p, config.out_channels)),
    ]


def _read_dit_config(path: Path) -> dit.DiTConfig:
    content = _read_json(path)
    if content.get("_class_name") not in _DIT_CLASSES:
        raise ValueError(f"{path}: '_class_name' is {content.get('_class_name')!r}, expected {_DIT_CLASSES[0]!r}")
    fields = _DIT_DEFAULTS | {name: value for name, value in content.items() if name in _DIT_DEFAULTS}
    for name, value in _DIT_FIXED.items():
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


def load_dit(directory: str | os.PathLike[str], *, shardings: Callable[[Any], Any] | None = None) -> tuple[dit.DiTConfig, dict[str, Any]]:
    """A DiT from the directory layout of diffusers' `DiTTransformer2DModel`.

    That layout repeats the time and label embedders in every block. Where all copies are equal to the bit, as in the published checkpoints,
    one is kept; otherwise the config has `block_embedders` and every block keeps its own. Compute dtype, remat and scan are not part of the
    layout: set them by `dataclasses.replace(config, dtype="bfloat16")`. The config has `frequency_shift=1` as diffusers computes it; the
    published checkpoints were trained with 0, so replace it by 0 for the paper's own numbers.

    Args:
      directory: Holds config.json and diffusion_pytorch_model.safetensors (float32, float16 or bfloat16; read as float32).
      shardings: From the tree of shapes to the tree of `NamedSharding`s, e.g. `lambda tree: sharding.shardings(tree, dit.SHARDING_RULES,
        mesh)`. Every parameter is placed as soon as it is read, so that the host holds one (stacked over layers) at a time. Without it the
        parameters are on the default device.

    Returns:
      The config and the parameters, as `dit.init` lays them out.

    Raises:
      ValueError: naming the file and the tensor or setting that is missing, of another shape, unexpected or not supported.
    """
    directory = Path(directory)
    config = _read_dit_config(directory / _CONFIG_FILE)
    with _open(directory / _WEIGHTS_FILE) as file:
        file.check(_dit_entries(config), [_POSITIONS])
        if _POSITIONS in file.names:
            positions = dit.position_embedding(config.image_size // config.patch_size, config.width)[None]
            if file.get(_POSITIONS).shape != positions.shape or not np.allclose(file.get(_POSITIONS), positions, rtol=0, atol=1e-4):
                raise ValueError(f"{directory / _WEIGHTS_FILE}: tensor {_POSITIONS!r} is not the fixed sine-cosine embedding")
        for name in (name for entry in _dit_embedder_entries(config) for name in entry.names):
            first = file.get(name.format(0)).tobytes()
            if any(file.get(name.format(layer)).tobytes() != first for layer in range(1, config.depth)):
                config = dataclasses.replace(config, block_embedders=True)
                break
        tree = jax.eval_shape(lambda key: dit.init(config, key), jax.random.key(0))
        return config, _load(file, _dit_entries(config), tree, shardings, [_POSITIONS])


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
    _save(directory / _WEIGHTS_FILE, _dit_entries(config), params)
    content = {
        "_class_name": _DIT_CLASSES[0],
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": config.channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": config.image_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": config.mlp_norm_eps,
        **_DIT_FIXED,
    }
    (directory / _CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
