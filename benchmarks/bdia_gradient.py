"""Gradients through a BDIA sampler by walking back against plain autodiff: relative error (bar 1e-5), temporaries (<= 1/10, and N = 200 within
1.2 x of N = 20), time (<= 1.5 x). Two networks: a three-layer MLP on 256 x 8 states, and a small DiT on 16 images.

    python benchmarks/bdia_gradient.py [--repeats 9]
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from harness import alternate, environment, show

from janax.algorithms import bdia
from janax.models import dit, presets


def mlp_problem(roughness: float = 0.3):
    """A random network; the rougher it is, the more the walk back amplifies rounding (a trained noise predictor is smoother than both)."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = [jax.random.normal(k, s) * s[0] ** -0.5 for k, s in zip(keys, ((8, 256), (256, 256), (256, 8)))]

    def network(params, z, t):
        h = jnp.tanh(z @ params[0] + t * 1e-3)
        return roughness * jnp.tanh(h @ params[1]) @ params[2]

    return network, params, jax.random.normal(jax.random.key(1), (256, 8))


def dit_problem():
    config = presets.DIT_DIGITS
    params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), dit.init(config, jax.random.key(0)))
    return dit.noise_fn(config), params, jax.random.normal(jax.random.key(1), (16, 8, 8, 1))


def gradient(network, params, z, steps, mode):
    grid = bdia.vp_grid(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2), steps)
    table = bdia.coefficients(grid, 1.0)
    loss = lambda p, z: jnp.mean(jnp.square(bdia.sample(network, p, z, grid, table, gradient=mode).z_i))  # noqa: E731
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, z).compile()


def measure(problem, repeats: int) -> dict[str, float]:
    network, params, z = problem()
    make = functools.partial(gradient, network, params, z)
    stored, walked = make(50, "autodiff"), make(50, "reversible")
    a, b = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(g(params, z))]) for g in (stored, walked))
    size = lambda g: g.memory_analysis().temp_size_in_bytes  # noqa: E731
    return alternate(lambda: walked(params, z), lambda: stored(params, z), repeats=repeats) | {
        "relative_error": float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)),
        "temporaries_mib": size(walked) / 2**20,
        "temporaries_stored_mib": size(stored) / 2**20,
        "temporaries_ratio": size(walked) / size(stored),
        "temporaries_200_over_20": size(make(200, "reversible")) / size(make(20, "reversible")),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    problems = {"mlp 256x8": mlp_problem, "rougher mlp": functools.partial(mlp_problem, 0.5), "DiT digits, 16 images": dit_problem}
    for name, problem in problems.items():
        show("bdia_gradient", {name: measure(problem, arguments.repeats)})
    show("bdia_gradient", {"environment": environment(), "steps": 50, "dtype": "float32"})


if __name__ == "__main__":
    main()
