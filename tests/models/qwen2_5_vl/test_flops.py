"""Floating-point operations of the vision tower at real size, as XLA counts them; nothing is computed."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest
from flax import nnx

from depthlm_jax.models import attention
from depthlm_jax.models.execution import Execution
from depthlm_jax.models.qwen2_5_vl import vision
from depthlm_jax.models.qwen2_5_vl.config import PREPROCESSOR, Qwen25VLConfig, read_config

ROWS, COLUMNS = 36, 50  # merged patches of an image of 1400 × 1008 px


@pytest.fixture(scope="module")
def config() -> Qwen25VLConfig:
    recipe = importlib.import_module("configs.qwen2_5_vl_3b").get_config()
    return read_config(recipe.model.hf_config.to_dict(), PREPROCESSOR)


def counted(config: Qwen25VLConfig, depth: int, full: tuple[int, ...]) -> float:
    """Returns XLA's count for a tower of so many blocks, on one image in whole windows."""
    sizes = dataclasses.replace(config.vision, depth=depth, fullatt_block_indexes=full)
    config = dataclasses.replace(config, vision=sizes)
    slots = -(-ROWS // sizes.window_merged) * -(-COLUMNS // sizes.window_merged) * sizes.window_patches
    tower = nnx.eval_shape(lambda: vision.VisionTower(config, nnx.Rngs(0), Execution()))
    graph, state = nnx.split(tower)
    shapes = (1, slots, config.channels), (1, slots, 2), (1, slots)
    fields = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, (np.uint8, np.int32, np.int32), strict=True)]
    lowered = jax.jit(lambda state, *fields: nnx.merge(graph, state)(*fields)).lower(state, *fields)
    return lowered.cost_analysis()["flops"]


def of_tower(config: Qwen25VLConfig) -> tuple[float, float]:
    """Returns XLA's count for the whole tower, and for one whose windows are masks of full attention.

    XLA counts the body of a loop once, so the parts are told apart by towers of one and two blocks.
    """
    window, full, both = (counted(config, *shape) for shape in ((1, ()), (1, (0,)), (2, (1,))))
    ends = window + full - both
    depth, full_blocks = config.vision.depth, len(config.vision.fullatt_block_indexes)
    whole = ends + (depth - full_blocks) * (window - ends) + full_blocks * (full - ends)
    return whole, ends + depth * (full - ends)


def useful(config: Qwen25VLConfig) -> float:
    """Returns the count of the tower's matrix products on the image's patches, without any padding."""
    sizes, merge = config.vision, config.vision.spatial_merge_size
    patches, width = ROWS * COLUMNS * merge**2, sizes.hidden_size
    heights, widths = (
        np.diff([*range(0, side, sizes.window_merged), side]) * merge for side in (ROWS, COLUMNS)
    )  # of windows, in patches
    seen = {False: np.sum(np.outer(heights, widths) ** 2), True: patches**2}
    block = patches * width * (4 * width + 3 * sizes.intermediate_size)
    attended = sum(2 * seen[layer in sizes.fullatt_block_indexes] * width for layer in range(sizes.depth))
    merged = patches // merge**2 * (merge**2 * width) * (merge**2 * width + sizes.out_hidden_size)
    return 2.0 * (patches * config.channels * width + sizes.depth * block + attended + merged)


def test_windows_cost_what_they_hold(config, monkeypatch):
    monkeypatch.setattr(attention, "SHORT", 1 << 20)  # block by block would be a loop, too
    found, as_masks = of_tower(config)
    ratio, before = found / useful(config), as_masks / useful(config)
    print(f"{useful(config):.3e} useful; {ratio:.3f} × in windows, {before:.3f} × as masks")
    assert 1 < ratio < 1.10
    assert before > 1.5
