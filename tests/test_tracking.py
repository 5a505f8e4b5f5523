"""What trackers get: event files are read back, and one that fails stops nothing."""

import dataclasses
import io
import sys
import types
from pathlib import Path

import events
import numpy as np
import pytest
from PIL import Image

from depthlm_jax import config as config_module
from depthlm_jax import tracking
from depthlm_jax.errors import InputError

TENSORBOARD = config_module.Config()
WANDB = dataclasses.replace(TENSORBOARD, track=config_module.Track(tensorboard=False, wandb_project="depth"))
SCORES = {
    "model": {"delta1": 0.5, "abs_rel": None, "n": 4}, "best_constant": {"answer": 2.5, "delta1": 0.25},
    "expectation": None,
}  # fmt: skip


@pytest.fixture
def sheet(tmp_path) -> Path:
    file = tmp_path / "answers.png"
    Image.radial_gradient("L").convert("RGB").resize((40, 30)).quantize(16).save(file)
    return file


def test_metrics_stand_under_sensible_tags(tmp_path):
    tracker = tracking.Tracker(tmp_path, TENSORBOARD)
    names = "loss", "loss/rooms", "share/rooms", "grad_norm", "samples_per_second", "data_wait", "mfu"
    tracker.scalars(1, dict.fromkeys(names, 0.5))
    tracker.scalars(3, {"loss": float("nan")})
    shown = events.scalars(tmp_path / "tensorboard")  # before it is closed: a run may be killed
    tracker.close()
    assert sorted(shown) == [
        "data/data_wait", "loss_by_source/rooms", "mixture/rooms", "speed/mfu", "speed/samples_per_second",
        "train/grad_norm", "train/loss",
    ]  # fmt: skip
    assert shown["loss_by_source/rooms"] == [(1, 0.5)]
    assert shown["train/loss"][0] == (1, 0.5) and np.isnan(shown["train/loss"][1][1])


def test_an_evaluation_has_scores_histograms_and_its_sheet(tmp_path, sheet):
    tracker = tracking.Tracker(tmp_path, TENSORBOARD)
    tracker.evaluation(200, "rooms", SCORES, [1.0, 10.0, 100.0, 5.0], [2.0, None, 0.0, 1000.0], sheet)
    tracker.evaluation(200, "streets", SCORES, [1.0], [None], tmp_path / "missing.png")
    assert events.scalars(tmp_path / "tensorboard") == {
        f"eval/{name}/{tag}": [(200, value)]
        for name in ("rooms", "streets")
        for tag, value in {"delta1": 0.5, "n": 4, "best_constant/answer": 2.5, "best_constant/delta1": 0.25}.items()
    }
    shown = {value.tag: value for event in events.read(tmp_path / "tensorboard") for value in event.summary.value}
    truth, answer = (shown[f"eval/rooms/log10_{name}"].histo for name in ("truth", "answer"))
    assert (truth.num, truth.min, truth.max, sum(truth.bucket)) == (4, 0.0, 2.0, 4)
    assert (answer.num, answer.min, answer.max) == (2, pytest.approx(np.log10(2)), 3.0)
    image = shown["eval/rooms/answers"].image
    assert (image.width, image.height) == (40, 30)
    assert image.encoded_image_string == sheet.read_bytes()
    assert Image.open(io.BytesIO(image.encoded_image_string)).size == (40, 30)
    assert "eval/streets/answers" not in shown and "eval/streets/log10_answer" not in shown


def test_steps_that_are_done_again_are_shown_once(tmp_path):
    for after, steps in ((0, range(1, 8)), (4, range(5, 13)), (12, ())):  # killed, resumed, started at its end
        tracker = tracking.Tracker(tmp_path, TENSORBOARD, after)
        for step in steps:
            tracker.scalars(step, {"loss": after + step / 100})
    tracker.close()
    tracking.Tracker(tmp_path, TENSORBOARD).evaluation(8, "rooms", SCORES, [1.0], [1.0])  # hides nothing
    shown = events.scalars(tmp_path / "tensorboard")
    assert [step for step, _ in shown["train/loss"]] == list(range(1, 13))
    assert [value > 4 for _, value in shown["train/loss"]] == [False] * 4 + [True] * 8
    assert shown["eval/rooms/delta1"] == [(8, 0.5)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3


def test_one_that_fails_is_told_once_and_stops_nothing(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("in the way")
    tracker = tracking.Tracker(tmp_path, TENSORBOARD)
    for step in range(3):
        tracker.scalars(step, {"loss": 1.0})
    tracker.close()
    said = capsys.readouterr().out
    assert said.count("warning: TensorBoard gets nothing more, training goes on: FileExistsError") == 1


def test_a_full_disk_raises_in_the_writer_and_not_in_the_run(tmp_path, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    tracker = tracking.Tracker(tmp_path, TENSORBOARD)
    tracker.scalars(1, {"loss": 1.0})
    records = tracker.opened["TensorBoard"].writer._py_recordio_writer
    records._writer.close()
    with Path("/dev/full").open("wb", buffering=0) as records._writer:
        for step in range(2, 40):  # more than any queue holds
            tracker.scalars(step, {"loss": 1.0})
        tracker.close()
    assert capsys.readouterr().out.count("No space left on device") == 1


def test_nothing_is_written_that_was_not_asked_for(tmp_path):
    track = config_module.Track(tensorboard=False)
    tracker = tracking.Tracker(tmp_path, dataclasses.replace(TENSORBOARD, track=track))
    tracker.scalars(1, {"loss": 1.0})
    tracker.close()
    tracking.Tracker(tmp_path, TENSORBOARD).close()
    assert list(tmp_path.iterdir()) == []


def test_weights_and_biases_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"track\.wandb_project needs the package wandb[\s\S]*pip install wandb"):
        tracking.Tracker(tmp_path, WANDB)


def test_weights_and_biases_that_cannot_begin_stops_nothing(tmp_path, monkeypatch, capsys):
    def init(**_):
        raise ConnectionError("network gone")

    library = types.ModuleType("wandb")
    library.init, library.__spec__ = init, types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", library)
    tracker = tracking.Tracker(tmp_path, WANDB)
    tracker.scalars(1, {"loss": 1.0})
    tracker.scalars(2, {"loss": 1.0})
    tracker.close()
    assert capsys.readouterr().out.count("warning: Weights & Biases gets nothing more") == 1


def test_weights_and_biases_offline_keeps_all_in_the_workdir(tmp_path, sheet, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for after in (0, 4):
        tracker = tracking.Tracker(tmp_path, WANDB, after)
        tracker.scalars(after + 1, {"loss": 1.0})
        tracker.evaluation(after + 1, "rooms", SCORES, [1.0], [2.0], sheet)
        tracker.close()
        name = (tmp_path / "wandb_id").read_text()
    kept = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(kept) == 2 and all(folder.name.endswith(name) for folder in kept)
    assert [file for folder in kept for file in folder.glob("*.wandb")]
