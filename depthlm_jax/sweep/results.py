"""What came out of a sweep: numbers of each run, and of runs that differ in their seeds alone, with intervals."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import special

from depthlm_jax import checkpoint, files
from depthlm_jax.config_rules import LOWER
from depthlm_jax.sweep import progress
from depthlm_jax.sweep.expand import MEAN, Run
from depthlm_jax.sweep.spec import SEEDS, Values
from depthlm_jax.train import goodput

CONFIDENCE = 0.95
SHOWN = ("delta1", "abs_rel")  # of each evaluation set, beside the metric that ranks


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one run."""

    run: Run
    progress: progress.Progress
    numbers: dict[str, float]  # NaN: not known

    def number(self, name: str) -> float:
        return self.numbers.get(name, math.nan)


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone."""

    values: Values
    results: list[Result]  # of those that are finished
    runs: int  # also those that are not

    def estimate(self, name: str) -> tuple[float, float]:
        """Returns the mean over runs and half its interval."""
        return interval([result.number(name) for result in self.results])


def interval(numbers: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and half the confidence interval of it by Student's t; NaN where there are too few.

    >>> [round(number, 3) for number in interval([0.5, 0.6, 0.7])]
    [0.6, 0.248]
    """
    count = len(numbers)
    mean = float(np.mean(numbers)) if count else math.nan
    if count < 2:
        return mean, math.nan
    quantile = special.stdtrit(count - 1, (1 + CONFIDENCE) / 2)
    return mean, float(quantile * np.std(numbers, ddof=1) / math.sqrt(count))


def collect(runs: Iterable[Run], metric: str) -> list[Result]:
    """Returns what is known of each run."""
    return [_result(run, metric) for run in runs]


def _result(run: Run, metric: str) -> Result:
    now = progress.of(run)
    measures = dict.fromkeys((metric.partition("/")[2], *SHOWN))
    numbers = {f"{name}/{one}": _score(scores, one) for name, scores in now.scores.items() for one in measures}
    if len(now.scores) == len(run.config.eval.sets):
        for one in measures:
            numbers[f"{MEAN}/{one}"] = float(np.mean([numbers[f"{name}/{one}"] for name in now.scores]))
    return Result(run, now, numbers | _training(run, now.step))


def _score(scores: dict, measure: str) -> float:
    value = scores["model"].get(measure)
    return math.nan if value is None else value  # JSON has no NaN


def _training(run: Run, step: int) -> dict[str, float]:
    """Returns the last loss, also of each source, how many samples there were, each source's share, and the cost."""
    numbers, workdir = {}, run.workdir
    lines = [line for line in files.read_lines(workdir / "metrics.jsonl") if line["step"] <= step]
    if lines:
        numbers |= {name: value for name, value in lines[-1].items() if name == "loss" or name.startswith("loss/")}
    if step:
        data = checkpoint.read_run(workdir, step)["data"]
        ahead = collections.Counter(source for source, _ in data["waiting"])  # planned, not trained on
        seen = {source: draws - ahead[source] for source, draws in data["draws"].items()}
        seen = dict.fromkeys(run.config.data.sources, 0) | seen
        numbers |= {f"share/{source}": count / sum(seen.values()) for source, count in seen.items()}
        numbers["samples"] = sum(seen.values())
    starts = files.read_lines(workdir / "starts.jsonl")
    if starts:
        spent, devices = goodput.summary(workdir / "goodput.jsonl"), math.prod(starts[-1]["mesh"].values())
        numbers["device_seconds"] = devices * sum(spent[kind] for kind in (*goodput.SPENT, "lost"))
    return numbers


def groups(results: Sequence[Result], metric: str) -> list[Group]:
    """Returns the runs by what they differ in beside seeds, the best first, those without a result last."""
    together: dict[str, list[Result]] = {}
    for result in results:
        together.setdefault(repr(_unseeded(result.run.values)), []).append(result)
    found = [
        Group(_unseeded(some[0].run.values), [one for one in some if one.progress.finished], len(some))
        for some in together.values()
    ]
    return sorted(found, key=lambda group: rank(group.estimate(metric)[0], metric))


def _unseeded(values: Values) -> Values:
    return {path: value for path, value in sorted(values.items()) if path not in SEEDS}


def rank(mean: float, metric: str) -> float:
    """Returns the key by which scores are sorted, the best first."""
    lower = metric.partition("/")[2] in LOWER
    return math.inf if math.isnan(mean) else mean if lower else -mean


def swept_paths(results: Sequence[Result]) -> list[str]:
    """Returns the paths whose values are compared, in the order of the sweep."""
    return list(dict.fromkeys(path for result in results for path in result.run.values if path not in SEEDS))
