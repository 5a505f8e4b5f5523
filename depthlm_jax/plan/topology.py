"""TPU slices by the names that clouds give them → devices to compile for, of which there need be none."""

import dataclasses
import difflib
import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from depthlm_jax import chips
from depthlm_jax.errors import InputError

FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}  # chips → shape
CUBE = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
}  # fmt: skip
# generation → (shapes, what the number in a name counts for each chip, options of the compiler's topology)
GENERATIONS = {
    "v4": (CUBE, 2, {"chip_config_name": "megacore"}),
    "v5e": (FLAT, 1, {}),
    "v5p": (CUBE, 2, {}),
    "v6e": (FLAT, 1, {}),
    "tpu7x": (CUBE, 2, {}),
}
NAMES = [f"{name}-{size * each}" for name, (shapes, each, _) in GENERATIONS.items() for size in shapes]
ENVIRONMENT = {  # of the compiler, which else looks for the TPU that it is on, and complains that there is none
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling takes no chip that another process might hold
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice, or several that a data-centre network joins."""

    name: str
    chip: chips.Chip
    slices: int
    devices: list[jax.Device]


def find(name: str) -> Topology:
    """Returns the slice of a name such as v5e-16, v5p-128 or 2xv5e-256.

    The number counts chips of v5e and v6e, and TensorCores (two a chip) of v4, v5p and tpu7x, as in Google Cloud.

    Raises:
      InputError: no such slice, or no TPU compiler on this machine.
    """
    parsed = re.fullmatch(r"(?:(\d+)x)?(\w+)-(\d+)", name)
    slices, slice_name = int(parsed[1] or 1) if parsed else 1, f"{parsed[2]}-{parsed[3]}" if parsed else name
    if slice_name not in NAMES or slices < 1:
        near = difflib.get_close_matches(slice_name, NAMES, n=3, cutoff=0.0)
        raise InputError(
            f"plan: no TPU slice {name!r}", found=name, fix=f"did you mean {' or '.join(near)}?",
            expected=f"one of {', '.join(NAMES)}; several slices as 2x{near[0]}",
        )  # fmt: skip
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "plan: no TPU compiler", found="libtpu is not installed", expected="jax[tpu]; it needs no TPU to compile",
            fix=f"pip install 'jax[tpu]=={jax.__version__}' (Linux on x86)",
        )  # fmt: skip
    generation, number = parsed[2], int(parsed[3])
    shapes, each, options = GENERATIONS[generation]
    if slices > 1:
        options = options | {"num_slices": slices}
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{generation}:{shapes[number // each]}", **options
    )
    return Topology(name, chips.CHIPS[generation], slices, list(described.devices))
