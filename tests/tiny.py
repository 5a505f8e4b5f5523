"""Tiny random models, saved as Hugging Face folders, and the same samples for PyTorch and for JAX."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from depthlm_jax import batch as batch_contract
from depthlm_jax import hf, tree
from depthlm_jax.data import packing
from depthlm_jax.hf import Rule
from depthlm_jax.models import registry
from depthlm_jax.models.execution import Execution

torch.set_num_threads(1)
QUESTION = "How far is the point pointed by the red arrow from the camera?"
ANSWER = "<think> The point is around 2.35 meters away. </think>\n\n<answer> 2.35 </answer>"


def sizes(
    *, heads: int, kv_heads: int, mrope_section: list[int], layers: int, inner: int, tied: bool, full: list[int],
    depth: int, vision_heads: int, vision_head_width: int, vision_inner: int, patch: int, window: int,
    merge: int = 2, rms_norm_eps: float = 1e-6, rope_theta: float = 1e6,
) -> dict:  # fmt: skip
    """Returns config.json as published, without the fields that come from a tokenizer."""
    hidden = heads * sum(mrope_section) * 2
    return {
        "model_type": "qwen2_5_vl", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_act": "silu",
        "rms_norm_eps": rms_norm_eps, "rope_theta": rope_theta, "max_position_embeddings": 1024,
        "rope_scaling": {"type": "mrope", "mrope_section": mrope_section}, "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "vision_config": {
            "depth": depth, "hidden_size": vision_heads * vision_head_width, "intermediate_size": vision_inner,
            "num_heads": vision_heads, "out_hidden_size": hidden, "patch_size": patch, "spatial_merge_size": merge,
            "temporal_patch_size": 2, "window_size": window, "fullatt_block_indexes": full, "in_chans": 3,
            "hidden_act": "silu", "tokens_per_second": 2,
        },
    }  # fmt: skip


def pixtral_sizes(
    *, heads: int, kv_heads: int, head_dim: int, hidden: int, layers: int, inner: int, depth: int, vision_heads: int,
    vision_head_width: int, vision_inner: int, patch: int, rms_norm_eps: float = 1e-5, rope_theta: float = 1e6,
) -> dict:  # fmt: skip
    """Returns config.json as published, without the fields that come from a tokenizer."""
    return {
        "model_type": "llava", "projector_hidden_act": "gelu", "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full", "tie_word_embeddings": False,
        "text_config": {
            "model_type": "mistral", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "hidden_act": "silu",
            "rms_norm_eps": rms_norm_eps, "rope_theta": rope_theta, "max_position_embeddings": 1024,
            "sliding_window": None,
        },
        "vision_config": {
            "model_type": "pixtral", "hidden_size": vision_heads * vision_head_width, "num_hidden_layers": depth,
            "intermediate_size": vision_inner, "num_attention_heads": vision_heads, "patch_size": patch,
            "hidden_act": "silu", "image_size": 1024, "rope_theta": 1e4,
        },
    }  # fmt: skip


MODELS = {
    "each head its own keys, first block full": sizes(
        heads=4, kv_heads=4, mrope_section=[2, 3, 3], layers=3, inner=96, tied=False, depth=4, full=[0],
        vision_heads=2, vision_head_width=16, vision_inner=48, patch=14, window=112,
    ),
    "two heads share keys, tied, last blocks full": sizes(
        heads=4, kv_heads=2, mrope_section=[4, 2, 2], layers=2, inner=80, tied=True, depth=3, full=[1, 2],
        vision_heads=4, vision_head_width=8, vision_inner=40, patch=14, window=56, rms_norm_eps=1e-5,
    ),
    "one key head, tied, windows only": sizes(
        heads=4, kv_heads=1, mrope_section=[1, 1, 2], layers=1, inner=40, tied=True, depth=2, full=[],
        vision_heads=1, vision_head_width=24, vision_inner=64, patch=14, window=84, rope_theta=1e4,
    ),
    "eight heads share keys, ends full, patch 8": sizes(
        heads=8, kv_heads=1, mrope_section=[2, 3, 3], layers=2, inner=72, tied=False, depth=4, full=[0, 3],
        vision_heads=3, vision_head_width=8, vision_inner=56, patch=8, window=112,
    ),
    "seven heads share keys, all blocks full": sizes(
        heads=14, kv_heads=2, mrope_section=[2, 1, 1], layers=5, inner=64, tied=False, depth=3, full=[0, 1, 2],
        vision_heads=2, vision_head_width=12, vision_inner=36, patch=8, window=48,
    ),
    "published pattern, twice a full block after three": sizes(
        heads=4, kv_heads=2, mrope_section=[4, 6, 6], layers=4, inner=128, tied=False, depth=8, full=[3, 7],
        vision_heads=2, vision_head_width=16, vision_inner=44, patch=14, window=112,
    ),
    "nine patches merge, four sections": sizes(
        heads=2, kv_heads=2, mrope_section=[2, 1, 3, 2], layers=2, inner=48, tied=True, depth=3, full=[1],
        vision_heads=2, vision_head_width=8, vision_inner=32, patch=8, window=80, merge=3,
    ),
}  # fmt: skip
PIXTRAL_MODELS = {
    "pixtral, heads as wide as the stream": pixtral_sizes(
        heads=4, kv_heads=2, head_dim=16, hidden=64, layers=3, inner=96, depth=3, vision_heads=2,
        vision_head_width=16, vision_inner=48, patch=16,
    ),
    "pixtral, narrower heads": pixtral_sizes(
        heads=4, kv_heads=1, head_dim=8, hidden=56, layers=2, inner=80, depth=2, vision_heads=3, vision_head_width=8,
        vision_inner=40, patch=8, rope_theta=1e9,
    ),
    "pixtral, wider heads, one layer": pixtral_sizes(
        heads=2, kv_heads=2, head_dim=32, hidden=40, layers=1, inner=72, depth=1, vision_heads=4, vision_head_width=12,
        vision_inner=64, patch=14, rms_norm_eps=1e-6,
    ),
    "pixtral, six heads share keys, deep tower": pixtral_sizes(
        heads=6, kv_heads=1, head_dim=12, hidden=48, layers=4, inner=64, depth=6, vision_heads=1,
        vision_head_width=24, vision_inner=36, patch=16, rope_theta=1e4,
    ),
}  # fmt: skip
EVERY_MODEL = MODELS | PIXTRAL_MODELS
ONE_OF_EACH = ["published pattern, twice a full block after three", "pixtral, narrower heads"]  # names in EVERY_MODEL
# Sides in merged patches; the first list of each row are its samples.
ROWS = [[[(3, 5), (6, 4)], [(1, 2), (5, 3)]], [[(2, 7), (4, 4)]]]


@dataclasses.dataclass(frozen=True)
class Peer:
    """A family in transformers."""

    config: type
    model: type
    image_processor: type
    inputs: Callable  # (case, images) → what the PyTorch model takes for them
    features: Callable  # (PyTorch model, inputs) → [M, D]: what the decoder sees of each merged patch


def _qwen_inputs(case: "Case", images: list[np.ndarray]) -> dict[str, torch.Tensor]:
    patches = hf_image_processor(case.folder)(images, do_resize=False, return_tensors="pt")
    return {"pixel_values": patches["pixel_values"], "image_grid_thw": patches["image_grid_thw"]}


def _qwen_features(model, inputs: dict) -> torch.Tensor:
    return model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output


def _pixtral_inputs(case: "Case", images: list[np.ndarray]) -> dict[str, torch.Tensor]:
    seen = hf_image_processor(case.folder)(images, do_resize=False, return_tensors="np")
    return {name: torch.tensor(seen[name]) for name in ("pixel_values", "image_sizes")}


def _pixtral_features(model, inputs: dict) -> torch.Tensor:
    return torch.cat(model.model.get_image_features(**inputs).pooler_output)


PEERS = {
    "qwen2_5_vl": Peer(
        transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil,
        _qwen_inputs, _qwen_features,
    ),
    "pixtral": Peer(
        transformers.LlavaConfig, transformers.LlavaForConditionalGeneration, PixtralImageProcessorPil,
        _pixtral_inputs, _pixtral_features,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A model in both worlds."""

    family: str
    folder: Path
    hf_model: transformers.PreTrainedModel
    processor: object
    network: registry.Network
    parameters: dict

    @property
    def config(self):
        return self.processor.config

    @property
    def peer(self) -> Peer:
        return PEERS[self.family]

    @functools.cached_property
    def jax_module(self) -> nnx.Module:
        """The module behind the network's functions, for tests of its parts."""
        return module(self.family, self.config, self.parameters)

    def hub_name(self, name: str) -> str:
        """Returns the published name of a parameter of the transformers 5 model."""
        return hub_name(name, self.family)


def save(hf_config: dict, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Returns the PyTorch model with random weights whose complete folder, in hub layout, it has written."""
    family = family_name(hf_config)
    registry.family(family).write_scratch(hf_config, [QUESTION, ANSWER], folder)
    peer = PEERS[family]
    model = peer.model(peer.config.from_dict(json.loads((folder / "config.json").read_text()))).eval()
    randomise(model, seed)
    model.to(dtype).save_pretrained(folder / "as_saved")  # its config.json is not in the published form
    (folder / "as_saved" / "model.safetensors").rename(folder / "model.safetensors")
    return model


def family_name(hf_config: dict) -> str:
    return next(name for name, this in registry.FAMILIES.items() if this.model_type == hf_config["model_type"])


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draws matrices that keep activations and logits at order one or more, biases, and norm scales around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.3 * values)
            elif parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * values)
            elif "lm_head" in name or "embed_tokens" in name:
                parameter.copy_(2 * values / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(values / parameter[0].numel() ** 0.5)


def load(folder: Path, hf_model=None, remat: str = "none") -> Case:
    family = registry.family_of(folder)
    processor = registry.family(family).processor(folder)
    network = registry.build(family, processor.config, Execution(remat=remat))
    leaves = hf.read_parameters(folder, network.rules, network.shapes)
    parameters = tree.unflatten({path: jnp.asarray(value) for path, value in leaves})
    return Case(family, folder, hf_model, processor, network, parameters)


def build(hf_config: dict, folder: Path) -> Case:
    return load(folder, save(hf_config, folder))


def module(family: str, config, parameters: dict) -> nnx.Module:
    this = registry.family(family).module
    graph, _ = nnx.split(nnx.eval_shape(lambda: this(config, nnx.Rngs(0), Execution())), nnx.Param)
    return nnx.merge(graph, nnx.State(parameters))


def layer_of(stacked: nnx.Module, number: int) -> nnx.Module:
    graph, state = nnx.split(stacked)
    return nnx.merge(graph, jax.tree.map(lambda a: a[number], state))


def random_images(config, grids: list[tuple[int, int]], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (r * config.grid_px, c * config.grid_px, 3), dtype=np.uint8) for r, c in grids]


@dataclasses.dataclass(frozen=True)
class Example:
    """One sample in both worlds; `torch_inputs` is what the PyTorch model takes."""

    images: list[np.ndarray]
    sample: batch_contract.Sample
    torch_inputs: dict[str, torch.Tensor]


def example(case: Case, grids: list[tuple[int, int]], seed: int, answer: str | None = ANSWER) -> Example:
    images = random_images(case.config, grids, seed)
    sample = case.processor.encode(images, [(f"{QUESTION} {seed} times", answer)])
    return Example(images, sample, torch_inputs(case, sample, images))


def torch_inputs(case: Case, sample: batch_contract.Sample, images: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """Returns what the PyTorch model takes for a sample of these images."""
    ids = torch.tensor(sample.tokens_T[None])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if case.family == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == case.config.image_token_id).int()
    return inputs | case.peer.inputs(case, images)


def hf_image_processor(folder: Path):
    return PEERS[registry.family_of(folder)].image_processor.from_pretrained(folder)


def examples(case: Case) -> list[list[Example]]:
    """Returns the examples of each row: two images of different sizes each."""
    return [
        [example(case, grids, seed=10 * row + number) for number, grids in enumerate(row_grids)]
        for row, row_grids in enumerate(ROWS)
    ]


def pack_rows(case: Case, rows: list[list[batch_contract.Sample]], spare_tokens: int = 5) -> dict[str, np.ndarray]:
    """Returns a batch whose rows have padding of every kind."""
    unit = case.config.patch_slot_unit
    shape = batch_contract.RowShape(
        tokens=max(sum(len(s.tokens_T) for s in row) for row in rows) + spare_tokens,
        patches=max(sum(len(s.patches_PC) for s in row) for row in rows) + unit,
        answers=max(sum(len(s.targets_A) for s in row) for row in rows) + 2,
        channels=case.config.channels,
    )
    batch = packing.stack([packing.pack(row, shape, case.config.patches_per_merged) for row in rows])
    batch_contract.check(batch, shape)
    return batch


def answers_of(rows: list[list[batch_contract.Sample]], logits_BAV) -> list[list[np.ndarray]]:
    """Returns each sample's share of the logits."""
    shares = []
    for row, logits_AV in zip(rows, np.asarray(logits_BAV), strict=True):
        ends = np.cumsum([len(sample.targets_A) for sample in row])
        shares.append(np.split(logits_AV, ends)[: len(row)])
    return shares


def hub_name(name: str, family: str = "qwen2_5_vl") -> str:
    """Returns the published name of a parameter of a transformers 5 module."""
    names = registry.family(family).modules
    hub = next((hub for hub, there in names.items() if name.startswith(there)), None)
    return name if hub is None else name.replace(names[hub], hub, 1)


def hub_tensors(rules: list[Rule], parameters: dict) -> dict[str, np.ndarray]:
    """Returns parameters (or their gradients) as the tensors of the hub layout, through the rules."""
    flat, tensors = tree.flatten(parameters), {}
    for rule in rules:
        value = np.asarray(flat[rule.path])
        parts = value if "{}" in rule.tensor else [value]
        for name, part in zip(rule.tensors(value.shape), parts, strict=True):
            tensors[name] = rule.layout.write(part, rule.shape_there(value.shape))
    return tensors


def distance(ours, theirs) -> float:
    """Returns the largest absolute difference; shapes have to be equal."""
    ours, theirs = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for x in (ours, theirs))
    assert ours.shape == theirs.shape
    return float(np.abs(ours.astype(np.float64) - theirs).max())
