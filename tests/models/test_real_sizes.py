"""Names and shapes of every tensor at the published sizes, against transformers; no memory is allocated."""

import importlib.util
from pathlib import Path

import pytest
import tiny
import torch
import transformers

from depthlm_jax import hf
from depthlm_jax.models import registry
from depthlm_jax.models.qwen2_5_vl.config import PREPROCESSOR, read_config

CONFIGS = Path(__file__).parents[2] / "configs"
PUBLISHED = {  # config.json on the hub
    "qwen2_5_vl_3b": {
        "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "intermediate_size": 11008, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "qwen2_5_vl_7b": {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip
PUBLISHED_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31], "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
PARAMETERS = {"qwen2_5_vl_3b": 3_754_622_976, "qwen2_5_vl_7b": 8_292_166_656}


@pytest.fixture(scope="module", params=PUBLISHED)
def recipe(request) -> tuple[str, dict]:
    spec = importlib.util.spec_from_file_location(request.param, CONFIGS / f"{request.param}.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return request.param, recipe.get_config().model.hf_config.to_dict()


def test_recipe_holds_the_published_sizes(recipe):
    name, hf_config = recipe
    assert {key: hf_config[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    vision = PUBLISHED_VISION | {"out_hidden_size": PUBLISHED[name]["hidden_size"]}
    assert {key: hf_config["vision_config"][key] for key in vision} == vision


def test_every_tensor_of_the_published_model(recipe):
    name, hf_config = recipe
    network = registry.build("qwen2_5_vl", read_config(hf_config, PREPROCESSOR))
    found = hf.tensor_shapes(network.rules, network.shapes)
    with torch.device("meta"):
        config = transformers.Qwen2_5_VLConfig.from_dict(hf_config)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    expected = {tiny.hub_name(key): tuple(value.shape) for key, value in model.named_parameters()}
    assert found == expected
    assert ("lm_head.weight" in found) != PUBLISHED[name]["tie_word_embeddings"]
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
