"""Offline design of biological sequences (BIB, BDI), measured on exact oracles beside its baselines; and the paper's scale on a pod.

Importing this package is cheap; the studies load JAX when they run. References: arXiv:2301.02931, arXiv:2209.07507.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from janax.experiments.bib.config import (
    DEFAULT,
    PAPER,
    PRESETS,
    SMOKE,
    BaselinesConfig,
    BdiConfig,
    Config,
    EhrlichConfig,
    EncoderConfig,
    KernelsConfig,
    MethodsConfig,
    PaperConfig,
    ProteinsConfig,
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
    "BaselinesConfig",
    "BdiConfig",
    "Config",
    "EhrlichConfig",
    "EncoderConfig",
    "KernelsConfig",
    "MethodsConfig",
    "PaperConfig",
    "ProteinsConfig",
    "programs",
    "run",
]

SUMMARY = "sequence design: from scored DNA to a batch of better sequences, forwards and backwards, on exact oracles beside nine baselines"


def run(config: Config, session: "Session") -> "report.Results":
    """Runs the chosen studies and puts their findings beside the published ones."""
    from janax.experiments.bib import closed_form, findings, infinite, kernels, methods, pods, proteins, rivals

    found: dict[str, Any] = {}
    if "bdi" in config.sections:
        found["bdi"] = infinite.study(config, session)
    if "methods" in config.sections:
        found["methods"] = methods.study(config, session)
    if "baselines" in config.sections:
        found["baselines"] = rivals.study(config, session)
    if "kernels" in config.sections:
        found["kernels"] = kernels.study(config, session, methods.encoder(config, session))
    if "ehrlich" in config.sections:
        found["ehrlich"] = closed_form.study(config, session)
    if "proteins" in config.sections:
        found["proteins"] = proteins.study(config, session)
    if "paper" in config.sections:
        found["paper"] = pods.study(config, session)
    return findings.results(config, found, session)


def programs(config: Config, devices: Any) -> "Iterable[aot.Program]":
    """What `janax compile bib` compiles: features of many sequences by a large encoder with the fit, and designs through it."""
    from janax.experiments.bib import pods

    return pods.programs(config, devices)
