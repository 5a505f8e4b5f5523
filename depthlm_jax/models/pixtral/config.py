"""Sizes of a Pixtral, read from the files of a Hugging Face folder."""

import dataclasses

import numpy as np
import transformers

from depthlm_jax.errors import InputError
from depthlm_jax.models.hf_config import DecoderSizes, require, require_value

MODEL_TYPE = "llava"  # the class that published folders are made for
PARTS = {"vision_config": "pixtral", "text_config": "mistral"}  # and the kinds of its parts
PREPROCESSOR = {  # the published preprocessor_config.json
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "PixtralImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": {"height": 16, "width": 16},
    "processor_class": "PixtralProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 1024},
}
PREPROCESSOR_FILE = "preprocessor_config.json"


@dataclasses.dataclass(frozen=True)
class Vision:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    num_channels: int
    rope_theta: float
    initializer_range: float


@dataclasses.dataclass(frozen=True)
class PixtralConfig:
    vision: Vision
    decoder: DecoderSizes
    rope_theta: float
    image_token_id: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    rescale_factor: float  # pixels are multiplied by it first
    longest_px: int  # of an image's side

    @property
    def grid_px(self) -> int:
        """Image sides are multiples of this."""
        return self.vision.patch_size

    @property
    def min_pixels(self) -> int:
        return self.grid_px**2

    @property
    def max_pixels(self) -> int:
        return self.longest_px**2

    @property
    def channels(self) -> int:
        """Size of C."""
        return self.vision.num_channels * self.vision.patch_size**2

    @property
    def patch_slot_unit(self) -> int:
        """P may be anything."""
        return 1

    @property
    def patches_per_merged(self) -> int:
        return 1

    @property
    def heads(self) -> dict[str, int]:
        """Head counts that a tensor axis has to divide."""
        return {
            "text_config.num_attention_heads": self.decoder.num_attention_heads,
            "text_config.num_key_value_heads": self.decoder.num_key_value_heads,
            "vision_config.num_attention_heads": self.vision.num_attention_heads,
        }


def read_config(hf_config: dict, preprocessor: dict) -> PixtralConfig:
    """Returns the sizes in config.json, as published or as transformers 5 writes it.

    Published files leave out what equals the defaults of transformers' classes, so those are asked.

    Raises:
      InputError: another kind of model, or a field that asks for something that this port does not do.
    """
    _check_kind(hf_config)
    try:
        read = transformers.LlavaConfig.from_dict(hf_config)
    except Exception as error:  # noqa: BLE001 transformers raises many kinds for a value of the wrong type
        raise InputError(
            "config.json: cannot be read", found=f"{type(error).__name__}: {str(error)[:300]}",
            expected="the config.json of a Pixtral", fix="download the folder again",
        ) from error  # fmt: skip
    vision, text = read.vision_config, read.text_config
    _check_supported(read.to_dict())
    return PixtralConfig(
        vision=Vision(
            vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers, vision.num_attention_heads,
            vision.patch_size, vision.num_channels, float(vision.rope_parameters["rope_theta"]),
            float(vision.initializer_range),
        ),
        decoder=DecoderSizes(
            text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads,
            text.num_key_value_heads, text.head_dim, text.vocab_size, float(text.rms_norm_eps),
            float(text.initializer_range), attention_bias=False,
        ),
        rope_theta=float(text.rope_parameters["rope_theta"]),
        image_token_id=read.image_token_index,
        **_read_preprocessor(preprocessor, vision.patch_size, int(np.min(vision.image_size))),
    )  # fmt: skip


def _check_kind(hf_config: dict) -> None:
    kinds = {"model_type": require(hf_config, "model_type")}
    kinds |= {f"{name}.model_type": (hf_config.get(name) or {}).get("model_type") for name in PARTS}
    expected = {"model_type": MODEL_TYPE} | {f"{name}.model_type": kind for name, kind in PARTS.items()}
    if kinds != expected:
        raise InputError(
            "config.json: another kind of model", found=kinds, expected=expected,
            fix="use a Pixtral folder, or set model.family",
        )  # fmt: skip


def _check_supported(values: dict) -> None:
    vision, text = values["vision_config"], values["text_config"]
    fields = {
        "vision_config.hidden_act": (vision["hidden_act"], "silu"),
        "vision_config.rope_type": (vision["rope_parameters"]["rope_type"], "axial"),
        "text_config.hidden_act": (text["hidden_act"], "silu"),
        "text_config.sliding_window": (text["sliding_window"], None),
        "text_config.rope_type": (text["rope_parameters"]["rope_type"], "default"),
        "tie_word_embeddings": (values["tie_word_embeddings"], False),
        "projector_hidden_act": (values["projector_hidden_act"], "gelu"),
        "multimodal_projector_bias": (values["multimodal_projector_bias"], True),
        "vision_feature_layer": (values["vision_feature_layer"], -1),
        "vision_feature_select_strategy": (values["vision_feature_select_strategy"], "full"),
    }
    for name, (found, only) in fields.items():
        require_value({name: found}, name, only)


def _read_preprocessor(values: dict, patch_size: int, image_size: int) -> dict:
    """Returns the fields of PixtralConfig that preprocessor_config.json decides; sides end at `image_size`."""
    patch = values.get("patch_size", PREPROCESSOR["patch_size"])
    sides = set(patch.values()) if isinstance(patch, dict) else {patch}
    if sides != {patch_size}:
        raise InputError(
            "preprocessor_config.json: patch_size differs from the vision tower's", found=patch,
            expected=f"vision_config.patch_size, {patch_size}", fix="use the files that belong together",
        )  # fmt: skip
    require_value(values, "do_normalize", True, PREPROCESSOR_FILE)
    rescale, resize = values.get("do_rescale", True), values.get("do_resize", True)
    longest = int(require(require(values, "size"), "longest_edge")) if resize else image_size
    if longest > image_size:  # transformers 4 mistakes positions beyond it for others
        raise InputError(
            f"{PREPROCESSOR_FILE}: images may be larger than the vision tower's", fix="raise both, or lower the former",
            found=f"size.longest_edge {longest}", expected=f"at most vision_config.image_size, {image_size}",
        )  # fmt: skip
    return {
        "image_mean": tuple(require(values, "image_mean")),
        "image_std": tuple(require(values, "image_std")),
        "rescale_factor": float(values.get("rescale_factor", 1 / 255)) if rescale else 1.0,
        "longest_px": longest,
    }
