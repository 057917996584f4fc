"""GGUF, the single-file format of quantised checkpoints: metadata, and tensors under the names of Hugging Face's layout.

    with gguf.GgufFile("SmolLM2-135M-Instruct.Q4_1.gguf") as file:
        file.config["hidden_size"]                                        # what the config.json of this checkpoint says
        file.get("model.layers.0.self_attn.q_proj.weight")                # float32, decoded from the memory-mapped file
        file.get("model.embed_tokens.weight", (slice(0, 1024), slice(0, 288)))    # only these rows are decoded

Weights are stored in blocks along the last axis, each with its own scale: Q8_0 is d q, Q4_1 is d q + m, and the K types split a block of 256
into parts whose scales are integers again. F32, F16, BF16, F64, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K are decoded here, the
rarer types by the package gguf if it is installed (`pip install 'janax[gguf]'`).

The files of Llama models hold the rows of the query and key projections in the order of interleaved rotary pairs (2k, 2k + 1); they are
returned in Hugging Face's order, for rotary embeddings that pair k with k + head_dim / 2.
"""

import dataclasses
import functools
import importlib
import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple, Self

import numpy as np

__all__ = ["GgufFile", "is_gguf"]

_MAGIC = b"GGUF"
_CHUNK = 1 << 18  # weights decoded at a time: the temporaries stay in the cache, and small beside a large tensor


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether the path is a file that begins as GGUF files do."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(_MAGIC)) == _MAGIC


# Blocks of weights. A decoder takes [n block_bytes] uint8 and returns [n block_weights] float32.


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    return blocks[:, start : start + 2].view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """[n k] bytes as [n 2k] numbers below 16: first all low halves, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """[n 4] bytes as [n 32] numbers, 0 or 16."""
    return np.unpackbits(packed, axis=1, bitorder="little") << 4


def _decode_q4_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _decode_q4_1(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _decode_q5_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * ((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])).astype(np.float32) - 16)


def _decode_q5_1(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])).astype(np.float32) + _half(blocks, 2)


def _decode_q8_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _k_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n 12] bytes as eight scales and eight minima of six bits, each [n 8 1].

    The first four of both are the low six bits of bytes 0-3 and 4-7; the others have four bits in bytes 8-11 and two atop bytes 0-7.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return scales.astype(np.float32)[:, :, None], minima.astype(np.float32)[:, :, None]


def _k_nibbles(packed: np.ndarray) -> np.ndarray:
    """[n 128] bytes as [n 8 32] numbers below 16: of every 32 bytes the low halves, then the high ones."""
    groups = packed.reshape(-1, 4, 1, 32)
    return np.concatenate([groups & 15, groups >> 4], axis=2).reshape(-1, 8, 32)


def _affine(blocks: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    scales, minima = _k_scales(blocks[:, 4:16])
    scales, minima = _half(blocks, 0)[:, :, None] * scales, _half(blocks, 2)[:, :, None] * minima
    return (scales * numbers.astype(np.float32) - minima).reshape(-1, 256)


def _decode_q4_k(blocks: np.ndarray) -> np.ndarray:
    return _affine(blocks, _k_nibbles(blocks[:, 16:]))


def _decode_q5_k(blocks: np.ndarray) -> np.ndarray:
    high = blocks[:, 16:48].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _affine(blocks, _k_nibbles(blocks[:, 48:]) | high << 4)


def _decode_q6_k(blocks: np.ndarray) -> np.ndarray:
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    numbers = (low | high << 4).astype(np.float32) - 32
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (scales[:, :, None] * numbers.reshape(-1, 16, 16)).reshape(-1, 256)


def _plain(dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    return lambda blocks: blocks.view(dtype).astype(np.float32)


def _decode_bf16(blocks: np.ndarray) -> np.ndarray:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


class _Type(NamedTuple):
    """A tensor type: its name, weights and bytes of a block, and its decoder; None leaves it to the package gguf."""

    name: str
    weights: int
    size: int
    decode: Callable[[np.ndarray], np.ndarray] | None


_TYPES = {
    0: _Type("F32", 1, 4, _plain("<f4")),
    1: _Type("F16", 1, 2, _plain("<f2")),
    2: _Type("Q4_0", 32, 18, _decode_q4_0),
    3: _Type("Q4_1", 32, 20, _decode_q4_1),
    6: _Type("Q5_0", 32, 22, _decode_q5_0),
    7: _Type("Q5_1", 32, 24, _decode_q5_1),
    8: _Type("Q8_0", 32, 34, _decode_q8_0),
    10: _Type("Q2_K", 256, 84, None),
    11: _Type("Q3_K", 256, 110, None),
    12: _Type("Q4_K", 256, 144, _decode_q4_k),
    13: _Type("Q5_K", 256, 176, _decode_q5_k),
    14: _Type("Q6_K", 256, 210, _decode_q6_k),
    16: _Type("IQ2_XXS", 256, 66, None),
    17: _Type("IQ2_XS", 256, 74, None),
    18: _Type("IQ3_XXS", 256, 98, None),
    19: _Type("IQ1_S", 256, 50, None),
    20: _Type("IQ4_NL", 32, 18, None),
    21: _Type("IQ3_S", 256, 110, None),
    22: _Type("IQ2_S", 256, 82, None),
    23: _Type("IQ4_XS", 256, 136, None),
    28: _Type("F64", 1, 8, _plain("<f8")),
    29: _Type("IQ1_M", 256, 56, None),
    30: _Type("BF16", 1, 2, _decode_bf16),
}


def _decoder(code: int) -> Callable[[np.ndarray], np.ndarray]:
    """The decoder of a type.

    Raises:
      ModuleNotFoundError: if it needs the package gguf and that is not installed.
    """
    decode = _TYPES[code].decode
    if decode is not None:
        return decode
    package: Any = importlib.import_module("gguf")
    return lambda blocks: package.quants.dequantize(blocks, package.GGMLQuantizationType(code))


# The header: magic, version, counts, metadata, and where each tensor lies. Little endian, strings and arrays preceded by their length.


class _Tensor(NamedTuple):
    """A stored tensor: shape in NumPy's order, type, and first byte in the file."""

    shape: tuple[int, ...]
    code: int
    start: int

    @property
    def size(self) -> int:
        kind = _TYPES[self.code]
        return math.prod(self.shape) // kind.weights * kind.size


_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))
_STRING, _ARRAY = 8, 9


class _Header:
    """Reads the header front to back; running over the end of the file raises `struct.error`."""

    def __init__(self, data: memoryview):
        self._data, self.position = data, 0

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack_from("<" + letter, self._data, self.position)
        self.position += struct.calcsize("<" + letter)
        return value

    def string(self) -> str:
        length = self.number("Q")
        return bytes(self._take(length)).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.number("I"), self.number("Q")
            if element in _SCALARS:
                letter = _SCALARS[element]
                return np.frombuffer(self._take(count * struct.calcsize("<" + letter)), "<" + letter).tolist()
            return [self.value(element) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"metadata of the unknown type {kind}")
        return self.number(_SCALARS[kind])

    def _take(self, length: int) -> memoryview:
        if length > len(self._data) - self.position:
            raise struct.error("over the end")
        self.position += length
        return self._data[self.position - length : self.position]


# Architectures: metadata to config.json, stored names to Hugging Face's.


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Architecture:
    """How a family's file is told in Hugging Face's terms.

    Attributes:
      top: Names outside the layers.
      layer: Names within a layer, without "blk.i." and without `layers`.
      layers: What stands before a layer's name in Hugging Face's layout; "{}" is the layer.
      config: From the file to the content of config.json.
      interleaved: The rows of queries and keys are stored as rotary pairs (2k, 2k + 1).
      transposed: Stored names of matrices whose axes are exchanged.
      ignored: Stored tensors that are not weights.
    """

    top: Mapping[str, str]
    layer: Mapping[str, str]
    layers: str
    config: Callable[["GgufFile"], dict[str, Any]]
    interleaved: bool = False
    transposed: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def _shared_config(file: "GgufFile") -> dict[str, Any]:
    """The fields that decoders with rotary embeddings and RMS norms have in common."""
    arch = file.architecture
    for name in (f"{arch}.expert_count", f"{arch}.rope.scaling.type"):
        if file.metadata.get(name) not in (None, 0, "none", "linear"):
            raise ValueError(f"{file.path}: metadata {name!r} is {file.metadata[name]!r}, which is not supported")
    heads, width = file.integer("attention.head_count"), file.integer("embedding_length")
    head_dim = file.integer("attention.key_length", width // heads)
    rotary = file.integer("rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise ValueError(f"{file.path}: metadata '{arch}.rope.dimension_count' is {rotary}, only the head's size ({head_dim}) is supported")
    scaling = None
    if file.metadata.get(f"{arch}.rope.scaling.type") == "linear":
        scaling = {"rope_type": "linear", "factor": file.real("rope.scaling.factor")}
    theta = file.real("rope.freq_base", 10000.0)
    if "rope_freqs.weight" in file.stored:
        scaling = _llama3_scaling(file, theta, head_dim)
    return {
        "hidden_size": width,
        "intermediate_size": file.integer("feed_forward_length"),
        "num_hidden_layers": file.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": file.integer("context_length"),
        "rms_norm_eps": file.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "vocab_size": file.stored_shape("token_embd.weight")[0],
        "tie_word_embeddings": "output.weight" not in file.stored,
        **_special_ids(file),
    }


def _llama3_scaling(file: "GgufFile", theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling of the rotary frequencies, of which the file keeps only the resulting factors.

    All published models share the other three numbers; whether they give the stored factors is checked.
    """
    stored = file.read_stored("rope_freqs.weight")
    factor, low, high, original = float(stored.max()), 1.0, 4.0, 8192
    turns = original * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if stored.shape != smooth.shape or not np.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise ValueError(f"{file.path}: tensor 'rope_freqs.weight' is not the scaling of Llama 3, and no other is supported")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {"rope_type": "llama3", **dict(zip(names, (factor, low, high, original)))}


def _special_ids(file: "GgufFile") -> dict[str, Any]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: file.metadata.get(f"tokenizer.ggml.{stored}_token_id") for name, stored in names.items()}


def _llama_config(file: "GgufFile") -> dict[str, Any]:
    biased = "blk.0.attn_q.bias" in file.stored
    fields = {"attention_bias": biased, "mlp_bias": "blk.0.ffn_up.bias" in file.stored}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_shared_config(file), **fields}


def _qwen2_config(file: "GgufFile") -> dict[str, Any]:
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **_shared_config(file), "use_sliding_window": False}


def _qwen3_config(file: "GgufFile") -> dict[str, Any]:
    fields = {"attention_bias": "blk.0.attn_q.bias" in file.stored, "use_sliding_window": False}
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **_shared_config(file), **fields}


def _gpt2_config(file: "GgufFile") -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": file.integer("embedding_length"),
        "n_inner": file.integer("feed_forward_length"),
        "n_layer": file.integer("block_count"),
        "n_head": file.integer("attention.head_count"),
        "n_positions": file.integer("context_length"),
        "activation_function": "gelu_new",
        "layer_norm_epsilon": file.real("attention.layer_norm_epsilon"),
        "vocab_size": file.stored_shape("token_embd.weight")[0],
        "tie_word_embeddings": "output.weight" not in file.stored,
        **_special_ids(file),
    }


_ROTARY = {
    "top": {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
    "layers": "model.layers.{}.",
    "layer": {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
    "ignored": ("rope_freqs.weight",),
}
_ARCHITECTURES = {
    "llama": _Architecture(**_ROTARY, config=_llama_config, interleaved=True),
    "qwen2": _Architecture(**_ROTARY, config=_qwen2_config),
    "qwen3": _Architecture(**_ROTARY, config=_qwen3_config),
    "gpt2": _Architecture(
        top={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        layers="transformer.h.{}.",
        layer={
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        config=_gpt2_config,
        transposed=("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"),
    ),
}

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_MISSING: Any = object()


class _Entry(NamedTuple):
    """A tensor under its public name: where it is stored, and how its axes are put right."""

    stored: str
    order: np.ndarray | None
    transposed: bool


class GgufFile:
    """An open GGUF file; a context manager.

    The file is memory-mapped and a tensor is decoded when it is asked for, so the memory needed is that of one result.

    Attributes:
      path: The file.
      metadata: Every key of the header with its value: numbers, strings, booleans, lists.
      stored: The tensors under the file's own names.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens the file and reads its header.

        Args:
          path: The file.

        Raises:
          ValueError: if there is no such file, it is not GGUF of version 2 or 3, little endian, or it is shorter than its header says.
        """
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self.stored: dict[str, _Tensor] = {}
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such file")
        if not is_gguf(self.path):
            raise ValueError(f"{self.path}: not a GGUF file (it does not begin with {_MAGIC.decode()!r})")
        self._data: np.ndarray | None = np.memmap(self.path, np.uint8, mode="r")
        try:
            self._read_header(self._data)
        except (struct.error, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path}: the header is damaged or cut short; fetch the file again") from error

    def _read_header(self, data: np.ndarray) -> None:
        header = _Header(data.data)
        header.position = len(_MAGIC)
        version = header.number("I")
        if version not in (2, 3):
            known = "big endian" if version & 0xFFFF == 0 else f"version {version}"
            raise ValueError(f"{self.path}: a GGUF file of {known}, expected version 2 or 3, little endian")
        num_tensors, num_values = header.number("Q"), header.number("Q")
        for _ in range(num_values):
            name, kind = header.string(), header.number("I")
            try:
                self.metadata[name] = header.value(kind)
            except UnicodeDecodeError:
                raise
            except ValueError as error:
                raise ValueError(f"{self.path}: {name!r} is {error}") from error
        places = {}
        for _ in range(num_tensors):
            name = header.string()
            shape = tuple(header.number("Q") for _ in range(header.number("I")))[::-1]
            places[name] = shape, header.number("I"), header.number("Q")
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-header.position // alignment) * alignment
        for name, (shape, code, offset) in places.items():
            if code not in _TYPES:
                raise ValueError(f"{self.path}: tensor {name!r} has the unknown type {code}; known are {_type_names()}")
            if not shape or shape[-1] % _TYPES[code].weights:
                raise ValueError(f"{self.path}: tensor {name!r} has shape {shape}, which blocks of {_TYPES[code].name} do not fill")
            self.stored[name] = tensor = _Tensor(shape, code, start + offset)
            if tensor.start + tensor.size > len(data):
                end = tensor.start + tensor.size
                raise ValueError(f"{self.path}: tensor {name!r} ends at byte {end}, but the file has {len(data)}; fetch it again")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the file; metadata stays."""
        self._data = None

    # Metadata.

    @property
    def architecture(self) -> str:
        """The family, e.g. "llama", as the file names it."""
        return str(self._metadata_value("general.architecture"))

    def integer(self, name: str, default: int = _MISSING) -> int:
        """The architecture's metadata `name`.

        Raises:
          ValueError: if it is absent and there is no default, or it is not an integer.
        """
        value = self._metadata_value(f"{self.architecture}.{name}", default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{self.path}: metadata '{self.architecture}.{name}' is {str(value)[:50]}, expected an integer")
        return value

    def real(self, name: str, default: float = _MISSING) -> float:
        """Like `integer`, for a number kept as float32: the shortest decimal that gives it, as config.json would have it."""
        value = self._metadata_value(f"{self.architecture}.{name}", default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{self.path}: metadata '{self.architecture}.{name}' is {str(value)[:50]}, expected a number")
        return float(str(np.float32(value)))

    def _metadata_value(self, name: str, default: Any = _MISSING) -> Any:
        if name not in self.metadata and default is _MISSING:
            raise ValueError(f"{self.path}: metadata {name!r} is missing")
        return self.metadata.get(name, default)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """What the config.json of this checkpoint says, as far as the architecture goes.

        Raises:
          ValueError: if the architecture is not supported, or metadata is missing.
        """
        return self._family.config(self)

    @property
    def _family(self) -> _Architecture:
        if self.architecture not in _ARCHITECTURES:
            expected = ", ".join(_ARCHITECTURES)
            raise ValueError(f"{self.path}: architecture {self.architecture!r} is not supported, expected one of {expected}")
        return _ARCHITECTURES[self.architecture]

    # Tensors.

    @functools.cached_property
    def _entries(self) -> dict[str, _Entry]:
        family, entries = self._family, {}
        for stored, tensor in self.stored.items():
            if stored in family.ignored:
                continue
            try:
                _decoder(tensor.code)
            except ModuleNotFoundError as error:
                kind = _TYPES[tensor.code].name
                raise ValueError(f"{self.path}: tensor {stored!r} is {kind}, which needs: pip install 'janax[gguf]'") from error
            match = _LAYER.fullmatch(stored)
            layer, rest = match.groups() if match else ("", stored)
            name, _, kind = rest.rpartition(".")
            public = (family.layer if match else family.top).get(name)
            order = self._head_order(tensor.shape[0], name) if family.interleaved and name in ("attn_q", "attn_k") else None
            # A tensor that the family does not have keeps its name, for the reader to complain about.
            full = stored if public is None else f"{family.layers.format(layer) if match else ''}{public}.{kind}"
            entries[full] = _Entry(stored, order, match is not None and rest in family.transposed)
        return entries

    def _head_order(self, rows: int, name: str) -> np.ndarray:
        """Where each row of the split-half order is stored."""
        heads = self.integer("attention.head_count")
        heads = self.integer("attention.head_count_kv", heads) if name == "attn_k" else heads
        if rows % (2 * heads):
            raise ValueError(f"{self.path}: tensor '{name}' of a layer has {rows} rows, which {heads} heads do not share evenly")
        return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ValueError(f"{self.path}: tensor {name!r} is missing")
        return self._entries[name]

    @property
    def names(self) -> frozenset[str]:
        """The tensors under the names of Hugging Face's layout.

        Raises:
          ValueError: if the architecture, or the type of a tensor, is not supported.
        """
        return frozenset(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in Hugging Face's layout.

        Raises:
          ValueError: if there is no such tensor.
        """
        entry = self._entry(name)
        shape = self.stored[entry.stored].shape
        return shape[::-1] if entry.transposed else shape

    def get(self, name: str, index: tuple[slice, ...] | slice | EllipsisType = ...) -> np.ndarray:
        """A tensor, or a part of it, decoded.

        Args:
          name: One of `names`.
          index: A slice for each axis, or for the first ones; everything by default. Only the rows asked for are decoded.

        Returns:
          The part, float32, a copy.

        Raises:
          ValueError: if there is no such tensor, or the file was closed.
        """
        entry = self._entry(name)
        parts = () if index is ... else index if isinstance(index, tuple) else (index,)
        parts = parts + (slice(None),) * (len(self.shape(name)) - len(parts))
        value = self._read(entry.stored, parts[::-1] if entry.transposed else parts, entry.order)
        return np.ascontiguousarray(value.T) if entry.transposed else value

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor under the file's own name.

        Raises:
          ValueError: if there is no such tensor.
        """
        if name not in self.stored:
            raise ValueError(f"{self.path}: tensor {name!r} is missing")
        return self.stored[name].shape

    def read_stored(self, name: str) -> np.ndarray:
        """A tensor under the file's own name, as it is stored, decoded to float32.

        Raises:
          ValueError: if there is no such tensor, its type is not supported, or the file was closed.
        """
        return self._read(name, (slice(None),) * len(self.stored_shape(name)), None)

    def _read(self, stored: str, parts: tuple[slice, ...], order: np.ndarray | None) -> np.ndarray:
        if self._data is None:
            raise ValueError(f"{self.path}: tensor {stored!r} was asked for after the file was closed")
        tensor = self.stored[stored]
        kind, decode = _TYPES[tensor.code], _decoder(tensor.code)
        raw = self._data[tensor.start : tensor.start + tensor.size].view(np.ndarray)
        if len(tensor.shape) == 1:
            value = decode(raw.reshape(-1, kind.size)).reshape(-1)
            return np.array((value if order is None else value[order])[parts])
        raw = raw.reshape(tensor.shape[0], -1)
        rows = (np.arange(tensor.shape[0]) if order is None else order)[parts[0]]
        inner = tensor.shape[1:]
        result = np.empty((len(rows), *np.empty(inner, np.bool_)[parts[1:]].shape), np.float32)
        step = max(1, _CHUNK // math.prod(inner))
        for start in range(0, len(rows), step):
            blocks = raw[rows[start : start + step]].reshape(-1, kind.size)
            result[start : start + step] = decode(blocks).reshape(-1, *inner)[(slice(None), *parts[1:])]
        return result


def _type_names() -> str:
    return ", ".join(kind.name for kind in _TYPES.values())
