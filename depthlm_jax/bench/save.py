"""Steps with a checkpoint every ten, beside the same steps without: what saving in the background costs.

The tiny model of `bench train` with the real vocabulary, AdamW: 0.5 GB a checkpoint. Rows of one small image.
"""

import statistics
import tempfile
import time
from pathlib import Path

import jax

from depthlm_jax import run as runs
from depthlm_jax import sharding
from depthlm_jax.bench import train
from depthlm_jax.data import plan
from depthlm_jax.models import registry
from depthlm_jax.train import loop, saves

PEER = "the same steps without saving"
EVERY, STEPS = 10, 20
CELLS = (8, 12)


def measure(repeats: int) -> dict:
    """Returns seconds a step with and without saves, taking turns, and what a save takes alone."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        processor = train.write_folder(train.TINY, train.SHAPES["DepthLM"], folder / "base")
        samples = train.draw(processor, 1, CELLS)
        config = train.tiny_settings()
        mesh = sharding.make_mesh(config.mesh, jax.local_devices()[:1], rows=1, heads=processor.config.heads)
        network = registry.build("qwen2_5_vl", processor.config, runs.execution(config, mesh))
        trainer = loop.make_trainer(network, config, mesh)
        state = loop.start(trainer, jax.jit(network.init)(jax.random.key(0)))
        number, seconds = 0, {True: [], False: []}
        for _ in range(repeats + 1):  # the first compiles
            for saving in (True, False):
                writer, start = saves.Saves(folder, config, {}), time.perf_counter()
                for _ in range(STEPS):
                    number += 1
                    state, metrics = trainer.run_step(state, sharding.put_batch(mesh, samples.batch))
                    float(metrics["loss"])
                    if saving and number % EVERY == 0:
                        writer.save(number, state, plan.Position(), 0, surely=False)
                writer.wait()
                seconds[saving].append((time.perf_counter() - start) / STEPS)
                writer.close()
        newest = max((folder / "checkpoints").iterdir(), key=lambda file: int(file.name))
        bytes_saved = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    with_saves, without = (statistics.median(seconds[saving][1:]) for saving in (True, False))
    return {
        "ratio": without / with_saves, "peer": PEER, "save_seconds_a_step": with_saves, "plain_seconds_a_step": without,
        "checkpoint_gb": bytes_saved / 1e9, "every": EVERY,
    }  # fmt: skip
