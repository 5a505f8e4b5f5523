"""What the DepthLM release asks about, for numbers that are comparable with it."""

import random

import numpy as np


def official_eval_indices(count: int, points_per_image: int, seed: int = 42) -> list[int]:
    """Returns the point index of each evaluation sample; sample i looks at image i modulo the number of images.

    Args:
      count: samples; the release draws images × points_per_image of them.
      points_per_image: of the first record.
      seed: of Python's own generator, whose numbers do not change between Python versions.

    Source: the release draws each index with `random.sample`, one call a sample.
    """
    rng = random.Random(seed)
    return [rng.sample(range(points_per_image), 1)[0] for _ in range(count)]


def official_training_point(drawn: int, usable_N: np.ndarray) -> int:
    """Returns the usable point whose index is nearest to the drawn one, of two equally near ones the smaller.

    >>> official_training_point(3, np.array([False, True, False, False, False, True]))
    1

    Args:
      drawn: uniform in [0, N).
      usable_N: bool, at least one true.
    """
    indices = np.flatnonzero(usable_N)
    return int(indices[np.abs(indices - drawn).argmin()])
