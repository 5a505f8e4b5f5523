import json
import shutil
import sys

import numpy as np
import pytest
import safetensors.numpy
import tiny
import torch
import transformers
import worlds

from depthlm_jax import hf, release, tree
from depthlm_jax import run as runs
from depthlm_jax.bench import convert
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


def tensors_of(folder) -> dict[str, np.ndarray]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in safetensors.numpy.load_file(file).items()}


def test_a_run_is_exported_as_its_parameters_are(workdir, exported, monkeypatch):
    """One at a time gives what all together, through the rules, would give; in shards, too."""
    run = runs.reopen(workdir)
    _, parameters = runs.trained_parameters(run)
    expected = tiny.hub_tensors(run.network.rules, parameters)
    monkeypatch.setattr(hf, "SHARD_BYTES", 30_000)
    sharded = exported.with_name("sharded")
    assert release.export_run(run, sharded) == 1
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for folder in (exported, sharded):
        found = tensors_of(folder)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name, strict=True)
    by_rule = [name for rule in run.network.rules for name in rule.tensors(run.network.shapes[rule.path])]
    assert list(json.loads((sharded / hf.INDEX).read_text())["weight_map"]) == by_rule


@pytest.mark.parametrize("named", ["bfloat16", "float16", "float32"])
def test_a_run_is_exported_in_the_type_that_its_base_names(workdir, tmp_path, named):
    shutil.copytree(workdir, tmp_path / "run")
    base = tmp_path / "run/base/config.json"
    base.write_text(json.dumps(json.loads(base.read_text()) | {"torch_dtype": named}))
    run = runs.reopen(tmp_path / "run")
    release.export_run(run, tmp_path / "hf")
    _, parameters = runs.trained_parameters(run)
    expected = tree.flatten(parameters)["model/norm/scale"]
    found = tensors_of(tmp_path / "hf")
    assert {value.dtype.name for value in found.values()} == {named}
    np.testing.assert_array_equal(found["model.norm.weight"], np.asarray(expected).astype(named))


@pytest.mark.parametrize("named", ["int8", "float8_e4m3fn", "float64"])
def test_a_type_that_is_not_written_is_named(workdir, tmp_path, named):
    shutil.copytree(workdir, tmp_path / "run")
    base = tmp_path / "run/base/config.json"
    base.write_text(json.dumps(json.loads(base.read_text()) | {"torch_dtype": named}))
    with pytest.raises(InputError, match=f"not written in this type(.|\n)*torch_dtype '{named}'(.|\n)*bfloat16"):
        release.export_run(runs.reopen(tmp_path / "run"), tmp_path / "hf")
    assert [folder.name for folder in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_conversion_changes_no_bit(tmp_path, monkeypatch, dtype, shard_bytes):
    monkeypatch.setattr(hf, "SHARD_BYTES", shard_bytes)
    source, output = tmp_path / "source", tmp_path / "output"
    tiny.save(tiny.MODELS["one key head, tied, windows only"], source, dtype)
    release.convert_folder(source, output, "qwen2_5_vl")
    assert (output / hf.INDEX).exists() == (shard_bytes < 10**9)
    found, expected = tensors_of(output), tensors_of(source)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].tobytes()) == (value.dtype, value.tobytes()), name
    convert.compare(source, output)
    _, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        output, output_loading_info=True, dtype=dtype
    )
    assert {key: list(value) for key, value in info.items() if len(value)} == {}


def test_each_tensor_keeps_its_own_type(tmp_path):
    source = tmp_path / "source"
    tiny.save(tiny.MODELS["one key head, tied, windows only"], source, torch.bfloat16)
    tensors = tensors_of(source)
    wide = [name for name in tensors if "norm" in name]
    tensors |= {name: tensors[name].astype(np.float32) for name in wide}
    safetensors.numpy.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    release.convert_folder(source, tmp_path / "output", "qwen2_5_vl")
    convert.compare(source, tmp_path / "output")
    assert {value.dtype.name for value in tensors_of(tmp_path / "output").values()} == {"float32", "bfloat16"}


def test_a_quantized_folder_is_refused_and_nothing_is_written(workdir, exported, tmp_path):
    source = shutil.copytree(exported, tmp_path / "source")
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match="the weights are quantized(.|\n)*gptq"):
        release.convert_folder(source, tmp_path / "output", "qwen2_5_vl")
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["hf", "source"]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_of_a_conversion_does_not_grow_with_the_folder(exported, tmp_path, monkeypatch):
    """0.4 GB of bfloat16, of which the largest tensor has 34 MB, against a folder of 0.1 MB."""
    few = {"num_hidden_layers": 6, "intermediate_size": 4096, "vision_config": convert.HF_CONFIG["vision_config"]}
    monkeypatch.setattr(convert, "HF_CONFIG", convert.HF_CONFIG | few | {"vision_config": few["vision_config"] | {
        "depth": 2, "fullatt_block_indexes": [1]}})  # fmt: skip
    monkeypatch.setattr(convert, "VOCABULARY", 8192)
    convert.write_random(tmp_path / "large")
    size_gb = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")) / 1e9
    assert size_gb > 0.4
    peaks_gb = [
        convert.in_a_process("export", source, tmp_path / "output" / source.name)["peak_gb"]
        for source in (exported, tmp_path / "large")
    ]
    convert.compare(tmp_path / "large", tmp_path / "output/large")
    assert peaks_gb[1] - peaks_gb[0] < 0.3 * size_gb


def test_what_lies_beside_and_inside_an_export_is_not_touched(workdir, exported):
    for name in ("hf.old", "hf.incomplete"):
        (exported.parent / name).mkdir()
        (exported.parent / name / "mine").write_text("kept")
    release.export_run(runs.reopen(workdir), exported)
    assert all((exported.parent / name / "mine").read_text() == "kept" for name in ("hf.old", "hf.incomplete"))
    (exported / "notes.md").write_text("mine")
    before = worlds.listing(exported)
    with pytest.raises(InputError, match=r"(?s)is not empty.*notes.md.*nothing else"):
        release.export_run(runs.reopen(workdir), exported)
    assert worlds.listing(exported) == before


def test_a_link_keeps_leading_to_where_it_leads(workdir, tmp_path):
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "hf").symlink_to(tmp_path / "large_disk")
    for _ in range(2):
        release.export_run(runs.reopen(workdir), tmp_path / "hf")
    assert (tmp_path / "hf").is_symlink()
    assert (tmp_path / "large_disk/model.safetensors").is_file()


def test_a_model_is_not_replaced_by_an_adapter(workdir, exported):
    with pytest.raises(InputError, match="of the same kind"):
        release.refuse_foreign(exported, adapter=True)
    release.refuse_foreign(exported)


def test_only_known_files_are_published(exported, tmp_path):
    for name in ("hf_token.txt", "trainer_state.json", "pytorch_model.bin.index.json"):
        (exported / name).write_text("{}")
    release.convert_folder(exported, tmp_path / "copy", "qwen2_5_vl")
    names = {file.name for file in (tmp_path / "copy").iterdir()}
    assert not names & {"hf_token.txt", "trainer_state.json", "pytorch_model.bin.index.json"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names


def test_no_penalty_reaches_whoever_decodes(workdir, tmp_path):
    file = workdir / "base/generation_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"repetition_penalty": 1.05, "do_sample": True, "temperature": 0.1}))
    release.export_run(runs.reopen(workdir), tmp_path / "hf")
    assert json.loads((tmp_path / "hf/generation_config.json").read_text()) == values | {"do_sample": False}
    file.write_text(json.dumps(values))
