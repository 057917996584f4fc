"""Training on 1, 2, 4 and 8 simulated CPU devices, and the compiler's memory per chip from 4 to 256 chips at constant batch per device.

Simulated devices share the cores, so images per second measure the overhead of sharding, not a speed-up: the figure to watch is 8 devices
against 1 at the same global batch. Memory needs the `tpu` extra (bar: temporaries constant within 5 %).

    python benchmarks/training_throughput.py [--steps 20] [--topologies v5e:2x2 v5e:4x4 v5e:8x8 v5e:16x16]
"""

import argparse
import dataclasses
import functools
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from harness import environment, show

from janax.experiments import training
from janax.experiments.bdia import DEFAULT, digits, latents
from janax.experiments.config import MeshConfig
from janax.jaxlib_ext import aot
from janax.models import dit, presets


def throughput(devices: int, steps: int) -> float:
    """Images per second of the digits DiT, batch 64, data parallel."""
    shape = presets.DIT_DIGITS
    network = digits.Network(functools.partial(dit.init, shape), dit.noise_fn(shape), shape.null_class, dit.SHARDING_RULES)
    mesh = training.make_mesh(MeshConfig(), jax.devices()[:devices])
    optimizer = training.make_optimizer(DEFAULT.optimizer, num_steps=10_000)
    state, where = training.init_state(network.init, optimizer, jax.random.key(0), mesh=mesh)
    loss = digits.loss_fn(network, latents.imagenet_alphas_cumprod(), label_drop=0.1)
    step = training.make_train_step(loss, optimizer, example_keys=True)
    data = digits.load()
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    batch = jax.device_put({"image": data.train[:64], "label": data.train_labels[:64]}, rows)
    train = training.jit_train_step(step, where, jax.tree.map(lambda x: rows, batch), mesh)
    with jax.set_mesh(mesh):
        for _ in range(3):
            state, metrics = train(state, batch)
        jax.block_until_ready(metrics)
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = train(state, batch)
        jax.block_until_ready(metrics)
    return steps * 64 / (time.perf_counter() - start)


def memory(topology: str) -> dict[str, float]:
    """Temporaries per chip of a DiT-S/2 training step with four images per device, parameters replicated."""
    devices = aot.topology_devices(topology)
    shape = dataclasses.replace(presets.DIT_S_2, remat="full", dtype="bfloat16")
    network = digits.Network(functools.partial(dit.init, shape), dit.noise_fn(shape), shape.null_class, ())
    size = 4 * len(devices)
    program = training.train_program(
        "train",
        digits.loss_fn(network, latents.imagenet_alphas_cumprod(), label_drop=0.1),
        network.init,
        {
            "image": jax.ShapeDtypeStruct((size, 32, 32, 4), jnp.float32),
            "label": jax.ShapeDtypeStruct((size,), jnp.int32),
        },
        training.make_optimizer(DEFAULT.optimizer, num_steps=10_000),
        dataclasses.replace(DEFAULT.train, batch_size=size),
        mesh=training.make_mesh(MeshConfig(), devices),
        example_keys=True,
    )
    analysis = aot.analyse(program, aot.chip_of(topology))
    return {
        "chips": len(devices),
        "temporaries_mib": analysis.memory.temporaries / 2**20,
        "peak_mib": analysis.memory.peak / 2**20,
        "compile_seconds": analysis.compile_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--topologies", nargs="*", default=["v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16"])
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    rates = {n: [throughput(n, arguments.steps) for _ in range(3)] for n in (1, 2, 4, 8)}
    for n, values in rates.items():
        row = {"images_per_second": float(np.median(values)), "over_one_device": float(np.median(values) / np.median(rates[1]))}
        show("training_throughput", {f"{n} devices": row})
    for topology in arguments.topologies:
        show("training_memory", {topology: memory(topology)})
    show("training_throughput", {"environment": environment("libtpu")})


if __name__ == "__main__":
    main()
