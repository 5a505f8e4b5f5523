"""Two processes train one model, found through the variables that SLURM sets, as `srun` would start them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import worlds

ROOT = Path(__file__).parents[1]
RECIPE = """
from pathlib import Path
import worlds

def get_config(arg=""):
    return worlds.recipe(Path("{scenes}"), {{"train.max_steps": 4, "train.save_steps": 2}})
"""


def start(recipe: Path, workdir: Path, number: int, count: int, job: int) -> subprocess.Popen:
    slurm = {
        "SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count),
        "SLURM_STEP_NUM_TASKS": str(count), "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number),
    }  # fmt: skip
    environment = {
        **os.environ, **(slurm if count > 1 else {}), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={2 // count}",
    }  # fmt: skip
    arguments = [f"--config={recipe}", f"--workdir={workdir}", *(["--distributed"] if count > 1 else [])]
    command = [sys.executable, "-m", "depthlm_jax", "train", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(processes: list[subprocess.Popen]) -> list[str]:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(o[-3000:] for o in outputs)
    return outputs


def losses(workdir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def free_job() -> int:
    """Returns a job id; JAX derives the coordinator's port from it."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_two_processes_train_as_one(scenes, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(scenes=scenes))
    finish([start(recipe, tmp_path / "one", 0, 1, 0)])
    job = free_job()
    outputs = finish([start(recipe, tmp_path / "two", number, 2, job) for number in range(2)])
    assert [output.count("step 4/4") for output in outputs] == [1, 0]  # one log
    assert "on 2 cpu" in outputs[0]
    alone, together = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(alone) == len(together) == 4
    assert max(abs(a - b) for a, b in zip(alone, together, strict=True)) <= 1e-5
    assert worlds.listing(tmp_path / "two").keys() >= {"config.json", "metrics.jsonl", "loss.png", "checkpoints/4"}
