"""The page of `preview`: one HTML file that opens without a server, pictures in it.

Pictures are put together from the samples' own patches, texts from their own tokens: the page shows what the model
gets, not what it was meant to get.
"""

import dataclasses
import io
import itertools
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from depthlm_jax import html_page
from depthlm_jax.batch import Sample
from depthlm_jax.data.pipeline import Dropped
from depthlm_jax.data.transforms import Example, Question
from depthlm_jax.eval.report import UNITS

PICTURE_PX = 1000  # longest side of a picture; a larger one is shrunk
PICTURES_PX2 = 12_000_000  # of all pictures together: what keeps the page at a few MB
EXACT_PX2 = 256**2  # a picture up to this size keeps every pixel as it is
CLOSE_UP_PX = 40  # the marker is in it also where the second resize of the official geometry moved it
MARKER_PX = 12  # a circle of this radius holds a marker, one of several questions is smaller
JPEG_QUALITY = 82
REASONS = 10  # shown of dropped samples
PAPERS = 4  # colours behind supervised tokens, one a weight, the smallest weight first

STYLE = """
:root { --paper0: #bfe8c6; --paper1: #ffd08a; --paper2: #f3a6b8; --paper3: #b9c8f5; }
@media (prefers-color-scheme: dark) {
  :root { --paper0: #1d5b2c; --paper1: #75480a; --paper2: #782a3f; --paper3: #2c3f7d; } }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem;
  align-items: start; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; min-width: 0; }
.pictures { display: flex; gap: .4rem; margin: .5rem 0; }
.picture { position: relative; flex: 1 1 0; min-width: 0; align-self: flex-start; }
.picture img { display: block; width: 100%; } .pixels { image-rendering: pixelated; }
.picture svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
circle { fill: none; vector-effect: non-scaling-stroke; } .under { stroke: #000; stroke-width: 4; }
.over { stroke: #fff; stroke-width: 2; }
svg text { fill: #fff; stroke: #000; stroke-width: .2em; paint-order: stroke; font-weight: 700; }
.questions { list-style: none; display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 11rem), 1fr));
  gap: .4rem; padding: 0; margin: .5rem 0; }
.questions li { display: flex; align-items: center; gap: .5rem; } .alone { grid-template-columns: 1fr; }
.questions img { width: 120px; height: 120px; object-fit: contain; border: 1px solid var(--line); }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--grey); font-size: .87rem; }
mark { color: var(--ink); border-radius: .15rem; margin-right: 1px; } .w0 { background: var(--paper0); }
.w1 { background: var(--paper1); } .w2 { background: var(--paper2); } .w3 { background: var(--paper3); }
"""

TITLE = "Training samples as the model sees them"
TEMPLATE = """{% extends "base" %}
{% block body %}
<h1>{{ title }}</h1>
{% for table in tables %}
<section>
<h2>{{ table.heading }}</h2>
<div class="wide"><table>
<tr>{% for name in table.lines[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for line in table.lines[1:] %}
<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<p class="grey">{{ table.note }}</p>
</section>
{% endfor %}
<section id="dropped">
<h2>Dropped: {{ dropped|length }} of {{ dropped|length + samples|length }} samples</h2>
{% for drop in dropped[:reasons] %}
<p class="plain"><b>{{ drop.record_id }}</b> <span class="{{ 'bad' if drop.bad else 'grey' }}">{{
  'bad record' if drop.bad else 'nothing to ask' }}</span></p>
<pre>{{ drop.reason }}</pre>
{% endfor %}
{% if dropped|length > reasons %}<p class="grey">and {{ dropped|length - reasons }} more</p>{% endif %}
</section>
<section>
<h2>The first {{ samples|length }} samples</h2>
<p class="plain">Circled: a point asked for. Tokens: grey ones are only read;
{% for weight, paper in legend %}<mark class="w{{ paper }}"> supervised, weight {{ weight }} </mark> {% endfor %}</p>
<div class="samples">
{% for sample in samples %}
<article>
<h3>{{ sample.record_id }} <span class="grey">of {{ sample.source }}</span></h3>
<p class="grey">{{ sample.counts }}</p>
<div class="pictures">
{% for picture in sample.pictures %}
<div class="picture" style="max-width: calc(32rem * {{ picture.width }} / {{ picture.height }})">
<img src="{{ picture.uri }}" alt="image {{ loop.index }}" class="{{ 'pixels' if picture.exact else '' }}">
<svg viewBox="0 0 {{ picture.width }} {{ picture.height }}" aria-hidden="true">
{% for circle in picture.circles %}
<circle cx="{{ circle.x }}" cy="{{ circle.y }}" r="{{ circle.r }}" class="under"/>
<circle cx="{{ circle.x }}" cy="{{ circle.y }}" r="{{ circle.r }}" class="over"/>
{% if circle.label %}
<text x="{{ circle.label_x }}" y="{{ circle.y }}" font-size="{{ 2 * circle.r }}" dominant-baseline="central"
  text-anchor="{{ circle.anchor }}">{{ circle.label }}</text>
{% endif %}
{% endfor %}
</svg>
</div>
{% endfor %}
</div>
<ul class="questions {{ 'alone' if sample.questions|length == 1 else '' }}">
{% for question in sample.questions %}
<li>{% for uri in question.close_ups %}<img src="{{ uri }}" alt="point, enlarged" class="pixels">{% endfor %}
<span><b>{{ question.title }}</b><br>truth {{ question.truth }}{% if question.at %}<br>
<span class="grey">at {{ question.at }}</span>{% endif %}</span></li>
{% endfor %}
</ul>
{% for block in sample.blocks %}
{% if block.question %}<details{{ ' open' if block.question == 1 else '' }}>
<summary>{{ block.tokens|length }} tokens that question {{ block.question }} alone sees</summary>{% endif %}
<p class="tokens">{% for token in block.tokens %}{% if token.paper is none %}{{ token.text }}{% else %}<mark
class="w{{ token.paper }}">{{ token.text }}</mark>{% endif %}{% endfor %}</p>
{% if block.question %}</details>{% endif %}
{% endfor %}
</article>
{% endfor %}
</div>
</section>
{% endblock %}
"""


@dataclasses.dataclass(frozen=True)
class Table:
    """Texts line by line, the header first."""

    heading: str
    lines: list[list[str]]
    note: str


@dataclasses.dataclass(frozen=True)
class Made:
    """A sample and what it was made of."""

    source: str
    example: Example
    sample: Sample


@dataclasses.dataclass(frozen=True)
class Token:
    text: str
    paper: int | None  # number of its colour; None: only read


def render(
    tables: list[Table], samples: list[Made], dropped: list[Dropped], decode: Callable[[list[int]], str], marked: bool
) -> str:
    """Returns the page.

    Args:
      tables: shown first.
      samples: as encoded, not packed.
      dropped: what gave no sample.
      decode: tokens → text, special tokens included.
      marked: points have a marker in the picture, which is too small to be seen without a close-up.
    """
    weights = sorted({float(weight) for made in samples for weight in made.sample.weights_A})
    papers = {weight: min(place, PAPERS - 1) for place, weight in enumerate(weights)}
    pictures = sum(int(made.sample.image_id_P.max(initial=0)) for made in samples)
    side_px = min(PICTURE_PX, math.isqrt(PICTURES_PX2 // max(1, pictures)))
    values = {
        "tables": tables, "dropped": dropped, "reasons": REASONS,
        "legend": [(f"{weight:g}", paper) for weight, paper in papers.items()],
        "samples": [_sample(made, decode, papers, side_px, marked) for made in samples],
    }  # fmt: skip
    return html_page.render(TITLE, TEMPLATE, STYLE, values)


def image_of(sample: Sample, number: int, channels: int = 3) -> np.ndarray:
    """Returns image `number` (from 1) of a sample, (H, W, channels) uint8, put together from its square patches."""
    mine = sample.image_id_P == number
    rows, columns = sample.patch_rc_P2[mine].max(axis=0) + 1
    side = math.isqrt(sample.patches_PC.shape[1] // channels)
    placed = np.zeros((rows, columns, channels, side, side), np.uint8)
    placed[tuple(sample.patch_rc_P2[mine].T)] = sample.patches_PC[mine].reshape(-1, channels, side, side)
    return placed.transpose(0, 3, 1, 4, 2).reshape(rows * side, columns * side, channels)


def token_blocks(
    sample: Sample, decode: Callable[[list[int]], str], papers: dict[float, int]
) -> list[tuple[int, list[Token]]]:
    """Returns (branch, its tokens) in order: what is to be said next where that is supervised, else what is read.

    Args:
      sample: as encoded.
      decode: tokens → text, special tokens included.
      papers: number of the colour of each weight.
    """
    tokens_T, paper_T = sample.tokens_T.copy(), np.full(len(sample.tokens_T), -1)
    said = sample.answer_index_A + 1
    tokens_T[said], paper_T[said] = sample.targets_A, [papers[float(weight)] for weight in sample.weights_A]
    pieces = []  # branch, in an image, token
    for token, paper, branch, merged in zip(tokens_T, paper_T, sample.branch_T, sample.vision_index_T, strict=True):
        text = "" if merged >= 0 else decode([int(token)]).replace("\n", "↵\n")
        pieces.append((int(branch), bool(merged >= 0), Token(text, int(paper) if paper >= 0 else None)))
    blocks: dict[int, list[Token]] = {}
    for (branch, in_image), group in itertools.groupby(pieces, key=lambda piece: piece[:2]):
        tokens = [token for _, _, token in group]
        blocks.setdefault(branch, []).extend([Token(f"[{len(tokens)} image tokens]", None)] if in_image else tokens)
    return list(blocks.items())


def _sample(
    made: Made, decode: Callable[[list[int]], str], papers: dict[float, int], side_px: int, marked: bool
) -> dict:
    """Returns what the template says of a sample."""
    example, sample = made.example, made.sample
    images = [image_of(sample, number) for number in range(1, sample.image_id_P.max(initial=0) + 1)]
    sizes = " and ".join(f"{image.shape[1]}×{image.shape[0]} px" for image in images)
    seen = int(np.sum(sample.vision_index_T >= 0))
    return {
        "record_id": example.record_id,
        "source": made.source,
        "counts": f"{sizes} · {len(sample.tokens_T)} tokens: {seen} image + {len(sample.tokens_T) - seen} text · "
        f"{len(sample.patches_PC)} patch slots · {len(sample.targets_A)} supervised",
        "pictures": [_picture(image, example.questions if place == 0 else (), side_px)
                     for place, image in enumerate(images)],
        "questions": [_question(number, question, len(example.questions), images[0] if marked else None)
                      for number, question in enumerate(example.questions, start=1)],
        "blocks": [{"question": branch, "tokens": tokens} for branch, tokens in token_blocks(sample, decode, papers)],
    }  # fmt: skip


def _question(number: int, question: Question, questions: int, image: np.ndarray | None) -> dict:
    """Returns what the template says of a question; `image`: where its close-ups come from."""
    return {
        "title": f"{number} {question.task}" if questions > 1 else question.task,
        "truth": f"{question.truth:.4f} {UNITS[question.task]}",
        "at": " and ".join(f"({x}, {y})" for x, y in question.pixels),
        "close_ups": [] if image is None else [_png(_close_up(image, pixel)) for pixel in question.pixels],
    }


def _picture(image: np.ndarray, questions: tuple[Question, ...], side_px: int) -> dict:
    """Returns what the template says of a picture; circles are in the pixels of the image, not of the picture."""
    height, width = image.shape[:2]
    radius = max(max(width, height) / 48, MARKER_PX / max(1, len(questions)))
    circles = []
    for number, question in enumerate(questions, start=1):
        for x, y in question.pixels:
            at_right = x > width * 0.85
            label_x = x + 0.5 + (-1.5 if at_right else 1.5) * radius
            circles.append({"x": x + 0.5, "y": y + 0.5, "r": round(radius, 1), "label_x": round(label_x, 1),
                            "anchor": "end" if at_right else "start",
                            "label": str(number) if len(questions) > 1 else ""})  # fmt: skip
    exact = width * height <= EXACT_PX2
    uri = _png(image) if exact else _jpeg(image, side_px)
    return {"uri": uri, "exact": exact, "width": width, "height": height, "circles": circles}


def _close_up(image: np.ndarray, pixel: tuple[int, int]) -> np.ndarray:
    """Returns the image around a pixel, moved inwards at its edges."""
    height, width = image.shape[:2]
    left, top = (
        max(0, min(at - CLOSE_UP_PX // 2, side - CLOSE_UP_PX)) for at, side in zip(pixel, (width, height), strict=True)
    )
    return image[top : top + CLOSE_UP_PX, left : left + CLOSE_UP_PX]


def _png(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    return html_page.data_uri("png", file.getvalue())


def _jpeg(image: np.ndarray, side_px: int) -> str:
    shrunk, file = Image.fromarray(image), io.BytesIO()
    shrunk.thumbnail((side_px, side_px), Image.Resampling.BOX)
    shrunk.save(file, "JPEG", quality=JPEG_QUALITY)
    return html_page.data_uri("jpeg", file.getvalue())
