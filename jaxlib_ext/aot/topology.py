"""Chips and topologies: devices that are not there, and what their makers say about them."""

import dataclasses
import functools
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

__all__ = ["Chip", "chip_of", "topology_devices"]

_EXAMPLES = "'v4:2x2x4', 'v5e:16x16', 'v5p:4x4x4', 'v6e:8x8', 'h100:1x8' (hosts x GPUs per host)"
_NAME = re.compile(r"(v4|v5p):([1-9]\d*)x([1-9]\d*)x([1-9]\d*)|(v5e|v6e):([1-9]\d*)x([1-9]\d*)|(h100):([1-9]\d*)x([1-8])")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What one chip can hold and do at most.

    Attributes:
      name: Short name, as in topology names.
      memory: Bytes of device memory (HBM).
      memory_bandwidth: Bytes per second between chip and HBM.
      flops_bf16: FLOP/s of matrix products of 16-bit inputs, dense.
      flops_f32: FLOP/s of matrix products of float32 inputs at JAX's default precision: one bfloat16 pass on TPU, TF32 on H100.
      flops_f32_highest: The same at `precision="highest"`: six bfloat16 passes on TPU, float32 outside the tensor cores on H100.
      interconnect: Bytes per second that one chip can send over all its links at once (ICI, NVLink); half of the bidirectional figure.
      domain: Number of neighbouring devices that the interconnect joins; None means all of the topology.
      network: Bytes per second per chip between domains; None where there is one domain.
    """

    name: str
    memory: int
    memory_bandwidth: float
    flops_bf16: float
    flops_f32: float
    flops_f32_highest: float
    interconnect: float
    domain: int | None = None
    network: float | None = None


def _tpu(name: str, memory_gib: int, memory_gbps: float, tflops: float, interconnect_gbps: float) -> Chip:
    return Chip(
        name=name,
        memory=memory_gib << 30,
        memory_bandwidth=memory_gbps * 1e9,
        flops_bf16=tflops * 1e12,
        flops_f32=tflops * 1e12,
        flops_f32_highest=tflops * 1e12 / 6,
        interconnect=interconnect_gbps * 1e9,
    )


# TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "key specifications": HBM capacity and bandwidth, peak bf16 compute, and half of the
# bidirectional interconnect bandwidth per chip (v4: 2400 Gbit/s one way; v5e 400, v5p 1200, v6e 800 GB/s both ways).
# H100 SXM: nvidia.com/en-us/data-center/h100, figures without sparsity: 80 GB, 3.35 TB/s, bf16 989.4, TF32 494.7, float32 66.9 TFLOP/s,
# NVLink 900 GB/s both ways; DGX H100 data sheet: one 400 Gbit/s network port per GPU, eight GPUs on one NVLink switch.
_CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 32, 1228, 275, 300),
        _tpu("v5e", 16, 819, 197, 200),
        _tpu("v5p", 95, 2765, 459, 600),
        _tpu("v6e", 32, 1638, 918, 400),
        Chip(
            name="h100",
            memory=80 * 10**9,
            memory_bandwidth=3.35e12,
            flops_bf16=989.4e12,
            flops_f32=494.7e12,
            flops_f32_highest=66.9e12,
            interconnect=450e9,
            domain=8,
            network=50e9,
        ),
    )
}

# The compiler's description of an H100 SXM 80 GB (xla.GpuTargetConfigProto): the limits of compute capability 9.0 in NVIDIA's CUDA
# programming guide, 132 multiprocessors, 50 MiB of L2, and the memory that the driver leaves to programs.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  memory_bandwidth: 3352000000000
  device_memory_size: 84900000000
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def _parse(function: str, name: str) -> tuple[str, tuple[int, ...]]:
    match = _NAME.fullmatch(name.strip().lower())
    if match is None:
        raise ValueError(f"{function}: unknown topology {name!r}, expected a chip and a shape such as {_EXAMPLES}")
    kind, *lengths = (group for group in match.groups() if group is not None)
    return kind, tuple(int(length) for length in lengths)


def chip_of(name: str) -> Chip:
    """The chip of a topology.

    Args:
      name: As for `topology_devices`.

    Returns:
      Its vendor's figures. For H100 the NVLink domain is the host.

    Raises:
      ValueError: if the name is not understood.
    """
    kind, lengths = _parse("chip_of", name)
    chip = _CHIPS[kind]
    return chip if chip.domain is None else dataclasses.replace(chip, domain=lengths[-1])


def topology_devices(name: str) -> list[Any]:
    """Devices to build a mesh of and to compile for, without the hardware.

    Args:
      name: A chip and the shape of its slice: "v4:2x2x4", "v5e:16x16", "v5p:4x4x4", "v6e:8x8" in chips along each axis of the torus, or
        "h100:2x8" in hosts and GPUs per host. A single chip is "v5e:1x1", "v5p:1x1x1", "h100:1x1".

    Returns:
      One device per chip (v4 and v5p join their two cores), in the topology's order. The same objects on every call.

    Raises:
      ValueError: if the name is not understood, or the compiler does not know such a slice.
      RuntimeError: if the compiler for that platform is not installed.
    """
    kind, lengths = _parse("topology_devices", name)
    return list((_gpus if kind == "h100" else _tpus)(kind, lengths))


@functools.cache
def _tpus(kind: str, lengths: tuple[int, ...]) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(f"topology_devices: compiling for {kind} needs the TPU compiler; install the extra `janax[tpu]`")
    # The one place in this folder that touches the environment, because libtpu reads it when it is loaded. The first keeps it from asking a
    # cloud metadata server. Where this process has renounced the TPU, several processes may compile at once (libtpu otherwise keeps a lock
    # on the hardware it does not use), and libtpu need not complain that there is none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    if getattr(jax.config, "jax_platforms", None) == "cpu":
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_LOG_DIR", "disabled")
    shape = "x".join(str(length) for length in lengths)
    options: dict[str, Any] = {
        # The default, 2x2x1 chips on a host, does not divide a single chip or a row of chips.
        "chips_per_host_bounds": (*(2 if length % 2 == 0 else 1 for length in lengths[:2]), 1),
    }
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip; otherwise each core is a device with half of the memory
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if "INVALID_ARGUMENT" in reason:
            raise ValueError(f"topology_devices: the TPU compiler knows no slice '{kind}:{shape}' ({reason})") from error
        if "lockfile" in reason:
            raise RuntimeError("topology_devices: another process uses libtpu; set JAX_PLATFORMS=cpu to compile beside it") from error
        raise


@functools.cache
def _gpus(kind: str, lengths: tuple[int, ...]) -> tuple[Any, ...]:
    if not any(_installed(f"jax_plugins.xla_cuda{version}") for version in (12, 13)):
        raise RuntimeError(f"topology_devices: compiling for {kind} needs the CUDA compiler: install the extra `janax[aot-gpu]`")
    hosts, gpus = lengths
    shape = f"{hosts}x1x{gpus}"  # NVLink domains x hosts in each x GPUs per host
    try:
        return tuple(topologies.get_topology_desc(platform="cuda", topology_name=kind, topology=shape, target_config=_H100).devices)
    except NotImplementedError as error:  # the plug-in withdraws when it finds no driver or no CUDA libraries
        raise RuntimeError("topology_devices: the CUDA compiler found no GPU; set JAX_PLATFORMS=cpu to compile without one") from error


def _installed(module: str) -> bool:
    parent, _, _ = module.rpartition(".")
    return importlib.util.find_spec(parent) is not None and importlib.util.find_spec(module) is not None
