"""Sinkhorn distillation (SinKD), measured: closed forms, students on real images and text, layouts of sequences, and the paper's scale on a pod.

Importing this package is cheap; the studies load JAX when they run. Reference: arXiv:2402.17110.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from janax.experiments.sinkd.config import (
    DEFAULT,
    PAPER,
    PRESETS,
    SMOKE,
    AblationsConfig,
    CheckpointsConfig,
    Config,
    DigitsConfig,
    LanguageConfig,
    ObjectiveConfig,
    TextConfig,
)

if TYPE_CHECKING:
    from janax.experiments import report
    from janax.experiments.session import Session
    from janax.jaxlib_ext import aot

__all__ = [
    "DEFAULT",
    "PAPER",
    "PRESETS",
    "SMOKE",
    "SUMMARY",
    "AblationsConfig",
    "CheckpointsConfig",
    "Config",
    "DigitsConfig",
    "LanguageConfig",
    "ObjectiveConfig",
    "TextConfig",
    "programs",
    "run",
]

SUMMARY = "distillation by optimal transport: closed forms, then students on digits and docstrings by a dozen losses, with seeds"


def run(config: Config, session: "Session") -> "report.Results":
    """Runs the chosen studies and puts their findings beside the paper's."""
    from janax.experiments.sinkd import analyses, checkpoints, digits, findings, language, text

    found: dict[str, Any] = {}
    if "checkpoints" in config.sections:
        found["checkpoints"] = checkpoints.study(config, session)
    if "analyses" in config.sections:
        found["analyses"] = analyses.study(config, session)
    if "digits" in config.sections:
        found["digits"] = digits.study(config, session)
    if "ablations" in config.sections:
        found["ablations"] = digits.ablations(config, session)
    if "text" in config.sections:
        found["text"] = text.study(config, session)
    if "language" in config.sections:
        found["language"] = language.study(config, session)
    return findings.results(config, found, session)


def programs(config: Config, devices: Any) -> "Iterable[aot.Program]":
    """What `janax compile sinkd` compiles: a distillation step of published decoders."""
    from janax.experiments.sinkd import checkpoints

    return checkpoints.programs(config, devices)
