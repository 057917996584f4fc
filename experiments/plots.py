"""Pictures in one hand: colour-blind safe, legible when printed, saved as PNG without a display.

The functions take arrays and a path and build a figure object of their own, so they change no global state of matplotlib's.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from janax.experiments.statistics import mean_interval

__all__ = ["COLORS", "axes", "dots", "image_grid", "intervals", "lines", "save"]

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#3d3d3d")
"""Wong's palette (Nature Methods 8:441), ordered so that neighbours differ in lightness as well; see also `_DASHES`."""

_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def axes(*, rows: int = 1, columns: int = 1, width: float = 5.2, height: float = 3.2) -> tuple[Figure, np.ndarray]:
    """A figure and its [rows columns] axes in the house style, sizes in inches of the whole figure; finish it with `save`."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Figure, path: Path) -> Path:
    """Writes the PNG, 160 dots per inch, and makes its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_STYLE):
        figure.savefig(path, dpi=160, metadata={"Software": None})
    return path


def lines(
    path: Path,
    series: Mapping[str, Sequence[Any]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    xscale: str = "linear",
    yscale: str = "linear",
    reference: Mapping[str, float] | None = None,
    markers: bool = False,
) -> Path:
    """Curves, each with an interval if it has one.

    Args:
      path: PNG to write.
      series: name -> (x [n], y [n]) or (x [n], y [n], low [n], high [n]).
      xlabel: With the unit.
      ylabel: With the unit.
      title: Says what the picture shows.
      xscale: A matplotlib scale.
      yscale: A matplotlib scale.
      reference: name -> value, horizontal lines, e.g. the paper's number.
      markers: Mark the points, for curves of a few points.

    Returns:
      `path`.
    """
    figure, grid = axes()
    with mpl.rc_context(_STYLE):
        _draw_lines(grid[0, 0], series, reference or {}, markers)
        grid[0, 0].set(xlabel=xlabel, ylabel=ylabel, title=title, xscale=xscale, yscale=yscale)
    return save(figure, path)


def _draw_lines(panel: Axes, series: Mapping[str, Sequence[Any]], reference: Mapping[str, float], markers: bool) -> None:
    for i, (name, values) in enumerate(series.items()):
        x, y, *band = (np.asarray(v, dtype=np.float64) for v in values)
        color, dash = COLORS[i % len(COLORS)], _DASHES[i % len(_DASHES)]
        marker = _MARKERS[i % len(_MARKERS)] if markers or len(x) == 1 else None
        panel.plot(x, y, color=color, linestyle=dash, label=name, marker=marker, markersize=5)
        if band:
            panel.fill_between(x, band[0], band[1], color=color, alpha=0.18, linewidth=0)
    _draw_references(panel, reference)
    if len(series) > 1:
        panel.legend(loc="best")


def _draw_references(panel: Axes, reference: Mapping[str, float]) -> None:
    for name, value in reference.items():
        panel.axhline(value, color="#777777", linewidth=1.0, linestyle=(0, (4, 3)))
        panel.annotate(name, (1.0, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8.5, color="#555555")


def dots(
    path: Path,
    values: Mapping[str, tuple[float, float, float]],
    *,
    ylabel: str,
    title: str = "",
    reference: Mapping[str, float] | None = None,
) -> Path:
    """Points with intervals side by side: name -> (value, low, high); a dot and whiskers, no bar that would have to start at zero."""
    figure, grid = axes(width=max(4.0, 1.1 * len(values) + 1.8))
    panel: Axes = grid[0, 0]
    with mpl.rc_context(_STYLE):
        for i, (value, low, high) in enumerate(values.values()):
            color, marker = COLORS[i % len(COLORS)], _MARKERS[i % len(_MARKERS)]
            error = [[max(value - low, 0.0)], [max(high - value, 0.0)]] if math.isfinite(high - low) else None
            panel.errorbar([i], [value], yerr=error, fmt=marker, color=color, markersize=7, capsize=4, elinewidth=1.8)
        _draw_references(panel, reference or {})
        panel.set(ylabel=ylabel, title=title, xlim=(-0.6, len(values) - 0.4))
        panel.set_xticks(range(len(values)), list(values))
    return save(figure, path)


def image_grid(
    path: Path,
    images: Any,
    *,
    columns: int | None = None,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    limits: tuple[float, float] | None = None,
    cell: float = 0.75,
) -> Path:
    """Images side by side, drawn as one picture with thin white seams and no smoothing.

    Args:
      path: PNG to write.
      images: [n h w] grey, [n h w 1] or [n h w 3], in reading order.
      columns: Images in a row; about square by default.
      row_labels: One per row, at the left.
      column_labels: One per column, on top.
      limits: Values of black and white; the smallest and largest by default. Applies to colour images, too.
      cell: Edge of an image in inches.

    Returns:
      `path`.

    Raises:
      ValueError: if the images have another number of axes, or there are none.
    """
    pixels = np.asarray(images, dtype=np.float64)
    pixels = pixels[..., 0] if pixels.ndim == 4 and pixels.shape[-1] == 1 else pixels
    if pixels.ndim not in (3, 4) or (pixels.ndim == 4 and pixels.shape[-1] != 3) or not len(pixels):
        raise ValueError(f"image_grid: 'images' has shape {np.shape(images)}, expected [n h w], [n h w 1] or [n h w 3] with n > 0")
    low, high = limits if limits is not None else (float(np.nanmin(pixels)), float(np.nanmax(pixels)))
    pixels = np.clip((pixels - low) / max(high - low, 1e-12), 0.0, 1.0)
    count, height, width = pixels.shape[:3]
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    seam = max(1, round(min(height, width) / 12))
    canvas = np.ones((rows * (height + seam) - seam, columns * (width + seam) - seam, *pixels.shape[3:]))
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (height + seam), (i % columns) * (width + seam)
        canvas[top : top + height, left : left + width] = image
    margin = 0.16 + 0.085 * max((len(label) for label in row_labels), default=0)
    head = 0.3 if column_labels else 0.08
    size = (margin + columns * cell, head + rows * cell * height / width)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size)
        FigureCanvasAgg(figure)
        panel = figure.add_axes((margin / size[0], 0.02, (columns * cell - 0.04) / size[0], 1 - head / size[1] - 0.02))
    panel.imshow(canvas, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest", aspect="auto")
    panel.set_axis_off()
    for i, label in enumerate(row_labels):
        y = i * (height + seam) + height / 2 - 0.5
        panel.text(-0.01 * canvas.shape[1] - 0.5, y, label, ha="right", va="center", fontsize=9, color="#222222")
    for i, label in enumerate(column_labels):
        x = i * (width + seam) + width / 2 - 0.5
        panel.text(x, -0.6 - 0.02 * canvas.shape[0], label, ha="center", va="bottom", fontsize=9, color="#222222")
    return save(figure, path)


def intervals(path: Path, groups: Mapping[str, Mapping[str, Sequence[float]]], *, xlabel: str, title: str, reference: str = "") -> Path:
    """Means with 95 % intervals over seeds, a row each.

    Args:
      path: PNG to write.
      groups: heading of a group -> name of a row -> [seeds] values.
      xlabel: With the unit.
      title: Says what the picture shows.
      reference: The row at whose mean a line is drawn.

    Returns:
      `path`.
    """
    names = [name for group in groups.values() for name in group]
    figure, grid = axes(width=6.8, height=0.27 * len(names) + 1.2)
    panel = grid[0, 0]
    ticks, height = [], 0.0
    for i, (heading, group) in enumerate(groups.items()):
        label = heading
        for name, values in group.items():
            estimate = mean_interval(values)
            color, marker = COLORS[i % len(COLORS)], "os^Dv"[i % 5]
            error = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
            panel.errorbar([estimate.value], [height], xerr=error, fmt=marker, color=color, markersize=5.5, capsize=3, label=label or None)
            if name == reference:
                panel.axvline(estimate.value, color="#777777", linewidth=1.0, linestyle=(0, (4, 3)), zorder=0)
            label = ""
            ticks.append((height, name))
            height += 1.0
        height += 0.6
    panel.set_yticks([y for y, _ in ticks], [name for _, name in ticks])
    panel.set_ylim(height - 0.9, -0.7)
    panel.grid(visible=False)
    panel.grid(visible=True, axis="x", color="#e9e9e9", linewidth=0.8)
    if len(groups) > 1:
        panel.legend(loc="best", frameon=False, fontsize=8.5)
    panel.set(xlabel=xlabel)
    panel.set_title(title, loc="left", fontsize=11, fontweight="bold")
    return save(figure, path)
