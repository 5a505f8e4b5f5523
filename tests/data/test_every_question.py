"""Every way to ask, of every task, through the processor of every family: rows that a model could train on."""

import itertools
import json

import numpy as np
import pytest
import worlds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from depthlm_jax import batch as contract
from depthlm_jax import config as config_module
from depthlm_jax.config_rules import MARKERS, TASKS, TEXT_MODES
from depthlm_jax.data import camera, pipeline, plan, tasks
from depthlm_jax.models import registry

MODES = [(mode, 1, "independent") for mode in (*MARKERS, *TEXT_MODES)]
MODES += [(mode, 3, layout) for mode in TEXT_MODES for layout in ("independent", "conversation")]
ROOMY = {"data.max_tokens": 4000, "data.max_patches": 16 * 40, "data.max_answer_tokens": 2000,
         "data.geometry.crop_width": (48, 96), "data.geometry.crop_height": (48, 96), "data.geometry.flip": 0.5,
         "data.geometry.focal_px": 80.0, "data.global_batch_rows": 2}  # fmt: skip


@pytest.fixture(scope="module")
def moving(scenes, tmp_path_factory):
    """A JSONL file whose pictures have poses: two scenes of four pictures, the camera 0.3 m further right in each."""
    file = worlds.write_jsonl(scenes, tmp_path_factory.mktemp("moving"), 8)
    for number in range(8):
        pose = np.eye(4)
        pose[:3, 3] = 0.3 * (number % 4), 0, 0
        about = {"pose": pose.tolist(), "scene": f"room {number // 4}"}
        worlds.rewrite_line(file, number + 1, lambda fields, about=about: fields | about)
    return file


@pytest.fixture(scope="module", params=registry.FAMILIES)
def processor(request, tmp_path_factory):
    return worlds.processor(worlds.HF_CONFIGS[request.param], tmp_path_factory.mktemp("processor"))


def config_of(path, mode: str, questions: int, layout: str, weights: dict, changes: dict | None = None):
    reference = {"mode": mode, "questions": questions, "layout": layout}
    changes = {f"data.reference.{name}": value for name, value in reference.items()} | (changes or {})
    changes |= {f"data.tasks.{name}": weights.get(name, 0.0) for name in TASKS}
    return worlds.config(path, ROOMY | changes)


def rows_of(config: config_module.Config, processor, steps: int = 1) -> pipeline.Rows:
    batches = pipeline.training_batches(pipeline.open_sources(config), processor, config)
    try:
        return [next(batches) for _ in range(steps)][-1]
    finally:
        batches.close()


def answers_of(rows: pipeline.Rows, processor) -> list[list[str]]:
    """Returns the supervised texts of each row."""
    texts = []
    for targets_A, weights_A in zip(rows.arrays["targets_BA"], rows.arrays["weights_BA"], strict=True):
        text = processor.tokenizer.decode(targets_A[weights_A > 0])
        texts.append(text.split(processor.STOPS[0])[:-1])
    return texts


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("mode", "questions", "layout"), MODES, ids=lambda value: str(value))
def test_mode_task_and_family(moving, processor, mode, questions, layout, task):
    config = config_of(moving, mode, questions, layout, {task: 1.0})
    rows = rows_of(config, processor)
    contract.check(rows.arrays, contract.RowShape(4000, 640, 2000, processor.config.channels))
    bad = [drop.reason for drop in rows.about.dropped if drop.bad]
    assert bad == []
    assert len(rows.about.record_ids) >= 4
    samples = [row.max() for row in rows.arrays["segments_BT"]]
    per_sample = 1 if task == "translation" else questions
    images = 2 if task == "translation" else 1
    for answers, count in zip(answers_of(rows, processor), samples, strict=True):
        assert count * per_sample * 0.5 < len(answers) <= count * per_sample
        assert all(tasks.parse_answer(answer, task) is not None for answer in answers), answers
    sizes = set()
    for image_id_P, rc_P2, count in zip(rows.arrays["image_id_BP"], rows.arrays["patch_rc_BP2"], samples, strict=True):
        assert image_id_P.max() == count * images
        sizes |= {tuple(rc_P2[image_id_P == number].max(axis=0)) for number in range(1, image_id_P.max() + 1)}
    assert len(sizes) > 1  # of images
    assert rows.arrays["branch_BT"].max() == (per_sample if layout == "independent" and per_sample > 1 else 0)


@pytest.mark.parametrize("hint", ["none", "intrinsics", "ray"])
@pytest.mark.parametrize("mode", ["corrected", "official"])
@pytest.mark.parametrize("label_kind", ["z", "ray", "official"])
def test_camera_strategies(moving, processor, hint, mode, label_kind):
    everything = dict.fromkeys(TASKS, 1.0)
    changes = {"data.camera_hint": hint, "data.geometry.mode": mode, "data.label_kind": label_kind}
    for focal_px in (80.0, 0.0):
        crops = {} if focal_px else {"data.geometry.crop_width": (64, 96), "data.geometry.crop_height": (64, 96)}
        config = config_of(
            moving, "text_norm", 2, "independent", everything, changes | crops | {"data.geometry.focal_px": focal_px}
        )
        rows = rows_of(config, processor)
        assert [drop.reason for drop in rows.about.dropped if drop.bad] == []
        text = processor.tokenizer.decode(rows.arrays["tokens_BT"][0])
        assert ("taken with focal length fx = " in text) == (hint == "intrinsics")
        assert ("<think> The viewing ray" in text) == (hint == "ray")


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_of_every_task(moving, processor, task):
    for mode in ("arrow", "text_norm"):
        samples = 8 if task == "translation" else 20
        wanted = {"eval.task": task, "eval.source.path": str(moving), "eval.samples": samples}
        config = worlds.config(moving, ROOMY | {"data.reference.mode": mode} | wanted)
        records = pipeline.open_source(config.eval.source)
        asked = list(pipeline.evaluation_questions(records, processor, config))
        examples = [example for questions in asked for example in questions.examples]
        assert len(examples) + sum(questions.short for questions in asked) == config.eval.samples
        assert len(examples) > config.eval.samples // 2
        for example in examples:
            (question,) = example.questions
            assert question.task == task and len(example.images) == tasks.TASKS[task].images
            assert len(question.pixels) == tasks.TASKS[task].points
            rounding = 0.0151 if task == "time" else 0.0051  # metres / (0.5 m/s at least), and rounded again
            assert tasks.parse_answer(question.answer, task) == pytest.approx(question.truth, abs=rounding)


def test_translation_is_the_way_between_the_cameras(moving, processor):
    config = config_of(moving, "arrow", 1, "independent", {"translation": 1.0})
    maker = pipeline.SampleMaker(pipeline.open_sources(config), processor, config)
    records = maker.sources["main"]

    for first, second in itertools.permutations(range(4), 2):
        slot = plan.Slot("main", 0, first, second, "translation", camera.Chance(*[0.5] * 6), (9999,) * 3)
        (question,) = maker.example(slot).questions
        moved_m = np.linalg.norm(records[first].pose[:3, 3] - records[second].pose[:3, 3])
        assert question.truth == pytest.approx(moved_m) == pytest.approx(0.3 * abs(first - second))


def test_a_record_without_a_second_picture_is_dropped_and_said(scenes, processor):
    rows = rows_of(config_of(scenes, "arrow", 1, "independent", {"translation": 1.0}), processor)
    assert rows.about.record_ids == () and rows.about.dropped
    assert {drop.reason for drop in rows.about.dropped} == {"no second image of its scene nearby, or no pose"}
    assert not any(drop.bad for drop in rows.about.dropped)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_are_whole_samples_and_each_answer_token_is_supervised_once(moving, processor, data):
    mode, questions, layout = data.draw(st.sampled_from(MODES))
    weights = {task: data.draw(st.sampled_from([0.0, 1.0]), label=task) for task in TASKS} | {"distance": 1.0}
    config = config_of(moving, mode, questions, layout, weights, {"train.seed": data.draw(st.integers(0, 99))})
    arrays = rows_of(config, processor).arrays
    for row in range(2):
        tokens_T, segments_T, branch_T = (arrays[name][row] for name in ("tokens_BT", "segments_BT", "branch_BT"))
        real_A = arrays["weights_BA"][row] > 0
        index_A = arrays["answer_index_BA"][row][real_A]
        assert len(set(index_A)) == len(index_A)  # once
        np.testing.assert_array_equal(tokens_T[index_A + 1], arrays["targets_BA"][row][real_A])
        np.testing.assert_array_equal(segments_T[index_A + 1], segments_T[index_A])  # of one sample
        np.testing.assert_array_equal(branch_T[index_A + 1], branch_T[index_A])
        supervised_T = np.zeros(len(tokens_T), bool)
        supervised_T[index_A + 1] = True
        starts = np.flatnonzero(supervised_T & ~np.roll(supervised_T, 1))
        before = [processor.tokenizer.decode(tokens_T[start - 3 : start]) for start in starts]
        assert all(text.endswith(("assistant\n", "[/INST]")) for text in before)  # an answer from its first token …
        ends = np.flatnonzero(supervised_T & ~np.roll(supervised_T, -1))
        assert set(tokens_T[ends]) == {processor.stop_tokens[0]}  # … to its end of turn
        headers = (np.array(tokens_T) == processor.stop_tokens[0]) & supervised_T
        assert headers.sum() == len(ends)
        seen_T = arrays["vision_index_BT"][row]
        used = seen_T[seen_T >= 0]
        assert len(set(used)) == len(used)  # no patch is shared
        ids_M = arrays["image_id_BP"][row][processor.config.patches_per_merged * used]
        for number in range(1, segments_T.max() + 1):  # no sample sees another's image
            mine = set(ids_M[segments_T[seen_T >= 0] == number])
            others = set(ids_M[segments_T[seen_T >= 0] != number])
            assert mine and not mine & others
        order = segments_T[segments_T > 0]
        assert (np.diff(order) >= 0).all() and set(order) == set(range(1, order.max() + 1))


def test_json_lines_of_a_pose_are_checked(moving, processor, tmp_path):
    lines = moving.read_text().splitlines()
    fields = json.loads(lines[0])
    fields["pose"][0][0] = 2.0
    file = moving.with_name("bent.jsonl")
    file.write_text("\n".join([json.dumps(fields), *lines[1:]]) + "\n")
    rows = rows_of(config_of(file, "arrow", 1, "independent", {"distance": 1.0}), processor)
    reasons = {drop.reason.splitlines()[0] for drop in rows.about.dropped if drop.bad}
    assert len(reasons) == 1 and next(iter(reasons)).startswith("bent.jsonl:1: ")
