"""The rows that stopped a run, one at a time through its last checkpoint."""

import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthlm_jax import parameter_groups
from depthlm_jax import run as runs
from depthlm_jax.errors import InputError
from depthlm_jax.train import skips, step


def replay(run: runs.Run, file: Path) -> tuple[int, list[dict]]:
    """Returns the step of the checkpoint, and loss, gradient norm and samples of each row.

    Args:
      run: of `run.reopen`.
      file: that Skips wrote.

    Raises:
      InputError: the file is none, or there is no checkpoint.
    """
    arrays = read(file)
    names = iter(arrays.pop(skips.NAMES).tolist())
    number, parameters = runs.trained_parameters(run)
    network, optimizer = run.network, optax.set_to_zero()
    factors = parameter_groups.factors(network.shapes, run.config.optim.groups, network.lora_paths)
    compute = jnp.dtype(run.config.model.compute_dtype)
    one_step = jax.jit(step.make_train_step(network.logits, optimizer, factors, compute, 1))
    trained, _ = parameter_groups.split(parameters, factors)
    state, found = step.State(jnp.int32(number), parameters, optimizer.init(trained)), []
    for row in range(len(arrays["tokens_BT"])):
        _, metrics = one_step(state, {name: array[row : row + 1] for name, array in arrays.items()})
        samples = [next(names, "?") for _ in range(int(arrays["segments_BT"][row].max()))]
        numbers = {name: float(metrics[name]) for name in ("loss", "grad_norm", "num_tokens")}
        found.append({"row": row, **numbers, "samples": samples})
    return number, found


def read(file: Path) -> dict[str, np.ndarray]:
    """Returns the arrays; nothing in the file is executed."""
    try:
        with np.load(file, allow_pickle=False) as kept:
            return {name: kept[name] for name in (*kept.files, skips.NAMES)}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{file}: no rows to replay", found=error, expected="a .npz file under faults/ of a workdir",
            fix="give the file that the run has named when it stopped",
        ) from error  # fmt: skip
