import base64
import dataclasses
import html
import html.parser
import io
import re

import numpy as np
import pytest
import worlds
from PIL import Image

from depthlm_jax.config_rules import COLORS
from depthlm_jax.data import reference, tasks
from depthlm_jax.data.pipeline import Dropped
from depthlm_jax.data.transforms import Example, Question
from depthlm_jax.eval import page
from depthlm_jax.models.qwen2_5_vl.processor import Processor

SCRIPT = "<script>alert('it runs')</script>"
TRUTHS_M = (2.5, 3.25, 4.75)


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
    return worlds.processor(worlds.HF_CONFIG, tmp_path_factory.mktemp("processor"))


def made(
    processor: Processor, sizes=((64, 48),), questions: int = 1, layout: str = "independent", digit_weight: float = 1.0,
    loss_on: str = "answer", name: str = "train.jsonl:1", pixel: tuple[int, int] = (30, 20),
) -> page.Made:  # fmt: skip
    """Returns a sample of noise pictures, sizes (width, height), each question with an answer of its own."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 200, (height, width, 3), dtype=np.uint8) for width, height in sizes]
    images[0] = reference.draw(images[0], [pixel], "arrow")
    asked = tuple(
        Question("distance", (pixel,), tasks.QUESTION, tasks.answer_text(truth_m), truth_m)
        for truth_m in TRUTHS_M[:questions]
    )
    turns = [(question.text, question.answer) for question in asked]
    sample = processor.encode(images, turns, layout=layout, loss_on=loss_on, digit_weight=digit_weight)
    return page.Made("source", Example(name, tuple(images), asked), sample)


def render(processor: Processor, samples: list[page.Made], marked: bool = True, dropped=(), tables=()) -> str:
    return page.render(list(tables), samples, list(dropped), processor.tokenizer.decode, marked)


class Reader(html.parser.HTMLParser):
    """Collects the pictures, the tags that are open in vain, and the text of marks."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.uris, self.marked = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.uris += [value for key, value in attributes if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        if self.open[-1:] == ["mark"]:
            self.marked.append(data)


def text_of(page_html: str) -> str:
    body = page_html[page_html.index("<body>") :]
    return html.unescape(re.sub("<[^>]*>", "", body)).replace("↵", "")


def picture(uri: str) -> np.ndarray:
    kind, content = uri.split(",", 1)
    assert re.fullmatch("data:image/(png|jpeg);base64", kind)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


@pytest.mark.parametrize("size", [(96, 96), (80, 112), (48, 16), (16, 160)])
def test_image_of_undoes_the_patches(processor, size):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in (size, (32, 48))]
    sample = processor.encode(images, [("Where?", "There.")])
    for number, image in enumerate(images, start=1):
        assert np.array_equal(page.image_of(sample, number), image)


def test_small_pictures_are_the_samples_own_pixels_not_the_examples(processor):
    one = made(processor, ((64, 48), (48, 32)))
    for patches_PC in (one.sample.patches_PC, one.sample.patches_PC[::-1]):
        shown = dataclasses.replace(one.sample, patches_PC=patches_PC)
        first, second, close_up = map(picture, Reader(render(processor, [dataclasses.replace(one, sample=shown)])).uris)
        assert np.array_equal(first, page.image_of(shown, 1)) and np.array_equal(second, page.image_of(shown, 2))
        assert np.array_equal(close_up, first[0:40, 10:50])


def test_large_pictures_are_shrunk_and_the_marker_is_exact_in_the_close_up(processor):
    one = made(processor, ((1152, 880),), pixel=(1100, 11))
    text = render(processor, [one])
    shown, close_up = map(picture, Reader(text).uris)
    assert max(shown.shape) == page.PICTURE_PX
    assert np.array_equal(close_up, one.example.images[0][: page.CLOSE_UP_PX, 1100 - 20 : 1100 + 20])
    assert (close_up == COLORS["red"]).all(axis=-1).sum() == 9
    many = Reader(render(processor, [one] * 60)).uris
    assert sum(map(len, many)) < 10_000_000  # noise is the worst case: photographs take a quarter


def test_every_answer_and_every_source_is_in_the_page(processor):
    for layout in ("independent", "conversation"):
        text = text_of(render(processor, [made(processor, questions=3, layout=layout)], marked=False))
        for number, truth_m in enumerate(TRUTHS_M, start=1):
            assert tasks.answer_text(truth_m) in text
            assert f"{number} distance" in text and f"truth {truth_m:.4f} m" in text
        assert "train.jsonl:1 of source" in text and "64×48 px" in text
        assert ("question 3 alone sees" in text) == (layout == "independent")


def test_counts_are_those_of_the_sample(processor):
    one = made(processor)
    tokens, supervised = len(one.sample.tokens_T), len(one.sample.targets_A)
    counts = f"{tokens} tokens: 12 image + {tokens - 12} text · 64 patch slots · {supervised} supervised"
    assert counts in text_of(render(processor, [one]))


def test_nothing_from_the_data_becomes_markup(processor):
    dropped = [Dropped(SCRIPT, f"{SCRIPT} is no image", bad=True)]
    table = page.Table(SCRIPT, [["", SCRIPT], [SCRIPT, "1"]], SCRIPT)
    one = made(processor, name=SCRIPT)
    one = dataclasses.replace(one, source=SCRIPT)
    text = render(processor, [one], dropped=dropped, tables=[table])
    read = Reader(text)
    assert "script" not in read.tags and not read.open
    assert text_of(text).count(SCRIPT) == 8
    plain = Reader(render(processor, [made(processor)], dropped=[Dropped("a", "b", True)], tables=[table]))
    assert read.tags == plain.tags


def test_page_needs_nothing_else(processor):
    text = render(processor, [made(processor, questions=2), made(processor, ((1152, 880),))])
    assert all(uri.startswith("data:image/") for uri in Reader(text).uris)
    assert not re.search(r"https?:|url\(|@import|<script|<link", text)


def test_dropped_samples_are_counted_with_their_reasons(processor):
    dropped = [
        Dropped("train.jsonl:3", "depth is not\npositive", bad=True),
        Dropped("train.jsonl:4", "no point", False),
    ]
    text = text_of(render(processor, [made(processor)] * 3, dropped=dropped))
    assert "Dropped: 2 of 5 samples" in text
    assert re.search(r"train\.jsonl:3 bad record\s+depth is not\npositive", text)
    assert re.search(r"train\.jsonl:4 nothing to ask\s+no point", text) and " more" not in text
    many = text_of(render(processor, [made(processor)], dropped=[*dropped, *dropped[1:] * 11]))
    assert many.count("nothing to ask") == 9 and "and 3 more" in many


@pytest.mark.parametrize("digit_weight", [1.0, 5.0])
def test_marks_are_the_supervised_tokens_with_their_weights(processor, digit_weight):
    one = made(processor, questions=2, digit_weight=digit_weight)
    text = render(processor, [one], marked=False)
    legend, *tokens = Reader(text).marked if digit_weight == 1 else Reader(text).marked[1:]
    assert legend == f" supervised, weight {digit_weight:g} "
    answers = "".join(f"{tasks.answer_text(truth_m)}<|im_end|>" for truth_m in TRUTHS_M[:2])
    assert "".join(tokens).replace("↵", "") == answers
    assert len(tokens) == len(one.sample.targets_A)
    assert text.count('class="w1"') == (1 + int((one.sample.weights_A == 5).sum()) if digit_weight == 5 else 0)


def test_tokens_stand_in_order_in_blocks_of_who_sees_them(processor):
    one = made(processor, questions=2)
    blocks = page.token_blocks(one.sample, processor.tokenizer.decode, {1.0: 0})
    assert [branch for branch, _ in blocks] == [0, 1, 2]
    texts = ["".join(token.text for token in tokens).replace("↵", "") for _, tokens in blocks]
    assert texts[0].startswith(f"<|im_start|>system\n{tasks.SYSTEM}")
    assert texts[0].endswith("<|vision_start|>[12 image tokens]<|vision_end|>")
    for text, truth_m in zip(texts[1:], TRUTHS_M, strict=False):
        assert text.startswith("Given this image") and text.endswith(f"{tasks.answer_text(truth_m)}<|im_end|>")


def test_official_loss_marks_the_prompt_too(processor):
    one = made(processor, loss_on="official")
    ((_, tokens),) = page.token_blocks(one.sample, processor.tokenizer.decode, {1.0: 0})
    assert [token.text for token in tokens if token.paper is None] == ["<|im_start|>", "[12 image tokens]"]
