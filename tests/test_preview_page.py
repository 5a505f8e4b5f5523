"""preview as a user meets it: the command, its page, and the page in a browser."""

import json
import sys
from pathlib import Path

import browser
import numpy as np
import pytest
import worlds
from PIL import Image

from depthlm_jax import __main__ as program
from depthlm_jax.data import packing

RECIPE = """
import worlds
from depthlm_jax.config import sources

def get_config(arg=""):
    recipe = worlds.recipe({scenes!r}, {{"data.geometry.crop_width": (48, 64), "data.max_answer_tokens": 48}})
    with recipe.unlocked():
        recipe.data.sources = sources({{
            "often": {{"path": {scenes!r}}},
            "seldom": {{"path": {jsonl!r}, "weight": 0.25}},
            "never": {{"path": "nowhere", "weight": 0.0}},
        }})
    return recipe
"""
SAMPLES = 12
WIDTHS_PX = 390, 1280


def preview(recipe: Path, output: Path, *arguments: str) -> int:
    words = ["preview", f"--config={recipe}", f"--output={output}", f"--samples={SAMPLES}", "--json", *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["depthlm_jax", *words])  # ml_collections looks for overrides there
        return program.main(words)


@pytest.fixture(scope="module")
def recipe(scenes, tmp_path_factory) -> Path:
    """Returns a recipe of three sources, one of them off, one with a bad record among its eight."""
    folder = tmp_path_factory.mktemp("recipe")
    jsonl = worlds.write_jsonl(scenes, folder, 8)
    for line in range(1, 9, 2):
        worlds.rewrite_line(jsonl, line, lambda fields: fields | {"depth": [-1.0] * len(fields["depth"])})
    file = folder / "recipe.py"
    file.write_text(RECIPE.format(scenes=str(scenes), jsonl=str(jsonl)))
    return file


@pytest.fixture(scope="module")
def page(recipe, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("page") / "new" / "preview.html"
    assert preview(recipe, output) == 0
    return output


def test_command_says_what_the_page_shows(recipe, tmp_path, capsys):
    assert preview(recipe, tmp_path / "preview.html") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    said, result = "\n".join(lines), json.loads(last)
    assert result["samples"] + result["dropped"] == SAMPLES and result["samples"] > 0
    shares = result["shares"]
    assert {name: share["intended"] for name, share in shares.items()} == {"often": 0.8, "seldom": 0.2, "never": 0.0}
    assert all(abs(share["intended"] - share["realised"]) < 0.02 for share in shares.values())
    filled = result["filled"]
    assert result["binds"] == packing.LIMITS[max(filled, key=filled.get)] and 0.5 < max(filled.values()) <= 1
    assert "realised share" in said and "seldom" in said and "mean filled" in said
    assert said.count("depth is not a positive finite number") == result["dropped"]
    text = (tmp_path / "preview.html").read_text(encoding="utf-8")
    assert text.count("<article>") == result["samples"] and text.count("<pre>") == result["dropped"]
    assert all(f"<td>{name}</td>" in text for name in (*shares, "tokens", "patches", "answers"))


def test_another_ending_is_refused_before_any_work(recipe, tmp_path, capsys):
    assert preview(recipe, tmp_path / "preview.png", "--config.data.sources.often.path=nowhere") == 1
    error = capsys.readouterr().err
    assert "a name that ends in .html" in error and f"--output={tmp_path / 'preview.html'}" in error


def test_all_records_bad_is_an_error_with_the_reasons(recipe, tmp_path, capsys):
    changes = "--config.data.sources.often.weight=0.0", "--config.data.sources.seldom.weight=1.0", "--samples=1"
    for seed in range(8):
        status = preview(recipe, tmp_path / "preview.html", *changes, f"--config.train.seed={seed}")
        said = capsys.readouterr()
        if status:
            break
    assert (
        status == 1
        and "nothing to show" in said.err
        and "no sample: " in said.out
        and "depth is not a positive" in said.out
    )


# In a browser


def test_pictures_load_and_nothing_is_wider_than_a_phone_or_a_screen(page, tmp_path):
    measured = browser.measure(page, WIDTHS_PX, tmp_path)
    assert sorted(frame["width"] for frame in measured) == list(WIDTHS_PX)
    pictures = page.read_text(encoding="utf-8").count("<img ")
    for frame in measured:
        assert frame["needed"] <= frame["width"]
        assert len(frame["images"]) == pictures > SAMPLES
        assert all(complete and natural > 0 for complete, natural, _ in frame["images"])
        assert all(100 <= shown <= frame["width"] for *_, shown in frame["images"])


@pytest.mark.parametrize(("scheme", "paper"), [(1, "light"), (0, "dark")])
def test_page_is_seen_light_and_dark_with_its_markers(page, tmp_path, scheme, paper):
    shot = tmp_path / "page.png"
    setting = f"--blink-settings=preferredColorScheme={scheme}"
    browser.chromium(tmp_path, setting, f"--screenshot={shot}", "--window-size=1280,1600", page.as_uri())
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (1600, 1280, 3)
    ink, background = pixels[:700].mean(axis=2), pixels[2, 2].mean()  # the tables
    assert background > 240 if paper == "light" else background < 40
    assert ((ink < 60) if paper == "light" else (ink > 200)).mean() > 0.002  # words
    assert (pixels == (255, 0, 0)).all(axis=-1).sum() > 9 * 2 * 5  # arrows, enlarged
    assert len(np.unique(pixels.astype(int) @ (65536, 256, 1))) > 200  # pictures
