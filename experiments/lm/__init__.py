"""Decoder language models: training on packed text (all parameters or adapters), held-out loss, samples, and the programs of a pod.

Importing this package is cheap; the study loads JAX when it runs.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from janax.experiments.lm.config import DEFAULT, PAPER, PRESETS, SMOKE, Config, LoraConfig, ModelConfig, ServeConfig, TextConfig

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
    "Config",
    "LoraConfig",
    "ModelConfig",
    "ServeConfig",
    "TextConfig",
    "programs",
    "run",
]

SUMMARY = "language models: a decoder trained on real text or tuned from public weights, with held-out loss, samples and tokens per second"


def run(config: Config, session: "Session") -> "report.Results":
    """Trains, evaluates on held-out text, and continues its beginnings."""
    from janax.experiments.lm import study

    return study.run(config, session)


def programs(config: Config, devices: Any) -> "Iterable[aot.Program]":
    """What `janax compile lm` compiles: a training step, prefill and decode, whichever `programs` names."""
    from janax.experiments.lm import study

    return study.programs(config, devices)
