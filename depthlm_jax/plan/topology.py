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
DEVICES = {"tpu7x": 2}  # of JAX, a chip; else 1
NAMES = [f"{name}-{size * each}" for name, (shapes, each, _) in GENERATIONS.items() for size in shapes]
ENVIRONMENT = {  # of the compiler, which else looks for the TPU that it is on, and complains that there is none
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling takes no chip that another process might hold
}


@dataclasses.dataclass(frozen=True)
class Slices:
    """What a name such as v5p-128 or 2xv5e-256 stands for."""

    count: int
    generation: str
    number: int  # in the name of one
    chips: int  # of one
    shape: str

    @property
    def devices(self) -> int:
        """How many JAX sees, in all."""
        return self.count * self.chips * DEVICES.get(self.generation, 1)


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice, or several that a data-centre network joins."""

    name: str
    chip: chips.Chip
    slices: int
    devices: list[jax.Device]


def parse(name: str) -> Slices:
    """Returns the slices of a name.

    The number counts chips of v5e and v6e, and TensorCores (two a chip) of v4, v5p and tpu7x, as in Google Cloud.

    Raises:
      InputError: no such slice.
    """
    parsed = re.fullmatch(r"(?:(\d+)x)?(\w+)-(\d+)", name)
    count, slice_name = int(parsed[1] or 1) if parsed else 1, f"{parsed[2]}-{parsed[3]}" if parsed else name
    if slice_name not in NAMES or count < 1:
        near = difflib.get_close_matches(slice_name, NAMES, n=3, cutoff=0.0)
        raise InputError(
            f"no TPU slice {name!r}", found=name, fix=f"did you mean {' or '.join(near)}?",
            expected=f"one of {', '.join(NAMES)}; several slices as 2x{near[0]}",
        )  # fmt: skip
    generation, number = parsed[2], int(parsed[3])
    shapes, each, _ = GENERATIONS[generation]
    return Slices(count, generation, number, number // each, shapes[number // each])


def find(name: str) -> Topology:
    """Returns the slice of a name such as v5e-16, v5p-128 or 2xv5e-256.

    Raises:
      InputError: no such slice, or no TPU compiler on this machine.
    """
    slices = parse(name)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "plan: no TPU compiler", found="libtpu is not installed", expected="jax[tpu]; it needs no TPU to compile",
            fix=f"pip install 'jax[tpu]=={jax.__version__}' (Linux on x86)",
        )  # fmt: skip
    options = GENERATIONS[slices.generation][2]
    if slices.count > 1:
        options = options | {"num_slices": slices.count}
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{slices.generation}:{slices.shape}", **options
    )
    return Topology(name, chips.CHIPS[slices.generation], slices.count, list(described.devices))
