"""What is checked before anything is submitted: a job that would fail on its cluster fails here."""

import re
import shlex
from pathlib import Path

from depthlm_jax import config as config_module
from depthlm_jax import lock, sharding
from depthlm_jax import run as runs
from depthlm_jax.errors import InputError
from depthlm_jax.launch.job import LONGEST_NAME, ROOT
from depthlm_jax.launch.place import Place

MOUNT = "/volume"  # where gke_jobset.yaml and tpu_vm.sh mount what all hosts see
PATTERNS = {  # of what a scheduler would refuse later, or somewhere else
    "name": (rf"[a-z]([-a-z0-9]{{0,{LONGEST_NAME - 2}}}[a-z0-9])?", "small letters, digits and -, such as depthlm-3b"),
    "image": (r"[^\s:]\S*", "an image in a registry, such as REGISTRY/depthlm_jax:tpu"),
    "queue": (r"[A-Za-z0-9]([-.\w]*[A-Za-z0-9])?", "the name of a queue"),
    "accelerator": (r"nvidia-[-a-z0-9]+", "GKE's name of a GPU, such as nvidia-h100-80gb"),
    "volume gke": (r"gs://[^/\s]+|[a-z0-9]([-.a-z0-9]*[a-z0-9])?", "a claim or gs://BUCKET"),
    "volume tpu_vm": (r"gs://[^/\s]+|[^\s:/]+:/\S*", "SERVER:/SHARE or gs://BUCKET"),
}


def check_words(words: dict[str, str]) -> None:
    """Raises InputError for a value of a flag, by its name in PATTERNS, that no scheduler would take; "": not given."""
    for name, value in words.items():
        pattern, expected = PATTERNS[name]
        if value and not re.fullmatch(pattern, value):
            raise bad_value(name.split()[0], repr(value), expected)


def bad_value(flag: str, found: str, expected: str) -> InputError:
    return InputError(f"launch: bad value of --{flag}", found=found, expected=expected, fix=f"correct --{flag}")


def split_options(options: str) -> tuple[str, ...]:
    """Returns the words of --options; raises InputError where a quotation is not closed."""
    try:
        return tuple(shlex.split(options))
    except ValueError as error:
        raise bad_value("options", f"{options!r}: {error}", "options of sbatch, as a shell would read them") from error


def check_joined(place: Place) -> None:
    """Raises InputError for slices that GKE would not join."""
    if place.slices > 1 and place.hosts == 1:
        raise InputError(
            "launch: slices of one host are not joined on GKE", found=f"{place.slices} slices of {place.chips} chips",
            expected="slices of several hosts, such as 2xv6e-16", fix="give one slice, or larger ones",
        )  # fmt: skip


def check_mesh(config: config_module.Config, place: Place) -> None:
    """Raises InputError if the recipe's mesh does not suit the devices. What divides heads is left to train."""
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


def check_mounted(workdir: str) -> None:
    """Raises InputError for a workdir that the hosts of a cloud would not keep."""
    if not Path(workdir).is_relative_to(MOUNT) or Path(workdir) == Path(MOUNT):
        raise InputError(
            "launch: the workdir would be lost with its host", found=workdir,
            expected=f"a folder below {MOUNT}, where --volume is mounted", fix=f"give --workdir={MOUNT}/runs/NAME",
        )  # fmt: skip


def recipe_there(recipe: str) -> str:
    """Returns the recipe as it is named in a copy of the repository; raises InputError if it is not in there."""
    file, colon, argument = recipe.partition(":")
    path = Path(file).resolve()
    if not path.is_relative_to(ROOT.resolve()):
        raise InputError(
            f"launch: {recipe} does not travel with the repository", found=f"a recipe outside of {ROOT}",
            expected="a recipe below it", fix="copy it into configs/",
        )  # fmt: skip
    return f"{path.relative_to(ROOT.resolve())}{colon}{argument}"
