import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from depthlm_jax import batch as contract
from depthlm_jax import sharding
from depthlm_jax.config import Mesh
from depthlm_jax.data import packing
from depthlm_jax.errors import InputError

HEADS = {"num_attention_heads": 12, "num_key_value_heads": 4}


def mesh(data: int, fsdp: int, tensor: int, replica: int = 0, devices=None, rows: int = 8, heads=HEADS):
    return sharding.make_mesh(Mesh(data, fsdp, tensor, replica), devices or jax.devices(), rows=rows, heads=heads)


def refusal(*sizes, **more) -> str:
    with pytest.raises(InputError) as error:
        mesh(*sizes, **more)
    return str(error.value)


def axes_of(spec: PartitionSpec) -> list[tuple[str, ...]]:
    return [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in spec]


@dataclasses.dataclass(frozen=True)
class Device:
    """What make_mesh reads of a device before it refuses."""

    process_index: int
    slice_index: int = 0
    platform: str = "tpu"


@pytest.mark.parametrize(
    ("letters", "axes"),
    [
        ("BTD", [("data", "fsdp"), (), ()]),  # B has fsdp already
        ("LDH", [(), ("fsdp",), ("tensor",)]),
        ("LHD", [(), ("tensor",), ("fsdp",)]),
        ("LD3H", [(), ("fsdp",), (), ("tensor",)]),
        ("VD", [("tensor",), ("fsdp",)]),
        ("DV", [("fsdp",), ("tensor",)]),
        ("2CD", [(), ("fsdp",), ()]),
        ("LF", [(), ("tensor",)]),
        ("BAV", [("data", "fsdp"), (), ("tensor",)]),
        ("", []),
    ],
)
def test_letters_name_the_axes(letters, axes):
    assert axes_of(sharding.spec(mesh(2, 2, 2), letters)) == axes


def test_an_axis_of_one_device_is_not_named():
    assert axes_of(sharding.spec(mesh(8, 1, 1), "BTD")) == [("data",), (), ()]
    assert axes_of(sharding.spec(mesh(8, 1, 1), "LDH")) == [(), (), ()]


def test_a_size_that_does_not_divide_stays_whole_and_leaves_the_axis_to_the_next_letter():
    assert axes_of(sharding.spec(mesh(1, 8, 1), "CD", (12, 16))) == [(), ("fsdp",)]
    assert axes_of(sharding.spec(mesh(1, 2, 4), "VD", (398, 32))) == [(), ("fsdp",)]


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((-1, 1, 1), (1, 8, 1, 1)),
        ((-1, 2, 2), (1, 2, 2, 2)),
        ((1, -1, 4), (1, 1, 2, 4)),
        ((2, 1, -1), (1, 2, 1, 4)),
        ((1, -1, 1, 2), (2, 1, 4, 1)),
        ((2, 2, 1, -1), (2, 2, 2, 1)),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(sizes, shape):
    assert tuple(mesh(*sizes).shape.values()) == shape


def test_every_device_is_used_once():
    assert sorted(d.id for d in mesh(2, 2, 2).devices.flat) == [d.id for d in jax.devices()]


@pytest.mark.parametrize("sizes", [(2, 2, 1), (3, -1, 1), (-1, -1, 1), (0, -1, 1), (16, 1, 1), (-1, -2, -4)])
def test_sizes_that_do_not_multiply_to_the_devices(sizes):
    text = refusal(*sizes)
    assert "the axes do not multiply to the devices" in text
    assert f"replica=1, data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]} on 8 devices" in text
    assert "[1, 2, 4, 8]" in text


def test_tensor_has_to_divide_the_heads():
    text = refusal(1, 1, 8)
    assert "tensor=8 does not divide the heads and the devices" in text
    assert "num_attention_heads=12, num_key_value_heads=4" in text and "tensor one of [1, 2, 4]" in text


def test_only_copies_of_the_parameters_lie_on_several_slices():
    two = [Device(number // 4, number // 4) for number in range(8)]
    text = refusal(1, 8, 1, 1, devices=two)
    assert "replica=1, data=1, fsdp=8, tensor=1 on 2 slices" in text
    assert "a multiple of 2" in text and "mesh.replica=2" in text


def test_data_and_fsdp_have_to_divide_the_rows():
    text = refusal(2, 4, 1, rows=12)
    assert "replica × data × fsdp = 8 does not divide the rows" in text
    assert "12 rows" in text and "a multiple of 8" in text and "data.global_batch_rows" in text


def test_batch_lies_by_rows_on_data_and_fsdp():
    shape = contract.RowShape(tokens=3, patches=4, answers=2, channels=5)
    rows = packing.stack([packing.pack([], shape, merged=4)] * 8)
    rows["tokens_BT"][:] = np.arange(8)[:, None]
    put = sharding.put_batch(mesh(2, 2, 2), rows)
    for name, array in put.items():
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {2}, name
        np.testing.assert_array_equal(array, rows[name], strict=True)


def test_a_host_makes_the_rows_that_its_devices_hold():
    """Whatever order the devices have on the mesh."""
    eight = jax.devices()
    turned = jax.sharding.Mesh(np.array(eight)[[6, 1, 4, 3, 2, 5, 0, 7]].reshape(1, 2, 2, 2), sharding.AXES)
    found = sharding.host_rows(turned, 16)
    assert found == tuple(range(16))  # one process has all
    rows = {"tokens_BT": np.arange(16 * 3, dtype=np.int32).reshape(16, 3)}
    put = sharding.put_batch(turned, rows, 16)["tokens_BT"]
    np.testing.assert_array_equal(put, rows["tokens_BT"])


def test_rows_of_copies_come_before_those_of_a_slice():
    spans = sharding.shard(mesh(1, 4, 1, 2), "B").devices_indices_map((8,))
    assert [spans[device][0].start for device in mesh(1, 4, 1, 2).devices.flat] == list(range(8))


def test_parameters_lie_where_their_letters_say():
    axes, shapes = {"a/kernel": "LDH", "a/bias": "LH"}, {"a/kernel": (3, 8, 4), "a/bias": (3, 4)}
    places = sharding.parameter_places(mesh(2, 2, 2), axes, shapes)
    assert places["a"]["kernel"].shard_shape((3, 8, 4)) == (3, 4, 2)
    assert places["a"]["bias"].shard_shape((3, 4)) == (3, 2)
