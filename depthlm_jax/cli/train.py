"""train: fine-tune, continuing where the workdir stopped."""

import jax
from absl import flags

from depthlm_jax import config as config_module
from depthlm_jax import log, tree
from depthlm_jax import run as runs
from depthlm_jax.cli import command
from depthlm_jax.data import pipeline
from depthlm_jax.data.records import Records
from depthlm_jax.eval import report
from depthlm_jax.train import loop


def define_flags(values: flags.FlagValues) -> None:
    command.define_config(values)
    command.define_path(values, "workdir", "folder of the run; an existing run is continued")
    flags.DEFINE_bool("distributed", False, "several hosts: connect them first (TPU slice, SLURM)", flag_values=values)


def run(values: flags.FlagValues) -> dict:
    config, workdir = command.read_config(values), command.read_path(values, "workdir")
    if values.distributed:
        jax.distributed.initialize()
    sources = _open_in_turn(config)
    runs.check_same_data(sources)
    this = runs.open_run(config, workdir)
    batches = pipeline.training_batches(sources, this.processor, config, jax.process_index(), jax.process_count())
    trainer = loop.make_trainer(this.network, config, this.mesh)
    count = tree.count(this.network.abstract)
    trained = f", {trainer.trained:,} of them trained" if trainer.trained < count else ""
    log.say(
        f"{count:,} parameters{trained} · mesh {dict(this.mesh.shape)} on {len(jax.devices())} "
        f"{jax.devices()[0].platform}"
    )
    for name, records in sources.items():
        log.say(f"source {name}: {len(records):,} records, {config.data.sources[name].path}")
    state = loop.run(trainer, config, workdir, batches, lambda: runs.first_parameters(this))
    if jax.process_index() == 0:
        report.loss_curve(log.Journal(workdir).read(), workdir / "loss.png")
        log.say(f"loss curve: {workdir / 'loss.png'}")
    return {"step": int(state.step), "workdir": str(workdir)}


def _open_in_turn(config: config_module.Config) -> dict[str, Records]:
    """Returns the sources; process 0 opens them first, and writes the indexes that the others find."""
    opened: dict[str, Records] = {}

    def open_first() -> None:
        opened.update(pipeline.open_sources(config, log.Progress("index")))

    runs.process_0_first(open_first, "the sources could not be opened")
    return opened or pipeline.open_sources(config)
