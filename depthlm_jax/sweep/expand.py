"""The runs of a sweep: name, config, and the arguments of `train` that make it; all checked before any starts."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import ml_collections

from depthlm_jax import config as config_module
from depthlm_jax import recipes
from depthlm_jax.config_errors import bad_value
from depthlm_jax.config_rules import HIGHER, LOWER
from depthlm_jax.errors import InputError
from depthlm_jax.sweep.spec import SEEDS, Sweep, Values

MEAN = "mean"  # stands for a set: the mean over all
NAME_LENGTH = 150
HASH_LENGTH = 6
CACHE = "train.compilation_cache"


@dataclasses.dataclass(frozen=True)
class Run:
    name: str
    values: Values  # that the sweep gives it
    changes: Values  # of the recipe, those among them
    recipe: str
    workdir: Path
    config: config_module.Config

    def arguments(self) -> list[str]:
        """Returns what follows `python -m depthlm_jax`."""
        changes = [f"--config.{path}={text(value)}" for path, value in self.changes.items()]
        return ["train", f"--config={self.recipe}", f"--workdir={self.workdir}", *changes]


def load(place: str) -> Sweep:
    """Returns what the `get_sweep` of a sweep file returns; `place` may end in `:` and its argument.

    Raises:
      InputError: it cannot be run, or returns something else.
    """
    sweep = recipes.call(place, "get_sweep", "sweep", recipes.names("sweeps"))
    file = place.split(":", 1)[0]
    if not isinstance(sweep, Sweep):
        raise InputError(
            f"{file}: get_sweep() returns no sweep", found=type(sweep).__name__,
            expected="depthlm_jax.sweep.spec.Sweep(recipe=…, runs=…)", fix="end get_sweep() with: return Sweep(…)",
        )  # fmt: skip
    strange = [run for run in sweep.runs if type(run) is not dict] if type(sweep.runs) is list else [sweep.runs]
    if strange or not sweep.runs:
        raise InputError(
            f"{file}: {'runs that are none' if strange else 'a sweep without runs'}",
            found=repr(strange[0])[:100] if strange else "runs=[]", expected="a list of {config path: value}",
            fix="make one with grid, simplex, random_search, … of depthlm_jax.sweep.spec",
        )  # fmt: skip
    return sweep


def expand(sweep: Sweep, place: str, recipe: ml_collections.ConfigDict, given: Values, workdir: Path) -> list[Run]:
    """Returns the runs in the order of the sweep, each parsed as `train` will do it.

    Args:
      sweep: of a sweep file.
      place: of the recipe.
      recipe: as it stands there.
      given: values of the command line; they hold for all runs and go before those of the sweep's `base`.
      workdir: of the sweep.

    Raises:
      InputError: an unknown path, a value that its field does not take, no weight above 0, two runs that are the same,
        a metric that is not measured.
    """
    swept = {path for run in sweep.runs for path in run}
    both = sorted(swept & given.keys())
    if both:
        raise InputError(
            f"sweep: --config.{both[0]} would undo the sweep", found=f"{len(sweep.runs)} runs with values of their own",
            expected="fields that are the same in all runs", fix="leave it out, or change the sweep file",
        )  # fmt: skip
    base = {path: value for path, value in (sweep.base | given).items() if path not in swept}
    if not recipes.changed(recipe, base).train.compilation_cache and CACHE not in swept:
        base[CACHE] = str(workdir / "programs")
    runs, names = [], _names(sweep.runs)
    for name, values in zip(names, sweep.runs, strict=True):
        try:
            config = _parse(recipe, base | values)
        except InputError as error:
            raise error.of(f"sweep, run {name}") from error
        runs.append(Run(name, values, base | values, place, workdir / "runs" / name, config))
    _check_different(runs)
    _check_metric(sweep.metric, runs)
    return runs


def _parse(recipe: ml_collections.ConfigDict, changes: Values) -> config_module.Config:
    for path, value in changes.items():
        if not isinstance(value, bool | int | float | str | tuple):
            raise bad_value(path, f"{value!r} of type {type(value).__name__}", "a number, text, True, False or a tuple")
    config = config_module.parse(recipes.changed(recipe, changes))
    if not any(source.weight for source in config.data.sources.values()):
        raise InputError(
            "config: every source is off", found=f"weight 0 of {sorted(config.data.sources)}",
            expected="a weight above 0", fix="leave this run out of the sweep",
        )  # fmt: skip
    return config


def text(value: object) -> str:
    """Returns a value as the command line takes it."""
    return value if isinstance(value, str) else repr(value)


def short(path: str) -> str:
    """Returns what stands for a config path in names and tables.

    >>> [short(path) for path in ("data.sources.near.weight", "optim.learning_rate")]
    ['near', 'optim.learning_rate']
    """
    source = re.fullmatch(r"data\.sources\.([^.]+)\.weight", path)
    return source[1] if source else ".".join(path.split(".")[-2:])


def _names(runs: Iterable[Values]) -> list[str]:
    """Returns a name for each run, made of its values; the same values have the same name in another sweep, too."""
    names: list[str] = []
    for values in runs:
        name = _name(values)
        if name in names or len(name) > NAME_LENGTH:  # numbers that differ in later digits; long texts
            digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=repr).encode()).hexdigest()
            name = f"{name[:NAME_LENGTH]}-{digest[:HASH_LENGTH]}"
        names.append(name)
    return names


def _name(values: Values) -> str:
    repeats = {value for path, value in values.items() if path in SEEDS}
    parts = [(short(path), value) for path, value in values.items() if path not in SEEDS or len(repeats) > 1]
    parts += [("seed", value) for value in repeats if len(repeats) == 1]
    written = (f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in parts)
    return re.sub(r"[^\w.,=+-]+", "_", ",".join(written), flags=re.ASCII) or "base"


def _check_different(runs: list[Run]) -> None:
    first: dict[str, Run] = {}
    for run in runs:
        leaves = json.dumps(config_module.flatten(run.config), sort_keys=True)
        same = first.setdefault(leaves, run)
        if same is not run:
            raise InputError(
                "sweep: two runs are the same", found=f"{same.name} and {run.name}: {run.values}",
                expected="runs that differ; repetitions differ in their seeds", fix="leave one out, or sweep `seeds`",
            )  # fmt: skip


def _check_metric(metric: str, runs: list[Run]) -> None:
    sets = set.intersection(*(set(run.config.eval.sets) for run in runs))
    known = [f"{name}/{measure}" for name in (MEAN, *sorted(sets)) for measure in (*HIGHER, *LOWER)] if sets else []
    if metric not in known:
        raise InputError(
            f"sweep: the metric {metric!r} is measured nowhere", found=f"eval.sets {sorted(sets)}",
            expected=f"one of {', '.join(known)}" if known else "a recipe with eval.sets, which training evaluates",
            fix="set `metric` in the sweep file" if known else "give the recipe eval.sets",
        )  # fmt: skip
