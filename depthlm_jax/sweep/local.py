"""Runs of a sweep as processes of this machine, some at a time; the signal that ends the sweep is passed on to them."""

import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import IO

from depthlm_jax import log
from depthlm_jax.data import records
from depthlm_jax.sweep import progress
from depthlm_jax.sweep.expand import Run

POLL_SECONDS = 0.2
LAST_LINES = 12  # that are shown of the log of a run that failed
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Notes the signals that end a program, instead of ending it; those that are ignored (nohup) stay so."""

    def __init__(self):
        self.received: list[int] = []
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._receive) for number in heard}

    def _receive(self, number: int, _) -> None:
        self.received.append(number)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


@dataclasses.dataclass
class Attempt:
    run: Run
    number: int  # from 1
    process: subprocess.Popen
    log: IO[bytes]
    began: float


def open_data(runs: list[Run]) -> None:
    """Opens every source and evaluation set once, so that the index beside it is there before runs look for it.

    Raises:
      InputError: there is no such data.
    """
    opened = set()
    for run in runs:
        on = {f"data.sources.{name}": one for name, one in run.config.data.sources.items() if one.weight > 0}
        sets = {f"eval.sets.{name}": one for name, one in run.config.eval.sets.items()}
        for field, source in (on | sets).items():
            place = source.path, source.split, source.image_root
            if place not in opened:
                records.open_source(source, log.Progress(f"index of {source.path}"), field=field)
            opened.add(place)


def command(run: Run) -> list[str]:
    return [sys.executable, "-m", "depthlm_jax", *run.arguments()]


def launch(runs: list[Run], parallel: int, retries: int, tell: Callable[[Run], str]) -> tuple[list[Run], int]:
    """Returns the runs that have failed, and the signal that ended the sweep early, 0: none did.

    Args:
      runs: those that are finished are left alone.
      parallel: processes at a time.
      retries: times that a run that has failed, or has ended early with status 0, is started again.
      tell: → what is said of a run that is finished.
    """
    waiting = [(run, 1) for run in runs if not progress.of(run).finished]
    log.say(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished before")
    active, failed, signals, passed_on = [], [], Signals(), 0
    try:
        while active or (waiting and not signals.received):
            while waiting and len(active) < parallel and not signals.received:
                active.append(_start(*waiting.pop(0)))
            if len(signals.received) > passed_on:
                passed_on = len(signals.received)
                _pass_on(active)
            time.sleep(POLL_SECONDS)
            for attempt in [attempt for attempt in active if attempt.process.poll() is not None]:
                active.remove(attempt)
                if not _end(attempt, tell) and not signals.received:
                    if attempt.number <= retries:
                        waiting.insert(0, (attempt.run, attempt.number + 1))
                    else:
                        failed.append(attempt.run)
    finally:
        _pass_on(active)  # none, but after an error of the sweep itself
        signals.restore()
    return failed, signals.received[0] if signals.received else 0


def _start(run: Run, number: int) -> Attempt:
    run.workdir.mkdir(parents=True, exist_ok=True)
    file = (run.workdir / progress.LOG).open("ab", buffering=0)
    file.write(f"--- sweep: attempt {number}, {time.strftime('%Y-%m-%d %H:%M:%S %Z')}\n".encode())
    again = f", attempt {number}" if number > 1 else ""
    log.say(f"{run.name}: started{again}, {run.workdir / progress.LOG}")
    # In a session of its own: Ctrl-C goes to the sweep alone, which then ends the run with SIGTERM, so that it saves.
    process = subprocess.Popen(
        command(run), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
    )
    return Attempt(run, number, process, file, time.monotonic())


def _pass_on(active: list[Attempt]) -> None:
    if active:
        log.say(f"stopping: {len(active)} runs save what they have")
    for attempt in active:
        attempt.process.terminate()


def _end(attempt: Attempt, tell: Callable[[Run], str]) -> bool:
    """Returns whether the run is finished, and says so."""
    run, status = attempt.run, attempt.process.returncode
    attempt.log.write(f"{progress.ENDED}{status}\n".encode())
    attempt.log.close()
    now = progress.of(run)
    took = log.clock(time.monotonic() - attempt.began)
    log.say(f"{run.name}: {now.text} in {took}" + (f", {tell(run)}" if now.finished else ""))
    return now.finished


def last_words(run: Run) -> str:
    """Returns the end of a run's log, without what the sweep wrote there."""
    lines = [line for line in progress.tail(run.workdir / progress.LOG, LAST_LINES) if "--- sweep: " not in line]
    return "\n".join(f"  | {line}" for line in lines)
