"""BIB on the exact oracle of TFBind8: seven ways to walk, two splits, three factors, many seeds, each in one compiled call."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from janax.algorithms import bib
from janax.experiments.bib import pretraining, tasks
from janax.experiments.bib.config import Config, MethodsConfig
from janax.experiments.session import Session
from janax.models import sequence

__all__ = ["BEST", "REFINED_FROM", "VARIANTS", "Fitted", "encoder", "features_of", "fit", "plain", "refined", "study", "walk"]

VARIANTS: dict[str, dict[str, Any]] = {
    "forward": {"mode": "forward"},
    "backward": {"mode": "backward"},
    "both, fixed": {"gamma_rule": None},
    "Adaptive-gamma": {"gamma_rule": "frozen"},
    "Adaptive-gamma + Adaptive-eta": {"gamma_rule": "frozen", "eta_rule": "frozen"},
    "forward + Adaptive-eta": {"mode": "forward", "eta_rule": "frozen"},
    "Adaptive-gamma, through Adam": {"gamma_rule": "adam"},
}
BEST = "refined, 128 distinct"
REFINED_FROM = "Adaptive-gamma + Adaptive-eta"
_REPORTED = ("max", "median", "mean", "distinct", "from_start", "unmoved", "known")


class Fitted(NamedTuple):
    """What design sees of the offline rows, with a leading axis of seeds on the heads.

    Attributes:
      proxy: The ridge fit.
      heads: Auxiliary heads, one set a seed.
      starts: [m l] int32 best offline designs.
    """

    proxy: bib.Proxy
    heads: bib.Heads
    starts: jax.Array


def encoder(config: Config, session: Session) -> pretraining.Trained:
    """The encoder, trained once per run; the tables of all three design factors are left out."""
    recipe = pretraining.Recipe(
        num_steps=config.encoder.num_steps, batch_size=config.encoder.batch_size, learning_rate=config.encoder.learning_rate
    )
    objective = pretraining.Objective(regression=1.0, both_strands=config.encoder.both_strands)
    compute = functools.partial(pretraining.dna, 0, without=tasks.FACTORS, objective=objective, recipe=recipe, session=session)
    return pretraining.kept(session.workdir / "encoder", sequence.DNA_KMERS, compute)


def features_of(trained: pretraining.Trained, *, both_strands: bool) -> Any:
    """(params, z [l v]) -> [d]: logits through k-mers and network."""

    def features(params: Any, z: jax.Array) -> jax.Array:
        rows = bib.relax_kmers(z, k=trained.model.alphabet.k)
        return sequence.features(trained.model, params, rows, both_strands=both_strands)

    return features


def fit(phi: np.ndarray, offline: tasks.Offline, *, num_seeds: int, num_designs: int, rel_ridge: float) -> Fitted:
    """Fits proxy and heads to the offline rows; float64 must be enabled.

    Args:
      phi: [n d] features of the offline rows.
      offline: The rows.
      num_seeds: Sets of heads, by bootstrap.
      num_designs: Starts.
      rel_ridge: Of the proxy.
    """
    scores = jnp.asarray(offline.scores)
    proxy = jax.jit(bib.fit_proxy)(phi, scores, rel_ridge=rel_ridge)
    keys = jax.vmap(jax.random.key)(np.arange(num_seeds))
    heads = jax.jit(lambda keys: jax.lax.map(lambda key: bib.fit_heads(key, phi, scores), keys))(keys)
    return Fitted(proxy, heads, jnp.asarray(offline.tokens[tasks.starts(offline, num_designs)], jnp.int32))


def plain(fitted: Sequence[Fitted]) -> Fitted:
    """Tasks beside each other: the arrays stacked."""
    return jax.tree.map(lambda *x: jnp.stack(x), *fitted)


def walk(config: MethodsConfig, features: Any, variant: str) -> Any:
    """(params, fitted [tasks], key) -> trajectories [tasks seeds m ...] of a variant, to be jitted: vmapped over tasks, seeds and designs."""
    settings = VARIANTS[variant]

    def one(params: Any, proxy: bib.Proxy, heads: bib.Heads, z: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        objectives = bib.Objectives(
            functools.partial(bib.forward_loss, proxy),
            functools.partial(bib.backward_loss, proxy),
            functools.partial(bib.head_value, heads),
        )
        run = bib.design(z, functools.partial(features, params), objectives, num_steps=config.num_steps, **settings)
        return run.tokens, run.path, run.info._replace(tokens=jnp.zeros(0))

    def seed(params: Any, fitted: Fitted, heads: bib.Heads, key: jax.Array) -> Any:
        # One draw for all designs, as in the public code for DNA.
        start = functools.partial(bib.init_logits, key, num_letters=4)
        z = jax.vmap(lambda tokens: start(tokens).astype(jnp.float32))(fitted.starts)
        return jax.vmap(lambda z: one(params, fitted.proxy, heads, z))(z)

    def task(params: Any, fitted: Fitted, keys: jax.Array) -> Any:
        return jax.vmap(lambda heads, key: seed(params, fitted, heads, key))(fitted.heads, keys)

    return jax.vmap(task, in_axes=(None, 0, None))


def refined(config: MethodsConfig, trained: pretraining.Trained, *, both_strands: bool) -> Any:
    """(params, proxy, tokens [n l]) -> the best distinct designs [m l] by the proxy among the visited and their neighbours, to be jitted."""

    def search(params: Any, proxy: bib.Proxy, visited: jax.Array) -> tuple[jax.Array, jax.Array]:
        def score(tokens: jax.Array) -> jax.Array:
            phi = sequence.features(trained.model, params, tokens, both_strands=both_strands)
            return bib.predict(proxy, phi)

        found = bib.neighbourhood_search(score, visited, num_letters=4, num_kept=config.kept, num_rounds=config.rounds)
        return found.tokens[: config.num_designs], found.predicted[: config.num_designs]

    return search


class _Programs:
    """Compiled once for all splits."""

    def __init__(self, config: Config, trained: pretraining.Trained):
        self._config, self._trained, self._strands = config.methods, trained, config.encoder.both_strands
        self.search = jax.jit(refined(config.methods, trained, both_strands=self._strands))

    @functools.cache  # noqa: B019 - as long as the study
    def walk(self, variant: str) -> Any:
        return jax.jit(walk(self._config, features_of(self._trained, both_strands=self._strands), variant))


def study(config: Config, session: Session) -> dict[str, Any]:
    """Reports by task, variant and seed: name of task -> variant -> list of report dictionaries; "encoder" -> its validation figures."""
    trained = encoder(config, session)
    found: dict[str, Any] = {"encoder": trained.info, "quality": {}, "tasks": {}}
    with jax.enable_x64(True):
        programs = _Programs(config, trained)
        for split in config.methods.splits:
            compute = functools.partial(_split, config, session, trained, programs, split)
            found["tasks"] |= session.memo(f"methods-{split}", compute, alone=True)
            found["quality"][split] = session.memo(f"quality-{split}", functools.partial(_quality, config, trained, split), alone=True)
    return found


def _quality(config: Config, trained: pretraining.Trained, split: str) -> dict[str, float]:
    offline, oracle = tasks.tfbind8("SIX6_REF_R1", split)
    phi = pretraining.all_features(trained, tasks.all_sequences(8), both_strands=config.encoder.both_strands)
    return pretraining.ridge_quality(phi, offline, oracle, rel_ridge=config.methods.rel_ridge)


def _split(config: Config, session: Session, trained: pretraining.Trained, programs: _Programs, split: str) -> dict[str, Any]:
    methods = config.methods
    problems = {factor: tasks.tfbind8(factor, split) for factor in (tasks.FACTORS if methods.others else tasks.FACTORS[:1])}
    fitted = {}
    for factor, (offline, _) in problems.items():
        phi = pretraining.all_features(trained, offline.tokens, both_strands=config.encoder.both_strands)
        sizes = {"num_seeds": methods.num_seeds, "num_designs": methods.num_designs}
        fitted[factor] = fit(phi, offline, **sizes, rel_ridge=methods.rel_ridge)
    keys = jax.vmap(jax.random.key)(np.arange(methods.num_seeds))
    reports: dict[str, dict[str, Any]] = {f"{factor}/{split}": {} for factor in problems}
    variants = (*methods.variants, *(methods.hard_variants if split == "lowest5000" else ()))
    refined_from = REFINED_FROM if REFINED_FROM in variants else variants[-1]
    for variant in session.track(variants, f"BIB, {split}"):
        factors = list(problems) if variant in methods.others else [tasks.FACTORS[0]]
        with contextlib.ExitStack() as stack:
            for factor in factors:
                stack.enter_context(problems[factor].oracle.sealed())
            run = programs.walk(variant)(trained.params, plain([fitted[factor] for factor in factors]), keys)
            designs, paths = (np.asarray(x) for x in run[:2])
            best = (
                _refined(config, programs, trained, [fitted[factor].proxy for factor in factors], paths) if variant == refined_from else ()
            )
        for i, factor in enumerate(factors):
            (offline, oracle), into, starts = problems[factor], reports[f"{factor}/{split}"], fitted[factor].starts
            into[variant] = [_report(offline, oracle, batch, starts) for batch in designs[i]]
            into[variant][0]["curves"] = _curves(offline, oracle, paths[i, 0], run[2], i)
            if len(best):
                into[BEST] = [_report(offline, oracle, batch, starts) for batch in best[i]]
                into[BEST][0]["designs"] = best[i][0].tolist()
    return reports


def _refined(config: Config, programs: _Programs, trained: pretraining.Trained, proxies: Sequence[bib.Proxy], paths: np.ndarray) -> Any:
    """[tasks][seeds] batches of distinct designs, from all that was visited: paths [tasks seeds m t l]."""
    visited = paths.reshape(*paths.shape[:2], -1, paths.shape[-1])
    return [[np.asarray(programs.search(trained.params, proxy, one)[0]) for one in seeds] for proxy, seeds in zip(proxies, visited)]


def _report(offline: tasks.Offline, oracle: tasks.Oracle, designs: np.ndarray, starts: Any) -> dict[str, Any]:
    report = tasks.offline_report(oracle(designs), designs, y_min=offline.y_min, y_max=offline.y_max, starts=np.asarray(starts))
    found = report._asdict()
    return {name: found[name] for name in _REPORTED} | {f"regret {k}": value for k, value in report.regret.items()}


def _curves(offline: tasks.Offline, oracle: tasks.Oracle, path: np.ndarray, info: Any, task: int) -> dict[str, list[float]]:
    """Of the first seed: what designs scored after every step, and what gamma and eta were, as means over designs."""
    gamma, eta, auxiliary = (np.asarray(x[task, 0]) for x in (info.gamma, info.eta, info.auxiliary))
    m, steps, l = path.shape
    scores = oracle(path.reshape(-1, l)).reshape(m, steps)
    scores = (scores - offline.y_min) / (offline.y_max - offline.y_min)
    return {
        "median": np.median(scores, axis=0).round(4).tolist(),
        "gamma": gamma.mean(axis=0).round(4).tolist(),
        "eta": eta.mean(axis=0).round(6).tolist(),
        "start": scores[:, 0].round(4).tolist(),
        "end": scores[:, -1].round(4).tolist(),
        "predicted": auxiliary[:, -1].round(4).tolist(),
    }
