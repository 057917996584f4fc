"""Meshes and placement: the one module that names mesh axes.

    mesh = sharding.make_mesh({"data": 4, "model": 2})
    rules = ((r"attention/.*kernel", jax.P(None, "model")), (r".*", jax.P()))
    placed = sharding.place(params, sharding.shardings(params, rules, mesh))

Everything else in the library lets the placement of its inputs decide.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.typing import ArrayLike, DTypeLike

__all__ = [
    "Rules",
    "batch_spec",
    "constrain_batch",
    "fetch",
    "local_rows",
    "make_mesh",
    "path_string",
    "per_device",
    "place",
    "placed",
    "scalar_like",
    "shardings",
    "spec_of",
    "specs",
]

Rules = Sequence[tuple[str, jax.P]]


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None, *, explicit: bool = False) -> Mesh:
    """A mesh with named axes, e.g. {"data": 4, "model": 2}; one length may be -1 and takes the devices that are left.

    Args:
      axes: Length of every axis, in order.
      devices: Devices to use, all of the default backend by default; a topology's devices for ahead-of-time compilation.
      explicit: Make the sharding part of the array types instead of leaving it to the compiler. Static.

    Returns:
      The mesh. One device and lengths of one are valid: the same code then runs unsharded.

    Raises:
      ValueError: if there is no axis, or the lengths do not multiply to the number of devices.
    """
    if not axes:
        raise ValueError("make_mesh: 'axes' is {}, expected at least one axis")
    devices = list(jax.devices()) if devices is None else list(devices)
    lengths = dict(axes)
    known = math.prod(length for length in lengths.values() if length != -1)
    wild = [name for name, length in lengths.items() if length == -1]
    if len(wild) > 1 or any(length < 1 and length != -1 for length in lengths.values()):
        raise ValueError(f"make_mesh: 'axes' is {dict(axes)}, expected positive lengths and at most one -1")
    if wild and len(devices) % known == 0:
        lengths[wild[0]] = len(devices) // known
    if math.prod(lengths.values()) != len(devices) or min(lengths.values()) < 1:
        raise ValueError(f"make_mesh: 'axes' is {dict(axes)}, whose lengths must multiply to the {len(devices)} devices")
    kind = AxisType.Explicit if explicit else AxisType.Auto
    # As jax.make_mesh, but an axis may take a part of a physical one: 2 chips of an 8 x 8 torus.
    grid = mesh_utils.create_device_mesh(tuple(lengths.values()), devices, allow_split_physical_axes=True)
    return Mesh(grid, tuple(lengths), axis_types=(kind,) * len(lengths))


def path_string(path: tuple[Any, ...]) -> str:
    """The path of a leaf as "blocks/attention/kernel": keys, indices and attribute names joined by slashes."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry)))) for entry in path)


def spec_of(path: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh | None = None) -> jax.P:
    """The spec of the first rule whose pattern is found in the path.

    Args:
      path: As `path_string` writes it.
      shape: The leaf's shape. A scalar is always replicated.
      rules: Ordered (regular expression, spec) pairs; `re.search`, first match wins.
      mesh: If given, a named axis whose length does not divide the array's axis is dropped from the spec (that axis is then replicated),
        and so is an axis name that the mesh does not have.

    Returns:
      The spec, never longer than the shape.

    Raises:
      ValueError: if no rule matches, or the spec is longer than the shape.
    """
    if not shape:
        return jax.P()
    for pattern, spec in rules:
        if re.search(pattern, path):
            if len(spec) > len(shape):
                raise ValueError(f"spec_of: rule {pattern!r} gives {spec} to {path!r}, whose shape {shape} has fewer axes")
            return spec if mesh is None else jax.P(*(_fitting(entry, length, mesh) for entry, length in zip(spec, shape)))
    raise ValueError(f"spec_of: no rule matches the parameter {path!r} of shape {shape}; add a rule, at the end (r'.*', jax.P())")


def _fitting(entry: Any, length: int, mesh: Mesh) -> Any:
    names: tuple[str, ...] = (entry,) if isinstance(entry, str) else tuple(entry or ())
    kept = tuple(name for name in names if name in mesh.shape)
    if not kept or length % math.prod(mesh.shape[name] for name in kept):
        return None
    return kept[0] if len(kept) == 1 else kept


def specs(tree: Any, rules: Rules, mesh: Mesh | None = None) -> Any:
    """The tree of `jax.P` that the rules give to a tree of arrays or ShapeDtypeStructs; see `spec_of`."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: spec_of(path_string(path), tuple(leaf.shape), rules, mesh), tree)


def shardings(tree: Any, rules: Rules, mesh: Mesh, *, whole: Sequence[str] = ()) -> Any:
    """As `specs`, but `NamedSharding`s on the mesh, ready for `in_shardings`, `out_shardings` and `jax.device_put`.

    Axes in `whole` split nothing: weights that are used again and again without a change are better kept than gathered at every use.
    """

    def place(spec: jax.P) -> NamedSharding:
        each = [tuple(axis for axis in (axes if isinstance(axes, tuple) else (axes,)) if axis not in (None, *whole)) for axes in spec]
        kept = [axes[0] if len(axes) == 1 else axes or None for axes in each]
        return NamedSharding(mesh, jax.P(*kept))

    return jax.tree.map(place, specs(tree, rules, mesh), is_leaf=lambda x: isinstance(x, jax.P))


def place(tree: Any, target: Any) -> Any:
    """Puts a tree of host or device arrays where the tree of shardings says; of several processes each holds the whole value."""

    def put(x: Any, where: NamedSharding) -> jax.Array:
        if where.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return jax.device_put(x, where)
        whole = x if isinstance(x, jax.Array) else np.asarray(x)
        return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])

    return jax.tree.map(put, tree, target)


def fetch(tree: Any) -> Any:
    """The whole arrays of a tree as NumPy on the host; of several processes in each, and all of them call it."""

    def get(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(get, tree)


def local_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
    """Which rows of a batch the devices of this process hold, ascending; with one process, all.

    Args:
      mesh: The mesh that the batch is placed on, by `batch_spec`.
      num_rows: Rows of the whole batch; the mesh axis `data` divides it.

    Returns:
      [r] row numbers. On a torus they need not be neighbours, and where other axes span processes, several of them hold the same rows.
    """
    indices = NamedSharding(mesh, batch_spec(mesh)).addressable_devices_indices_map((num_rows,))
    return np.unique(np.concatenate([np.arange(num_rows)[index] for index in indices.values()]))


def batch_spec(mesh: Mesh) -> jax.P:
    """The spec of a batch: its leading axis over the mesh axis `data`, whole if there is none."""
    return jax.P("data") if "data" in mesh.shape else jax.P()


def constrain_batch(x: jax.Array, *, axis: int = 0, heads: int | None = None) -> jax.Array:
    """Keeps the batch axis of an activation on the mesh axis `data`; the identity where no such mesh is in context (`jax.set_mesh`).

    Args:
      x: [...] activation.
      axis: Which axis is the batch; negative ones count from the end. Static.
      heads: Which axis is the heads', to keep on `model` where that divides it; None leaves it to the compiler. Static.

    Returns:
      `x` with its placement pinned. Use it where the compiler would otherwise gather a batch, e.g. after a reshape.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or "data" not in mesh.shape or x.shape[axis] % mesh.shape["data"] or mesh._any_axis_manual:
        return x
    names: dict[int, Any] = {axis % x.ndim: ("data",)}
    if heads is not None and x.shape[heads] % mesh.shape.get("model", x.shape[heads] + 1) == 0:
        names[heads % x.ndim] = ("model",)
    spec = jax.P(*(names.get(i, jax.P.UNCONSTRAINED) for i in range(x.ndim)))
    return jax.lax.with_sharding_constraint(x, spec) if mesh._any_axis_auto else x


def per_device(
    call: Callable[..., jax.Array], arrays: Sequence[jax.Array], axes: Sequence[Sequence[str | None]], out: Sequence[str | None]
) -> jax.Array:
    """call(*arrays) on every device's rows and heads, for kernels that the compiler cannot split; plain where no mesh is in context.

    Args:
      call: What one device computes.
      arrays: Its arguments.
      axes: For each argument what its axes are: "batch" is split over the mesh axis `data`, "heads" over `model`, None is whole. An axis
        that the mesh does not divide stays whole, in all arguments.
      out: The same for the result.

    Returns:
      The result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh._any_axis_manual:
        return call(*arrays)
    names = {"batch": "data", "heads": "model"}
    lengths: dict[str, list[int]] = {kind: [] for kind in names}
    for array, kinds in zip(arrays, axes):
        for length, kind in zip(array.shape, kinds):
            if kind is not None:
                lengths[kind].append(length)
    split = {kind: name for kind, name in names.items() if name in mesh.shape and not any(n % mesh.shape[name] for n in lengths[kind])}
    specs, spec = [jax.P(*(split.get(kind or "") for kind in kinds)) for kinds in axes], jax.P(*(split.get(kind or "") for kind in out))
    return jax.shard_map(call, in_specs=tuple(specs), out_specs=spec, check_vma=False)(*arrays)


def scalar_like(x: jax.Array, value: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """[] `value` on the mesh of `x`, for what a loop over x carries: a bare constant belongs to no mesh, which `vmap` of such a loop refuses."""
    return jnp.sum(jnp.zeros_like(x, dtype=dtype)) + jnp.asarray(value, dtype)


def placed(call: Callable[..., Any], like: Callable[[Callable[[Any], jax.P]], Any], *args: Any) -> Any:
    """call(*args) with the placement inside left to the compiler, on meshes with explicit axes too.

    Args:
      call: What to compute; arrays come as arguments, not by closure.
      like: (spec) -> the tree of `jax.P` of the result, where spec(x) is that of an array; asked on explicit axes only.
      args: Trees of arrays, or None.

    Returns:
      The result, placed as `like` says.
    """
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return call(*args)
    auto: Any = jax.sharding.auto_axes(call, out_sharding=like(lambda x: jax.typeof(x).sharding.spec))
    return auto(*args)
