"""A run that trains less than everything: what it saves, what it leaves as it is, and that it is continued."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
import worlds

from depthlm_jax import batch as batch_contract
from depthlm_jax import checkpoint, log, sharding, tree
from depthlm_jax import config as config_module
from depthlm_jax import run as runs
from depthlm_jax.data import pipeline
from depthlm_jax.errors import InputError
from depthlm_jax.models import registry
from depthlm_jax.models.execution import Execution
from depthlm_jax.train import loop

# Three kinds of parameters: frozen, slower, and in no group.
GROUPS = {
    "tower": {"pattern": "visual/(blocks|patch_embed)/.*", "factor": 0.0},
    "merger": {"pattern": "visual/merger/.*", "factor": 0.1},
}
# The first step moves: no warm-up; gradients are the same whatever is frozen: no clipping.
STEPS = {"train.max_steps": 4, "train.save_steps": 2, "optim.warmup_ratio": 0.0, "optim.max_grad_norm": 1e9}


@dataclasses.dataclass(frozen=True)
class World:
    config: config_module.Config
    run: runs.Run
    jitted: loop.Trainer  # not compiled yet

    @functools.cached_property
    def trainer(self) -> loop.Trainer:
        """With a step that is compiled once for all tests, and can be asked what it costs."""
        data, channels = self.config.data, self.run.processor.config.channels
        shape = batch_contract.RowShape(data.max_tokens, data.max_patches, data.max_answer_tokens, channels)
        batch = {
            field: jax.ShapeDtypeStruct(shape.of(field, data.global_batch_rows), dtype)
            for field, dtype in batch_contract.FIELDS.items()
        }
        compiled = self.jitted.run_step.lower(self.jitted.abstract, batch).compile()
        return dataclasses.replace(self.jitted, run_step=compiled)

    def train(self, workdir: Path, trainer: loop.Trainer | None = None):
        batches = pipeline.training_batches(pipeline.open_sources(self.config), self.run.processor, self.config)
        first = lambda: runs.first_parameters(self.run)  # noqa: E731
        return loop.run(trainer or self.trainer, self.config, workdir, batches, first)

    def batch(self) -> dict[str, jax.Array]:
        batches = pipeline.training_batches(pipeline.open_sources(self.config), self.run.processor, self.config)
        rows = next(batches)
        batches.close()
        return sharding.put_batch(self.run.mesh, rows.arrays)


@pytest.fixture(scope="module")
def open_world(scenes, tmp_path_factory):
    """Returns the world of these groups, on one device; each is made once."""
    made = {}

    def make(groups: dict) -> World:
        key = repr(groups)
        if key not in made:
            recipe = worlds.recipe(scenes, STEPS)
            recipe.optim.groups = config_module.groups(groups)
            config = config_module.parse(recipe)
            run = runs.open_run(config, tmp_path_factory.mktemp("workdir"))
            mesh = sharding.make_mesh(config.mesh, jax.devices()[:1], rows=8, heads=run.processor.config.heads)
            network = registry.build(
                config.model.family, run.processor.config, Execution(sharding.constrainer(mesh), remat="full")
            )
            run = dataclasses.replace(run, mesh=mesh, network=network)
            made[key] = World(config, run, loop.make_trainer(network, config, mesh))
        return made[key]

    return make


def flat(parameters: dict) -> dict[str, np.ndarray]:
    return {path: np.array(value) for path, value in tree.flatten(parameters).items()}


@dataclasses.dataclass(frozen=True)
class Step:
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    gradient: dict[str, np.ndarray]
    loss: float


@pytest.fixture(scope="module")
def first_step(open_world):
    """Returns the first step of the run of these groups."""

    def take(groups: dict) -> Step:
        world = open_world(groups)
        state = loop.start(world.trainer, runs.first_parameters(world.run))
        before = flat(state.parameters)
        state, metrics = world.trainer.run_step(state, world.batch())
        first_moments = flat(state.optimizer[1][0].mu)  # (1 − adam_b1) times the gradients, which were not clipped
        return Step(before, flat(state.parameters), first_moments, float(metrics["loss"]))

    return take


FACTORS = {"visual/blocks": 0, "visual/patch_embed": 0, "visual/merger": 0.1, "model": 1.0}  # by the path's beginning


@pytest.mark.slow
def test_frozen_parameters_stay_and_the_others_move_by_their_factor(first_step):
    whole, part = first_step({}), first_step(GROUPS)
    assert part.loss == pytest.approx(whole.loss, rel=1e-6)
    for path, before in whole.before.items():
        np.testing.assert_array_equal(part.before[path], before)
        factor = next(factor for start, factor in FACTORS.items() if path.startswith(start))
        if factor == 0:
            np.testing.assert_array_equal(part.after[path], before, err_msg=path)
            assert path not in part.gradient
            continue
        gradient = whole.gradient[path]
        largest = np.abs(gradient).max()
        np.testing.assert_allclose(part.gradient[path], gradient, rtol=0, atol=1e-5 * largest, err_msg=path)
        # Where a gradient is next to nothing, its rounding decides how far Adam goes.
        settled = np.abs(gradient) > 1e-2 * largest
        moved, all_moved = (value.after[path][settled] - np.float64(before[settled]) for value in (part, whole))
        assert np.abs(all_moved).min() > 1e-3, path
        rounding = 2 * np.finfo(np.float32).eps * np.abs(before).max()
        np.testing.assert_allclose(moved, factor * all_moved, rtol=1e-3, atol=rounding, err_msg=path)


@pytest.mark.slow
def test_a_frozen_vision_tower_needs_less_memory_and_fewer_operations(open_world):
    whole, part = (open_world(groups) for groups in ({}, GROUPS))
    frozen = tree.count(whole.run.network.abstract) - part.trainer.trained
    assert frozen > 0.3 * whole.trainer.trained
    whole, part = (world.trainer.run_step for world in (whole, part))
    state_saved = whole.memory_analysis().argument_size_in_bytes - part.memory_analysis().argument_size_in_bytes
    assert state_saved == 2 * 4 * frozen  # Adam's moments
    assert part.memory_analysis().temp_size_in_bytes < 0.8 * whole.memory_analysis().temp_size_in_bytes
    assert part.cost_analysis()["flops"] < 0.8 * whole.cost_analysis()["flops"]


def test_the_trainer_knows_how_many_parameters_are_trained(open_world):
    everything = tree.count(open_world({}).run.network.abstract)
    assert open_world({}).jitted.trained == everything
    assert 0 < open_world(GROUPS).jitted.trained < everything


class Interrupted(Exception):
    pass


@pytest.mark.slow
def test_an_interrupted_run_with_groups_ends_as_if_it_had_not_been(open_world, tmp_path):
    world = open_world(GROUPS)
    whole = world.train(tmp_path / "whole")

    def stop(state, batch):
        if int(state.step) == 3:
            raise Interrupted
        return world.trainer.run_step(state, batch)

    with pytest.raises(Interrupted):
        world.train(tmp_path / "again", dataclasses.replace(world.trainer, run_step=stop))
    assert checkpoint.Checkpoints(tmp_path / "again").latest_step == 2
    again = world.train(tmp_path / "again")
    for one, other in zip(*map(jax.tree.leaves, (whole, again)), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    losses = [[record["loss"] for record in log.Journal(tmp_path / name).read()] for name in ("whole", "again")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    _, parameters = checkpoint.Checkpoints(tmp_path / "again").restore_parameters(world.trainer.abstract.parameters)
    first = flat(runs.first_parameters(world.run))
    for path, value in flat(parameters).items():
        assert np.array_equal(value, first[path]) == path.startswith(("visual/blocks/", "visual/patch_embed/")), path


def test_a_run_with_other_groups_is_refused(open_world):
    with pytest.raises(InputError, match=r"optim\.groups\.merger\.factor: 0\.1 there, None here"):
        runs.open_run(open_world({}).config, open_world(GROUPS).run.workdir)


def test_a_group_of_nothing_is_refused_before_anything_is_allocated(open_world):
    world = open_world({})
    groups = {"vision": config_module.Group("vision_tower/.*", 0.0)}
    config = dataclasses.replace(world.config, optim=dataclasses.replace(world.config.optim, groups=groups))
    with pytest.raises(InputError, match=r"optim\.groups\.vision\.pattern matches no parameter"):
        loop.make_trainer(world.run.network, config, world.run.mesh)
