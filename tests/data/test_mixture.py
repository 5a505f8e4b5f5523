import doctest

import numpy as np
import pytest

from depthlm_jax.config import Mixture, TrainSource
from depthlm_jax.data import mixture
from depthlm_jax.errors import InputError

SIZES = {"large": 9_000_000, "middle": 190_000, "small": 1000}


def sources(*weights: float) -> dict[str, TrainSource]:
    return {name: TrainSource(weight=weight) for name, weight in zip(SIZES, weights, strict=True)}


def test_worked_examples():
    assert doctest.testmod(mixture).failed == 0


@pytest.mark.parametrize(
    ("weights", "rule", "expected"),
    [
        ((1, 1, 0.1), Mixture(), (1 / 2.1, 1 / 2.1, 0.1 / 2.1)),
        ((7, 0, 7), Mixture(), (0.5, None, 0.5)),
        ((1, 1, 1), Mixture(size_exponent=1.0), np.array([9_000_000, 190_000, 1000]) / 9_191_000),
        ((1, 1, 1), Mixture(size_exponent=0.5), np.sqrt([9_000_000, 190_000, 1000]) / 3000 / 1.15584),
        ((1, 1, 1), Mixture(size_exponent=1.0, size_cap=190_000), (190 / 381, 190 / 381, 1 / 381)),
        ((2, 1, 1), Mixture(size_exponent=1.0, size_cap=1000), (0.5, 0.25, 0.25)),
    ],
)
def test_shares(weights, rule, expected):
    found = mixture.shares(sources(*weights), SIZES, rule)
    assert list(found) == [name for name, share in zip(SIZES, expected, strict=True) if share is not None]
    assert list(found.values()) == pytest.approx([share for share in expected if share is not None], rel=1e-4)
    assert sum(found.values()) == pytest.approx(1)


def test_all_off():
    with pytest.raises(InputError, match=r"every source is off[\s\S]*sources\.NAME\.weight"):
        mixture.shares(sources(0, 0, 0), SIZES, Mixture())


@pytest.mark.parametrize("share", [(1 / 2.1, 1 / 2.1, 0.1 / 2.1), (0.25, 0.25, 0.5), (0.999, 0.0005, 0.0005), (1.0,)])
def test_each_block_and_all_blocks_together_are_shared_out_exactly(share):
    share_S, count_S = np.array(share), np.zeros(len(share))
    for block in range(50):
        found = np.bincount(mixture.block_sources(share_S, 3, 0, block), minlength=len(share))
        assert (np.abs(found - share_S * mixture.BLOCK) <= 1).all()
        count_S += found
    assert (np.abs(count_S - share_S * 50 * mixture.BLOCK) <= 4).all()  # a random draw is off by 100 here


def test_the_order_inside_a_block_is_random_and_its_own():
    share_S = np.array([0.5, 0.5])
    blocks = [mixture.block_sources(share_S, *key) for key in ((3, 0, 0), (3, 0, 1), (3, 1, 0), (4, 0, 0))]
    for one in range(4):
        for other in range(one):
            assert 0.4 < np.mean(blocks[one] == blocks[other]) < 0.6
    np.testing.assert_array_equal(blocks[1], mixture.block_sources(share_S, 3, 0, 1))


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_no_host_gets_sources_of_its_own(hosts):
    """A periodic mix of two equal sources, cut into strides, gives host 0 the one and host 1 the other."""
    order = np.concatenate([mixture.block_sources(np.full(hosts, 1 / hosts), 0, 0, block) for block in range(10)])
    for host in range(hosts):
        found = np.bincount(order[host::hosts], minlength=hosts) / len(order[host::hosts])
        assert np.abs(found - 1 / hosts).max() < 0.05
