"""A sweep as an array job: each task of the array is one run."""

import itertools
import os
import subprocess
from pathlib import Path

from depthlm_jax.errors import InputError

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm.sbatch"
NUMBER, TASKS = "SLURM_ARRAY_TASK_ID", "SLURM_NTASKS"


def command(
    workdir: Path, numbers: list[int], parallel: int, options: list[str], arguments: list[str]
) -> list[str]:
    """Returns the command that submits an array job.

    Args:
      workdir: of the sweep; output of the tasks goes to its slurm/.
      numbers: of the runs.
      parallel: of them at a time; 0: as many as the cluster gives.
      options: more of them for sbatch.
      arguments: of `python -m depthlm_jax` in each task.
    """
    limit = f"%{parallel}" if parallel else ""
    return [
        "sbatch", "--parsable", f"--array={ranges(numbers)}{limit}", f"--job-name={workdir.name}",
        f"--output={workdir}/slurm/%A_%a.txt", *options, str(SCRIPT), *arguments,
    ]  # fmt: skip


def ranges(numbers: list[int]) -> str:
    """Returns numbers as sbatch reads them.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    groups = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in group] for _, group in groups]
    return ",".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans)


def submit(workdir: Path, sbatch: list[str]) -> str:
    """Returns the number of the job.

    Raises:
      InputError: there is no SLURM here, or it does not take the job.
    """
    if not SCRIPT.is_file():
        raise InputError(
            f"{SCRIPT}: no such file", found="a package without its repository", expected="the repository's launch/",
            fix="run the sweep from a checkout of the repository",
        )  # fmt: skip
    (workdir / "slurm").mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(sbatch, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise InputError(
            "sweep: no sbatch here", found="it is not on PATH", expected="a machine from which SLURM takes jobs",
            fix="run it on the cluster's login node, or with --target=local",
        ) from error  # fmt: skip
    if done.returncode:
        raise InputError(
            "sweep: sbatch did not take the job", found=done.stderr.strip() or f"exit status {done.returncode}",
            expected="a job number",
            fix="correct --options, which go to sbatch; --dry_run shows its command",
        )  # fmt: skip
    return done.stdout.strip().split(";")[0]


def task() -> int:
    """Returns the number of the run that this task of an array is; raises InputError if it is none."""
    number = os.environ.get(NUMBER, "")
    if not number.isdecimal():
        raise InputError(
            "sweep: --run=slurm outside an array job", found=f"{NUMBER}={number!r}", expected="the number of a run",
            fix="give --run=NUMBER",
        )  # fmt: skip
    return int(number)


def has_several_processes() -> bool:
    """Returns whether this task of the array is one of several processes that train together."""
    return int(os.environ.get(TASKS, "1")) > 1
