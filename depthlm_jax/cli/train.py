"""train: fine-tune, continuing where the workdir stopped."""

import json
import time
from pathlib import Path

import jax
from absl import flags

from depthlm_jax import compiler, environment, files, lock, log, sharding, tree, watchdog
from depthlm_jax import config as config_module
from depthlm_jax import run as runs
from depthlm_jax.cli import command
from depthlm_jax.data import pipeline
from depthlm_jax.data.records import Records
from depthlm_jax.errors import InputError
from depthlm_jax.eval import report, sets
from depthlm_jax.train import goodput, loop, replay

SPARE_SECONDS = 60
GRACE_SECONDS = 5
HEARTBEAT_SECONDS = 100  # without which a process is taken for dead, and the others end


def define_flags(values: flags.FlagValues) -> None:
    command.define_config(values)
    command.define_path(values, "workdir", "folder of the run; an existing run is continued")
    command.define_path(values, "reproduce", "workdir of a run whose config is taken; says which versions differ")
    command.define_path(values, "replay", "a file of rows that stopped the run of --workdir: loss and gradient of each")
    flags.DEFINE_bool(
        "distributed", False, "several hosts: connect them first; they find one another on TPU slices, under SLURM, "
        "Kubernetes and Open MPI", flag_values=values,
    )  # fmt: skip
    command.define_text(values, "coordinator", "elsewhere: host:port of process 0, the same for all processes")
    flags.DEFINE_integer("processes", None, "elsewhere: how many there are", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process", None, "elsewhere: which one this is, from 0", lower_bound=0, flag_values=values)


def run(values: flags.FlagValues) -> dict:
    began = time.time()
    if values.replay:
        return show_rows(command.read_path(values, "workdir"), Path(values.replay))
    config, workdir = read_config(values), command.read_path(values, "workdir")
    connect(values, workdir, config.faults.start_seconds)
    watch = watchdog.Watchdog(workdir, jax.process_index(), jax.process_count(), config.faults.silent_seconds)
    try:
        result = train(config, workdir, watch, began)
        disconnect(workdir, config.faults.start_seconds)
        return result
    except Exception:
        if jax.process_count() > 1 and jax.process_index() == 0:  # without it, JAX aborts the others,
            time.sleep(GRACE_SECONDS)  # which may be about to tell of the same error
        raise
    finally:
        watch.close()


def read_config(values: flags.FlagValues) -> config_module.Config:
    """Returns the config of the recipe, or of the run that is to be reproduced in another workdir."""
    if not values.reproduce:
        return command.read_config(values)
    there = Path(values.reproduce)
    if values.config or there.resolve() == Path(values.workdir).resolve():
        raise command.UsageError("--reproduce takes the config of another run: give a new --workdir, and no --config")
    config = config_module.load(there / "config.json")
    if (there / "starts.jsonl").exists():
        first = json.loads((there / "starts.jsonl").read_text().splitlines()[0])
        for line in environment.differences(first):
            log.say(f"warning: not as in {there}: {line}")
    return config


def show_rows(workdir: Path, file: Path) -> dict:
    """Returns loss and gradient norm of each row that has stopped the run of a workdir."""
    number, rows = replay.replay(runs.reopen(workdir), file)
    columns = ["loss", "grad_norm", "num_tokens"]
    log.say(f"{file} with the parameters of step {number}")
    log.say(report.table([(f"row {row['row']}", {name: row[name] for name in columns}) for row in rows], columns))
    for row in rows:
        log.say(f"row {row['row']}: {', '.join(row['samples'])}")
    return {"step": number, "rows": [row | {name: str(row[name]) for name in columns} for row in rows]}


def train(config: config_module.Config, workdir: Path, watch: watchdog.Watchdog, began: float) -> dict:
    """Returns the last step of the run of a workdir; begins it, or goes on."""
    compiler.keep_programs(config.train.compilation_cache)
    sources = _open_in_turn(config)
    runs.check_same_data(sources)
    held: list = []  # by process 0, until it ends

    def hold() -> None:
        files.make_writable(workdir)
        held.append(lock.hold(workdir))

    runs.process_0_first(hold, f"{workdir} could not be had")
    this = runs.open_run(config, workdir)
    rows = sharding.host_rows(this.mesh, config.data.global_batch_rows)
    batches = pipeline.training_batches(sources, this.processor, config, rows)
    trainer, evaluated = loop.make_trainer(this.network, config, this.mesh), sets.Sets(this)
    count = tree.count(this.network.abstract)
    trained = f", {trainer.trained:,} of them trained" if trainer.trained < count else ""
    log.say(
        f"{count:,} parameters{trained} · mesh {dict(this.mesh.shape)} on {len(jax.devices())} "
        f"{jax.devices()[0].platform}"
    )
    for name, records in sources.items():
        log.say(f"source {name}: {len(records):,} records, {config.data.sources[name].path}")
    state = loop.run(trainer, config, workdir, batches, lambda: runs.first_parameters(this), watch, began, evaluated)
    if jax.process_index() == 0:
        report.loss_curve(log.Journal(workdir).read(), workdir / "loss.png")
        log.say(f"loss curve: {workdir / 'loss.png'}")
        log.say(goodput.text(goodput.summary(workdir / "goodput.jsonl")))
    return {"step": int(state.step), "workdir": str(workdir)}


def connect(values: flags.FlagValues, workdir: Path, seconds: int) -> None:
    """Connects the processes of a run, if there are several; ends after so many seconds, naming who did not come.

    Raises:
      UsageError: only some of the flags that belong together.
      InputError: the processes do not find one another.
    """
    given = [values[name].value for name in ("coordinator", "processes", "process")]
    said = [value not in ("", None) for value in given]
    if any(said) and not all(said):
        raise command.UsageError("--coordinator, --processes and --process are needed together")
    if not (values.distributed or all(said)):
        return
    if all(said) and values.process >= values.processes:
        raise command.UsageError(f"--process={values.process} is not one of {values.processes}, counted from 0")
    watch = watchdog.Watchdog(workdir, values.process, values.processes, seconds)
    watch.waits_for("the other processes to connect")
    try:
        # JAX ends the process without a name of who is missing: the watch comes first
        jax.distributed.initialize(
            *(given if all(said) else ()), initialization_timeout=seconds + SPARE_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=seconds + SPARE_SECONDS,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise InputError(
            "the processes could not be connected", found=str(error).splitlines()[0],
            expected="a TPU slice, SLURM, Kubernetes or Open MPI, which say who is there",
            fix="elsewhere give --coordinator=HOST:PORT --processes=N --process=I",
        ) from error  # fmt: skip
    finally:
        watch.close()


def disconnect(workdir: Path, seconds: int) -> None:
    """Waits for the other processes to end; after so many seconds this one ends, naming who does not."""
    if jax.process_count() == 1:
        return
    watch = watchdog.Watchdog(workdir, jax.process_index(), jax.process_count(), seconds)
    watch.waits_for("the other processes to end")
    jax.distributed.shutdown()
    watch.close()


def _open_in_turn(config: config_module.Config) -> dict[str, Records]:
    """Returns the sources; process 0 opens them first, and writes the indexes that the others find."""
    opened: dict[str, Records] = {}

    def open_first() -> None:
        opened.update(pipeline.open_sources(config, log.Progress("index")))

    runs.process_0_first(open_first, "the sources could not be opened")
    return opened or pipeline.open_sources(config)
