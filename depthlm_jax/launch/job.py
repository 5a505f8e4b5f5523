"""A training run that is to be launched, checked before anything is submitted."""

import dataclasses
import re
from pathlib import Path

from depthlm_jax import config as config_module
from depthlm_jax import lock, sharding
from depthlm_jax import run as runs
from depthlm_jax.errors import InputError
from depthlm_jax.launch.place import Place

ROOT = Path(__file__).parents[2]
MOUNT = "/volume"  # where gke_jobset.yaml and tpu_vm.sh mount what all hosts see
LONGEST_NAME = 40  # Kubernetes adds indexes to it, and takes 63 letters
PATTERNS = {  # of what a scheduler would refuse later, or somewhere else
    "name": (rf"[a-z]([-a-z0-9]{{0,{LONGEST_NAME - 2}}}[a-z0-9])?", "small letters, digits and -, such as depthlm-3b"),
    "image": (r"[^\s:]\S*", "an image in a registry, such as REGISTRY/depthlm_jax:tpu"),
    "queue": (r"[A-Za-z0-9]([-.\w]*[A-Za-z0-9])?", "the name of a queue"),
    "accelerator": (r"nvidia-[-a-z0-9]+", "GKE's name of a GPU, such as nvidia-h100-80gb"),
    "volume": (r"gs://[^/\s]+|[a-z0-9]([-.a-z0-9]*[a-z0-9])?(:/\S*)?", "a claim, SERVER:/SHARE or gs://BUCKET"),
}


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


def check_words(words: dict[str, str]) -> None:
    """Raises InputError for a value of a flag that no scheduler would take; empty ones are not looked at."""
    for name, value in words.items():
        pattern, expected = PATTERNS[name]
        if value and not re.fullmatch(pattern, value):
            raise InputError(
                f"launch: bad value of --{name}", found=repr(value), expected=expected, fix=f"correct --{name}",
            )  # fmt: skip


def check_mesh(config: config_module.Config, place: Place) -> None:
    """Raises InputError if the recipe's mesh does not suit the devices; heads are left to train, which has the model."""
    sharding.axis_sizes(
        config.mesh, place.devices, place.slices, rows=runs.rows_at_a_time(config), heads={}, rows_field=runs.ROWS_FIELD
    )


def check_workdir(workdir: str) -> None:
    """Raises InputError for a workdir that is no folder, or that a run holds as far as this machine can see."""
    if "://" in workdir:
        raise InputError(
            "launch: a workdir is a folder", found=workdir, expected="a path that all hosts see",
            fix=f"mount the bucket: --volume=gs://BUCKET --workdir={MOUNT}/… (gke, tpu_vm)",
        )  # fmt: skip
    if (Path(workdir) / "lock").exists():
        lock.hold(Path(workdir)).close()


def check_mounted(recipe: str, workdir: str) -> None:
    """Raises InputError for what the hosts of a cloud would not have, or not keep."""
    if not Path(recipe.split(":")[0]).resolve().is_relative_to(ROOT):
        raise InputError(
            f"launch: {recipe} does not travel with the repository", found=f"a recipe outside of {ROOT}",
            expected="a recipe below it", fix="copy it into configs/",
        )  # fmt: skip
    if not Path(workdir).is_relative_to(MOUNT) or Path(workdir) == Path(MOUNT):
        raise InputError(
            "launch: the workdir would be lost with its host", found=workdir,
            expected=f"a folder below {MOUNT}, where --volume is mounted", fix=f"give --workdir={MOUNT}/runs/NAME",
        )  # fmt: skip
