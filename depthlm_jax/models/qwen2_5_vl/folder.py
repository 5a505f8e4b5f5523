"""The files of a Hugging Face folder other than the weights: made from nothing, or copied in the form all can read."""

from pathlib import Path

import transformers

from depthlm_jax import files
from depthlm_jax.models import folder
from depthlm_jax.models.folder import hub_dtype
from depthlm_jax.models.hf_config import require
from depthlm_jax.models.qwen2_5_vl.config import MODEL_TYPE, PREPROCESSOR, read_config
from depthlm_jax.models.qwen2_5_vl.tokenizer import FORMAT
from depthlm_jax.models.tokenizer import build_small_tokenizer

SCRATCH_VOCABULARY = 512
TOKEN_FIELDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "bos_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
    "pad_token_id": "<|endoftext|>",
}


def write_scratch(hf_config: dict, texts: list[str], target: Path) -> None:
    """Writes config, tokenizer, preprocessor and generation files for a model of random weights.

    Args:
      hf_config: config.json without vocabulary and token ids, which come from the tokenizer.
      texts: what the tokenizer is made for.
      target: is made where it does not exist.
    """
    target.mkdir(parents=True, exist_ok=True)
    build_small_tokenizer(FORMAT, target, texts, SCRATCH_VOCABULARY)
    tokenizer = transformers.AutoTokenizer.from_pretrained(target, local_files_only=True)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKEN_FIELDS.items()}
    vision = require(hf_config, "vision_config")
    side = require(vision, "patch_size") * require(vision, "spatial_merge_size")
    patches = {
        "patch_size": vision["patch_size"], "merge_size": vision["spatial_merge_size"],
        "temporal_patch_size": require(vision, "temporal_patch_size"),
        "min_pixels": 4 * side**2, "max_pixels": 16384 * side**2,
    }  # fmt: skip
    stops = [ids["eos_token_id"], ids["pad_token_id"]]
    generation = {"do_sample": False, "eos_token_id": stops, "pad_token_id": ids["pad_token_id"]}
    named = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": MODEL_TYPE}
    files.write_json(
        target / "config.json", {**named, "torch_dtype": "float32", **hf_config, **ids, "vocab_size": len(tokenizer)}
    )
    files.write_json(target / "preprocessor_config.json", PREPROCESSOR | patches)
    files.write_json(target / "generation_config.json", generation)
    files.write_json(target / "chat_template.json", {"chat_template": FORMAT.chat_template})


def copy_published(source: Path, target: Path) -> list[str]:
    """Returns warnings, see models/folder.py; 4.51 would take a processor_config.json for the preprocessor's."""
    warnings = folder.copy_published(
        source,
        target,
        check=read_config,
        config=flat_config,
        preprocessor=hub_preprocessor,
        tokenizer_class=FORMAT.tokenizer_class,
    )
    (target / "processor_config.json").unlink(missing_ok=True)
    return warnings


def flat_config(values: dict) -> dict:
    """Returns config.json as on the hub: text fields at the top, rope_scaling, torch_dtype.

    transformers 4.51 reads the nested form of version 5 as an 80-layer default, without an error.
    """
    text = {**values, **values.get("text_config", {})}
    text["model_type"] = require(values, "model_type")
    text.pop("text_config", None)
    rope = text.pop("rope_parameters", None)
    if rope:
        text["rope_theta"] = require(rope, "rope_theta")
        text["rope_scaling"] = {"type": "mrope", "mrope_section": require(rope, "mrope_section")}
    text["tie_word_embeddings"] = bool(values.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    text.pop("layer_types", None)  # of version 5; follows from the rest
    return hub_dtype(text)


def hub_preprocessor(values: dict) -> dict:
    """Returns preprocessor_config.json with the class name that all versions know, and pixel limits by both names."""
    size = values.get("size") or {}
    limits = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    known = {name: limit for name, limit in limits.items() if limit is not None}
    return {**known, **values, "image_processor_type": PREPROCESSOR["image_processor_type"]}
