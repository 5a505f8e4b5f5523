"""Real photographs through the whole path; the images are not part of the repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import worlds
from launching import with_devices

from depthlm_jax.data import pipeline
from depthlm_jax.data.records import open_source

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_loss_falls_on_real_photographs(ibims1, tmp_path):
    arguments = [
        f"--config={ROOT}/configs/ibims1.py", f"--config.data.sources.main.path={ibims1}/ibims1_subset.jsonl",
        f"--workdir={tmp_path}/run", "--config.train.max_steps=24", "--config.data.max_bad_records=0",
    ]  # fmt: skip
    environment = {**os.environ, "XLA_FLAGS": with_devices(1)}
    command = [sys.executable, "-m", "depthlm_jax", "train", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] / 2


class NoTokens:
    """What the questions need to know of a processor: Qwen2.5-VL's published sizes."""

    class config:
        grid_px, min_pixels, max_pixels, longest_px = 28, 3136, 12845056, 0


@pytest.fixture
def official(ibims1):
    changes = {"data.geometry.mode": "official", "data.geometry.focal_px": 750.0, "eval.samples": 60,
               "data.label_kind": "official", "data.reference.scale": 1}  # fmt: skip
    settings = worlds.config(ibims1 / "ibims1_subset.jsonl", changes)
    records = open_source(settings.data.sources["main"])
    return list(pipeline.evaluation_questions(records, NoTokens, settings))


def test_official_evaluation_asks_what_the_release_asks(official):
    """Source: the release's `dataset_eval` at 750 px, first image; image i modulo 20 instead of 100, the same draw."""
    first = official[0].examples[0]
    assert first.questions[0].pixels == ((828, 99),)
    assert first.questions[0].truth == pytest.approx(1.682307, abs=5e-7)
    assert first.images[0].shape == (644, 868, 3)  # 857 × 643 px, then Qwen's second resize to multiples of 28
    assert [len(questions.examples) + questions.short for questions in official] == [3] * 20
