"""The one contract between data and model: what a row holds.

Letters end every array's name and are its axes:

  B  row: a packed bin of whole samples        T  token slot of a row
  Z  M-RoPE axes t, h, w (3)                   A  supervised position of a row
  P  patch slot of a row, window-major         C  channel × patch height × patch width
  2  row and column of a patch in its image

Integers are made on the host. Segment 0 and image 0 are padding.
"""

import dataclasses

import numpy as np

from depthlm_jax.errors import InputError

FIELDS = {  # name → dtype; the letters after the last underscore are the axes
    "tokens_BT": np.int32,
    "positions_BTZ": np.int32,
    "segments_BT": np.int32,  # sample number within the row, from 1
    "branch_BT": np.int32,  # question number within the sample, from 1; 0 = seen by all of the sample's questions
    "vision_index_BT": np.int32,  # merged patch that stands here, −1 = text
    "answer_index_BA": np.int32,  # token position whose next token is the target
    "targets_BA": np.int32,
    "weights_BA": np.float32,  # 0 = padding
    "patches_BPC": np.uint8,
    "patch_rc_BP2": np.int32,
    "image_id_BP": np.int32,  # image number within the row, from 1
}
FILL = {"vision_index_BT": -1}  # padding value, 0 elsewhere


def letters(field: str) -> str:
    """Returns the axes of a field: letters('tokens_BT') == 'BT'."""
    return field.rsplit("_", 1)[1]


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Sizes of one row; `channels` is C."""

    tokens: int
    patches: int
    answers: int
    channels: int

    def of(self, field: str, rows: int) -> tuple[int, ...]:
        sizes = {"B": rows, "T": self.tokens, "P": self.patches, "A": self.answers, "C": self.channels, "Z": 3, "2": 2}
        return tuple(sizes[letter] for letter in letters(field))


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample before it is packed; arrays have no B axis, indices count from the sample's own start."""

    tokens_T: np.ndarray
    positions_TZ: np.ndarray
    branch_T: np.ndarray
    vision_index_T: np.ndarray
    answer_index_A: np.ndarray
    targets_A: np.ndarray
    weights_A: np.ndarray
    patches_PC: np.ndarray
    patch_rc_P2: np.ndarray
    image_id_P: np.ndarray


def check(batch: dict[str, np.ndarray], shape: RowShape) -> None:
    """Raises InputError unless the batch has exactly the fields of the contract, in their shapes and dtypes."""
    rows = len(batch["tokens_BT"]) if "tokens_BT" in batch else 0
    expected = {name: (shape.of(name, rows), np.dtype(dtype)) for name, dtype in FIELDS.items()}
    found = {name: (array.shape, array.dtype) for name, array in batch.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise InputError(
                f"batch field {name}", found=found.get(name, "nothing"), expected=expected.get(name, "no such field"),
                fix="make rows with depthlm_jax.data.packing.pack",
            )  # fmt: skip
