"""A training run, and what it is to run on."""

import dataclasses
import re
from pathlib import Path

from depthlm_jax.launch.place import Place

ROOT = Path(__file__).parents[2]
LONGEST_NAME = 40  # Kubernetes adds indexes to it, and takes 63 letters


@dataclasses.dataclass(frozen=True)
class Job:
    """What is run where; empty strings: not given."""

    name: str
    train: tuple[str, ...]  # its flags: --config=…, --config.any.field=…, --workdir=…
    workdir: str
    place: Place
    accelerator_type: str = ""
    image: str = ""
    volume: str = ""
    queue: str = ""
    spot: bool = False
    options: tuple[str, ...] = ()  # more of them for sbatch

    @property
    def arguments(self) -> tuple[str, ...]:
        """The command of depthlm_jax, where processes find one another by themselves."""
        return ("train", *self.train, *(["--distributed"] if self.place.processes > 1 else []))


def name_of(workdir: str) -> str:
    """Returns a name for the run of a workdir, which schedulers take."""
    words = re.sub(r"[^a-z0-9]+", "-", Path(workdir).name.lower()).strip("-")
    return f"depthlm-{words}"[:LONGEST_NAME].strip("-")
