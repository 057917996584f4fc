"""Pictures of the study: scores along the way, designs as logos, predictions against the oracle, medians with intervals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.patches import PathPatch
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D

from janax.experiments import plots

__all__ = ["features", "logos", "predictions", "trajectories"]

_LETTER_COLORS = {"A": "#2f9e44", "C": "#1971c2", "G": "#f08c00", "T": "#e03131"}


def _finish(panel: Any, *, title: str, **more: Any) -> None:
    panel.set(**more)
    panel.set_title(title, loc="left", fontsize=11, fontweight="bold")


def trajectories(path: Path, found: Mapping[str, Any]) -> None:
    """Median true score of the designs after every step, and the weight of the forward loss, one panel each for every split."""
    figure, grid = plots.axes(rows=2, columns=len(found), width=5.4 * len(found), height=5.6)
    for column, (split, variants) in enumerate(found.items()):
        for i, (name, reports) in enumerate(variants.items()):
            curves = reports[0].get("curves")
            if curves:
                grid[0, column].plot(curves["median"], color=plots.COLORS[i % len(plots.COLORS)], label=name, linewidth=1.3)
                if "Adaptive-gamma" in name:
                    grid[1, column].plot(curves["gamma"], color=plots.COLORS[i % len(plots.COLORS)], label=name, linewidth=1.3)
        grid[0, column].legend(frameon=False, fontsize=7.5, loc="lower right")
        _finish(grid[0, column], title=split, ylabel="median true score", xlabel="")
        _finish(grid[1, column], title="weight of the forward loss", ylabel="gamma", xlabel="step", ylim=(-0.03, 1.03))
    plots.save(figure, path)


def logos(path: Path, batches: Mapping[str, np.ndarray], letters: str = "ACGT") -> None:
    """Batches of sequences [m l] as sequence logos: height of a column is its information in bits, shared by frequency."""
    figure, grid = plots.axes(columns=len(batches), width=3.1 * len(batches), height=2.4)
    tallest = 0.1
    font = FontProperties(family="DejaVu Sans Mono", weight="bold")
    for panel, (title, tokens) in zip(grid[0], batches.items()):
        share = np.stack([(tokens == i).mean(axis=0) for i in range(len(letters))], axis=1)
        entropy = -np.sum(np.where(share > 0, share * np.log2(np.where(share > 0, share, 1)), 0), axis=1)
        heights = share * (np.log2(len(letters)) - entropy)[:, None]
        tallest = max(tallest, float(heights.sum(axis=1).max()))
        for place, column in enumerate(heights):
            bottom = 0.0
            for i in np.argsort(column):
                if column[i] > 0.005:
                    shape = TextPath((0, 0), letters[i], size=1, prop=font)
                    box = shape.get_extents()
                    scale = Affine2D().translate(-box.x0, -box.y0).scale(0.9 / box.width, column[i] / box.height)
                    where = scale.translate(place + 0.55, bottom) + panel.transData
                    panel.add_patch(PathPatch(shape, transform=where, color=_LETTER_COLORS.get(letters[i], "#495057"), linewidth=0))
                    bottom += column[i]
        _finish(panel, title=title, xlim=(0.5, tokens.shape[1] + 0.5), xlabel="place")
    for panel in grid[0]:
        panel.set_ylim(0, min(1.1 * tallest, np.log2(len(letters))))
    grid[0, 0].set_ylabel("bits")
    plots.save(figure, path)


def predictions(path: Path, found: Mapping[str, Any]) -> None:
    """What the auxiliary heads predicted for the designs at the last step, and what they score."""
    figure, grid = plots.axes(columns=len(found), width=4.2 * len(found), height=3.6)
    for panel, (title, curves) in zip(grid[0], found.items()):
        panel.scatter(curves["predicted"], curves["end"], s=14, color=plots.COLORS[0], alpha=0.6, linewidth=0)
        low, high = min(curves["predicted"] + curves["end"]), max(curves["predicted"] + curves["end"])
        panel.plot([low, high], [low, high], color="#868e96", linewidth=0.9, linestyle="--")
        _finish(panel, title=title, xlabel="predicted score", ylabel="true score")
    plots.save(figure, path)


def features(path: Path, found: Mapping[str, Any]) -> None:
    """Rank correlation over the ridge, by kind of features."""
    plots.lines(
        path,
        {kind: (row["ridge"], row["spearman"]) for kind, row in found.items()},
        xlabel="relative ridge",
        ylabel="Spearman, uniform sequences",
        title="Features by ridge",
        xscale="log",
        markers=True,
    )
