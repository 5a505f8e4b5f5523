"""Weights → a Hugging Face folder that PyTorch loads."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from depthlm_jax import config as config_module
from depthlm_jax import files, hf, log
from depthlm_jax.checkpoint import Checkpoints
from depthlm_jax.errors import InputError
from depthlm_jax.models import registry
from depthlm_jax.run import Run, stored_dtype

NOTE = "depthlm"  # key in config.json; other readers ignore it


def export_run(run: Run, output: Path) -> int:
    """Returns the step whose parameters were written to `output`, in the dtype that the base folder names.

    One parameter at a time is in host memory.
    """
    rules, shapes = run.network.rules, run.network.shapes
    with _staged(output) as staging, contextlib.closing(Checkpoints(run.workdir, read_only=True)) as checkpoints:
        step, read = checkpoints.open_parameters(shapes)
        parameters = ((rule.path, read(rule.path)) for rule in rules)
        registry.family(run.config.model.family).copy_published(run.base, staging)
        hf.write_parameters(staging, rules, shapes, stored_dtype(staging), parameters, log.Progress("tensors written"))
        _note_training(staging, run.config)
    return step


def convert_folder(source: Path, output: Path, family_name: str) -> None:
    """Writes the folder `source` again, a tensor at a time through our parameters, bit for bit in the dtype on disk."""
    family = registry.family(family_name)
    with _staged(output) as staging:
        for warning in family.copy_published(source, staging):
            log.say(f"warning: {warning}")
        network = registry.build(family_name, family.read_config(*read_jsons(staging)))
        weights = hf.open_folder(source, network.rules, network.shapes)
        hf.write_tensors(staging, weights.tensors, weights.there_and_back(), log.Progress("tensors written"))


def read_jsons(folder: Path) -> tuple[dict, dict]:
    """Returns config.json and preprocessor_config.json of a folder."""
    names = "config.json", "preprocessor_config.json"
    return tuple(files.read_json(folder / name, "use a complete Hugging Face folder") for name in names)


@contextlib.contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """Yields a folder beside `output` that takes its place when all is written; an earlier export goes last."""
    _refuse_foreign(output)
    staging, old = (output.with_name(f"{output.name}.{state}") for state in ("incomplete", "old"))
    shutil.rmtree(staging, ignore_errors=True)
    files.make_writable(staging)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if output.exists():
        output.rename(old)
    staging.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _refuse_foreign(output: Path) -> None:
    """Raises InputError if `output` is a file, or holds anything but an earlier export of a run."""
    config = output / "config.json"
    ours = config.is_file() and NOTE in files.read_json(config, "give another --output")
    found = ["a file"] if output.is_file() else sorted(file.name for file in output.glob("*"))
    if found and not ours:
        raise InputError(
            f"{output} is not empty", found=found[:6],
            expected="a new or empty folder, or an earlier export of a run", fix="give another --output",
        )  # fmt: skip


def _note_training(output: Path, config: config_module.Config) -> None:
    """Adds to config.json what whoever asks this model for a depth has to know."""
    file = output / "config.json"
    data = config.data
    note = {
        "focal_px": data.geometry.focal_px, "geometry": data.geometry.mode, "label_kind": data.label_kind,
        "reference": dataclasses.asdict(data.reference), "camera_hint": data.camera_hint, "unit": "m",
    }  # fmt: skip
    files.write_json(file, {**files.read_json(file, "export again"), NOTE: note})
