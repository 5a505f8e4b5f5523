"""Sizes of a Qwen2.5-VL, read from the files of a Hugging Face folder."""

import dataclasses

from depthlm_jax.errors import InputError
from depthlm_jax.models.hf_config import DecoderSizes, require, require_value


@dataclasses.dataclass(frozen=True)
class Vision:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    in_channels: int = 3

    @property
    def window_merged(self) -> int:
        """Side of an attention window in merged patches."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    @property
    def window_patches(self) -> int:
        """Patch slots of an attention window."""
        return (self.window_merged * self.spatial_merge_size) ** 2


@dataclasses.dataclass(frozen=True)
class Qwen25VLConfig:
    vision: Vision
    decoder: DecoderSizes
    rope_theta: float
    mrope_section: tuple[int, ...]
    tie_word_embeddings: bool
    image_token_id: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    min_pixels: int
    max_pixels: int
    longest_px: int = 0  # of an image's side: no limit

    @property
    def grid_px(self) -> int:
        """Image sides are multiples of this."""
        return self.vision.patch_size * self.vision.spatial_merge_size

    @property
    def channels(self) -> int:
        """Size of C."""
        return self.vision.in_channels * self.vision.patch_size**2

    @property
    def patch_slot_unit(self) -> int:
        """P is a multiple of this: the slots of a window."""
        return self.vision.window_patches

    @property
    def patches_per_merged(self) -> int:
        return self.vision.spatial_merge_size**2

    @property
    def heads(self) -> dict[str, int]:
        """Head counts that a tensor axis has to divide."""
        return {
            "num_attention_heads": self.decoder.num_attention_heads,
            "num_key_value_heads": self.decoder.num_key_value_heads,
            "vision_config.num_heads": self.vision.num_heads,
        }


MODEL_TYPE = "qwen2_5_vl"
ROPE_THETA = 10000.0  # of the vision tower; published files do not name it
PREPROCESSOR_FILE = "preprocessor_config.json"
PREPROCESSOR = {  # the published preprocessor_config.json of every size
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def read_config(hf_config: dict, preprocessor: dict) -> Qwen25VLConfig:
    """Returns the sizes in config.json (flat as published, or nested as transformers 5 writes it).

    Raises:
      InputError: a field is missing, or asks for something that this port does not do.
    """
    if require(hf_config, "model_type") != MODEL_TYPE:
        raise InputError(
            "config.json: another kind of model", found=f"model_type {hf_config['model_type']!r}", expected=MODEL_TYPE,
            fix="use a Qwen2.5-VL folder, or set model.family",
        )  # fmt: skip
    text = {**hf_config, **hf_config.get("text_config", {})}
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    vision = dict(require(text, "vision_config"))
    vision.setdefault("in_channels", vision.get("in_chans", 3))
    require_value(text, "use_sliding_window", False)
    require_value(text, "hidden_act", "silu")
    require_value(vision, "hidden_act", "silu")
    rope_type = rope.get("rope_type") or rope.get("type", "default")
    require_value({"rope_type": "default" if rope_type == "mrope" else rope_type}, "rope_type", "default")
    _check_vision(vision, preprocessor)
    heads, hidden = require(text, "num_attention_heads"), require(text, "hidden_size")
    sizes = {name: require(text, name) for name in TEXT_SIZES}
    config = Qwen25VLConfig(
        decoder=DecoderSizes(
            **sizes, head_width=hidden // heads, initializer_range=float(text.get("initializer_range", 0.02)),
            attention_bias=True,
        ),
        vision=Vision(**{**_take(Vision, vision), "fullatt_block_indexes": tuple(vision["fullatt_block_indexes"])}),
        rope_theta=float(text.get("rope_theta") or require(rope, "rope_theta")),
        mrope_section=tuple(require(rope, "mrope_section")),
        image_mean=tuple(require(preprocessor, "image_mean")),
        image_std=tuple(require(preprocessor, "image_std")),
        min_pixels=_pixel_limit(preprocessor, "min_pixels", "shortest_edge"),
        max_pixels=_pixel_limit(preprocessor, "max_pixels", "longest_edge"),
        tie_word_embeddings=bool(hf_config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        image_token_id=require(text, "image_token_id"),
    )  # fmt: skip
    _check(config)
    return config


TEXT_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "rms_norm_eps",
)  # fmt: skip


def _check_vision(vision: dict, preprocessor: dict) -> None:
    """Raises InputError for what the vision tower here does not do."""
    require_value(vision.get("rope_parameters") or {}, "rope_theta", ROPE_THETA)
    expected = {name: require(vision, name) for name in ("patch_size", "temporal_patch_size")}
    expected |= {"merge_size": require(vision, "spatial_merge_size")}
    expected |= {"do_resize": True, "do_rescale": True, "do_normalize": True}
    for name, only in expected.items():
        require_value(preprocessor, name, only, PREPROCESSOR_FILE)
    factor = preprocessor.get("rescale_factor", 1 / 255)
    require_value({"rescale_factor × 255": round(255 * factor, 6)}, "rescale_factor × 255", 1.0, PREPROCESSOR_FILE)


def _check(config: Qwen25VLConfig) -> None:
    if sum(config.mrope_section) * 2 != config.decoder.head_width:
        raise InputError(
            "config.json: mrope_section does not fill the heads", found=f"sum of {config.mrope_section}",
            expected=f"half the head width, {config.decoder.head_width // 2}", fix="correct rope_scaling.mrope_section",
        )  # fmt: skip
    if config.vision.out_hidden_size != config.decoder.hidden_size:
        raise InputError(
            "config.json: vision and text widths differ", found=f"out_hidden_size {config.vision.out_hidden_size}",
            expected=f"hidden_size {config.decoder.hidden_size}", fix="correct vision_config.out_hidden_size",
        )  # fmt: skip


def _take(section: type, values: dict) -> dict:
    return {field.name: require(values, field.name) for field in dataclasses.fields(section)}


def _pixel_limit(preprocessor: dict, name: str, size_name: str) -> int:
    """The class default of max_pixels is 13 times smaller than the published file's: never fall back to it."""
    value = preprocessor.get(name) or (preprocessor.get("size") or {}).get(size_name)
    return int(value) if value else require(preprocessor, name)
