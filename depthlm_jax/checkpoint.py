"""Checkpoints of a run, behind Orbax: parameters, optimizer, step, position in the data, config."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from depthlm_jax import files, tree
from depthlm_jax.errors import InputError

CHUNK_BYTES = 2**26  # of a parameter on disk; whoever reads it holds a few chunks beside it, instead of all of it again


class Checkpoints:
    """The checkpoints under `workdir/checkpoints`; saving is asynchronous.

    Whoever only reads says so: a writer clears away unfinished saves, which may be those of a run in progress.
    """

    def __init__(
        self, workdir: Path, *, read_only: bool = False, keep_last: int = 2, keep_every: int = 0,
        scores: Callable[[], Mapping[int, float]] | None = None,
    ):  # fmt: skip
        """Opens the folder.

        Args:
          workdir: of the run.
          read_only: nothing is saved or cleared away.
          keep_last: checkpoints that are kept.
          keep_every: whose multiples are kept as well; 0: none.
          scores: → step: score, of which the checkpoint with the highest is kept as well; None: none is.
        """
        self.folder = Path(workdir).resolve() / "checkpoints"
        if read_only and not self.folder.is_dir():
            raise self._none()
        policies = ocp.checkpoint_managers
        every = [policies.EveryNSteps(keep_every)] if keep_every else []
        best = [_Best(scores)] if scores else []
        policy = policies.AnyPreservationPolicy([policies.LatestN(keep_last), *every, *best])
        writing = {} if read_only else {"preservation_policy": policy, "cleanup_tmp_directories": True}
        self.options = ocp.CheckpointManagerOptions(read_only=read_only, create=not read_only, **writing)
        self.manager = ocp.CheckpointManager(self.folder, options=self.options)

    @property
    def latest_step(self) -> int | None:
        return self.manager.latest_step()

    def save(self, step: int, parameters: dict, optimizer, run: dict) -> None:
        """Starts to write a checkpoint; `run` is what JSON can hold: position in the data, config, …"""
        chunks = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
        items = ocp.args.Composite(
            parameters=ocp.args.StandardSave(parameters, save_args=jax.tree.map(lambda _: chunks, parameters)),
            optimizer=ocp.args.StandardSave(optimizer),
            run=ocp.args.JsonSave(run),
        )
        self.manager.save(step, args=items, force=True)

    def restore(self, step: int, parameters: dict, optimizer) -> tuple[dict, object, dict]:
        """Returns parameters, optimizer state, and `run` as it was saved.

        Args:
          step: of a complete checkpoint.
          parameters: ShapeDtypeStructs with the shardings that the arrays shall have.
          optimizer: likewise.

        Raises:
          InputError: the checkpoint is damaged.
        """
        items = ocp.args.Composite(
            parameters=ocp.args.StandardRestore(parameters),
            optimizer=ocp.args.StandardRestore(optimizer),
            run=ocp.args.JsonRestore(),
        )
        found = self._read(step, lambda: self.manager.restore(step, args=items))
        return found["parameters"], found["optimizer"], found["run"]

    def restore_parameters(self, parameters: dict) -> tuple[int, dict]:
        """Returns the latest step and its parameters, without the optimizer.

        Raises:
          InputError: there is no checkpoint, or it is damaged.
        """
        step = self._saved_step()
        items = ocp.args.Composite(parameters=ocp.args.StandardRestore(parameters))
        return step, self._read(step, lambda: self.manager.restore(step, args=items))["parameters"]

    def open_parameters(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, Callable[[str], np.ndarray]]:
        """Returns the latest step, and a function of a path that reads this one parameter into host memory.

        Args:
          shapes: of all parameters, by path.

        Raises:
          InputError: there is no checkpoint, its parameters are others, or (the function, too) it is damaged.
        """
        step = self._saved_step()
        folder, reader = self.folder / str(step) / "parameters", ocp.PyTreeCheckpointHandler()
        saved = self._read(step, lambda: tree.flatten(reader.metadata(folder).tree))
        differ = sorted(path for path in saved.keys() | shapes.keys() if not _same(path, saved, shapes))
        if differ:
            raise InputError(
                f"{folder}: parameters of another model", found=f"{len(differ)} differ: {differ[:4]}",
                expected=f"the {len(shapes)} parameters that base/config.json implies",
                fix="restore the base folder that the run began with",
            )  # fmt: skip

        def read(path: str) -> np.ndarray:
            wanted = ocp.RestoreArgs(restore_type=np.ndarray)  # not through a device: it would be held twice
            item, wanted = (tree.unflatten({path: value}) for value in (0, wanted))
            args = ocp.args.PyTreeRestore(item=item, restore_args=wanted, partial_restore=True)
            return tree.flatten(self._read(step, lambda: reader.restore(folder, args=args)))[path]

        return step, read

    def _saved_step(self) -> int:
        step = self.latest_step
        if step is None:
            raise self._none()
        return step

    def _read(self, step: int, read: Callable):
        try:
            return read()
        except Exception as error:  # noqa: BLE001 Orbax and TensorStore raise many kinds for a lost or cut file
            others = [other for other in self.manager.all_steps() if other != step]
            raise InputError(
                f"{self.folder / str(step)}: cannot be read", found=f"{type(error).__name__}: {str(error)[:300]}",
                expected="a complete checkpoint of this model",
                fix=f"move it away; what is left then: {others or 'none'}",
            ) from error  # fmt: skip

    def _none(self) -> InputError:
        return InputError(
            f"{self.folder}: no checkpoint", found=sorted(file.name for file in self.folder.glob("*")) or "nothing",
            expected="the checkpoint of a training run", fix="train first, or give that run's --workdir",
        )  # fmt: skip

    def check(self) -> None:
        """Raises what a save has failed with."""
        self.manager.check_for_errors()

    def wait(self) -> None:
        """Waits for the last save; raises if it failed."""
        self.manager.wait_until_finished()
        self.manager.check_for_errors()

    def reopen(self) -> None:
        """Forgets a save that has failed, and clears away what it left."""
        self.manager = ocp.CheckpointManager(self.folder, options=self.options)

    def close(self) -> None:
        """Waits for the last save; raises if it failed."""
        self.manager.wait_until_finished()
        self.manager.close()


class _Best:
    """A policy of Orbax that keeps the checkpoint with the highest score; of equal ones, the latest."""

    def __init__(self, scores: Callable[[], Mapping[int, float]]):
        self.scores = scores

    def should_preserve(self, checkpoints: Sequence, *, context) -> list[bool]:
        scores = self.scores()
        measured = [(scores[one.step], one.step) for one in checkpoints if one.step in scores]
        return [bool(measured) and one.step == max(measured)[1] for one in checkpoints]


def _same(path: str, saved: Mapping, shapes: Mapping) -> bool:
    return path in saved and path in shapes and tuple(saved[path].shape) == tuple(shapes[path])


def saved_step(workdir: Path) -> int:
    """Returns the step of the newest complete checkpoint, 0: there is none. Unlike a manager it asks for no devices."""
    folders = (workdir / "checkpoints").glob("*")
    return max((int(folder.name) for folder in folders if folder.name.isdecimal()), default=0)


def read_run(workdir: Path, step: int) -> dict:
    """Returns `run` as it was saved with a checkpoint. Asks for no devices either."""
    return files.read_json(workdir / "checkpoints" / str(step) / "run" / "metadata", "restore that checkpoint")


def abstract(arrays, shardings):
    """Returns the tree of arrays as ShapeDtypeStructs with shardings, the target of a restore."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), arrays, shardings)
