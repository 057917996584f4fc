"""The paper's scale: DiT on 32x32x4 latents, guided, 50 steps, batch 256, on whatever mesh there is.

`programs` compiles sampling, encode + decode and a training step for a pod that is not there; `study` runs the samplers on real weights.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janax.algorithms import bdia
from janax.experiments import plots, training
from janax.experiments.bdia import digits
from janax.experiments.bdia.config import Config, LatentsConfig
from janax.experiments.config import MeshConfig
from janax.experiments.errors import UserError
from janax.experiments.session import Session
from janax.jaxlib_ext import aot, sharding
from janax.models import dit, loading, presets

__all__ = ["imagenet_alphas_cumprod", "programs", "study"]

_REPLICATED: sharding.Rules = ((r".*", jax.P()),)


def imagenet_alphas_cumprod() -> np.ndarray:
    """[1000] DiT's linear schedule, beta from 1e-4 to 0.02."""
    return np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))


def _shape(config: LatentsConfig) -> dit.DiTConfig:
    base = presets.DIT_XL_2 if config.network == "xl" else presets.DIT_S_2
    return dataclasses.replace(base, dtype=config.dtype, scan_layers=True)


class _Runs:
    """sample, encode and decode of every method, as functions of (params, state, labels)."""

    def __init__(self, config: LatentsConfig, shape: dit.DiTConfig):
        grid = bdia.vp_grid(imagenet_alphas_cumprod(), config.num_steps)
        f = bdia.guided(dit.noise_fn(shape))

        def condition(labels: jax.Array) -> bdia.Guidance:
            return bdia.Guidance(labels, jnp.full_like(labels, shape.null_class), config.guidance)

        def two_step(table: bdia.BdiaCoeffs) -> dict[str, Callable[..., Any]]:
            return {
                "sample": lambda p, z, c: bdia.sample(f, p, z, grid, table, cond=condition(c)),
                "encode": lambda p, x, c: bdia.encode(f, p, x, grid, table, cond=condition(c)),
                "decode": lambda p, s, c: bdia.decode(f, p, s, grid, table, cond=condition(c)),
            }

        self.methods: dict[str, dict[str, Callable[..., Any]]] = {
            "DDIM": {
                "sample": lambda p, z, c: bdia.ddim_sample(f, p, z, grid, cond=condition(c)),
                "encode": lambda p, x, c: bdia.ddim_invert(f, p, x, grid, cond=condition(c)),
                "decode": lambda p, s, c: bdia.ddim_sample(f, p, s, grid, cond=condition(c)),
            },
            "BDIA": two_step(bdia.coefficients(grid, config.gamma)),
            "O-BELM": two_step(bdia.belm_coefficients(grid)),
            "EDICT .93": {
                "sample": lambda p, z, c: bdia.edict_sample(f, p, z, grid, cond=condition(c)),
                "encode": lambda p, x, c: bdia.edict_encode(f, p, x, grid, cond=condition(c)),
                "decode": lambda p, s, c: bdia.edict_decode(f, p, s, grid, cond=condition(c)),
            },
        }


def programs(config: Config, devices: Any) -> Iterable[aot.Program]:
    """Guided sampling, a round trip and a training step over the mesh of these devices.

    Inference keeps whole parameters on every device and spreads the batch over all of them: no step needs communication. Training shards
    parameters, moments and average over the configured mesh.
    """
    latents, shape = config.latents, _shape(config.latents)
    mesh = training.make_mesh(MeshConfig(), devices)
    batch = latents.batch_size
    size = (batch, shape.image_size, shape.image_size, shape.channels)
    params = jax.eval_shape(functools.partial(dit.init, shape), jax.eval_shape(jax.random.key, 0))
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(latents.dtype)), params)
    rows = jax.sharding.NamedSharding(mesh, sharding.batch_spec(mesh))
    where = (sharding.shardings(half, _REPLICATED, mesh), rows, rows)
    arguments = (half, jax.ShapeDtypeStruct(size, jnp.float32), jax.ShapeDtypeStruct((batch,), jnp.int32))
    method = _Runs(latents, shape).methods["BDIA"]

    def round_trip(p: Any, x: jax.Array, c: jax.Array) -> Any:
        return method["decode"](p, method["encode"](p, x, c), c)

    label = f"{shape.width}x{shape.depth} DiT, {batch} images, {latents.num_steps} steps"
    yield aot.Program(f"sample ({label})", method["sample"], arguments, in_shardings=where, out_shardings=rows)
    yield aot.Program(f"encode + decode ({label})", round_trip, arguments, in_shardings=where, out_shardings=rows)
    train_shape = dataclasses.replace(shape, remat="full")
    network = digits.Network(
        functools.partial(dit.init, train_shape), dit.noise_fn(train_shape), train_shape.null_class, dit.SHARDING_RULES
    )
    yield training.train_program(
        f"training step ({shape.width}x{shape.depth} DiT, {config.train.batch_size} images)",
        digits.loss_fn(network, imagenet_alphas_cumprod(), label_drop=0.1),
        network.init,
        {
            "image": jax.ShapeDtypeStruct((config.train.batch_size, *size[1:]), jnp.float32),
            "label": jax.ShapeDtypeStruct((config.train.batch_size,), jnp.int32),
        },
        training.make_optimizer(config.optimizer, num_steps=config.train.num_steps),
        config.train,
        mesh=training.make_mesh(config.mesh, devices),
        rules=dit.SHARDING_RULES,
        example_keys=True,
    )


def study(config: Config, session: Session) -> dict[str, Any]:
    """Samples one batch of latents per method from real weights, inverts it, and measures round trips and seconds per batch."""
    if not config.latents.weights:
        raise UserError(
            "latents.weights must name a directory with DiT weights (diffusers' DiTTransformer2DModel layout) to run this study; "
            "without weights, `janax compile bdia --preset paper` shows that it fits, and `janax run bdia` is the laptop-sized study"
        )
    mesh = training.make_mesh(MeshConfig())

    def place(params: Any) -> Any:
        return sharding.shardings(params, _REPLICATED, mesh)

    try:
        shape, params = loading.load_dit(config.latents.weights, shardings=place)
    except ValueError as error:
        raise UserError(f"latents.weights: {error}") from error
    shape = dataclasses.replace(shape, dtype=config.latents.dtype, scan_layers=True)
    batch = config.latents.batch_size
    rows = jax.sharding.NamedSharding(mesh, sharding.batch_spec(mesh))
    size = (batch, shape.image_size, shape.image_size, shape.channels)
    z = jax.jit(lambda key: jax.random.normal(key, size), out_shardings=rows)(jax.random.key(config.train.seed))
    labels = sharding.place(np.arange(batch, dtype=np.int32) % shape.num_classes, rows)
    found: dict[str, Any] = {}
    methods = _Runs(config.latents, shape).methods
    for name in session.track(list(methods), "latents"):

        def measure(name: str = name) -> dict[str, float]:
            run = {direction: jax.jit(fn) for direction, fn in methods[name].items()}
            with jax.set_mesh(mesh):
                images = _outer(run["sample"](params, z, labels))
                start = time.perf_counter()
                jax.block_until_ready(run["sample"](params, z, labels))
                seconds = time.perf_counter() - start
                encoded = run["encode"](params, images, labels)
                again = _outer(run["decode"](params, encoded, labels))
            latent = encoded.z_ip1 if isinstance(encoded, bdia.BdiaState) else jax.tree.leaves(encoded)[0]
            if name == "BDIA":
                shown = np.asarray(sharding.fetch(images[:16, ..., :3]), np.float32)
                plots.image_grid(session.figure_path("latents.png"), shown, limits=(-2.5, 2.5))
            return {
                "seconds": seconds,
                "mse": float(jnp.mean((again - images) ** 2)),
                "latent_rms": float(jnp.sqrt(jnp.mean(latent**2))),
            }

        found[name] = session.memo(f"latents-{name}", measure)
    return found


def _outer(state: Any) -> jax.Array:
    return state if isinstance(state, jax.Array) else state[0]
