"""RL with KL penalties as Bayesian inference, measured: exact posteriors, fitted policies, twisted SMC, and real text under a reward.

Importing this package is cheap; the studies load JAX when they run. Reference: arXiv:2205.11275.
"""

from typing import TYPE_CHECKING, Any

from janax.experiments.rl_bayes.config import (
    DEFAULT,
    PAPER,
    PRESETS,
    SMOKE,
    Config,
    ExactConfig,
    PodConfig,
    SteeringConfig,
    TextConfig,
    TwistsConfig,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from janax.experiments import report
    from janax.experiments.session import Session
    from janax.jaxlib_ext import aot

__all__ = [
    "DEFAULT",
    "PAPER",
    "PRESETS",
    "SMOKE",
    "SUMMARY",
    "Config",
    "ExactConfig",
    "PodConfig",
    "SteeringConfig",
    "TextConfig",
    "TwistsConfig",
    "programs",
    "run",
]

SUMMARY = "KL-regularised RL is inference: collapse without KL, divergences against exact posteriors, log Z from both sides, steered text"


def run(config: Config, session: "Session") -> "report.Results":
    """Runs the chosen studies and puts their findings beside the published ones."""
    from janax.experiments.rl_bayes import exact, findings, steering, text, twists

    found: dict[str, Any] = {}
    if "exact" in config.sections:
        found["exact"] = exact.study(config, session)
    if "twists" in config.sections:
        found["twists"] = twists.study(config, session)
    if "text" in config.sections:
        found["text"] = text.study(config, session)
    if "steering" in config.sections:
        found["steering"] = steering.study(config, session)
    return findings.results(config, found, session)


def programs(config: Config, devices: Any) -> "Iterable[aot.Program]":
    """What `janax compile rl-bayes` compiles: twisted SMC with a large decoder, and a step of f-DPG."""
    from janax.experiments.rl_bayes import pods

    return pods.programs(config, devices)
