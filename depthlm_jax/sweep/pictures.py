"""Pictures of a sweep: the score against each swept value, and over the mixtures of sources."""

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps, ticker, tri
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from depthlm_jax.config_rules import HIGHER
from depthlm_jax.eval.report import GREY, INK, write_picture
from depthlm_jax.sweep.expand import MEAN, short
from depthlm_jax.sweep.results import Group

COLORS = ("#1f5fa8", "#d9730d", "#0a7d33", "#8a4fb0", "#b8860b", "#00838f")
DPI = 120
PANEL_INCHES = 4.2
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])
DECADE = 10.0  # numbers that span more stand on a log axis
ASIDE = 0.008  # of the axis
MARGIN = 0.03
SHARES = (*HIGHER, "parse_failure_rate")  # scores that are at most 1
SCALE = colormaps["viridis"]
CAPTIONS = {"values.png": "The metric over swept values", "mixture.png": "Scores over the shares of the sources"}


def draw(ranked: list[Group], paths: Sequence[str], metric: str, sets: list[str], folder: Path) -> list[Path]:
    """Returns the pictures that were written; nothing is drawn where no run is finished.

    Args:
      ranked: groups of runs.
      paths: that are swept, without seeds.
      metric: that ranks.
      sets: that are evaluated.
      folder: for the pictures.
    """
    done = [group for group in ranked if not math.isnan(group.estimate(metric)[0])]
    weights = [path for path in paths if re.fullmatch(r"data\.sources\.[^.]+\.weight", path)]
    weights = weights if len(weights) > 1 else []
    panels = [path for path in paths if path not in weights and len({repr(one.values.get(path)) for one in done}) > 1]
    drawn = []
    if panels:
        drawn.append((folder / "values.png", _draw_values(done, panels, metric)))
    if weights and done:
        best = {tuple(group.values.get(path) for path in weights): group for group in reversed(done)}
        kind = {2: _draw_curve, 3: _draw_triangle}.get(len(weights), _draw_parallel)
        figure = kind(list(best.values()), [short(path) for path in weights], metric, sets)
        if panels:
            figure.suptitle("of each mixture, the runs with the best other values", fontsize=10, color=GREY)
        drawn.append((folder / "mixture.png", figure))
    for file, figure in drawn:
        write_picture(file, lambda figure=figure, file=file: figure.savefig(file, dpi=DPI))
    return [file for file, _ in drawn]


def _draw_values(groups: list[Group], paths: list[str], metric: str) -> Figure:
    """Returns a panel for each path: a point for each group, with its interval; a line through the means at a value."""
    figure = Figure(figsize=(PANEL_INCHES * len(paths) + 0.6, 4.2), layout="constrained")
    for path, axes in zip(paths, figure.subplots(1, len(paths), sharey=True, squeeze=False)[0], strict=True):
        values = [group.values.get(path) for group in groups]
        numeric = all(type(value) in (int, float) for value in values)
        names = sorted({str(value) for value in values})
        places = [value if numeric else names.index(str(value)) for value in values]
        means, halves = np.array([group.estimate(metric) for group in groups]).T
        at = sorted(set(places))
        line = [np.mean([mean for mean, place in zip(means, places, strict=True) if place == one]) for one in at]
        if numeric:
            axes.plot(at, line, color=COLORS[0], linewidth=1.2, alpha=0.5)
            _scale(axes, at)
        else:
            axes.set_xticks(range(len(names)), names)
            axes.margins(x=0.2)
        _points(axes, places, means, halves, COLORS[0], "")
        axes.set(xlabel=path)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(metric)
    _cut(figure.axes[0], metric.partition("/")[2])
    return figure


def _scale(axes: Axes, values: Sequence[float]) -> None:
    if min(values) > 0 and max(values) > DECADE * min(values):
        axes.set_xscale("log")
    if len(values) <= 6:
        axes.set_xticks(values, [f"{value:.3g}" for value in values])
        axes.xaxis.set_minor_locator(ticker.NullLocator())


def _points(axes: Axes, places, means, halves, color: str, label: str, size: float = 5) -> None:
    """Draws means with their intervals, without a bar where there is no interval."""
    bars = np.where(np.isnan(halves), 0, halves)
    axes.errorbar(places, means, bars, fmt="o", color=color, capsize=3, markersize=size, linewidth=1.2, label=label)


def _cut(axes: Axes, measure: str) -> None:
    """Leaves out of the axis what no score can be: intervals of two or three runs reach far."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -MARGIN), min(high, 1 + MARGIN) if measure in SHARES else high)


def _draw_curve(groups: list[Group], names: list[str], metric: str, sets: list[str]) -> Figure:
    """Returns the score over the share of the first of two sources: a line for each set, one for their mean."""
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes, measure = figure.subplots(), metric.partition("/")[2]
    groups = sorted(groups, key=lambda group: _mixture(group, names)[0])
    share_G = np.array([_mixture(group, names)[0] for group in groups])
    mean = [(MEAN, INK)] if len(sets) > 1 else []
    for number, (name, color) in enumerate([*zip(sets, itertools.cycle(COLORS), strict=False), *mean]):
        means, halves = np.array([group.estimate(f"{name}/{measure}") for group in groups]).T
        axes.plot(share_G, means, color=color, linewidth=2.2 if name == MEAN else 1.3)
        # Beside one another, so that intervals can be told apart.
        _points(axes, share_G + (number - len(sets) / 2) * ASIDE, means, halves, color, name, 7 if name == MEAN else 5)
    axes.set(xlabel=f"share of {names[0]} in the samples; the rest is {names[1]}", ylabel=measure)
    axes.grid(alpha=0.3)
    axes.legend()
    _cut(axes, measure)
    return figure


def _mixture(group: Group, names: list[str]) -> np.ndarray:
    """Returns the shares of the sources in the samples, of these sources alone."""
    found = [[result.numbers.get(f"share/{name}", 0.0) for name in names] for result in group.results]
    share_S = np.mean(found, axis=0)
    return share_S / max(share_S.sum(), 1e-9)


def _draw_triangle(groups: list[Group], names: list[str], metric: str, sets: list[str]) -> Figure:
    """Returns the score over the mixtures of three sources; a corner is one of them alone."""
    figure = Figure(figsize=(7.2, 6.0), layout="constrained")
    axes = figure.subplots()
    at_G2 = np.array([_mixture(group, names) for group in groups]) @ CORNERS
    mean_G = np.array([group.estimate(metric)[0] for group in groups])
    low, high = mean_G.min(), max(mean_G.max(), mean_G.min() + 1e-9)
    if len(groups) > 3 and np.ptp(at_G2, axis=0).min() > 0.01:  # not all on one line
        levels = np.linspace(low, high, 12)
        axes.tricontourf(tri.Triangulation(*at_G2.T), mean_G, levels, cmap=SCALE, alpha=0.55, vmin=low, vmax=high)
    axes.plot(*CORNERS[[0, 1, 2, 0]].T, color=GREY, linewidth=1)
    points = axes.scatter(*at_G2.T, c=mean_G, cmap=SCALE, vmin=low, vmax=high, s=60, edgecolor=INK, zorder=3)
    for place, mean in zip(at_G2, mean_G, strict=True):
        axes.annotate(f"{mean:.3f}", place, (0, 8), textcoords="offset points", ha="center", fontsize=9)
    for corner, name, (x, y) in zip(CORNERS, names, ((-8, -18), (8, -18), (0, 22)), strict=True):
        axes.annotate(name, corner, (x, y), textcoords="offset points", ha="center", fontsize=11, weight="bold")
    axes.set(aspect="equal", xlim=(-0.12, 1.12), ylim=(-0.12, 1.0))
    axes.axis("off")
    figure.colorbar(points, ax=axes, label=metric, shrink=0.7)
    return figure


def _draw_parallel(groups: list[Group], names: list[str], metric: str, sets: list[str]) -> Figure:
    """Returns a line for each mixture through the shares of its sources, coloured by its score."""
    figure = Figure(figsize=(1.6 * len(names) + 2, 4.8), layout="constrained")
    axes = figure.subplots()
    mean_G = np.array([group.estimate(metric)[0] for group in groups])
    low, spread = mean_G.min(), max(mean_G.max() - mean_G.min(), 1e-9)
    for group, mean in sorted(zip(groups, mean_G, strict=True), key=lambda pair: pair[1]):
        color = SCALE((mean - low) / spread)
        axes.plot(range(len(names)), _mixture(group, names), color=color, marker="o", markersize=4)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="share in the samples", ylim=(-0.03, None))
    axes.grid(alpha=0.3)
    scale = figure.colorbar(axes.scatter([], [], c=[], cmap=SCALE, vmin=low, vmax=low + spread), ax=axes)
    scale.set_label(metric)
    return figure
