"""Pictures and tables that a person looks at: how training went, how answers compare."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from depthlm_jax.config_rules import COLORS
from depthlm_jax.data import tasks
from depthlm_jax.data.transforms import Example
from depthlm_jax.errors import InputError
from depthlm_jax.eval.metrics import DELTA

TILE_PX = 336  # width of a picture in a sheet
GAP_PX = 14
FONT_PX = 13
LINE_PX = 18
CLOSE_UP_PX, CLOSE_UP_ZOOM = 36, 3  # what is shown of a large image around its marker, in its own pixels
MAX_BYTES = 1_000_000  # a larger sheet is reduced to 256 colours
RAW_CHARACTERS = 160  # shown of an answer that could not be read
UNITS = dict.fromkeys(tasks.TASKS, "m") | {"speed": "m/s", "time": "s"}  # of truth and answer
POINT_KEY = f"circle: a point asked for (of a large image also ×{CLOSE_UP_ZOOM}, in a corner)"
RIGHT, WRONG, INK, GREY, PAPER = "#0a7d33", "#c4161c", "#111111", "#6e6e6e", "#ffffff"
TICKS = [digit * 10.0**power for power in range(-3, 5) for digit in (1, 2, 5)]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of text that is not broken unless it is wider than the line."""

    text: str
    ink: str = INK


@dataclasses.dataclass(frozen=True)
class Judged:
    """Answers against the truth, and axes that hold almost all of them."""

    low: float
    high: float
    shown: np.ndarray  # the answers, those outside the axes at their edge; NaN where none could be read
    groups: dict[str, np.ndarray]  # "right", "wrong", "outside the axes" → whether an answer is one of these


def judge(truth: Sequence[float], answers: Sequence[float | None]) -> Judged:
    """Returns how answers (None where none could be read) are drawn against the truth (> 0)."""
    truth = np.asarray(truth, float)
    answer = np.array([math.nan if said is None else said for said in answers], float)
    with np.errstate(divide="ignore"):  # an answer may be 0
        ratio = np.maximum(answer / truth, truth / answer)
    low, high = truth.min() / 3, truth.max() * 3
    outside = (answer < low) | (answer > high)
    groups = {"right": ratio < DELTA, "wrong": (ratio >= DELTA) & ~outside, "outside the axes": outside}
    return Judged(low, high, np.clip(answer, low, high), groups)


def loss_curve(records: list[dict], file: Path) -> None:
    """Draws loss and token accuracy over steps; the loss on a log axis if it spans more than a decade.

    Args:
      records: of metrics.jsonl, with step, loss and mean_token_accuracy.
      file: picture to write.

    Raises:
      InputError: no records, or the file cannot be written.
    """
    if not records:
        raise InputError(
            f"{file}: nothing to draw", found="no records", expected="metrics.jsonl of a run",
            fix="train for at least train.logging_steps steps",
        )  # fmt: skip
    step = [record["step"] for record in records]
    loss = np.array([record["loss"] for record in records], float)
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    style = {"color": "#1f5fa8", "linewidth": 1.4, "marker": "o" if len(step) <= 60 else "", "markersize": 3.5}
    above.plot(step, loss, **style)
    positive = loss[loss > 0]  # NaN is not
    if len(positive) and positive.max() > 10 * positive.min():
        above.set_yscale("log")
        above.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        above.yaxis.set_major_formatter("{x:g}")
        above.yaxis.set_minor_formatter("")
    above.set_ylabel("loss (nats per supervised token)")
    below.plot(step, [100 * record["mean_token_accuracy"] for record in records], **style)
    below.set_ylabel("token accuracy (%)")
    below.set_xlabel("optimizer step")
    last = records[-1]
    above.set_title(
        f"step {last['step']}: loss {last['loss']:.4g}, token accuracy {100 * last['mean_token_accuracy']:.1f} %",
        fontsize=11,
    )
    for axes in (above, below):
        axes.grid(alpha=0.3, which="both")
    write_picture(file, lambda: figure.savefig(file, dpi=120))


def scatter(truth: Sequence[float], answers: Sequence[float | None], file: Path, unit: str = "m") -> None:
    """Draws answers against the truth, both on log axes, with the band that δ1 counts as right.

    Args:
      truth: > 0.
      answers: None where none could be read; those far outside the axes are drawn at their edge.
      file: picture to write.
      unit: of truth and answers.
    """
    truth, judged = np.asarray(truth, float), judge(truth, answers)
    low, high = judged.low, judged.high
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    axes = figure.subplots()
    edge = np.array([low, high])
    axes.fill_between(edge, edge / DELTA, edge * DELTA, color=RIGHT, alpha=0.15, lw=0, label="within 1.25 (δ1)")
    axes.plot(edge, edge, color=GREY, linewidth=1)
    for (name, chosen), color, marker in zip(judged.groups.items(), (RIGHT, WRONG, WRONG), "ooD", strict=True):
        if chosen.any():
            shown = judged.shown[chosen]
            style = {"s": 14, "color": color, "marker": marker, "alpha": 0.6, "lw": 0, "clip_on": False, "zorder": 3}
            axes.scatter(truth[chosen], shown, label=f"{name}: {chosen.sum()}", **style)
    right, unread = judged.groups["right"].mean(), int(np.isnan(judged.shown).sum())
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.set(xscale="log", yscale="log", xlim=edge, ylim=edge, aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_minor_locator(ticker.NullLocator())
    axes.set(xlabel=f"truth ({unit})", ylabel=f"answer ({unit})")
    axes.set_title(f"{len(truth)} points: δ1 = {right:.3f}, {unread} without an answer", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=9)
    write_picture(file, lambda: figure.savefig(file, dpi=120))


def answer_sheet(
    examples: list[Example], answers: list[float | None], texts: list[str], file: Path, columns: int = 4
) -> None:
    """Draws questions as the model saw them and what it answered, green where δ1 counts it as right, else red.

    Args:
      examples: held-out, of one question each.
      answers: in the unit of the question's task, None where none could be read.
      texts: what the model wrote; shown where it could not be read.
      file: picture to write.
      columns: pictures in a line.
    """
    drawn, right = [], 0
    for example, answer, text in zip(examples, answers, texts, strict=True):
        (question,) = example.questions
        unit = UNITS[question.task]
        ratio = math.inf if answer is None else _ratio(answer, question.truth)
        color = RIGHT if ratio < DELTA else WRONG
        right += ratio < DELTA
        said = "no answer" if answer is None else f"answer {_brief(answer)} {unit}   ratio {_brief(ratio)}"
        lines = [[Piece(f"truth {_brief(question.truth)} {unit}   {said}", color)]]
        if answer is None:
            lines.append(_words("wrote " + repr(_shorten(text, RAW_CHARACTERS)), GREY))
        drawn.append(_cell(_framed(_tile(example, question.pixels), color), lines))
    heading = _words(f"{right} of {len(drawn)} answers within a factor of {DELTA} (δ1); {POINT_KEY}", INK)
    _save_sheet(drawn, heading, columns, file)


def table(rows: list[tuple[str, dict[str, float]]], columns: list[str]) -> str:
    """Returns the rows as aligned plain text, a header and a rule above them; what a row does not have is a dash.

    Args:
      rows: (name, values by column); floats are shown with three decimals.
      columns: which values, in this order.
    """
    lines = cells(rows, columns)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def cells(rows: list[tuple[str, dict[str, float]]], columns: list[str]) -> list[list[str]]:
    """Returns the texts of a `table`, line by line, the header first."""
    return [["", *columns], *([name, *(_number(values.get(column)) for column in columns)] for name, values in rows)]


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _ratio(answer: float, truth: float) -> float:
    return max(answer / truth, truth / answer) if min(answer, truth) > 0 else math.inf


def _brief(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.3g}"


def _shorten(text: str, limit: int) -> str:
    """Returns the text with its middle left out if it is longer than the limit."""
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


def _words(text: str, ink: str) -> list[Piece]:
    return [Piece(f"{word} ", ink) for word in text.split()]


def _tile(example: Example, pixels: Sequence[tuple[int, int]]) -> Image.Image:
    """Returns the question's images beside each other, as wide as a tile; the points are in the first."""
    width = TILE_PX // len(example.images)
    shown = [_shown(image, pixels if place == 0 else (), width) for place, image in enumerate(example.images)]
    tile = Image.new("RGB", (sum(one.width for one in shown), max(one.height for one in shown)), PAPER)
    x = 0
    for one in shown:
        tile.paste(one, (x, 0))
        x += one.width
    return tile


def _shown(image: np.ndarray, pixels: Sequence[tuple[int, int]], side_px: int) -> Image.Image:
    """Returns the image with this longest side, its pixels circled; close-ups in its corners if it had to be shrunk."""
    height, width = image.shape[:2]
    side = max(width, height)
    zoom = side_px // side or side_px / side
    method = Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.BOX
    tile = Image.fromarray(image).resize((round(width * zoom), round(height * zoom)), method)
    draw = ImageDraw.Draw(tile)
    if zoom < 1:
        _paste_close_ups(tile, image, pixels)
    radius = max(14, 12 * zoom)
    for x, y in (((left + 0.5) * zoom, (top + 0.5) * zoom) for left, top in pixels):
        draw.circle((x, y), radius + 1, outline="black")
        draw.circle((x, y), radius, outline="white", width=2)
    return tile


def _paste_close_ups(tile: Image.Image, image: np.ndarray, pixels: Sequence[tuple[int, int]]) -> None:
    """Pastes each into a corner of its own, beginning with the one that is farthest from the first pixel."""
    height, width = image.shape[:2]
    side, half = CLOSE_UP_PX * CLOSE_UP_ZOOM, CLOSE_UP_PX // 2
    corners = [(x, y) for x in (0, tile.width - side) for y in (0, tile.height - side)]
    if pixels:
        x, y = pixels[0][0] * tile.width / width, pixels[0][1] * tile.height / height
        corners.sort(key=lambda corner: -math.dist(corner, (x - side / 2, y - side / 2)))
    for (x, y), corner in zip(pixels, corners, strict=False):
        part = Image.fromarray(image).crop((x - half, y - half, x + half, y + half)).resize((side, side), 0)
        tile.paste(part, corner)
        ImageDraw.Draw(tile).rectangle((*corner, corner[0] + side - 1, corner[1] + side - 1), outline="white")


def _framed(tile: Image.Image, color: str) -> Image.Image:
    ImageDraw.Draw(tile).rectangle((0, 0, tile.width - 1, tile.height - 1), outline=color, width=3)
    return tile


def _cell(tile: Image.Image, lines: list[list[Piece]]) -> Image.Image:
    """Returns the tile with lines of text below it, each broken where it is wider than a tile."""
    text = _text(lines, TILE_PX)
    cell = Image.new("RGB", (TILE_PX, tile.height + 4 + text.height), PAPER)
    cell.paste(tile, (0, 0))
    cell.paste(text, (0, tile.height + 4))
    return cell


def _text(lines: list[list[Piece]], width: int) -> Image.Image:
    """Returns a picture of the lines."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", FONT_PX)
    placed, y = [], 0
    for line in lines:
        x = 0
        for piece in line:
            for part in _parts(piece.text, font, width):
                length = font.getlength(part)
                if x and x + length > width:
                    x, y = 0, y + LINE_PX
                placed.append((x, y, part, piece.ink))
                x += length
        y += LINE_PX
    picture = Image.new("RGB", (width, y), PAPER)
    draw = ImageDraw.Draw(picture)
    for x, y, part, ink in placed:
        draw.text((x, y + 1), part, font=font, fill=ink)
    return picture


def _parts(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Returns the text, in parts that are no wider than the line."""
    parts = [""]
    for letter in text:
        if font.getlength(parts[-1] + letter) > width:
            parts.append("")
        parts[-1] += letter
    return parts


def _save_sheet(cells: list[Image.Image], heading: list[Piece], columns: int, file: Path) -> None:
    """Writes the cells in lines of `columns`, each line as high as its highest cell."""
    lines = [cells[first : first + columns] for first in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in line) for line in lines]
    width = GAP_PX + max(1, min(columns, len(cells))) * (TILE_PX + GAP_PX)
    head = _text([heading], width - 2 * GAP_PX)
    sheet = Image.new("RGB", (width, 2 * GAP_PX + head.height + sum(heights) + GAP_PX * len(lines)), PAPER)
    sheet.paste(head, (GAP_PX, GAP_PX))
    y = 2 * GAP_PX + head.height
    for line, height in zip(lines, heights, strict=True):
        for column, cell in enumerate(line):
            sheet.paste(cell, (GAP_PX + column * (TILE_PX + GAP_PX), y))
        y += height + GAP_PX
    write_picture(file, lambda: sheet.save(file, optimize=True))
    if Path(file).stat().st_size > MAX_BYTES:
        write_picture(file, lambda: _few_colours(sheet).save(file, optimize=True))


def _few_colours(sheet: Image.Image) -> Image.Image:
    """Returns the sheet in 256 colours: those of markers (too small to get one by their area) and the most used."""
    palette = Image.new("P", (1, 1))
    fixed = [level for color in COLORS.values() for level in color]
    palette.putpalette([*sheet.quantize(256 - len(COLORS)).getpalette()[: 3 * (256 - len(COLORS))], *fixed])
    return sheet.quantize(palette=palette, dither=Image.Dither.NONE)


def write_picture(file: Path, save: Callable[[], None]) -> None:
    """Saves a picture; raises InputError where the name or the folder does not allow it."""
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        save()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file}: cannot write the picture", found=error, expected="a name that ends in .png, in a writable folder",
            fix="correct the name of the output",
        ) from error  # fmt: skip
