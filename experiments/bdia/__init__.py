"""Exact diffusion inversion (BDIA), measured: an exact-score mixture, real digits, and the paper's scale on a pod.

Importing this package is cheap; the studies load JAX when they run. Reference: arXiv:2307.10829.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from janax.experiments.bdia.config import DEFAULT, PAPER, PRESETS, SMOKE, Config, DigitsConfig, LatentsConfig, MixtureConfig

if TYPE_CHECKING:
    from janax.experiments import report
    from janax.experiments.session import Session
    from janax.jaxlib_ext import aot

__all__ = ["DEFAULT", "PAPER", "PRESETS", "SMOKE", "SUMMARY", "Config", "DigitsConfig", "LatentsConfig", "MixtureConfig", "programs", "run"]

SUMMARY = "exact diffusion inversion: samplers, round trips, edits, gradients; thirteen claims checked on a mixture and on digits"


def run(config: Config, session: "Session") -> "report.Results":
    """Runs the chosen studies and puts their findings beside the paper's."""
    from janax.experiments.bdia import digits, findings, latents, mixture

    found: dict[str, Any] = {}
    if "mixture" in config.sections:
        found["mixture"] = mixture.study(config.mixture, session)
    if "digits" in config.sections:
        found["digits"] = digits.study(config, session)
    if "latents" in config.sections:
        found["latents"] = latents.study(config, session)
    return findings.results(config, found, session)


def programs(config: Config, devices: Any) -> "Iterable[aot.Program]":
    """What `janax compile bdia` compiles: sampling, encoding with decoding, and a training step."""
    from janax.experiments.bdia import latents

    return latents.programs(config, devices)
