"""Compile for a pod that is not there: does the program fit, what does it compute and communicate, how fast could it be.

    devices = aot.topology_devices("v5e:16x16")
    mesh = sharding.make_mesh({"data": 256}, devices)
    batch = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16, sharding=NamedSharding(mesh, jax.P("data")))
    program = aot.Program("step", step, (state, batch), donate_argnums=(0,))
    print(aot.analyse(program, aot.chip_of("v5e:16x16")).text())

Everything runs on a machine without accelerators: the compilers of TPU and GPU need none. See docs/compile.md for what the figures mean.
"""

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from janax.jaxlib_ext.aot.cost import Cost, count, count_jaxpr
from janax.jaxlib_ext.aot.hlo import Collective, collectives
from janax.jaxlib_ext.aot.topology import Chip, chip_of, topology_devices

__all__ = [
    "Analysis",
    "Chip",
    "Collective",
    "Cost",
    "Memory",
    "Program",
    "analyse",
    "chip_of",
    "collectives",
    "count",
    "memory",
    "topology_devices",
]


class Program(NamedTuple):
    """A function and the placed shapes to compile it for.

    Attributes:
      name: For reports.
      fn: A function of arrays, jitted or not.
      args: Its positional arguments: trees of `jax.ShapeDtypeStruct`, each with a sharding on the topology's devices unless
        `in_shardings` has it. Concrete arrays of another platform's devices will not do.
      in_shardings: As for `jax.jit`; None takes the arguments' own.
      out_shardings: As for `jax.jit`; None leaves the outputs to the compiler.
      donate_argnums: As for `jax.jit`; donated arguments may share their memory with outputs.
    """

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    in_shardings: Any = None
    out_shardings: Any = None
    donate_argnums: int | Sequence[int] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes per device of a compiled program.

    Attributes:
      arguments: Of the arguments.
      outputs: Of the results.
      aliased: Of the results that take the place of donated arguments.
      temporaries: Of everything between: activations kept for the gradient, gathered parameters, buffers of collectives.
      code: Of the machine code (on TPU it lives in HBM).
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        """What the program needs while it runs: arguments + outputs - aliased + temporaries + code."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """What `analyse` finds; times in seconds, sizes in bytes.

    Attributes:
      name: The program's.
      chip: The chip it was held against.
      devices: Number of devices it was compiled for.
      platform: Their kind, as the compiler calls it.
      memory: Per device. If the program does not fit, what the compiler reports as needed stands under `temporaries`.
      fits: Whether it compiled and its peak is at most the chip's memory.
      cost: FLOPs and bytes over all devices; see `Cost`.
      collectives: One entry per kind; see `Collective`.
      trace_seconds: Time to trace the function.
      lower_seconds: Time to lower it.
      compile_seconds: Time to compile it.
      error: The compiler's words if the program does not fit, else None.
    """

    name: str
    chip: Chip
    devices: int
    platform: str
    memory: Memory
    fits: bool
    cost: Cost
    collectives: tuple[Collective, ...]
    trace_seconds: float
    lower_seconds: float
    compile_seconds: float
    error: str | None = None

    @property
    def share(self) -> float:
        """Peak memory as a share of the chip's."""
        return self.memory.peak / self.chip.memory

    @property
    def roofline(self) -> dict[str, float]:
        """Least seconds per execution that each resource of the chips allows, were it used perfectly and the work split evenly.

        compute: matrix products at the chip's peak for their dtype. memory: `Cost.bytes` over the HBM bandwidth, or one pass over the
        device's arguments and outputs if that is more. interconnect: what the collectives send over all links of a chip at once, between
        domains over the network.
        """
        cost, chip = self.cost, self.chip
        compute = cost.matmul_bf16 / chip.flops_bf16 + cost.matmul_f32 / chip.flops_f32 + cost.matmul_f32_highest / chip.flops_f32_highest
        moved = max(cost.bytes / self.devices, self.memory.arguments + self.memory.outputs)
        sent = sum(c.sent for c in self.collectives)
        between = sum(c.sent_between_domains for c in self.collectives)
        interconnect = (sent - between) / chip.interconnect + (between / chip.network if chip.network else 0.0)
        return {"compute": compute / self.devices, "memory": moved / chip.memory_bandwidth, "interconnect": interconnect}

    @property
    def step_seconds(self) -> float:
        """The largest entry of `roofline`: no execution can be faster."""
        return max(self.roofline.values())

    @property
    def limit(self) -> str:
        """Which resource that is."""
        return max(self.roofline, key=self.roofline.__getitem__)

    @property
    def unknown_loops(self) -> int:
        """Loops whose trip count is unknown, in the jaxpr or around a collective; FLOPs or bytes inside are counted once."""
        return max([self.cost.unknown_loops, *(c.unknown_loops for c in self.collectives)])

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain types, ready for JSON."""
        cost = {**dataclasses.asdict(self.cost), "matmul": self.cost.matmul, "flops": self.cost.flops, "bytes": self.cost.bytes}
        return {
            "name": self.name,
            "chip": dataclasses.asdict(self.chip),
            "devices": self.devices,
            "platform": self.platform,
            "fits": self.fits,
            "share": self.share,
            "memory": {**dataclasses.asdict(self.memory), "peak": self.memory.peak, "capacity": self.chip.memory},
            "cost": {**cost, "uncounted": list(self.cost.uncounted), "flops_per_device": self.cost.flops / self.devices},
            "collectives": [{**dataclasses.asdict(c), "group_sizes": list(c.group_sizes)} for c in self.collectives],
            "roofline": {**self.roofline, "step_seconds": self.step_seconds, "limit": self.limit},
            "unknown_loops": self.unknown_loops,
            "trace_seconds": self.trace_seconds,
            "lower_seconds": self.lower_seconds,
            "compile_seconds": self.compile_seconds,
            "error": self.error,
        }

    def text(self) -> str:
        """A table for people."""
        memory, cost, devices = self.memory, self.cost, self.devices
        verdict = "fits" if self.fits else "DOES NOT FIT"
        lines = [
            f"{self.name}: {devices} x {self.chip.name} ({self.platform}), {verdict}: "
            f"{_size(memory.peak)} of {_size(self.chip.memory)} per device, {self.share:.0%}"
        ]
        if self.error:
            lines.append(f"  compiler      {self.error}")
        fields = ("arguments", "outputs", "aliased", "temporaries", "code")
        lines.append("  memory        " + ", ".join(f"{name} {_size(getattr(memory, name))}" for name in fields))
        work = ("matmul", "elementwise", "transcendental")
        for label, factor in (("work, total", 1), ("per device", 1 / devices)):
            counts = ", ".join(f"{name} {_quantity(getattr(cost, name) * factor)}FLOP" for name in work)
            lines.append(f"  {label:<14}{counts}, traffic {_size(cost.bytes * factor)}")
        rows = [("collectives", "count", "executed", "group", "payload", "sent")]
        for c in self.collectives:
            groups = "/".join(str(n) for n in c.group_sizes)
            rows.append((c.kind, str(c.count), str(c.executed), groups, _size(c.payload), _size(c.sent)))
        if len(rows) == 1:
            lines.append("  collectives   none")
        else:
            widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
            for first, *others in rows:
                lines.append("  ".join(["  " + first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:]))]))
        times = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in self.roofline.items())
        lines.append(f"  roofline      {times}: at least {_duration(self.step_seconds)} per step, limited by {self.limit}")
        if self.unknown_loops:
            lines.append(f"  note          {self.unknown_loops} loop(s) of unknown length counted once")
        if cost.uncounted:
            lines.append(f"  note          not counted: {', '.join(cost.uncounted)}")
        lines.append(
            f"  took          trace {self.trace_seconds:.2f} s, lower {self.lower_seconds:.2f} s, compile {self.compile_seconds:.2f} s"
        )
        return "\n".join(lines)


def analyse(program: Program, chip: Chip, *, mesh: Mesh | None = None) -> Analysis:
    """Compiles a program for the devices its shardings name, and reports what it needs.

    Args:
      program: What to compile.
      chip: What to hold it against; see `chip_of`.
      mesh: Put in context (`jax.set_mesh`) while tracing, for programs that write bare `jax.P`. If neither the arguments nor
        `in_shardings` say where they live, they are replicated over it. Static.

    Returns:
      The analysis. A program that does not fit the devices' memory is an answer (`fits` is False), not an error; other errors of
      tracing and compiling are raised.
    """
    options = {"in_shardings": program.in_shardings, "out_shardings": program.out_shardings}
    placed = [where for _, where in _placements(program) if where is not None]
    if mesh is not None and not placed:
        options["in_shardings"] = NamedSharding(mesh, jax.P())
    given = {name: value for name, value in options.items() if value is not None}
    jitted = jax.jit(program.fn, donate_argnums=program.donate_argnums, **given)
    compiled, error = None, None
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        start = time.perf_counter()
        traced = jitted.trace(*program.args)
        after_trace = time.perf_counter()
        lowered = traced.lower()
        after_lower = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as failure:
            if "RESOURCE_EXHAUSTED" not in str(failure):
                raise
            error = str(failure).splitlines()[0]
        after_compile = time.perf_counter()

    devices = _devices(placed, mesh)
    if compiled is not None:
        used, found = _memory_of(compiled), collectives(compiled.as_text() or "", domain=chip.domain)
    else:
        arguments = sum(_shard_bytes(x, where) for x, where in _placements(program))
        needed = _reported_need(error or "")
        used = Memory(arguments=arguments, outputs=0, aliased=0, temporaries=max(needed - arguments, 0), code=0)
        found = ()
    return Analysis(
        name=program.name,
        chip=chip,
        devices=len(devices),
        platform=devices[0].device_kind,
        memory=used,
        fits=error is None and used.peak <= chip.memory,
        cost=count_jaxpr(traced.jaxpr),
        collectives=found,
        trace_seconds=after_trace - start,
        lower_seconds=after_lower - after_trace,
        compile_seconds=after_compile - after_lower,
        error=error,
    )


def memory(fn: Callable[..., Any], *args: Any) -> Memory:
    """Compiles `fn` for the devices of its arguments (the current backend by default) and reports its memory; runs nothing.

    Args:
      fn: Any function of arrays, jitted or not; donation of a jitted function is respected.
      *args: Its arguments: arrays or `jax.ShapeDtypeStruct`s, in any tree.

    Returns:
      Bytes per device. `temporaries` is what grows with the length of a scan whose intermediate states are kept for the gradient.
    """
    jitted: Any = fn if hasattr(fn, "lower") else jax.jit(fn)
    return _memory_of(jitted.lower(*args).compile())


def _memory_of(compiled: Any) -> Memory:
    stats = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


def _placements(program: Program) -> list[tuple[Any, Any]]:
    """The arguments' leaves, each with the sharding that the program gives it or None."""
    leaves = jax.tree.leaves(program.args)
    if program.in_shardings is None:
        return [(x, getattr(x, "sharding", None)) for x in leaves]
    is_placement = lambda x: x is None or isinstance(x, jax.sharding.Sharding | jax.P)  # noqa: E731
    spread = jax.tree.map(lambda where, x: [where] * len(jax.tree.leaves(x)), program.in_shardings, program.args, is_leaf=is_placement)
    placements = jax.tree.leaves(spread, is_leaf=is_placement)
    return [(x, getattr(x, "sharding", None) if where is None else where) for x, where in zip(leaves, placements)]


def _devices(placed: list[Any], mesh: Mesh | None) -> list[Any]:
    if mesh is not None:
        return list(mesh.devices.flat)
    for where in placed:
        if isinstance(where, jax.sharding.Sharding):
            return sorted(where.device_set, key=lambda device: device.id)
    return jax.devices()[:1]


def _shard_bytes(x: Any, where: Any) -> int:
    shape = where.shard_shape(tuple(x.shape)) if isinstance(where, jax.sharding.Sharding) else x.shape
    return math.prod(shape) * x.dtype.itemsize


def _reported_need(error: str) -> int:
    """The total that the TPU compiler names when it runs out of memory, arguments included; 0 if it names none."""
    match = re.search(r"temporaries \(([\d.]+)([KMGT])\)|[Uu]sed ([\d.]+)([KMGT]) of", error)
    number, unit = (group for group in match.groups() if group) if match else ("0", "K")
    return int(float(number) * 1024 ** ("KMGT".index(unit) + 1))


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    for unit in units:
        if abs(value) < 0.9995 * base or unit == units[-1]:
            return f"{value:.3g} {unit}"
        value /= base
    raise AssertionError


def _size(num_bytes: float) -> str:
    return _scaled(num_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def _quantity(value: float) -> str:
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P", "E"))


def _duration(seconds: float) -> str:
    return _scaled(seconds * 1e6, 1000, ("us", "ms", "s"))
