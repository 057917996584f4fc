"""Sampling 16 images in 50 steps against diffusers + torch: the same weights, the same threads, the same DDIM levels (bar: time ratio <= 1).

Needs torch and diffusers beside janax (`pip install torch==2.13.0 diffusers`). Ours is BDIA, one network evaluation a step like their DDIM;
our DDIM is compared with theirs image by image first. Compile time is reported apart.

    python benchmarks/bdia_sampling.py [--size digits|s2|both] [--repeats 5] [--threads 2]
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads sleep at barriers instead of taking the cores from others

import jax
import jax.numpy as jnp
import numpy as np
from harness import alternate, environment, show

from janax.algorithms import bdia
from janax.models import dit, loading, presets


def measure(base: dit.DiTConfig, steps: int, repeats: int) -> dict[str, object]:
    """Our compiled BDIA sampler against the diffusers loop, after the two DDIMs have been compared."""
    import torch
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    config = base
    params = dit.init(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    with tempfile.TemporaryDirectory() as directory:
        loading.save_dit(directory, config, params)
        model = DiTTransformer2DModel.from_pretrained(directory).eval()
    size = (16, config.image_size, config.image_size, config.channels)
    z, labels = jax.random.normal(jax.random.key(1), size), jnp.arange(16) % config.num_classes
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(steps)
    start_torch, labels_torch = torch.from_numpy(np.array(z)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(np.array(labels)).long()

    def peer() -> np.ndarray:
        with torch.no_grad():
            x = start_torch
            for t in scheduler.timesteps:
                eps = model(x, timestep=t.expand(x.shape[0]), class_labels=labels_torch).sample
                x = scheduler.step(eps, t, x).prev_sample
            return x.permute(0, 2, 3, 1).numpy()

    grid = bdia.vp_grid(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), steps, "leading", 0, "first")
    network, table = dit.noise_fn(config), bdia.coefficients
    start = time.perf_counter()
    ours = jax.jit(lambda p, z: bdia.sample(network, p, z, grid, table(grid, 0.96), cond=labels).z_i).lower(params, z).compile()
    compile_seconds = time.perf_counter() - start
    ddim = jax.jit(lambda p, z: bdia.ddim_sample(network, p, z, grid, cond=labels))
    difference = float(np.max(np.abs(np.asarray(ddim(params, z)) - peer())))
    row: dict[str, object] = dict(alternate(lambda: ours(params, z), peer, repeats=repeats))
    return row | {"compile_seconds": compile_seconds, "largest_difference_of_ddim": difference, "shape": list(size), "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=("digits", "s2", "both"), default="both")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    try:
        import diffusers  # noqa: F401
        import torch
    except ImportError as error:
        print(f"skipped: {error.name} is not installed; pip install torch==2.13.0 diffusers", file=sys.stderr)
        return
    torch.set_num_threads(arguments.threads)
    for name, base in {"digits": presets.DIT_DIGITS, "s2": dataclasses.replace(presets.DIT_S_2, learn_sigma=False)}.items():
        if arguments.size in (name, "both"):
            row = measure(base, arguments.steps, arguments.repeats)
            show("bdia_sampling", {f"DiT {name}: BDIA (ours) / DDIM (diffusers)": row})
    show("bdia_sampling", {"environment": environment("torch", "diffusers"), "threads": arguments.threads, "dtype": "float32"})


if __name__ == "__main__":
    main()
