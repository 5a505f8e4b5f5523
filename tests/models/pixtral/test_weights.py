"""Hugging Face folders: there and back without a changed bit, readable by both majors."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny
import torch
import transformers

from depthlm_jax import hf
from depthlm_jax.errors import InputError
from depthlm_jax.models import registry
from depthlm_jax.models.pixtral.config import read_config
from depthlm_jax.models.pixtral.folder import PROCESSOR, copy_published, hub_config

NARROW, WIDE = "pixtral, narrower heads", "pixtral, wider heads, one layer"
DTYPES = {torch.float32: np.dtype(np.float32), torch.bfloat16: np.dtype(ml_dtypes.bfloat16)}
OLD_PYTHON = os.environ.get("DEPTHLM_HF451_PYTHON")


@pytest.fixture(scope="module", params=[(NARROW, torch.bfloat16), (WIDE, torch.float32)], ids=["bfloat16", "float32"])
def saved(request, tmp_path_factory):
    """A folder, the PyTorch model that it is of, and the dtype of its weights."""
    name, dtype = request.param
    folder = tmp_path_factory.mktemp("saved")
    return folder, tiny.save(tiny.PIXTRAL_MODELS[name], folder, dtype), dtype


def read_jsons(folder: Path, *names: str) -> list[dict]:
    return [json.loads((folder / name).read_text()) for name in names]


def network_of(folder: Path) -> registry.Network:
    return registry.build("pixtral", read_config(*read_jsons(folder, "config.json", "preprocessor_config.json")))


def parameters_of(folder: Path) -> dict[str, np.ndarray]:
    network = network_of(folder)
    return dict(hf.read_parameters(folder, network.rules, network.shapes))


def write_parameters(folder: Path, network: registry.Network, parameters: dict[str, np.ndarray], dtype) -> None:
    in_order = ((rule.path, parameters[rule.path]) for rule in network.rules)
    hf.write_parameters(folder, network.rules, network.shapes, dtype, in_order)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in safetensors.numpy.load_file(file).items()}


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("sharded", [False, True])
def test_there_and_back(saved, tmp_path, monkeypatch, sharded):
    folder, model, dtype = saved
    if sharded:
        monkeypatch.setattr(hf, "SHARD_BYTES", 40_000)
    assert copy_published(folder, tmp_path) == []
    write_parameters(tmp_path, network_of(folder), parameters_of(folder), DTYPES[dtype])
    assert_same_bits(tensors_of(tmp_path), tensors_of(folder))
    assert_same_bits(parameters_of(tmp_path), parameters_of(folder))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == sharded

    given, written = (load_torch(each, dtype) for each in (folder, tmp_path))
    values = written.state_dict()
    assert values.keys() == model.state_dict().keys()
    assert [name for name, value in model.state_dict().items() if not torch.equal(values[name], value)] == []
    case = tiny.load(tmp_path)
    inputs = tiny.example(case, [(3, 5), (2, 2)], seed=0).torch_inputs
    with torch.no_grad():
        logits = [each(**inputs).logits for each in (given, written)]
    assert torch.equal(*logits)
    assert logits[0].std() > 1  # a model that says something


def load_torch(folder: Path, dtype: torch.dtype):
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=dtype
    )
    assert {key: list(value) for key, value in info.items() if len(value)} == {}
    return model.eval()


def test_names_are_those_of_the_hub(saved):
    """The names of version 4's modules, which version 5 saves as well."""
    folder, model, _ = saved
    beginnings = {name.split(".")[0] for name in tensors_of(folder)}
    assert beginnings == {"vision_tower", "multi_modal_projector", "language_model"}
    assert tensors_of(folder).keys() == {tiny.hub_name(name, "pixtral") for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", [NARROW, WIDE])
def test_config_of_version_5_becomes_the_published_form(name, tmp_path):
    tiny.save(tiny.PIXTRAL_MODELS[name], tmp_path)
    published, preprocessor, version_5 = read_jsons(
        tmp_path, "config.json", "preprocessor_config.json", "as_saved/config.json"
    )
    assert "dtype" in version_5 and "rope_parameters" in version_5["text_config"]
    hub = hub_config(version_5)
    for section in ("text_config", "vision_config"):
        assert published[section].items() <= hub[section].items()
        assert not hub[section].keys() & {"rope_parameters", "dtype", "layer_types"}
    top = {key: value for key, value in published.items() if key not in ("text_config", "vision_config")}
    assert top.items() <= hub.items()
    assert not hub.keys() & {"dtype", "image_token_id"}
    assert hub_config(hub) == hub
    assert hub_config(published) == published
    assert (
        read_config(hub, preprocessor) == read_config(version_5, preprocessor) == read_config(published, preprocessor)
    )
    renamed = {key: value for key, value in version_5.items() if key != "image_token_index"}
    assert hub_config(renamed | {"image_token_id": published["image_token_index"]}) == hub


def test_copy_gives_names_that_both_majors_know(saved, tmp_path):
    folder, _, _ = saved
    bad = shutil.copytree(folder, tmp_path / "bad", ignore=shutil.ignore_patterns("as_saved"))
    for name, change in {
        "tokenizer_config.json": {"tokenizer_class": "TokenizersBackend"},
        "preprocessor_config.json": {"image_processor_type": "PixtralImageProcessorFast"},
    }.items():
        (values,) = read_jsons(bad, name)
        (bad / name).write_text(json.dumps(values | change))
    assert copy_published(bad, tmp_path / "copy") == []
    tokenizer, preprocessor = read_jsons(tmp_path / "copy", "tokenizer_config.json", "preprocessor_config.json")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert preprocessor["image_processor_type"] == "PixtralImageProcessor"
    assert not list((tmp_path / "copy").glob("*safetensors*"))
    ids = [transformers.AutoTokenizer.from_pretrained(each)(tiny.QUESTION)["input_ids"] for each in (bad, folder)]
    assert ids[0] == ids[1]


def test_processor_config_names_the_ends_of_rows_and_images(saved, tmp_path):
    """As published; also from the file of version 5, which holds the preprocessor inside it."""
    folder, _, _ = saved
    (config, preprocessor) = read_jsons(folder, "config.json", "preprocessor_config.json")
    expected = PROCESSOR | {"patch_size": config["vision_config"]["patch_size"]}
    assert {expected["image_break_token"], expected["image_end_token"]} == {"[IMG_BREAK]", "[IMG_END]"}
    copy_published(folder, tmp_path / "copy")
    assert read_jsons(tmp_path / "copy", "processor_config.json") == [expected]

    version_5 = shutil.copytree(folder, tmp_path / "version 5", ignore=shutil.ignore_patterns("as_saved"))
    (version_5 / "preprocessor_config.json").unlink()
    (version_5 / "processor_config.json").write_text(json.dumps({"image_processor": preprocessor, **expected}))
    copy_published(version_5, tmp_path / "again")
    names = "processor_config.json", "preprocessor_config.json"
    assert read_jsons(tmp_path / "again", *names) == [expected, preprocessor]


def test_missing_and_unknown_tensors_are_named(saved, tmp_path):
    folder, _, _ = saved
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(folder / name, tmp_path / name)
    tensors = tensors_of(folder)
    tensors["multi_modal_projector.linear_3.weight"] = tensors.pop("multi_modal_projector.linear_2.bias")
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as error:
        parameters_of(tmp_path)
    text = str(error.value)
    assert "1 missing ['multi_modal_projector.linear_2.bias']" in text
    assert "1 unknown ['multi_modal_projector.linear_3.weight']" in text


# Run by another interpreter: 4.51 does not know the names and arguments of 5, but builds PixtralProcessor.
OLD_SCRIPT = """
import sys, numpy as np, torch, transformers
folder, given, output = sys.argv[1:]
assert transformers.__version__.startswith("4.51"), transformers.__version__
given = np.load(given)
processor = transformers.AutoProcessor.from_pretrained(folder, use_fast=False)
assert type(processor).__name__ == "PixtralProcessor", type(processor)
images = [given[name] for name in sorted(given.files) if name.startswith("image")]
inputs = processor(text=[str(given["text"])], images=[images], return_tensors="pt")
model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
    folder, output_loading_info=True, torch_dtype=torch.float32)
assert not any(len(value) for value in info.values()), info
with torch.no_grad():
    logits = model.eval()(**inputs).logits
np.savez(output, ids=inputs["input_ids"], logits=logits)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not OLD_PYTHON, reason="DEPTHLM_HF451_PYTHON names no interpreter with transformers 4.51.3 and torch"
)
@pytest.mark.parametrize("name", [NARROW, WIDE])
def test_transformers_4_reads_what_we_write(name, tmp_path):
    """Its own processor gives our tokens for two images of different sizes, its model our logits."""
    tiny.save(tiny.PIXTRAL_MODELS[name], tmp_path / "source")
    shutil.copyfile(
        tmp_path / "source" / "as_saved" / "config.json", tmp_path / "source" / "config.json"
    )  # version 5's
    written = tmp_path / "written"
    copy_published(tmp_path / "source", written)
    write_parameters(written, network_of(tmp_path / "source"), parameters_of(tmp_path / "source"), np.float32)

    case = tiny.load(written)
    example = tiny.example(case, [(3, 5), (6, 4)], seed=0)
    text = case.processor.tokenizer.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "image"}] * 2 + [{"type": "text", "text": f"{tiny.QUESTION} 0 times"}],
            },
            {"role": "assistant", "content": tiny.ANSWER},
        ],
        tokenize=False,
    )
    images = {f"image{number}": image for number, image in enumerate(example.images)}
    np.savez(tmp_path / "given.npz", text=text, **images)
    command = [OLD_PYTHON, "-c", OLD_SCRIPT, written, tmp_path / "given.npz", tmp_path / "found.npz"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    np.testing.assert_array_equal(found["ids"][0], example.sample.tokens_T)
    ours_BAV = jax.jit(case.network.logits)(case.parameters, tiny.pack_rows(case, [[example.sample]]))
    ours_AV = tiny.answers_of([[example.sample]], ours_BAV)[0][0]
    assert tiny.distance(ours_AV, found["logits"][0][example.sample.answer_index_A]) <= 1e-4
