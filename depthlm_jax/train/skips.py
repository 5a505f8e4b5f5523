"""Steps that changed nothing, because the loss or the gradient was not finite."""

from pathlib import Path

import jax
import numpy as np

from depthlm_jax import config as config_module
from depthlm_jax import files, log
from depthlm_jax.errors import InputError

NAMES = "record_ids"  # of the samples, beside the arrays of a batch that is kept


class Skips:
    """Counts them, lists them under `workdir/faults`, ends the run after some in a row."""

    def __init__(self, workdir: Path, config: config_module.Config, total: int):
        self.folder, self.limit, self.total, self.in_a_row = workdir / "faults", config.faults.skipped_steps, total, 0
        self.process = jax.process_index()

    def count(self, number: int, values: dict[str, float], rows) -> None:
        """Notes a step and the samples of this host's rows; every process has the same loss, and comes here.

        Raises:
          InputError: too many in a row; the rows of the last one are kept for `train --replay`.
        """
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        self.folder.mkdir(exist_ok=True)
        line = {"step": number, **{name: str(value) for name, value in values.items()}, NAMES: rows.about.record_ids}
        files.Lines(self.folder / f"skipped.process-{self.process}.jsonl").add(line)
        said = " · ".join(f"{name} {value}" for name, value in values.items())
        log.say(f"step {number} skipped, it is number {self.total}: {said}; samples {', '.join(rows.about.record_ids)}")
        if self.in_a_row >= self.limit:
            file = self.folder / f"step-{number}.process-{self.process}.npz"
            np.savez(file, **rows.arrays, **{NAMES: np.array(rows.about.record_ids)})
            raise InputError(
                f"step {number}: {self.in_a_row} steps in a row changed nothing", found=said,
                expected=f"finite numbers, at least once in faults.skipped_steps={self.limit} steps",
                fix=f"look at the rows with train --replay={file}; the last checkpoint is sound: train on from it "
                "(export, model.hf_dir) in a new --workdir with a lower optim.learning_rate",
            )  # fmt: skip
