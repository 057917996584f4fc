"""BIB: from a table of scored sequences to a batch of better ones, by a proxy that is read forwards and backwards.

    phi = features(...)                                        # [n d], a language model's mean last hidden state
    proxy = bib.fit_proxy(phi, scores)                         # w, and G, b, c: the data themselves are not needed again
    heads = bib.fit_heads(key, phi, scores)                    # what supervises gamma and eta
    objectives = bib.Objectives(
        forward=functools.partial(bib.forward_loss, proxy),    # the data predict the proposal
        backward=functools.partial(bib.backward_loss, proxy),  # the proposal predicts the data
        auxiliary=functools.partial(bib.head_value, heads),
    )
    run = jax.vmap(lambda z: bib.design(z, feature_fn, objectives, gamma_rule="frozen", eta_rule="frozen"))(z)   # run.tokens [m l]

The rooms: `relaxation` (logits to letters), `proxy` (fit, losses, heads), `adaptive` (gamma, eta), `design` (the loop), `refinement` (search and
choice), `bdi` (the infinite-width predecessor), `baselines` and `ehrlich` (what to compare with, and on).

Where paper and public code differ the public code's intent is followed: five different auxiliary heads, the design read out at the last step.
What the code does otherwise is reachable by `compatibility="public_code"`.

References: Chen et al., arXiv:2301.02931 (BIB), arXiv:2209.07507 (BDI).
"""

from janax.algorithms.bib import baselines, ehrlich
from janax.algorithms.bib.adaptive import (
    RULES,
    AdamState,
    AdaptiveEtaState,
    GammaState,
    adam_direction,
    adam_init,
    adaptive_eta,
    eta_update,
    gamma_init,
    gamma_tangent,
    gamma_update,
)
from janax.algorithms.bib.bdi import (
    BdiDesign,
    BdiFit,
    bdi_backward_loss,
    bdi_design,
    bdi_fit,
    bdi_forward_loss,
    bdi_predict,
    bdi_residual,
)
from janax.algorithms.bib.design import MODES, DesignInfo, DesignState, Objectives, Settings, Trajectory, design, init, step
from janax.algorithms.bib.proxy import (
    REDUCTIONS,
    Heads,
    Proxy,
    Scale,
    backward_loss,
    backward_model,
    conservative,
    fit_heads,
    fit_proxy,
    forward_loss,
    head_value,
    lower_confidence_bound,
    predict,
    standardise,
    uncertainty,
)
from janax.algorithms.bib.refinement import Refined, Selected, hamming, neighbourhood_search, refine, select_diverse, substitutions
from janax.algorithms.bib.relaxation import (
    RELAXATIONS,
    LogOdds,
    from_log_odds,
    init_logits,
    log_odds,
    log_odds_scale,
    read_out,
    relax_kmers,
    relax_tokens,
    straight_through,
)

__all__ = [
    "MODES",
    "REDUCTIONS",
    "RELAXATIONS",
    "RULES",
    "AdamState",
    "AdaptiveEtaState",
    "BdiDesign",
    "BdiFit",
    "DesignInfo",
    "DesignState",
    "GammaState",
    "Heads",
    "LogOdds",
    "Objectives",
    "Proxy",
    "Refined",
    "Scale",
    "Selected",
    "Settings",
    "Trajectory",
    "adam_direction",
    "adam_init",
    "adaptive_eta",
    "backward_loss",
    "backward_model",
    "baselines",
    "bdi_backward_loss",
    "bdi_design",
    "bdi_fit",
    "bdi_forward_loss",
    "bdi_predict",
    "bdi_residual",
    "conservative",
    "design",
    "ehrlich",
    "eta_update",
    "fit_heads",
    "fit_proxy",
    "forward_loss",
    "from_log_odds",
    "gamma_init",
    "gamma_tangent",
    "gamma_update",
    "hamming",
    "head_value",
    "init",
    "init_logits",
    "log_odds",
    "log_odds_scale",
    "lower_confidence_bound",
    "neighbourhood_search",
    "predict",
    "read_out",
    "refine",
    "relax_kmers",
    "relax_tokens",
    "select_diverse",
    "standardise",
    "step",
    "straight_through",
    "substitutions",
    "uncertainty",
]
