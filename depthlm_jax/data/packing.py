"""Samples → rows of fixed sizes. Samples are whole: nothing is cut."""

from collections.abc import Sequence

import numpy as np

from depthlm_jax.batch import FIELDS, FILL, RowShape, Sample
from depthlm_jax.errors import InputError

LIMITS = {"tokens": "data.max_tokens", "patches": "data.max_patches", "answers": "data.max_answer_tokens"}


def pick(size_N3: np.ndarray, free_3: np.ndarray, capacity_3: np.ndarray, *, oldest: bool) -> list[int]:
    """Returns which of the waiting samples enter a row next; none: the row is full.

    While three more may fit, the oldest that fits; then the pair, or the single one, that leaves the least room.

    Args:
      size_N3: of the waiting samples, oldest first, in the units of LIMITS.
      free_3: room left in the row.
      capacity_3: of an empty row.
      oldest: take the oldest whatever the room is, so that no sample waits for ever.
    """
    fits = np.flatnonzero((size_N3 <= free_3).all(axis=1))
    if oldest or not len(fits):
        return fits[:1].tolist()
    three_3 = np.sort(size_N3[fits], axis=0)[:3].sum(axis=0)
    if len(fits) > 2 and (three_3 <= free_3).all():
        return fits[:1].tolist()
    value_N = (size_N3[fits] / capacity_3).max(axis=1)
    each = zip(size_N3[fits].T, free_3, strict=True)
    together_NN = np.logical_and.reduce([one_N[:, None] + one_N <= free for one_N, free in each])
    np.fill_diagonal(together_NN, False)
    first, second = divmod(int(np.where(together_NN, value_N[:, None] + value_N, -1.0).argmax()), len(fits))
    pair = together_NN[first, second] and value_N[first] + value_N[second] > value_N.max()
    return [int(fits[first]), int(fits[second])] if pair else [int(fits[value_N.argmax()])]


def pack(samples: Sequence[Sample], shape: RowShape, merged: int, names: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Returns one row of the batch contract (no B axis yet): the samples one after another, then padding.

    Args:
      samples: whole samples, possibly none.
      shape: sizes of the row.
      merged: patch slots that make one merged patch.
      names: of the samples, for the error.

    Raises:
      InputError: the samples together are larger than the row; says by how much and which field to raise.
    """
    _check_fits(samples, shape, names)
    offsets = _offsets(samples, merged)
    parts = [
        _fields(sample, number, *offset)
        for number, (sample, offset) in enumerate(zip(samples, offsets, strict=True), 1)
    ]
    return {field: _fill(field, [part[field] for part in parts], shape.of(field, 1)[1:]) for field in FIELDS}


def size_of(sample: Sample) -> tuple[int, int, int]:
    """Returns tokens, patch slots and supervised positions, in the order of LIMITS."""
    return len(sample.tokens_T), len(sample.patches_PC), len(sample.targets_A)


def stack(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the rows as one batch, B first."""
    return {field: np.stack([row[field] for row in rows]) for field in FIELDS}


def _offsets(samples: Sequence[Sample], merged: int) -> list[tuple[int, int, int]]:
    """Returns the first token, the first merged patch and the number of images before each sample."""
    sizes = [(len(s.tokens_T), len(s.patches_PC) // merged, s.image_id_P.max(initial=0)) for s in samples]
    return [tuple(int(n) for n in before) for before in np.cumsum([(0, 0, 0), *sizes], axis=0)[:-1]]


def _fields(sample: Sample, number: int, token: int, patch: int, image: int) -> dict[str, np.ndarray]:
    shifted = {
        "segments": np.full(len(sample.tokens_T), number),
        "vision_index": np.where(sample.vision_index_T < 0, -1, sample.vision_index_T + patch),
        "answer_index": sample.answer_index_A + token,
        "image_id": np.where(sample.image_id_P > 0, sample.image_id_P + image, 0),
    }
    same = {
        "tokens": sample.tokens_T, "positions": sample.positions_TZ, "branch": sample.branch_T,
        "targets": sample.targets_A, "weights": sample.weights_A, "patches": sample.patches_PC,
        "patch_rc": sample.patch_rc_P2,
    }  # fmt: skip
    by_name = shifted | same
    return {field: by_name[field.rsplit("_", 1)[0]] for field in FIELDS}


def _fill(field: str, parts: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    row = np.full(shape, FILL.get(field, 0), FIELDS[field])
    start = 0
    for part in parts:
        row[start : start + len(part)] = part
        start += len(part)
    return row


def _check_fits(samples: Sequence[Sample], shape: RowShape, names: Sequence[str]) -> None:
    sizes = zip(*(size_of(sample) for sample in samples), strict=True)
    limits = shape.tokens, shape.patches, shape.answers
    for kind, each, limit in zip(LIMITS, sizes, limits, strict=False):
        if sum(each) > limit:
            raise InputError(
                f"samples do not fit into a row: {', '.join(names) or len(samples)}",
                found=f"{sum(each)} {kind} ({' + '.join(map(str, each))})", expected=f"at most {limit}",
                fix=f"raise --config.{LIMITS[kind]}, or lower the crop sizes or data.reference.questions",
            )  # fmt: skip
