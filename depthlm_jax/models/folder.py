"""The files of a Hugging Face folder other than the weights: what the families share."""

import shutil
from collections.abc import Callable
from pathlib import Path

from depthlm_jax import files
from depthlm_jax.errors import InputError
from depthlm_jax.models.hf_config import require
from depthlm_jax.models.processor import TOKENIZER_FILES

COPIED = ("*.json", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
DAMAGED = "download the folder again"
WEIGHTS = ("safetensors", "adapter_config")  # in the names of files that describe weights


def copy_published(
    source: Path, target: Path, *, config: Callable, preprocessor: Callable, tokenizer_class: str
) -> list[str]:
    """Copies everything but the weights, in the hub's form, which transformers 4.51 and 5 read alike.

    Args:
      source: a Hugging Face folder.
      target: is made where it does not exist.
      config: content of config.json → the same as on the hub.
      preprocessor: likewise of preprocessor_config.json.
      tokenizer_class: a name that both majors know.

    Returns:
      Warnings for the user.

    Raises:
      InputError: config.json or preprocessor_config.json is missing or damaged.
    """
    for names in (("config.json",), ("preprocessor_config.json", "processor_config.json")):
        if not any((source / name).is_file() for name in names):
            raise InputError(
                f"{source}: no {names[0]}", found=sorted(file.name for file in source.glob("*"))[:12] or "nothing",
                expected="a Hugging Face model folder", fix="correct --hf_dir or model.hf_dir, or complete the folder",
            )  # fmt: skip
    target.mkdir(parents=True, exist_ok=True)
    found = {file for pattern in COPIED for file in source.glob(pattern)}
    for file in sorted(file for file in found if not any(word in file.name for word in WEIGHTS)):
        shutil.copyfile(file, target / file.name)
    _rewrite(target / "config.json", config)
    if not (target / "preprocessor_config.json").is_file():  # transformers 5 saves it inside processor_config.json
        processor = files.read_json(target / "processor_config.json", DAMAGED)
        files.write_json(target / "preprocessor_config.json", require(processor, "image_processor"))
    _rewrite(target / "preprocessor_config.json", preprocessor)
    if (target / "tokenizer_config.json").is_file():
        _rewrite(target / "tokenizer_config.json", lambda values: values | {"tokenizer_class": tokenizer_class})
    if not any((target / name).is_file() for name in TOKENIZER_FILES):
        return [f"{source} has no tokenizer files: {target} has none either, and needs them before it can be used"]
    return []


def hub_dtype(values: dict) -> dict:
    """Returns a section of config.json with its dtype under the name that transformers 4.51 reads."""
    values = dict(values)
    if "dtype" in values:
        values["torch_dtype"] = values.pop("dtype")
    return values


def _rewrite(file: Path, change: Callable) -> None:
    files.write_json(file, change(files.read_json(file, DAMAGED)))
