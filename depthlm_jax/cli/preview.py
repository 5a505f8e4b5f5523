"""preview: training samples exactly as the model sees them."""

import tempfile
from pathlib import Path

from absl import flags

from depthlm_jax import log
from depthlm_jax import run as runs
from depthlm_jax.cli import command
from depthlm_jax.data import pipeline
from depthlm_jax.data.records import open_source
from depthlm_jax.errors import InputError
from depthlm_jax.eval import report
from depthlm_jax.models import registry


def define_flags(values: flags.FlagValues) -> None:
    command.define_config(values)
    command.define_path(values, "output", "picture to write, for example sheet.png")
    flags.DEFINE_integer("samples", 16, "how many of the first samples of training", lower_bound=1, flag_values=values)


def run(values: flags.FlagValues) -> dict:
    config, output = command.read_config(values), command.read_path(values, "output")
    records = open_source(config.data.train)
    with tempfile.TemporaryDirectory() as folder:
        runs.write_base(config.model, Path(folder))
        processor = registry.family(config.model.family).processor(Path(folder))
    samples = pipeline.training_samples(records, processor, config)
    drawn = [samples[index] for index in range(values.samples)]
    kept = [item for item in drawn if not isinstance(item, pipeline.Dropped)]
    dropped = [item for item in drawn if isinstance(item, pipeline.Dropped)]
    for drop in dropped:
        log.say(f"no sample of {drop.record_id}: {drop.reason}")
    if not kept:
        raise InputError(
            f"{config.data.train.path}: nothing to show", found=f"{len(dropped)} records, none of which gave a sample",
            expected="at least one", fix="correct the records or data.geometry; the reasons stand above",
        )  # fmt: skip
    examples, samples = zip(*kept, strict=True)
    report.contact_sheet(examples, samples, processor.tokenizer.decode, output)
    log.say(f"{len(samples)} samples, {len(dropped)} dropped: {output}")
    return {"output": str(output), "samples": len(samples), "dropped": len(dropped)}
