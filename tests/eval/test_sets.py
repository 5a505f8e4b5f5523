"""Evaluation sets while a run trains: real training of a tiny model on one device."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import events
import jax
import numpy as np
import pytest
import worlds

from depthlm_jax import config as config_module
from depthlm_jax import run as runs
from depthlm_jax import sharding
from depthlm_jax.data import pipeline
from depthlm_jax.errors import InputError
from depthlm_jax.eval import evaluate, metrics, sets
from depthlm_jax.models import registry
from depthlm_jax.models.execution import Execution
from depthlm_jax.train import goodput, loop

STEPS = 6


def changes(scenes: Path) -> dict:
    both = {
        "often": {"path": str(scenes), "split": "validation", "every_steps": 2, "samples": 11},
        "last": {"path": str(scenes), "samples": 5},
    }
    return {
        "train.max_steps": STEPS, "train.save_steps": 4, "train.keep_last": 1, "train.logging_steps": 1,
        "train.keep_best": "often/parse_failure_rate", "eval.sets": both, "eval.batch_rows": 8,
        "eval.max_new_tokens": 24,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class World:
    run: runs.Run
    trainer: loop.Trainer
    first: dict

    def train(self, workdir: Path, found: sets.Sets | None = None) -> dict[str, np.ndarray]:
        """Returns the leaves of the last state; `found`: the sets, those of the config by default."""
        run = dataclasses.replace(self.run, workdir=workdir)
        config = run.config
        batches = pipeline.training_batches(pipeline.open_sources(config), run.processor, config)
        first = jax.tree.map(lambda x: jax.device_put(x.copy(), self.run.mesh.devices.flat[0]), self.first)
        first = jax.device_put(first, self.trainer.shardings.parameters)
        state = loop.run(self.trainer, config, workdir, batches, lambda: first, sets=found or sets.Sets(run))
        return [np.array(leaf) for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def world(scenes, tmp_path_factory) -> World:
    config = worlds.config(scenes, changes(scenes))
    run = runs.open_run(config, tmp_path_factory.mktemp("workdir"))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1], rows=8, heads=run.processor.config.heads)
    network = registry.build(config.model.family, run.processor.config, Execution(sharding.constrainer(mesh)))
    run = dataclasses.replace(run, mesh=mesh, network=network)
    first = jax.tree.map(np.array, runs.first_parameters(run))
    return World(run, loop.make_trainer(network, config, mesh), first)


@pytest.fixture(scope="module")
def whole(world) -> list[np.ndarray]:
    return world.train(world.run.workdir)


def lines(workdir: Path) -> list[tuple[int, str]]:
    return [(line["step"], line["set"]) for line in sets.read(workdir)]


def test_sets_are_evaluated_when_they_are_due_and_at_the_end(world, whole):
    workdir = world.run.workdir
    assert lines(workdir) == [(2, "often"), (4, "often"), (6, "last"), (6, "often")]
    for line in sets.read(workdir):
        model = line["scores"]["model"]
        assert model["n"] == {"often": 11, "last": 5}[line["set"]] == sum(one["n"] for one in line["ranges"])
        assert {"delta1", "abs_rel", "rmse", "silog", "parse_failure_rate"} < model.keys()
    assert goodput.summary(workdir / "goodput.jsonl")["evaluation"] > 0


def test_the_last_answers_of_a_set_lie_in_its_folder(world, whole):
    for name, count in (("often", 11), ("last", 5)):
        folder = world.run.workdir / sets.FOLDER / name
        files = {file.name for file in folder.iterdir()}
        pictures = {"answers.png", "best.png", "worst.png", "scatter.png"}
        assert files == pictures | {"metrics.json", "predictions.jsonl"}
        assert json.loads((folder / "metrics.json").read_text())["step"] == STEPS
        assert len((folder / "predictions.jsonl").read_text().splitlines()) == count


def test_tensorboard_has_scores_histograms_and_pictures(world, whole):
    folder = world.run.workdir / "tensorboard"
    shown = events.scalars(folder)
    assert [step for step, _ in shown["eval/often/delta1"]] == [2, 4, 6] and len(shown["train/loss"]) == STEPS
    tags = {value.tag for event in events.read(folder) for value in event.summary.value}
    assert {"eval/last/answers", "eval/last/log10_truth", "eval/often/answers"} <= tags


def test_answers_are_those_of_the_parameters_of_that_step(world, whole):
    run = dataclasses.replace(world.run, config=sets.of_set(world.run.config, "often"))
    step, parameters = runs.trained_parameters(run)
    again = [json.dumps(dataclasses.asdict(one)) for one in evaluate.evaluate(run, parameters).answers]
    folder = world.run.workdir / sets.FOLDER / "often"
    assert step == STEPS and again == (folder / "predictions.jsonl").read_text().splitlines()


def test_evaluating_does_not_change_the_training(world, whole, tmp_path):
    class Never(sets.Sets):
        def due(self, step: int) -> list[str]:
            return []

    undisturbed = world.train(tmp_path, Never(dataclasses.replace(world.run, workdir=tmp_path)))
    for one, other in zip(undisturbed, whole, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_the_best_checkpoint_is_kept_beside_the_last(world, whole, tmp_path):
    """The first evaluation is made the best one: of the next ones the errors are larger."""

    class Worse(sets.Sets):
        def scores(self) -> dict[int, float]:
            return {step: -step for step in super().scores()}

    measured = sets.Sets(world.run).scores()
    assert measured.keys() == {2, 4, 6} and set(measured.values()) == {-1.0}  # nothing is read yet; less is better
    world.train(tmp_path, Worse(dataclasses.replace(world.run, workdir=tmp_path)))
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["2", "6"]


@pytest.mark.parametrize("step", [2, STEPS])
def test_an_evaluation_that_sigterm_ends_is_made_by_the_next_start(world, whole, tmp_path, step, capsys):
    class Ended(sets.Sets):
        def evaluate(self, number, names, parameters, watch, tracker=None):
            if number == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().evaluate(number, names, parameters, watch, tracker)

    world.train(tmp_path, Ended(dataclasses.replace(world.run, workdir=tmp_path)))
    assert f"stopped by SIGTERM: the next start evaluates step {step}" in capsys.readouterr().out
    assert (step, "often") not in lines(tmp_path) and (tmp_path / "checkpoints" / str(step)).is_dir()
    leaves = world.train(tmp_path)
    assert sorted(lines(tmp_path)) == sorted(lines(world.run.workdir))
    for one, other in zip(leaves, whole, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_answers_that_the_disk_does_not_take_end_no_training(world, whole, tmp_path, capsys):
    (tmp_path / sets.FOLDER).write_text("in the way")
    world.train(tmp_path)
    assert "warning: answers of often after step 2 are not kept: " in capsys.readouterr().out
    assert lines(tmp_path) == lines(world.run.workdir)


def test_ranges_divide_the_points():
    truth = np.array([0.5, 1.0, 1.5, 7.0, 300.0])
    found = metrics.by_range([0.5, 1.0, 3.0, None, 300.0], truth)
    assert [(one["low"], one["high"], one["n"], one["delta1"]) for one in found] == [
        (0.0, 1.0, 1, 1.0), (1.0, 2.0, 2, 0.5), (5.0, 10.0, 1, 0.0), (80.0, None, 1, 1.0),
    ]  # fmt: skip
    assert found[2]["abs_rel"] is None


def test_best_and_worst_answers_keep_their_images(world):
    run = dataclasses.replace(world.run, config=sets.of_set(world.run.config, "often"))
    result = evaluate.evaluate(run, runs.first_parameters(world.run))
    ratios = [answer.ratio for answer, _ in result.ranked]
    assert ratios == sorted(answer.ratio for answer in result.answers)
    for answer, example in result.ranked:
        assert (answer.record_id, answer.truth) == (example.record_id, example.questions[0].truth)


def test_a_best_checkpoint_that_nothing_measures_is_refused(scenes):
    asked = changes(scenes) | {"train.keep_best": "rooms/delta1"}
    with pytest.raises(InputError, match="keep_best is measured nowhere[\\s\\S]*often/delta1[\\s\\S]*set --conf"):
        worlds.config(scenes, asked)
    with pytest.raises(InputError, match="SET being one of eval.sets; there is none"):
        worlds.config(scenes, asked | {"eval.sets": {}})


def test_devices_that_cannot_share_the_rows_are_told(world):
    settings = dataclasses.replace(world.run.config.eval, batch_rows=3)
    mesh = sharding.make_mesh(config_module.Mesh(), jax.devices()[:2], rows=8, heads={})
    run = dataclasses.replace(world.run, mesh=mesh, config=dataclasses.replace(world.run.config, eval=settings))
    with pytest.raises(InputError, match="eval.batch_rows=3 on 2 devices[\\s\\S]*a multiple of 2"):
        sets.Sets(run)
