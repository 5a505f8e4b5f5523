"""Saves of a run that may fail: told at once, done again at the next step, and counted."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax

from depthlm_jax import checkpoint, log
from depthlm_jax import config as config_module
from depthlm_jax.errors import InputError

PAUSE_SECONDS = 1.0  # before the last save is tried again


class Saves:
    """A failed save leaves the checkpoints before it as they are.

    Several processes stop at the first one: where a save fails on one of them, the others cannot know.
    """

    def __init__(self, workdir: Path, config: config_module.Config, about: dict, scores: Callable | None = None):
        kept = {"keep_last": config.train.keep_last, "keep_every": config.train.keep_every, "scores": scores}
        self.checkpoints, self.config = checkpoint.Checkpoints(workdir, **kept), config
        self.folder, self.failures, self.running = self.checkpoints.folder, 0, False
        self.limit = config.faults.failed_saves if jax.process_count() == 1 else 1
        self.restore = self.checkpoints.restore
        self.about = about | {"config": dataclasses.asdict(config)}

    @property
    def latest_step(self) -> int | None:
        return self.checkpoints.latest_step

    def has_failed(self) -> bool:
        """Returns whether the last save has failed, and tells it; one that is being written may still fail.

        Raises:
          InputError: too many saves failed in a row.
        """
        if self.running:
            self._try(self.checkpoints.check)
        return self.failures > 0 and not self.running

    def save(self, number: int, state, position, skipped: int, *, surely: bool) -> None:
        """Starts to write a checkpoint, after the one before is written; `surely`: waits, and tries until it is.

        Raises:
          InputError: too many saves failed in a row.
        """
        run = self.about | {"data": dataclasses.asdict(position), "skipped": skipped}
        self.wait()
        while self.failures or number != self.latest_step:
            self.running = True
            self._try(lambda: self._start(number, state, run))
            if not surely:
                return
            self.wait()
            if self.failures:
                time.sleep(PAUSE_SECONDS)

    def _start(self, number: int, state, run: dict) -> None:
        if self.failures:  # what the last one has left, on the disk and in Orbax, would be in the way
            self.checkpoints.reopen()
        if number != self.latest_step:
            self.checkpoints.save(number, state.parameters, state.optimizer, run)

    def wait(self) -> None:
        """Waits for the save that is being written; raises InputError if it was one failure too many."""
        if self.running:
            self._try(self.checkpoints.wait)
            if self.running:
                self.running, self.failures = False, 0

    def _try(self, action) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 Orbax and TensorStore raise many kinds for a disk that is full or gone
            self.running, self.failures = False, self.failures + 1
            found = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
            log.say(f"SAVE FAILED, number {self.failures} in a row, {self.folder}: {found}")
            if self.failures >= self.limit:
                saved = checkpoint.saved_step(self.folder.parent)
                raise InputError(
                    f"{self.folder}: {self.failures} saves in a row failed", found=found,
                    expected=f"less than faults.failed_saves={self.config.faults.failed_saves} (one, where there are "
                    "several processes)", fix="make room on the disk or mend it and start the run again: it goes on "
                    f"from {f'step {saved}' if saved else 'its start'}",
                ) from error  # fmt: skip

    def close(self) -> None:
        """Waits for the save that is being written; after one that has failed there is nothing to wait for."""
        self.wait()
        if not self.failures:
            self.checkpoints.close()
