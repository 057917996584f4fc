"""Baselines of offline design: one proxy, one set of starts, one kind of result.

A proxy is `score_fn(params, x [l v]) -> []` for one design; its rows are probabilities, one-hot for a sequence. Every method returns `Designs`, runs
under `jit`, and `vmap`s over keys, parameters, starts and its float hyperparameters.

    fit = baselines.fit_ensemble(key, tokens, standardised, num_letters=4)                 # five perceptrons
    score_fn = functools.partial(baselines.ensemble_score, baselines.mlp_score, reduce="mean")
    starts = baselines.best_offline(tokens, standardised).tokens
    designs = baselines.gradient_ascent(score_fn, fit.params, starts, num_letters=4)
    designs = baselines.genetic_algorithm(score_fn, fit.params, key, starts, num_letters=4)

Where to read what:
  designs   Designs, distinct ones, ensembles, random and best       ascent        gradient ascent on rows or logits
  mlp       the perceptron and its ensemble                          conservative  COMs
  sampling  CbAS, DbAS                                               genetic       genetic algorithm, AdaLead
  cma       CMA-ES, full and diagonal
"""

from janax.algorithms.bib.baselines.ascent import RELAXATIONS, gradient_ascent
from janax.algorithms.bib.baselines.cma import CmaConstants, CmaState, cma_ask, cma_constants, cma_es, cma_init, cma_tell
from janax.algorithms.bib.baselines.conservative import (
    ADVERSARIES,
    DUAL_RULES,
    ComsFit,
    ComsInfo,
    DualState,
    coms,
    coms_loss,
    dual_init,
    dual_step,
    fit_coms,
)
from janax.algorithms.bib.baselines.designs import (
    REDUCTIONS,
    SELECTIONS,
    Designs,
    ScoreFn,
    Selection,
    best_offline,
    best_predicted,
    count_distinct,
    distinct,
    ensemble_score,
    random_designs,
)
from janax.algorithms.bib.baselines.genetic import adalead, crossover, genetic_algorithm, mutate, recombine
from janax.algorithms.bib.baselines.mlp import EnsembleFit, InitFn, Layer, fit_ensemble, mlp_init, mlp_score
from janax.algorithms.bib.baselines.sampling import (
    FitFn,
    LogProbFn,
    SampleFn,
    cbas,
    importance_weights,
    site_fit,
    site_log_prob,
    site_refit,
    site_sample,
)

__all__ = [
    "ADVERSARIES",
    "DUAL_RULES",
    "REDUCTIONS",
    "RELAXATIONS",
    "SELECTIONS",
    "CmaConstants",
    "CmaState",
    "ComsFit",
    "ComsInfo",
    "Designs",
    "DualState",
    "EnsembleFit",
    "FitFn",
    "InitFn",
    "Layer",
    "LogProbFn",
    "SampleFn",
    "ScoreFn",
    "Selection",
    "adalead",
    "best_offline",
    "best_predicted",
    "cbas",
    "cma_ask",
    "cma_constants",
    "cma_es",
    "cma_init",
    "cma_tell",
    "coms",
    "coms_loss",
    "count_distinct",
    "crossover",
    "distinct",
    "dual_init",
    "dual_step",
    "ensemble_score",
    "fit_coms",
    "fit_ensemble",
    "genetic_algorithm",
    "gradient_ascent",
    "importance_weights",
    "mlp_init",
    "mlp_score",
    "mutate",
    "random_designs",
    "recombine",
    "site_fit",
    "site_log_prob",
    "site_refit",
    "site_sample",
]
