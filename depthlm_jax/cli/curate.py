"""curate: a data set → records on disk."""

import re

from absl import flags

from depthlm_jax import log
from depthlm_jax.cli import command
from depthlm_jax.config import Source
from depthlm_jax.data import depth_record, records, synthetic, writer

VERSION = "1.0.0"
RECORDS_A_SHARD = 10_000


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("dataset", "synthetic", sorted(DATASETS), "which data set", flag_values=values)
    command.define_path(values, "output", "folder for the records; a complete data set there is kept")
    flags.DEFINE_integer("train", 3000, "synthetic: training scenes", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("validation", 300, "synthetic: validation scenes", lower_bound=1, flag_values=values)
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
    folder = synthetic.build(output, values.train, values.validation, log.Progress("scenes"), values.workers)
    return {"path": str(folder)}


def _jsonl(values: flags.FlagValues) -> dict:
    output, _ = command.read_path(values, "output"), command.read_path(values, "input")
    source = Source(
        path=values.input, image_root=values.image_root, depth_kind=values.depth_kind, fov_degrees=values.fov_degrees
    )
    opened = records.open_source(source, log.Progress("index"))
    name = re.sub(r"\W+", "_", values.input.rsplit("/", 1)[-1].removesuffix(".jsonl"), flags=re.ASCII).lower()
    shards = values.shards or max(values.workers, -(-len(opened) // RECORDS_A_SHARD))
    bad = []

    def leave_out(reason: str) -> None:
        bad.append(reason)
        log.say(f"left out: {reason}")

    splits = {"train": (len(opened), writer.RecordExamples(opened, values.focal_px))}
    folder = writer.write(
        output / name / VERSION, name, splits, shards, values.workers, log.Progress("records"),
        values.max_bad_records, leave_out,
    )  # fmt: skip
    log.say(f"{len(bad)} of {len(opened)} records left out")
    return {"path": str(folder), "left_out": len(bad)}


DATASETS = {"synthetic": _synthetic, "jsonl": _jsonl}
