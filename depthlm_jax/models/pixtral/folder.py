"""The files of a Hugging Face folder other than the weights: made from nothing, or copied in the form all can read."""

from pathlib import Path

import transformers

from depthlm_jax import files
from depthlm_jax.models import folder
from depthlm_jax.models.folder import hub_dtype
from depthlm_jax.models.hf_config import require
from depthlm_jax.models.pixtral.config import MODEL_TYPE, PARTS, PREPROCESSOR, read_config
from depthlm_jax.models.pixtral.tokenizer import FORMAT
from depthlm_jax.models.tokenizer import build_small_tokenizer

SCRATCH_VOCABULARY = 512
PROCESSOR = {  # the published processor_config.json
    "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]", "image_token": "[IMG]", "patch_size": 16,
    "processor_class": "PixtralProcessor",
}  # fmt: skip


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
    patch = require(require(hf_config, "vision_config"), "patch_size")
    ids = {f"{role}_id": tokenizer.convert_tokens_to_ids(token) for role, token in FORMAT.roles.items()}
    ids.pop("unk_token_id")
    text = {**require(hf_config, "text_config"), "vocab_size": len(tokenizer), **ids}
    named = {"architectures": ["LlavaForConditionalGeneration"], "model_type": MODEL_TYPE, "torch_dtype": "float32"}
    image_token = tokenizer.convert_tokens_to_ids("[IMG]")
    config = {**named, **hf_config, "image_token_index": image_token, "text_config": text}
    files.write_json(target / "config.json", config)
    files.write_json(
        target / "preprocessor_config.json", PREPROCESSOR | {"patch_size": {"height": patch, "width": patch}}
    )
    files.write_json(target / "processor_config.json", PROCESSOR | {"patch_size": patch})
    files.write_json(target / "generation_config.json", {"do_sample": False, **ids})
    files.write_json(target / "chat_template.json", {"chat_template": FORMAT.chat_template})


def copy_published(source: Path, target: Path) -> list[str]:
    """Returns warnings, see models/folder.py; processor_config.json holds what transformers 5 and 4.51 agree on."""
    warnings = folder.copy_published(
        source,
        target,
        check=read_config,
        config=hub_config,
        preprocessor=hub_preprocessor,
        tokenizer_class=FORMAT.tokenizer_class,
    )
    patch = files.read_json(target / "config.json", folder.DAMAGED)["vision_config"].get("patch_size", 16)
    files.write_json(target / "processor_config.json", PROCESSOR | {"patch_size": patch})
    return warnings


def hub_config(values: dict) -> dict:
    """Returns config.json with the names that transformers 4.51 reads: rope_theta, torch_dtype, image_token_index."""
    hub = hub_dtype(values)
    for name in PARTS:
        hub[name] = _hub_part(require(values, name))
    if "image_token_id" in hub:
        hub["image_token_index"] = hub.pop("image_token_id")
    return hub


def _hub_part(values: dict) -> dict:
    part = hub_dtype(values)
    rope = part.pop("rope_parameters", None)
    if rope:
        part["rope_theta"] = require(rope, "rope_theta")
    part.pop("layer_types", None)  # of version 5; follows from the rest
    return part


def hub_preprocessor(values: dict) -> dict:
    """Returns preprocessor_config.json with the class name that all versions know."""
    return values | {"image_processor_type": PREPROCESSOR["image_processor_type"]}
