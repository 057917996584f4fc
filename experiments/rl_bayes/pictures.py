"""Pictures of the study: entropy along the way, trade-offs against the exact posterior, log Z from both sides, the frontier of best-of-N."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from janax.experiments import plots

__all__ = ["collapse", "coverage", "frontier", "qrs", "sandwich", "text", "tradeoff"]


def _finish(panel: Any, *, title: str, **more: Any) -> None:
    panel.set(**more)
    panel.set_title(title, loc="left", fontsize=11, fontweight="bold")


def collapse(path: Path, found: Mapping[str, Any]) -> None:
    """Entropy over steps, mean over worlds, with the posterior's."""
    series = {}
    for name, row in found["objectives"].items():
        curves = np.asarray(row["curve"], float)
        series[name] = (np.arange(curves.shape[1]) * found["stride"], curves.mean(axis=0))
    reference = {"posterior": float(np.mean(found["truth"]["posterior"]["entropy"])), "prior": float(np.mean(found["truth"]["prior"]))}
    plots.lines(
        path,
        series,
        xlabel="exact gradient step",
        ylabel="entropy (nats)",
        title="Without a KL the policy ends as a point",
        reference=reference,
    )


def tradeoff(path: Path, found: Mapping[str, Any]) -> None:
    """Reward over the divergence from the prior, and entropy over the weight of the KL, of policies too small for the posterior."""
    betas = found["betas"]
    figure, grid = plots.axes(columns=2, width=10.4, height=3.9)
    rows = {"posterior": found["posterior"], **found["objectives"]}
    for i, (name, row) in enumerate(rows.items()):
        mean = {key: np.mean(np.asarray(row[key], float), axis=1) for key in ("kl_prior", "reward", "entropy")}
        color = plots.COLORS[-1] if name == "posterior" else plots.COLORS[(i - 1) % len(plots.COLORS)]
        style = {"color": color, "marker": "o", "markersize": 4, "linewidth": 2.2 if name == "posterior" else 1.3, "label": name}
        grid[0, 0].plot(mean["kl_prior"], mean["reward"], **style)
        grid[0, 1].plot(betas, mean["entropy"], **style)
    grid[0, 1].set_xscale("log")
    grid[0, 1].set_xticks(betas, [f"{beta:g}" for beta in betas])
    grid[0, 1].minorticks_off()
    grid[0, 0].legend(frameon=False, fontsize=8)
    _finish(grid[0, 0], title="Reward and divergence, by weight of the KL", xlabel="KL(policy || prior), nats", ylabel="expected reward")
    _finish(grid[0, 1], title="Entropy", xlabel="weight of the KL", ylabel="nats")
    plots.save(figure, path)


def qrs(path: Path, found: Mapping[str, Any]) -> None:
    """Total variation over the acceptance rate, for both proposals."""
    series = {name: (found["rates"], np.mean(np.asarray(found[name], float), axis=0)) for name in ("prior", "tuned")}
    plots.lines(
        path,
        series,
        xlabel="acceptance rate",
        ylabel="total variation from the posterior",
        title="Quasi-rejection sampling, by proposal",
        xscale="log",
        markers=True,
    )


def sandwich(path: Path, found: Mapping[str, Any]) -> None:
    """Both bounds relative to log Z over particles, one panel for each proposal."""
    figure, grid = plots.axes(columns=2, width=9.6, height=3.6)
    for panel, proposal in zip(grid[0], ("base", "twist")):
        single = found[f"{proposal} exact"]
        for i, kind in enumerate(("weights only", "resampling")):
            case = found["cases"][f"{proposal}, {kind}"]
            particles = [1, *map(int, case)]
            for side, at_one in (("lower", single[0]), ("upper", single[1])):
                values = [at_one, *(row[side] for row in case.values())]
                errors = [0.0, *(2 * row[f"{side}_error"] for row in case.values())]
                label = kind if side == "lower" else None
                panel.errorbar(
                    particles, values, yerr=errors, color=plots.COLORS[i], marker="os"[i], markersize=4, linewidth=1.4, label=label
                )
        panel.axhline(0, color="#777777", linewidth=0.9, linestyle="--")
        panel.set_xscale("log", base=2)
        panel.legend(frameon=False, fontsize=8.5)
        title = "Prior as proposal" if proposal == "base" else "Twist-induced proposal"
        _finish(panel, title=title, xlabel="particles", ylabel="bound minus log Z (nats)")
    plots.save(figure, path)


def frontier(path: Path, found: Mapping[str, Any]) -> None:
    """Reward over KL of the tilt and of best-of-N, first world; and for a binary reward, the KL beside the bound."""
    figure, grid = plots.axes(columns=2, width=9.6, height=3.6)
    kl, counts = found["kl"][0], found["best_of"]
    grid[0, 0].plot([0.0, *kl], [found["prior"][0], *found["tilt"][0]], color=plots.COLORS[0], marker="o", markersize=4, label="posterior")
    grid[0, 0].plot(
        [0.0, *kl], [found["prior"][0], *found["reward"][0]], color=plots.COLORS[1], marker="s", markersize=4, label="best-of-N"
    )
    grid[0, 0].legend(frameon=False)
    _finish(grid[0, 0], title="At equal KL", xlabel="KL from the prior (nats)", ylabel="expected reward")
    grid[0, 1].plot(counts, found["bound"][0], color=plots.COLORS[2], marker="^", markersize=4, label="log N - (N-1)/N")
    grid[0, 1].plot(counts, found["binary"][0], color=plots.COLORS[1], marker="s", markersize=4, label="KL, binary reward")
    grid[0, 1].axhline(-np.log(found["success"][0]), color="#777777", linewidth=0.9, linestyle="--", label="log 1/Z")
    grid[0, 1].set_xscale("log", base=2)
    grid[0, 1].legend(frameon=False)
    _finish(grid[0, 1], title="The bound is not the KL", xlabel="N", ylabel="nats")
    plots.save(figure, path)


def coverage(path: Path, found: Mapping[str, Any]) -> None:
    """pass@k over k, mean over worlds."""
    figure, grid = plots.axes(width=7.2, height=3.6)
    for i, (name, rows) in enumerate(found["passes"].items()):
        style = {"color": plots.COLORS[i % len(plots.COLORS)], "marker": "os^Dv"[i % 5], "markersize": 5, "label": name}
        grid[0, 0].plot(found["attempts"], np.mean(np.asarray(rows, float), axis=0), **style)
    grid[0, 0].set_xscale("log")
    grid[0, 0].set_xticks(found["attempts"], [str(k) for k in found["attempts"]])
    grid[0, 0].minorticks_off()
    grid[0, 0].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _finish(grid[0, 0], title="Attempts at a problem", xlabel="attempts k", ylabel="pass@k")
    plots.save(figure, path)


def text(path: Path, found: Mapping[str, Any], title: str) -> None:
    """Divergence from the decoder and reward over steps, by method."""
    figure, grid = plots.axes(columns=2, width=11.6, height=3.8)
    for i, (name, row) in enumerate(found["methods"].items()):
        if "curves" not in row:
            continue
        style = {
            "color": plots.COLORS[i % len(plots.COLORS)],
            "label": name,
            "linewidth": 1.4,
            "linestyle": ("-", "--")[i // len(plots.COLORS)],
        }
        for panel, key in zip(grid[0], ("reward", "kl_prior")):
            values = np.mean(np.asarray(row["curves"][key], float), axis=0)
            panel.plot(np.arange(len(values)) * found["stride"], values, **style)
    grid[0, 1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _finish(grid[0, 0], title=title, xlabel="step", ylabel="mean reward of the samples")
    _finish(grid[0, 1], title="Divergence from the decoder", xlabel="step", ylabel="log pi - log pi0 (nats per text)")
    plots.save(figure, path)
