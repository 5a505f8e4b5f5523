"""What is promised of checkpoints beside resuming, which tests/train/test_loop.py shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthlm_jax import checkpoint
from depthlm_jax.config import Config
from depthlm_jax.errors import InputError

PARAMETERS = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
ABSTRACT = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
    PARAMETERS,
)


def save(checkpoints: checkpoint.Checkpoints, step: int) -> None:
    scaled = jax.tree.map(lambda x: x * step, PARAMETERS)
    checkpoints.save(step, scaled, scaled, {"step": step}, Config())


@pytest.fixture
def workdir(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    for step in (1, 2, 3):
        save(checkpoints, step)
    checkpoints.close()
    return tmp_path


def test_the_last_two_are_kept(workdir):
    assert sorted(folder.name for folder in (workdir / "checkpoints").iterdir()) == ["2", "3"]


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


def test_a_damaged_checkpoint_is_named_and_what_is_left(workdir):
    for file in (workdir / "checkpoints" / "3" / "parameters").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    checkpoints = checkpoint.Checkpoints(workdir)
    with pytest.raises(InputError, match="3: cannot be read") as error:
        checkpoints.restore(3, ABSTRACT, ABSTRACT)
    assert "move it away; what is left then: [2]" in str(error.value)
    checkpoints.close()
