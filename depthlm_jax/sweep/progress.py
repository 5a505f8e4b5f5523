"""How far a run has come, read from its workdir alone: nothing here asks for a device."""

import dataclasses
from pathlib import Path

from depthlm_jax import checkpoint, files
from depthlm_jax.sweep.expand import Run

EVALUATIONS = "evaluations.jsonl"
LOG = "log.txt"
ENDED = "--- sweep: exit status "  # begins the line that the log of an attempt ends with


@dataclasses.dataclass(frozen=True)
class Progress:
    step: int  # of the last checkpoint; 0: none
    scores: dict[str, dict]  # of each set after the last step that it was evaluated at
    missing: list[str]  # sets that were not evaluated after the run's last step
    finished: bool
    text: str  # for people


def of(run: Run) -> Progress:
    """Returns how far a run has come; it is finished when its last step is saved and evaluated."""
    step, last = checkpoint.saved_step(run.workdir), run.config.train.max_steps
    lines = files.read_lines(run.workdir / EVALUATIONS)
    latest = {line["set"]: line for line in sorted(lines, key=lambda line: line["step"])}
    sets = run.config.eval.sets
    missing = [name for name in sets if name not in latest or latest[name]["step"] < last]
    scores = {name: latest[name]["scores"] for name in sets if name in latest}
    finished = step >= last and not missing
    return Progress(step, scores, missing, finished, "finished" if finished else _text(run, step, last))


def _text(run: Run, step: int, last: int) -> str:
    status = exit_status(run.workdir / LOG)
    if status not in (None, 0):
        return f"failed after step {step}/{last}, exit status {status}"
    if not (run.workdir / "config.json").exists():
        return "not begun"
    return f"step {step}/{last}" if step < last else "not evaluated"


def exit_status(file: Path) -> int | None:
    """Returns the exit status of the last attempt that a log tells of; None: it is still running, or there was none."""
    last = tail(file, 1)
    return int(last[0].removeprefix(ENDED)) if last and last[0].startswith(ENDED) else None


def tail(file: Path, count: int) -> list[str]:
    """Returns the last lines of a log."""
    return file.read_text(errors="replace").splitlines()[-count:] if file.exists() else []
