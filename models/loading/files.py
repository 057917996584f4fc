"""Files of named tensors.

Tensors are read with plain reads and not from a memory map, whose pages would count as memory of this process: what is asked for is all that
is held.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

__all__ = ["Source", "open_safetensors", "read_json", "save_safetensors", "write_json"]

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
_PIECE = 1 << 24  # bytes read at a time where only a part of each row is wanted


class Source(Protocol):
    """Something with named tensors, of which any part can be had."""

    @property
    def path(self) -> Path:
        """Where they come from, for messages."""
        ...

    @property
    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        ...

    def get(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part of a tensor given by a slice (without a step) for each axis, as a new array."""
        ...


class _Tensor(NamedTuple):
    stream: BinaryIO
    dtype: str
    shape: tuple[int, ...]
    start: int


class _Safetensors:
    """One or several safetensors files as a `Source`."""

    def __init__(self, path: Path, tensors: dict[str, _Tensor]):
        self.path, self._tensors = path, tensors
        self.names = frozenset(tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def get(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        stream, kind, shape, start = self._tensors[name]
        if kind not in _DTYPES:
            raise ValueError(f"{stream.name}: tensor {name!r} has dtype {kind}, expected one of {', '.join(_DTYPES)}")
        dtype, ranges = _DTYPES[kind], [part.indices(length)[:2] for part, length in zip(index, shape)]
        first, last = ranges[0] if shape else (0, 1)
        row = math.prod(shape[1:])
        if all(span == (0, length) for span, length in zip(ranges[1:], shape[1:])):
            return self._rows(stream, start, dtype, first, last, row).reshape(max(0, last - first) if shape else (), *shape[1:])
        result = np.empty([max(0, high - low) for low, high in ranges], dtype)
        step = max(1, _PIECE // (row * dtype.itemsize))
        for low in range(first, last, step):
            high = min(last, low + step)
            rows = self._rows(stream, start, dtype, low, high, row).reshape(high - low, *shape[1:])
            result[low - first : high - first] = rows[(slice(None), *index[1:])]
        return result

    @staticmethod
    def _rows(stream: BinaryIO, start: int, dtype: np.dtype, first: int, last: int, row: int) -> np.ndarray:
        result = np.empty(max(0, last - first) * row, dtype)
        stream.seek(start + first * row * dtype.itemsize)
        if stream.readinto(result.view(np.uint8)) != result.nbytes:  # type: ignore[attr-defined]
            raise ValueError(f"{stream.name}: not a complete safetensors file (it became shorter while it was read)")
        return result


@contextlib.contextmanager
def open_safetensors(directory: Path, stem: str) -> Iterator[Source]:
    """The tensors of stem.safetensors, or of the files that stem.safetensors.index.json names.

    Raises:
      ValueError: if a file is not there, is not complete, or lacks a tensor that the index says it has.
    """
    path, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    with contextlib.ExitStack() as stack:
        if path.is_file() or not index.is_file():
            yield _Safetensors(path, _header(path, stack))
            return
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) and Path(place).name == place for place in places.values()):
            raise ValueError(f"{index}: expected 'weight_map', from names of tensors to names of files beside it")
        tensors: dict[str, _Tensor] = {}
        for place in sorted(set(places.values())):
            found = _header(directory / place, stack)
            for name in (name for name, other in places.items() if other == place):
                if name not in found:
                    raise ValueError(f"{directory / place}: tensor {name!r} is missing, which {index.name} says is here")
                tensors[name] = found[name]
        yield _Safetensors(index, tensors)


def _header(path: Path, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    stream, size = stack.enter_context(path.open("rb", buffering=0)), path.stat().st_size
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 + length or length < 2:
        raise ValueError(f"{path}: not a complete safetensors file (the header is cut short)")
    try:
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {
            str(name): (str(info["dtype"]), tuple(map(int, info["shape"])), *map(int, info["data_offsets"]))
            for name, info in header.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a complete safetensors file (the header is damaged: {error})") from error
    for name, (dtype, shape, start, end) in tensors.items():
        if 8 + length + end > size:
            raise ValueError(f"{path}: not a complete safetensors file: tensor {name!r} ends at byte {8 + length + end} of {size}")
        if dtype in _DTYPES and end - start != math.prod(shape) * _DTYPES[dtype].itemsize:
            raise ValueError(f"{path}: tensor {name!r} has {end - start} bytes, expected {shape} of {dtype}")
    return {name: _Tensor(stream, dtype, shape, 8 + length + start) for name, (dtype, shape, start, _) in tensors.items()}  # type: ignore


def save_safetensors(path: Path, shapes: dict[str, tuple[tuple[int, ...], np.dtype]], tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes tensors one after the other; a save that is interrupted leaves an older file whole.

    Args:
      path: The file.
      shapes: Shape and dtype of every tensor, in the order of the file.
      tensors: Names and values in that order, made as they are needed.
    """
    kinds = {dtype: kind for kind, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kinds[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, value in tensors:
            stream.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: if there is no such file or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
