"""What the workdir of a run holds, for those who look at it: whole, unfinished, or with a torn line."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

from depthlm_jax import checkpoint, files, parameter_groups, same_run, tree
from depthlm_jax import config as config_module
from depthlm_jax.data import mixture
from depthlm_jax.errors import InputError
from depthlm_jax.models import processor, registry
from depthlm_jax.train import goodput

PICTURES = ("worst.png", "best.png", "answers.png")
NO_SET = "evaluation"  # name of the one that has no folder of its own


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the last evaluation on a set has left."""

    predictions: list[dict] = dataclasses.field(default_factory=list)  # lines of predictions.jsonl that can be drawn
    pictures: dict[str, bytes] = dataclasses.field(default_factory=dict)  # those of PICTURES that there are


@dataclasses.dataclass(frozen=True)
class History:
    """A run so far; what is not there yet is empty or None."""

    workdir: Path
    config: config_module.Config
    parameters: tuple[int, int] | None  # all, and those that are trained
    metrics: list[dict]  # by step
    starts: list[dict]
    saved_step: int  # from which it would go on; 0: from its start
    shares: dict[str, float]  # that the mixture intends for each source
    evaluations: dict[str, list[dict]]  # set → lines of evaluations.jsonl, by step
    answers: dict[str, Answers]  # by set
    spent: dict[str, float]  # of goodput.summary
    skipped: list[dict]  # steps that changed nothing
    bad: list[dict]  # records that were left out
    remarks: list[str]  # on what could not be read

    @property
    def step(self) -> int:
        """How many steps are known to be done."""
        return max([self.saved_step, *(record["step"] for record in self.metrics[-1:])])

    @property
    def sets(self) -> list[str]:
        return sorted({*self.evaluations, *self.answers})

    def values(self, name: str) -> list[tuple[float, float]]:
        """Returns (step, value) of a metric wherever it was a finite number."""
        pairs = ((record["step"], record.get(name)) for record in self.metrics)
        return [(step, value) for step, value in pairs if is_number(value)]

    def scores(self, name: str, which: str = "model") -> list[tuple[float, float]]:
        """Returns (step, δ1) of the evaluations of a set, of the `model` or of another key of their scores."""
        lines = self.evaluations.get(name, [])
        pairs = ((line["step"], (line["scores"].get(which) or {}).get("delta1")) for line in lines)
        return [(step, value) for step, value in pairs if is_number(value)]


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def read(workdir: Path) -> History:
    """Returns the history of a run; raises InputError if the folder holds none."""
    config = same_run.saved_config(workdir)
    remarks: list[str] = []

    def lines(file: Path) -> list[dict]:
        found, more = files.readable_lines(file)
        remarks.extend(more)
        return found

    metrics = {line["step"]: line for line in lines(workdir / "metrics.jsonl") if is_number(line.get("step"))}
    answers = dict(_answers(workdir / "evaluation", lines))
    evaluations = _evaluations(lines(workdir / "evaluations.jsonl"), remarks)
    if NO_SET in answers and NO_SET not in evaluations:
        evaluations |= _without_set(workdir / "evaluation" / "metrics.json")
    saved = checkpoint.saved_step(workdir)
    skipped = [line for file in sorted(workdir.glob("faults/skipped.*.jsonl")) for line in lines(file)]
    return History(
        workdir=workdir, config=config, parameters=_parameters(config, workdir / "base", remarks),
        metrics=[metrics[step] for step in sorted(metrics)], starts=lines(workdir / "starts.jsonl"),
        saved_step=saved, shares=_shares(config, workdir, saved), evaluations=evaluations,
        answers=answers, spent=goodput.summary(workdir / "goodput.jsonl"),
        skipped=sorted(skipped, key=lambda line: line["step"]),
        bad=[line for file in sorted(workdir.glob("bad_records.*.jsonl")) for line in lines(file)], remarks=remarks,
    )  # fmt: skip


def _evaluations(lines: list[dict], remarks: list[str]) -> dict[str, list[dict]]:
    """Returns the lines of each set by step; of a step that was evaluated twice, the last."""
    sets: dict[str, dict[float, dict]] = {}
    for line in lines:
        if is_number(line.get("step")) and isinstance(line.get("scores"), dict):
            sets.setdefault(str(line.get("set", NO_SET)), {})[line["step"]] = line
        else:
            remarks.append("evaluations.jsonl: a line without step or scores is left out")
    return {name: [by_step[step] for step in sorted(by_step)] for name, by_step in sorted(sets.items())}


def _without_set(file: Path) -> dict[str, list[dict]]:
    """Returns the one evaluation that metrics.json tells of, in the form of evaluations.jsonl."""
    try:
        values = files.read_json(file, "evaluate again")
        line = {"step": values["step"], "set": NO_SET, "task": values["eval"]["task"], "scores": values}
    except (InputError, KeyError):
        return {}
    return {NO_SET: [line]}


def _answers(folder: Path, lines) -> Iterator[tuple[str, Answers]]:
    """Yields the sets that have a folder, and the folder itself where it holds predictions."""
    inside = sorted(place for place in folder.glob("*") if place.is_dir())
    for name, place in [(NO_SET, folder), *((place.name, place) for place in inside)]:
        pictures = {file: (place / file).read_bytes() for file in PICTURES if (place / file).is_file()}
        said = [line for line in lines(place / "predictions.jsonl") if _is_drawn(line)]
        if pictures or said:
            yield name, Answers(said, pictures)


def _is_drawn(line: dict) -> bool:
    answer = line.get("answer")
    return is_number(line.get("truth")) and line["truth"] > 0 and (answer is None or is_number(answer))


def _shares(config: config_module.Config, workdir: Path, saved: int) -> dict[str, float]:
    """Returns them as the last checkpoint has them; before there is one, of weights alone, if sizes do not count."""
    try:
        shares = checkpoint.read_run(workdir, saved)["data"]["shares"]
    except (InputError, KeyError):  # there is none, or it has just been replaced by a newer one
        shares = {}
    settings = config.data.mixture
    if shares or settings.size_exponent:
        return shares
    return mixture.shares(config.data.sources, dict.fromkeys(config.data.sources, 1), settings)


def _parameters(config: config_module.Config, base: Path, remarks: list[str]) -> tuple[int, int] | None:
    try:
        values = files.read_json(base / "config.json", "give a complete workdir"), processor.read_preprocessor(base)
        sizes = registry.family(config.model.family).read_config(*values)
        network = registry.build(config.model.family, sizes, None, config.model.lora)
        factors = parameter_groups.factors(network.shapes, config.optim.groups, network.lora_paths)
    except InputError as error:
        remarks.append(f"the size of the model is not known: {error.parts[0]}")
        return None
    return tree.count(network.abstract), tree.count(parameter_groups.split(network.abstract, factors)[0])
