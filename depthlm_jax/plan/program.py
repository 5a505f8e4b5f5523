"""The training step of a recipe, compiled for a TPU slice that need not be there: what it holds, sends and computes."""

import dataclasses
import math
import re
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from depthlm_jax import batch as batch_contract
from depthlm_jax import config as config_module
from depthlm_jax import parameter_groups, sharding, tree
from depthlm_jax import run as runs
from depthlm_jax.data import packing, pipeline, tasks, transforms, work
from depthlm_jax.models import flops, registry
from depthlm_jax.models.execution import Execution
from depthlm_jax.plan import hlo
from depthlm_jax.plan.topology import Topology
from depthlm_jax.train import loop, step

TYPICAL_ROWS = 4  # that are filled with images of the recipe's crops, to know how much work a row holds
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
SIZE = re.compile(r"\b([\d.]+)([KMGT])\b")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Parts of the forward pass that the backward pass computes once more, as a share of all three.
RECOMPUTED = {"full": 1 / 3, "attended": 1 / 3, "dots": 0.0, "none": 0.0}


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step. Bytes, operations and seconds are of one device and one step."""

    fits: bool
    hbm_bytes: float  # at the fullest moment
    hbm_classes: dict[str, float]  # what it is made of; `temporaries` is the rest
    hbm_limit_bytes: float
    collectives: dict[str, dict[str, float]]  # kind → {"count", "bytes"}
    sent_bytes: float
    useful_flops: float
    seconds: dict[str, float]  # roofline: what each resource needs if it is never idle
    micro_batches: int
    rows: int  # that a device holds at a time
    samples: float  # of the whole step
    compile_seconds: float
    mesh: dict[str, int]
    text: str  # of the program; empty: it does not fit


def compile_step(config: config_module.Config, topology: Topology) -> Program:
    """Returns the program of a recipe on a slice.

    Raises:
      InputError: the mesh does not suit the slice or the model.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = _folder(config, Path(scratch) / "base")
        processor, dtype = registry.family(config.model.family).processor(folder), runs.stored_dtype(folder)
    sizes, rows = _sizes(config, processor), config.data.global_batch_rows
    mesh = sharding.make_mesh(
        config.mesh, topology.devices, rows=runs.rows_at_a_time(config), heads=sizes.heads, rows_field=runs.ROWS_FIELD
    )
    network = registry.build(config.model.family, sizes, runs.execution(config, mesh), config.model.lora)
    network = dataclasses.replace(network, abstract=runs.with_frozen(network, config, dtype))
    trainer = loop.make_trainer(network, config, mesh)
    shape = pipeline.row_shape(config.data, sizes)
    micro = loop.micro_batches(config, mesh)
    own_rows = rows // micro // sharding.row_devices(mesh)
    start = time.monotonic()
    try:
        compiled = trainer.run_step.lower(trainer.abstract, _abstract_batch(mesh, shape, rows)).compile()
        error = ""
    except jax.errors.JaxRuntimeError as caught:
        if OUT_OF_MEMORY not in str(caught):
            raise
        compiled, error = None, str(caught)
    seconds = time.monotonic() - start
    held = _held(trainer, config, sizes, shape, own_rows)
    limit = topology.chip.hbm_bytes
    if compiled is None:
        used, limit = _from_error(error, held["parameters"] + held["optimizer"], limit)
        text = ""
    else:
        memory = compiled.memory_analysis()
        used = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
        held["batch"] = max(0.0, memory.argument_size_in_bytes - held["parameters"] - held["optimizer"])
        text = compiled.as_text()
    held["temporaries"] = max(0.0, used - sum(held.values()))
    sent = hlo.collectives(text)
    typical, samples = typical_work(config, processor, shape)
    whole = tree.count(network.abstract) * jnp.dtype(config.model.compute_dtype).itemsize / mesh.shape["tensor"]
    each = flops.of_work(typical, network.operations(trainer.factors))
    useful = each * rows / mesh.size
    return Program(
        fits=compiled is not None,
        hbm_bytes=float(used),
        hbm_classes=held,
        hbm_limit_bytes=limit,
        collectives=hlo.by_kind(sent),
        sent_bytes=sum(one.sent_bytes for one in sent),
        useful_flops=useful,
        seconds=_roofline(topology, config, held, whole, useful, sum(one.sent_bytes for one in sent), micro),
        micro_batches=micro,
        rows=own_rows,
        samples=samples * rows,
        compile_seconds=seconds,
        mesh=dict(mesh.shape),
        text=text,
    )


def _folder(config: config_module.Config, scratch: Path) -> Path:
    """Returns a folder with the files of a processor: the recipe's own, or one with a small vocabulary."""
    if config.model.hf_dir:
        return Path(config.model.hf_dir)
    runs.write_base(dataclasses.replace(config, model=dataclasses.replace(config.model, random_weights=True)), scratch)
    return scratch


def _sizes(config: config_module.Config, processor):
    """Returns the model's sizes; the vocabulary is the recipe's, where it names one."""
    values = config.model.hf_config
    if config.model.hf_dir or not ("vocab_size" in values or "vocab_size" in values.get("text_config", {})):
        return processor.config
    family = registry.family(config.model.family)
    return family.read_config(values, family.preprocessor)


def _abstract_batch(mesh: jax.sharding.Mesh, shape: batch_contract.RowShape, rows: int) -> dict:
    places = sharding.batch_shardings(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape.of(name, rows), dtype, sharding=places[name])
        for name, dtype in batch_contract.FIELDS.items()
    }


def _held(trainer: loop.Trainer, config, sizes, shape: batch_contract.RowShape, rows: int) -> dict[str, float]:
    """Returns bytes of one device by class, from shapes alone; `rows` are those of a micro-batch."""
    trained, _ = parameter_groups.split(trainer.abstract.parameters, trainer.factors)
    bytes_of = {
        "parameters": _own_bytes(trainer.abstract.parameters),
        "optimizer": _own_bytes(trainer.abstract.optimizer),
        "gradients": _own_bytes(trained),
    }
    return bytes_of | {"activations": _kept_bytes(config, sizes, shape, rows)}


def _own_bytes(abstract) -> float:
    """Returns the bytes of one device's parts."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(abstract)))


def _kept_bytes(config: config_module.Config, sizes, shape: batch_contract.RowShape, rows: int) -> float:
    """Returns the bytes that the forward pass of a micro-batch keeps for the backward pass, parameters left out."""
    how = Execution(remat=config.model.remat)
    network = registry.build(config.model.family, sizes, how, config.model.lora)
    dtype = jnp.dtype(config.model.compute_dtype)
    parameters = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), network.abstract)
    batch = {name: jax.ShapeDtypeStruct(shape.of(name, rows), kind) for name, kind in batch_contract.FIELDS.items()}

    def kept(parameters, batch):
        def loss(parameters):
            sums = step.answer_loss(network.logits(parameters, batch), batch["targets_BA"], batch["weights_BA"])
            return sums["loss"]

        return jax.vjp(loss, parameters)[1]

    inputs = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((parameters, batch)))
    residuals = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(kept, parameters, batch)))
    return float(max(0, residuals - inputs))


def _from_error(text: str, state: float, limit: float) -> tuple[float, float]:
    """Returns bytes needed and bytes there: the first two sizes in the refusal; needed by all, or by temporaries."""
    sizes = [float(number) * UNITS[unit] for number, unit in SIZE.findall(text)[:2]]
    if len(sizes) < 2:
        return limit, limit
    needed, there = max(sizes), min(sizes)
    return needed + (state if "temporaries" in text.split("exceeds")[0] else 0.0), there


def typical_work(
    config: config_module.Config, processor, shape: batch_contract.RowShape
) -> tuple[dict[str, float], float]:
    """Returns the work and the samples of an average row, full of grey images of the sizes that the recipe crops to."""
    rng, grid, geometry = np.random.default_rng(0), processor.config.grid_px, config.data.geometry
    asked = transforms.widest("distance", config.data)
    turns = [(asked.question, tasks.answer_text(2.35))] * transforms.questions_of("distance", config.data)
    limits, total, count = (shape.tokens, shape.patches, shape.answers), dict.fromkeys(work.COUNTS, 0), 0
    waiting = None
    for _ in range(TYPICAL_ROWS):
        row = []
        while True:
            if waiting is None:
                height, width = (
                    max(grid, int(rng.uniform(*(side or (geometry.focal_px,) * 2))) // grid * grid)
                    for side in (geometry.crop_height, geometry.crop_width)
                )
                waiting = processor.encode([np.zeros((height, width, 3), np.uint8)], turns)
            used = np.sum([packing.size_of(sample) for sample in [*row, waiting]], axis=0)
            if (used > limits).any():
                break
            row.append(waiting)
            waiting = None
        if not row:
            break
        arrays = packing.pack(row, shape, processor.config.patches_per_merged)
        counts = work.work_of(arrays, processor.config.patch_slot_unit)
        total = {name: total[name] + counts[name] for name in total}
        count += len(row)
    return {name: value / TYPICAL_ROWS for name, value in total.items()}, count / TYPICAL_ROWS


def _roofline(
    topology: Topology, config, held: dict[str, float], whole: float, useful: float, sent: float, micro: int
) -> dict[str, float]:
    """Returns the seconds of a step that each resource needs at its peak.

    Memory: every micro-batch gathers and reads the `whole` parameters for each pass, writes and reads what it keeps,
    and adds gradients up; the optimizer reads and writes its state once.
    """
    chip, passes = topology.chip, 3 if config.model.remat in ("full", "attended") else 2
    moved = micro * (2 * passes * whole + 2 * held["activations"] + 2 * held["gradients"])
    moved += 2 * (held["parameters"] + held["optimizer"])
    return {
        "compute": useful * (1 + RECOMPUTED[config.model.remat]) / chip.flops_s,
        "memory": moved / chip.hbm_bytes_s,
        "network": sent / chip.link_bytes_s,
    }
