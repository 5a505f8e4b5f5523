"""Counts of work against what attention really sees of packed rows."""

import numpy as np
import pytest
import worlds

from depthlm_jax.batch import RowShape
from depthlm_jax.data import packing, work
from depthlm_jax.models.attention import Among, visible

SIDES = [[(3, 5), (4, 4)], [(2, 7)], [(1, 1)]]  # merged patches of the images of each sample


@pytest.fixture(scope="module", params=["qwen2_5_vl", "pixtral"])
def processor(request, tmp_path_factory):
    return worlds.processor(worlds.HF_CONFIGS[request.param], tmp_path_factory.mktemp("base"))


def row_of(processor, questions: int) -> dict[str, np.ndarray]:
    grid = processor.config.grid_px
    samples = [
        processor.encode(
            [np.zeros((r * grid, c * grid, 3), np.uint8) for r, c in sides],
            [(f"How far {'is it ' * number}?", f"{number}.25") for number in range(1, questions + 1)],
        )
        for sides in SIDES
    ]
    tokens, patches, answers = np.sum([packing.size_of(sample) for sample in samples], axis=0)
    unit = processor.config.patch_slot_unit
    shape = RowShape(int(tokens) + 7, int(patches) + 3 * unit, int(answers) + 5, processor.config.channels)
    return packing.pack(samples, shape, processor.config.patches_per_merged)


@pytest.mark.parametrize("questions", [1, 3])
def test_pairs_are_those_that_attention_sees(processor, questions):
    row = row_of(processor, questions)
    window = processor.config.patch_slot_unit
    found = work.work_of(row, window)
    assert found.keys() == work.COUNTS.keys()
    tokens, patches = row["segments_BT"] > 0, row["image_id_BP"] > 0
    among = Among(row["segments_BT"][None], row["branch_BT"][None], causal=True)
    mask_TS = np.array(visible(among, np.arange(len(tokens)), among))[0]
    assert found["token_pairs"] == mask_TS[tokens][:, tokens].sum()
    same_image = row["image_id_BP"][:, None] == row["image_id_BP"][None]
    same_window = np.arange(len(patches))[:, None] // window == np.arange(len(patches))[None] // window
    assert found["image_pairs"] == same_image[patches][:, patches].sum()
    assert found["window_pairs"] == (same_image & same_window)[patches][:, patches].sum()
    assert (found["tokens"], found["patches"]) == (tokens.sum(), patches.sum())
    merged = sum(r * c for sides in SIDES for r, c in sides)
    assert found["merged"] == merged and found["patches"] == merged * processor.config.patches_per_merged
    assert found["answers"] == (row["weights_BA"] > 0).sum() > 0


def test_an_empty_row_is_no_work(processor):
    shape = RowShape(8, 2 * processor.config.patch_slot_unit, 4, processor.config.channels)
    row = packing.pack([], shape, processor.config.patches_per_merged)
    assert set(work.work_of(row, processor.config.patch_slot_unit).values()) == {0}
