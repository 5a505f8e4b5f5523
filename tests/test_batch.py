import dataclasses

import numpy as np
import pytest

from depthlm_jax import batch as contract
from depthlm_jax.data import packing
from depthlm_jax.errors import InputError
from depthlm_jax.models import LETTERS

SHAPE = contract.RowShape(tokens=7, patches=8, answers=3, channels=5)


@pytest.fixture
def batch():
    return {name: np.zeros(SHAPE.of(name, 2), dtype) for name, dtype in contract.FIELDS.items()}


def refusal(batch) -> str:
    with pytest.raises(InputError) as error:
        contract.check(batch, SHAPE)
    return str(error.value)


def test_shapes_follow_the_letters():
    assert contract.letters("tokens_BT") == "BT"
    assert contract.letters("patch_rc_BP2") == "BP2"
    assert SHAPE.of("tokens_BT", 2) == (2, 7)
    assert SHAPE.of("positions_BTZ", 2) == (2, 7, 3)
    assert SHAPE.of("patches_BPC", 4) == (4, 8, 5)
    assert SHAPE.of("patch_rc_BP2", 4) == (4, 8, 2)
    assert SHAPE.of("weights_BA", 1) == (1, 3)


def test_every_field_starts_with_the_row_and_has_known_letters():
    for field in contract.FIELDS:
        assert contract.letters(field).startswith("B"), field
        assert set(contract.letters(field)) <= LETTERS.keys() | {"2"}, field


def test_a_sample_has_every_field_but_the_row_number():
    of_rows = {name.replace("_B", "_") for name in contract.FIELDS} - {"segments_T"}
    assert {field.name for field in dataclasses.fields(contract.Sample)} == of_rows


def test_rows_of_packing_pass(batch):
    contract.check(batch, SHAPE)
    contract.check(packing.stack([packing.pack([], SHAPE, merged=4)] * 3), SHAPE)


def test_missing_field_is_named(batch):
    del batch["segments_BT"]
    assert "batch field segments_BT" in refusal(batch) and "found:    nothing" in refusal(batch)


def test_missing_tokens_are_named(batch):
    del batch["tokens_BT"]
    assert "batch field" in refusal(batch)


def test_unknown_field_is_named(batch):
    batch["extra_BT"] = batch["tokens_BT"]
    assert "batch field extra_BT" in refusal(batch) and "expected: no such field" in refusal(batch)


def test_wrong_type_is_named(batch):
    batch["patches_BPC"] = batch["patches_BPC"].astype(np.float32)
    text = refusal(batch)
    assert "batch field patches_BPC" in text and "float32" in text and "uint8" in text


@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 0)])
def test_wrong_number_of_rows_is_named(batch, rows):
    batch["weights_BA"] = batch["weights_BA"][rows]
    assert "batch field weights_BA" in refusal(batch) and "(2, 3)" in refusal(batch)
