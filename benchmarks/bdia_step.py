"""Cost of BDIA against DDIM with the same network: BDIA is one evaluation a step as well (bar: time ratio <= 1.03), EDICT is two (>= 1.8).

python benchmarks/bdia_step.py [--repeats 15]
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from harness import alternate, environment, show

from janax.algorithms import bdia
from janax.models import dit, presets


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    config = presets.DIT_DIGITS
    params, network = dit.init(config, jax.random.key(0)), dit.noise_fn(config)
    z, labels = jax.random.normal(jax.random.key(1), (16, 8, 8, 1)), jnp.arange(16) % 10
    grid = bdia.vp_grid(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), arguments.steps)
    runs = {
        "DDIM": lambda p, z: bdia.ddim_sample(network, p, z, grid, cond=labels),
        "BDIA .96": lambda p, z: bdia.sample(network, p, z, grid, bdia.coefficients(grid, 0.96), cond=labels).z_i,
        "O-BELM": lambda p, z: bdia.sample(network, p, z, grid, bdia.belm_coefficients(grid), cond=labels).z_i,
        "EDICT": lambda p, z: bdia.edict_sample(network, p, z, grid, cond=labels).x,
    }
    compiled = {name: jax.jit(run).lower(params, z).compile() for name, run in runs.items()}
    rows = {}
    for name in ("BDIA .96", "O-BELM", "EDICT"):
        rows[f"{name} / DDIM"] = alternate(
            lambda name=name: compiled[name](params, z), lambda: compiled["DDIM"](params, z), repeats=arguments.repeats
        )
    show("bdia_step", rows)
    show("bdia_step", {"environment": environment(), "shapes": {"z": list(z.shape), "steps": arguments.steps, "dtype": "float32"}})


if __name__ == "__main__":
    main()
