"""Pictures and tables that a person looks at: how training went, how answers compare, what the model sees."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from depthlm_jax.batch import Sample
from depthlm_jax.data.reference import RED
from depthlm_jax.data.transforms import Example
from depthlm_jax.errors import InputError
from depthlm_jax.eval.metrics import DELTA

TILE_PX = 336  # width of a picture in a sheet
GAP_PX = 14
FONT_PX = 13
LINE_PX = 18
CLOSE_UP_PX, CLOSE_UP_ZOOM = 36, 3  # what is shown of a large image around its marker, in its own pixels
MAX_BYTES = 1_000_000  # a larger sheet is reduced to 256 colours
HEAD_TOKENS, TAIL_TOKENS = 34, 50  # shown of a longer text; the tail holds the answer and the end of the question
RAW_CHARACTERS = 160  # shown of an answer that could not be read
POINT_KEY = f"circle: the point asked for (of a large image also ×{CLOSE_UP_ZOOM}, in a corner)"
RIGHT, WRONG, INK, GREY, PAPER = "#0a7d33", "#c4161c", "#111111", "#6e6e6e", "#ffffff"
SUPERVISED = ("#bfe8c6", "#ffd08a", "#f3a6b8", "#b9c8f5")  # behind the tokens of each weight, smallest weight first
TICKS_M = [digit * 10.0**power for power in range(-3, 5) for digit in (1, 2, 5)]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of text that is not broken unless it is wider than the line."""

    text: str
    ink: str = INK
    paper: str = PAPER


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
    _write(file, lambda: figure.savefig(file, dpi=120))


def scatter(truth_m: Sequence[float], answers_m: Sequence[float | None], file: Path) -> None:
    """Draws answers against true depths, both in m on log axes, with the band that δ1 counts as right.

    Args:
      truth_m: > 0.
      answers_m: None where none could be read; those far outside the axes are drawn at their edge.
      file: picture to write.
    """
    truth_m = np.asarray(truth_m, float)
    answer_m = np.array([math.nan if answer is None else answer for answer in answers_m], float)
    ratio = np.maximum(answer_m / truth_m, truth_m / answer_m)
    low_m, high_m = truth_m.min() / 3, truth_m.max() * 3
    outside = (answer_m < low_m) | (answer_m > high_m)
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    axes = figure.subplots()
    edge_m = np.array([low_m, high_m])
    axes.fill_between(edge_m, edge_m / DELTA, edge_m * DELTA, color=RIGHT, alpha=0.15, lw=0, label="within 1.25 (δ1)")
    axes.plot(edge_m, edge_m, color=GREY, linewidth=1)
    groups = (
        ("right", RIGHT, "o", ratio < DELTA), ("wrong", WRONG, "o", (ratio >= DELTA) & ~outside),
        ("outside the axes", WRONG, "D", outside),
    )  # fmt: skip
    for name, color, marker, chosen in groups:
        if chosen.any():
            shown_m = np.clip(answer_m[chosen], low_m, high_m)
            style = {"s": 14, "color": color, "marker": marker, "alpha": 0.6, "lw": 0, "clip_on": False, "zorder": 3}
            axes.scatter(truth_m[chosen], shown_m, label=f"{name}: {chosen.sum()}", **style)
    unread = int(np.isnan(answer_m).sum())
    ticks_m = [tick for tick in TICKS_M if low_m <= tick <= high_m]
    axes.set(xscale="log", yscale="log", xlim=edge_m, ylim=edge_m, aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks_m, [f"{tick:g}" for tick in ticks_m])
        axis.set_minor_locator(ticker.NullLocator())
    axes.set(xlabel="true depth (m)", ylabel="answer (m)")
    axes.set_title(f"{len(truth_m)} points: δ1 = {np.mean(ratio < DELTA):.3f}, {unread} without an answer", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=9)
    _write(file, lambda: figure.savefig(file, dpi=120))


def answer_sheet(
    examples: list[Example], answers: list[float | None], texts: list[str], file: Path, columns: int = 4
) -> None:
    """Draws questions as the model saw them and what it answered, green where δ1 counts it as right, else red.

    Args:
      examples: held-out questions.
      answers: in m, None where none could be read.
      texts: what the model wrote; shown where it could not be read.
      file: picture to write.
      columns: pictures in a line.
    """
    cells, right = [], 0
    for example, answer_m, text in zip(examples, answers, texts, strict=True):
        ratio = math.inf if answer_m is None else max(answer_m / example.truth_m, example.truth_m / answer_m)
        color = RIGHT if ratio < DELTA else WRONG
        right += ratio < DELTA
        said = "no answer" if answer_m is None else f"answer {_brief(answer_m)} m   ratio {_brief(ratio)}"
        lines = [[Piece(f"truth {_brief(example.truth_m)} m   {said}", color)]]
        if answer_m is None:
            lines.append(_words("wrote " + repr(_shorten(text, RAW_CHARACTERS)), GREY))
        cells.append(_cell(_framed(_shown(example.image, example.pixel), color), lines))
    heading = _words(f"{right} of {len(cells)} answers within a factor of {DELTA} (δ1); {POINT_KEY}", INK)
    _save_sheet(cells, heading, columns, file)


def contact_sheet(
    examples: list[Example], samples: list[Sample], decode: Callable[[list[int]], str], file: Path, columns: int = 4
) -> None:
    """Draws training samples from their own arrays: image from patches, text from tokens, weights behind the tokens.

    Args:
      examples: what the samples were made of.
      samples: as encoded, not packed.
      decode: tokens → text, special tokens included.
      file: picture to write.
      columns: pictures in a line.
    """
    weights = sorted({float(weight) for sample in samples for weight in sample.weights_A})
    paper = {weight: SUPERVISED[min(place, len(SUPERVISED) - 1)] for place, weight in enumerate(weights)}
    cells = []
    for example, sample in zip(examples, samples, strict=True):
        image = image_of(sample, 1)
        size = f"{image.shape[1]}×{image.shape[0]} px"
        seen, read = int(np.sum(sample.vision_index_T >= 0)), int(np.sum(sample.vision_index_T < 0))
        lines = [
            [Piece(example.record_id)],
            _words(f"{size}, {seen} image + {read} text tokens", INK),
            _words(f"truth {example.truth_m:.4f} m, {len(sample.targets_A)} tokens supervised", INK),
            _tokens(sample, decode, paper),
        ]
        cells.append(_cell(_shown(image, example.pixel), lines))
    legend = [*_words(f"{POINT_KEY}; tokens:", INK), Piece("grey: only read", GREY)]
    for weight in weights:
        legend += [Piece("  "), Piece(f" supervised, weight {weight:g} ", INK, paper[weight])]
    _save_sheet(cells, legend, columns, file)


def image_of(sample: Sample, number: int, channels: int = 3) -> np.ndarray:
    """Returns image `number` (from 1) of a sample, (H, W, channels) uint8, put together from its square patches."""
    mine = sample.image_id_P == number
    rows, columns = sample.patch_rc_P2[mine].max(axis=0) + 1
    side = math.isqrt(sample.patches_PC.shape[1] // channels)
    placed = np.zeros((rows, columns, channels, side, side), np.uint8)
    placed[tuple(sample.patch_rc_P2[mine].T)] = sample.patches_PC[mine].reshape(-1, channels, side, side)
    return placed.transpose(0, 3, 1, 4, 2).reshape(rows * side, columns * side, channels)


def table(rows: list[tuple[str, dict[str, float]]], columns: list[str]) -> str:
    """Returns the rows as aligned plain text, a header and a rule above them; what a row does not have is a dash.

    Args:
      rows: (name, values by column); floats are shown with three decimals.
      columns: which values, in this order.
    """
    lines = [["", *columns], *([name, *(_number(values.get(column)) for column in columns)] for name, values in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _brief(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.3g}"


def _shorten(text: str, limit: int) -> str:
    """Returns the text with its middle left out if it is longer than the limit."""
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


def _words(text: str, ink: str) -> list[Piece]:
    return [Piece(f"{word} ", ink) for word in text.split()]


def _tokens(sample: Sample, decode: Callable[[list[int]], str], paper: dict[float, str]) -> list[Piece]:
    """Returns a piece a token: what is to be said next where that is supervised, else what is read."""
    tokens, weights = sample.tokens_T.copy(), np.zeros(len(sample.tokens_T))
    said = sample.answer_index_A + 1
    tokens[said], weights[said] = sample.targets_A, sample.weights_A
    supervised = set(said.tolist())
    pieces, in_image = [], 0
    for place, token in enumerate(tokens):
        if sample.vision_index_T[place] >= 0:
            in_image += 1
            continue
        if in_image:
            pieces.append(Piece(f"[{in_image} image tokens]", GREY))
            in_image = 0
        text = decode([int(token)]).replace("\n", "↵")
        colors = (INK, paper[float(weights[place])]) if place in supervised else (GREY, PAPER)
        pieces.append(Piece(text, *colors))
    hidden = len(pieces) - HEAD_TOKENS - TAIL_TOKENS
    gap = [Piece(f" … {hidden} tokens … ")]
    return pieces if hidden <= 0 else pieces[:HEAD_TOKENS] + gap + pieces[-TAIL_TOKENS:]


def _shown(image: np.ndarray, pixel: tuple[int, int]) -> Image.Image:
    """Returns the image at the size of a tile, its pixel circled; a close-up beside it if it had to be shrunk."""
    height, width = image.shape[:2]
    side = max(width, height)
    zoom = TILE_PX // side or TILE_PX / side
    method = Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.BOX
    tile = Image.fromarray(image).resize((round(width * zoom), round(height * zoom)), method)
    draw = ImageDraw.Draw(tile)
    x, y = ((at + 0.5) * zoom for at in pixel)
    if zoom < 1:
        _paste_close_up(tile, image, pixel, right=x < tile.width / 2)
    radius = max(14, 12 * zoom)
    draw.circle((x, y), radius + 1, outline="black")
    draw.circle((x, y), radius, outline="white", width=2)
    return tile


def _paste_close_up(tile: Image.Image, image: np.ndarray, pixel: tuple[int, int], right: bool) -> None:
    left, top = (at - CLOSE_UP_PX // 2 for at in pixel)
    side = CLOSE_UP_PX * CLOSE_UP_ZOOM
    part = Image.fromarray(image).crop((left, top, left + CLOSE_UP_PX, top + CLOSE_UP_PX)).resize((side, side), 0)
    corner = (tile.width - side if right else 0, 0 if pixel[1] > image.shape[0] / 2 else tile.height - side)
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
                placed.append((x, y, length, part, piece))
                x += length
        y += LINE_PX
    picture = Image.new("RGB", (width, y), PAPER)
    draw = ImageDraw.Draw(picture)
    for x, y, length, part, piece in placed:
        draw.rectangle((x, y + 1, x + length - 2, y + LINE_PX - 2), fill=piece.paper)
        draw.text((x, y + 1), part, font=font, fill=piece.ink)
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
    _write(file, lambda: sheet.save(file, optimize=True))
    if Path(file).stat().st_size > MAX_BYTES:
        _write(file, lambda: _few_colours(sheet).save(file, optimize=True))


def _few_colours(sheet: Image.Image) -> Image.Image:
    """Returns the sheet in 256 colours: white, the marker's (too small to get one by its area) and the most used."""
    palette = Image.new("P", (1, 1))
    palette.putpalette([*sheet.quantize(254).getpalette()[: 3 * 254], *RED, 255, 255, 255])
    return sheet.quantize(palette=palette, dither=Image.Dither.NONE)


def _write(file: Path, save: Callable[[], None]) -> None:
    """Saves a picture; raises InputError where the name or the folder does not allow it."""
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        save()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file}: cannot write the picture", found=error, expected="a name that ends in .png, in a writable folder",
            fix="correct the name of the output",
        ) from error  # fmt: skip
