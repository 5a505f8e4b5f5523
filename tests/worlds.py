"""Small worlds to train in: rendered scenes, the demo's recipe shrunk to seconds, and its run."""

import hashlib
import json
from pathlib import Path

import ml_collections
import numpy as np

from configs import demo
from depthlm_jax import config as config_module
from depthlm_jax.data import records, synthetic, tasks
from depthlm_jax.models import registry

SCENES = 24, 8  # train, validation
# Heads that four devices can share and widths that eight can, in as few weights as that allows.
HF_CONFIG = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=1024,
    rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]}, tie_word_embeddings=True, initializer_range=0.08,
    vision_config=dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=4, out_hidden_size=32, patch_size=8,
        spatial_merge_size=2, temporal_patch_size=2, window_size=32, fullatt_block_indexes=[1], in_chans=3,
        hidden_act="silu", tokens_per_second=2,
    ),
)  # fmt: skip
PIXTRAL_CONFIG = dict(
    model_type="llava", projector_hidden_act="gelu", vision_feature_layer=-1, vision_feature_select_strategy="full",
    text_config=dict(
        model_type="mistral", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000.0,
        max_position_embeddings=1024, sliding_window=None, initializer_range=0.08,
    ),
    vision_config=dict(
        model_type="pixtral", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        patch_size=16, hidden_act="silu", image_size=1024, rope_theta=10000.0, initializer_range=0.08,
    ),
)  # fmt: skip
HF_CONFIGS = {"qwen2_5_vl": HF_CONFIG, "pixtral": PIXTRAL_CONFIG}
PIXTRAL = {"model.family": "pixtral", "model.hf_config": PIXTRAL_CONFIG}  # changes that make a recipe one of Pixtral
SMALL = {
    "data.geometry.focal_px": 50.0, "data.geometry.crop_width": (48, 48), "data.geometry.crop_height": (48, 48),
    "data.reference.scale": 1, "data.global_batch_rows": 8, "data.max_tokens": 125, "data.max_patches": 64,
    "data.prefetch_rows": 8, "optim.learning_rate": 1e-2, "train.max_steps": 6, "train.save_steps": 3,
    "train.logging_steps": 1,
}  # fmt: skip


def render(folder: Path) -> Path:
    """Returns the folder of a small synthetic data set."""
    return synthetic.build(folder, *SCENES)


def recipe(scenes: Path, changes: dict | None = None) -> ml_collections.ConfigDict:
    """Returns the demo's recipe, shrunk; `changes` are {'train.seed': 1, …}."""
    shrunk = demo.get_config()
    shrunk.model.hf_config = HF_CONFIG
    paths = {"data.sources.main.path": str(scenes), "eval.source.path": str(scenes)}
    for path, value in (SMALL | paths | (changes or {})).items():
        value = config_module.eval_sets(value) if path == "eval.sets" else value
        section, _, name = path.rpartition(".")
        node = shrunk
        for part in section.split("."):
            node = node[part]
        with node.unlocked():
            node[name] = value
    return shrunk


def config(scenes: Path, changes: dict | None = None) -> config_module.Config:
    return config_module.parse(recipe(scenes, changes))


def two_sources(scenes: Path, changes: dict) -> config_module.Config:
    """Returns the config with a large and a small source."""
    shrunk = recipe(scenes, changes)
    both = {"large": {"path": str(scenes), "weight": 3.0}, "small": {"path": str(scenes), "split": "validation"}}
    shrunk.data.sources = config_module.sources(both)
    return config_module.parse(shrunk)


def processor(hf_config: dict, folder: Path):
    """Returns a processor with these sizes and a vocabulary of its own."""
    texts = ["system\n", "user\n", "assistant\n", tasks.SYSTEM, tasks.QUESTION, tasks.answer_text(1.23)]
    family = "pixtral" if hf_config.get("model_type") == "llava" else "qwen2_5_vl"
    registry.family(family).write_scratch(hf_config, texts, folder)
    return processor_of(folder)


def processor_of(folder: Path):
    return registry.family(registry.family_of(Path(folder))).processor(Path(folder))


def write_jsonl(scenes: Path, folder: Path, count: int) -> Path:
    """Returns a JSONL file with the first records of the scenes, pictures beside it."""
    source = records.open_source(config_module.Source(path=str(scenes)))
    lines = []
    for number in range(count):
        record = source[number]
        (folder / f"{number}.png").write_bytes(record.image)
        intrinsics = [*record.intrinsics.tolist(), *record.size]
        points, depth_m = record.pixel_coords.tolist(), record.depth_m.tolist()
        lines.append({"image": f"{number}.png", "intrinsics": intrinsics, "pixel_coords": points, "depth": depth_m})
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def rewrite_line(file: Path, number: int, change) -> None:
    """Replaces a line (from 1) of a JSONL file by what `change` makes of its fields."""
    lines = file.read_text().splitlines()
    lines[number - 1] = json.dumps(change(json.loads(lines[number - 1])))
    file.write_text("\n".join(lines) + "\n")


def listing(folder: Path) -> dict[str, tuple[int, str]]:
    """Returns {file: (time of change, hash)} of all that is in a folder."""
    return {
        str(file.relative_to(folder)): (
            file.stat().st_mtime_ns,
            hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "folder",
        )
        for file in sorted(folder.rglob("*"))
    }


def assert_same_arrays(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name, strict=True)
