"""Published peaks of accelerators, for one JAX device each.

Source: Google Cloud's pages of TPU v4, v5e, v5p, v6e and TPU7x; NVIDIA's data sheets of A100, H100, H200, B200 and L4.
"""

import dataclasses

TERA, GIGA = 1e12, 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
    kind: str  # how `jax.Device.device_kind` begins
    flops_s: float  # bfloat16, dense
    hbm_bytes: float
    hbm_bytes_s: float
    link_bytes_s: float  # to other devices, all links together, one way


CHIPS = {
    "v4": Chip("TPU v4", 275 * TERA, 32 * 2**30, 1200 * GIGA, 300 * GIGA),
    "v5e": Chip("TPU v5 lite", 197 * TERA, 15.75 * 2**30, 819 * GIGA, 200 * GIGA),
    "v5p": Chip("TPU v5", 459 * TERA, 95 * 2**30, 2765 * GIGA, 600 * GIGA),
    "v6e": Chip("TPU v6 lite", 918 * TERA, 31.25 * 2**30, 1640 * GIGA, 400 * GIGA),
    "tpu7x": Chip("TPU7x", 1153.5 * TERA, 96 * 2**30, 3690 * GIGA, 300 * GIGA),  # half a chip
    "a100": Chip("NVIDIA A100", 312 * TERA, 80 * 2**30, 2039 * GIGA, 300 * GIGA),
    "h100": Chip("NVIDIA H100", 989 * TERA, 80 * 2**30, 3350 * GIGA, 450 * GIGA),
    "h200": Chip("NVIDIA H200", 989 * TERA, 141 * 2**30, 4800 * GIGA, 450 * GIGA),
    "b200": Chip("NVIDIA B200", 2250 * TERA, 180 * 2**30, 8000 * GIGA, 900 * GIGA),
    "l4": Chip("NVIDIA L4", 121 * TERA, 24 * 2**30, 300 * GIGA, 32 * GIGA),
}


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip whose name is the longest beginning of this one; None: its peak is not known."""
    known = [chip for chip in CHIPS.values() if device_kind.startswith(chip.kind)]
    return max(known, key=lambda chip: len(chip.kind), default=None)
