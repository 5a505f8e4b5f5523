"""What is promised of checkpoints beside resuming, which tests/train/test_loop.py shows."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthlm_jax import checkpoint
from depthlm_jax.errors import InputError

PARAMETERS = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
ABSTRACT = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
    PARAMETERS,
)


def save(checkpoints: checkpoint.Checkpoints, step: int) -> None:
    scaled = jax.tree.map(lambda x: x * step, PARAMETERS)
    checkpoints.save(step, scaled, scaled, {"step": step})


@pytest.fixture
def workdir(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    for step in (1, 2, 3):
        save(checkpoints, step)
    checkpoints.close()
    return tmp_path


def test_the_last_two_are_kept(workdir):
    assert sorted(folder.name for folder in (workdir / "checkpoints").iterdir()) == ["2", "3"]


def test_multiples_are_kept_beside_the_last(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep_last=1, keep_every=4)
    for step in range(1, 8):
        save(checkpoints, step)
    checkpoints.close()
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["4", "7"]


def test_a_reader_leaves_a_save_in_progress_alone(workdir):
    """An unfinished save looks like this on disk; the next writer clears it away, a reader must not."""
    unfinished = workdir / "checkpoints" / "4.orbax-checkpoint-tmp"
    unfinished.mkdir()
    reader = checkpoint.Checkpoints(workdir, read_only=True)
    step, parameters = reader.restore_parameters(ABSTRACT)
    reader.close()
    assert step == 3
    np.testing.assert_array_equal(parameters["a"]["kernel"], 3 * PARAMETERS["a"]["kernel"])
    assert unfinished.is_dir()


def test_a_reader_makes_no_folder(tmp_path):
    with pytest.raises(InputError, match="no checkpoint") as error:
        checkpoint.Checkpoints(tmp_path, read_only=True)
    assert "train first" in str(error.value)
    assert list(tmp_path.iterdir()) == []


SHAPES = {"a/kernel": (2, 3)}


def opened(workdir, shapes: dict[str, tuple[int, ...]]):
    checkpoints = checkpoint.Checkpoints(workdir, read_only=True)
    try:
        return checkpoints.open_parameters(shapes)
    finally:
        checkpoints.close()


def test_a_parameter_is_read_alone(workdir):
    step, read = opened(workdir, SHAPES)
    value = read("a/kernel")
    assert step == 3
    assert type(value) is np.ndarray
    np.testing.assert_array_equal(value, 3 * np.asarray(PARAMETERS["a"]["kernel"]), strict=True)


@pytest.mark.parametrize(
    "shapes, differ",
    [
        ({"a/kernel": (3, 2)}, "1 differ: ['a/kernel']"),
        ({}, "1 differ: ['a/kernel']"),
        (SHAPES | {"b": (1,)}, "1 differ: ['b']"),
    ],
)
def test_parameters_of_another_model_are_named(workdir, shapes, differ):
    with pytest.raises(InputError, match="3/parameters: parameters of another model") as error:
        opened(workdir, shapes)
    assert differ in str(error.value)


def test_a_damaged_parameter_is_named_when_it_is_read(workdir):
    folder = workdir / "checkpoints" / "3" / "parameters"
    _, read = opened(workdir, SHAPES)
    for file in folder.rglob("d/*"):
        file.write_bytes(b"")
    with pytest.raises(InputError, match="3: cannot be read") as error:
        read("a/kernel")
    assert "what is left then: [2]" in str(error.value)


# Six parameters of 32 MiB, in a process whose peak is its own.
READ_ALL = """
import pathlib, sys
from depthlm_jax import checkpoint
def peak(): return next(int(l.split()[1]) / 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
checkpoints = checkpoint.Checkpoints(pathlib.Path(sys.argv[1]), read_only=True)
step, read = checkpoints.open_parameters({**{f"m/{i}": (8, 1024, 1024) for i in range(6)}, "small": (2,)})
read("small")
before = peak()
for i in range(6):
    assert read(f"m/{i}").sum() == i * 2**23, i
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_is_that_of_one_parameter(tmp_path):
    large = {str(i): jnp.full((8, 1024, 1024), i, jnp.float32) for i in range(6)}
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, {"m": large, "small": jnp.ones(2)}, {"count": jnp.zeros(1)}, {})
    checkpoints.close()
    command = [sys.executable, "-c", READ_ALL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 32 < float(done.stdout.splitlines()[-1]) < 3 * 32  # the array, and its chunks as they come; 192 in all


def test_a_damaged_checkpoint_is_named_and_what_is_left(workdir):
    for file in (workdir / "checkpoints" / "3" / "parameters").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    checkpoints = checkpoint.Checkpoints(workdir)
    with pytest.raises(InputError, match="3: cannot be read") as error:
        checkpoints.restore(3, ABSTRACT, ABSTRACT)
    assert "move it away; what is left then: [2]" in str(error.value)
    checkpoints.close()
