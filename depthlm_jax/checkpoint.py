"""Checkpoints of a run, behind Orbax: parameters, optimizer, step, position in the data, config."""

import dataclasses
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from depthlm_jax import config as config_module
from depthlm_jax.errors import InputError

KEPT = 2  # checkpoints on disk: the last, and the one before in case the last is lost


class Checkpoints:
    """The checkpoints under `workdir/checkpoints`; saving is asynchronous."""

    def __init__(self, workdir: Path):
        policy = ocp.checkpoint_managers.LatestN(KEPT)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True)
        self.folder = Path(workdir).resolve() / "checkpoints"
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def latest_step(self) -> int | None:
        return self.manager.latest_step()

    def save(self, step: int, parameters: dict, optimizer, data_state: dict, config: config_module.Config) -> None:
        """Starts to write a checkpoint; raises what the save before it failed with."""
        self.manager.check_for_errors()
        run = {"data": data_state, "config": dataclasses.asdict(config)}
        items = ocp.args.Composite(
            parameters=ocp.args.StandardSave(parameters),
            optimizer=ocp.args.StandardSave(optimizer),
            run=ocp.args.JsonSave(run),
        )
        self.manager.save(step, args=items, force=True)

    def restore(self, step: int, parameters: dict, optimizer) -> tuple[dict, object, dict]:
        """Returns parameters, optimizer state and data position.

        Args:
          step: of a complete checkpoint.
          parameters: ShapeDtypeStructs with the shardings that the arrays shall have.
          optimizer: likewise.
        """
        items = ocp.args.Composite(
            parameters=ocp.args.StandardRestore(parameters),
            optimizer=ocp.args.StandardRestore(optimizer),
            run=ocp.args.JsonRestore(),
        )
        found = self.manager.restore(step, args=items)
        return found["parameters"], found["optimizer"], found["run"]["data"]

    def restore_parameters(self, parameters: dict) -> tuple[int, dict]:
        """Returns the latest step and its parameters, without the optimizer.

        Raises:
          InputError: there is no checkpoint.
        """
        step = self.latest_step
        if step is None:
            raise InputError(
                f"{self.folder}: no checkpoint", found=sorted(file.name for file in self.folder.glob("*")) or "nothing",
                expected="the checkpoint of a training run", fix="train first, or give that run's --workdir",
            )  # fmt: skip
        items = ocp.args.Composite(parameters=ocp.args.StandardRestore(parameters))
        return step, self.manager.restore(step, args=items)["parameters"]

    def close(self) -> None:
        """Waits for the last save; raises if it failed."""
        self.manager.wait_until_finished()
        self.manager.close()


def abstract(tree, shardings):
    """Returns the tree as ShapeDtypeStructs with shardings, the target of a restore."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
