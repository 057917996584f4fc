"""Collectives in the text of a compiled program, with the trip counts of the loops around them."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

__all__ = ["Collective", "collectives"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind in a program.

    Attributes:
      kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute" or "collective-broadcast".
      count: How many stand in the program.
      executed: How many times one device takes part in one, loops included.
      payload: Bytes per device: the result of each, the operand for a reduce-scatter, summed over the executions.
      sent: Bytes that one device sends, with the bandwidth-optimal ring for its group of n devices: 2 (n - 1) / n of the payload for an
        all-reduce, (n - 1) / n for all-gather, reduce-scatter and all-to-all, all of it for a permutation or a broadcast.
      sent_between_domains: The part of `sent` that must leave the domain where groups span several: sent / m if a domain holds m members
        of the group, which share what arrives; for an all-to-all, the share of the group that is elsewhere.
      group_sizes: The numbers n that occur.
      unknown_loops: Number of loops around one of them whose trip count is unknown; these count once.
    """

    kind: str
    count: int
    executed: int
    payload: int
    sent: int
    sent_between_domains: int
    group_sizes: tuple[int, ...]
    unknown_loops: int


_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_KIND_OF = {kind: kind for kind in _KINDS} | {f"{kind}-start": kind for kind in _KINDS} | {"ragged-all-to-all": "all-to-all"}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:[a-z]\d*)*)\[([\d,<=]*)\]")


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    root: bool
    type: str
    op: str
    rest: str  # operands and attributes

    def attribute(self, name: str) -> str:
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return match.group(1) if match else ""

    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])


class _Use(NamedTuple):
    kind: str
    where: str
    instruction: _Instruction
    times: int
    unknown_loops: int


_Module = dict[str, list[_Instruction]]


def collectives(hlo_text: str, *, domain: int | None = None) -> tuple[Collective, ...]:
    """Counts the collectives of a compiled program.

    Asynchronous pairs count once, also where the TPU compiler spreads one over several fusions; an all-reduce that is fused with the slice
    that follows it is a reduce-scatter. Of the branches of a conditional the one that sends most is taken.

    Args:
      hlo_text: `compiled.as_text()`.
      domain: Devices i and j are neighbours if i // domain == j // domain; None if all are. Static.

    Returns:
      One entry per kind that occurs, in a fixed order.
    """
    module, entry = _parse(hlo_text)
    num_devices = _num_devices(hlo_text)
    found = list(_walk(module, entry, 1, 0))
    return tuple(
        _summary(kind, [use for use in found if use.kind == kind], module, num_devices, domain)
        for kind in _KINDS
        if any(use.kind == kind for use in found)
    )


def _summary(kind: str, uses: list[_Use], module: _Module, num_devices: int, domain: int | None) -> Collective:
    payload = sent = between = 0
    sizes = set()
    for use in uses:
        size = _payload(module[use.where], use.instruction, kind) * use.times
        groups = _groups(use.instruction.rest, num_devices)
        share = _sent_share(kind, max(len(group) for group in groups))
        payload += size
        sent += round(size * share)
        between += round(size * share * _share_between(kind, groups, domain))
        sizes.add(num_devices if kind == "collective-permute" else len(groups[0]))
    return Collective(
        kind=kind,
        count=len({(use.where, use.instruction.name) for use in uses}),
        executed=sum(use.times for use in uses),
        payload=payload,
        sent=sent,
        sent_between_domains=between,
        group_sizes=tuple(sorted(sizes)),
        unknown_loops=max(use.unknown_loops for use in uses),
    )


def _parse(text: str) -> tuple[_Module, str]:
    module: _Module = {}
    entry, body = "", None
    for line in text.splitlines():
        if not line[:1].isspace():
            header = _HEADER.match(line)
            body = module.setdefault(header.group(2), []) if header else None
            entry = header.group(2) if header and header.group(1) else entry
        elif body is not None and (match := _INSTRUCTION.match(line)):
            root, name, type_, op, rest = match.groups()
            body.append(_Instruction(name, bool(root), type_, op, rest))
    return module, entry


def _num_devices(text: str) -> int:
    head = text.split("\n", 1)[0]
    lengths = [re.search(rf"{name}=(\d+)", head) for name in ("replica_count", "num_partitions")]
    return math.prod(int(match.group(1)) for match in lengths if match)


def _walk(module: _Module, where: str, times: int, unknown_loops: int) -> Iterator[_Use]:
    for instruction in module.get(where, ()):
        if instruction.op in _KIND_OF:
            yield _Use(_KIND_OF[instruction.op], where, instruction, times, unknown_loops)
        elif instruction.op == "while":
            trips = _trip_count(module, where, instruction)
            for called in ("body", "condition"):
                inside = times if trips is None else times * trips
                yield from _walk(module, instruction.attribute(called), inside, unknown_loops + (trips is None))
        elif instruction.op == "conditional":
            branches = [list(_walk(module, name, times, unknown_loops)) for name in _branches(instruction.rest)]
            yield from max(
                branches, key=lambda uses: sum(_payload(module[u.where], u.instruction, u.kind) * u.times for u in uses), default=()
            )
        elif instruction.op in ("fusion", "call", "async-start"):
            called = instruction.attribute("calls") or instruction.attribute("to_apply")
            role = _fusion_role(called, module.get(called, []))
            if role != "continuation":
                yield from (use._replace(kind=role or use.kind) for use in _walk(module, called, times, unknown_loops))


def _fusion_role(name: str, body: list[_Instruction]) -> str | None:
    """What a collective inside a TPU fusion stands for.

    An asynchronous collective is written into the fusion that starts it, those that compute meanwhile and the one that ends it; only the
    start counts. An all-reduce fused with the slice of its result is one reduce-scatter.
    """
    custom = " ".join(i.rest for i in body if i.op == "custom-call")
    if "AsyncCollectiveStart" in custom:
        return None
    if "AsyncCollectiveDone" in custom or name.startswith("async_collective_fusion"):
        return "continuation"
    if "all-reduce-scatter" in name:
        return "reduce-scatter"
    return None


def _branches(rest: str) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", rest)
    if listed:
        return re.findall(r"%?([\w.\-]+)", listed.group(1))
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)


def _trip_count(module: _Module, where: str, loop: _Instruction) -> int | None:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known.group(1))
    # The TPU compiler drops the annotation: read the bound from the condition `i < bound`, with `i` counted up by one from a constant.
    condition = module.get(loop.attribute("condition"), [])
    calls = [module.get(i.attribute("calls"), []) for i in condition if i.op == "fusion"]
    compares = [i for body in (condition, *calls) for i in body if i.op == "compare" and "direction=LT" in i.rest]
    bounds = [i for body in (condition, *calls) for i in body if i.op == "constant" and re.match(r"[su](32|64)\[\]", i.type)]
    scaled = any(i.op == "multiply" for body in (condition, *calls) for i in body)  # the constant is a factor, not the bound
    if len(compares) != 1 or len(bounds) != 1 or scaled:
        return None
    bound = int(bounds[0].rest.split(")")[0])
    indices = [re.search(r"index=(\d+)", i.rest) for i in condition if i.op == "get-tuple-element"]
    start = _initial(module[where], loop, int(indices[0].group(1))) if len(indices) == 1 and indices[0] else None
    return max(bound - (start or 0), 0)


def _initial(body: list[_Instruction], loop: _Instruction, index: int) -> int | None:
    """The constant that stands at `index` of the tuple given to a loop, None if it is not one."""
    by_name = {i.name: i for i in body}
    packed = by_name.get(loop.operands()[0]) if loop.operands() else None
    if packed is None or packed.op != "tuple" or index >= len(packed.operands()):
        return None
    value = by_name.get(packed.operands()[index])
    while value is not None and value.op in ("copy", "bitcast") and value.operands():
        value = by_name.get(value.operands()[0])
    digits = re.match(r"-?\d+", value.rest) if value is not None and value.op == "constant" else None
    return int(digits.group()) if digits else None


def _payload(body: list[_Instruction], instruction: _Instruction, kind: str) -> int:
    if kind == "reduce-scatter" and instruction.op != "all-reduce":  # (the fused form is written with the size of the operand)
        types = {i.name: i.type for i in body}
        return sum(_num_bytes(types.get(name, "")) for name in instruction.operands())
    elements = _elements(instruction.type)
    paired = instruction.op.endswith("-start") and len(elements) > 1 and (kind != "all-reduce" or elements[0].startswith("("))
    return _num_bytes(elements[1] if paired else instruction.type)  # (operands, results, ...)


def _elements(type_: str) -> list[str]:
    """The elements of a tuple type, or the type alone."""
    if not type_.startswith("("):
        return [type_]
    depth, start, elements = 0, 1, []
    for position, character in enumerate(type_):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or depth == 0:
            elements.append(re.sub(r"/\*.*?\*/", "", type_[start:position]).strip())
            start = position + 1
    return elements


def _num_bytes(type_: str) -> int:
    bits = 0
    for dtype, lengths in _SHAPE.findall(type_):
        bits += _bits(dtype) * math.prod(int(length.lstrip("<=")) for length in lengths.split(",") if length)
    return math.ceil(bits / 8)


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    match = re.match(r"(?:bf|[fsuc])(\d+)", dtype)  # f8e4m3fn and its like: the first number
    return int(match.group(1)) if match else 0


def _groups(rest: str, num_devices: int) -> list[list[int]]:
    """The groups of devices that a collective joins: written out, as a tiled iota, or as axes of a mesh; one group of all if none."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", rest)
    if listed:
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", listed.group(1))]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        shape, lengths, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
        ids = np.arange(math.prod(lengths or ())).reshape(lengths or ())
        return (ids if order is None else ids.transpose(order)).reshape(shape or (1, -1)).tolist()
    mesh = re.search(r"replica_groups=@?mesh\w*\[([^\]]*)\](?:, device_ids=\(([^)]*)\))? *\{([^}]*)\}", rest)
    if mesh:
        return _mesh_groups(*mesh.groups())
    return [list(range(num_devices))]


def _mesh_groups(axes: str, device_ids: str | None, joined: str) -> list[list[int]]:
    lengths = {name: int(length) for name, length in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = np.arange(math.prod(lengths.values()))
    listed = [int(i) for i in re.findall(r"\d+", device_ids or "")]
    if len(listed) == ids.size:
        ids = np.asarray(listed)
    # A joined axis may be a part of a mesh axis, 'x':(before)size: split every axis into (before, part, after).
    parts = {name: (int(before or 1), int(size or 0)) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", joined)}
    split: list[int] = []
    kept: list[int] = []
    moved: list[int] = []
    for name, length in lengths.items():
        before, size = parts.get(name, (length, 1))
        size = size or length
        for part, where in ((before, kept), (size, moved), (length // (before * size), kept)):
            where.append(len(split))
            split.append(part)
    ids = ids.reshape(split).transpose(kept + moved)
    return ids.reshape(-1, math.prod(split[i] for i in moved)).tolist()


def _sent_share(kind: str, n: int) -> float:
    if kind in ("collective-permute", "collective-broadcast"):
        return 1.0
    return (2.0 if kind == "all-reduce" else 1.0) * (n - 1) / n


def _share_between(kind: str, groups: list[list[int]], domain: int | None) -> float:
    """How much of what a device sends must leave its domain, in the group for which that is most."""
    if domain is None:
        return 0.0
    shares = [0.0]
    for group in groups:
        members = Counter(i // domain for i in group)
        if len(members) > 1:
            most = max(members.values())
            # To each of the n - 1 others the same; or once per domain, whose members share the work of receiving it.
            shares.append((len(group) - most) / (len(group) - 1) if kind == "all-to-all" else 1.0 / most)
    return max(shares)
