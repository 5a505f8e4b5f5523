"""Ends a process that waits for ever, and says what every process of the run was waiting for.

Each process keeps a file under `workdir/alive`: what it waits for, and since when. So the one that times out can name
those that never came, or that stand elsewhere. A process that ends in order takes its file away.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

FASTEST, SLOWEST = 0.2, 10.0  # seconds between two looks
FIX = (
    "see the stacks above; start the run again and it goes on from its last checkpoint; if a step, a save or the start "
    "takes longer than that, set --config.faults.silent_seconds or start_seconds"
)
FORGOTTEN = 5  # looks after which a file without news is that of a process that is gone


class Watchdog:
    """`waits_for` is a sign of life; after `limit_seconds` without one, the process reports and ends with status 1."""

    def __init__(self, folder: Path, process: int | None, processes: int | None, limit_seconds: float):
        self.folder, self.processes, self.limit = folder / "alive", processes, limit_seconds
        self.name = f"process {process}" if process is not None else f"{socket.gethostname()} {os.getpid()}"
        self.period = min(max(limit_seconds / 10, FASTEST), SLOWEST)
        self.doing, self.since = "its start", time.monotonic()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        if limit_seconds:
            self.thread.start()

    def waits_for(self, what: str) -> None:
        """Notes that the process got on, and what it does now."""
        self.doing, self.since = what, time.monotonic()

    def close(self) -> None:
        """Ends the watch."""
        self.ended.set()
        if self.limit:
            self.thread.join()
            self._file.unlink(missing_ok=True)

    @property
    def _file(self) -> Path:
        return self.folder / f"{self.name}.json"

    def _watch(self) -> None:
        while not self.ended.wait(self.period):
            silent = time.monotonic() - self.since
            self._write(silent)
            if silent > self.limit:
                self._end(silent)

    def _write(self, silent: float) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps({"waits_for": self.doing, "seconds": silent, "time": time.time()}))
        except OSError:  # a disk that is gone shows when something is saved; here it must not end the watch
            pass

    def _end(self, silent: float) -> None:
        sys.stdout.flush()
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        print(
            f"error: {self.name}: no progress for {silent:.0f} s, waiting for {self.doing}\n{self.report()}\n"
            f"  fix:      {FIX}", file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(1)  # threads that hang cannot be ended otherwise

    def report(self) -> str:
        """Returns a line for each process: what it waits for, or that nothing is heard of it."""
        found = {}
        for file in self.folder.glob("*.json"):
            try:
                found[file.stem] = json.loads(file.read_text())
            except (OSError, ValueError):  # it is being written, or taken away
                continue
        expected = {f"process {number}" for number in range(self.processes or 0)}
        lines = []
        for name in sorted(expected | found.keys()):
            news = found.get(name)
            if news is None or time.time() - news["time"] > FORGOTTEN * self.period + 1:
                lines.append(f"  {name}: missing, nothing is heard of it")
            else:
                lines.append(f"  {name}: waits for {news['waits_for']} since {news['seconds']:.0f} s")
        return "\n".join(lines)
