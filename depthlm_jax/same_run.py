"""The config of a workdir, and what may differ in the run that continues it."""

from pathlib import Path

from depthlm_jax import config
from depthlm_jax.errors import InputError

MIXTURE = ("data.sources", "data.mixture")  # may be changed on the way
# What may differ between a workdir and the run that continues it: the mixture, and what changes speed or reporting.
FREE_TO_CHANGE = (
    *MIXTURE, "mesh", "eval", "model.attention", "model.remat", "model.unroll", "train.gradient_accumulation_steps",
    "train.compilation_cache", "train.save_steps", "train.keep_last", "train.keep_every", "train.keep_best",
    "train.logging_steps", "data.workers", "data.read_threads", "data.prefetch_rows", "data.max_bad_records",
    "faults", "track",
)  # fmt: skip


def saved_config(workdir: Path) -> config.Config:
    """Returns the config that the run of a workdir was trained with; raises InputError if there is no run."""
    file = workdir / "config.json"
    if not file.exists():
        raise InputError(
            f"{workdir}: no run here", found=sorted(file.name for file in workdir.glob("*")) or "nothing",
            expected="config.json, base/ and checkpoints/ of a training run", fix="train first, or correct --workdir",
        )  # fmt: skip
    return config.load(file)


def differences(saved: config.Config, current: config.Config) -> list[str]:
    """Returns a line for each field that is not free to change and differs."""
    return [line for path, line in _differing(saved, current) if not path.startswith(FREE_TO_CHANGE)]


def mixture_changes(saved: config.Config, current: config.Config) -> list[str]:
    """Returns a line for each field of the mixture that differs."""
    return [line for path, line in _differing(saved, current) if path.startswith(MIXTURE)]


def _differing(saved: config.Config, current: config.Config) -> list[tuple[str, str]]:
    before, now = config.flatten(saved), config.flatten(current)
    return [
        (path, f"{path}: {before.get(path)!r} there, {now.get(path)!r} here")
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path)
    ]


def check_same_run(saved: config.Config, current: config.Config, where: str) -> None:
    """Raises InputError, naming each difference, if `current` cannot continue the run of `saved`."""
    found = differences(saved, current)
    if found:
        raise InputError(
            f"{where} holds a run of another config", found="; ".join(found), expected="the same values",
            fix="give a new --workdir, or the config that this one was started with",
        )  # fmt: skip
