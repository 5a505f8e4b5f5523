"""The shuffled order of a source: a permutation that can be asked for any place, without a table of all of them."""

import numpy as np

ROUNDS = 6
MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def shuffled(draw_N: np.ndarray, count: int, key: tuple[int, ...]) -> np.ndarray:
    """Returns the record of each draw: draws 0 to count − 1 meet each record once, the next epoch in another order.

    A Feistel network permutes the smallest square power of two that holds `count` numbers; numbers beyond `count` are
    sent through it again until they fall inside.

    Args:
      draw_N: int, from 0, of any epoch.
      count: records.
      key: of the order; the epoch is added to it.

    Source: Black & Rogaway 2002, ciphers with arbitrary finite domains; the mixing is that of SplitMix64.
    """
    epoch_N, place_N = np.divmod(np.asarray(draw_N, np.int64), count)
    record_N = np.empty_like(place_N)
    for epoch in np.unique(epoch_N):
        mine_N = epoch_N == epoch
        keys_R = np.random.default_rng((*key, int(epoch))).integers(2**63, size=ROUNDS).astype(np.uint64)
        record_N[mine_N] = _permuted(place_N[mine_N].astype(np.uint64), count, keys_R)
    return record_N


def _permuted(place_N: np.ndarray, count: int, keys_R: np.ndarray) -> np.ndarray:
    half = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
    found_N = _feistel(place_N, half, keys_R)
    while (outside_N := found_N >= count).any():
        found_N[outside_N] = _feistel(found_N[outside_N], half, keys_R)
    return found_N.astype(np.int64)


def _feistel(number_N: np.ndarray, half: np.uint64, keys_R: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left_N, right_N = number_N >> half, number_N & mask
    for key in keys_R:
        left_N, right_N = right_N, left_N ^ (_mixed(right_N + key) & mask)
    return (left_N << half) | right_N


def _mixed(number_N: np.ndarray) -> np.ndarray:
    number_N = number_N * MIX[0]
    number_N = (number_N ^ (number_N >> np.uint64(30))) * MIX[1]
    number_N = (number_N ^ (number_N >> np.uint64(27))) * MIX[2]
    return number_N ^ (number_N >> np.uint64(31))
