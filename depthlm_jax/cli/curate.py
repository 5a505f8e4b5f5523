"""curate: a data set → records on disk."""

import os
import re
from pathlib import Path

from absl import flags
from etils import epath

from depthlm_jax import files, log
from depthlm_jax.cli import command
from depthlm_jax.config import Source
from depthlm_jax.data import depth_record, records, synthetic, writer
from depthlm_jax.data import index as data_index
from depthlm_jax.errors import InputError

VERSION = "1.0.0"
RECORDS_A_SHARD = 10_000
OPTIONS = ("image_root", "depth_kind", "fov_degrees", "focal_px", "shards")  # that change what a .jsonl becomes


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("dataset", "synthetic", sorted(DATASETS), "which data set", flag_values=values)
    command.define_path(values, "output", "folder for the records; a complete data set of the same is kept")
    flags.DEFINE_integer("train", 3000, "synthetic: training scenes", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("validation", 300, "synthetic: validation scenes", lower_bound=1, flag_values=values)
    flags.DEFINE_enum(
        "world", "wide", sorted(synthetic.WORLDS), "synthetic: cameras and distances of the scenes", flag_values=values
    )
    command.define_path(values, "input", "jsonl: the .jsonl file; local, or gs://… and the like")
    command.define_path(values, "image_root", "jsonl: folder that image paths start from, if not the file's own")
    flags.DEFINE_enum(
        "depth_kind", "z", depth_record.DEPTH_KINDS, "jsonl: of records that do not say", flag_values=values
    )
    flags.DEFINE_float(
        "fov_degrees", 0, "jsonl: horizontal field of view assumed for records without intrinsics; 0: they are bad",
        lower_bound=0, upper_bound=179, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float(
        "focal_px", 0, "jsonl: images of a longer focal length are stored resized to this one; 0: kept as they are",
        lower_bound=0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "shards", 0, f"jsonl: files to write; 0: one for {RECORDS_A_SHARD} records", lower_bound=0, flag_values=values
    )
    flags.DEFINE_integer("workers", 2, "processes", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "max_bad_records", 0, "jsonl: bad records are left out and logged up to this number", lower_bound=0,
        flag_values=values,
    )  # fmt: skip


def run(values: flags.FlagValues) -> dict:
    result = DATASETS[values.dataset](values)
    log.say(f"records: {result['path']}")
    return result


def _synthetic(values: flags.FlagValues) -> dict:
    output = command.read_path(values, "output")
    progress = log.Progress("scenes")
    folder = synthetic.build(output, values.train, values.validation, progress, values.workers, values.world)
    return {"path": str(folder)}


def _jsonl(values: flags.FlagValues) -> dict:
    output, _ = command.read_path(values, "output"), command.read_path(values, "input")
    source = Source(
        path=values.input, image_root=values.image_root, depth_kind=values.depth_kind, fov_degrees=values.fov_degrees
    )
    opened = records.open_source(source, log.Progress("index"), field="--input")
    name = re.sub(r"\W+", "_", values.input.rsplit("/", 1)[-1].removesuffix(".jsonl"), flags=re.ASCII).lower()
    folder, made_of = output / name / VERSION, _made_of(values)
    if (folder / "dataset_info.json").is_file():
        left_out = _check_same(folder, made_of)
        log.say(f"kept: {folder}, made of the same input with the same options")
    else:
        left_out = _convert(opened, folder, name, values)
        files.write_json(folder / writer.MADE_OF, made_of | {"left_out": left_out})
    log.say(f"{left_out} of {len(opened)} records left out")
    return {"path": str(folder), "left_out": left_out}


def _made_of(values: flags.FlagValues) -> dict:
    """Returns what decides the content of a data set made of a .jsonl; image files are not looked at."""
    path = epath.Path(values.input)
    place = os.path.abspath(path) if data_index.is_local(path) else values.input
    options = {name: values[name].value for name in OPTIONS}
    return {"input": place, **options, "input_content": data_index.stamp_of(path)}


def _check_same(folder: Path, made_of: dict) -> int:
    """Returns how many records were left out of a complete data set; raises InputError if it is of something else."""
    file, fix = folder / writer.MADE_OF, "give another --output"
    if not file.is_file():
        raise InputError(
            f"{folder}: there is a data set already", found=f"no {file.name}, so nobody knows what it was made of",
            expected="nothing there, or a data set of this command", fix=fix,
        )  # fmt: skip
    stored = files.read_json(file, fix)
    changed = [name for name in made_of if stored.get(name) != made_of[name]]
    if changed:
        raise InputError(
            f"{folder}: was made with {', '.join(f'{name}={stored.get(name)!r}' for name in changed)}",
            found="a complete data set", expected=", ".join(f"{name}={made_of[name]!r}" for name in changed), fix=fix,
        )  # fmt: skip
    return stored.get("left_out", 0)


def _convert(opened: records.Records, folder: Path, name: str, values: flags.FlagValues) -> int:
    """Returns how many records had to be left out."""
    shards = values.shards or max(values.workers, -(-len(opened) // RECORDS_A_SHARD))
    bad = []

    def leave_out(reason: str) -> None:
        bad.append(reason)
        log.say(f"left out: {reason}")

    splits = {"train": (len(opened), writer.RecordExamples(opened, values.focal_px))}
    writer.write(
        folder, name, splits, shards, values.workers, log.Progress("records"), values.max_bad_records, leave_out
    )
    return len(bad)


DATASETS = {"synthetic": _synthetic, "jsonl": _jsonl}
