import json
import shutil

import pytest
import worlds

from depthlm_jax import release
from depthlm_jax import run as runs
from depthlm_jax.data import pipeline
from depthlm_jax.errors import InputError
from depthlm_jax.train import loop


@pytest.fixture(scope="module")
def workdir(scenes, tmp_path_factory):
    """A run of one step."""
    folder = tmp_path_factory.mktemp("run")
    config = worlds.config(scenes, {"train.max_steps": 1})
    run = runs.open_run(config, folder)
    batches = pipeline.training_batches(pipeline.open_sources(config), run.processor, config)
    loop.run(
        loop.make_trainer(run.network, config, run.mesh), config, folder, batches, lambda: runs.first_parameters(run)
    )
    return folder


@pytest.fixture
def exported(workdir, tmp_path):
    release.export_run(runs.reopen(workdir), tmp_path / "hf")
    return tmp_path / "hf"


def test_the_folder_says_how_to_ask(exported):
    note = json.loads((exported / "config.json").read_text())["depthlm"]
    assert note == {
        "focal_px": 50.0, "geometry": "corrected", "label_kind": "z", "camera_hint": "none", "unit": "m",
        "reference": {"mode": "arrow", "scale": 1, "color": "red", "questions": 1, "layout": "independent"},
    }  # fmt: skip


def test_an_earlier_export_is_replaced_and_nothing_else_is_left(workdir, exported):
    before = (exported / "model.safetensors").read_bytes()
    assert release.export_run(runs.reopen(workdir), exported) == 1
    assert (exported / "model.safetensors").read_bytes() == before
    assert [folder.name for folder in exported.parent.iterdir()] == ["hf"]


def test_a_failed_conversion_leaves_the_earlier_export_and_no_half_folder(workdir, exported, tmp_path):
    before = worlds.listing(exported)
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    (broken / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="model.safetensors: cannot be read"):
        release.convert_folder(broken, exported, "qwen2_5_vl")
    assert worlds.listing(exported) == before
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["broken", "hf"]


def test_a_foreign_folder_and_a_file_are_refused(workdir, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("more work")
    before = worlds.listing(tmp_path)
    for name, found in (("own", "thesis.tex"), ("file", "a file")):
        with pytest.raises(InputError, match="is not empty") as error:
            release.export_run(runs.reopen(workdir), tmp_path / name)
        assert found in str(error.value)
    assert worlds.listing(tmp_path) == before


def test_a_base_folder_of_somebody_else_is_in_the_way(scenes, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="base is in the way"):
        runs.open_run(worlds.config(scenes), tmp_path)
    assert (tmp_path / "base/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["config.json", "base/config.json", "base/tokenizer.json"])
def test_a_damaged_workdir_is_named(workdir, tmp_path, name):
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run/base/vocab.json").unlink()
    with pytest.raises(InputError) as error:
        runs.reopen(tmp_path / "run")
    assert "found:" in str(error.value)
    (tmp_path / "run/config.json").write_text("{")
    with pytest.raises(InputError, match="config.json: cannot be read"):
        runs.reopen(tmp_path / "run")
