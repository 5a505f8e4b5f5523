"""Where the time of a run went, over all its starts: `workdir/goodput.jsonl`.

A start writes what it has spent so far whenever it writes metrics, when it has saved, and at its end: a killed one
leaves its last line. Steps that a later start had to do again are lost, and so is what came after the last line.
"""

import time
from contextlib import contextmanager
from pathlib import Path

from depthlm_jax import files

SPENT = ("start", "compile", "data", "step", "save", "evaluation")  # until the first step; …; waiting for a save; …
NOTED = ("start", "compile", "data", "save", "evaluation")  # what is left of the time are steps


class Ledger:
    """Of one start; the process that writes metrics has a file."""

    def __init__(self, file: Path | None, step: int, began: float):
        self.lines, self.began, self.seconds = file and files.Lines(file), began, dict.fromkeys(NOTED, 0.0)
        self.identity = {"began": began, "from_step": step}

    @contextmanager
    def spend(self, kind: str):
        """Counts the time inside as one of NOTED."""
        start = time.monotonic()
        yield
        self.seconds[kind] += time.monotonic() - start

    def write(self, step: int) -> None:
        """Adds a line: seconds so far."""
        spent = self.seconds | {"step": max(0.0, time.time() - self.began - sum(self.seconds.values()))}
        if self.lines:
            self.lines.add(self.identity | {"step": step, "seconds": spent})


def summary(file: Path) -> dict[str, float]:
    """Returns seconds by kind over all starts, those of lost steps as `lost`, and the number of starts."""
    starts: dict[float, list[dict]] = {}
    for record in files.readable_lines(file)[0]:
        starts.setdefault(record["began"], []).append(record)
    total = dict.fromkeys((*SPENT, "lost"), 0.0)
    ordered = [starts[began] for began in sorted(starts)]
    for records, following in zip(ordered, [*ordered[1:], None], strict=False):
        kept_until = following[0]["from_step"] if following else records[-1]["step"]
        kept = next((record for record in reversed(records) if record["step"] <= kept_until), None)
        spent = kept["seconds"] if kept else dict.fromkeys(SPENT, 0.0)
        for kind in SPENT:
            total[kind] += spent.get(kind, 0.0)  # a kind may be newer than the line
        total["lost"] += sum(records[-1]["seconds"].values()) - sum(spent.values())
    return total | {"starts": len(ordered)}


def text(found: dict[str, float]) -> str:
    """Returns one line for people."""
    whole = sum(found[kind] for kind in (*SPENT, "lost")) or 1.0
    shares = ", ".join(f"{kind} {found[kind]:.1f} s ({found[kind] / whole:.0%})" for kind in (*SPENT, "lost"))
    return f"goodput over {found['starts']} start{'s' * (found['starts'] != 1)}: {shares}"
