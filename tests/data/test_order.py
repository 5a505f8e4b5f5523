import numpy as np
import pytest

from depthlm_jax.data.order import shuffled


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 1000, 4097, 300_000])
def test_every_epoch_meets_every_record_once(count):
    found = shuffled(np.arange(3 * count), count, (7, 1)).reshape(3, count)
    for epoch in found:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(count))
    if count > 4:
        assert not np.array_equal(found[0], found[1]) and not np.array_equal(found[1], found[2])


def test_any_draw_alone_is_the_same():
    whole = shuffled(np.arange(5000), 999, (3,))
    chosen = np.array([4999, 0, 998, 999, 1000, 17])
    np.testing.assert_array_equal(shuffled(chosen, 999, (3,)), whole[chosen])
    assert [int(shuffled(np.array([draw]), 999, (3,))[0]) for draw in chosen] == whole[chosen].tolist()


def test_far_draws_of_a_large_source():
    found = shuffled(10**12 + np.arange(4), 26_000_000, (3,))
    assert len(set(found)) == 4 and (found >= 0).all() and (found < 26_000_000).all()


def test_orders_are_random():
    """Neighbours, places and keys say nothing about one another: correlations within 5 standard deviations of 0."""
    count = 20_000
    orders = [shuffled(np.arange(count), count, key) for key in ((0,), (1,), (0, 1))]
    pairs = [(orders[0][:-1], orders[0][1:]), (orders[0], np.arange(count)), (orders[0], orders[1]),
             (orders[0], orders[2]), (orders[0] % 2, np.arange(count) % 2)]  # fmt: skip
    for one, other in pairs:
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(count)


def test_every_order_of_three_is_met():
    orders = {tuple(shuffled(np.arange(3), 3, (key,))) for key in range(200)}
    assert len(orders) == 6
