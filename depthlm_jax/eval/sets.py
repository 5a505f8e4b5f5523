"""Evaluation sets: which are due while a run trains, and what is kept of their answers."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from depthlm_jax import config as config_module
from depthlm_jax import files, log, sharding
from depthlm_jax.config_rules import LOWER
from depthlm_jax.errors import InputError
from depthlm_jax.eval import evaluate, report
from depthlm_jax.run import Run
from depthlm_jax.tracking import Tracker

FOLDER, FILE = "evaluation", "evaluations.jsonl"  # of a workdir: the last answers of each set; a line each time
COLUMNS = ["delta1", "abs_rel", "rmse", "silog", "parse_failure_rate", "best constant δ1", "n"]


class Sets:
    """The sets of a run's config."""

    def __init__(self, run: Run, folder: Path | None = None):
        """Raises InputError if the mesh cannot share the rows of an evaluation.

        Args:
          run: whose config has the sets.
          folder: for answers and pictures; None: that of the workdir.
        """
        self.config, self.run, self.decoder, self.folder = run.config, run, None, folder or run.workdir / FOLDER
        self.lines = files.Lines(run.workdir / FILE) if jax.process_index() == 0 else None
        parts = sharding.row_devices(run.mesh)
        if self.config.eval.sets and self.config.eval.batch_rows % parts:
            raise InputError(
                "config: the devices cannot share the rows of an evaluation",
                found=f"eval.batch_rows={self.config.eval.batch_rows} on {parts} devices with rows of their own",
                expected=f"a multiple of {parts}", fix="set --config.eval.batch_rows",
            )  # fmt: skip

    def due(self, step: int) -> list[str]:
        """Returns the sets that are to be evaluated after a step."""
        every = {name: one.every_steps for name, one in self.config.eval.sets.items()}
        last = step == self.config.train.max_steps
        return [name for name, steps in every.items() if last or (steps and step and step % steps == 0)]

    def missing(self, step: int) -> list[str]:
        """Returns the sets that are due after a step and were not evaluated, because the run was stopped."""
        done = {line["set"] for line in read(self.run.workdir) if line["step"] == step}
        return [name for name in self.due(step) if name not in done]

    def judge(self, names: list[str]) -> bool:
        """Returns whether one of the sets says which checkpoint is the best."""
        return self.config.train.keep_best.partition("/")[0] in names

    def evaluate(
        self, step: int, names: list[str], parameters: dict, watch: Callable[[str], None],
        tracker: Tracker | None = None,
    ) -> dict[str, dict]:  # fmt: skip
        """Returns the scores of the sets by name; all processes call it, the first one writes and prints.

        Args:
          step: that is done.
          names: of sets.
          parameters: on the mesh.
          watch: is told what is done.
          tracker: is given the results; None: nobody is.
        """
        self.decoder = self.decoder or evaluate.make_decoder(self.run)
        found = {}
        for name in names:
            start = time.monotonic()
            run = dataclasses.replace(self.run, config=of_set(self.config, name))
            result = evaluate.evaluate(
                run, parameters, self.decoder, lambda done, of, name=name: watch(f"answers of {name}, {done}/{of}")
            )
            found[name] = result.scores()
            if self.lines:
                line = {"step": step, "set": name, "task": run.config.eval.task, "seconds": time.monotonic() - start}
                self.lines.add(line | {"scores": found[name], "ranges": result.ranges()})
                _save(result, step, run.config.eval, self.folder / name)
            if tracker:
                sheet = self.folder / name / "answers.png"
                tracker.evaluation(step, name, found[name], result.truth, result.numbers, sheet)
        if self.lines:
            log.say(f"evaluation after step {step}\n{table(found)}")
        return found

    def scores(self) -> dict[int, float]:
        """Returns what train.keep_best is judged by, by step, the higher the better."""
        name, _, metric = self.config.train.keep_best.partition("/")
        values = {one["step"]: one["scores"]["model"][metric] for one in read(self.run.workdir) if one["set"] == name}
        return {step: -v if metric in LOWER else v for step, v in values.items() if v is not None}


def of_set(config: config_module.Config, name: str) -> config_module.Config:
    """Returns the config whose eval.source is one of eval.sets."""
    one = dataclasses.asdict(config.eval.sets[name])
    source = config_module.Source(**{field.name: one[field.name] for field in dataclasses.fields(config_module.Source)})
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, source=source, samples=one["samples"]))


def _save(result: evaluate.Result, step: int, settings: config_module.Eval, folder: Path) -> None:
    """Writes answers and pictures of a set; a disk that does not take them ends no training."""
    try:
        evaluate.save(result, step, settings, folder)
    except (InputError, OSError) as error:
        log.say(f"warning: answers of {folder.name} after step {step} are not kept: {error}")


def read(workdir: Path) -> list[dict]:
    """Returns the lines of the evaluations; of a set that was evaluated twice after a step, the last."""
    return list({(line["step"], line["set"]): line for line in files.read_lines(workdir / FILE)}.values())


def table(scores: Mapping[str, dict]) -> str:
    """Returns a line for each set and, of several, the mean."""
    rows = [
        (name, one["model"] | {"best constant δ1": one["best_constant"]["delta1"]}) for name, one in scores.items()
    ]
    if len(rows) > 1:
        kinds = [column for column in COLUMNS if column != "n" and None not in [row[column] for _, row in rows]]
        rows.append(("mean", {kind: sum(row[kind] for _, row in rows) / len(rows) for kind in kinds}))
    return report.table(rows, COLUMNS)
