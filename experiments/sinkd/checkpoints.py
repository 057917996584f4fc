"""The paper's scale: a published decoder learns from a larger one, on whatever mesh there is; compiled for a pod, or run on given weights.

The step is CE + 0.1 KL + w L_SD at the target positions, as in the official T0 code as it was meant: L_SD a sum over positions with w = 0.0008, one
transport problem per sequence. The shapes are GPT-Neo-2.7B's and GPT-Neo-125M's. The paper's other pair, T0-3B, is an encoder-decoder, which
`janax.models` does not have; its decoder's targets would be the same [b t v] logits.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from janax.algorithms import sinkd
from janax.experiments import text as texts
from janax.experiments import training
from janax.experiments.errors import UserError
from janax.experiments.session import Session
from janax.experiments.sinkd.config import Config
from janax.jaxlib_ext import aot, divergence, masking, sharding
from janax.models import loading, transformer

__all__ = ["GPT_NEO_2_7B", "GPT_NEO_125M", "loss_fn", "programs", "study"]

GPT_NEO_125M = transformer.TransformerConfig(
    vocab_size=50_257,
    max_length=2048,
    width=768,
    depth=12,
    heads=12,
    kv_heads=12,
    head_width=64,
    hidden=3072,
    norm="layer",
    activation="gelu_tanh",
    gated=False,
    out_bias=True,
    mlp_bias=True,
    tied=True,
    query_scale=1.0,
    positions="learned",
    window=256,
    sliding=(False, True) * 6,
)
"""GPT-Neo with 125 million parameters (doi:10.5281/zenodo.5297715); every other layer sees 256 tokens."""

GPT_NEO_2_7B = dataclasses.replace(
    GPT_NEO_125M, width=2560, depth=32, heads=20, kv_heads=20, head_width=128, hidden=10_240, sliding=(False, True) * 16
)
"""GPT-Neo with 2.7 billion parameters."""


class _Pair(NamedTuple):
    teacher: transformer.TransformerConfig
    student: transformer.TransformerConfig


def loss_fn(config: Config, pair: _Pair) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """loss(student params, batch, key, teacher params): a mean over target positions of CE + kl_weight KL, plus `objective.weight` L_SD.

    L_SD is the sum over the positions of a sequence (of the batch, if flat), a mean over sequences: no length and no batch changes the balance.
    """
    chosen, objective = config.checkpoints, config.objective

    def loss(params: Any, batch: Mapping[str, jax.Array], key: jax.Array, teacher: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        del key
        tokens, segments = batch["tokens"], batch["segment_ids"]
        targets, mask = tokens[:, 1:], batch["mask"][:, 1:]
        s = transformer.logits(pair.student, params, tokens, segments)[:, :-1]
        t = jax.lax.stop_gradient(transformer.logits(pair.teacher, teacher, tokens, segments)[:, :-1])
        here = jnp.arange(s.shape[-1], dtype=targets.dtype)[None, None] == targets[..., None]
        chosen_logits = jnp.sum(jnp.where(here, s, jnp.zeros_like(s)), axis=-1)
        cross_entropy = masking.masked_mean(jax.nn.logsumexp(s, axis=-1) - chosen_logits, mask)
        kl = masking.masked_mean(divergence.per_token("forward_kl", s, t, mask=mask), mask)
        moved, info = sinkd.sequence_loss(
            s,
            t,
            mask,
            layout=chosen.layout,
            temperature=objective.transport_temperature,
            epsilon=objective.epsilon,
            num_iters=objective.num_iters,
            scale="paper_sum",
        )
        if chosen.layout == "per_sequence":
            moved = moved / len(tokens)
        total = cross_entropy + chosen.kl_weight * kl + objective.weight * moved
        parts = {"cross_entropy": cross_entropy, "kl": kl, "sinkhorn": moved, "diagonal": info.diagonal}
        return total, parts | {"weight": jnp.sum(mask.astype(jnp.float32))}

    return loss


def _numerics(config: Config, shape: transformer.TransformerConfig, *, trained: bool) -> transformer.TransformerConfig:
    return dataclasses.replace(shape, dtype=config.checkpoints.dtype, remat="full" if trained else "none", scan_layers=True)


def programs(config: Config, devices: Any) -> Iterable[aot.Program]:
    """One training step of the student, parameters of both models and moments sharded over the mesh, the batch over its `data` axis."""
    mesh = training.make_mesh(config.mesh, devices)
    pair = _Pair(_numerics(config, GPT_NEO_2_7B, trained=False), _numerics(config, GPT_NEO_125M, trained=True))
    loss = loss_fn(config, pair)
    size = (config.train.batch_size, config.checkpoints.sequence_length)
    batch = {
        "tokens": jax.ShapeDtypeStruct(size, jnp.int32),
        "segment_ids": jax.ShapeDtypeStruct(size, jnp.int32),
        "mask": jax.ShapeDtypeStruct(size, jnp.bool_),
    }
    teacher = jax.eval_shape(lambda key: transformer.init(pair.teacher, key), jax.eval_shape(jax.random.key, 0))
    teacher = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(pair.teacher.dtype)), teacher)
    optimizer = training.make_optimizer(config.optimizer, num_steps=config.train.num_steps, mask=_decays)
    init = functools.partial(transformer.init, pair.student)
    rules = transformer.SHARDING_RULES
    name = f"distillation step (GPT-Neo-2.7B to GPT-Neo-125M, {size[0]} x {size[1]} tokens)"

    def with_teacher(parameters: Any) -> training.LossFn:
        return lambda params, batch, key: loss(params, batch, key, parameters)

    shown = training.train_program(name, with_teacher(teacher), init, batch, optimizer, config.train, mesh=mesh, rules=rules)

    def step(state: Any, batch: Any, parameters: Any) -> Any:
        inner = training.make_train_step(with_teacher(parameters), optimizer, accumulation=config.train.accumulation)
        return inner(state, batch)

    assert isinstance(shown.in_shardings, tuple)
    where = (*shown.in_shardings, sharding.shardings(teacher, rules, mesh))
    yield aot.Program(
        name, step, (*shown.args, teacher), in_shardings=where, out_shardings=shown.out_shardings, donate_argnums=shown.donate_argnums
    )


def _decays(params: Any) -> Any:
    """Weight decay for kernels and the embedding, not for norms, biases or positions."""
    return jax.tree_util.tree_map_with_path(lambda path, _: sharding.path_string(path).rsplit("/", 1)[-1] in ("kernel", "table"), params)


def study(config: Config, session: Session) -> dict[str, Any]:
    """Distils one checkpoint into another on the given text and returns held-out losses: "teacher", "before", "after", in nats per token."""
    chosen = config.checkpoints
    for field in ("teacher", "student", "path"):
        if not getattr(chosen, field):
            raise UserError(
                f"checkpoints.{field} must be given to distil at the paper's scale: teacher and student are directories in Hugging Face "
                "layout with the same tokenizer, path is a .jsonl file; without them, `janax compile sinkd` shows that the step fits, and "
                "`janax run sinkd` is the laptop-sized study"
            )
    mesh = training.make_mesh(config.mesh)
    place = lambda tree: sharding.shardings(tree, transformer.SHARDING_RULES, mesh)  # noqa: E731
    models = {}
    for field in ("teacher", "student"):
        try:
            models[field] = loading.load(getattr(chosen, field), shardings=place)
        except ValueError as error:
            raise UserError(f"checkpoints.{field}: {error}") from error
    tokenizer = models["student"].tokenizer
    if tokenizer is None or models["teacher"].config.vocab_size != models["student"].config.vocab_size:
        raise UserError("checkpoints.student needs a tokenizer.json beside its weights, and the teacher's vocabulary")
    pair = _Pair(*(_numerics(config, models[name].config, trained=name == "student") for name in ("teacher", "student")))
    if chosen.sequence_length > min(shape.max_length for shape in pair):
        raise UserError(
            f"checkpoints.sequence_length must be at most {min(shape.max_length for shape in pair)}, got {chosen.sequence_length}"
        )

    def encode(piece: str) -> list[int]:
        return tokenizer.encode(piece, add_special_tokens=False)

    end = tokenizer.eos_token_id
    rows = texts.pack(texts.read_documents(Path(chosen.path)), encode, 0 if end is None else end, chosen.sequence_length)
    order = np.random.default_rng(0).permutation(len(rows.tokens))
    held_out = max(config.train.batch_size, len(order) // 20)
    if len(order) < held_out + config.train.batch_size:
        raise UserError(f"checkpoints.path fills {len(order)} rows, fewer than two batches of train.batch_size {config.train.batch_size}")
    parts = {"train": order[held_out:], "held_out": order[:held_out]}
    split = {part: texts.Rows(*(x[chosen_rows] for x in rows)) for part, chosen_rows in parts.items()}
    teacher = models["teacher"].params
    loss = loss_fn(config, pair)
    start = jax.tree.map(lambda x: x.astype(jnp.float32), models["student"].params)
    state = training.fit(
        lambda params, batch, key, frozen: loss(params, batch, key, frozen["teacher"]),
        lambda key, frozen: frozen["student"],
        texts.batches(split["train"], config.train.batch_size, config.train.seed),
        training.make_optimizer(config.optimizer, num_steps=config.train.num_steps, mask=_decays),
        config.train,
        mesh=mesh,
        frozen={"teacher": teacher, "student": start},
        rules=transformer.SHARDING_RULES,
        session=session,
        name="student",
    )
    kept = {
        "teacher": (pair.teacher, teacher),
        "before": (pair.student, start),
        "after": (pair.student, training.ema_or_params(state)),
    }

    def losses() -> dict[str, float]:
        return {name: _held_out(shape, params, split["held_out"], mesh, config) for name, (shape, params) in kept.items()}

    return session.memo("checkpoints", losses)


def _held_out(shape: transformer.TransformerConfig, params: Any, rows: texts.Rows, mesh: Any, config: Config) -> float:
    """Nats per counted token over whole batches."""

    @jax.jit
    def total(params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        z = transformer.logits(shape, params, batch["tokens"], batch["segment_ids"])[:, :-1]
        here = jnp.arange(z.shape[-1], dtype=jnp.int32)[None, None] == batch["tokens"][:, 1:, None]
        each = jax.nn.logsumexp(z, axis=-1) - jnp.sum(jnp.where(here, z, jnp.zeros_like(z)), axis=-1)
        mask = batch["mask"][:, 1:].astype(jnp.float32)
        return jnp.sum(each * mask), jnp.sum(mask)

    batches = texts.batches(rows, config.train.batch_size, 0)
    where = jax.sharding.NamedSharding(mesh, sharding.batch_spec(mesh))
    sums = np.zeros(2)
    with jax.set_mesh(mesh):
        for i in range(len(rows.tokens) // config.train.batch_size):
            batch = batches(i)
            sums += [float(x) for x in total(params, sharding.place(batch, jax.tree.map(lambda _: where, batch)))]
    return float(sums[0] / max(sums[1], 1.0))
