"""Hugging Face folders: there and back without a changed bit, readable by both majors, bad ones refused by name."""

import json
import os
import shutil
import subprocess

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny
import torch
import transformers

from depthlm_jax import hf, tree
from depthlm_jax.errors import InputError
from depthlm_jax.models import registry
from depthlm_jax.models.qwen2_5_vl.config import read_config
from depthlm_jax.models.qwen2_5_vl.folder import copy_published, flat_config

TIED, UNTIED = "two heads share keys, tied, last blocks full", "eight heads share keys, ends full, patch 8"
DTYPES = {torch.float32: np.dtype(np.float32), torch.bfloat16: np.dtype(ml_dtypes.bfloat16)}
OLD_PYTHON = os.environ.get("DEPTHLM_HF451_PYTHON")


@pytest.fixture(scope="module", params=[(TIED, torch.bfloat16), (UNTIED, torch.float32)], ids=["bfloat16", "float32"])
def saved(request, tmp_path_factory):
    """A folder and the dtype of its weights."""
    name, dtype = request.param
    folder = tmp_path_factory.mktemp("saved")
    tiny.save(tiny.MODELS[name], folder, dtype)
    return folder, dtype


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    tiny.save(tiny.MODELS[TIED], folder)
    return folder


@pytest.fixture
def bad_folder(good_folder, tmp_path):
    return shutil.copytree(good_folder, tmp_path / "bad")


def network_of(folder) -> registry.Network:
    values = [json.loads((folder / name).read_text()) for name in ("config.json", "preprocessor_config.json")]
    return registry.build("qwen2_5_vl", read_config(*values))


def parameters_of(folder) -> dict[str, np.ndarray]:
    network = network_of(folder)
    return dict(hf.read_parameters(folder, network.rules, network.shapes))


def write_parameters(folder, network: registry.Network, parameters: dict[str, np.ndarray], dtype) -> None:
    in_order = ((rule.path, parameters[rule.path]) for rule in network.rules)
    hf.write_parameters(folder, network.rules, network.shapes, dtype, in_order)


def tensors_of(folder) -> dict[str, np.ndarray]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in safetensors.numpy.load_file(file).items()}


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("sharded", [False, True])
def test_there_and_back(saved, tmp_path, monkeypatch, sharded):
    folder, dtype = saved
    if sharded:
        monkeypatch.setattr(hf, "SHARD_BYTES", 40_000)
    network = network_of(folder)
    copy_published(folder, tmp_path)
    write_parameters(tmp_path, network, parameters_of(folder), DTYPES[dtype])
    tensors = tensors_of(folder)
    assert_same_bits(tensors_of(tmp_path), tensors)
    assert_same_bits(parameters_of(tmp_path), parameters_of(folder))

    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    if sharded:
        check_shards(tmp_path, files, tensors)
    else:
        assert files == ["model.safetensors"]
        assert not (tmp_path / hf.INDEX).exists()

    model, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, dtype=dtype
    )
    assert {key: list(value) for key, value in info.items() if len(value)} == {}
    loaded = {tiny.hub_name(name): value for name, value in model.named_parameters()}
    assert loaded.keys() == tensors.keys()
    for name, value in loaded.items():
        np.testing.assert_array_equal(value.detach().float().numpy(), tensors[name].astype(np.float32), err_msg=name)


def check_shards(folder, files: list[str], tensors: dict[str, np.ndarray]) -> None:
    assert len(files) > 2
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((folder / hf.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    held = {file: set(safetensors.numpy.load_file(folder / file)) for file in files}
    assert index["weight_map"] == {name: file for file, names in held.items() for name in names}
    for file in files:
        sizes = [value.nbytes for value in safetensors.numpy.load_file(folder / file).values()]
        assert sum(sizes) <= hf.SHARD_BYTES or len(sizes) == 1
        with safetensors.safe_open(folder / file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_random_parameters_become_a_folder(good_folder, tmp_path):
    """The way of a model that was never a Hugging Face folder."""
    network = network_of(good_folder)
    parameters = tree.flatten(network.init(jax.random.key(0)))
    assert {path: value.shape for path, value in parameters.items()} == network.shapes
    write_parameters(tmp_path, network, parameters, np.float32)
    copy_published(good_folder, tmp_path)
    assert_same_bits(parameters_of(tmp_path), {path: np.asarray(value) for path, value in parameters.items()})


# Run by another interpreter: 4.51 does not know the names, arguments and processors of 5.
OLD_SCRIPT = """
import sys, numpy as np, torch, transformers
folder, inputs, output = sys.argv[1:]
assert transformers.__version__.startswith("4.51"), transformers.__version__
transformers.AutoTokenizer.from_pretrained(folder)
transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
model, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
    folder, output_loading_info=True, torch_dtype=torch.float32)
assert not any(len(value) for value in info.values()), info
given = {name: torch.tensor(value) for name, value in np.load(inputs).items()}
with torch.no_grad():
    np.save(output, model.eval()(**given).logits.numpy())
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not OLD_PYTHON, reason="DEPTHLM_HF451_PYTHON names no interpreter with transformers 4.51.3 and torch"
)
@pytest.mark.parametrize("name", [TIED, UNTIED])
def test_transformers_4_reads_what_we_write(name, tmp_path):
    tiny.save(tiny.MODELS[name], tmp_path / "source")
    shutil.copyfile(tmp_path / "source" / "as_saved" / "config.json", tmp_path / "source" / "config.json")  # nested
    written = tmp_path / "written"
    copy_published(tmp_path / "source", written)
    network = network_of(tmp_path / "source")
    write_parameters(written, network, parameters_of(tmp_path / "source"), np.float32)

    case = tiny.load(written)
    example = tiny.example(case, [(3, 5), (6, 4)], seed=0)
    inputs = {key: value for key, value in example.torch_inputs.items() if key != "mm_token_type_ids"}
    np.savez(tmp_path / "inputs.npz", **{key: value.numpy() for key, value in inputs.items()})
    command = [OLD_PYTHON, "-c", OLD_SCRIPT, written, tmp_path / "inputs.npz", tmp_path / "logits.npy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    theirs_TV = np.load(tmp_path / "logits.npy")[0]
    ours_BAV = jax.jit(case.network.logits)(case.parameters, tiny.pack_rows(case, [[example.sample]]))
    ours_AV = tiny.answers_of([[example.sample]], ours_BAV)[0][0]
    assert tiny.distance(ours_AV, theirs_TV[example.sample.answer_index_A]) <= 1e-4


def rewrite_weights(folder, change) -> None:
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})


def refused(folder) -> str:
    with pytest.raises(InputError) as error:
        parameters_of(folder)
    return str(error.value)


def test_missing_tensor(bad_folder):
    rewrite_weights(bad_folder, lambda tensors: tensors.pop("visual.blocks.1.attn.qkv.bias"))
    text = refused(bad_folder)
    assert "tensors do not match config.json" in text
    assert "1 missing ['visual.blocks.1.attn.qkv.bias']; 0 unknown" in text


def test_extra_tensor(bad_folder):
    rewrite_weights(bad_folder, lambda tensors: tensors.update({"lm_head.weight": np.zeros((2, 2), np.float32)}))
    assert "0 missing []; 1 unknown ['lm_head.weight']" in refused(bad_folder)


def test_layout_of_version_5_is_named(bad_folder):
    def rename(tensors):
        for name in list(tensors):
            tensors[f"model.{name}"] = tensors.pop(name)

    rewrite_weights(bad_folder, rename)
    assert "hub layout" in refused(bad_folder)


def test_tensor_of_another_shape(bad_folder):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite_weights(bad_folder, lambda tensors: tensors.update({name: tensors[name][:-1].copy()}))
    text = refused(bad_folder)
    assert "1 tensors of another shape" in text
    assert f"{name} (79, 64), expected (80, 64)" in text


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_truncated_file(bad_folder, kept):
    file = bad_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    text = refused(bad_folder)
    assert "model.safetensors: cannot be read" in text
    assert "download the file again" in text


def test_absent_shard(good_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 100_000)
    network = network_of(good_folder)
    copy_published(good_folder, tmp_path)
    write_parameters(tmp_path, network, parameters_of(good_folder), np.float32)
    absent = sorted(tmp_path.glob("*.safetensors"))[1]
    absent.unlink()
    text = refused(tmp_path)
    assert "no complete set of weights" in text
    assert f"missing ['{absent.name}']" in text


@pytest.mark.parametrize("content", ["", '{"weight_map": {"a": "model-0', "{}"])
def test_unreadable_index(bad_folder, content):
    (bad_folder / hf.INDEX).write_text(content)
    assert f"{hf.INDEX}: cannot be read" in refused(bad_folder)


def test_no_weights(bad_folder):
    (bad_folder / "model.safetensors").unlink()
    text = refused(bad_folder)
    assert "no complete set of weights" in text
    assert "no *.safetensors" in text


@pytest.mark.parametrize("name", [TIED, UNTIED])
def test_nested_config_of_version_5_becomes_the_published_form(name, tmp_path):
    tiny.save(tiny.MODELS[name], tmp_path)
    published = json.loads((tmp_path / "config.json").read_text())
    nested = json.loads((tmp_path / "as_saved" / "config.json").read_text())
    assert "text_config" in nested and "hidden_size" not in nested
    flat = flat_config(nested)
    different = {
        key: (value, flat.get(key))
        for key, value in published.items()
        if flat.get(key) != value and key != "vision_config"
    }
    assert different == {}
    vision = flat["vision_config"] | {"in_chans": flat["vision_config"].get("in_channels")}
    assert published["vision_config"].items() <= vision.items()
    assert not flat.keys() & {"text_config", "rope_parameters", "dtype", "layer_types"}
    assert flat_config(flat) == flat
    assert flat_config(published) == published
    preprocessor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert read_config(flat, preprocessor) == read_config(nested, preprocessor) == read_config(published, preprocessor)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_other_kinds_of_rope_are_refused(good_folder, key):
    values = json.loads((good_folder / "config.json").read_text())
    values["rope_scaling"] = {key: "yarn", "mrope_section": [4, 2, 2], "factor": 4.0}
    with pytest.raises(InputError, match="(?s)rope_type is not supported.*'yarn'"):
        read_config(values, json.loads((good_folder / "preprocessor_config.json").read_text()))


def test_copy_gives_names_that_both_majors_know(bad_folder, tmp_path):
    for name, change in {
        "tokenizer_config.json": {"tokenizer_class": "TokenizersBackend"},
        "preprocessor_config.json": {"image_processor_type": "Qwen2_5_VLImageProcessor"},
    }.items():
        file = bad_folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert copy_published(bad_folder, tmp_path / "copy") == []
    read = {file.name: json.loads(file.read_text()) for file in (tmp_path / "copy").glob("*.json")}
    assert read["tokenizer_config.json"]["tokenizer_class"] == "Qwen2Tokenizer"
    assert read["preprocessor_config.json"]["image_processor_type"] == "Qwen2VLImageProcessor"
    assert not list((tmp_path / "copy").glob("*safetensors*"))
    tokenizers = [transformers.AutoTokenizer.from_pretrained(folder) for folder in (bad_folder, tmp_path / "copy")]
    assert tokenizers[0](tiny.QUESTION)["input_ids"] == tokenizers[1](tiny.QUESTION)["input_ids"]


def test_copy_without_tokenizer_warns(bad_folder, tmp_path):
    for name in ("tokenizer.json", "vocab.json"):
        (bad_folder / name).unlink()
    (warning,) = copy_published(bad_folder, tmp_path / "copy")
    assert "no tokenizer files" in warning


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_copy_of_an_incomplete_folder(bad_folder, tmp_path, name):
    (bad_folder / name).unlink()
    with pytest.raises(InputError, match=f"(?s)no {name}.*model.safetensors.*Hugging Face model folder"):
        copy_published(bad_folder, tmp_path / "copy")
