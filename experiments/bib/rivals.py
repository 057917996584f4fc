"""Baselines on TFBind8: five perceptrons per seed, and what nine ways to search make of them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janax.algorithms.bib import baselines
from janax.experiments.bib import tasks
from janax.experiments.bib.config import Config
from janax.experiments.session import Session

__all__ = ["MEAN", "MIN", "searches", "study"]

MEAN, MIN = (functools.partial(baselines.ensemble_score, baselines.mlp_score, reduce=reduce) for reduce in ("mean", "min"))
_COMS: dict[str, Any] = {"num_steps": 300, "num_ascent_steps": 20, "widths": (128, 128)}


def searches(num_designs: int, tokens: jax.Array, scores: jax.Array, num_letters: int) -> dict[str, Callable[..., baselines.Designs]]:
    """name -> (ensemble, key) -> designs; `tokens` and standardised `scores` are the offline rows."""
    starts = baselines.best_offline(tokens, scores, num_designs=num_designs).tokens
    many = baselines.best_offline(tokens, scores, num_designs=max(num_designs, 256)).tokens
    letters: dict[str, Any] = {"num_letters": num_letters}
    some: dict[str, Any] = letters | {"num_designs": num_designs}

    def coms(_: Any, key: jax.Array) -> baselines.Designs:
        fitted = baselines.fit_coms(key, tokens, scores, **letters, **_COMS)
        return baselines.coms(baselines.mlp_score, fitted.params, starts, num_steps=_COMS["num_ascent_steps"], **letters)

    return {
        "random": lambda params, key: baselines.random_designs(MEAN, params, key, length=tokens.shape[1], **some),
        "best offline": lambda params, key: baselines.best_offline(tokens, scores, num_designs=num_designs),
        "gradient ascent, mean": lambda params, key: baselines.gradient_ascent(MEAN, params, starts, **letters),
        "gradient ascent, min": lambda params, key: baselines.gradient_ascent(MIN, params, starts, **letters),
        "genetic algorithm": lambda params, key: baselines.genetic_algorithm(MEAN, params, key, many, **some),
        "AdaLead": lambda params, key: baselines.adalead(MEAN, params, key, many, **some),
        "COMs": coms,
        "CbAS": lambda params, key: baselines.cbas(MEAN, params, key, baselines.site_fit(starts, num_letters=num_letters), **some),
        "CMA-ES": lambda params, key: baselines.cma_es(MEAN, params, key, starts, num_generations=30, **letters),
    }


def study(config: Config, session: Session) -> dict[str, Any]:
    """split -> method -> report dictionaries, one a seed."""
    return {
        split: session.memo(f"baselines-{split}", functools.partial(_split, config, session, split), alone=True)
        for split in config.baselines.splits
    }


def _split(config: Config, session: Session, split: str) -> dict[str, Any]:
    settings = config.baselines
    offline, oracle = tasks.tfbind8("SIX6_REF_R1", split)
    standardised = (offline.scores - offline.scores.mean()) / offline.scores.std(ddof=1)
    tokens, scores = jnp.asarray(offline.tokens), jnp.asarray(standardised, jnp.float32)
    keys = jax.random.split(jax.random.key(0), (settings.num_seeds, 2))
    fit = functools.partial(baselines.fit_ensemble, num_letters=4, num_steps=settings.fit_steps)
    ensembles = jax.jit(jax.vmap(lambda key: fit(key, tokens, scores).params))(keys[:, 0])
    found = {}
    all_of_them = searches(settings.num_designs, tokens, scores, 4)
    for name in session.track(settings.methods, f"baselines, {split}"):
        run = jax.jit(lambda args, run=all_of_them[name]: jax.lax.map(lambda pair: run(*pair).tokens, args))
        with oracle.sealed():
            designs = np.asarray(run((ensembles, keys[:, 1])))
        found[name] = [_report(offline, oracle, batch) for batch in designs]
    return found


def _report(offline: tasks.Offline, oracle: tasks.Oracle, designs: np.ndarray) -> dict[str, Any]:
    report = tasks.offline_report(oracle(designs), designs, y_min=offline.y_min, y_max=offline.y_max)
    found = report._asdict()
    return {name: found[name] for name in ("max", "median", "mean", "distinct")} | {f"regret {k}": v for k, v in report.regret.items()}
