"""The files of a Hugging Face folder other than the weights: what the families share."""

import shutil
from collections.abc import Callable
from pathlib import Path

from depthlm_jax import files
from depthlm_jax.errors import InputError
from depthlm_jax.models.processor import TOKENIZER_FILES, read_preprocessor

COPIED = (  # of what lies in a folder: it may be published
    "config.json", "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tekken.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
DAMAGED = "download the folder again"


def copy_published(
    source: Path, target: Path, *, check: Callable, config: Callable, preprocessor: Callable, tokenizer_class: str
) -> list[str]:
    """Copies everything but the weights, in the hub's form, which transformers 4.51 and 5 read alike.

    Args:
      source: a Hugging Face folder.
      target: is made where it does not exist.
      check: (config.json, preprocessor_config.json) as they are; raises InputError for what the port does not do.
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
    given, of_images = files.read_json(source / "config.json", DAMAGED), read_preprocessor(source)
    check(given, of_images)
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted({file for pattern in COPIED for file in source.glob(pattern)}):
        shutil.copyfile(file, target / file.name)
    hub = {name: value for name, value in config(given).items() if name != "_name_or_path"}
    files.write_json(target / "config.json", hub)
    files.write_json(target / "preprocessor_config.json", preprocessor(of_images))
    if (target / "tokenizer_config.json").is_file():
        values = files.read_json(target / "tokenizer_config.json", DAMAGED)
        files.write_json(target / "tokenizer_config.json", values | {"tokenizer_class": tokenizer_class})
    if not any((target / name).is_file() for name in TOKENIZER_FILES):
        return [f"{source} has no tokenizer files: {target} has none either, and needs them before it can be used"]
    return []


def hub_dtype(values: dict) -> dict:
    """Returns a section of config.json with its dtype under the name that transformers 4.51 reads."""
    values = dict(values)
    if "dtype" in values:
        values["torch_dtype"] = values.pop("dtype")
    return values
