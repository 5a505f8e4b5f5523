"""Eight devices train as one does: same losses on every mesh, weights really divided, checkpoints that move."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import worlds

from depthlm_jax import checkpoint, sharding, tree
from depthlm_jax import run as runs
from depthlm_jax.config import Mesh
from depthlm_jax.data import pipeline
from depthlm_jax.models import registry
from depthlm_jax.train import loop, step

STEPS = 5
COMPILED = "/jax/core/compile/backend_compile_duration"
SLOW, REPLICATED = pytest.mark.slow, ((2, 2, 2, 2), (2, 2, 1, 1, 2))
CHANGES = {
    "data.max_tokens": 260, "data.max_patches": 128, "data.max_answer_tokens": 84,
    "optim.learning_rate": 1e-3, "train.max_steps": STEPS, "optim.warmup_ratio": 0.0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Trained:
    trainer: loop.Trainer
    state: step.State
    losses: list[float]
    compilations: int
    terms: np.ndarray  # of the last loss, by row


@pytest.fixture(scope="module")
def train(scenes, tmp_path_factory):
    """Yields the function (data, fsdp, tensor, …) → five steps, always from the same start."""
    run = runs.open_run(worlds.config(scenes, CHANGES), tmp_path_factory.mktemp("workdir"))
    batches = pipeline.training_batches(pipeline.open_sources(run.config), run.processor, run.config)
    rows = [next(batches).arrays for _ in range(STEPS)]
    assert {2} <= set(np.unique(rows[0]["segments_BT"])), "no row has two samples"
    first = jax.tree.map(np.array, runs.first_parameters(run))
    compilations = []

    def count(event: str, seconds: float, **details) -> None:
        if event == COMPILED:
            compilations.append(details)

    jax.monitoring.register_event_duration_secs_listener(count)

    @functools.cache
    def run_steps(
        data: int, fsdp: int, tensor: int, micro_batches: int = 1, replica: int = 1, optimizer: str = "adamw"
    ) -> Trained:
        changes = {"train.gradient_accumulation_steps": micro_batches, "optim.name": optimizer}
        config = worlds.config(scenes, CHANGES | changes)
        devices = jax.devices()[: replica * data * fsdp * tensor]
        heads = run.processor.config.heads
        mesh = sharding.make_mesh(
            Mesh(data, fsdp, tensor, replica), devices, rows=8 // (micro_batches or 1), heads=heads
        )
        network = registry.build("qwen2_5_vl", run.processor.config, runs.execution(config, mesh))
        trainer = loop.make_trainer(network, config, mesh)
        places = trainer.shardings.parameters
        state = loop.start(trainer, jax.tree.map(lambda x, place: jax.device_put(x.copy(), place), first, places))
        jax.block_until_ready(state)
        before, losses = len(compilations), []
        for arrays in rows:
            state, metrics = trainer.run_step(state, sharding.put_batch(mesh, arrays))
            losses.append(metrics["loss"])
        after = len(compilations)
        terms = sharding.local_rows(metrics["loss_BA"])
        return Trained(trainer, state, [float(loss) for loss in losses], after - before, terms)

    yield run_steps
    jax.monitoring.unregister_event_duration_listener(count)


MESHES = [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 2, 4)]


@pytest.mark.parametrize(
    "sizes",
    [*MESHES, (1, 2, 1, 0), (1, 2, 2, 0, 2), *(pytest.param(one, marks=SLOW) for one in REPLICATED)],
    ids=lambda sizes: "x".join(map(str, sizes)),
)
def test_losses_are_those_of_one_device(train, sizes):
    alone = train(1, 1, 1)
    divided = train(*sizes)
    np.testing.assert_allclose(divided.losses, alone.losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose(divided.terms, alone.terms, rtol=0, atol=1e-3)  # row by row
    assert np.abs(alone.terms - alone.terms[::-1]).max() > 0.1
    assert alone.losses[-1] < alone.losses[0] - 0.1, "the steps hardly change the model: equal losses prove nothing"


@pytest.mark.parametrize("sizes", [(1, 1, 1), *MESHES], ids=lambda sizes: "x".join(map(str, sizes)))
def test_the_step_is_compiled_once(train, sizes):
    assert train(*sizes).compilations == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "lion", "muon"])
def test_other_optimizers_do_the_same_on_a_mesh(train, name):
    alone, divided = (train(*sizes, optimizer=name) for sizes in ((1, 1, 1), (1, 8, 1)))
    np.testing.assert_allclose(divided.losses, alone.losses, rtol=0, atol=1e-4 if name == "lion" else 1e-5)
    assert alone.losses[-1] < alone.losses[0]


SHARDS = {  # path → shape of one device's part
    (1, 8, 1): {
        "model/embed_tokens/embedding": (400, 4),
        "model/layers/self_attn/q_proj/kernel": (2, 4, 32),
        "model/layers/mlp/down_proj/kernel": (2, 64, 4),
        "visual/blocks/attn/qkv/kernel": (2, 4, 3, 32),
        "visual/patch_embed/proj/kernel": (2, 24, 32),
    },
    (1, 2, 4): {
        "model/embed_tokens/embedding": (100, 16),
        "model/layers/self_attn/q_proj/kernel": (2, 16, 8),
        "model/layers/self_attn/q_proj/bias": (2, 8),
        "model/layers/mlp/down_proj/kernel": (2, 16, 16),
        "visual/blocks/attn/qkv/kernel": (2, 16, 3, 8),
        "visual/patch_embed/proj/kernel": (2, 96, 32),
    },
}


@pytest.mark.parametrize("sizes", SHARDS, ids=lambda sizes: "x".join(map(str, sizes)))
def test_parameters_and_moments_are_divided(train, sizes):
    state = train(*sizes).state
    adam = state.optimizer[1][0]
    for values in (state.parameters, adam.mu, adam.nu):
        flat = tree.flatten(values)
        found = {path: {part.data.shape for part in flat[path].addressable_shards} for path in SHARDS[sizes]}
        assert found == {path: {shape} for path, shape in SHARDS[sizes].items()}


def test_every_kernel_is_divided_among_all_devices(train):
    for path, value in tree.flatten(train(1, 2, 4).state.parameters).items():
        if path.endswith(("kernel", "embedding")) and path != "visual/patch_embed/proj/kernel":  # has no H, F or V
            assert sum(part.data.nbytes for part in value.addressable_shards) == value.nbytes, path


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 1, 1)], ids=lambda sizes: "x".join(map(str, sizes)))
def test_a_checkpoint_moves_to_another_mesh(train, scenes, tmp_path, sizes):
    saved, target = train(2, 2, 2).state, train(*sizes).trainer
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(STEPS, saved.parameters, saved.optimizer, {"data": {"step": STEPS}})
    checkpoints.close()
    abstract = target.abstract
    restored = checkpoint.Checkpoints(tmp_path).restore(STEPS, abstract.parameters, abstract.optimizer)
    places = jax.tree.leaves((target.shardings.parameters, target.shardings.optimizer))
    before, after = (jax.tree.leaves(state) for state in ((saved.parameters, saved.optimizer), restored[:2]))
    for one, other, place in zip(before, after, places, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
        assert other.sharding.is_equivalent_to(place, other.ndim)
    assert restored[2]["data"] == {"step": STEPS}
