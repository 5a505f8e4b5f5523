import math

import numpy as np
import pytest
from PIL import Image

from depthlm_jax.data import synthetic, tasks
from depthlm_jax.data.reference import RED, draw_arrow
from depthlm_jax.data.transforms import Example
from depthlm_jax.errors import InputError
from depthlm_jax.eval import report
from depthlm_jax.models.qwen2_5_vl.folder import write_scratch
from depthlm_jax.models.qwen2_5_vl.processor import Processor

PATCH = 8
HF_CONFIG = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
    hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e4, rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
    tie_word_embeddings=True,
    vision_config=dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=1, out_hidden_size=16, patch_size=PATCH,
        spatial_merge_size=2, temporal_patch_size=2, window_size=32, fullatt_block_indexes=[], in_chans=3,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
    folder = tmp_path_factory.mktemp("base")
    texts = [tasks.SYSTEM, tasks.QUESTION, *(tasks.answer_text(number / 10) for number in range(100))]
    write_scratch(HF_CONFIG, texts, folder)
    return Processor(folder)


def scene_example(number: int, width: int = 96, height: int = 96) -> Example:
    """Returns a question about the middle of a rendered scene, cut to a size."""
    image = np.resize(synthetic.render((1, number)).image_HW3, (height, width, 3))
    x, y = width // 2, height // 2
    truth_m = 1.5 + number
    marked = draw_arrow(image, x, y, 2)
    return Example(f"scene:{number}", marked, (x, y), tasks.QUESTION, tasks.answer_text(truth_m), truth_m)


def opened(file) -> np.ndarray:
    assert file.stat().st_size < report.MAX_BYTES
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def first_tile(sheet: np.ndarray, example: Example) -> tuple[np.ndarray, int]:
    """Returns the first picture of a sheet and its zoom; three columns are wide enough for a heading of one line."""
    top = 2 * report.GAP_PX + report.LINE_PX
    height, width = example.image.shape[:2]
    zoom = report.TILE_PX // max(height, width)
    return sheet[top : top + height * zoom, report.GAP_PX : report.GAP_PX + width * zoom], zoom


def has(picture: np.ndarray, color: tuple[int, int, int] | str) -> bool:
    if isinstance(color, str):
        color = tuple(bytes.fromhex(color[1:]))
    return bool((picture == np.array(color)).all(axis=-1).any())


@pytest.mark.parametrize("size", [(96, 96), (112, 80), (16, 48), (160, 16)])
def test_image_of_undoes_the_patches(processor, size):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in (size, (48, 32))]
    sample = processor.encode(images, "Where?", "There.")
    for number, image in enumerate(images, start=1):
        assert np.array_equal(report.image_of(sample, number), image)


def test_contact_sheet_shows_the_patches_not_the_example(processor, tmp_path):
    example = scene_example(0)
    sample = processor.encode([example.image], example.question, example.answer)
    wrong_order = np.concatenate([sample.patches_PC[1:], sample.patches_PC[:1]])
    tiles = []
    for name, patches_PC in (("right", sample.patches_PC), ("wrong", wrong_order)):
        shown = type(sample)(**{**vars(sample), "patches_PC": patches_PC})
        report.contact_sheet([example] * 3, [shown] * 3, processor.tokenizer.decode, tmp_path / f"{name}.png")
        tile, zoom = first_tile(opened(tmp_path / f"{name}.png"), example)
        tiles.append(tile[zoom // 2 :: zoom, zoom // 2 :: zoom])
    same = (tiles[0] == example.image).all(axis=-1)
    assert same.mean() > 0.95  # all but the circle
    assert (tiles[1] == example.image).all(axis=-1).mean() < 0.5


def test_marker_and_query_pixel_stay_visible_inside_the_circle(processor, tmp_path):
    example = scene_example(1)
    report.answer_sheet([example] * 3, [2.5] * 3, [""] * 3, tmp_path / "a.png")
    tile, zoom = first_tile(opened(tmp_path / "a.png"), example)
    x, y = ((at * 2 + 1) * zoom // 2 for at in example.pixel)
    assert tuple(tile[y, x - 4 * zoom]) == RED
    assert tuple(tile[y, x]) == tuple(example.image[example.pixel[1], example.pixel[0]])
    ring = [tuple(tile[y + dy * 12 * zoom, x + dx * 12 * zoom]) for dx, dy in ((-1, 0), (0, -1))]
    assert ring == [(255, 255, 255)] * 2


@pytest.mark.parametrize(("ratio", "color"), [(1.24, report.RIGHT), (1 / 1.24, report.RIGHT), (1.26, report.WRONG)])
def test_answers_are_framed_by_delta1(tmp_path, ratio, color):
    example = scene_example(2)
    report.answer_sheet([example] * 3, [ratio * example.truth_m] * 3, ["text"] * 3, tmp_path / "a.png")
    tile, _ = first_tile(opened(tmp_path / "a.png"), example)
    assert tuple(tile[0, 0]) == tuple(bytes.fromhex(color[1:]))


def test_failure_is_red_and_its_text_makes_the_cell_longer(tmp_path):
    example = scene_example(2)
    for name, answer_m in (("read", example.truth_m), ("unread", None)):
        report.answer_sheet([example], [answer_m], ["no number here " * 100], tmp_path / f"{name}.png")
    read, unread = opened(tmp_path / "read.png"), opened(tmp_path / "unread.png")
    assert not has(read, report.WRONG)
    assert has(unread, report.WRONG)
    lines = (len(unread) - len(read)) / report.LINE_PX
    assert 1 <= lines <= 2 + report.RAW_CHARACTERS / 30


def test_supervised_tokens_are_marked_with_their_weights(processor, tmp_path):
    example = scene_example(3)
    papers = {}
    for weight in (1.0, 5.0):
        sample = processor.encode([example.image], example.question, example.answer, digit_weight=weight)
        report.contact_sheet([example] * 3, [sample] * 3, processor.tokenizer.decode, tmp_path / "c.png")
        below = opened(tmp_path / "c.png")[2 * report.GAP_PX + report.LINE_PX + 3 * len(example.image) :]
        papers[weight] = [has(below, paper) for paper in report.SUPERVISED[:2]]
    assert papers == {1.0: [True, False], 5.0: [True, True]}


def test_pieces_are_the_tokens_in_order_with_the_middle_left_out(processor):
    example = scene_example(3)
    sample = processor.encode([example.image], example.question, example.answer)
    pieces = report._tokens(sample, processor.tokenizer.decode, {1.0: "#bfe8c6"})
    text = "".join(piece.text for piece in pieces)
    assert text.startswith(f"<|im_start|>system↵{tasks.SYSTEM}")
    assert "<|vision_start|>[36 image tokens]<|vision_end|>Given this image" in text
    assert "tokens … " in text
    supervised = "".join(piece.text for piece in pieces if piece.paper == "#bfe8c6")
    assert supervised == example.answer.replace("\n", "↵") + "<|im_end|>"


def test_official_loss_sheet_marks_the_prompt_too(processor):
    example = scene_example(3)
    sample = processor.encode([example.image], example.question, example.answer, loss_on="official")
    pieces = report._tokens(sample, processor.tokenizer.decode, {1.0: "#bfe8c6"})
    assert [piece.text for piece in pieces if piece.paper == report.PAPER] == [
        "<|im_start|>", "[36 image tokens]", next(piece.text for piece in pieces if "tokens … " in piece.text),
    ]  # fmt: skip


def test_large_images_are_shrunk_and_the_marker_shown_enlarged(tmp_path):
    noise = np.random.default_rng(0).integers(0, 200, (868, 1176, 3), dtype=np.uint8)
    image = draw_arrow(noise, 900, 100)
    example = Example("noise", image, (900, 100), "", "", 2.0)
    report.answer_sheet([example] * 8, [2.0] * 8, [""] * 8, tmp_path / "a.png")
    sheet = opened(tmp_path / "a.png")  # noise does not compress: 256 colours
    assert sheet.shape[1] == report.GAP_PX + 4 * (report.TILE_PX + report.GAP_PX)
    assert tuple(sheet[0, 0]) == (255, 255, 255)
    red = (sheet == RED).all(axis=-1).sum()
    assert red >= 8 * 9 * report.CLOSE_UP_ZOOM**2


def test_sheet_has_no_wider_line_than_its_columns(tmp_path):
    examples = [scene_example(number) for number in range(5)]
    report.answer_sheet(examples, [1.0] * 5, [""] * 5, tmp_path / "a.png", columns=2)
    sheet = opened(tmp_path / "a.png")
    assert sheet.shape[1] == report.GAP_PX + 2 * (report.TILE_PX + report.GAP_PX)
    assert len(sheet) > 3 * 288


def test_curves_open(tmp_path):
    records = [{"step": s, "loss": 10 * 0.9**s, "mean_token_accuracy": s / 60, "lr": 0.1} for s in range(1, 60)]
    report.loss_curve(records, tmp_path / "new" / "loss.png")
    report.loss_curve([{"step": 1, "loss": math.nan, "mean_token_accuracy": 0.0}], tmp_path / "one.png")
    assert opened(tmp_path / "new" / "loss.png").shape == opened(tmp_path / "one.png").shape == (720, 960, 3)


def test_scatter_takes_failures_and_absurd_answers(tmp_path):
    truth_m = np.geomspace(0.5, 20, 50)
    report.scatter(truth_m, truth_m, tmp_path / "right.png")
    report.scatter(truth_m, [None, 1e12, 1e-9, *truth_m[3:]], tmp_path / "mixed.png")
    report.scatter(truth_m[:1], [None], tmp_path / "none.png")

    def reddish(name: str) -> int:
        red, green, blue = opened(tmp_path / name).astype(int).transpose(2, 0, 1)
        return int(((red > 180) & (green < 150) & (blue < 150)).sum())

    assert reddish("right.png") == reddish("none.png") == 0
    assert reddish("mixed.png") > 0


def test_a_name_that_is_no_picture_is_explained(tmp_path):
    with pytest.raises(InputError, match=r"(?s)a\.foo: cannot write the picture.*ends in \.png"):
        report.answer_sheet([scene_example(0)], [1.0], [""], tmp_path / "a.foo")
    with pytest.raises(InputError, match="no records"):
        report.loss_curve([], tmp_path / "loss.png")


def test_table():
    rows = [("model", {"delta1": 0.8123, "n": 512}), ("best constant 3.21 m", {"delta1": 0.2, "rmse": math.nan})]
    assert report.table(rows, ["delta1", "rmse", "n"]).splitlines() == [
        "                      delta1  rmse    n",
        "---------------------------------------",
        "model                  0.812     -  512",
        "best constant 3.21 m   0.200     -    -",
    ]
