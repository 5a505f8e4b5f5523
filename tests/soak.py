"""Faults at random for a long time: python tests/soak.py --minutes=20 --steps=4000 --seed=0 [--change_meshes]

Two processes train; every few seconds one or both get SIGTERM or kill -9, and the next start goes on, on another mesh
if meshes change. At the end the same run is made without faults, and both are compared.
"""

import argparse
import collections
import json
import random
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import worlds
from launching import Job, Start, finish

from depthlm_jax import checkpoint
from depthlm_jax.config import Mesh
from depthlm_jax.train import goodput

TWO = Start(2, 1, Mesh(data=2, fsdp=1, tensor=1))
MESHES = [
    TWO, Start(2, 2, Mesh(data=1, fsdp=4, tensor=1)), Start(2, 2, Mesh(data=2, fsdp=1, tensor=2)),
    Start(1, 1, Mesh(1, 1, 1)), Start(2, 1, Mesh(data=1, fsdp=2, tensor=1)),
]  # fmt: skip
PAUSE_SECONDS = 1.0, 25.0  # from the first step of a start to its fault


def soak(folder: Path, minutes: float, steps: int, seed: int, change_meshes: bool) -> dict:
    """Returns what was done to the run, and how far it ended from the calm one."""
    scenes = worlds.render(folder / "scenes")
    changes = {"train.max_steps": steps, "train.save_steps": 50, "optim.learning_rate": 1e-4, "optim.adam_eps": 1e-5}
    job, calm = (Job(folder / name, scenes, changes) for name in ("soak", "calm"))
    for one in (job, calm):
        one.folder.mkdir()
    chance, faults, lost, began = random.Random(seed), collections.Counter(), [], time.monotonic()
    while time.monotonic() < began + 60 * minutes and last_step(job) < steps:
        before = job.steps()
        processes = job.start(chance.choice(MESHES) if change_meshes else TWO)
        if not await_step(job, before, processes):
            break  # it has ended by itself
        time.sleep(chance.uniform(*PAUSE_SECONDS))
        kind = chance.choice([signal.SIGTERM, signal.SIGKILL])
        hit = processes if chance.random() < 0.5 else [chance.choice(processes)]
        for process in hit:
            process.send_signal(kind)
        faults[f"{kind.name} to {'all' if len(hit) == len(processes) else 'one'}"] += 1
        for process in processes:
            process.communicate(timeout=300)
        lost.append(last_step(job) - checkpoint.saved_step(job.workdir))
    finish(job.start(TWO), seconds=3600)
    minutes = (time.monotonic() - began) / 60
    finish(calm.start(TWO), seconds=3600)
    same = job.losses() == calm.losses()
    return {
        "minutes": minutes, "faults": dict(faults), "steps": steps, "steps lost": sum(lost),
        "steps lost per fault, median and most": [statistics.median(lost), max(lost)],
        "losses equal bit for bit": same, "largest relative difference of a parameter": max(job.errors(calm).values()),
        "goodput": goodput.text(goodput.summary(job.workdir / "goodput.jsonl")),
    }  # fmt: skip


def await_step(job: Job, before: int, processes: list[subprocess.Popen]) -> bool:
    """Returns whether the start has made a step before it ended."""
    while job.steps() == before:
        if processes[0].poll() is not None:
            return False
        time.sleep(0.05)
    return True


def last_step(job: Job) -> int:
    return max(job.losses(), default=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--change_meshes", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(soak(Path(scratch), given.minutes, given.steps, given.seed, given.change_meshes), indent=1))
