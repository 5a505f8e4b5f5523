"""What the TPU compiler says when memory does not suffice."""

import pytest

from depthlm_jax.plan import program

GB, LIMIT, STATE = 2**30, 16 * 2**30, 2 * 2**30


@pytest.mark.parametrize(
    ("text", "needed", "there"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 19.60G of 15.75G hbm. Exceeded", 19.6, 15.75),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (27.15G) exceeds "
         "available HBM (15.75G).", 29.15, 15.75),
        ("RESOURCE_EXHAUSTED: no numbers", 16, 16),
    ],
)  # fmt: skip
def test_bytes_are_read_from_the_refusal(text, needed, there):
    found = program._from_error(text, STATE, LIMIT)
    assert found == pytest.approx((needed * GB, there * GB))
