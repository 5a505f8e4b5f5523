"""Runs of a sweep as JobSets on Kubernetes: `launch` renders and creates them."""

import subprocess
import sys
from pathlib import Path

from depthlm_jax.errors import InputError
from depthlm_jax.launch import job
from depthlm_jax.sweep.expand import Run


def command(workdir: Path, number: int, run: Run, options: list[str]) -> list[str]:
    """Returns the command that launches a run; `options` are flags of launch: --topology, --image, --volume, …"""
    end = f"-{number}"
    name = job.name_of(str(workdir))[: job.LONGEST_NAME - len(end)] + end
    flags = run.arguments()[1:]
    return [sys.executable, "-m", "depthlm_jax", "launch", "--target=gke", f"--name={name}", *options, *flags]


def launch(one: list[str]) -> None:
    """Runs such a command; raises InputError, after its own words, if it fails."""
    status = subprocess.run(one, check=False).returncode
    if status:
        raise InputError(
            "sweep: a run could not be launched", found=f"exit status {status}; what is wrong stands above",
            expected="a JobSet for each run", fix="correct --options, then give the same command again",
        )  # fmt: skip
