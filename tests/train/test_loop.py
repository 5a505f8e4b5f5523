"""Real training of a tiny model: what a run leaves behind, and that an interruption changes nothing."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import events
import jax
import numpy as np
import pytest
import worlds

from depthlm_jax import checkpoint, environment, log, sharding
from depthlm_jax import config as config_module
from depthlm_jax import run as runs
from depthlm_jax.config import Config
from depthlm_jax.data import pipeline, plan
from depthlm_jax.errors import InputError
from depthlm_jax.models import registry
from depthlm_jax.models.execution import Execution
from depthlm_jax.train import loop, optim, replay, step

STEPS = {"train.max_steps": 12, "train.save_steps": 4, "train.logging_steps": 1}
TIMES = ("samples_per_second", "tokens_per_second", "tflops_per_second_per_device", "data_wait")
STOP_AT = 7  # between the checkpoints of steps 4 and 8


class Interrupted(Exception):
    pass


class Watched:
    """Batches that remember what they gave, and call `interrupt` instead of giving the one of a step."""

    def __init__(self, batches: pipeline.Batches, stop_at: int | None = None, interrupt=None):
        self.batches, self.stop_at, self.interrupt = batches, stop_at, interrupt
        self.record_ids: list[tuple[str, ...]] = []

    def __next__(self) -> pipeline.Rows:
        if self.batches.get_state()["step"] + 1 == self.stop_at:
            self.interrupt()
        rows = next(self.batches)
        self.record_ids.append(rows.about.record_ids)
        return rows

    def get_state(self) -> dict:
        return self.batches.get_state()

    def set_state(self, state: dict) -> None:
        self.batches.set_state(state)

    def close(self) -> None:
        self.batches.close()


@dataclasses.dataclass(frozen=True)
class World:
    """A run on one device whose step is compiled once for all tests of this file."""

    config: Config
    run: runs.Run
    trainer: loop.Trainer
    first: dict  # parameters of step 0, on the host

    def batches(self, config: Config | None = None) -> pipeline.Batches:
        config = config or self.config
        return pipeline.training_batches(pipeline.open_sources(config), self.run.processor, config)

    def first_parameters(self) -> dict:
        return jax.tree.map(
            lambda x, place: jax.device_put(x.copy(), place), self.first, self.trainer.shardings.parameters
        )

    def train(self, workdir: Path, batches, config: Config | None = None) -> step.State:
        return loop.run(self.trainer, config or self.config, workdir, batches, self.first_parameters)


def open_world(scenes: Path, workdir: Path) -> World:
    config = worlds.config(scenes, STEPS)
    run = runs.open_run(config, workdir)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1], rows=8, heads=run.processor.config.heads)
    network = registry.build(config.model.family, run.processor.config, Execution(sharding.constrainer(mesh)))
    run = dataclasses.replace(run, mesh=mesh, network=network)
    first = jax.tree.map(np.array, runs.first_parameters(run))
    return World(config, run, loop.make_trainer(network, config, mesh), first)


@pytest.fixture(scope="module")
def world(scenes, tmp_path_factory) -> World:
    return open_world(scenes, tmp_path_factory.mktemp("workdir"))


@dataclasses.dataclass(frozen=True)
class Result:
    workdir: Path
    record_ids: list[tuple[str, ...]]
    leaves: list[np.ndarray]
    journal: list[dict]


def result(world: World, workdir: Path, batches: Watched) -> Result:
    state = world.train(workdir, batches)
    leaves = [np.array(leaf) for leaf in jax.tree.leaves(state)]
    return Result(workdir, batches.record_ids, leaves, log.Journal(workdir).read())


@pytest.fixture(scope="module")
def whole(world) -> Result:
    """The run that nothing interrupts."""
    return result(world, world.run.workdir, Watched(world.batches()))


def assert_same_leaves(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def without_times(journal: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in journal]


def test_loss_falls(whole):
    losses = [record["loss"] for record in whole.journal]
    assert [record["step"] for record in whole.journal] == list(range(1, 13))
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_journal_holds_the_rates_of_its_steps(whole):
    assert whole.journal[0]["learning_rate"] == 0
    assert max(record["learning_rate"] for record in whole.journal) == pytest.approx(1e-2)
    for record in whole.journal:
        assert {"loss", "mean_token_accuracy", "num_tokens", "grad_norm", *TIMES} < record.keys()
        assert 0 <= record["data_wait"] < 1
        assert record["loss/main"] == pytest.approx(record["loss"], rel=1e-6)
    assert max(record["data_wait"] for record in whole.journal) > 0


def test_a_run_goes_on_with_another_mixture(world, scenes, tmp_path, capsys):
    def interrupt():
        raise Interrupted

    recipe = worlds.recipe(scenes, STEPS)
    recipe.data.sources = config_module.sources({"near": {"path": str(scenes)}, "far": {"path": str(scenes)}})
    both = config_module.parse(recipe)
    recipe.data.sources.far.weight = 0.0
    one = config_module.parse(recipe)
    workdir = tmp_path / "run"
    runs.open_run(both, workdir)
    with pytest.raises(Interrupted):
        world.train(workdir, Watched(world.batches(both), STOP_AT, interrupt), both)
    runs.open_run(one, workdir)
    assert "goes on with another mixture: data.sources.far.weight: 1.0 there, 0.0 here" in capsys.readouterr().out
    assert config_module.load(workdir / "config.json") == one
    world.train(workdir, world.batches(one), one)
    journal = log.Journal(workdir).read()
    assert [record["step"] for record in journal] == list(range(1, 13))
    for record in journal[:4]:
        assert record["loss/near"] != record["loss/far"]
        assert min(record["loss/near"], record["loss/far"]) <= record["loss"]
        assert record["loss"] <= max(record["loss/near"], record["loss/far"])
    assert 0.2 < np.mean([record["share/far"] for record in journal[:4]]) < 0.8
    assert all(record["share/near"] == 1 and "share/far" not in record for record in journal[4:])
    assert all(0.5 < record["filled_tokens"] <= 1 for record in journal)


def test_training_on_nothing_is_an_error(world, scenes, tmp_path):
    """None of the records has a second picture of its scene."""
    tasks = {"data.tasks.distance": 0.0, "data.tasks.translation": 1.0}
    config = worlds.config(scenes, STEPS | tasks | {"data.max_tokens": 200, "data.max_answer_tokens": 80})
    with pytest.raises(InputError, match=r"step 1: no sample at all[\s\S]*no second image of its scene"):
        world.train(tmp_path / "run", world.batches(config), config)


def test_the_last_two_checkpoints_are_kept(whole):
    folders = {folder.name for folder in (whole.workdir / "checkpoints").iterdir() if folder.is_dir()}
    assert {name for name in folders if name.isdigit()} == {"8", "12"}


def test_a_checkpoint_holds_state_position_and_config(world, whole):
    checkpoints = checkpoint.Checkpoints(whole.workdir)
    abstract = world.trainer.abstract
    parameters, optimizer, run = checkpoints.restore(12, abstract.parameters, abstract.optimizer)
    assert_same_leaves([np.int32(12), *map(np.array, jax.tree.leaves((parameters, optimizer)))], whole.leaves)
    assert (run["data"]["step"], run["data"]["draws"]["main"]) == (12, 96 + plan.WAITING)
    assert run["config"] == json.loads((whole.workdir / "config.json").read_text())
    (start,) = [json.loads(line) for line in (whole.workdir / "starts.jsonl").read_text().splitlines()]
    assert run["environment"] == start
    assert start["jax"] == jax.__version__ and start["mesh"]["data"] == 1 and start["command"]
    assert environment.differences(start) == []
    assert environment.differences(start | {"jax": "0.1"}) == [f"jax: 0.1 there, {jax.__version__} here"]
    latest, alone = checkpoints.restore_parameters(abstract.parameters)
    assert latest == 12
    assert_same_leaves(*([np.array(leaf) for leaf in jax.tree.leaves(tree)] for tree in (alone, parameters)))
    checkpoints.close()


def test_the_config_of_the_run_is_saved(world, whole):
    assert config_module.load(whole.workdir / "config.json") == world.config


def test_an_interrupted_run_ends_as_if_it_had_not_been(world, whole, tmp_path):
    def interrupt():
        raise Interrupted

    with pytest.raises(Interrupted):
        world.train(tmp_path, Watched(world.batches(), STOP_AT, interrupt))
    assert [record["step"] for record in log.Journal(tmp_path).read()] == [1, 2, 3, 4, 5, 6]
    again = result(world, tmp_path, Watched(world.batches()))
    assert again.record_ids == whole.record_ids[4:]
    assert_same_leaves(again.leaves, whole.leaves)
    assert without_times(again.journal) == without_times(whole.journal)


def test_a_killed_run_ends_as_if_it_had_not_been(world, whole, scenes, tmp_path):
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(scenes), str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=400, env=os.environ | paths)
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    runs.open_run(world.config, tmp_path)
    again = result(world, tmp_path, Watched(world.batches()))
    assert again.record_ids == whole.record_ids[4:]
    assert_same_leaves(again.leaves, whole.leaves)
    assert without_times(again.journal) == without_times(whole.journal)
    assert [step for step, _ in events.scalars(tmp_path / "tensorboard")["train/loss"]] == list(range(1, 13))


def test_a_finished_run_started_again_does_nothing(world, whole):
    runs.open_run(world.config, whole.workdir)
    before = worlds.listing(whole.workdir)
    again = result(world, whole.workdir, Watched(world.batches()))
    assert_same_leaves(again.leaves, whole.leaves)
    assert again.record_ids == []
    assert worlds.listing(whole.workdir) == before


def test_a_run_of_another_config_is_refused_and_left_as_it_is(world, whole, scenes):
    before = worlds.listing(whole.workdir)
    other = worlds.config(scenes, STEPS | {"train.seed": 5, "optim.learning_rate": 0.5, "mesh.fsdp": 2})
    with pytest.raises(InputError) as error:
        runs.open_run(other, whole.workdir)
    text = str(error.value)
    assert f"{whole.workdir} holds a run of another config" in text
    assert "train.seed: 0 there, 5 here" in text and "optim.learning_rate: 0.01 there, 0.5 here" in text
    assert "mesh" not in text
    assert worlds.listing(whole.workdir) == before


def test_a_checkpoint_of_another_config_is_refused_though_config_json_is_gone(world, whole, scenes, tmp_path):
    shutil.copytree(whole.workdir / "checkpoints", tmp_path / "checkpoints")
    other = worlds.config(scenes, STEPS | {"optim.learning_rate": 0.5})
    with pytest.raises(InputError, match="holds a run of another config") as error:
        world.train(tmp_path, world.batches(), other)
    assert "optim.learning_rate: 0.01 there, 0.5 here" in str(error.value)


class Poisoned(Watched):
    """Batches that are not numbers at some steps."""

    def __init__(self, batches: pipeline.Batches, steps: set[int]):
        super().__init__(batches)
        self.steps = steps

    def __next__(self) -> pipeline.Rows:
        rows = super().__next__()
        if self.get_state()["step"] in self.steps:
            rows.arrays["weights_BA"] = np.where(rows.arrays["weights_BA"] > 0, np.inf, 0).astype(np.float32)
        return rows


class Without(Watched):
    """Batches that leave out that of a step."""

    def __next__(self) -> pipeline.Rows:
        if self.get_state()["step"] + 1 == self.stop_at:
            next(self.batches)
        return next(self.batches)


def test_a_step_that_is_not_finite_changes_nothing_and_is_told(world, tmp_path, capsys):
    state = world.train(tmp_path, Poisoned(world.batches(), {3}))
    fewer = dataclasses.replace(world.config, train=dataclasses.replace(world.config.train, max_steps=11))
    other = loop.run(world.trainer, fewer, tmp_path / "without", Without(world.batches(), 3), world.first_parameters)
    pairs = zip(jax.tree.leaves(state[1:]), jax.tree.leaves(other[1:]), strict=True)
    for one, without in pairs:
        np.testing.assert_array_equal(one, without)
    journal = {record["step"]: record for record in log.Journal(tmp_path).read()}
    assert journal.keys() == set(range(1, 13)) - {3}
    schedule = optim.make_schedule(world.config.optim, 12)
    assert [record["learning_rate"] for record in journal.values()] == [float(schedule(n)) for n in range(11)]
    assert [journal[step]["steps_skipped"] for step in (2, 4, 12)] == [0, 1, 1]
    (line,) = (tmp_path / "faults" / "skipped.process-0.jsonl").read_text().splitlines()
    skipped = json.loads(line)
    assert skipped["step"] == 3 and skipped["loss"] == "nan" and len(skipped["record_ids"]) >= 8
    assert f"step 3 skipped, it is number 1: loss nan · grad_norm nan; samples {skipped['record_ids'][0]}, " in (
        capsys.readouterr().out
    )


def test_after_some_such_steps_in_a_row_the_run_stops_and_keeps_the_rows(world, tmp_path):
    run = runs.open_run(world.config, tmp_path)
    with pytest.raises(InputError, match="step 10: 5 steps in a row changed nothing") as error:
        world.train(tmp_path, Poisoned(world.batches(), {2, *range(6, 13)}))
    assert checkpoint.Checkpoints(tmp_path, read_only=True).latest_step == 4  # that of step 8 would be no better
    file = tmp_path / "faults" / "step-10.process-0.npz"
    assert f"train --replay={file}" in str(error.value)
    with np.load(file) as kept:
        assert kept["tokens_BT"].shape[0] == 8 and np.isinf(kept["weights_BA"]).any() and len(kept["record_ids"]) >= 8
        names = kept["record_ids"].tolist()
    number, rows = replay.replay(runs.reopen(tmp_path), file)
    assert number == 4 and len(rows) == 8 and all(np.isnan(row["loss"]) for row in rows)
    assert [name for row in rows for name in row["samples"]] == names and run.workdir == tmp_path
    world.train(tmp_path, Watched(world.batches()))  # it goes on from step 4
    assert checkpoint.Checkpoints(tmp_path, read_only=True).latest_step == 12


def test_a_save_that_is_due_in_such_a_step_is_made_at_the_next_sound_one(world, tmp_path):
    def interrupt():
        raise Interrupted

    batches = Poisoned(world.batches(), {4, 5})
    batches.stop_at, batches.interrupt = 8, interrupt
    with pytest.raises(Interrupted):
        world.train(tmp_path, batches)
    assert checkpoint.Checkpoints(tmp_path, read_only=True).latest_step == 6


@pytest.mark.parametrize("content", [b"", b"PK nothing", b"PK\x03\x04 a zip file that is cut"])
def test_a_file_that_is_no_rows_is_named(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.npz: no rows to replay"):
        replay.read(tmp_path / "x.npz")


def test_data_that_disappears_ends_the_run_after_a_save(world, tmp_path):
    def vanish():
        raise InputError("train.jsonl: gone", found="nothing", expected="the file", fix="bring it back")

    with pytest.raises(InputError, match=r"train\.jsonl: gone"):
        world.train(tmp_path, Watched(world.batches(), STOP_AT, vanish))
    assert checkpoint.Checkpoints(tmp_path, read_only=True).latest_step == STOP_AT - 1


def test_a_checkpoint_folder_that_vanishes_is_made_again(world, whole, tmp_path):
    def vanish():
        (tmp_path / "checkpoints").rename(tmp_path / "gone")  # at once, also while it is written to

    again = result(world, tmp_path, Watched(world.batches(), STOP_AT, vanish))
    assert_same_leaves(again.leaves, whole.leaves)
    assert checkpoint.Checkpoints(tmp_path, read_only=True).latest_step == 12


def put_a_file_in_its_place(folder: Path) -> None:
    folder.rename(folder.with_name("gone"))
    folder.write_text("no folder")


def test_saves_that_fail_are_told_and_made_when_they_can_be(world, whole, tmp_path, capsys):
    class Mended(Watched):
        def __next__(self):
            if self.get_state()["step"] + 1 == 11:
                (tmp_path / "checkpoints").unlink()
            return super().__next__()

    batches = Mended(world.batches(), STOP_AT, lambda: put_a_file_in_its_place(tmp_path / "checkpoints"))
    patient = dataclasses.replace(world.config, faults=dataclasses.replace(world.config.faults, failed_saves=100))
    again = result(dataclasses.replace(world, config=patient), tmp_path, batches)
    assert_same_leaves(again.leaves, whole.leaves)
    assert "SAVE FAILED, number 1 in a row, " in capsys.readouterr().out
    assert checkpoint.Checkpoints(tmp_path, read_only=True).latest_step == 12


def test_sigterm_saves_and_ends_in_order_and_the_next_start_goes_on(world, whole, tmp_path, capsys):
    def terminate():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    state = world.train(tmp_path, Watched(world.batches(), STOP_AT, terminate))
    stopped = int(state.step)
    assert stopped in (STOP_AT - 1, STOP_AT)
    assert f"stopped by SIGTERM after step {stopped}/12, which is saved" in capsys.readouterr().out
    again = result(world, tmp_path, Watched(world.batches()))
    assert again.record_ids == whole.record_ids[stopped:]
    assert_same_leaves(again.leaves, whole.leaves)
    assert without_times(again.journal) == without_times(whole.journal)


def test_a_damaged_journal_is_named_and_an_unfinished_line_cut(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [record["step"] for record in log.Journal(tmp_path).read()] == [1]
    file.write_text('{"step": 1\n')
    with pytest.raises(InputError, match="metrics.jsonl: a line cannot be read"):
        log.Journal(tmp_path).read()


def test_a_workdir_that_cannot_be_written_is_refused(world, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        runs.open_run(world.config, tmp_path / "file" / "workdir")


def test_a_run_that_is_not_there_is_not_made_unless_asked_for(world, tmp_path):
    with pytest.raises(InputError, match="no run here"):
        runs.reopen(tmp_path, world.config)
    assert not list(tmp_path.iterdir())


def test_a_run_without_checkpoint_has_no_trained_parameters(world, scenes, tmp_path):
    with pytest.raises(InputError, match="no checkpoint"):
        runs.trained_parameters(runs.open_run(world.config, tmp_path))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model.random_weights": False}, "no weights to start from"),
        ({"model.family": "qwen3"}, r"unknown model.family 'qwen3'[\s\S]*qwen2_5_vl"),
        ({"train.gradient_accumulation_steps": 3}, r"8 rows / 3[\s\S]*one of \[1, 2, 4, 8\]"),
        ({"data.global_batch_rows": 12}, r"does not divide the rows[\s\S]*a multiple of 8"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(scenes, tmp_path, changes, text):
    with pytest.raises(InputError, match=text):
        runs.open_run(worlds.config(scenes, STEPS | changes), tmp_path)


@pytest.fixture
def damaged(scenes, tmp_path) -> dict:
    """Changes that make the config read a JSONL file of 8 lines, two of them bad."""
    file = worlds.write_jsonl(scenes, tmp_path, 8)
    worlds.rewrite_line(file, 3, lambda fields: fields | {"depth": [float("nan")] * len(fields["depth"])})
    (tmp_path / "4.png").unlink()
    return {"data.sources.main.path": str(file), "data.read_threads": 1}


def test_too_many_bad_records_stop_the_run(world, scenes, tmp_path, damaged):
    config = worlds.config(scenes, STEPS | damaged | {"data.max_bad_records": 1})
    with pytest.raises(InputError) as error:
        world.train(tmp_path / "workdir", world.batches(config), config)
    text = str(error.value)
    assert re.match(r"2 bad records, the last one is train.jsonl:(3: depth is not|5: cannot read image)", text)
    assert "at most data.max_bad_records=1" in text


def test_corrupted_files_by_the_hundred_are_skipped_up_to_the_limit(world, scenes, tmp_path, capsys):
    """Of 400 records a quarter has a cut picture, a quarter a damaged line: the run goes on, and stops at its cap."""
    good = worlds.write_jsonl(scenes, tmp_path, 8)
    lines, rng = good.read_text().splitlines(), np.random.default_rng(0)
    pictures = [(tmp_path / f"{number}.png").read_bytes() for number in range(8)]
    many = []
    for number in range(400):
        fields = json.loads(lines[number % 8]) | {"image": f"many{number}.png"}
        whole = pictures[number % 8]
        part = whole[: rng.integers(len(whole) - 20)] if number % 4 == 1 else whole
        (tmp_path / f"many{number}.png").write_bytes(part)
        line = json.dumps(fields)
        many.append(line[: rng.integers(len(line) - 1)] if number % 4 == 3 else line)
    (tmp_path / "many.jsonl").write_text("\n".join(many) + "\n")
    changes = {"data.sources.main.path": str(tmp_path / "many.jsonl"), "data.max_bad_records": 80}
    config = worlds.config(scenes, STEPS | changes)
    world.train(tmp_path / "goes on", world.batches(config), config)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped ")]
    assert 30 < len(said) <= 80
    assert all(re.search(r": many\.jsonl:\d+: (cannot decode image|line is not JSON)", line) for line in said)
    config = worlds.config(scenes, STEPS | changes | {"data.max_bad_records": 15})
    with pytest.raises(InputError) as error:
        world.train(tmp_path / "stops", world.batches(config), config)
    text = str(error.value)
    assert text.startswith("16 bad records, the last one is many.jsonl:")
    assert re.search(r"found:    \d+ × (cannot decode image|line is not JSON), \d+ × ", text)
    assert "data.max_bad_records=15" in text


def test_bad_records_within_the_limit_are_logged_once_and_left_out(world, scenes, tmp_path, damaged, capsys):
    config = worlds.config(scenes, STEPS | damaged | {"data.max_bad_records": 2})
    batches = Watched(world.batches(config))
    world.train(tmp_path / "workdir", batches, config)  # meets them in each of twelve epochs
    assert all("train.jsonl:3" not in ids and "train.jsonl:5" not in ids for ids in batches.record_ids)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped ")]
    assert len(said) == 2
    assert any("train.jsonl:3: depth is not a positive" in line for line in said)
    assert any("train.jsonl:5: cannot read image" in line for line in said)
    listed = (tmp_path / "workdir" / "bad_records.process-0.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["record"] for line in listed) == ["train.jsonl:3", "train.jsonl:5"]


def train_until_killed(scenes: Path, workdir: Path) -> None:
    """Ends itself without any goodbye, once the first checkpoint is complete."""

    def die():
        while not (workdir / "checkpoints" / "4").exists():  # it is written in the background
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

    this = open_world(scenes, workdir)
    this.train(workdir, Watched(this.batches(), STOP_AT, die))


if __name__ == "__main__":
    train_until_killed(*map(Path, sys.argv[1:]))
