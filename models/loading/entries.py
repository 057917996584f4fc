"""How the tensors of a file make up parameters: reading any slice, checking, placing and writing, the same for all families.

A family is a list of entries, one per parameter. An entry's parts are tensors, or stretches of tensors, of which the axes are split into
factors, permuted, and then laid side by side along one axis of the parameter; parameters of blocks have a leading layer axis on top. So any
slice of a parameter is slices of tensors, and a device's shard is read without the rest.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from janax.models.loading import files

__all__ = ["Entry", "Part", "Shardings", "bias", "check", "linear", "load", "plain", "save"]

Shardings = Callable[[Any], Any]
"""From the tree of shapes to the tree of `NamedSharding`s."""

_Range = tuple[int, int]
_ALIGNMENT = 64  # bytes; the CPU backend takes over an array that is aligned so, and copies others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A tensor, or a stretch of one, as it goes into a parameter.

    Attributes:
      name: Name of the tensor; "{}" stands for the layer.
      shape: Its shape in the file.
      factors: Into which axes each axis of the stretch is split, the slowest first.
      order: Which of those axes, counted through, becomes each axis of the parameter.
      start: Where the stretch begins on each axis of the tensor; () is the beginning.
    """

    name: str
    shape: tuple[int, ...]
    factors: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    start: tuple[int, ...] = ()

    @property
    def sizes(self) -> list[int]:
        """Lengths of the split axes, in the order of the file."""
        return [size for axis in self.factors for size in axis]

    @property
    def view(self) -> tuple[int, ...]:
        """Shape within the parameter."""
        return tuple(self.sizes[axis] for axis in self.order)

    def stretch(self) -> tuple[slice, ...]:
        """Where the part is in the tensor."""
        starts = self.start or (0,) * len(self.shape)
        return tuple(slice(start, start + math.prod(axis)) for start, axis in zip(starts, self.factors))

    def read(self, source: files.Source, name: str, ranges: Sequence[_Range]) -> np.ndarray:
        """The ranges of the view. On each axis of the file one contiguous stretch is read, as its slowest factor says."""
        spans = [(0, 0)] * len(ranges)
        for axis, span in zip(self.order, ranges):
            spans[axis] = span
        index: list[slice] = []
        shape: list[int] = []
        within: list[slice] = []
        for stretch, sizes in zip(self.stretch(), self.factors):
            mine, spans = spans[: len(sizes)], spans[len(sizes) :]
            lead = next((i for i, size in enumerate(sizes) if size > 1), 0)
            stride, (low, high) = math.prod(sizes[lead + 1 :]), mine[lead]
            index.append(slice(stretch.start + low * stride, stretch.start + high * stride))
            shape += [*sizes[:lead], high - low, *sizes[lead + 1 :]]
            within += [slice(*span) if i != lead else slice(None) for i, span in enumerate(mine)]
        return source.get(name, tuple(index)).reshape(shape)[tuple(within)].transpose(self.order)

    def write(self, value: np.ndarray, tensor: np.ndarray) -> None:
        """Puts the view back into the tensor."""
        undone = value.transpose(np.argsort(self.order))
        tensor[self.stretch()] = undone.reshape([math.prod(axis) for axis in self.factors])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One parameter and the parts it is made of.

    Attributes:
      path: Where the parameter stands in the tree.
      parts: Its parts, side by side along `axis`.
      axis: An axis of the parts' views.
      layers: Length of the parameter's leading layer axis, or None if it has none.
      copies: Number of layers the file has; more than `layers` = 1 means that the layers of the file share the parameter.
    """

    path: tuple[str, ...]
    parts: tuple[Part, ...]
    axis: int = 0
    layers: int | None = None
    copies: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter, with its layer axis."""
        one = list(self.parts[0].view)
        one[self.axis : self.axis + 1] = [sum(part.view[self.axis] for part in self.parts)] if one else []
        return (*(() if self.layers is None else (self.layers,)), *one)

    def names(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all tensors."""
        for layer in range(self.copies or self.layers or 1):
            yield from {part.name.format(layer): part.shape for part in self.parts}.items()

    def read(self, source: files.Source, ranges: Sequence[_Range], dtype: DTypeLike | None) -> np.ndarray:
        """The ranges of the parameter, in the given dtype or that of the file."""
        if self.layers is None:
            return self._read_layer(source, 0, ranges, dtype, None)
        (first, last), *inner = ranges
        result = None
        for layer in range(first, last):
            result = self._read_layer(source, layer, inner, dtype, result, layer - first, last - first)
        assert result is not None
        return result

    def _read_layer(
        self,
        source: files.Source,
        layer: int,
        ranges: Sequence[_Range],
        dtype: DTypeLike | None,
        result: np.ndarray | None,
        row: int | None = None,
        rows: int = 0,
    ) -> np.ndarray:
        """Puts a layer into row `row` of `result`, which is made here for the first piece, whose dtype it has if none is given."""
        offset = 0
        for part in self.parts:
            spans, low, high = list(ranges), 0, 1
            if spans:
                begin, length = ranges[self.axis][0], part.view[self.axis]
                low, high = (min(max(end, offset), offset + length) for end in ranges[self.axis])
                spans[self.axis] = (low - offset, high - offset)
                low, high, offset = low - begin, high - begin, offset + length
            if low == high:
                continue
            name = part.name.format(layer)
            piece = part.read(source, name, spans)
            if result is None:
                shape = [end - begin for begin, end in ranges]
                result = _empty(shape if row is None else [rows, *shape], piece.dtype if dtype is None else np.dtype(dtype))
            elif dtype is None and piece.dtype != result.dtype:
                raise ValueError(
                    f"{source.path}: tensor {name!r} is {piece.dtype} and others of the parameter {'/'.join(self.path)!r} are "
                    f"{result.dtype}, expected one dtype; give 'dtype' to convert"
                )
            place = result if row is None else result[row]
            place[(slice(None),) * self.axis + (slice(low, high),) if spans else ...] = piece
        assert result is not None
        return result

    def write(self, value: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors of one layer, under their names with "{}"."""
        tensors = {part.name: np.empty(part.shape, value.dtype) for part in self.parts}
        ends = np.cumsum([part.view[self.axis] for part in self.parts])[:-1]
        for part, piece in zip(self.parts, np.split(value, ends, axis=self.axis)):
            part.write(piece, tensors[part.name])
        return tensors


def _empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """As np.empty, aligned."""
    raw = np.empty(math.prod(shape) * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : len(raw) - _ALIGNMENT + start].view(dtype).reshape(shape)


# Entries of the usual kinds. `out_first`: the parameter's axes are [*outputs *inputs], otherwise [*inputs *outputs].


def plain(path: tuple[str, ...], name: str, shape: tuple[int, ...], *, layers: int | None = None, copies: int | None = None) -> Entry:
    """A tensor as it is."""
    part = Part(name=name, shape=shape, factors=tuple((size,) for size in shape), order=tuple(range(len(shape))))
    return Entry(path=path, parts=(part,), layers=layers, copies=copies)


def linear(
    path: tuple[str, ...],
    outputs: Mapping[str, tuple[int, ...]],
    inputs: tuple[int, ...],
    *,
    axis: int = 0,
    out_first: bool = True,
    layers: int | None = None,
    copies: int | None = None,
    in_first_file: bool = False,
) -> Entry:
    """The kernel of linear layers, of which the outputs lie side by side along output axis `axis`.

    Args:
      path: Where the layer stands in the tree; "kernel" is added.
      outputs: Output axes by name of the layer; ".weight" is added. With `in_first_file`, names that differ only after a "#" are stretches
        of one tensor.
      inputs: Input axes.
      axis: Which output axis the layers share.
      out_first: The parameter is [*outputs *inputs], otherwise [*inputs *outputs].
      layers: As in `Entry`.
      copies: As in `Entry`.
      in_first_file: The tensors are [inputs, outputs], as GPT-2 has them, and not PyTorch's [outputs, inputs].
    """
    n, m = len(next(iter(outputs.values()))), len(inputs)
    names = [name.partition("#")[0] for name in outputs]
    totals = {name: sum(math.prod(size) for other, size in zip(names, outputs.values()) if other == name) for name in names}
    parts, starts = [], dict.fromkeys(names, 0)
    for name, size in zip(names, outputs.values()):
        factors, shape, start = (size, inputs), (totals[name], math.prod(inputs)), (starts[name], 0)
        outs, ins = tuple(range(n)), tuple(range(n, n + m))
        if in_first_file:
            factors, shape, start = factors[::-1], shape[::-1], start[::-1]
            outs, ins = tuple(range(m, n + m)), tuple(range(m))
        parts.append(Part(name=f"{name}.weight", shape=shape, factors=factors, order=outs + ins if out_first else ins + outs, start=start))
        starts[name] += math.prod(size)
    return Entry(path=(*path, "kernel"), parts=tuple(parts), axis=axis if out_first else axis + m, layers=layers, copies=copies)


def bias(
    path: tuple[str, ...],
    outputs: Mapping[str, tuple[int, ...]],
    *,
    axis: int = 0,
    layers: int | None = None,
    copies: int | None = None,
) -> Entry:
    """The biases of linear layers; arguments as in `linear`."""
    names = [name.partition("#")[0] for name in outputs]
    parts, starts = [], dict.fromkeys(names, 0)
    for name, size in zip(names, outputs.values()):
        total = sum(math.prod(other) for same, other in zip(names, outputs.values()) if same == name)
        order, start = tuple(range(len(size))), (starts[name],)
        parts.append(Part(name=f"{name}.bias", shape=(total,), factors=(size,), order=order, start=start))
        starts[name] += math.prod(size)
    return Entry(path=(*path, "bias"), parts=tuple(parts), axis=axis, layers=layers, copies=copies)


# Whole families.


def check(source: files.Source, entries: Sequence[Entry], ignored: Callable[[str], bool] = lambda name: False) -> None:
    """Every expected tensor is there, in shape, and nothing else is but what is ignored.

    Raises:
      ValueError: naming the file and the tensor.
    """
    expected = {name: shape for entry in entries for name, shape in entry.names()}
    for name, shape in expected.items():
        if name not in source.names:
            raise ValueError(f"{source.path}: tensor {name!r} is missing, expected shape {shape}")
        if tuple(source.shape(name)) != shape:
            raise ValueError(f"{source.path}: tensor {name!r} has shape {tuple(source.shape(name))}, expected {shape}")
    extra = sorted(name for name in source.names - expected.keys() if not ignored(name))
    if extra:
        others = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise ValueError(f"{source.path}: tensor {extra[0]!r}{others} is not part of the architecture in its configuration")


def load(
    source: files.Source, entries: Sequence[Entry], tree: Any, shardings: Shardings | None = None, dtype: DTypeLike | None = None
) -> dict[str, Any]:
    """The parameters as a nested dict, each placed as soon as it is read: the host holds one shard at a time, and a tensor of it.

    Args:
      source: The tensors, which `check` has accepted.
      entries: The family.
      tree: The shapes of the parameters.
      shardings: Where to; without it, the default device.
      dtype: To convert to; without it, as in the file.
    """
    targets = None if shardings is None else shardings(tree)
    params: dict[str, Any] = {}
    for entry in entries:
        *parents, last = entry.path
        node, target = params, targets
        for name in parents:
            node, target = node.setdefault(name, {}), None if target is None else target[name]
        node[last] = _place(source, entry, None if target is None else target[last], dtype)
    return params


def _place(source: files.Source, entry: Entry, target: Any, dtype: DTypeLike | None) -> jax.Array:
    shape = entry.shape
    if target is None:
        return jax.device_put(entry.read(source, [(0, size) for size in shape], dtype))
    devices: dict[tuple[_Range, ...], list[Any]] = {}
    for device, index in target.addressable_devices_indices_map(shape).items():
        devices.setdefault(tuple(part.indices(size)[:2] for part, size in zip(index, shape)), []).append(device)
    shards = []
    for ranges, same in devices.items():  # devices that hold the same share one read
        value = entry.read(source, ranges, dtype)
        shards += jax.block_until_ready([jax.device_put(value, device) for device in same])
    return jax.make_array_from_single_device_arrays(shape, target, shards)


def save(path: Path, entries: Sequence[Entry], params: Mapping[str, Any], dtype: DTypeLike | None = None) -> None:
    """Writes the parameters as safetensors, a layer of a parameter at a time, in their dtype or the given one."""

    def value_of(entry: Entry) -> Any:
        value: Any = params
        for name in entry.path:
            value = value[name]
        return value

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for entry in entries:
            value = value_of(entry)
            for layer in range(entry.copies or entry.layers or 1):
                one = value if entry.layers is None else value[min(layer, entry.layers - 1)]
                for name, tensor in entry.write(np.asarray(one).astype(dtype or one.dtype, copy=False)).items():
                    yield name.format(layer), tensor

    shapes = {name: (shape, np.dtype(dtype or value_of(entry).dtype)) for entry in entries for name, shape in entry.names()}
    files.save_safetensors(path, shapes, tensors())
