"""config.json and preprocessor_config.json: what is read, and what is refused by name."""

import copy

import numpy as np
import pytest
import tiny
import transformers
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from depthlm_jax.errors import InputError
from depthlm_jax.models.layers import normalised
from depthlm_jax.models.pixtral.config import PREPROCESSOR, read_config

TINY = tiny.PIXTRAL_MODELS["pixtral, heads as wide as the stream"] | {"image_token_index": 10}
PUBLISHED = {  # leaves out what equals the defaults of transformers' classes
    "model_type": "llava", "image_token_index": 10, "projector_hidden_act": "gelu", "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "text_config": {
        "model_type": "mistral", "head_dim": 128, "hidden_size": 5120, "intermediate_size": 14336,
        "max_position_embeddings": 1024000, "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 1e9, "sliding_window": None, "vocab_size": 131072,
    },
    "vision_config": {
        "model_type": "pixtral", "head_dim": 64, "hidden_act": "silu", "image_size": 1024, "patch_size": 16,
        "rope_theta": 10000.0,
    },
}  # fmt: skip


def changed(values: dict, path: str, value: object) -> dict:
    """Returns a copy with one field of it, or of a section of it, replaced."""
    values = copy.deepcopy(values)
    *sections, name = path.split(".")
    inner = values[sections[0]] if sections else values
    inner[name] = value
    return values


def refused(hf_config: dict, preprocessor: dict = PREPROCESSOR) -> str:
    with pytest.raises(InputError) as error:
        read_config(hf_config, preprocessor)
    return str(error.value)


def test_the_published_files():
    config = read_config(PUBLISHED, PREPROCESSOR)
    vision, decoder = config.vision, config.decoder
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (1024, 4096, 24)
    assert (vision.num_attention_heads, vision.patch_size, vision.rope_theta) == (16, 16, 1e4)
    assert (decoder.num_attention_heads, decoder.num_key_value_heads, decoder.head_width) == (32, 8, 128)
    assert (decoder.hidden_size, decoder.vocab_size, decoder.rms_norm_eps) == (5120, 131072, 1e-5)
    assert (config.rope_theta, config.image_token_id, decoder.attention_bias) == (1e9, 10, False)
    assert (config.grid_px, config.min_pixels, config.max_pixels, config.longest_px) == (16, 256, 1024**2, 1024)
    assert (config.channels, config.patch_slot_unit, config.patches_per_merged) == (768, 1, 1)
    assert set(config.heads.values()) == {32, 8, 16}


def test_version_5_says_the_same():
    for published in (PUBLISHED, TINY):
        saved = transformers.LlavaConfig.from_dict(published).to_dict()
        assert "rope_parameters" in saved["text_config"] and "rope_theta" not in saved["text_config"]
        assert read_config(saved, PREPROCESSOR) == read_config(published, PREPROCESSOR)


@pytest.mark.parametrize(
    "hf_config, found",
    [
        (next(iter(tiny.MODELS.values())), "'model_type': 'qwen2_5_vl'"),
        (changed(TINY, "vision_config", {"model_type": "clip_vision_model"}), "'vision_config.model_type': 'clip_v"),
        (changed(TINY, "text_config.model_type", "llama"), "'text_config.model_type': 'llama'"),
        (changed(TINY, "vision_config", None), "'vision_config.model_type': None"),
    ],
)
def test_another_kind_of_model(hf_config, found):
    text = refused(hf_config)
    for part in ("config.json: another kind of model", found, "'vision_config.model_type': 'pixtral'", "model.family"):
        assert part in text


def test_no_kind_at_all():
    assert "model_type is missing" in refused({"hidden_size": 64})


@pytest.mark.parametrize(
    "path, value, named",
    [
        ("vision_config.hidden_act", "gelu", "vision_config.hidden_act"),
        ("text_config.hidden_act", "gelu", "text_config.hidden_act"),
        ("projector_hidden_act", "relu", "projector_hidden_act"),
        ("text_config.sliding_window", 4096, "text_config.sliding_window"),
        ("vision_feature_layer", -2, "vision_feature_layer"),
        ("vision_feature_layer", [-2, -1], "vision_feature_layer"),
        ("vision_feature_select_strategy", "default", "vision_feature_select_strategy"),
        ("tie_word_embeddings", True, "tie_word_embeddings"),
        ("text_config.tie_word_embeddings", True, "tie_word_embeddings"),
        ("multimodal_projector_bias", False, "multimodal_projector_bias"),
    ],
)
def test_what_the_port_does_not_do(path, value, named):
    text = refused(changed(TINY, path, value))
    for part in (f"config.json: {named} is not supported", repr(value), "published architecture"):
        assert part in text


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_other_kinds_of_rope(key):
    scaling = {key: "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    text = refused(changed(TINY, "text_config.rope_scaling", scaling))
    assert "text_config.rope_type is not supported" in text and "'yarn'" in text


def test_a_value_of_the_wrong_type():
    text = refused(changed(TINY, "text_config.num_hidden_layers", "many"))
    assert "config.json: cannot be read" in text and "num_hidden_layers" in text


@pytest.mark.parametrize("patch", [14, {"height": 14, "width": 14}, {"height": 16, "width": 14}])
def test_patch_sizes_that_differ(patch):
    text = refused(TINY, PREPROCESSOR | {"patch_size": patch})
    for part in ("patch_size differs", repr(patch), "vision_config.patch_size, 16"):
        assert part in text


@pytest.mark.parametrize("missing", ["image_mean", "image_std", "size"])
def test_a_missing_field_of_the_preprocessor(missing):
    values = {name: value for name, value in PREPROCESSOR.items() if name != missing}
    assert f"{missing} is missing" in refused(TINY, values)


def test_images_that_are_not_normalised():
    assert "do_normalize is not supported" in refused(TINY, PREPROCESSOR | {"do_normalize": False})


@pytest.mark.parametrize("rescale", [{}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}])
def test_pixels_are_scaled_as_the_file_says(rescale):
    """do_rescale false, as the release has it, included: its means are then some hundreds."""
    values = PREPROCESSOR | rescale
    config = read_config(TINY, values)
    images = tiny.random_images(config, [(1, 1), (1, 1)], seed=0)
    theirs = PixtralImageProcessorPil(**values)(images, do_resize=False, return_tensors="np")["pixel_values"]
    patches = np.stack([image.transpose(2, 0, 1).ravel() for image in images])
    ours = normalised(patches, config.rescale_factor, config.image_mean, config.image_std)
    assert tiny.distance(ours, theirs.reshape(2, -1)) <= 1e-6 * np.abs(theirs).max()
    assert (config.rescale_factor == 1) == (rescale == {"do_rescale": False})


def test_images_as_large_as_the_tower_takes_where_they_are_not_resized():
    config = read_config(TINY, PREPROCESSOR | {"do_resize": False})
    assert config.longest_px == 1024
    assert config.max_pixels == config.longest_px**2


def test_images_larger_than_the_tower_are_refused():
    with pytest.raises(InputError, match=r"(?s)size.longest_edge 2048.*vision_config.image_size, 1024.*raise both"):
        read_config(TINY, PREPROCESSOR | {"size": {"longest_edge": 2048}})
