"""The plan of rows: needs sizes alone, so that millions of records and whole epochs can be planned in a test."""

import dataclasses
import json
import time
import tracemalloc

import numpy as np
import pytest
import worlds

from configs import qwen2_5_vl_3b
from depthlm_jax import config as config_module
from depthlm_jax.data import index, pipeline, plan
from depthlm_jax.errors import InputError


class Sizes:
    """Records of which nothing but the index is read."""

    def __init__(self, count: int, width: int = 2000, height: int = 1600, focal: float = 1000.0, scenes: int = 0):
        self.index = np.zeros(count, index.ROW)
        self.index["width"], self.index["height"], self.index["fx"], self.index["fy"] = width, height, focal, focal
        self.index["scene"] = 1 + np.arange(count) * scenes // count if scenes else 0

    def __len__(self) -> int:
        return len(self.index)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return worlds.processor(worlds.HF_CONFIG, tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def processor_3b(tmp_path_factory):
    recipe = qwen2_5_vl_3b.get_config()
    return worlds.processor(recipe.model.hf_config.to_dict(), tmp_path_factory.mktemp("processor"))


def settings(weights: dict[str, float], changes: dict | None = None) -> config_module.Config:
    recipe = worlds.recipe("", {"data.global_batch_rows": 8, "data.max_tokens": 500, "data.max_patches": 256,
                                "data.max_answer_tokens": 200} | (changes or {}))  # fmt: skip
    recipe.data.sources = config_module.sources({name: {"weight": weight} for name, weight in weights.items()})
    return config_module.parse(recipe)


def planner(sources: dict, processor, config: config_module.Config, position: plan.Position | None = None):
    shape = pipeline.row_shape(config.data, processor.config)
    return plan.Planner(sources, processor, config, shape, position or plan.Position())


def names(rows: list[list[plan.Slot]]) -> list[tuple[str, int]]:
    return [(slot.source, slot.draw) for row in rows for slot in row]


def steps(given: plan.Planner, count: int) -> list[list[tuple[str, int]]]:
    return [names(given.next_step()[0]) for _ in range(count)]


def through_json(position: plan.Position) -> plan.Position:
    return plan.position_of(json.loads(json.dumps(dataclasses.asdict(position))))


@pytest.mark.parametrize("focal", [40.0, 50.0])
def test_no_budget_is_exceeded_and_no_sample_is_left_behind(processor, focal):
    config = settings({"a": 1, "b": 1}, {"data.geometry.focal_px": focal, "data.geometry.crop_width": (16, 60)})
    given = planner({"a": Sizes(50), "b": Sizes(31, 60, 48, 50.0)}, processor, config)
    seen = {"a": set(), "b": set()}
    for _ in range(30):
        rows, position = given.next_step()
        assert len(rows) == 8
        for row in rows:
            assert (np.sum([slot.size for slot in row], axis=0) <= (500, 256, 200)).all()
        for source, draw in names(rows):
            assert draw not in seen[source]
            seen[source].add(draw)
    for name, draws in seen.items():
        waiting = {draw for source, draw in position.waiting if source == name}
        assert draws | waiting == set(range(position.draws[name]))
        assert min(waiting, default=10**9) > position.draws[name] - 4 * plan.WAITING  # none waits for long


def test_a_plan_goes_on_from_any_position(processor):
    config, sources = settings({"a": 1, "b": 0.3}), {"a": Sizes(50), "b": Sizes(31, 60, 48, 50.0)}
    whole, given = steps(planner(sources, processor, config), 9), planner(sources, processor, config)
    for done in range(8):
        assert steps(planner(sources, processor, config, through_json(given.position)), 1) == [whole[done]]
        assert names(given.next_step()[0]) == whole[done]
    assert given.position.step == 8


def test_position_stays_small_however_long_the_run(processor):
    given = planner({"a": Sizes(50)}, processor, settings({"a": 1}))
    sizes = []
    for _ in range(40):
        given.next_step()
        sizes.append(len(json.dumps(dataclasses.asdict(given.position))))
    assert max(sizes) < 2500


def test_every_epoch_has_every_record_once_in_another_order(processor):
    given = planner({"a": Sizes(64)}, processor, settings({"a": 1}))
    slots = sorted((given.sources["a"].slot(draw) for draw in range(3 * 64)), key=lambda slot: slot.draw)
    epochs = [[slot.record for slot in slots[64 * epoch : 64 * (epoch + 1)]] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_draw_does_not_depend_on_the_other_sources(processor):
    alone = planner({"a": Sizes(50)}, processor, settings({"a": 1}))
    among = planner({"a": Sizes(50), "b": Sizes(9)}, processor, settings({"a": 0.1, "b": 5}))
    for draw in (0, 3, 1023, 1024, 5000):
        assert alone.sources["a"].slot(draw) == among.sources["a"].slot(draw)
    other_seed = planner({"a": Sizes(50)}, processor, settings({"a": 1}, {"train.seed": 1}))
    assert alone.sources["a"].slot(0).chance != other_seed.sources["a"].slot(0).chance
    both = planner({"a": Sizes(50), "b": Sizes(50)}, processor, settings({"a": 1, "b": 1}))
    one, other = ([both.sources[name].slot(n).record for n in range(20)] for name in "ab")
    assert one != other


@pytest.mark.parametrize("weights", [{"a": 1, "b": 1, "c": 0.1}, {"a": 1, "b": 0, "c": 0.001}])
def test_realised_shares(processor, weights):
    sources = {name: Sizes(1000) for name, weight in weights.items() if weight}
    given = planner(sources, processor, settings(weights, {"data.global_batch_rows": 64}))
    counts = dict.fromkeys(weights, 0)
    while sum(counts.values()) < 10_000:
        for source, _ in names(given.next_step()[0]):
            counts[source] += 1
    total, drawn = sum(counts.values()), sum(weights.values())
    for name, weight in weights.items():
        share = weight / drawn
        assert abs(counts[name] - share * total) <= plan.WAITING + 4
    assert (counts["b"] == 0) == (weights["b"] == 0)


@pytest.mark.parametrize("hosts", [1, 4])
def test_each_host_has_its_share_of_every_source(processor, hosts):
    """Within five standard deviations of a random draw, over 10,000 samples."""
    weights = {"a": 1, "b": 1, "c": 0.1}
    sources = {name: Sizes(1000) for name in weights}
    given = planner(sources, processor, settings(weights, {"data.global_batch_rows": 64}))
    counts, total = [dict.fromkeys(weights, 0) for _ in range(hosts)], 0
    while total < 10_000:
        rows, _ = given.next_step()
        for host, mine in enumerate(np.array_split(np.arange(64), hosts)):
            for source, _ in names([rows[row] for row in mine]):
                counts[host][source] += 1
        total += sum(map(len, rows))
    for of_host in counts:
        samples = sum(of_host.values())
        for name, weight in weights.items():
            share = weight / 2.1
            assert abs(of_host[name] / samples - share) < 5 * np.sqrt(share * (1 - share) / samples)


def test_another_mixture_continues_each_source(processor):
    sources = {name: Sizes(40) for name in "ab"}
    first = planner(sources, processor, settings({"a": 1, "b": 1}))
    before = [slot for step in steps(first, 5) for slot in step]
    sources["c"] = Sizes(40)
    second = planner(sources, processor, settings({"a": 1, "b": 0.2, "c": 3}), through_json(first.position))
    after = [slot for step in steps(second, 20) for slot in step]
    assert second.position.stage == 1
    for name in "abc":
        draws = [draw for source, draw in before + after if source == name]
        assert len(set(draws)) == len(draws)  # nothing again
        waiting = {draw for source, draw in second.position.waiting if source == name}
        assert set(draws) | waiting == set(range(second.position.draws[name]))  # nothing left out
    new = [source for source, _ in after[2 * plan.WAITING :]]
    assert abs(new.count("c") / len(new) - 3 / 4.2) < 0.1
    third = planner(sources, processor, settings({"a": 1, "b": 0.2, "c": 3}), through_json(second.position))
    assert third.position.stage == 1  # the same mixture is no change


def test_a_source_that_was_turned_off_gives_nothing_more(processor):
    first = planner({"a": Sizes(40), "b": Sizes(40)}, processor, settings({"a": 1, "b": 1}))
    trained = [draw for step in steps(first, 3) for source, draw in step if source == "b"]
    given = planner({"a": Sizes(40)}, processor, settings({"a": 1, "b": 0}), through_json(first.position))
    assert {source for step in steps(given, 5) for source, _ in step} == {"a"}
    assert given.position.draws["b"] == first.position.draws["b"]
    back = planner({"a": Sizes(40), "b": Sizes(40)}, processor, settings({"a": 1, "b": 1}), given.position)
    trained += [draw for step in steps(back, 5) for source, draw in step if source == "b"]
    assert len(set(trained)) == len(trained)
    assert set(range(first.position.draws["b"])) - set(trained) == set()  # those that were waiting come as well


def test_tasks_are_drawn_by_weight(processor):
    weights = {"distance": 1.0, "speed": 0.5, "two_points": 0.5}
    changes = {f"data.tasks.{name}": weight for name, weight in weights.items()}
    given = planner({"a": Sizes(40)}, processor, settings({"a": 1}, changes))
    drawn = [given.sources["a"].slot(draw).task for draw in range(4096)]
    for name, weight in weights.items():
        assert abs(drawn.count(name) / 4096 - weight / 2) < 0.03
    assert set(drawn) == set(weights)


def test_no_task(processor):
    with pytest.raises(InputError, match=r"no task[\s\S]*data\.tasks\.distance"):
        planner({"a": Sizes(40)}, processor, settings({"a": 1}, {"data.tasks.distance": 0.0}))


def test_a_pair_is_two_near_records_of_one_scene(processor):
    changes = {"data.tasks.distance": 0.0, "data.tasks.translation": 1.0}
    given = planner({"a": Sizes(60, 60, 48, 50.0, scenes=4)}, processor, settings({"a": 1}, changes))
    slots = [given.sources["a"].slot(draw) for draw in range(600)]
    for slot in slots:
        assert slot.partner != slot.record and abs(slot.partner - slot.record) <= plan.REACH
        assert slot.partner * 4 // 60 == slot.record * 4 // 60
    assert len({(slot.record, slot.partner) for slot in slots}) > 300
    single = settings({"a": 1}, {"data.tasks.distance": 1.0})
    one = planner({"a": Sizes(60, 60, 48, 50.0)}, processor, single).sources["a"].slot(0)
    assert slots[0].size[1] == 2 * one.size[1]  # two images' patches
    alone = planner({"a": Sizes(60, 60, 48, 50.0)}, processor, settings({"a": 1}, changes)).sources["a"].slot(0)
    assert (alone.partner, alone.task) == (-1, "translation")
    changes["data.tasks.speed"] = 1.0  # where there is no pair, the other task is asked
    mixed = planner({"a": Sizes(60, 60, 48, 50.0)}, processor, settings({"a": 1}, changes)).sources["a"]
    assert {mixed.slot(draw).task for draw in range(50)} == {"speed"}


@pytest.mark.parametrize(("field", "change"), [("max_tokens", 80), ("max_answer_tokens", 16)])
def test_rows_too_small_for_any_sample_name_the_field_to_raise(processor, field, change):
    config = settings({"a": 1}, {f"data.{field}": change})
    with pytest.raises(InputError) as error:
        planner({"a": Sizes(5)}, processor, config)
    assert "a row is too small for a question about the smallest image (distance)" in str(error.value)
    assert f"data.{field}={change}" in str(error.value) and f"--config.data.{field}" in str(error.value)


def test_a_sample_that_fits_into_no_row_is_marked_and_does_not_stop_the_plan(processor):
    changes = {"data.geometry.crop_width": (0, 0), "data.geometry.crop_height": (0, 0), "data.max_patches": 64}
    sources = {"a": Sizes(12, 48, 48, 50.0)}
    sources["a"].index["width"][7] = 200
    given = planner(sources, processor, settings({"a": 1}, changes))
    slots = [slot for step in range(8) for row in given.next_step()[0] for slot in row]
    assert {slot.record for slot in slots if slot.too_large} == {7}
    assert all(slot.too_large[1] > 64 >= slot.size[1] for slot in slots if slot.too_large)
    larger = {"a": Sizes(12, 200, 48, 50.0)}  # the same source, with other images, goes on all the same
    resumed = planner(larger, processor, settings({"a": 1}, changes), through_json(given.position))
    assert all(slot.too_large for row in resumed.next_step()[0] for slot in row)


@pytest.mark.parametrize("mode", ["corrected", "official"])
@pytest.mark.parametrize("focal", [np.nan, 0.0, -1.0, 1e-300, 1e300, np.inf])
def test_records_that_will_be_refused_do_not_stop_the_plan(processor, mode, focal):
    config = settings({"a": 1}, {"data.geometry.mode": mode})
    assert len(planner({"a": Sizes(5, focal=focal)}, processor, config).next_step()[0]) == 8


def test_rows_of_the_3b_recipe_are_full(processor_3b):
    """What the recipe's crops leave empty of the budget that binds: at most 5 %."""
    config = config_module.parse(qwen2_5_vl_3b.get_config())
    given, shape = planner({"main": Sizes(5000)}, processor_3b, config), np.array([4608, 298 * 64])
    used, samples = [], 0
    for _ in range(3):
        rows, _ = given.next_step()
        used += [np.sum([slot.size[:2] for slot in row], axis=0) for row in rows]
        samples += sum(map(len, rows))
    filled = np.mean(used, axis=0) / shape
    assert max(filled) >= 0.95, f"tokens {filled[0]:.3f}, patches {filled[1]:.3f}"
    assert samples / 3 == pytest.approx(1536, rel=0.02)


def test_a_million_records_cost_nothing_to_plan(processor):
    sources = {"a": Sizes(1_000_000)}
    tracemalloc.start()
    start = time.perf_counter()
    given = planner(sources, processor, settings({"a": 1}))
    given.next_step()
    elapsed, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6 and elapsed < 10


def test_plans_of_steps_are_handed_out_in_any_order(processor):
    config, sources = settings({"a": 1}), {"a": Sizes(50)}
    whole = steps(planner(sources, processor, config), 6)
    plans = plan.StepPlans(planner(sources, processor, config), kept=4)
    for step in (3, 1, 2, 0, 5, 4):
        rows, position = plans[step]
        assert names(rows) == whole[step] and position.step == step + 1
    with pytest.raises(LookupError, match="planned and forgotten"):
        plans[0]
