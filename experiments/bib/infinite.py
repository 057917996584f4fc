"""BDI on TFBind8: the infinite-width kernel forwards, backwards and both ways."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from janax.algorithms import bib
from janax.experiments.bib import tasks
from janax.experiments.bib.config import Config
from janax.experiments.session import Session
from janax.jaxlib_ext import ntk

__all__ = ["study"]


def study(config: Config, session: Session) -> dict[str, Any]:
    """mode -> report dictionary; "residual" of the coefficients and "dual", where they came from."""
    with jax.enable_x64(True):
        return session.memo(f"bdi-{config.bdi.split}", functools.partial(_study, config, session), alone=True)


def _study(config: Config, session: Session) -> dict[str, Any]:
    settings = config.bdi
    offline, oracle = tasks.tfbind8("SIX6_REF_R1", settings.split)
    z = bib.log_odds(offline.tokens, num_letters=4)
    scale = bib.log_odds_scale(z)
    x = (z - scale.mean[None]) / scale.std[None]
    y, _ = bib.standardise(offline.scores, ddof=0)
    published = settings.split == "half" and bool(config.data_dir)
    if published:
        fit = bib.bdi_fit(x, y, dual=tasks.published_dual(config.data_dir))  # type: ignore[arg-type]
    elif settings.split == "half":
        fit = bib.bdi_fit(x, y, dual=_solve(np.asarray(x), np.asarray(y)))
    else:
        fit = jax.jit(bib.bdi_fit)(x, y)
    residual = float(jax.jit(bib.bdi_residual)(fit))
    starts = tasks.starts(offline, settings.num_designs)
    found: dict[str, Any] = {"residual": residual, "dual": "published" if published else "solved here", "rows": len(y)}
    for mode in session.track(settings.modes, "BDI"):

        @jax.jit
        def run(x: jax.Array, fit: bib.BdiFit, mode: str = mode) -> jax.Array:
            one = functools.partial(bib.bdi_design, mode=mode, num_steps=settings.num_steps, compatibility="public_code")
            return jax.lax.map(lambda x: one(fit, x[None]).x[0], x, batch_size=settings.chunk)

        with oracle.sealed():
            designs = np.asarray(bib.from_log_odds(run(x[starts], fit), scale, num_letters=4))
        report = tasks.offline_report(oracle(designs), designs, y_min=offline.y_min, y_max=offline.y_max, starts=offline.tokens[starts])
        found[mode] = {name: value for name, value in report._asdict().items() if name != "regret"}
    return found


def _solve(x: np.ndarray, y: np.ndarray, rel_ridge: float = 1e-6) -> np.ndarray:
    """The dual of a large set by LAPACK, in place: one copy of the kernel."""
    import scipy.linalg

    rows = jax.jit(lambda x: ntk.fully_connected(x, jnp.asarray(points)))
    points = jnp.asarray(x)
    own = np.asarray(ntk.fully_connected_diagonal(points))
    kernel = np.empty((len(x), len(x)), order="F")
    for first in range(0, len(x), 512):
        kernel[:, first : first + 512] = np.asarray(rows(points[first : first + 512])).T
    np.fill_diagonal(kernel, own + rel_ridge * own.mean())
    factor = scipy.linalg.cho_factor(kernel, lower=True, overwrite_a=True, check_finite=False)
    return scipy.linalg.cho_solve(factor, y, check_finite=False)
