"""Workdirs as runs leave them, without a model: what `report` reads."""

import json
import math
import random
from pathlib import Path

import worlds
from PIL import Image

from depthlm_jax import config as config_module
from depthlm_jax import run as runs
from depthlm_jax.eval import metrics

SETS = {"rooms": "distance", "streets": "distance", "cars": "speed"}
ENVIRONMENT = {
    "time": "2030-01-02 03:04:05 UTC", "command": "depthlm_jax train --config=recipe.py --workdir=run",
    "mesh": {"replica": 1, "data": 2, "fsdp": 4, "tensor": 1}, "processes": 2, "device": "TPU v5 lite",
    "revision": "0123456789abcdef+", "python": "3.11.7", "jax": "0.10.2", "libtpu": None,
}  # fmt: skip


def config(changes: dict | None = None) -> config_module.Config:
    recipe = worlds.recipe(Path("scenes"), {"train.max_steps": 400} | (changes or {}))
    recipe.data.sources = config_module.sources({
        "rooms": {"path": "scenes", "weight": 3.0}, "streets": {"path": "streets.jsonl"},
        "never": {"path": "nowhere", "weight": 0.0},
    })  # fmt: skip
    return config_module.parse(recipe)


def begin(workdir: Path, changes: dict | None = None) -> config_module.Config:
    """Makes a workdir in which no step is done."""
    workdir.mkdir(parents=True)
    settings = config(changes)
    runs.write_base(settings, workdir / "base")
    config_module.save(settings, workdir / "config.json")
    return settings


def write_lines(file: Path, lines: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(workdir: Path, steps: int = 320, rate: float = 0.02, changes: dict | None = None) -> None:
    """Makes a workdir with all that a report shows: restarts, skipped steps, bad records, sets of different tasks."""
    chance, settings = random.Random(f"{rate}"), begin(workdir, changes)
    write_lines(workdir / "starts.jsonl", [ENVIRONMENT, ENVIRONMENT | {"time": "2030-01-02 04:00:00 UTC"}])
    write_lines(workdir / "metrics.jsonl", [_metrics(step, rate, chance) for step in (1, *range(10, steps + 1, 10))])
    write_lines(workdir / "goodput.jsonl", [
        {"began": 0.0, "from_step": 0, "step": steps // 2, "seconds": _seconds(1.0)},
        {"began": 0.0, "from_step": 0, "step": steps // 2 + 10, "seconds": _seconds(1.1)},
        {"began": 900.0, "from_step": steps // 2, "step": steps, "seconds": _seconds(1.0)},
    ])  # fmt: skip
    skipped = {"loss": "nan", "grad_norm": "inf", "record_ids": [f"rooms:{i}" for i in range(9)]}
    for process in (0, 1):
        lines = [skipped | {"step": step} for step in (70, 71)]
        write_lines(workdir / f"faults/skipped.process-{process}.jsonl", lines)
    reason = "streets.jsonl:7: depth is not a positive finite number\n  found: [-1.0]\n  fix: <b>correct</b> & go on"
    write_lines(workdir / "bad_records.process-0.jsonl", [{"record": "streets.jsonl:7", "reason": reason}])
    lines = []
    for step in range(80, steps + 1, 80):
        for name, task in SETS.items():
            answers = _answers(chance, 0.9 * math.exp(-rate * step / 3))
            lines.append(_evaluation(step, name, task, answers))
            write_lines(workdir / "evaluation" / name / "predictions.jsonl", answers)
    write_lines(workdir / "evaluations.jsonl", lines)
    for name in ("best.png", "worst.png", "answers.png"):
        Image.radial_gradient("L").resize((1400, 700)).save(workdir / "evaluation/rooms" / name)
    assert settings.train.max_steps >= steps


def _metrics(step: int, rate: float, chance: random.Random) -> dict:
    loss = 6 * math.exp(-rate * step) + 0.3 + chance.uniform(0, 0.05)
    return {
        "step": step, "grad_norm": loss * chance.uniform(0.5, 1.5), "loss": loss, "mean_token_accuracy": 1 - loss / 7,
        "learning_rate": 1e-2 * (1 - step / 401), "samples_per_second": chance.uniform(80, 90),
        "data_wait": chance.uniform(0, 0.02), "mfu": chance.uniform(0.4, 0.45), "share/rooms": 0.7,
        "share/streets": 0.3, "loss/rooms": loss * 0.9, "loss/streets": loss * 1.3,
    }  # fmt: skip


def _seconds(factor: float) -> dict[str, float]:
    return {"start": 20.0 * factor, "compile": 90.0, "data": 12.0 * factor, "save": 9.0, "step": 700.0 * factor}


def _answers(chance: random.Random, spread: float) -> list[dict]:
    lines = []
    for number in range(200):
        truth = 10 ** chance.uniform(-0.3, 1.5)
        answer = round(truth * math.exp(chance.gauss(0, spread)), 2)
        unreadable = number % 50 == 7
        lines.append({
            "record_id": f"rooms:{number}", "pixels": [[number, 9]], "question": "How far?", "truth": truth,
            "text": "<think> far & away </think>" if unreadable else f"{answer}",
            "answer": None if unreadable else answer, "expected": None, "mass": None,
        })  # fmt: skip
    return lines


def _evaluation(step: int, name: str, task: str, answers: list[dict]) -> dict:
    truth = [line["truth"] for line in answers]
    said = [line["answer"] for line in answers]
    constant, _ = metrics.best_constant(truth)
    names = range(len(truth))
    ranges = [
        {"low": low, "high": high, "n": 50, "delta1": 0.9 / (1 + low / 10), "abs_rel": 0.1 + low / 100}
        for low, high in ((0.0, 2.0), (2.0, 5.0), (5.0, 10.0), (10.0, None))
    ]
    scores = {
        "model": metrics.depth_metrics(said, truth, names) | {"distinct": 61.2},
        "best_constant": {"answer": constant} | metrics.depth_metrics([constant] * len(truth), truth, names),
        "expectation": None,
    }  # fmt: skip
    return {"step": step, "set": name, "task": task, "seconds": 12.3, "scores": scores, "ranges": ranges}
