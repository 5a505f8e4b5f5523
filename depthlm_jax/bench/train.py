"""Our training step beside Hugging Face's in PyTorch: the same model, the same samples, equal batch.

What shapes the work is DepthLM's: images of the sizes that the recipes crop, windows of 112 px, seven blocks of windows
to one of whole images, one question with its answer, a vocabulary of 151,936. Width and number of layers are tiny.
`proportion` has instead a vocabulary with about the share of operations that it has in the 3B.

The peer is what one writes with transformers: samples padded to the longest one, SDPA, logits and loss by the model,
AdamW and clipping by PyTorch; on a GPU, bfloat16 with float32 master weights and gradient checkpointing. Ours is the
step that `train` runs, rows packed. Both include moving the batch to the device, neither making it. They take turns; on
a GPU, which holds one state of the 3B, one runs after the other.

The floor is the useful operations at the speed of the device's own matrix product. Half of ours was predicted to stay
above it on a processor: softmax and norms are bound by memory there. On an H200 the floor of three samples of the 3B
is 181 ms (142.6 TFLOP at the 790 TFLOP/s that a product reaches); ours took 522.
"""

import dataclasses
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from depthlm_jax import batch as batch_contract
from depthlm_jax import chips, files, parameter_groups, sharding
from depthlm_jax import config as config_module
from depthlm_jax import run as runs
from depthlm_jax.bench import peer
from depthlm_jax.data import packing, tasks, work
from depthlm_jax.errors import InputError
from depthlm_jax.models import flops, registry
from depthlm_jax.train import loop

PEER = peer.NAME
CELLS = (25, 50)  # sides of an image in merged patches: 700 to 1400 px
SAME_LOSS = {"float32": 1e-4, "bfloat16": 2e-2}
SHAPES = {"DepthLM": 151_936, "proportion": 2048}  # vocabulary
TINY = {  # the widths of the 3B divided by eight
    "hidden_size": 256, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 1, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "max_position_embeddings": 8192, "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "tie_word_embeddings": True, "model_type": "qwen2_5_vl", "initializer_range": 0.02,
    "vision_config": {
        "depth": 8, "hidden_size": 160, "intermediate_size": 428, "num_heads": 4, "out_hidden_size": 256,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
        "fullatt_block_indexes": [7], "in_chans": 3, "hidden_act": "silu", "tokens_per_second": 2,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Samples:
    """The same ones for both."""

    images: list[np.ndarray]
    encoded: list[batch_contract.Sample]
    counts: dict[str, int]  # data.work's COUNTS of all
    batch: dict[str, np.ndarray]  # packed rows
    make_seconds: float  # from pixels to rows, on one core


def measure(hf_config: dict, vocabulary: int, config: config_module.Config, count: int, repeats: int) -> dict:
    """Returns samples and tokens a second of both, their ratio, memory and useful operations.

    Args:
      hf_config: content of config.json.
      vocabulary: rows of the embedding.
      config: of our step; see `settings`.
      count: samples of a batch.
      repeats: timed steps of each; medians count.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # before JAX is asked for devices: PyTorch is first
    dtype = config.model.compute_dtype
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        processor = write_folder(hf_config, vocabulary, folder)
        samples = draw(processor, count)
        image_token, weights = processor.config.image_token_id, folder / peer.WEIGHTS
        lanes = {
            "peer": lambda: peer.training_step(folder, samples.images, samples.encoded, image_token, dtype),
            "ours": lambda: our_step(processor, samples, weights, config),  # the peer has written them
        }
        together = jax.local_devices()[0].platform == "cpu"
        found = {}
        for group in [lanes] if together else [{name: lanes[name]} for name in lanes]:
            found |= time_steps(group, repeats)
            peer.free_memory()
    check_same_loss(found, dtype)
    median = {lane: statistics.median(taken["seconds"]) for lane, taken in found.items()}
    useful, tokens = useful_operations(processor, samples, config), samples.counts["tokens"]
    peak, of_what = peak_flops(dtype)
    rates = {
        lane: {
            "samples_s": count / taken, "tokens_s": tokens / taken, "mfu": useful / taken / peak,
            "seconds": found[lane]["seconds"],
        }
        for lane, taken in median.items()
    }  # fmt: skip
    shape = samples.batch["tokens_BT"].shape, samples.batch["image_id_BP"].shape
    return {
        "ratio": median["peer"] / median["ours"], "peer": PEER, "samples": count, "tokens": tokens,
        "device": jax.local_devices()[0].device_kind, "versions": peer.versions(),
        "useful_tflop": useful / chips.TERA, "peak_tflops": peak / chips.TERA, "peak_of": of_what, **rates,
        "filled_tokens": tokens / np.prod(shape[0]), "filled_patches": samples.counts["patches"] / np.prod(shape[1]),
        "peer_filled_tokens": tokens / (count * max(len(sample.tokens_T) for sample in samples.encoded)),
        "make_seconds": samples.make_seconds,
        # of the time, if one core makes the rows of the next step while this one is computed
        "data_wait": max(0.0, 1 - median["ours"] / samples.make_seconds),
        "ours_peak_gb": found["ours"]["peak_gb"], "peer_peak_gb": found["peer"]["peak_gb"],
        "compile_seconds": found["ours"]["first_seconds"],
    }  # fmt: skip


def time_steps(lanes: dict[str, Callable], repeats: int) -> dict[str, dict]:
    """Returns each lane's first loss and its time, the times of `repeats` steps more, in turns, and its memory."""
    steps, found = {lane: make() for lane, make in lanes.items()}, {}
    for lane, run_step in steps.items():
        start = time.perf_counter()
        loss = run_step()  # compiles, or fills caches
        found[lane] = {"loss": loss, "first_seconds": time.perf_counter() - start, "seconds": []}
    for _ in range(repeats):
        for lane, run_step in steps.items():
            gc.collect()
            start = time.perf_counter()
            run_step()
            found[lane]["seconds"].append(time.perf_counter() - start)
    for lane, run_step in steps.items():
        found[lane]["peak_gb"] = run_step.peak_gb()
    return found


def write_folder(hf_config: dict, vocabulary: int, folder: Path):
    """Returns the processor of a folder without weights; its tokenizer knows the question and numbers."""
    texts = ["system\n", "user\n", "assistant\n", tasks.SYSTEM, tasks.QUESTION]
    answers = [tasks.answer_text(number / 100) for number in range(100, 2000, 7)]
    family = registry.family("qwen2_5_vl")
    family.write_scratch(hf_config, [*texts, *answers], folder)
    file = folder / "config.json"
    files.write_json(file, json.loads(file.read_text()) | {"vocab_size": vocabulary})
    return family.processor(folder)


def draw(processor, count: int, cells: tuple[int, int] | None = None) -> Samples:
    """Returns samples with random images, packed into one row."""
    rng, grid = np.random.default_rng(0), processor.config.grid_px
    sides = rng.integers(*(cells or CELLS), size=(count, 2), endpoint=True) * grid
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sides]
    answers = [tasks.answer_text(float(depth_m)) for depth_m in rng.uniform(1, 20, count)]
    start = time.perf_counter()
    encoded = [
        processor.encode([image], [(tasks.QUESTION, answer)]) for image, answer in zip(images, answers, strict=True)
    ]
    sizes = np.sum([packing.size_of(sample) for sample in encoded], axis=0)
    shape = batch_contract.RowShape(*(int(size) for size in sizes), processor.config.channels)
    row = packing.pack(encoded, shape, processor.config.patches_per_merged)
    batch, taken = packing.stack([row]), time.perf_counter() - start
    return Samples(images, encoded, work.work_of(row, processor.config.patch_slot_unit), batch, taken)


@dataclasses.dataclass
class OurStep:
    """Called, it takes a step, waits for it and returns the loss."""

    run: Callable[[], float]

    def __call__(self) -> float:
        return self.run()

    def peak_gb(self) -> float | None:
        stats = jax.local_devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] / 1e9 if stats and "peak_bytes_in_use" in stats else None


def our_step(processor, samples: Samples, weights: Path, config: config_module.Config) -> OurStep:
    """Returns the step of `train`, on one device, from the peer's weights."""
    device = jax.local_devices()[:1]
    mesh = sharding.make_mesh(config.mesh, device, rows=1, heads=processor.config.heads)
    network = registry.build("qwen2_5_vl", processor.config, runs.execution(config, mesh))
    trainer = loop.make_trainer(network, config, mesh)
    state = loop.start(trainer, runs.import_parameters(network, weights, mesh))

    def run() -> float:
        nonlocal state
        state, metrics = trainer.run_step(state, sharding.put_batch(mesh, samples.batch))
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return OurStep(run)


def useful_operations(processor, samples: Samples, config: config_module.Config) -> float:
    """Returns the floating-point operations of a step on these samples."""
    network = registry.build("qwen2_5_vl", processor.config)
    factors = parameter_groups.factors(network.shapes, config.optim.groups, network.lora_paths)
    return flops.of_work(samples.counts, network.operations(factors))


def check_same_loss(found: dict[str, dict], dtype: str) -> None:
    """Raises InputError unless both compute the same: the loss of the first step, from the same weights."""
    ours, theirs = found["ours"]["loss"], found["peer"]["loss"]
    if abs(ours - theirs) > SAME_LOSS[dtype] * theirs:
        raise InputError(
            "bench train: the peer computes something else", found=f"losses {ours:.6f} and {theirs:.6f}",
            expected=f"the same to {SAME_LOSS[dtype]:.0e}", fix="report it with the versions of both",
        )  # fmt: skip


def settings(config: config_module.Config) -> config_module.Config:
    """Returns the config for one row on one device."""
    data, train = config.data, config.train
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, global_batch_rows=1),
        train=dataclasses.replace(train, gradient_accumulation_steps=1),
        mesh=config_module.Mesh(1, 1, 1, 1),
    )


def tiny_settings() -> config_module.Config:
    """Returns those of TINY: float32, and on a processor memory is no concern."""
    default = config_module.Config()
    return settings(
        dataclasses.replace(default, model=dataclasses.replace(default.model, compute_dtype="float32", remat="dots"))
    )


def peak_flops(dtype: str) -> tuple[float, str]:
    """Returns operations a second that the device can do, and what says so."""
    chip = chips.chip_of(jax.local_devices()[0].device_kind)
    if chip and dtype == "bfloat16":
        return chip.flops_s, "published bfloat16 peak"
    side = 2048
    a = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a: a @ a)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(product(a))
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times), f"a {side} × {side} product here, {dtype}"
