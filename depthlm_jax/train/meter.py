"""What a run tells of its steps: metrics, rates, dropped records, steps that changed nothing."""

import collections
import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from depthlm_jax import chips, files, log, sharding, tracking
from depthlm_jax import config as config_module
from depthlm_jax.errors import InputError
from depthlm_jax.models import flops
from depthlm_jax.train import optim
from depthlm_jax.train.goodput import Ledger
from depthlm_jax.train.skips import Skips
from depthlm_jax.watchdog import Watchdog

NUMBERS = ("loss", "mean_token_accuracy", "num_tokens", "grad_norm")


class Meter:
    """Metrics of a step are fetched after the next step was dispatched, so that the device never waits."""

    def __init__(
        self, config: config_module.Config, workdir: Path, first_step: int, trainer, skips: Skips, ledger: Ledger,
        watch: Watchdog,
    ):  # fmt: skip
        self.config, self.first_step, self.trainer = config, first_step, trainer
        self.tracker = tracking.Tracker(workdir, config, first_step)
        self.journal, self.skips, self.ledger, self.watch = log.Journal(workdir), skips, ledger, watch
        # Counts are of this host's rows; other hosts' are taken to be like them.
        self.rows = len(sharding.host_rows(trainer.mesh, config.data.global_batch_rows))
        self.hosts = config.data.global_batch_rows / self.rows
        device = trainer.mesh.devices.flat[0]
        self.chip = chips.chip_of(device.device_kind)
        self.schedule = optim.make_schedule(config.optim, config.train.max_steps)
        self.pending: tuple[int, dict, object] | None = None
        self.samples, self.steps, self.used, self.work = 0, 0, (0, 0), collections.Counter()
        self.waited = 0.0  # for data, until the last line
        self.dropped = collections.Counter()  # samples that were not made though their record is sound, by the reason
        # Since the last line, by source: samples, loss and weight.
        self.sources, self.losses, self.weights = (collections.Counter() for _ in range(3))
        self.quarantine = files.Lines(workdir / f"bad_records.process-{jax.process_index()}.jsonl")
        self.bad: dict[str, str] = {}  # what is wrong, by record: the same one is met again in the next epoch
        self.start = self.since = time.monotonic()

    def load(self, batches: Iterator) -> tuple:
        """Returns this host's next rows, and all rows on their way to the mesh; notes the time it took.

        Raises:
          InputError: of the data; too many bad records.
        """
        self.watch.waits_for("data")
        with self.ledger.spend("data"):
            rows = next(batches)
            placed = sharding.put_batch(self.trainer.mesh, rows.arrays, self.config.data.global_batch_rows)
        self.count_dropped(rows.about.dropped)
        return rows, placed

    @contextlib.contextmanager
    def leave_out(self, kind: str) -> Iterator[None]:
        """Counts the time inside for the ledger, not for the rates."""
        began = time.monotonic()
        with self.ledger.spend(kind):
            yield
        self.since, self.start = (moment + time.monotonic() - began for moment in (self.since, self.start))

    def add(self, number: int, metrics: dict, rows) -> None:
        """Takes the metrics of a step, still on the device, and this host's rows of it."""
        self.flush()
        self.pending = number, metrics, rows

    def flush(self) -> None:
        """Waits for the pending step and writes its line if it is due."""
        if self.pending is None:
            return
        (number, metrics, rows), self.pending = self.pending, None
        about = rows.about
        self.watch.waits_for(f"the devices, step {number}")
        self.samples += len(about.record_ids)
        self.work.update(about.work)
        self.steps += 1
        self.sources.update(itertools.chain.from_iterable(about.sources))
        self.used = tuple(sum(pair) for pair in zip(self.used, about.used, strict=False))
        if not metrics["num_tokens"]:
            raise InputError(
                f"step {number}: no sample at all", found=dict(self.dropped.most_common(3)),
                expected="records that the tasks of the config can be asked about",
                fix="give other sources, data.tasks or crops; preview shows what is dropped and why",
            )  # fmt: skip
        if not metrics["sound"]:
            self.skips.count(number, {name: float(metrics[name]) for name in ("loss", "grad_norm")}, rows)
            return
        self.skips.in_a_row = 0
        self._add_losses(rows, sharding.local_rows(metrics["loss_BA"]))
        every, last = self.config.train.logging_steps, self.config.train.max_steps
        if number % every == 0 or number in (self.first_step + 1, last):
            self._report(number, {name: float(metrics[name]) for name in NUMBERS})

    def _report(self, number: int, values: dict[str, float]) -> None:
        now, last = time.monotonic(), self.config.train.max_steps
        values["learning_rate"] = float(self.schedule(number - 1 - self.skips.total))
        values |= self._speeds(now - self.since)
        values |= {"samples_dropped": self.dropped.total(), "steps_skipped": self.skips.total}
        values |= self._data_values()
        self.samples, self.work, self.waited, self.since = 0, collections.Counter(), self.ledger.seconds["data"], now
        self.ledger.write(number)
        if jax.process_index() == 0:
            self.journal.write(number, values)
            self.tracker.scalars(number, values)
            left = (now - self.start) / (number - self.first_step) * (last - number)
            log.say(
                f"step {number}/{last} · loss {values['loss']:.4f} · token accuracy "
                f"{values['mean_token_accuracy']:.3f} · {values['samples_per_second']:.1f} samples/s · "
                + (f"{values['mfu']:.1%} MFU · " if "mfu" in values else "")
                + f"{log.clock(left)} left"
            )

    def _speeds(self, seconds: float) -> dict[str, float]:
        """Returns rates since the last line: of all devices together, operations of one."""
        useful = self.hosts * flops.of_work(self.work, self.trainer.operations) / seconds / self.trainer.mesh.size
        values = {
            "samples_per_second": self.hosts * self.samples / seconds,
            "tokens_per_second": self.hosts * self.work["tokens"] / seconds,
            "tflops_per_second_per_device": useful / chips.TERA,
            "data_wait": (self.ledger.seconds["data"] - self.waited) / seconds,
        }
        return values | ({"mfu": useful / self.chip.flops_s} if self.chip else {})

    def _data_values(self) -> dict[str, float]:
        """Returns how full the rows were, and each source's share of the samples, since the last line."""
        data = self.config.data
        slots = self.steps * self.rows
        limits = data.max_tokens, data.max_patches
        filled = (used / slots / limit for used, limit in zip(self.used, limits, strict=True))
        values = dict(zip(("filled_tokens", "filled_patches"), filled, strict=True))
        total = max(1, self.sources.total())
        on = sorted(name for name, source in data.sources.items() if source.weight > 0)
        values |= {f"share/{name}": self.sources[name] / total for name in on}
        weighed = sorted((name, weight) for name, weight in self.weights.items() if weight)
        values |= {f"loss/{name}": self.losses[name] / weight for name, weight in weighed}
        self.steps, self.used = 0, (0, 0)
        for counter in (self.sources, self.losses, self.weights):
            counter.clear()
        return values

    def _add_losses(self, rows, loss_BA: np.ndarray) -> None:
        """Adds the terms of the loss to those of the source that they come from."""
        segments_BT, place_BA, weight_BA = (rows.arrays[n] for n in ("segments_BT", "answer_index_BA", "weights_BA"))
        sample_BA = np.take_along_axis(segments_BT, place_BA, axis=1)
        for names, *terms in zip(rows.about.sources, sample_BA, weight_BA, loss_BA, strict=True):
            sample_A, weight_A, loss_A = terms
            for number, name in enumerate(names, start=1):
                mine_A = (sample_A == number) & (weight_A > 0)
                self.weights[name] += float(weight_A[mine_A].sum())
                self.losses[name] += float(loss_A[mine_A].sum())

    def count_dropped(self, dropped) -> None:
        """Logs the records that gave no sample; raises InputError beyond data.max_bad_records unreadable ones."""
        limit = self.config.data.max_bad_records
        self.dropped.update(drop.reason for drop in dropped if not drop.bad)
        for drop in dropped:
            if not drop.bad or drop.record_id in self.bad:
                continue
            self.quarantine.add({"record": drop.record_id, "reason": drop.reason})
            self.bad[drop.record_id] = drop.reason.splitlines()[0].rpartition(": ")[2]
            log.say(f"skipped bad record number {len(self.bad)}: {drop.reason}")
            if len(self.bad) > limit:
                kinds = collections.Counter(self.bad.values()).most_common()
                raise InputError(
                    f"{len(self.bad)} bad records, the last one is {drop.reason.splitlines()[0]}",
                    found=", ".join(f"{count} × {kind}" for kind, count in kinds),
                    expected=f"at most data.max_bad_records={limit}",
                    fix="correct the records, or allow that many with --config.data.max_bad_records",
                )  # fmt: skip
