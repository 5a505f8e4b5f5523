"""Useful floating-point operations of a training step: what the data need, without padding and recomputation.

A product of [n, D] and [D, F] counts 2·n·D·F; norms, activations and rotations are left out (below 2 % at real sizes).
In the backward pass a kernel counts once more for the gradient of its input, if anything before it or beside it is
trained, and once more for its own gradient, if it is trained itself.
"""

import math
from collections.abc import Mapping

KERNELS = ("kernel", "embedding", "lora_a", "lora_b")  # parameters that something is multiplied with


def per_count(
    parts: Mapping[str, str],
    attended: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    axes: Mapping[str, str],
    factors: Mapping[str, float],
) -> dict[str, float]:
    """Returns operations, forward and backward, for each of data.work's COUNTS.

    Args:
      parts: beginning of parameters' paths → count that they act on, in the order of the computation.
      attended: pairs → channels, over all heads and layers, that queries and keys have.
      shapes: of all parameters, by path.
      axes: letters of their axes; 2 are the frames of a patch, which are the same.
      factors: of the learning rate; 0: frozen.
    """
    found = dict.fromkeys([*parts.values(), *attended], 0.0)
    trained = False  # anything so far
    for number, (part, count) in enumerate(parts.items()):
        paths = [path for path in shapes if path.startswith(part) and path.endswith(KERNELS)]
        reached = trained or (number > 0 and any(factors[path] for path in paths))
        for path in paths:
            sizes = [size for size, letter in zip(shapes[path], axes[path], strict=True) if letter != "2"]
            found[count] += 2.0 * math.prod(sizes) * (1 + reached + (factors[path] > 0))
        trained |= any(factors[path] for path in paths)
        for pairs, channels in attended.items():
            if PAIRS_OF[count] and pairs in PAIRS_OF[count]:
                found[pairs] = 4.0 * channels * (3 if trained else 1)
    return found


PAIRS_OF = {"patches": ("image_pairs", "window_pairs"), "tokens": ("token_pairs",), "merged": (), "answers": ()}


def of_work(work: Mapping[str, float], each: Mapping[str, float]) -> float:
    """Returns the operations of so much work, with those of `per_count`."""
    return sum(work[count] * operations for count, operations in each.items())
