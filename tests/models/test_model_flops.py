"""Useful operations against XLA's own count, on models without loops; nothing is computed."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from configs import qwen2_5_vl_3b
from depthlm_jax import batch as batch_contract
from depthlm_jax import tree
from depthlm_jax.config import Lora
from depthlm_jax.data import work
from depthlm_jax.models import attention, flops, registry
from depthlm_jax.models.execution import Execution
from depthlm_jax.train import step

ROWS, TOKENS, PATCHES, ANSWERS, VOCABULARY = 2, 256, 256, 33, 4096
MODELS = {  # wide enough that norms and activations hardly count
    "qwen2_5_vl": tiny.sizes(
        heads=4, kv_heads=2, mrope_section=[16, 24, 24], layers=2, inner=1408, tied=True, depth=3, full=[2],
        vision_heads=4, vision_head_width=80, vision_inner=864, patch=14, window=112,
    ) | {"vocab_size": VOCABULARY, "image_token_id": 7},
    "pixtral": tiny.pixtral_sizes(
        heads=4, kv_heads=1, head_dim=128, hidden=640, layers=2, inner=1408, depth=2, vision_heads=4,
        vision_head_width=64, vision_inner=1024, patch=16,
    ) | {"image_token_index": 7},
}  # fmt: skip
MODELS["pixtral"]["text_config"]["vocab_size"] = VOCABULARY


@dataclasses.dataclass(frozen=True)
class Counted:
    network: registry.Network
    sizes: object

    def xla(self, factors: dict[str, float]) -> float:
        """Returns XLA's count of forward and backward pass."""
        shape = batch_contract.RowShape(TOKENS, PATCHES, ANSWERS, self.sizes.channels)
        batch = {
            name: jax.ShapeDtypeStruct(shape.of(name, ROWS), dtype) for name, dtype in batch_contract.FIELDS.items()
        }
        trained = {path: value for path, value in factors.items() if value}

        def loss(some: dict, others: dict, batch: dict):
            logits_BAV = self.network.logits(tree.unflatten(others | some), batch)
            return step.answer_loss(logits_BAV, batch["targets_BA"], batch["weights_BA"])["loss"]

        leaves = tree.flatten(self.network.abstract)
        some = {path: leaf for path, leaf in leaves.items() if path in trained}
        others = {path: leaf for path, leaf in leaves.items() if path not in trained}
        return jax.jit(jax.value_and_grad(loss)).lower(some, others, batch).cost_analysis()["flops"]

    def ours(self, factors: dict[str, float]) -> float:
        """Returns our count of all that a dense computation does: every pair of slots, and every slot."""
        merged = ROWS * PATCHES // self.sizes.patches_per_merged
        everything = {
            "tokens": ROWS * TOKENS, "token_pairs": ROWS * TOKENS**2, "patches": ROWS * PATCHES,
            "image_pairs": ROWS * PATCHES**2, "window_pairs": ROWS * PATCHES * self.sizes.patch_slot_unit,
            "merged": merged, "answers": ROWS * ANSWERS,
        }  # fmt: skip
        assert everything.keys() == work.COUNTS.keys()
        return flops.of_work(everything, self.network.operations(factors))


@pytest.fixture(params=MODELS)
def counted(request, monkeypatch) -> Counted:
    monkeypatch.setattr(attention, "SHORT", max(TOKENS, PATCHES))  # block by block would be a loop
    family = registry.family(request.param)
    sizes = family.read_config(MODELS[request.param], family.preprocessor)
    return Counted(registry.build(request.param, sizes, Execution(unroll=100)), sizes)


VISION = ("visual/", "vision_tower/", "multi_modal_projector/")
TRAINED = {
    "all": lambda path: True,
    "the decoder alone": lambda path: not path.startswith(VISION),
    "the vision tower alone": lambda path: path.startswith(VISION),
}


@pytest.mark.parametrize("part", TRAINED)
def test_useful_operations_are_those_that_xla_counts(counted, part):
    factors = {path: float(TRAINED[part](path)) for path in counted.network.shapes}
    ours, xla = counted.ours(factors), counted.xla(factors)
    print(f"{part}: {ours:.4e} ours, {xla:.4e} XLA, {ours / xla:.4f}")
    assert ours == pytest.approx(xla, rel=0.02)


def test_published_sizes_cost_what_arithmetic_says():
    """Of the 3B, forward and backward."""
    family = registry.family("qwen2_5_vl")
    sizes = family.read_config(qwen2_5_vl_3b.get_config().model.hf_config.to_dict(), family.preprocessor)
    network = registry.build("qwen2_5_vl", sizes)
    each = network.operations(dict.fromkeys(network.shapes, 1.0))
    layer = 2048 * (2048 + 2 * 256 + 2048) + 3 * 2048 * 11008
    assert each["tokens"] == 6 * 36 * layer
    block = 4 * 1280**2 + 3 * 1280 * 3420
    assert each["patches"] == 6 * 32 * block + 4 * 588 * 1280  # pixels have no gradient
    assert each["merged"] == 6 * (5120**2 + 5120 * 2048)
    assert each["answers"] == 6 * 2048 * 151936
    assert each["token_pairs"] == 12 * 36 * 2048
    assert (each["image_pairs"], each["window_pairs"]) == (12 * 4 * 1280, 12 * 28 * 1280)


def test_lora_costs_no_gradient_of_what_is_frozen():
    family = registry.family("qwen2_5_vl")
    sizes = family.read_config(MODELS["qwen2_5_vl"], family.preprocessor)
    network = registry.build("qwen2_5_vl", sizes, low_rank=Lora(pattern="model/layers/.*_proj", rank=4))
    factors = {path: float(path in network.lora_paths) for path in network.shapes}
    each, whole = network.operations(factors), network.operations(dict.fromkeys(network.shapes, 1.0))
    pixels = 2 * sizes.channels * sizes.vision.hidden_size  # have no gradient anyway
    assert each["patches"] == pytest.approx((whole["patches"] + pixels) / 3)  # forward alone
    assert each["tokens"] == pytest.approx(whole["tokens"] * 2 / 3, rel=0.05)
    assert np.isfinite(list(each.values())).all()
