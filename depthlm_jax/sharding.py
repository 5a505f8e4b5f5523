"""The device mesh, and the one map from letters to its axes."""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from depthlm_jax import batch as batch_contract
from depthlm_jax import config as config_module
from depthlm_jax import tree
from depthlm_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
# An axis splits the first letter of an array that asks for it: D is split in a kernel, not in BTD, where B has it.
LETTER_AXES = {
    "B": ("data", "fsdp"),
    "D": ("fsdp",),
    "C": ("fsdp",),
    "H": ("tensor",),
    "N": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
}


def make_mesh(
    sizes: config_module.Mesh,
    devices: list,
    *,
    rows: int,
    heads: Mapping[str, int],
    rows_field: str = "data.global_batch_rows",
) -> jax.sharding.Mesh:
    """Returns the mesh (data, fsdp, tensor) over all devices.

    Args:
      sizes: axis sizes; one may be −1 and takes the devices that the others leave.
      devices: all devices of all hosts.
      rows: that are computed at a time, which data × fsdp has to divide.
      heads: head counts by name, each of which tensor has to divide.
      rows_field: config field that `rows` comes from, for the error.

    Raises:
      InputError: the sizes do not multiply to the devices, or do not divide rows or heads; valid sizes are named.
    """
    shape = _fill(sizes, len(devices))
    tensor = shape[AXES.index("tensor")]
    # The devices of a tensor group see the same rows, so they belong to one host, which reads them.
    local = len(devices) // len({device.process_index for device in devices})
    valid = [n for n in range(1, local + 1) if all(count % n == 0 for count in (local, *heads.values()))]
    if tensor not in valid:
        raise InputError(
            f"mesh: tensor={tensor} does not divide the heads and the devices of a host",
            found=", ".join(f"{k}={v}" for k, v in heads.items()) + f", {local} devices a host",
            expected=f"tensor one of {valid}", fix="set --config.mesh.tensor",
        )  # fmt: skip
    row_devices = shape[0] * shape[1]
    if rows % row_devices:
        raise InputError(
            f"mesh: data × fsdp = {row_devices} does not divide the rows", found=f"{rows} rows at a time",
            expected=f"a multiple of {row_devices}",
            fix=f"set --config.{rows_field}, or the mesh",
        )  # fmt: skip
    return jax.sharding.Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _fill(sizes: config_module.Mesh, devices: int) -> tuple[int, ...]:
    shape = [sizes.data, sizes.fsdp, sizes.tensor]
    known = math.prod(size for size in shape if size != -1)
    if shape.count(-1) == 1 and known > 0 and devices % known == 0:
        shape[shape.index(-1)] = devices // known
    if min(shape) < 1 or math.prod(shape) != devices:
        divisors = [n for n in range(1, devices + 1) if devices % n == 0]
        raise InputError(
            "mesh: the axes do not multiply to the devices", fix="set --config.mesh.data, .fsdp or .tensor",
            found=f"data={sizes.data}, fsdp={sizes.fsdp}, tensor={sizes.tensor} on {devices} devices",
            expected=f"a product of {devices}: each axis one of {divisors}, at most one of them −1 (fills up)",
        )  # fmt: skip
    return tuple(shape)


def spec(mesh: jax.sharding.Mesh, letters: str, shape: tuple[int, ...] | None = None) -> PartitionSpec:
    """Returns which mesh axes split which letter; an axis that does not divide `shape` leaves that letter whole."""
    free, entries = set(AXES), []
    for position, letter in enumerate(letters):
        axes = tuple(axis for axis in LETTER_AXES.get(letter, ()) if axis in free and mesh.shape[axis] > 1)
        if shape is not None and shape[position] % math.prod(mesh.shape[axis] for axis in axes):
            axes = ()
        free -= set(axes)
        entries.append(axes or None)
    return PartitionSpec(*entries)


def shard(mesh: jax.sharding.Mesh, letters: str, shape: tuple[int, ...] | None = None) -> NamedSharding:
    return NamedSharding(mesh, spec(mesh, letters, shape))


def constrainer(mesh: jax.sharding.Mesh) -> Callable[[jax.Array, str], jax.Array]:
    """Returns constrain(array, letters), which pins an activation to its place on the mesh."""
    return lambda x, letters: jax.lax.with_sharding_constraint(x, shard(mesh, letters, x.shape))


def per_device(mesh: jax.sharding.Mesh) -> Callable:
    """Returns per_device(function, in_letters, out_letters): the function, run by each device on its part of arrays.

    For kernels, which XLA cannot divide. Letters of an argument that is a tree hold for each of its arrays.
    """

    def divide(function: Callable, in_letters: Sequence[str], out_letters: str) -> Callable:
        in_specs = tuple(spec(mesh, letters) for letters in in_letters)
        out_spec = spec(mesh, out_letters)
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_spec, check_vma=False)

    return divide


def parameter_places(mesh: jax.sharding.Mesh, axes: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """Returns the parameters' tree of shardings, from {path: letters} and {path: shape}."""
    return tree.unflatten({path: shard(mesh, axes[path], shape) for path, shape in shapes.items()})


def batch_shardings(mesh: jax.sharding.Mesh) -> dict[str, NamedSharding]:
    return {field: shard(mesh, batch_contract.letters(field)) for field in batch_contract.FIELDS}


def put_batch(mesh: jax.sharding.Mesh, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns the global batch, of which `rows` are this process's rows, in the order of the processes."""
    shardings = batch_shardings(mesh)
    return {name: jax.make_array_from_process_local_data(shardings[name], rows[name]) for name in rows}
