import dataclasses

import numpy as np
import pytest

from depthlm_jax import batch as contract
from depthlm_jax.data import packing
from depthlm_jax.errors import InputError

SHAPE = contract.RowShape(tokens=40, patches=48, answers=9, channels=6)
MERGED = 4


def sample(seed: int, tokens: int, patches: int, answers: int, images: int) -> contract.Sample:
    """Returns random arrays that are valid in form; each image has its share of the patches."""
    rng = np.random.default_rng(seed)
    image_id_P = np.repeat(np.arange(images) + 1, patches // images)
    image_id_P[1::5] = 0
    vision_index_T = rng.integers(-1, patches // MERGED, tokens)
    vision_index_T[0] = -1
    return contract.Sample(
        tokens_T=rng.integers(1, 1000, tokens),
        positions_TZ=rng.integers(1, 1000, (tokens, 3)),
        branch_T=rng.integers(0, 4, tokens),
        vision_index_T=vision_index_T,
        answer_index_A=rng.integers(0, tokens, answers),
        targets_A=rng.integers(1, 1000, answers),
        weights_A=rng.uniform(1, 5, answers).astype(np.float32),
        patches_PC=rng.integers(1, 256, (patches, SHAPE.channels), dtype=np.uint8),
        patch_rc_P2=rng.integers(1, 99, (patches, 2)),
        image_id_P=image_id_P,
    )


SAMPLES = [sample(0, 13, 16, 3, images=1), sample(1, 11, 24, 4, images=3), sample(2, 9, 8, 1, images=2)]


def unpack(row: dict[str, np.ndarray], samples: list[contract.Sample]) -> list[contract.Sample]:
    """Returns the samples that a row was made of, from the sizes of the samples alone."""
    found, token, patch, answer, image = [], 0, 0, 0, 0
    for given in samples:
        t = slice(token, token + len(given.tokens_T))
        p = slice(patch, patch + len(given.patches_PC))
        a = slice(answer, answer + len(given.targets_A))
        index_T, id_P = row["vision_index_BT"][t], row["image_id_BP"][p]
        found.append(
            contract.Sample(
                tokens_T=row["tokens_BT"][t],
                positions_TZ=row["positions_BTZ"][t],
                branch_T=row["branch_BT"][t],
                vision_index_T=np.where(index_T < 0, -1, index_T - patch // MERGED),
                answer_index_A=row["answer_index_BA"][a] - token,
                targets_A=row["targets_BA"][a],
                weights_A=row["weights_BA"][a],
                patches_PC=row["patches_BPC"][p],
                patch_rc_P2=row["patch_rc_BP2"][p],
                image_id_P=np.where(id_P > 0, id_P - image, 0),
            )
        )
        token, patch, answer, image = t.stop, p.stop, a.stop, image + given.image_id_P.max()
    return found


@pytest.mark.parametrize("chosen", [[0], [1], [0, 1], [2, 1, 0], [2, 2, 2]])
def test_each_sample_can_be_taken_out_unchanged(chosen):
    samples = [SAMPLES[number] for number in chosen]
    row = packing.pack(samples, SHAPE, MERGED)
    for given, found in zip(samples, unpack(row, samples), strict=True):
        for field in dataclasses.fields(contract.Sample):
            expected = getattr(given, field.name)
            np.testing.assert_array_equal(getattr(found, field.name), expected, err_msg=field.name)


def test_samples_are_told_apart():
    row = packing.pack(SAMPLES, SHAPE, MERGED)
    np.testing.assert_array_equal(row["segments_BT"], np.repeat([1, 2, 3, 0], [13, 11, 9, 7]))
    ids = [set(part[part > 0]) for part in np.split(row["image_id_BP"], [16, 40])]
    assert ids == [{1}, {2, 3, 4}, {5, 6}]  # no number is used twice in a row


def test_the_rest_of_a_row_is_padding():
    row = packing.pack(SAMPLES[:2], SHAPE, MERGED)
    used = {"T": 24, "P": 40, "A": 7}
    for field, array in row.items():
        rest = array[used[contract.letters(field)[1]] :]
        assert rest.size and (rest == (-1 if field == "vision_index_BT" else 0)).all(), field


def test_no_sample_makes_a_row_of_padding():
    row = packing.pack([], SHAPE, MERGED)
    assert {field: set(np.unique(array)) for field, array in row.items()} == {
        field: {-1} if field == "vision_index_BT" else {0} for field in contract.FIELDS
    }


def test_rows_satisfy_the_contract():
    contract.check(packing.stack([packing.pack([s], SHAPE, MERGED) for s in SAMPLES]), SHAPE)


def test_a_row_can_be_full_to_the_last_slot():
    full = sample(3, 40, 48, 9, images=2)
    assert (packing.pack([full], SHAPE, MERGED)["segments_BT"] == 1).all()


@pytest.mark.parametrize(
    ("extra", "found", "expected", "field"),
    [
        (sample(4, 17, 8, 1, 1), "41 tokens (13 + 11 + 17)", "at most 40", "--config.data.max_tokens"),
        (sample(4, 3, 12, 1, 1), "52 patches (16 + 24 + 12)", "at most 48", "--config.data.max_patches"),
        (sample(4, 3, 8, 3, 1), "10 answers (3 + 4 + 3)", "at most 9", "--config.data.max_answer_tokens"),
    ],
)
def test_overflow_names_sizes_records_and_the_field_to_raise(extra, found, expected, field):
    with pytest.raises(InputError) as error:
        packing.pack([*SAMPLES[:2], extra], SHAPE, MERGED, ["a.jsonl:1", "a.jsonl:7", "a.jsonl:9"])
    text = str(error.value)
    assert "do not fit into a row: a.jsonl:1, a.jsonl:7, a.jsonl:9" in text
    assert found in text and expected in text and field in text


CAPACITY = np.array([100, 1000, 100])


@pytest.mark.parametrize(
    ("tokens", "free", "oldest", "picked"),
    [
        ([60, 90, 30], 100, True, [0]),  # an empty row: the oldest
        ([60, 90, 30, 10, 20, 25], 100, False, [0]),  # three may fit still: the oldest that fits
        ([50, 30, 41, 35], 75, False, [2, 1]),  # the fullest pair, as they stand: 41 + 30 is 71
        ([50, 30, 41, 35], 45, False, [2]),  # no pair fits: the largest
        ([50, 30, 10, 12], 51, False, [0]),  # one alone fills more than any pair
        ([50, 60], 49, False, []),
        ([], 49, False, []),
    ],
)
def test_what_enters_a_row_next(tokens, free, oldest, picked):
    size_N3 = np.array([(size, 10 * size, 1) for size in tokens]).reshape(-1, 3)
    found = packing.pick(size_N3, np.array([free, 10 * free, 50]), CAPACITY, oldest=oldest)
    assert sorted(found) == sorted(picked)


@pytest.mark.parametrize("budget", range(3))
def test_no_budget_is_exceeded(budget):
    rng = np.random.default_rng(budget)
    for _ in range(200):
        size_N3, free_3 = rng.integers(1, 60, (12, 3)), rng.integers(60, 100, 3)
        free_3[budget] = 45
        chosen = packing.pick(size_N3, free_3, CAPACITY, oldest=False)
        assert len(set(chosen)) == len(chosen)
        assert (size_N3[chosen].sum(axis=0) <= free_3).all()
