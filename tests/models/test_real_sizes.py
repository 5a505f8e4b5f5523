"""Names and shapes of every tensor at the published sizes, against transformers; no memory is allocated."""

import importlib.util
from pathlib import Path

import pytest
import tiny
import torch

from depthlm_jax import hf
from depthlm_jax.models import registry
from depthlm_jax.models.pixtral.config import PREPROCESSOR as PIXTRAL_PREPROCESSOR
from depthlm_jax.models.qwen2_5_vl.config import PREPROCESSOR as QWEN_PREPROCESSOR

CONFIGS = Path(__file__).parents[2] / "configs"
PREPROCESSORS = {"qwen2_5_vl": QWEN_PREPROCESSOR, "pixtral": PIXTRAL_PREPROCESSOR}


def qwen(*, hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int, tied: bool, vision_inner: int):
    """Returns config.json on the hub."""
    return {
        "model_type": "qwen2_5_vl", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": inner, "vocab_size": vocab, "tie_word_embeddings": tied,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "image_token_id": 151655,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": vision_inner, "num_heads": 16, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31], "patch_size": 14, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "out_hidden_size": hidden, "hidden_act": "silu",
        },
    }  # fmt: skip


PUBLISHED = {  # config.json on the hub
    "qwen2_5_vl_3b": qwen(
        hidden=2048, layers=36, heads=16, kv_heads=2, inner=11008, vocab=151936, tied=True, vision_inner=3420
    ),
    "qwen2_5_vl_7b": qwen(
        hidden=3584, layers=28, heads=28, kv_heads=4, inner=18944, vocab=152064, tied=False, vision_inner=3420
    ),
    "qwen2_5_vl_32b": qwen(
        hidden=5120, layers=64, heads=40, kv_heads=8, inner=27648, vocab=152064, tied=False, vision_inner=3456
    ),
    "qwen2_5_vl_72b": qwen(
        hidden=8192, layers=80, heads=64, kv_heads=8, inner=29568, vocab=152064, tied=False, vision_inner=3456
    ),
    "pixtral_12b": {  # leaves out what equals the defaults of transformers' classes
        "model_type": "llava", "image_token_index": 10, "projector_hidden_act": "gelu", "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text_config": {
            "model_type": "mistral", "head_dim": 128, "hidden_size": 5120, "intermediate_size": 14336,
            "max_position_embeddings": 1024000, "num_hidden_layers": 40, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5, "rope_theta": 1e9, "sliding_window": None, "vocab_size": 131072,
        },
        "vision_config": {
            "model_type": "pixtral", "head_dim": 64, "hidden_act": "silu", "image_size": 1024, "patch_size": 16,
            "rope_theta": 10000.0,
        },
    },
}  # fmt: skip
PARAMETERS = {
    "qwen2_5_vl_3b": 3_754_622_976,
    "qwen2_5_vl_7b": 8_292_166_656,
    "qwen2_5_vl_32b": 33_452_718_336,
    "qwen2_5_vl_72b": 73_410_777_344,
    "pixtral_12b": 12_682_739_712,
}
RECIPES = [name for name in PUBLISHED if (CONFIGS / f"{name}.py").is_file()]


def hf_config_of(recipe: str) -> dict:
    spec = importlib.util.spec_from_file_location(recipe, CONFIGS / f"{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config().model.hf_config.to_dict()


def differences(found: dict, expected: dict) -> dict:
    """Returns the fields of `expected`, of its sections too, that `found` does not have or has otherwise."""
    different = {}
    for name, value in expected.items():
        if isinstance(value, dict):
            different |= {f"{name}.{key}": pair for key, pair in differences(found.get(name, {}), value).items()}
        elif name not in found or found[name] != value:
            different[name] = (found.get(name), value)
    return different


def test_recipes_of_published_models():
    assert RECIPES == ["qwen2_5_vl_3b", "qwen2_5_vl_7b", "pixtral_12b"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_holds_the_published_sizes(name):
    hf_config = hf_config_of(name)
    assert differences(hf_config, PUBLISHED[name]) == {}
    family = tiny.family_name(hf_config)
    sizes = [
        registry.family(family).read_config(values, PREPROCESSORS[family]) for values in (hf_config, PUBLISHED[name])
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_the_published_model(name):
    family = tiny.family_name(PUBLISHED[name])
    config = registry.family(family).read_config(PUBLISHED[name], PREPROCESSORS[family])
    network, peer = registry.build(family, config), tiny.PEERS[family]
    found = hf.tensor_shapes(network.rules, network.shapes)
    with torch.device("meta"):
        model = peer.model(peer.config.from_dict(PUBLISHED[name]))
    expected = {tiny.hub_name(key, family): tuple(value.shape) for key, value in model.named_parameters()}
    assert found == expected
    assert any("lm_head" in tensor for tensor in found) != PUBLISHED[name].get("tie_word_embeddings", False)
    assert sum(value.numel() for value in model.parameters()) == PARAMETERS[name]
