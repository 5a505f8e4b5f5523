"""Charts as what an inline SVG needs: lines and points in px of a fixed frame, ticks, and the same in words."""

import dataclasses
import math
from collections.abc import Sequence

from matplotlib import ticker

from depthlm_jax.eval.metrics import DELTA

WIDTH, HEIGHT, SQUARE = 380, 220, 380  # px; a chart is shown about as large, so that its letters can be read
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 26, 34  # px between the frame and what is drawn
MOST_POINTS = 300  # of a line; of more, the smallest and the largest of each stretch are kept
MOST_MARKS = 60  # a line of so many points shows them
MOST_DRAWN = 1500  # points of a scatter
COLORS, DASHES = 6, ("", "7 3", "2 3", "9 3 2 3")
SHAPES = {  # of a mark, from its middle
    "right": "m-2.6,0a2.6,2.6 0 1,0 5.2,0a2.6,2.6 0 1,0 -5.2,0", "wrong": "m-3.4,0l3.4,-3.4 3.4,3.4 -3.4,3.4z",
    "outside the axes": "m-3.6,2.6l3.6,-6 3.6,6z",
}  # fmt: skip

Points = Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart; its place among the lines gives it colour and dashes."""

    name: str
    points: Points
    place: int | None  # None: grey and dashed, what the others are compared with


@dataclasses.dataclass(frozen=True)
class Axis:
    """Numbers → px."""

    low: float
    high: float
    log: bool
    start: float
    end: float
    whole: bool = False  # only whole numbers are marked

    def at(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[dict]:
        """Returns what is marked: px and text."""
        values = _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high, self.whole)
        return [{"at": self.at(value), "text": brief(value)} for value in values if self.low <= value <= self.high]


def brief(value: float) -> str:
    """Returns a number in a few characters."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def line_chart(title: str, unit: str, lines: list[Line], *, log: bool = False, zero: bool = False) -> dict | None:
    """Returns a chart over optimizer steps; None if no line has a point.

    Args:
      title: what is drawn.
      unit: of it, in words.
      lines: with finite values.
      log: use a log axis if the values span more than a decade.
      zero: the axis begins at 0.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    steps, values = ([point[i] for line in lines for point in line.points] for i in (0, 1))
    across = _axis(steps, LEFT, WIDTH - RIGHT, whole=True)
    log = log and min(values) > 0 and max(values) > 10 * min(values)
    upward = _axis([*values, *([0.0] if zero and not log else [])], HEIGHT - BOTTOM, TOP, log=log)
    drawn = [_drawn(line, across, upward, alone=len(lines) == 1) for line in lines]
    return _frame(title, unit, "optimizer step", HEIGHT, across, upward) | {
        "lines": drawn, "text": f"{title}, {unit}, over optimizer steps. {' '.join(map(_in_words, lines))}",
        "last": brief(lines[0].points[-1][1]) if len(lines) == 1 else "",
    }  # fmt: skip


def scatter_chart(
    title: str, unit: str, points: Points, groups: dict[str, Sequence[int]], names: Sequence[str], edges: tuple
) -> dict:
    """Returns answers against the truth on log axes, with the band that δ1 counts as right.

    Args:
      title: what is drawn.
      unit: of truth and answers.
      points: (truth, answer), inside the edges.
      groups: one of SHAPES → which points are of it.
      names: of the points, in words.
      edges: of both axes.
    """
    low, high = edges
    across, upward = Axis(low, high, True, LEFT, SQUARE - RIGHT), Axis(low, high, True, SQUARE - BOTTOM, TOP)
    every = -(-len(points) // MOST_DRAWN)
    marks = [
        {"d": f"M{across.at(points[i][0])},{upward.at(points[i][1])}{SHAPES[group]}", "group": group, "name": names[i]}
        for group, chosen in groups.items() for i in chosen if i % every == 0
    ]  # fmt: skip
    below, above = [(low * DELTA, low), (high, high / DELTA)], [(high / DELTA, high), (low, low * DELTA)]
    band = [(low, low), *below, (high, high), *above]
    counts = {group: len(chosen) for group, chosen in groups.items() if len(chosen)}
    said = ", ".join(f"{count} {group}" for group, count in counts.items())
    return _frame(title, f"answer ({unit})", f"truth ({unit})", SQUARE, across, upward) | {
        "marks": marks, "groups": [{"name": name, "d": SHAPES[name], "count": counts[name]} for name in counts],
        "band": " ".join(f"{across.at(x)},{upward.at(y)}" for x, y in band),
        "text": f"{title} against the truth in {unit}, of {len(points)} points: {said or 'none could be read'}.",
        "note": f"every {every}th point is drawn" if every > 1 else "",
    }  # fmt: skip


def style(place: int | None) -> dict:
    """Returns colour (a class) and dashes of the line at a place."""
    if place is None:
        return {"color": "reference", "dash": "5 4"}
    return {"color": f"s{place % COLORS}", "dash": DASHES[place // COLORS % len(DASHES)]}


def _frame(title: str, unit: str, across_text: str, height: int, across: Axis, upward: Axis) -> dict:
    return {
        "title": title, "unit": unit, "across_text": across_text, "width": WIDTH, "height": height,
        "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": height - BOTTOM, "across": across.ticks(),
        "upward": upward.ticks(), "lines": [], "marks": [], "groups": [], "band": "", "note": "", "last": "",
    }  # fmt: skip


def _drawn(line: Line, across: Axis, upward: Axis, alone: bool) -> dict:
    kept = thin(line.points)
    spots = [(across.at(step), upward.at(value)) for step, value in kept]
    marks = [
        {"x": x, "y": y, "text": f"{'' if alone else f'{line.name}, '}step {brief(step)}: {brief(value)}"}
        for (x, y), (step, value) in zip(spots, kept, strict=True)
    ]
    return {
        "name": line.name, "path": "M" + "L".join(f"{x},{y}" for x, y in spots), "marks": marks,
        "marked": len(kept) <= MOST_MARKS and line.place is not None, "last": brief(line.points[-1][1]),
    } | style(line.place)  # fmt: skip


def _in_words(line: Line) -> str:
    (first, begun), (last, ended) = line.points[0], line.points[-1]
    values = [value for _, value in line.points]
    return (
        f"{line.name or 'It'}: {brief(begun)} at step {brief(first)}, {brief(ended)} at step {brief(last)}, "
        f"between {brief(min(values))} and {brief(max(values))}."
    )


def thin(points: Points) -> Points:
    """Returns at most MOST_POINTS points, the first, the last, and those that stand out among them."""
    if len(points) <= MOST_POINTS:
        return points
    stretch = -(-len(points) // (MOST_POINTS // 2 - 1))
    kept = {points[0], points[-1]}
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept |= {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
    return sorted(kept)


def _axis(values: Sequence[float], start: float, end: float, *, log: bool = False, whole: bool = False) -> Axis:
    low, high = min(values), max(values)
    if log:
        return Axis(low / 1.1, high * 1.1, True, start, end)
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return Axis(low - (0 if low == 0 else margin), high + margin, False, start, end, whole)


def _linear_ticks(low: float, high: float, whole: bool) -> list[float]:
    return ticker.MaxNLocator(5, steps=[1, 2, 5, 10], integer=whole).tick_values(low, high).tolist()


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if high < 2000 * low else (1,)
    return [digit * 10.0**power for power in powers[:: max(1, len(powers) // 6)] for digit in digits]
