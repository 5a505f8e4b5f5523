"""Runs what a target has prepared."""

import os
import shutil
import subprocess
from pathlib import Path

from depthlm_jax.errors import InputError
from depthlm_jax.launch.targets import Start, Target


def check_installed(name: str, target: Target) -> None:
    """Raises InputError if the program that reaches a target is not here."""
    if target.program and shutil.which(target.program) is None:
        raise InputError(
            f"launch: no {target.program} on this machine", found=f"{target.program} is not on PATH",
            expected=f"a machine from which --target={name} is reached",
            fix=f"install {target.install}, or see what would run with --dry_run",
        )  # fmt: skip


def submit(start: Start) -> str:
    """Returns what the scheduler has said.

    Raises:
      InputError: it refused, or could not be reached.
    """
    done = subprocess.run(
        start.command, env=os.environ | start.environment, input=start.text or None, capture_output=True, text=True
    )
    if done.returncode:
        raise InputError(
            f"launch: {start.command[0]} failed with status {done.returncode}",
            found=done.stderr.strip() or done.stdout.strip() or "no word from it",
            expected="a scheduler that takes the job", fix="correct what it names; --dry_run shows what it was given",
        )  # fmt: skip
    return done.stdout.strip()


def become(start: Start) -> None:
    """Replaces this process by the command, which has the terminal, signals and exit status from here on."""
    os.execvpe(start.command[0], start.command, os.environ | start.environment)


def make_log_folder(workdir: Path) -> None:
    """Makes the folder in which SLURM writes its log: where there is none, it would fail without a word."""
    workdir.mkdir(parents=True, exist_ok=True)
