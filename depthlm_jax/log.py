"""What a run says while it works: lines on stdout, and metrics as JSON lines."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from depthlm_jax import files

LINE_SECONDS = 5.0  # between two progress lines of a long loop


def say(text: str) -> None:
    """Prints at once, also through a pipe."""
    print(text, flush=True)


def clock(seconds: float) -> str:
    """Returns '1:02:03' or '2:03'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """Prints how far a loop is, how fast and for how long still, every few seconds and at its end."""

    def __init__(self, what: str):
        self.what, self.start, self.said = what, time.monotonic(), 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self.said < LINE_SECONDS:
            return
        self.said = now
        rate = done / max(now - self.start, 1e-9)
        left = f"{clock((total - done) / max(rate, 1e-9))} left" if done < total else f"took {clock(now - self.start)}"
        say(f"{self.what}: {done}/{total} · {rate:.1f}/s · {left}")


def track(items: Iterable, total: int, what: str) -> Iterator:
    """Yields the items, with progress lines."""
    progress = Progress(what)
    for done, item in enumerate(items, start=1):
        yield item
        progress(done, total)


class Journal:
    """Metrics of a run: one line a record on stdout and in `metrics.jsonl`."""

    def __init__(self, workdir: Path):
        self.file = Path(workdir) / "metrics.jsonl"
        self.lines = files.Lines(self.file)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.lines.add({"step": step, **metrics})

    def read(self) -> list[dict]:
        """Returns the records; of a step that was written twice (before and after a resume), the last."""
        return list({record["step"]: record for record in files.read_lines(self.file)}.values())
