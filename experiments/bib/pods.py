"""The paper's scale: features of many proteins by a large encoder, the fit, and designs through it; as programs for a pod, or run from weights."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janax.algorithms import bib
from janax.experiments import training
from janax.experiments.bib import tasks
from janax.experiments.bib.config import Config
from janax.experiments.errors import UserError
from janax.experiments.session import Session
from janax.jaxlib_ext import aot, ridge, sharding
from janax.models import encoder, sequence

__all__ = ["programs", "study"]

_RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
_MODELS = {"esm2-650m": sequence.ESM2_650M, "protbert": sequence.PROTBERT}


def programs(config: Config, devices: Any) -> Iterable[aot.Program]:
    """Features and statistics of all offline sequences, and all steps of all designs; rows and designs over the mesh axis `data`.

    In float32, which TPUs have: the fit then wants a relative ridge of 1e-3 or more, or the solve on the host in float64.
    """
    paper, mesh = config.paper, training.make_mesh(config.mesh, devices)
    model = _MODELS[paper.encoder]
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, dtype=paper.dtype, remat="full", pooler=False))
    params = jax.eval_shape(lambda key: _cast(encoder.init(model.config, key), paper.dtype), jax.random.key(0))
    where = sharding.shardings(params, encoder.SHARDING_RULES, mesh, whole=("data",))
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


def study(config: Config, session: Session) -> dict[str, Any]:
    """Fit and designs from the weights in `paper.weights`, over the mesh: figures of the fit, and of the designs as the fit sees them.

    There is no oracle of a protein that was not measured, so nothing is said of the designs' true scores.

    Raises:
      UserError: without weights.
    """
    if not config.paper.weights:
        raise UserError("paper.weights must be a directory of the encoder to run; `janax compile bib` needs none")
    return session.memo("paper", functools.partial(_study, config, session))


def _study(config: Config, session: Session) -> dict[str, Any]:
    paper, mesh = config.paper, training.make_mesh(config.mesh)
    library = tasks.protein(paper.protein, config.data_dir)  # type: ignore[arg-type]
    try:
        model, params = sequence.load(paper.weights, library.letters)
    except (OSError, ValueError) as error:
        raise UserError(f"paper.weights {paper.weights}: {error}") from error
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, dtype=paper.dtype))
    offline = tasks.lower_half(library)
    chosen = np.sort(np.random.default_rng(0).permutation(len(offline.scores))[: paper.num_rows])
    offline = offline._replace(tokens=offline.tokens[chosen], scores=offline.scores[chosen])
    count = min(paper.num_designs, len(chosen))
    starts = offline.tokens[tasks.starts(offline, count)]
    with jax.set_mesh(mesh):
        shards = mesh.shape["data"]
        whole, rows = jax.sharding.NamedSharding(mesh, jax.P()), jax.sharding.NamedSharding(mesh, sharding.batch_spec(mesh))
        params = sharding.place(params, jax.tree.map(lambda _: whole, params))
        features = jax.jit(functools.partial(sequence.features, model))

        def batches(x: np.ndarray, size: int) -> Iterable[tuple[Any, int]]:
            size = -(-size // shards) * shards
            for first in session.track(range(0, len(x), size), "paper"):
                part = x[first : first + size]
                yield sharding.place(np.resize(part, (size, *part.shape[1:])), rows), len(part)

        parts = [sharding.fetch(features(params, x))[:n] for x, n in batches(offline.tokens, paper.batch_size)]
        phi = np.concatenate(parts).astype(np.float64)
        with jax.enable_x64(True):
            y, _ = bib.standardise(offline.scores)
            errors = ridge.leave_one_out(phi, y, np.array(_RIDGES))
            rel_ridge = _RIDGES[int(errors.best)]
            proxy = jax.tree.map(np.asarray, bib.fit_proxy(phi, offline.scores, rel_ridge=rel_ridge))
            heads = jax.tree.map(np.asarray, bib.fit_heads(jax.random.key(0), phi, offline.scores))
            held_out = tasks.spearman(np.asarray(y - errors.residuals[errors.best]), np.asarray(y))
        # What the designs need is small, and of float32 as the features are.
        proxy, heads = (jax.tree.map(lambda x: np.asarray(x, np.float32), tree) for tree in (proxy, heads))
        design = jax.jit(functools.partial(_designs, model, paper.num_steps))
        draw = jax.vmap(lambda key, t: bib.init_logits(key, t, num_letters=len(library.letters)))
        z = np.asarray(draw(jax.random.split(jax.random.key(1), count), starts))
        designs = np.concatenate([sharding.fetch(design(params, proxy, heads, x))[:n] for x, n in batches(z, count)])
        predicted = np.concatenate([sharding.fetch(bib.predict(proxy, features(params, x)))[:n] for x, n in batches(designs, count)])
    predicted = predicted * float(proxy.scale.std) + float(proxy.scale.mean)
    return {
        "rows": len(chosen),
        "width": phi.shape[1],
        "rel_ridge": rel_ridge,
        "leave_one_out": held_out,
        "best_offline": float(offline.scores.max()),
        "predicted": float(np.median(predicted)),
        "distinct": len(np.unique(designs, axis=0)),
        "from_start": float(tasks.hamming(designs, starts).mean()),
        "to_training": float(tasks.nearest(designs, offline.tokens).mean()),
        "designs": tasks.strings(designs, library.letters),
    }
