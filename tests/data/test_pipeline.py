import json
import shutil

import numpy as np
import pytest
import worlds

from depthlm_jax import batch as contract
from depthlm_jax import config as config_module
from depthlm_jax.data import packing, pipeline, tasks
from depthlm_jax.data.records import open_source
from depthlm_jax.errors import InputError
from depthlm_jax.models import registry


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    family, folder = registry.family("qwen2_5_vl"), tmp_path_factory.mktemp("processor")
    texts = ["system\n", "user\n", "assistant\n", tasks.SYSTEM, tasks.QUESTION, tasks.answer_text(1.23)]
    family.write_scratch(worlds.HF_CONFIG, texts, folder)
    return family.processor(folder)


@pytest.fixture
def batches(scenes, processor):
    """Returns the function (changes, host, hosts) → iterator of one host's rows, some with two samples."""

    def open_batches(changes: dict | None = None, host: int = 0, hosts: int = 1):
        sizes = {"data.max_tokens": 700, "data.max_patches": 256, "data.max_answer_tokens": 250}
        config = worlds.config(scenes, sizes | {"data.samples_per_row": 2} | (changes or {}))
        return pipeline.training_batches(open_source(config.data.train), processor, config, host, hosts)

    return open_batches


def take(iterator, steps: int) -> list[pipeline.Rows]:
    return [next(iterator) for _ in range(steps)]


def joined(rows: list[pipeline.Rows]) -> pipeline.Rows:
    """Returns the hosts' rows of a step as one batch."""
    arrays = {name: np.concatenate([part.arrays[name] for part in rows]) for name in contract.FIELDS}
    return pipeline.Rows(arrays, sum((part.record_ids for part in rows), ()), sum((part.dropped for part in rows), ()))


def assert_same(one: pipeline.Rows, other: pipeline.Rows) -> None:
    worlds.assert_same_arrays(one.arrays, other.arrays)
    assert (one.record_ids, one.dropped) == (other.record_ids, other.dropped)


def test_batches_satisfy_the_contract(batches, processor):
    rows = next(batches())
    contract.check(rows.arrays, contract.RowShape(700, 256, 250, processor.config.channels))
    assert len(rows.record_ids) + len(rows.dropped) == 16
    assert set(np.unique(rows.arrays["segments_BT"])) == {0, 1, 2}


def test_order_does_not_depend_on_the_number_of_hosts(batches):
    alone = take(batches(), 4)
    for hosts in (2, 4):
        of_hosts = [take(batches({}, host, hosts), 4) for host in range(hosts)]
        for step, rows in enumerate(alone):
            assert_same(joined([of_host[step] for of_host in of_hosts]), rows)


def test_order_does_not_depend_on_threads_or_prefetching(batches):
    one = take(batches({"data.read_threads": 1, "data.prefetch_rows": 1}), 4)
    four = take(batches({"data.read_threads": 4, "data.prefetch_rows": 50}), 4)
    for rows, others in zip(one, four, strict=True):
        assert_same(rows, others)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_position_is_small_and_continues_with_the_next_step(batches, steps):
    iterator = batches()
    take(iterator, steps)
    state = json.dumps(iterator.get_state())
    assert len(state) < 100
    expected = take(iterator, 2)
    other = batches()
    take(other, 2)  # where it stood before does not matter
    other.set_state(json.loads(state))
    for rows, others in zip(expected, take(other, 2), strict=True):
        assert_same(rows, others)


def test_position_serves_another_number_of_hosts(batches):
    alone = batches()
    take(alone, 3)
    halves = [batches({}, host, 2) for host in range(2)]
    for half in halves:
        half.set_state(alone.get_state())
    assert_same(joined([next(half) for half in halves]), next(alone))


def test_hosts_have_to_divide_the_rows(batches):
    with pytest.raises(InputError, match="8 rows, 3 hosts"):
        batches({}, 0, 3)


def test_another_seed_is_another_order_and_other_crops(batches):
    ours, theirs = next(batches()), next(batches({"train.seed": 1}))
    assert ours.record_ids != theirs.record_ids
    assert not np.array_equal(ours.arrays["patches_BPC"], theirs.arrays["patches_BPC"])


def test_each_epoch_has_every_record_once_in_another_order(batches):
    steps = take(batches({"data.samples_per_row": 1}), 9)  # of 8 rows: three epochs of 24 records
    ids = [name for rows in steps for name in (*rows.record_ids, *(drop.record_id for drop in rows.dropped))]
    epochs = [ids[:24], ids[24:48], ids[48:]]
    for epoch in epochs:
        assert sorted(epoch) == sorted(f"synthetic_depth/train:{number}" for number in range(24))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_crops_differ_between_epochs_of_a_record(scenes, processor):
    config = worlds.config(scenes, {"data.geometry.crop_width": (32, 60), "data.geometry.crop_height": (32, 60)})
    maker = pipeline.SampleMaker(open_source(config.data.train), processor, config)
    looks = [maker.example(3, np.random.default_rng(seed)) for seed in range(12)]
    looks = [look for look in looks if not isinstance(look, pipeline.Dropped)]
    assert len({look.image.shape for look in looks}) > 1
    assert len({look.image.tobytes() for look in looks}) > 6
    assert len({look.truth_m for look in looks}) > 1


@pytest.fixture
def jsonl(scenes, tmp_path):
    return worlds.write_jsonl(scenes, tmp_path, 8)


def test_jsonl_gives_the_same_samples_as_tfds(scenes, jsonl, processor):
    makers = []
    for path in (scenes, jsonl):
        config = worlds.config(path)
        makers.append(pipeline.SampleMaker(open_source(config.data.train), processor, config))
    for index in range(8):
        (_, one), (_, other) = (maker(index, np.random.default_rng(index)) for maker in makers)
        worlds.assert_same_arrays(vars(one), vars(other))


def test_jsonl_batches_name_their_lines(jsonl, batches):
    rows = next(batches({"data.train.path": str(jsonl), "data.samples_per_row": 1}))
    names = (*rows.record_ids, *(drop.record_id for drop in rows.dropped))
    assert sorted(names) == [f"train.jsonl:{line}" for line in range(1, 9)]


def test_bad_records_are_dropped_and_named_and_not_replaced(jsonl, batches):
    worlds.rewrite_line(jsonl, 3, lambda fields: fields | {"depth": [-1.0] * len(fields["depth"])})
    (jsonl.parent / "5.png").write_bytes((jsonl.parent / "5.png").read_bytes()[:200])  # of line 6
    intact = {"data.train.path": str(jsonl), "data.samples_per_row": 1}
    rows = next(batches(intact))
    assert sorted(rows.record_ids) == [f"train.jsonl:{line}" for line in (1, 2, 4, 5, 7, 8)]
    reasons = sorted(drop.reason.splitlines()[0] for drop in rows.dropped)
    assert reasons[0] == "train.jsonl:3: depth is not a positive finite number"
    assert reasons[1] == "train.jsonl:6: cannot decode image"
    assert all(drop.bad for drop in rows.dropped)
    empty = (rows.arrays["segments_BT"] == 0).all(axis=1)
    assert empty.sum() == 2 and (rows.arrays["weights_BA"][empty] == 0).all()


def test_a_record_without_usable_point_is_dropped_but_not_bad(jsonl, batches):
    worlds.rewrite_line(jsonl, 2, lambda fields: fields | {"pixel_coords": [[0, 0]], "depth": [1.5]})
    rows = next(batches({"data.train.path": str(jsonl), "data.samples_per_row": 1}))
    (drop,) = rows.dropped
    assert (drop.record_id, drop.bad) == ("train.jsonl:2", False)
    assert "no labelled point" in drop.reason and len(rows.record_ids) == 7


def test_a_record_that_breaks_the_limits_of_the_model_is_bad_not_fatal(jsonl, batches):
    worlds.rewrite_line(jsonl, 4, lambda fields: fields | {"intrinsics": [1e6, 1e6, 1.0, 1.0]})
    changes = {"data.train.path": str(jsonl), "data.samples_per_row": 1}
    for mode in ("corrected", "official"):
        dropped = [drop for drop in next(batches(changes | {"data.geometry.mode": mode})).dropped if drop.bad]
        assert [drop.record_id for drop in dropped] == ["record 3"], mode


@pytest.mark.parametrize("limit", ["max_tokens", "max_answer_tokens"])
def test_a_sample_that_is_too_large_stops_with_an_error_that_says_what_to_raise(batches, limit):
    iterator = batches({f"data.{limit}": 16})
    with pytest.raises(InputError) as error:
        next(iterator)
    text = str(error.value)
    assert "do not fit into a row: synthetic_depth/train:" in text
    assert "at most 16" in text and f"--config.data.{limit}" in text


@pytest.mark.parametrize("patches", [60, 8])
def test_patch_slots_have_to_be_whole_windows(batches, patches):
    with pytest.raises(InputError, match=r"a multiple of 16[\s\S]*max_patches=(64|16)"):
        batches({"data.max_patches": patches})


@pytest.mark.parametrize("mode", ["corrected", "official"])
@pytest.mark.parametrize("crop", [(48, 48), (37, 53), (0, 0)])
def test_images_are_on_the_grid_and_answers_are_the_truth(scenes, processor, mode, crop):
    changes = {"data.geometry.mode": mode, "data.geometry.crop_width": crop, "data.geometry.crop_height": crop}
    config = worlds.config(scenes, changes)
    maker = pipeline.SampleMaker(open_source(config.data.train), processor, config)
    made = [maker(index, np.random.default_rng(index)) for index in range(6)]
    made = [pair for pair in made if not isinstance(pair, pipeline.Dropped)]
    assert len(made) > 3
    for example, sample in made:
        assert all(side % 16 == 0 and side > 0 for side in example.image.shape[:2])
        assert tasks.parse_answer(example.answer) == pytest.approx(example.truth_m, abs=0.0051)
        merged = example.image.shape[0] * example.image.shape[1] // 16**2
        assert (sample.vision_index_T >= 0).sum() == merged
        assert processor.decode(sample.targets_A.tolist()) == example.answer
        packing.pack([sample], contract.RowShape(300, 256, 60, processor.config.channels), 4)


# Evaluation


def questions(scenes, processor, samples: int, **changes) -> list[pipeline.Questions]:
    settings = {"eval.source.split": "validation", "eval.samples": samples}
    config = worlds.config(scenes, settings | {path.replace("__", "."): value for path, value in changes.items()})
    return list(pipeline.evaluation_questions(open_source(config.eval.source), processor, config))


def test_evaluation_asks_the_same_each_time(scenes, processor):
    asked = [[q.examples for q in questions(scenes, processor, 20, data__read_threads=n)] for n in (1, 4)]
    for one, other in zip(*asked, strict=True):
        assert [(e.record_id, e.pixel, e.answer) for e in one] == [(e.record_id, e.pixel, e.answer) for e in other]
        assert all(np.array_equal(a.image, b.image) for a, b in zip(one, other, strict=True))
    reseeded = questions(scenes, processor, 20, eval__seed=1)
    assert [e.pixel for q in reseeded for e in q.examples] != [e.pixel for one in asked[0] for e in one]


@pytest.mark.parametrize(("samples", "images", "shares"), [(20, 8, {2, 3}), (16, 8, {2}), (5, 5, {1})])
def test_evaluation_is_spread_evenly_over_the_images(scenes, processor, samples, images, shares):
    found = questions(scenes, processor, samples)
    counts = [len(q.examples) + q.short for q in found]
    assert sum(counts) == samples and len(counts) == images and set(counts) == shares
    assert len({q.examples[0].record_id for q in found if q.examples}) == len([q for q in found if q.examples])


def test_evaluation_sees_the_whole_image(scenes, processor):
    found = questions(scenes, processor, 8, data__geometry__focal_px=0.0)
    grids = {
        tuple(16 * round(side / 16) for side in (h, w)) for h, w in ((144, 160), (160, 192), (128, 128), (192, 224))
    }
    grids |= {(176, 144), (16 * 13, 16 * 13), (192, 192)}  # 200 px is half way between
    assert {q.examples[0].image.shape[:2] for q in found} <= grids


def test_evaluation_counts_what_it_cannot_ask(scenes, processor):
    found = questions(scenes, processor, 8 * 40)  # of 16 points an image
    for asked in found:
        assert len(asked.examples) + asked.excluded == 16
        assert asked.short == 40 - len(asked.examples)
        assert len({example.pixel for example in asked.examples}) == len(asked.examples)


def test_evaluation_stops_at_a_bad_record_by_name(jsonl, scenes, processor):
    worlds.rewrite_line(jsonl, 5, lambda fields: fields | {"depth": []})
    with pytest.raises(InputError, match=r"train\.jsonl:5: pixel_coords and depth differ in length"):
        questions(scenes, processor, 8, eval__source__path=str(jsonl))


def test_a_missing_folder_of_data_is_named(tmp_path):
    shutil.rmtree(tmp_path)
    with pytest.raises(InputError, match="no data at source.path"):
        open_source(config_module.Source(path=str(tmp_path)))
