"""Answers a second beside Hugging Face's `generate`: k questions about one image, greedy, the same weights.

Each question is a row with its own marker, so that the image is encoded k times, by both. The peer gets them as one
batch; all prompts have one length, so nothing is padded. Answers have a fixed number of tokens.
"""

import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from depthlm_jax import batch as batch_contract
from depthlm_jax import run as runs
from depthlm_jax import sharding
from depthlm_jax.bench import peer, train
from depthlm_jax.data import packing, tasks
from depthlm_jax.errors import InputError
from depthlm_jax.eval import decode
from depthlm_jax.models import registry

PEER = peer.NAME
CELLS = (15, 20)  # height and width of the image in merged patches
NEW_TOKENS = 33  # of an answer


def measure(hf_config: dict, vocabulary: int, questions: int, repeats: int) -> dict:
    """Returns answers a second of both, and their ratio.

    Raises:
      InputError: the answers are not the same tokens.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        processor = train.write_folder(hf_config, vocabulary, folder)
        images, prompts = ask(processor, questions)
        theirs = peer.Asked(folder, images, prompts, processor.config.image_token_id, NEW_TOKENS)
        lanes = {"ours": our_answers(processor, prompts, folder / peer.WEIGHTS), "peer": theirs}
        found = {lane: run() for lane, run in lanes.items()}  # compiles, or fills caches
        if not np.array_equal(found["ours"], found["peer"]):
            raise InputError(
                "bench decode: other answers than the peer's", fix="report it with the versions of both",
                found=f"{np.mean(found['ours'] == found['peer']):.1%} of the tokens are the same", expected="all",
            )  # fmt: skip
        seconds: dict[str, list[float]] = {lane: [] for lane in lanes}
        for _ in range(repeats):
            for lane, run in lanes.items():
                start = time.perf_counter()
                run()
                seconds[lane].append(time.perf_counter() - start)
    median = {lane: statistics.median(taken) for lane, taken in seconds.items()}
    rates = {f"{lane}_answers_s": questions / taken for lane, taken in median.items()}
    return {"ratio": median["peer"] / median["ours"], "peer": PEER, "questions": questions, **rates, "seconds": seconds}


def ask(processor, questions: int) -> tuple[list[np.ndarray], list[batch_contract.Sample]]:
    """Returns an image with a marker at another pixel for each question, and the prompts."""
    rng, grid = np.random.default_rng(0), processor.config.grid_px
    image = rng.integers(0, 256, (CELLS[0] * grid, CELLS[1] * grid, 3), dtype=np.uint8)
    images = [image.copy() for _ in range(questions)]
    for number, marked in enumerate(images):
        marked[10 + 20 * number : 20 + 20 * number, 10:20] = (255, 0, 0)
    return images, [processor.encode([marked], [(tasks.QUESTION, None)]) for marked in images]


def our_answers(processor, prompts: list[batch_contract.Sample], weights: Path):
    """Returns the function that decodes the prompts → tokens [B, G]."""
    sizes = packing.size_of(prompts[0])
    shape = batch_contract.RowShape(*(int(size) for size in sizes), processor.config.channels)
    batch = packing.stack([packing.pack([p], shape, processor.config.patches_per_merged) for p in prompts])
    config, device = train.tiny_settings(), jax.local_devices()[:1]
    mesh = sharding.make_mesh(config.mesh, device, rows=len(prompts), heads=processor.config.heads)
    network = registry.build("qwen2_5_vl", processor.config, runs.execution(config, mesh))
    parameters = runs.import_parameters(network, weights, mesh)
    greedy = decode.make_greedy(network, "float32", NEW_TOKENS, stop_tokens=())
    return lambda: np.asarray(greedy(parameters, sharding.put_batch(mesh, batch)))
