"""Pictures of the study: densities, slopes, accuracies with intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from janax.experiments import plots
from janax.experiments.sinkd import analyses
from janax.experiments.statistics import Estimate, mean_interval

__all__ = ["ablations", "lost_class", "modes", "moving_apart", "saturation", "sets"]


def _finish(panel: Any, *, title: str, xlabel: str = "", ylabel: str = "", **more: Any) -> None:
    panel.set(xlabel=xlabel, ylabel=ylabel, **more)
    panel.set_title(title, loc="left", fontsize=11, fontweight="bold")


def modes(path: Path, found: Mapping[str, Any]) -> None:
    """The teacher's density and the best normal students."""
    x = np.linspace(-8, 8, 600)

    def normal(mean: float, spread: float) -> np.ndarray:
        return np.exp(-0.5 * ((x - mean) / spread) ** 2) / (spread * np.sqrt(2 * np.pi))

    teacher = 0.5 * (normal(-analyses.MODE, analyses.SPREAD) + normal(analyses.MODE, analyses.SPREAD))
    panels = (("KL averages", ("KL",)), ("RKL, JS, TVD collapse", ("RKL", "JS", "TVD")), ("W1, W2 average as well", ("W1", "W2 squared")))
    figure, grid = plots.axes(columns=3, width=10.5, height=3.0)
    for panel, (title, names) in zip(grid[0], panels):
        panel.fill_between(x, teacher, color="#d0d0d0", linewidth=0, label="teacher")
        for i, name in enumerate(names):
            best = found[name]
            panel.plot(x, normal(best["mean"], best["spread"]), color=plots.COLORS[i], linestyle=("-", "--", "-.")[i], label=name)
        panel.legend(loc="upper left", frameon=False, fontsize=8.5)
        _finish(panel, title=title, xlabel="x", ylabel="density" if panel is grid[0][0] else "", ylim=(0, 0.95))
    plots.save(figure, path)


def moving_apart(path: Path, found: Mapping[str, Any]) -> None:
    """Slopes over the distance of two normals."""
    series = {name: (analyses.DISTANCES, np.abs(found[name]["slope"])) for name in ("KL", "W1", "JS", "TVD")}
    plots.lines(
        path,
        series,
        xlabel="distance of two unit normals",
        ylabel="slope",
        title="JS and TVD lose their slope",
        yscale="log",
        markers=True,
    )


def lost_class(path: Path, found: Mapping[str, Any]) -> None:
    """Slopes over the share that the student has kept."""
    figure, grid = plots.axes(width=6.4, height=3.6)
    panel = grid[0, 0]
    order = sorted(found, key=lambda name: found[name][-1])  # the steepest first
    for i, name in enumerate(order):
        color, marker = plots.COLORS[i % len(plots.COLORS)], "os^DvPX"[i % 7]
        panel.plot(analyses.SHARES, np.abs(found[name]), color=color, marker=marker, markersize=4.5, label=name)
    panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    _finish(
        panel,
        title="A class the student has nearly lost",
        xlabel="student's share of the class (teacher: 0.1)",
        ylabel="|derivative| in its logit",
        xscale="log",
        yscale="log",
    )
    panel.invert_xaxis()
    plots.save(figure, path)


def saturation(path: Path, found: Mapping[str, float]) -> None:
    """Largest derivatives where outputs are disjoint."""
    names = sorted(found, key=lambda name: found[name])
    figure, grid = plots.axes(width=6.4, height=0.32 * len(names) + 1.0)
    panel = grid[0, 0]
    for i, name in enumerate(names):
        ours = name.startswith("SinKD")
        color = plots.COLORS[1] if ours else plots.COLORS[0]
        panel.plot([1e-56, found[name]], [i, i], color="#e3e3e3", linewidth=1.2, zorder=1)
        panel.plot([found[name]], [i], "s" if ours else "o", color=color, markersize=7, zorder=2)
    panel.set_yticks(range(len(names)), names)
    panel.grid(visible=False)
    _finish(
        panel, title="Sure of different classes: what pulls?", xlabel="largest |derivative| in a logit", xscale="log", xlim=(1e-56, 1e4)
    )
    plots.save(figure, path)


def sets(path: Path, found: Mapping[str, Mapping[str, float]]) -> None:
    """Losses of random, permuted and equal students."""
    losses = ("paired L1", "anchored 3", "SinKD", "debiased")
    figure, grid = plots.axes(width=6.4, height=3.0)
    panel = grid[0, 0]
    for i, (kind, label) in enumerate((("random", "random rows"), ("permuted", "teacher's rows, permuted"), ("equal", "teacher's rows"))):
        values = [max(found[kind][loss], 0.0) for loss in losses]
        panel.plot(
            np.arange(len(losses)) + 0.16 * (i - 1), values, "os^"[i], color=plots.COLORS[i], markersize=8, linestyle="", label=label
        )
    panel.set_xticks(range(len(losses)), losses)
    panel.legend(loc="upper right", frameon=False)
    _finish(panel, title="A loss between sets does not see who is who", ylabel="loss, sum over 32 rows", ylim=(-1.5, None))
    plots.save(figure, path)


def ablations(path: Path, found: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], labels: Mapping[str, str]) -> None:
    """Test accuracy over one constant per panel, a line per variant."""
    figure, grid = plots.axes(columns=len(found), width=3.0 * len(found), height=3.1)
    lows: list[float] = []
    for panel, (constant, by_value) in zip(grid[0], found.items()):
        x = [float(value) for value in by_value]
        for i, variant in enumerate(next(iter(by_value.values()))):
            estimates: list[Estimate] = [mean_interval(variants[variant]) for variants in by_value.values()]
            y, low, high = ([getattr(e, part) for e in estimates] for part in ("value", "low", "high"))
            panel.plot(x, y, "-" if i else "--", marker="os^"[i % 3], markersize=4.5, color=plots.COLORS[i], label=variant)
            panel.fill_between(x, low, high, color=plots.COLORS[i], alpha=0.15, linewidth=0)
            lows += low
        _finish(panel, title="", xlabel=labels[constant], xscale="log")
        panel.set_xticks(x, [f"{value:g}" for value in x])
        panel.minorticks_off()
    grid[0][0].set_ylabel("test accuracy")
    grid[0][0].legend(loc="lower right", frameon=False, fontsize=8.5)
    top = max(panel.get_ylim()[1] for panel in grid[0])
    for panel in grid[0]:
        panel.set_ylim(min(lows) - 0.005, top)
    plots.save(figure, path)
