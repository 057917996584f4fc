"""The posterior view at the scale of a pod, as programs to compile: twisted SMC with a 7B decoder, and a step of f-DPG on its parameters."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from janax.algorithms import rl_bayes
from janax.experiments import training
from janax.experiments.decoders import decays
from janax.experiments.rl_bayes import steering
from janax.experiments.rl_bayes.config import Config
from janax.jaxlib_ext import aot, fused, sharding
from janax.models import presets, transformer

__all__ = ["loss_fn", "programs"]

_SHAPES = {"smollm2-135m": presets.SMOLLM2_135M, "qwen2.5-7b": presets.QWEN2_5_7B, "llama-3.1-8b": presets.LLAMA_3_1_8B}


def loss_fn(shape: transformer.TransformerConfig) -> training.LossFn:
    """f-DPG (JS, leave-one-out) on texts of the policy as it was: {"tokens", "mask" [n t], "log_target", "log_q" [n]; "log_z" [n], one number}."""

    def loss(params: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del key
        h = transformer.hidden(shape, params, batch["tokens"])[:, :-1]
        w = transformer.output_embedding(shape, params)
        each = fused.token_log_probs(h, w, batch["tokens"][:, 1:], softcap=shape.final_softcap, transposed=True)
        log_pi = jnp.sum(jnp.where(batch["mask"][:, 1:], each, 0.0), axis=1)
        options: dict[str, Any] = {"log_z": jnp.max(batch["log_z"]), "divergence": rl_bayes.JS, "baseline": "leave_one_out"}
        value, info = rl_bayes.fdpg_loss(log_pi, batch["log_target"], batch["log_q"], **options)
        return value, {"weight": jnp.ones(()), "dead": info.dead}

    return loss


def programs(config: Config, devices: Any) -> Iterable[aot.Program]:
    """Particles and texts over the mesh axis `data`; parameters over `model`, and over both where they train."""
    pod, mesh = config.pod, training.make_mesh(config.mesh, devices)
    shape = dataclasses.replace(_SHAPES[pod.shape], dtype="bfloat16", scan_layers=True, remat="none", attention="flash")
    params = jax.eval_shape(lambda: jax.tree.map(lambda x: x.astype(jnp.bfloat16), transformer.init(shape, jax.random.key(0))))
    where = sharding.shardings(params, transformer.SHARDING_RULES, mesh, whole=("data",))
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    number: Any = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    integer: Any = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    key = jax.eval_shape(jax.random.key, 0)
    yield aot.Program(
        f"twisted SMC ({pod.shape}, {pod.num_prompts} prompts x {pod.num_particles} particles x {pod.max_new_tokens} tokens)",
        functools.partial(steering.run, shape, pod.num_particles, pod.max_new_tokens),
        (params, key, integer((pod.num_prompts, pod.prompt_length)), integer((pod.num_prompts,)), number((shape.vocab_size,)), number(())),
        in_shardings=(where, *[whole] * 5),
        out_shardings=whole,
    )
    trained = dataclasses.replace(shape, remat="full")
    length = pod.prompt_length + pod.max_new_tokens
    rows = (config.train.batch_size,)
    batch = {
        "tokens": integer((*rows, length)),
        "mask": jax.ShapeDtypeStruct((*rows, length), jnp.bool_),
        "log_target": number(rows),
        "log_q": number(rows),
        "log_z": number(rows),
    }
    optimizer = training.make_optimizer(config.optimizer, num_steps=config.train.num_steps, mask=decays)
    yield training.train_program(
        f"f-DPG step ({pod.shape}, {rows[0]} texts x {length} tokens)",
        loss_fn(trained),
        functools.partial(transformer.init, trained),
        batch,
        optimizer,
        config.train,
        mesh=mesh,
        rules=transformer.SHARDING_RULES,
    )
