"""What every command that touches a model needs: its folder, processor, mesh, network, parameters."""

import dataclasses
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from depthlm_jax import checkpoint, files, hf, log, parameter_groups, same_run, sharding, tree
from depthlm_jax import config as config_module
from depthlm_jax.data import tasks, transforms
from depthlm_jax.data.records import Records
from depthlm_jax.errors import InputError
from depthlm_jax.models import attention, registry
from depthlm_jax.models.execution import Execution

ROWS_FIELD = "data.global_batch_rows (divided by train.gradient_accumulation_steps)"


@dataclasses.dataclass(frozen=True)
class Run:
    """A model on a mesh; `workdir` holds config.json, base/ (a Hugging Face folder without weights), checkpoints/."""

    config: config_module.Config
    workdir: Path
    processor: object
    mesh: jax.sharding.Mesh
    network: registry.Network

    @property
    def base(self) -> Path:
        return self.workdir / "base"


def open_run(config: config_module.Config, workdir: Path) -> Run:
    """Returns the run of a workdir to be trained; begins one where there is none.

    Raises:
      InputError: the folder cannot be written, or holds a run of another config.
    """
    workdir = Path(workdir)
    saved = workdir / "config.json"
    changed, begins = [], not saved.exists()
    if not begins:
        before = config_module.load(saved)
        same_run.check_same_run(before, config, str(workdir))
        changed = same_run.mixture_changes(before, config)

    def prepare() -> None:
        files.make_writable(workdir)
        if begins:
            _begin(config, workdir / "base")

    process_0_first(prepare, f"{workdir} could not be begun")
    run = connect(config, workdir, jax.devices(), rows_at_a_time(config), ROWS_FIELD)
    if begins and config.model.hf_dir:
        _check_weights(run)
    if jax.process_index() == 0 and (changed or begins):  # only now: it can be trained
        for line in changed:
            log.say(f"{workdir} goes on with another mixture: {line}")
        config_module.save(config, saved)
    return run


def rows_at_a_time(config: config_module.Config) -> int:
    """Returns the rows of a micro-batch; of the whole batch, where their number follows from the mesh.

    Raises:
      InputError: micro-batches do not divide the rows.
    """
    rows, accumulate = config.data.global_batch_rows, config.train.gradient_accumulation_steps or 1
    if rows % accumulate:
        raise InputError(
            "config: train.gradient_accumulation_steps does not divide the rows", found=f"{rows} rows / {accumulate}",
            expected=f"one of {[n for n in range(1, rows + 1) if rows % n == 0]}",
            fix="set --config.train.gradient_accumulation_steps or --config.data.global_batch_rows",
        )  # fmt: skip
    return rows // accumulate


def process_0_first(action: Callable[[], None], failure: str) -> None:
    """Runs `action` on process 0 while the others wait; where it fails, all stop, the others with InputError."""
    error = None
    if jax.process_index() == 0:
        try:
            action()
        except Exception as caught:  # noqa: BLE001 whatever it is, the others have to be told before it is raised
            error = caught
    failed = multihost_utils.process_allgather(np.array(error is not None)).any()
    if error is not None:
        raise error
    if failed:
        raise InputError(failure, found="process 0 has stopped", expected="what its log says", fix="see its log")


def check_same_data(sources: dict[str, Records]) -> None:
    """Raises InputError unless all processes see the same records: they would disagree on who trains on which."""
    digests = np.array([zlib.crc32(np.ascontiguousarray(records.index)) for records in sources.values()], np.uint32)
    of_all = multihost_utils.process_allgather(digests)
    same_S = (of_all.reshape(-1, len(digests)) == digests).all(axis=0)
    differ = [name for name, same in zip(sources, same_S, strict=True) if not same]
    if differ:
        raise InputError(
            "the processes see different data", found=f"other indexes of {differ} on this host than on others",
            expected="the same files everywhere", fix="remove the .index files beside the data, and check its storage",
        )  # fmt: skip


def _begin(config: config_module.Config, base: Path) -> None:
    """Writes base/ anew: what an attempt without config.json left there is not mixed with."""
    if base.exists() and any(base.iterdir()) and not (base / "config.json").is_file():
        raise InputError(
            f"{base} is in the way", found=sorted(file.name for file in base.iterdir())[:6],
            expected="no such folder, or one that a run has made", fix="give another --workdir",
        )  # fmt: skip
    staging = base.with_name("base.incomplete")
    shutil.rmtree(staging, ignore_errors=True)
    write_base(config, staging)
    shutil.rmtree(base, ignore_errors=True)
    staging.rename(base)


def _check_weights(run: Run) -> None:
    """Raises InputError for weights that cannot be read, or whose frozen part could not be kept as it is."""
    folder, network = Path(run.config.model.hf_dir), run.network
    stored = hf.open_folder(folder, network.rules, network.hf_shapes).tensors
    here = {path: leaf.dtype.itemsize for path, leaf in tree.flatten(network.abstract).items()}
    wider = [
        name
        for rule in network.rules
        for name in rule.tensors(network.shapes[rule.path])
        if stored[name].dtype.itemsize > here[rule.path]
    ]
    if wider:
        raise InputError(
            f"{folder}: frozen weights would lose digits", found=f"{stored[wider[0]].dtype} in {wider[0]}",
            expected="a torch_dtype in config.json that is as wide as they are", fix="correct torch_dtype there",
        )  # fmt: skip


def reopen(workdir: Path, wanted: config_module.Config | None = None) -> Run:
    """Returns the run of a workdir with the config it was trained with, for reading.

    Args:
      workdir: of a training run.
      wanted: mesh and evaluation settings; where its other fields differ from the run's, it says so and keeps the
        run's. None: one CPU device of this host, whatever accelerators there are.

    Raises:
      InputError: there is no run.
    """
    saved = same_run.saved_config(workdir)
    if wanted is None:  # the model itself will not run
        model = dataclasses.replace(saved.model, attention="xla")
        alone = dataclasses.replace(saved, mesh=config_module.Mesh(1, 1, 1), model=model)
        return connect(alone, workdir, host_device(), 1, "")
    for difference in same_run.differences(saved, wanted):
        log.say(f"{workdir} was trained with another value, which is used: {difference}")
    model = dataclasses.replace(saved.model, attention=wanted.model.attention)
    config = dataclasses.replace(saved, mesh=wanted.mesh, eval=wanted.eval, model=model)
    return connect(config, workdir, jax.devices(), wanted.eval.batch_rows, "eval.batch_rows")


def host_device() -> list:
    """Returns one CPU device: large memory and exact float32; an accelerator only where JAX was given nothing else."""
    try:
        return jax.local_devices(backend="cpu")[:1]
    except RuntimeError:
        return jax.local_devices()[:1]


def connect(config: config_module.Config, workdir: Path, devices: list, rows: int, rows_field: str) -> Run:
    """Returns the run of a folder that is known to be complete.

    Args:
      config: of the run.
      workdir: holds base/.
      devices: that the mesh is made of.
      rows: that the mesh has to share.
      rows_field: the config field they come from.
    """
    family = registry.family(config.model.family)
    processor = family.processor(workdir / "base")
    heads = processor.config.heads
    mesh = sharding.make_mesh(config.mesh, devices, rows=rows, heads=heads, rows_field=rows_field)
    network = registry.build(config.model.family, processor.config, execution(config, mesh), config.model.lora)
    network = dataclasses.replace(network, abstract=with_frozen(network, config, stored_dtype(workdir / "base")))
    return Run(config, workdir, processor, mesh, network)


def execution(config: config_module.Config, mesh: jax.sharding.Mesh) -> Execution:
    """Returns how the model runs on the mesh."""
    asked = config.data.reference
    branches = asked.questions if asked.questions > 1 and asked.layout == "independent" else 0
    devices = list(mesh.devices.flat)
    name = attention.suited(config.model.attention, devices, config.model.compute_dtype)
    attend = attention.make(name, branches=branches, devices=devices, per_device=sharding.per_device(mesh))
    return Execution(sharding.constrainer(mesh), attend, config.model.remat, config.model.unroll)


def with_frozen(network: registry.Network, config: config_module.Config, dtype: np.dtype) -> dict:
    """Returns the abstract parameters; those that are not trained stay in the dtype of the folder."""
    factors = parameter_groups.factors(network.shapes, config.optim.groups, network.lora_paths)
    leaves = tree.flatten(network.abstract)
    frozen = {p: jax.ShapeDtypeStruct(leaf.shape, dtype) for p, leaf in leaves.items() if not factors[p]}
    return tree.unflatten(leaves | frozen)


def write_base(config: config_module.Config, base: Path) -> None:
    """Writes a Hugging Face folder without weights: copied from `model.hf_dir`, or made for random weights.

    Raises:
      InputError: there is nothing to start from, or the folder is not complete.
    """
    model, family = config.model, registry.family(config.model.family)
    if not model.hf_dir and not model.random_weights:
        raise InputError(
            "config: no weights to start from", found="model.hf_dir is empty", expected="a Hugging Face folder",
            fix="give --config.model.hf_dir=FOLDER (or --config.model.random_weights=True to start from nothing)",
        )  # fmt: skip
    if model.hf_dir:
        found = registry.family_of(Path(model.hf_dir))
        if found != model.family:
            raise InputError(
                f"{model.hf_dir}: a model of another family", found=found, expected=f"model.family={model.family}",
                fix=f"set --config.model.family={found}, or give another model.hf_dir",
            )  # fmt: skip
        for warning in family.copy_published(Path(model.hf_dir), base):
            log.say(f"warning: {warning}")
    else:
        answers = [tasks.answer_text(number / 100) for number in range(1000)]
        weights = dataclasses.asdict(config.data.tasks)
        asked = [transforms.widest(task, config.data) for task, weight in weights.items() if weight]
        words = [text for one in asked for text in (one.question, one.answer)]
        texts = ["system\n", "user\n", "assistant\n", tasks.SYSTEM, tasks.QUESTION, *answers, *words]
        family.write_scratch(model.hf_config, texts, base)


def first_parameters(run: Run) -> dict:
    """Returns the parameters of step 0 on the mesh: of the Hugging Face folder, or random.

    Those that are trained are float32, others have the dtype of the folder.
    """
    network, given = run.network, {}
    if run.config.model.hf_dir:
        given = tree.flatten(import_parameters(network, Path(run.config.model.hf_dir), run.mesh))
    places = tree.flatten(sharding.parameter_places(run.mesh, network.axes, network.shapes))
    others = {path: place for path, place in places.items() if path not in given}

    def initial(key: jax.Array) -> dict[str, jax.Array]:
        leaves, wanted = tree.flatten(network.init(key)), tree.flatten(network.abstract)
        return {path: leaves[path].astype(wanted[path].dtype) for path in others}

    made = jax.jit(initial, out_shardings=others)(jax.random.key(run.config.model.seed)) if others else {}
    leaves = given | made
    return tree.unflatten({path: leaves[path] for path in places})


def import_parameters(network: registry.Network, folder: Path, mesh: jax.sharding.Mesh) -> dict:
    """Returns the weights of a Hugging Face folder on the mesh, in the dtypes of the network.

    A host reads what its own devices hold: one device's share of one parameter at a time, in the dtype on disk.

    Raises:
      InputError: the folder is not complete, or its weights are quantized; before any weight is read.
    """
    weights = hf.open_folder(folder, network.rules, network.hf_shapes)
    dtypes = {path: leaf.dtype for path, leaf in tree.flatten(network.abstract).items()}
    places = tree.flatten(sharding.parameter_places(mesh, network.axes, network.shapes))
    paths = log.track(weights.rules, len(weights.rules), "parameters read")
    return tree.unflatten({path: _import_one(weights, path, places[path], dtypes[path]) for path in paths})


def _import_one(weights: hf.Weights, path: str, place: jax.sharding.Sharding, dtype: np.dtype) -> jax.Array:
    shape, holders, placed = weights.shapes[path], {}, []
    for device, index in place.addressable_devices_indices_map(shape).items():
        holders.setdefault(str(index), (index, []))[1].append(device)
    for index, devices in holders.values():
        share = weights.read(path, index)
        placed += jax.block_until_ready([jax.device_put(share, device) for device in devices])
        del share  # before the next is read
    stored = jax.make_array_from_single_device_arrays(shape, place, placed)
    # Master copies are made on the devices: the host holds no weight in another dtype than that of the file.
    return jax.jit(lambda x: x.astype(dtype), out_shardings=place)(stored)


def trained_parameters(run: Run) -> tuple[int, dict]:
    """Returns the step and the parameters of the run's latest checkpoint."""
    places = sharding.parameter_places(run.mesh, run.network.axes, run.network.shapes)
    checkpoints = checkpoint.Checkpoints(run.workdir, read_only=True)
    try:
        return checkpoints.restore_parameters(checkpoint.abstract(run.network.abstract, places))
    finally:
        checkpoints.close()


def stored_dtype(folder: Path) -> np.dtype:
    """Returns the dtype that config.json names for the weights.

    Raises:
      InputError: it is none that weights are written in.
    """
    values = files.read_json(folder / "config.json", "use a complete Hugging Face folder")
    name = values.get("torch_dtype") or values.get("dtype") or "float32"
    dtypes = {dtype.name: dtype for dtype in hf.DTYPES.values()}
    if name not in dtypes:
        raise InputError(
            f"{folder}/config.json: weights are not written in this type", found=f"torch_dtype {name!r}",
            expected=f"one of {list(dtypes)}", fix="correct torch_dtype in that file",
        )  # fmt: skip
    return dtypes[name]
