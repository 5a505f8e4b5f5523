import dataclasses
import json
import shutil

import numpy as np
import pytest
import worlds

from depthlm_jax import batch as contract
from depthlm_jax import config as config_module
from depthlm_jax.data import camera, packing, pipeline, plan, tasks
from depthlm_jax.data.records import open_source
from depthlm_jax.errors import InputError

SIZES = {"data.max_tokens": 700, "data.max_patches": 256, "data.max_answer_tokens": 250}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return worlds.processor(worlds.HF_CONFIG, tmp_path_factory.mktemp("processor"))


@pytest.fixture
def batches(scenes, processor):
    """Returns the function (changes, host, hosts) → iterator of one host's rows of several samples."""
    opened = []

    def open_batches(changes: dict | None = None, host: int = 0, hosts: int = 1):
        config = worlds.config(scenes, SIZES | (changes or {}))
        own = config.data.global_batch_rows // hosts
        rows = range(host * own, (host + 1) * own)
        opened.append(pipeline.training_batches(pipeline.open_sources(config), processor, config, rows))
        return opened[-1]

    yield open_batches
    for each in opened:
        each.close()


def take(iterator, steps: int) -> list[pipeline.Rows]:
    return [next(iterator) for _ in range(steps)]


def joined(rows: list[pipeline.Rows]) -> pipeline.Rows:
    """Returns the hosts' rows of a step as one batch."""
    return pipeline.join_rows(
        [
            {"arrays": {name: array[row] for name, array in part.arrays.items()}, "about": part.about}
            for part in rows
            for row in range(len(part.arrays["tokens_BT"]))
        ]
    )


def assert_same(one: pipeline.Rows, other: pipeline.Rows) -> None:
    worlds.assert_same_arrays(one.arrays, other.arrays)
    assert one.about.position == other.about.position
    assert set(one.about.record_ids) == set(other.about.record_ids)


def test_batches_satisfy_the_contract(batches, processor):
    rows = next(batches())
    contract.check(rows.arrays, contract.RowShape(700, 256, 250, processor.config.channels))
    assert len(rows.about.record_ids) > 2 * 8
    assert rows.arrays["segments_BT"].max() >= 3
    used = [(rows.arrays[name] > 0).sum() for name in ("segments_BT", "image_id_BP", "weights_BA")]
    assert rows.about.used[0] == used[0] and rows.about.used[2] == used[2]
    assert rows.about.used[1] >= used[1]  # slots beyond an image's edge are taken too


def test_order_does_not_depend_on_the_number_of_hosts(batches):
    alone = take(batches(), 4)
    for hosts in (2, 4):
        of_hosts = [take(batches({}, host, hosts), 4) for host in range(hosts)]
        for step, rows in enumerate(alone):
            assert_same(joined([of_host[step] for of_host in of_hosts]), rows)


def test_two_hosts_never_have_the_same_sample(batches):
    for step in range(3):
        parts = [take(batches({}, host, 2), step + 1)[step].arrays for host in range(2)]
        own = [{row.tobytes() for row in part["patches_BPC"]} for part in parts]
        assert not own[0] & own[1]


def test_order_does_not_depend_on_threads_or_prefetching(batches):
    one = take(batches({"data.read_threads": 1, "data.prefetch_rows": 1}), 4)
    four = take(batches({"data.read_threads": 4, "data.prefetch_rows": 50}), 4)
    for rows, others in zip(one, four, strict=True):
        assert_same(rows, others)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_position_continues_with_the_next_step(batches, steps):
    iterator = batches()
    take(iterator, steps)
    state = json.dumps(iterator.get_state())
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


def test_another_seed_is_another_order_and_other_crops(batches):
    ours, theirs = next(batches()), next(batches({"train.seed": 1}))
    assert ours.about.record_ids != theirs.about.record_ids
    assert not np.array_equal(ours.arrays["patches_BPC"], theirs.arrays["patches_BPC"])


def slots_of(records, count: int, task: str = "distance", source: str = "main") -> list[plan.Slot]:
    """Returns slots with random numbers of their own, of one record after the other."""
    chances = np.random.default_rng(5).random((count, 6)).tolist()
    big = (10**6,) * 3
    return [
        plan.Slot(source, number, number % len(records), (number + 1) % len(records), task, camera.Chance(*chance), big)
        for number, chance in enumerate(chances)
    ]


def maker_of(config, processor) -> pipeline.SampleMaker:
    return pipeline.SampleMaker(pipeline.open_sources(config), processor, config)


def made_of(maker: pipeline.SampleMaker, count: int, task: str = "distance") -> list:
    found = [maker(slot) for slot in slots_of(maker.sources["main"], count, task)]
    return [item for item in found if not isinstance(item, pipeline.Dropped)]


def test_crops_differ_between_draws_of_a_record(scenes, processor):
    config = worlds.config(scenes, {"data.geometry.crop_width": (32, 60), "data.geometry.crop_height": (32, 60)})
    maker = maker_of(config, processor)
    slots = [dataclasses.replace(slot, record=3) for slot in slots_of(maker.sources["main"], 12)]
    examples = [example for example in map(maker.example, slots) if not isinstance(example, pipeline.Dropped)]
    assert len({example.images[0].shape for example in examples}) > 1
    assert len({example.images[0].tobytes() for example in examples}) > 6
    assert len({example.questions[0].truth for example in examples}) > 1


@pytest.fixture
def jsonl(scenes, tmp_path):
    return worlds.write_jsonl(scenes, tmp_path, 8)


def test_jsonl_gives_the_same_samples_as_tfds(scenes, jsonl, processor):
    makers = [maker_of(worlds.config(path), processor) for path in (scenes, jsonl)]
    for slot in slots_of(range(8), 8):
        (_, one), (_, other) = (maker(slot) for maker in makers)
        worlds.assert_same_arrays(vars(one), vars(other))


def test_jsonl_batches_name_their_lines(jsonl, batches):
    rows = next(batches({"data.sources.main.path": str(jsonl)}))
    assert set(rows.about.record_ids) == {f"train.jsonl:{line}" for line in range(1, 9)}


def test_bad_records_are_dropped_and_named_and_not_replaced(jsonl, batches):
    intact = {"data.sources.main.path": str(jsonl)}
    before = next(batches(intact))
    worlds.rewrite_line(jsonl, 3, lambda fields: fields | {"depth": [-1.0] * len(fields["depth"])})
    (jsonl.parent / "5.png").write_bytes((jsonl.parent / "5.png").read_bytes()[:200])  # of line 6
    rows = next(batches(intact))
    bad = {"train.jsonl:3", "train.jsonl:6"}
    assert rows.about.record_ids == tuple(name for name in before.about.record_ids if name not in bad)
    reasons = sorted({drop.reason.splitlines()[0] for drop in rows.about.dropped})
    assert reasons == [
        "train.jsonl:3: depth is not a positive finite number", "train.jsonl:6: cannot decode image"
    ]  # fmt: skip
    assert all(drop.bad for drop in rows.about.dropped)
    assert len(rows.about.dropped) == len(before.about.record_ids) - len(rows.about.record_ids)


def test_a_record_without_usable_point_is_dropped_but_not_bad(jsonl, batches):
    worlds.rewrite_line(jsonl, 2, lambda fields: fields | {"pixel_coords": [[0, 0]], "depth": [1.5]})
    rows = next(batches({"data.sources.main.path": str(jsonl)}))
    assert {(drop.record_id, drop.bad) for drop in rows.about.dropped} == {("train.jsonl:2", False)}
    assert all("not enough labelled points" in drop.reason for drop in rows.about.dropped)


def test_a_record_that_breaks_the_limits_of_the_model_is_bad_not_fatal(jsonl, batches):
    worlds.rewrite_line(jsonl, 4, lambda fields: fields | {"intrinsics": [1e6, 1e6, 1.0, 1.0]})
    for mode in ("corrected", "official"):
        rows = next(batches({"data.sources.main.path": str(jsonl), "data.geometry.mode": mode}))
        assert {drop.record_id for drop in rows.about.dropped if drop.bad} == {"train.jsonl:4"}, mode


def test_a_sample_that_no_row_can_hold_is_bad_and_says_what_to_raise(jsonl, batches):
    near = {"intrinsics": [12.0, 12.0, 9.0, 9.0]}
    worlds.rewrite_line(jsonl, 4, lambda fields: fields | near)
    changes = {"data.sources.main.path": str(jsonl), "data.geometry.crop_width": (0, 0)}
    rows = next(batches(changes | {"data.geometry.crop_height": (0, 0)}))
    (reason,) = {drop.reason for drop in rows.about.dropped if drop.bad}
    assert reason.startswith("train.jsonl:4: the sample does not fit into a row")
    assert "data.max_tokens=700" in reason and "raise --config.data.max_tokens" in reason


@pytest.mark.parametrize("mode", ["corrected", "official"])
@pytest.mark.parametrize("focal", [0.05, 0.6, 1e-12])
def test_absurd_focal_lengths_are_bad_records(jsonl, batches, mode, focal):
    """Normalised intrinsics, a common mistake, would ask for an image of terabytes."""
    worlds.rewrite_line(jsonl, 4, lambda fields: fields | {"intrinsics": [focal, focal, 0.5, 0.5]})
    rows = next(batches({"data.sources.main.path": str(jsonl), "data.geometry.mode": mode}))
    reasons = {drop.reason.splitlines()[0] for drop in rows.about.dropped if drop.bad}
    assert reasons == {"train.jsonl:4: absurd focal length"}


def test_questions_about_one_image_are_different_ones(scenes, processor):
    for task, mode in (("two_points", "corrected"), ("distance", "official"), ("distance", "corrected")):
        changes = {"data.reference.mode": "text_norm", "data.reference.questions": 30, "data.geometry.mode": mode}
        made = made_of(maker_of(worlds.config(scenes, changes), processor), 12, task)
        for example, _ in made:
            asked = [question.pixels for question in example.questions]
            assert len(set(asked)) == len(asked) > 1


def test_sources_are_counted_by_what_was_made(scenes, jsonl, processor, batches):
    """The record of one source has no usable point; shares are of samples, not of draws."""
    for line in range(1, 9):
        worlds.rewrite_line(jsonl, line, lambda fields: fields | {"pixel_coords": [[0, 0]], "depth": [1.5]})
    recipe = worlds.recipe(scenes, SIZES)
    both = {"good": {"path": str(scenes)}, "empty": {"path": str(jsonl)}}
    recipe.data.sources = config_module.sources(both)
    config = config_module.parse(recipe)
    given = pipeline.training_batches(pipeline.open_sources(config), processor, config)
    rows = next(given)
    made = [name for names in rows.about.sources for name in names]
    assert made == ["good"] * len(rows.about.record_ids) and rows.about.dropped
    assert [len(names) for names in rows.about.sources] == rows.arrays["segments_BT"].max(axis=1).tolist()
    given.close()


@pytest.mark.parametrize("patches", [60, 8])
def test_patch_slots_have_to_be_whole_windows(batches, patches):
    with pytest.raises(InputError, match=r"a multiple of 16[\s\S]*max_patches=(64|16)"):
        batches({"data.max_patches": patches})


@pytest.mark.parametrize("mode", ["corrected", "official"])
@pytest.mark.parametrize("crop", [(48, 48), (37, 53), (0, 0)])
def test_images_are_on_the_grid_and_answers_are_the_truth(scenes, processor, mode, crop):
    changes = {"data.geometry.mode": mode, "data.geometry.crop_width": crop, "data.geometry.crop_height": crop}
    made = made_of(maker_of(worlds.config(scenes, changes), processor), 6)
    assert len(made) > 3
    for example, sample in made:
        (image,), (question,) = example.images, example.questions
        assert all(side % 16 == 0 and side > 0 for side in image.shape[:2])
        assert tasks.parse_answer(question.answer) == pytest.approx(question.truth, abs=0.0051)
        merged = image.shape[0] * image.shape[1] // 16**2
        assert (sample.vision_index_T >= 0).sum() == merged
        assert processor.decode(sample.targets_A.tolist()) == question.answer
        packing.pack([sample], contract.RowShape(300, 256, 60, processor.config.channels), 4)


# Evaluation


def questions(scenes, processor, samples: int, **changes) -> list[pipeline.Questions]:
    settings = {"eval.source.split": "validation", "eval.samples": samples}
    config = worlds.config(scenes, settings | {path.replace("__", "."): value for path, value in changes.items()})
    return list(pipeline.evaluation_questions(open_source(config.eval.source), processor, config))


def test_evaluation_asks_the_same_each_time(scenes, processor):
    asked = [[q.examples for q in questions(scenes, processor, 20, data__read_threads=n)] for n in (1, 4)]
    for one, other in zip(*asked, strict=True):
        assert [(e.record_id, e.questions) for e in one] == [(e.record_id, e.questions) for e in other]
        assert all(np.array_equal(a.images[0], b.images[0]) for a, b in zip(one, other, strict=True))
    reseeded = questions(scenes, processor, 20, eval__seed=1)
    assert [e.questions for q in reseeded for e in q.examples] != [e.questions for one in asked[0] for e in one]


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
    assert {q.examples[0].images[0].shape[:2] for q in found} <= grids


def test_evaluation_counts_what_it_cannot_ask(scenes, processor):
    found = questions(scenes, processor, 8 * 40)  # of 16 points an image
    for asked in found:
        assert len(asked.examples) + asked.excluded == 16
        assert asked.short == 40 - len(asked.examples)
        assert len({example.questions[0].pixels for example in asked.examples}) == len(asked.examples)


def test_evaluation_stops_at_a_bad_record_by_name(jsonl, scenes, processor):
    worlds.rewrite_line(jsonl, 5, lambda fields: fields | {"depth": []})
    with pytest.raises(InputError, match=r"train\.jsonl:5: pixel_coords and depth differ in length"):
        questions(scenes, processor, 8, eval__source__path=str(jsonl))


def test_a_missing_folder_of_data_is_named(tmp_path):
    shutil.rmtree(tmp_path)
    with pytest.raises(InputError, match="no data at source.path"):
        open_source(config_module.Source(path=str(tmp_path)))
