import math

import numpy as np
import pytest
from PIL import Image

from depthlm_jax.config_rules import COLORS
from depthlm_jax.data import reference, synthetic, tasks
from depthlm_jax.data.transforms import Example, Question
from depthlm_jax.errors import InputError
from depthlm_jax.eval import report

RED = COLORS["red"]


def scene_example(number: int, width: int = 96, height: int = 96) -> Example:
    """Returns a question about the middle of a rendered scene, cut to a size."""
    image = np.resize(synthetic.render((1, number)).image_HW3, (height, width, 3))
    return marked_example(f"scene:{number}", image, (width // 2, height // 2), 1.5 + number, scale=2)


def marked_example(name: str, image: np.ndarray, pixel: tuple[int, int], truth_m: float, scale: int = 1) -> Example:
    marked = reference.draw(image, [pixel], "arrow", scale)
    question = Question("distance", (pixel,), tasks.QUESTION, tasks.answer_text(truth_m), truth_m)
    return Example(name, (marked,), (question,))


def opened(file) -> np.ndarray:
    assert file.stat().st_size < report.MAX_BYTES
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def first_tile(sheet: np.ndarray, example: Example) -> tuple[np.ndarray, int]:
    """Returns the first picture of a sheet and its zoom; three columns are wide enough for a heading of one line."""
    top = 2 * report.GAP_PX + report.LINE_PX
    height, width = example.images[0].shape[:2]
    zoom = report.TILE_PX // max(height, width)
    return sheet[top : top + height * zoom, report.GAP_PX : report.GAP_PX + width * zoom], zoom


def has(picture: np.ndarray, color: tuple[int, int, int] | str) -> bool:
    if isinstance(color, str):
        color = tuple(bytes.fromhex(color[1:]))
    return bool((picture == np.array(color)).all(axis=-1).any())


def test_marker_and_query_pixel_stay_visible_inside_the_circle(tmp_path):
    example = scene_example(1)
    pixel = example.questions[0].pixels[0]
    report.answer_sheet([example] * 3, [2.5] * 3, [""] * 3, tmp_path / "a.png")
    tile, zoom = first_tile(opened(tmp_path / "a.png"), example)
    x, y = ((at * 2 + 1) * zoom // 2 for at in pixel)
    assert tuple(tile[y, x - 4 * zoom]) == RED
    assert tuple(tile[y, x]) == tuple(example.images[0][pixel[1], pixel[0]])
    ring = [tuple(tile[y + dy * 12 * zoom, x + dx * 12 * zoom]) for dx, dy in ((-1, 0), (0, -1))]
    assert ring == [(255, 255, 255)] * 2


@pytest.mark.parametrize(("ratio", "color"), [(1.24, report.RIGHT), (1 / 1.24, report.RIGHT), (1.26, report.WRONG)])
def test_answers_are_framed_by_delta1(tmp_path, ratio, color):
    example = scene_example(2)
    report.answer_sheet([example] * 3, [ratio * example.questions[0].truth] * 3, ["text"] * 3, tmp_path / "a.png")
    tile, _ = first_tile(opened(tmp_path / "a.png"), example)
    assert tuple(tile[0, 0]) == tuple(bytes.fromhex(color[1:]))


def test_failure_is_red_and_its_text_makes_the_cell_longer(tmp_path):
    example = scene_example(2)
    for name, answer_m in (("read", example.questions[0].truth), ("unread", None)):
        report.answer_sheet([example], [answer_m], ["no number here " * 100], tmp_path / f"{name}.png")
    read, unread = opened(tmp_path / "read.png"), opened(tmp_path / "unread.png")
    assert not has(read, report.WRONG)
    assert has(unread, report.WRONG)
    lines = (len(unread) - len(read)) / report.LINE_PX
    assert 1 <= lines <= 2 + report.RAW_CHARACTERS / 30


def test_large_images_are_shrunk_and_the_marker_shown_enlarged(tmp_path):
    noise = np.random.default_rng(0).integers(0, 200, (868, 1176, 3), dtype=np.uint8)
    example = marked_example("noise", noise, (900, 100), 2.0)
    report.answer_sheet([example] * 8, [2.0] * 8, [""] * 8, tmp_path / "a.png")
    sheet = opened(tmp_path / "a.png")  # noise does not compress: 256 colours
    assert sheet.shape[1] == report.GAP_PX + 4 * (report.TILE_PX + report.GAP_PX)
    assert tuple(sheet[0, 0]) == (255, 255, 255)
    red = (sheet == RED).all(axis=-1).sum()
    assert red >= 8 * 9 * report.CLOSE_UP_ZOOM**2


@pytest.mark.parametrize(("task", "truth", "answer"), [("two_points", 2.0, 2.1), ("speed", 2.0, 0.0)])
def test_every_point_and_both_images_are_shown(tmp_path, task, truth, answer):
    noise = np.random.default_rng(0).integers(0, 200, (868, 1176, 3), dtype=np.uint8)
    pixels = ((200, 700), (900, 100))
    image = reference.draw(noise, pixels, "cross", 1, "magenta")
    example = Example("noise", (image,), (Question(task, pixels, "", "", truth),))
    report.answer_sheet([example] * 4, [answer] * 4, [""] * 4, tmp_path / "a.png")
    magenta = (opened(tmp_path / "a.png") == COLORS["magenta"]).all(axis=-1).sum()
    assert magenta >= 4 * 2 * 12 * report.CLOSE_UP_ZOOM**2  # a close-up of each of the two crosses
    assert has(opened(tmp_path / "a.png"), report.RIGHT) == (answer > 0)


def test_two_images_stand_beside_each_other(tmp_path):
    images = tuple(np.full((96, 96, 3), color, np.uint8) for color in ((10, 20, 30), (90, 80, 70)))
    example = Example("pair", images, (Question("translation", (), "", "", 0.5),))
    report.answer_sheet([example] * 3, [0.5] * 3, [""] * 3, tmp_path / "a.png")
    row = opened(tmp_path / "a.png")[2 * report.GAP_PX + report.LINE_PX + 40, report.GAP_PX :]
    assert tuple(row[20]) == (10, 20, 30) and tuple(row[96 + 20]) == (90, 80, 70)


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
