"""The paper's scale as programs for a pod: features of many proteins by a large encoder with the statistics of the fit, and designs through it."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from janax.algorithms import bib
from janax.experiments import training
from janax.experiments.bib.config import Config
from janax.jaxlib_ext import aot, ridge, sharding
from janax.models import encoder, sequence

__all__ = ["programs"]

_MODELS = {"esm2-650m": sequence.ESM2_650M, "protbert": sequence.PROTBERT}


def programs(config: Config, devices: Any) -> Iterable[aot.Program]:
    """Features and statistics of all offline sequences, and all steps of all designs; rows and designs over the mesh axis `data`.

    In float32, which TPUs have: the fit then wants a relative ridge of 1e-3 or more, or the solve on the host in float64.
    """
    paper, mesh = config.paper, training.make_mesh(config.mesh, devices)
    model = _MODELS[paper.encoder]
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, dtype=paper.dtype, remat="full", pooler=False))
    params = jax.eval_shape(lambda key: _cast(encoder.init(model.config, key), paper.dtype), jax.random.key(0))
    where = jax.tree.map(functools.partial(_whole_on_data, mesh), sharding.specs(params, encoder.SHARDING_RULES, mesh), is_leaf=_is_spec)
    rows, whole = jax.sharding.NamedSharding(mesh, sharding.batch_spec(mesh)), jax.sharding.NamedSharding(mesh, jax.P())
    num_blocks = -(-paper.num_rows // paper.batch_size)
    blocks = (num_blocks, paper.batch_size)
    block_rows = jax.sharding.NamedSharding(mesh, jax.P(None, *sharding.batch_spec(mesh)))
    letters, values = jax.ShapeDtypeStruct((*blocks, paper.length), jnp.int32), jax.ShapeDtypeStruct(blocks, jnp.float32)
    yield aot.Program(
        f"features and statistics ({paper.encoder}, {paper.num_rows} x {paper.length} residues, {paper.batch_size} at a time)",
        functools.partial(_statistics, model),
        (params, letters, values, values),
        in_shardings=(where, block_rows, block_rows, block_rows),
        out_shardings=whole,
    )
    width, v = model.config.width, len(model.alphabet.letters)
    number: Any = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    matrix, vector, scalar = number((width, width)), number((width,)), number(())
    scale = bib.Scale(scalar, scalar)
    proxy = bib.Proxy(ridge.Fit(vector, scalar, matrix), ridge.Gram(matrix, vector, scalar, scalar), scale, scalar)
    heads = bib.Heads(number((5, width)), number((5,)), scale)
    yield aot.Program(
        f"{paper.num_designs} designs x {paper.num_steps} steps ({paper.encoder}, {paper.length} residues, Adaptive-gamma and -eta)",
        functools.partial(_designs, model, paper.num_steps),
        (params, proxy, heads, number((paper.num_designs, paper.length, v))),
        in_shardings=(where, whole, whole, rows),
        out_shardings=rows,
    )


def _is_spec(x: Any) -> bool:
    return isinstance(x, jax.P)


def _whole_on_data(mesh: jax.sharding.Mesh, spec: jax.P) -> jax.sharding.NamedSharding:
    """Weights that never change are not split over `data`: to gather them in every step would cost more than to keep them."""
    return jax.sharding.NamedSharding(mesh, jax.P(*(None if axis == "data" else axis for axis in spec)))


def _cast(params: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), params)


def _statistics(model: sequence.SequenceModel, params: Any, letters: jax.Array, scores: jax.Array, weights: jax.Array) -> ridge.Gram:
    """Statistics of standardised scores over blocks of sequences; rows of padding have weight 0."""

    def add(total: Any, block: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, None]:
        tokens, y, v = block
        part = ridge.gram(sequence.features(model, params, tokens), y, v)
        sums = (part.gram * part.count, part.cross * part.count, part.const * part.count, part.count)
        return jax.tree.map(jnp.add, total, sums), None

    width = model.config.width
    zeros = (jnp.zeros((width, width)), jnp.zeros(width), jnp.zeros(()), jnp.zeros(()))
    (gram, cross, const, count), _ = jax.lax.scan(add, zeros, (letters, scores, weights))
    return ridge.Gram(gram / count, cross / count, const / count, count)


def _designs(model: sequence.SequenceModel, num_steps: int, params: Any, proxy: bib.Proxy, heads: bib.Heads, z: jax.Array) -> jax.Array:
    objectives = bib.Objectives(
        functools.partial(bib.forward_loss, proxy),
        functools.partial(bib.backward_loss, proxy),
        functools.partial(bib.head_value, heads),
    )

    def features(z: jax.Array) -> jax.Array:
        return sequence.features(model, params, bib.relax_tokens(z))

    return jax.vmap(lambda z: bib.design(z, features, objectives, num_steps=num_steps, eta_rule="frozen").tokens)(z)
