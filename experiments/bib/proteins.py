"""Measured proteins: how well a ridge ranks held-out variants, by letters and by a masked language model, and designs under a stand-in oracle.

There is no exact oracle of a protein that was not measured. The stand-in is an ensemble of perceptrons on the letters, fitted to all variants, which
the proxy and its encoder never see; designs that it likes are a test of the machinery, not of biology. Designs are made twice: by gradients as
published, which rewrite most of a sequence, and by a few substitutions that a ridge on the letters thinks best, which stay near what was measured.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janax.algorithms import bib
from janax.algorithms.bib import baselines
from janax.experiments.bib import pretraining, rivals, tasks
from janax.experiments.bib.config import Config
from janax.experiments.session import Session
from janax.jaxlib_ext import ridge
from janax.models import sequence

__all__ = ["RIDGES", "study"]

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
_CORPUS = 8000  # variants that the language model sees
_STEPS = 25
_SUBSTITUTIONS, _LETTER_ROWS, _LETTER_RIDGE = 6, 2000, 0.1  # of the designs near their starts


def study(config: Config, session: Session) -> dict[str, Any]:
    """protein -> kind of features -> {"fixed": [seeds], "chosen": [seeds]} rank correlations; "rows"; reports under the stand-in: "designs" by
    gradients, "near" by substitutions, "starts".
    """
    found = {}
    for name in session.track(config.proteins.names, "proteins"):
        found[name] = session.memo(f"protein-{name}", functools.partial(_protein, config, session, name), alone=True)
        found[name] |= session.memo(f"protein-{name}-near", functools.partial(_near, config, name), alone=True)
    return found


def _protein(config: Config, session: Session, name: str) -> dict[str, Any]:
    settings = config.proteins
    library = tasks.protein(name, config.data_dir)  # type: ignore[arg-type]
    half = tasks.lower_half(library)
    recipe = pretraining.Recipe(num_steps=settings.encoder_steps, batch_size=64, scale=0.02)
    corpus = half.tokens[np.random.default_rng(0).permutation(len(half.tokens))[:_CORPUS]]
    compute = functools.partial(pretraining.protein, 0, corpus, recipe=recipe)
    trained = pretraining.kept(session.workdir / f"encoder-{name}", sequence.PROTEIN_SMALL, compute)
    found: dict[str, Any] = {"rows": len(library.scores), "nats": trained.info["nats"]}
    kinds: dict[str, Any] = {
        "one-hot": lambda t: np.eye(20)[t].reshape(len(t), -1),
        "encoder": functools.partial(pretraining.all_features, trained),
    }
    for kind, features in kinds.items():
        found[kind] = {"fixed": [], "chosen": []}
        for seed in range(settings.num_seeds):
            rows = np.random.default_rng(seed).permutation(len(library.scores))[: settings.num_train + settings.num_test]
            fixed, chosen = _ranking(features(library.tokens[rows]), library.scores[rows], settings.num_train)
            found[kind]["fixed"].append(fixed)
            found[kind]["chosen"].append(chosen)
    return found | {"designs": _designs(config, library, trained)}


def _ranking(phi: np.ndarray, scores: np.ndarray, num_train: int) -> tuple[float, float]:
    """Rank correlations on the rest of the rows: at r = 1e-6, and at the ridge that leave-one-out takes; features standardised."""
    train, test = phi[:num_train], phi[num_train:]
    mean, std = train.mean(axis=0), train.std(axis=0)
    varies = std > 0
    train, test = ((x[:, varies] - mean[varies]) / std[varies] for x in (train, test))
    y = scores[:num_train] - scores[:num_train].mean()
    with jax.enable_x64(True):
        best = RIDGES[int(ridge.leave_one_out(train, y, np.array(RIDGES)).best)]
        weights = [np.asarray(ridge.fit(train, y, rel_ridge=r).weights) for r in (RIDGES[0], best)]
    fixed, chosen = (tasks.spearman(test @ w, scores[num_train:]) for w in weights)
    return fixed, chosen


def _stand_in(library: tasks.Library) -> tuple[Any, tasks.Offline]:
    """tokens [n l] -> scores [n] by perceptrons that saw every variant; and the offline half by those scores, some thousands of it."""
    y = (library.scores - library.scores.mean()) / library.scores.std()
    fit = jax.jit(functools.partial(baselines.fit_ensemble, num_letters=20, num_steps=600))
    params = fit(jax.random.key(7), jnp.asarray(library.tokens), jnp.asarray(y, jnp.float32)).params
    compiled = jax.jit(lambda t: jax.lax.map(lambda t: rivals.MEAN(params, jax.nn.one_hot(t, 20)), t, batch_size=2048))

    def score(tokens: np.ndarray) -> np.ndarray:
        with jax.enable_x64(False):
            return np.asarray(compiled(jnp.asarray(tokens, jnp.int32)), np.float64)

    offline = tasks.lower_half(library, score(library.tokens))
    rows = np.sort(np.random.default_rng(0).permutation(len(offline.scores))[:_CORPUS])
    return score, offline._replace(tokens=offline.tokens[rows], scores=offline.scores[rows])


def _report(scores: np.ndarray, designs: np.ndarray, starts: np.ndarray, offline: tasks.Offline) -> dict[str, Any]:
    report = tasks.offline_report(
        scores, designs, y_min=offline.y_min, y_max=offline.y_max, starts=starts, training=offline.tokens
    )._asdict()
    return {k: report[k] for k in ("max", "median", "mean", "distinct", "from_start", "to_training")}


def _near(config: Config, name: str) -> dict[str, Any]:
    """Reports of the starts, and of them with a few substitutions by a ridge on letters; as many fits, to other offline rows, as seeds."""
    library = tasks.protein(name, config.data_dir)  # type: ignore[arg-type]
    score, offline = _stand_in(library)
    starts = offline.tokens[tasks.starts(offline)]
    length = starts.shape[1]

    @jax.jit
    def improve(key: jax.Array, phi: jax.Array, y: jax.Array) -> jax.Array:
        weights = ridge.fit(phi, y - jnp.mean(y), rel_ridge=_LETTER_RIDGE).weights
        value = lambda x: jnp.sum(x.reshape(-1) * weights)  # noqa: E731
        search = functools.partial(bib.refine, score_fn=value, num_letters=20, num_rounds=_SUBSTITUTIONS, num_candidates=8)
        return jax.vmap(lambda key, start: search(key, tokens=start).tokens)(
            jax.random.split(key, len(starts)), jnp.asarray(starts, jnp.int32)
        )

    reports = []
    with jax.enable_x64(True):
        for seed in range(config.proteins.num_seeds):
            rows = np.random.default_rng(50 + seed).permutation(len(offline.scores))[:_LETTER_ROWS]
            phi = np.eye(20)[offline.tokens[rows]].reshape(len(rows), length * 20)
            designs = np.asarray(improve(jax.random.key(seed), phi, offline.scores[rows]))
            reports.append(_report(score(designs), designs, starts, offline))
    return {"near": reports, "starts": _report(score(starts), starts, starts, offline)}


def _designs(config: Config, library: tasks.Library, trained: pretraining.Trained) -> list[dict[str, Any]]:
    """Reports of 128 designs by the stand-in oracle, which also rescored the offline half; as many as seeds."""
    score, offline = _stand_in(library)
    phi = pretraining.all_features(trained, offline.tokens)
    starts = jnp.asarray(offline.tokens[tasks.starts(offline)], jnp.int32)

    def run(params: Any, proxy: bib.Proxy, heads: bib.Heads, key: jax.Array) -> jax.Array:
        objectives = bib.Objectives(
            functools.partial(bib.forward_loss, proxy),
            functools.partial(bib.backward_loss, proxy),
            functools.partial(bib.head_value, heads),
        )

        def one(args: tuple[jax.Array, jax.Array]) -> jax.Array:
            key, start = args
            z = bib.init_logits(key, start, num_letters=20).astype(jnp.float32)  # a draw of its own for every design, as for proteins
            features = lambda z: sequence.features(trained.model, params, bib.relax_tokens(z))  # noqa: E731
            return bib.design(z, features, objectives, num_steps=_STEPS, eta_rule="frozen").tokens

        return jax.lax.map(one, (jax.random.split(key, len(starts)), starts), batch_size=16)

    reports: list[dict[str, Any]] = []
    with jax.enable_x64(True):
        proxy = jax.jit(bib.fit_proxy)(phi, offline.scores, rel_ridge=1e-3)
        compiled = jax.jit(run)
        for seed in range(config.proteins.num_seeds):
            heads = jax.jit(bib.fit_heads)(jax.random.key(seed), phi, offline.scores)
            designs = np.asarray(compiled(trained.params, proxy, heads, jax.random.key(100 + seed)))
            reports.append(_report(score(designs), designs, np.asarray(starts), offline))
    return reports
