"""The training loop: state on the mesh, batches in, metrics and checkpoints out."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from depthlm_jax import checkpoint, chips, compiler, log, parameter_groups, same_run, sharding, tree
from depthlm_jax import config as config_module
from depthlm_jax.errors import InputError
from depthlm_jax.models import flops
from depthlm_jax.models.registry import Network
from depthlm_jax.train import optim, step


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A jitted step, and how its state is laid out on the mesh."""

    mesh: jax.sharding.Mesh
    optimizer: optax.GradientTransformation
    operations: Mapping[str, float]  # of floating-point numbers, for each of data.work's COUNTS
    factors: Mapping[str, float]  # of the learning rate, by path; 0: frozen
    shardings: step.State
    abstract: step.State
    run_step: Callable  # (state, batch) → (state, metrics); the state is donated

    @property
    def trained(self) -> int:
        """How many parameters are trained."""
        return tree.count(parameter_groups.split(self.abstract.parameters, self.factors)[0])


def make_trainer(network: Network, config: config_module.Config, mesh: jax.sharding.Mesh) -> Trainer:
    """Returns the trainer of a network; nothing is allocated."""
    factors = parameter_groups.factors(network.shapes, config.optim.groups, network.lora_paths)
    optimizer = optim.make_optimizer(config.optim, config.train.max_steps, factors, network.axes)
    shardings, abstract = state_layout(network, optimizer, factors, mesh)
    compute, total = (jnp.dtype(name) for name in (config.model.compute_dtype, config.train.accumulation_dtype))
    compiled = jax.jit(
        step.make_train_step(network.logits, optimizer, factors, compute, micro_batches(config, mesh), total),
        in_shardings=(shardings, sharding.batch_shardings(mesh)),
        out_shardings=(shardings, sharding.shard(mesh, "")),
        donate_argnums=0,
        compiler_options=compiler.options(mesh.devices.flat[0].platform),
    )
    return Trainer(mesh, optimizer, network.operations(factors), factors, shardings, abstract, compiled)


def micro_batches(config: config_module.Config, mesh: jax.sharding.Mesh) -> int:
    """Returns the number of parts that the rows of a step are computed in, one after another."""
    return config.train.gradient_accumulation_steps or config.data.global_batch_rows // sharding.row_devices(mesh)


def state_layout(
    network: Network, optimizer, factors: Mapping[str, float], mesh: jax.sharding.Mesh
) -> tuple[step.State, step.State]:
    """Returns shardings and ShapeDtypeStructs of the state.

    Moments lie where their parameters lie; those of another shape (sums over rows or columns) are small and on every
    device.
    """
    replicated = sharding.shard(mesh, "")
    places = sharding.parameter_places(mesh, network.axes, network.shapes)
    moments = jax.eval_shape(optimizer.init, parameter_groups.split(network.abstract, factors)[0])
    flat, shapes = tree.flatten(places), network.shapes

    def place_of(keys: tuple, moment: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        """The path of a moment ends with that of its parameter."""
        names = [str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey)]
        ends = ("/".join(names[start:]) for start in range(len(names)))
        path = next((end for end in ends if end in flat), None)
        return flat[path] if path and moment.shape == shapes[path] else replicated

    moment_places = jax.tree_util.tree_map_with_path(place_of, moments)
    shardings = step.State(replicated, places, moment_places)
    counter = jax.ShapeDtypeStruct((), jnp.int32)
    return shardings, checkpoint.abstract(step.State(counter, network.abstract, moments), shardings)


def start(trainer: Trainer, parameters: dict) -> step.State:
    """Returns the state of step 0; `parameters` lie on the mesh and are taken over."""
    trained, _ = parameter_groups.split(parameters, trainer.factors)
    moments = jax.jit(trainer.optimizer.init, out_shardings=trainer.shardings.optimizer)(trained)
    return step.State(jax.device_put(jnp.int32(0), trainer.shardings.step), parameters, moments)


def run(
    trainer: Trainer, config: config_module.Config, workdir: Path, batches: Iterator, first_parameters: Callable
) -> step.State:
    """Returns the last state; trains from the latest checkpoint of `workdir`, or from `first_parameters()`.

    Args:
      trainer: of `make_trainer`.
      config: of the run.
      workdir: holds metrics.jsonl and checkpoints/.
      batches: of data.pipeline.training_batches; its position is saved and restored.
      first_parameters: → parameters on the mesh; called where there is no checkpoint.
    """
    checkpoints = checkpoint.Checkpoints(workdir)
    state = _resume(trainer, config, checkpoints, batches, first_parameters)
    meter = Meter(config, log.Journal(workdir), int(state.step), trainer)
    try:
        first, last = int(state.step) + 1, config.train.max_steps
        upcoming = meter.load(batches) if first <= last else None
        for number in range(first, last + 1):
            about, batch = upcoming
            meter.count_dropped(about.dropped)
            state, metrics = trainer.run_step(state, batch)
            meter.add(number, metrics, about)
            upcoming = meter.load(batches) if number < last else None  # while the device computes
            if number % config.train.save_steps == 0 or number == last:
                meter.flush()  # a step that went wrong is not saved
                position = dataclasses.asdict(about.position)
                checkpoints.save(number, state.parameters, state.optimizer, position, config)
    finally:
        try:
            meter.flush()
        finally:
            batches.close()
            checkpoints.close()
    return state


def _resume(
    trainer: Trainer, config: config_module.Config, checkpoints: checkpoint.Checkpoints, batches, first_parameters
) -> step.State:
    latest = checkpoints.latest_step
    if latest is None:
        return start(trainer, first_parameters())
    abstract = trainer.abstract
    parameters, moments, run = checkpoints.restore(latest, abstract.parameters, abstract.optimizer)
    same_run.check_same_run(config_module.from_dict(run["config"]), config, str(checkpoints.folder / str(latest)))
    batches.set_state(run["data"])
    log.say(f"continuing {checkpoints.folder.parent} after step {latest}")
    return step.State(jax.device_put(jnp.int32(latest), trainer.shardings.step), parameters, moments)


class Meter:
    """Metrics of a step are fetched after the next step was dispatched, so that the device never waits."""

    def __init__(self, config: config_module.Config, journal: log.Journal, first_step: int, trainer: Trainer):
        self.config, self.journal, self.first_step, self.trainer = config, journal, first_step, trainer
        # Counts are of this host's rows; other hosts' are taken to be like them.
        self.rows = len(sharding.host_rows(trainer.mesh, config.data.global_batch_rows))
        self.hosts = config.data.global_batch_rows / self.rows
        device = trainer.mesh.devices.flat[0]
        self.chip = chips.chip_of(device.device_kind)
        self.schedule = optim.make_schedule(config.optim, config.train.max_steps)
        self.pending: tuple[int, dict, object] | None = None
        self.samples, self.steps, self.used, self.work, self.waited = 0, 0, (0, 0), collections.Counter(), 0.0
        self.dropped = collections.Counter()  # samples that were not made though their record is sound, by the reason
        self.sources = collections.Counter()  # samples of each source since the last line
        self.bad: dict[str, str] = {}  # what is wrong, by record: the same one is met again in the next epoch
        self.start = self.since = time.monotonic()

    def load(self, batches: Iterator) -> tuple:
        """Returns what the next rows were made of, and the rows on their way to the mesh; notes the time it took."""
        start = time.monotonic()
        rows = next(batches)
        placed = sharding.put_batch(self.trainer.mesh, rows.arrays, self.config.data.global_batch_rows)
        self.waited += time.monotonic() - start
        return rows.about, placed

    def add(self, number: int, metrics: dict, about) -> None:
        """Takes the metrics of a step, still on the device, and what this host's rows of it were made of."""
        self.flush()
        self.pending = number, metrics, about

    def flush(self) -> None:
        """Waits for the pending step and writes its line if it is due."""
        if self.pending is None:
            return
        (number, metrics, about), self.pending = self.pending, None
        self.samples += len(about.record_ids)
        self.work.update(about.work)
        self.steps += 1
        self.sources.update(about.sources)
        self.used = tuple(sum(pair) for pair in zip(self.used, about.used, strict=False))
        if not metrics["num_tokens"]:
            raise InputError(
                f"step {number}: no sample at all", found=dict(self.dropped.most_common(3)),
                expected="records that the tasks of the config can be asked about",
                fix="give other sources, data.tasks or crops; preview shows what is dropped and why",
            )  # fmt: skip
        if not math.isfinite(metrics["loss"]):
            raise InputError(
                f"step {number}: the loss is not a number", found=f"loss {metrics['loss']}, gradient norm "
                f"{metrics['grad_norm']}", expected="finite numbers",
                fix="export the last checkpoint, which is sound, and train on from it (model.hf_dir) in a new "
                "--workdir with a lower optim.learning_rate",
            )  # fmt: skip
        every, last = self.config.train.logging_steps, self.config.train.max_steps
        if number % every == 0 or number in (self.first_step + 1, last):
            self._report(number, {name: float(value) for name, value in metrics.items()})

    def _report(self, number: int, values: dict[str, float]) -> None:
        now, last = time.monotonic(), self.config.train.max_steps
        values["learning_rate"] = float(self.schedule(number - 1))
        values |= self._speeds(now - self.since)
        values["samples_dropped"] = self.dropped.total()
        values |= self._data_values()
        self.samples, self.work, self.waited, self.since = 0, collections.Counter(), 0.0, now
        if jax.process_index() == 0:
            self.journal.write(number, values)
            left = (now - self.start) / (number - self.first_step) * (last - number)
            log.say(
                f"step {number}/{last} · loss {values['loss']:.4f} · token accuracy "
                f"{values['mean_token_accuracy']:.3f} · {values['samples_per_second']:.1f} samples/s · "
                + (f"{values['mfu']:.1%} MFU · " if "mfu" in values else "")
                + f"{log.clock(left)} left"
            )

    def _speeds(self, seconds: float) -> dict[str, float]:
        """Returns rates since the last line: of all devices together, operations of one."""
        useful = self.hosts * flops.of_work(self.work, self.trainer.operations) / seconds / self.trainer.mesh.size
        values = {
            "samples_per_second": self.hosts * self.samples / seconds,
            "tokens_per_second": self.hosts * self.work["tokens"] / seconds,
            "tflops_per_second_per_device": useful / chips.TERA,
            "data_wait": self.waited / seconds,
        }
        return values | ({"mfu": useful / self.chip.flops_s} if self.chip else {})

    def _data_values(self) -> dict[str, float]:
        """Returns how full the rows were, and each source's share of the samples, since the last line."""
        data = self.config.data
        slots = self.steps * self.rows
        limits = data.max_tokens, data.max_patches
        filled = (used / slots / limit for used, limit in zip(self.used, limits, strict=True))
        values = dict(zip(("filled_tokens", "filled_patches"), filled, strict=True))
        total = max(1, self.sources.total())
        on = sorted(name for name, source in data.sources.items() if source.weight > 0)
        values |= {f"share/{name}": self.sources[name] / total for name in on}
        self.steps, self.used, self.sources = 0, (0, 0), collections.Counter()
        return values

    def count_dropped(self, dropped) -> None:
        """Logs the records that gave no sample; raises InputError beyond data.max_bad_records unreadable ones."""
        limit = self.config.data.max_bad_records
        self.dropped.update(drop.reason for drop in dropped if not drop.bad)
        for drop in dropped:
            if not drop.bad or drop.record_id in self.bad:
                continue
            self.bad[drop.record_id] = drop.reason.splitlines()[0].rpartition(": ")[2]
            log.say(f"skipped bad record number {len(self.bad)}: {drop.reason}")
            if len(self.bad) > limit:
                kinds = collections.Counter(self.bad.values()).most_common()
                raise InputError(
                    f"{len(self.bad)} bad records, the last one is {drop.reason.splitlines()[0]}",
                    found=", ".join(f"{count} × {kind}" for kind, count in kinds),
                    expected=f"at most data.max_bad_records={limit}",
                    fix="correct the records, or allow that many with --config.data.max_bad_records",
                )  # fmt: skip
