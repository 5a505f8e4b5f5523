"""Which source gives the next sample: slots in blocks, every block shared out exactly, in an order of its own.

A slot's source is a function of (shares, seed, slot) alone, so hosts and workers agree without talking. Inside a block
the sources stand in random order: a periodic mix, cut into strides by hosts, would give each host sources of its own.
"""

import math

import numpy as np

from depthlm_jax.config import Mixture, TrainSource
from depthlm_jax.errors import InputError

BLOCK = 1024  # slots
GOLDEN = (math.sqrt(5) - 1) / 2


def shares(sources: dict[str, TrainSource], sizes: dict[str, int], mixture: Mixture) -> dict[str, float]:
    """Returns the share of each source with a weight above 0, in the order of their names; they add up to 1.

    Args:
      sources: of the config.
      sizes: records of each source that is on.
      mixture: how sizes count.

    >>> shares({"a": TrainSource(weight=3.0), "b": TrainSource()}, {"a": 10, "b": 10}, Mixture())
    {'a': 0.75, 'b': 0.25}
    >>> shares({"a": TrainSource(), "b": TrainSource()}, {"a": 90, "b": 10}, Mixture(size_exponent=1.0))
    {'a': 0.9, 'b': 0.1}

    Raises:
      InputError: every weight is 0.
    """
    cap = mixture.size_cap or math.inf
    weights = {
        name: source.weight * min(sizes[name], cap) ** mixture.size_exponent
        for name, source in sorted(sources.items())
        if source.weight > 0
    }
    total = sum(weights.values())
    if not total:
        raise InputError(
            "config: every source is off", found=f"weight 0 of {sorted(sources)}", expected="a weight above 0",
            fix="set --config.data.sources.NAME.weight",
        )  # fmt: skip
    return {name: weight / total for name, weight in weights.items()}


def block_sources(share_S: np.ndarray, seed: int, stage: int, block: int) -> np.ndarray:
    """Returns the source number of each slot of a block, (BLOCK,) int.

    Each source has its share of the block's slots to within one; the block's fractional offset moves on by the golden
    ratio, so that a source with less than one slot a block has its share over many blocks.

    Args:
      share_S: of the sources, adding up to 1.
      seed: of the run.
      stage: number of times that the run's mixture was changed.
      block: number of the block within the stage.
    """
    marks = (np.arange(BLOCK) + (0.5 + block * GOLDEN) % 1) / BLOCK
    ordered = np.searchsorted(np.cumsum(share_S)[:-1], marks, side="right")
    return np.random.default_rng((seed, stage, block)).permutation(ordered)
