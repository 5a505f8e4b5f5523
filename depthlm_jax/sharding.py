"""The device mesh, and the one map from letters to its axes."""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from depthlm_jax import batch as batch_contract
from depthlm_jax import config as config_module
from depthlm_jax import tree
from depthlm_jax.errors import InputError

AXES = ("replica", "data", "fsdp", "tensor")
ROW_AXES = ("replica", "data", "fsdp")
# An axis splits the first letter of an array that asks for it: D is split in a kernel, not in BTD, where B has it.
LETTER_AXES = {
    "B": ROW_AXES,
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
    """Returns the mesh (replica, data, fsdp, tensor) over all devices.

    Neighbours on the inner axes are neighbours in the network; `replica` alone crosses from one TPU slice to another.

    Args:
      sizes: axis sizes; one may be −1 and takes the devices that the others leave.
      devices: all devices of all hosts.
      rows: that are computed at a time, which replica × data × fsdp has to divide.
      heads: head counts by name, each of which tensor has to divide.
      rows_field: config field that `rows` comes from, for the error.

    Raises:
      InputError: the sizes do not multiply to the devices, or do not divide rows or heads; valid sizes are named.
    """
    slices = _slices(devices)
    shape = axis_sizes(sizes, len(devices), slices, rows=rows, heads=heads, rows_field=rows_field)
    return jax.sharding.Mesh(_arranged(devices, shape, slices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(
    sizes: config_module.Mesh, devices: int, slices: int, *, rows: int, heads: Mapping[str, int], rows_field: str
) -> tuple[int, ...]:
    """Returns the sizes of AXES on so many devices of so many TPU slices; arguments and errors are `make_mesh`'s."""
    shape = _fill(sizes, devices, slices)
    tensor = shape[AXES.index("tensor")]
    valid = [n for n in range(1, devices + 1) if all(count % n == 0 for count in (devices, *heads.values()))]
    if tensor not in valid:
        raise InputError(
            f"mesh: tensor={tensor} does not divide the heads and the devices",
            found=", ".join(f"{k}={v}" for k, v in heads.items()) + f", {devices} devices",
            expected=f"tensor one of {valid}", fix="set --config.mesh.tensor",
        )  # fmt: skip
    row_devices = devices // tensor
    if rows % row_devices:
        raise InputError(
            f"mesh: replica × data × fsdp = {row_devices} does not divide the rows", found=f"{rows} rows at a time",
            expected=f"a multiple of {row_devices}",
            fix=f"set --config.{rows_field}, or the mesh",
        )  # fmt: skip
    return shape


def _slices(devices: Sequence) -> int:
    """Returns the number of TPU slices; 1 of other devices, whatever network joins them."""
    if not hasattr(devices[0], "slice_index") or devices[0].platform != "tpu":
        return 1
    return len({device.slice_index for device in devices})


def _fill(sizes: config_module.Mesh, devices: int, slices: int) -> tuple[int, ...]:
    asked = sizes.replica or slices, sizes.data, sizes.fsdp, sizes.tensor
    shape = list(asked)
    known = math.prod(size for size in shape if size != -1)
    if shape.count(-1) == 1 and known > 0 and devices % known == 0:
        shape[shape.index(-1)] = devices // known
    found = ", ".join(f"{name}={size}" for name, size in zip(AXES, asked, strict=True))
    if min(shape) < 1 or math.prod(shape) != devices:
        divisors = [n for n in range(1, devices + 1) if devices % n == 0]
        raise InputError(
            "mesh: the axes do not multiply to the devices", fix="set --config.mesh.data, .fsdp or .tensor",
            found=f"{found} on {devices} devices",
            expected=f"a product of {devices}: each axis one of {divisors}, at most one of them −1 (fills up)",
        )  # fmt: skip
    if shape[0] % slices:
        raise InputError(
            "mesh: replica does not keep the slices apart", found=f"{found} on {slices} slices",
            expected=f"replica a multiple of {slices}: only copies of the parameters may lie on several slices",
            fix=f"set --config.mesh.replica={slices}",
        )  # fmt: skip
    return tuple(shape)


def _arranged(devices: list, shape: tuple[int, ...], slices: int) -> np.ndarray:
    """Returns the devices in the mesh's shape, near one another on inner axes, as the platform's network suggests."""
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    within, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def row_devices(mesh: jax.sharding.Mesh) -> int:
    """Returns how many parts the rows of a batch are divided into."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


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


def host_rows(mesh: jax.sharding.Mesh, rows: int, host: int | None = None) -> tuple[int, ...]:
    """Returns which of the global batch's rows a host (default: this one) has to make: those that its devices hold."""
    host = jax.process_index() if host is None else host
    spans = shard(mesh, "B").devices_indices_map((rows,))
    mine = {span[0].indices(rows)[:2] for device, span in spans.items() if device.process_index == host}
    return tuple(row for start, stop in sorted(mine) for row in range(start, stop))


def put_batch(mesh: jax.sharding.Mesh, local: dict[str, np.ndarray], rows: int | None = None) -> dict[str, jax.Array]:
    """Returns the global batch of `rows` rows, of which `local` are those of `host_rows`, in that order; None: all."""
    rows = len(local["tokens_BT"]) if rows is None else rows
    shardings, mine = batch_shardings(mesh), host_rows(mesh, rows)

    def part(array: np.ndarray, span: slice) -> np.ndarray:
        start, stop, _ = span.indices(rows)
        first = bisect.bisect_left(mine, start)
        return array[first : first + stop - start]

    return {
        name: jax.make_array_from_callback(
            (rows, *array.shape[1:]), shardings[name], lambda index, array=array: part(array, index[0])
        )
        for name, array in local.items()
    }


def local_rows(array_B: jax.Array) -> np.ndarray:
    """Returns the rows of a global array that this host's devices hold, in the order of `host_rows`."""
    parts = {shard.index[0].indices(len(array_B))[0]: shard.data for shard in array_B.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
