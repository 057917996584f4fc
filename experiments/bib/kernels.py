"""What features are worth: a ridge on a few thousand offline rows, and how it ranks all sequences, for five kinds of features."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janax.algorithms import bib
from janax.experiments.bib import pretraining, tasks
from janax.experiments.bib.config import Config
from janax.experiments.session import Session
from janax.jaxlib_ext import ntk, ridge
from janax.models import sequence

__all__ = ["KINDS", "study"]

KINDS = ("last layer", "tangent kernel", "random network, last layer", "random network, tangent kernel", "one-hot")
_PIECE = 64  # sequences whose parameter gradients are held at a time


def study(config: Config, session: Session, trained: pretraining.Trained) -> dict[str, Any]:
    """kind -> {"ridge": [..], "spearman": [..], "top_median": [..], "leave_one_out": [..], "chosen": the ridge that leave-one-out takes}."""
    offline, oracle = tasks.tfbind8("SIX6_REF_R1", config.kernels.split)
    rows = np.random.default_rng(0).permutation(len(offline.scores))[: config.kernels.num_rows]
    part = offline._replace(tokens=offline.tokens[rows], scores=offline.scores[rows])
    # All sequences would be 65,536 gradients of 76,000 parameters: a uniform sample, and the 300 best.
    everything = tasks.all_sequences(8)
    true = oracle(everything)
    sample = np.random.default_rng(1).permutation(len(everything))[:1500]
    best = np.argsort(-true, kind="stable")[:300]
    test = np.concatenate([sample, best])
    random = pretraining.Trained(trained.model, pretraining.initial_params(trained.model, jax.random.key(1)), {})
    networks = {"": trained, "random network, ": random}
    found: dict[str, Any] = {}
    for kind in session.track(KINDS, "features"):
        compute = functools.partial(_kind, config, kind, networks, part, everything[test], true[test], len(sample))
        found[kind] = session.memo(f"features-{KINDS.index(kind)}", compute, alone=True)
    return found


def _kind(
    config: Config, kind: str, networks: Any, part: tasks.Offline, test: np.ndarray, true: np.ndarray, uniform: int
) -> dict[str, Any]:
    tokens = np.concatenate([part.tokens, test])
    if kind == "one-hot":
        phi = np.eye(4)[tokens].reshape(len(tokens), -1)
    else:
        trained = networks["random network, " if kind.startswith("random") else ""]
        tangent = kind.endswith("tangent kernel")
        phi = _sketched(trained, tokens, config.kernels.num_features) if tangent else pretraining.all_features(trained, tokens)
    with jax.enable_x64(True):
        y, _ = bib.standardise(part.scores)
        fit = jax.jit(lambda phi, y, r: ridge.fit(phi, y, rel_ridge=r).weights)
        static, rest = phi[: len(y)], phi[len(y) :]
        ridges = np.asarray(config.kernels.ridges)
        errors = np.asarray(jax.jit(ridge.leave_one_out)(static, y, ridges).mean_squared)
        predictions = [rest @ np.asarray(fit(static, y, r)) for r in ridges]
    top = [np.median(true[np.argsort(-p, kind="stable")[:128]]) for p in predictions]
    return {
        "ridge": ridges.tolist(),
        "spearman": [tasks.spearman(p[:uniform], true[:uniform]) for p in predictions],
        "top_median": [float(x) for x in top],
        "leave_one_out": errors.tolist(),
        "chosen": float(ridges[int(np.argmin(errors))]),
    }


def _sketched(trained: pretraining.Trained, tokens: np.ndarray, num_features: int) -> np.ndarray:
    """[n k] float64: gradients of a linear head's output by all parameters, folded into k numbers.

    The head is the mean of the features: one at 0 would have no gradient below it.
    """

    def output(params: Any, letters: jax.Array) -> jax.Array:
        phi = sequence.features(trained.model, params["encoder"], letters)
        return phi @ params["head"]

    width = trained.model.config.width
    params = {"encoder": trained.params, "head": jax.random.normal(jax.random.key(2), (width,)) / np.sqrt(width)}
    rows = jax.jit(
        lambda letters: jax.lax.map(
            lambda one: ntk.sketch(output, params, one, jax.random.key(3), num_features=num_features), letters, batch_size=_PIECE
        )
    )
    return np.asarray(rows(jnp.asarray(tokens, jnp.int32)), np.float64)
