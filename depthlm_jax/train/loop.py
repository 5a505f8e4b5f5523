"""The training loop: state on the mesh, batches in, metrics and checkpoints out."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from depthlm_jax import checkpoint, compiler, environment, files, log, parameter_groups, same_run, sharding, tree
from depthlm_jax import config as config_module
from depthlm_jax.errors import InputError
from depthlm_jax.models.registry import Network
from depthlm_jax.train import optim, saves, step, stopping
from depthlm_jax.train.goodput import Ledger
from depthlm_jax.train.meter import Meter
from depthlm_jax.train.skips import Skips
from depthlm_jax.watchdog import Watchdog


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
        out_shardings=(shardings, {name: sharding.shard(mesh, letters) for name, letters in step.METRICS.items()}),
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
    trainer: Trainer, config: config_module.Config, workdir: Path, batches: Iterator, first_parameters: Callable,
    watch: Watchdog | None = None, began: float | None = None, sets=None,
) -> step.State:  # fmt: skip
    """Returns the last state; trains from the latest checkpoint of `workdir`, or from `first_parameters()`.

    SIGTERM ends it early, after a save.

    Args:
      trainer: of `make_trainer`.
      config: of the run.
      workdir: holds metrics.jsonl, goodput.jsonl and checkpoints/.
      batches: of data.pipeline.training_batches; its position is saved and restored.
      first_parameters: → parameters on the mesh; called where there is no checkpoint.
      watch: is told what the run waits for.
      began: time.time() of this start; None: now.
      sets: eval.sets.Sets, evaluated on the way; None: none.
    """
    began = time.time() if began is None else began
    watch = watch or Watchdog(workdir, None, None, 0)
    about = {"environment": environment.describe(trainer.mesh)}
    scores = sets.scores if sets and config.train.keep_best else None
    checkpoints, stop = saves.Saves(workdir, config, about, scores), stopping.Stop()
    try:
        state, skipped = _resume(trainer, config, checkpoints, batches, first_parameters, watch)
        ledger = Ledger(workdir / "goodput.jsonl" if jax.process_index() == 0 else None, int(state.step), began)
        meter = Meter(config, workdir, int(state.step), trainer, Skips(workdir, config, skipped), ledger, watch)
        ledger.seconds["start"] = time.time() - began
        if jax.process_index() == 0 and int(state.step) < config.train.max_steps:
            files.Lines(workdir / "starts.jsonl").add(about["environment"])
        with contextlib.closing(meter.tracker):
            missing = sets.missing(int(state.step)) if sets else []
            if not missing or _evaluate(sets, missing, meter, int(state.step), state, stop):
                state = _train(trainer, config, checkpoints, batches, stop, meter, state, sets)
    finally:
        watch.waits_for("the end of the data workers")
        batches.close()
        watch.waits_for("the last save")
        stop.close()
        checkpoints.close()
    return state


def _train(
    trainer, config, checkpoints, batches, stop, meter: Meter, state: step.State, sets
) -> step.State:
    first, last, owed = int(state.step) + 1, config.train.max_steps, False
    if first > last:
        return state
    upcoming = meter.load(batches)
    try:
        for number in range(first, last + 1):
            rows, batch = upcoming
            with meter.ledger.spend("compile") if number == first else contextlib.nullcontext():
                state, metrics = trainer.run_step(state, batch)
            meter.add(number, metrics, rows)
            ends = stop.now() or number == last
            save = functools.partial(_save, checkpoints, meter, number, state, rows.about.position)
            upcoming = None if ends else _load(meter, batches, save)  # while the device computes
            due = sets.due(number) if sets and not stop.received else []
            owed = owed or ends or number % config.train.save_steps == 0 or checkpoints.has_failed()
            owed = owed or bool(due and sets.judge(due))
            if owed:
                meter.flush()
            if owed and (ends or not meter.skips.in_a_row):  # else the last save is as good, and older
                save(surely=ends)
                owed = False
            if due and not _evaluate(sets, due, meter, number, state, stop) and not ends:
                save(surely=True)
                ends = True
            if ends:
                break
        meter.ledger.write(number)
        if number < last:
            log.say(f"stopped by SIGTERM after step {number}/{last}, which is saved: start it again and it goes on")
    finally:
        meter.flush()
    return state


def _evaluate(sets, due: list[str], meter: Meter, number: int, state: step.State, stop: stopping.Stop) -> bool:
    """Returns whether the sets were evaluated; False: the run has to stop, and its next start evaluates them."""

    def tell(what: str) -> None:
        meter.watch.waits_for(what)
        if stop.now():
            raise stopping.Stopped

    meter.flush()
    with meter.leave_out("evaluation"), contextlib.suppress(stopping.Stopped):
        sets.evaluate(number, due, state.parameters, tell, meter.tracker)
    meter.ledger.write(number)
    if stop.received:
        log.say(f"stopped by SIGTERM: the next start evaluates step {number}")
    return not stop.received


def _save(checkpoints: saves.Saves, meter: Meter, number: int, state: step.State, position, surely: bool) -> None:
    meter.watch.waits_for(f"the save of step {number}")
    with meter.ledger.spend("save"):
        checkpoints.save(number, state, position, meter.skips.total, surely=surely)


def _load(meter: Meter, batches, save: Callable) -> tuple:
    """Returns the next rows; where the data fails, the work done so far is saved before that is raised."""
    try:
        return meter.load(batches)
    except InputError:
        if jax.process_count() == 1:  # others could not know that a save is due
            meter.flush()
            if not meter.skips.in_a_row:
                save(surely=True)
        raise


def _resume(
    trainer: Trainer, config: config_module.Config, checkpoints: saves.Saves, batches, first_parameters,
    watch: Watchdog,
) -> tuple[step.State, int]:  # fmt: skip
    """Returns the state, and how many of its steps changed nothing."""
    latest = checkpoints.latest_step
    if latest is None:
        watch.waits_for("the first parameters")
        return start(trainer, first_parameters()), 0
    watch.waits_for(f"the checkpoint of step {latest}")
    abstract = trainer.abstract
    parameters, moments, run = checkpoints.restore(latest, abstract.parameters, abstract.optimizer)
    same_run.check_same_run(config_module.from_dict(run["config"]), config, str(checkpoints.folder / str(latest)))
    batches.set_state(run["data"])
    log.say(f"continuing {checkpoints.folder.parent} after step {latest}")
    number = jax.device_put(jnp.int32(latest), trainer.shardings.step)
    return step.State(number, parameters, moments), run.get("skipped", 0)
