"""How a model runs."""

import dataclasses
from collections.abc import Callable

from depthlm_jax.models import attention


@dataclasses.dataclass(frozen=True)
class Execution:
    """What a model computes does not depend on it."""

    constrain: Callable = lambda x, letters: x  # (array, letters) → array, pins an activation to its place on a mesh
    attend: attention.Attend = attention.reference
    remat: str = "none"  # key of layers.REMAT: what the backward pass computes again instead of keeping it
    unroll: int = 1  # layers in a turn of the loop over layers
