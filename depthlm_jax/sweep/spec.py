"""What a sweep file says: a base recipe, the runs that are made of it, and how they are ranked.

Runs are a list of {config path: value}. The functions here return such lists; a list written by hand is one too.
`cross` takes each of one list with each of another, `+` puts one list behind another.
"""

import dataclasses
import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from depthlm_jax.errors import InputError

SEEDS = ("train.seed", "model.seed")  # runs that differ in these alone repeat each other
DIGITS = 4  # of a number that is drawn, so that names and commands can be read

Values = dict[str, object]
Draw = Callable[[np.random.Generator], float]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What `get_sweep` of a sweep file returns."""

    recipe: str  # that the runs are made of, for example configs/demo.py
    runs: list[Values]  # what differs between them
    base: Values = dataclasses.field(default_factory=dict)  # what is another value than the recipe's in all of them
    metric: str = "mean/delta1"  # that ranks them: SET/METRIC; the set `mean` is the mean over eval.sets
    retries: int = 1  # times that a failed run is started again


def grid(table: Mapping[str, Sequence]) -> list[Values]:
    """Returns every combination of the values.

    >>> grid({"train.seed": [0, 1], "optim.name": ["lion"]})
    [{'train.seed': 0, 'optim.name': 'lion'}, {'train.seed': 1, 'optim.name': 'lion'}]
    """
    return [dict(zip(table, values, strict=True)) for values in itertools.product(*table.values())]


def cross(*lists: list[Values]) -> list[Values]:
    """Returns each of the first list together with each of the second, and so on.

    Raises:
      InputError: two lists give a value to the same path.
    """
    owners: dict[str, int] = {}
    for number, runs in enumerate(lists):
        for path in sorted({path for run in runs for path in run}):
            if owners.setdefault(path, number) != number:
                raise InputError(
                    f"sweep: {path} is swept twice", found=f"in list {owners[path] + 1} and list {number + 1} of cross",
                    expected="one list for each config path", fix="take it out of one of them",
                )  # fmt: skip
    return [{path: value for part in parts for path, value in part.items()} for parts in itertools.product(*lists)]


def seeds(count: int, paths: Sequence[str] = SEEDS) -> list[Values]:
    """Returns repetitions: seeds 0, 1, … for data order and first weights."""
    return [dict.fromkeys(paths, number) for number in range(count)]


def simplex(paths: Sequence[str], steps: int) -> list[Values]:
    """Returns all weights that are multiples of 1 / steps and add up to 1.

    >>> simplex(["data.sources.near.weight", "data.sources.far.weight"], steps=2)[1]
    {'data.sources.near.weight': 0.5, 'data.sources.far.weight': 0.5}
    """
    _check_count("steps", steps)
    bars = itertools.combinations(range(steps + len(paths) - 1), len(paths) - 1)
    edges = ((-1, *places, steps + len(paths) - 1) for places in bars)
    parts = ([after - before - 1 for before, after in itertools.pairwise(places)] for places in edges)
    return [{path: part / steps for path, part in zip(paths, counts, strict=True)} for counts in parts][::-1]


def dirichlet(paths: Sequence[str], count: int, seed: int, concentration: float = 1.0) -> list[Values]:
    """Returns weights that add up to 1, drawn at random; the same seed gives the same ones, also of a longer list.

    Args:
      paths: of the weights.
      count: of runs.
      seed: of the draws.
      concentration: 1: all mixtures are equally likely; above, even ones are likelier; below, those of few sources.
    """
    _check_count("count", count)
    draws = (np.random.default_rng((seed, number)).dirichlet([concentration] * len(paths)) for number in range(count))
    return [{path: _rounded(weight) for path, weight in zip(paths, weights, strict=True)} for weights in draws]


def random_search(table: Mapping[str, Sequence | Draw], count: int, seed: int) -> list[Values]:
    """Returns values drawn at random; the same seed gives the same ones, also of a longer list or with other paths.

    Args:
      table: path → `uniform`, `log_uniform`, or the values to choose from.
      count: of runs.
      seed: of the draws.
    """
    _check_count("count", count)

    def value(path: str, number: int) -> object:
        generator, choice = np.random.default_rng((seed, zlib.crc32(path.encode()), number)), table[path]
        return choice(generator) if callable(choice) else choice[int(generator.integers(len(choice)))]

    return [{path: value(path, number) for path in table} for number in range(count)]


def uniform(low: float, high: float) -> Draw:
    """Returns a draw between low and high."""
    return lambda generator: _rounded(generator.uniform(low, high))


def log_uniform(low: float, high: float) -> Draw:
    """Returns a draw between low and high, both > 0, each ratio equally likely."""
    ends = math.log(low), math.log(high)
    return lambda generator: _rounded(math.exp(generator.uniform(*ends)))


def _rounded(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")


def _check_count(name: str, count: int) -> None:
    if type(count) is not int or count < 1:
        raise InputError(
            f"sweep: {name} is no count", found=repr(count), expected="a whole number from 1 on", fix=f"set {name}",
        )  # fmt: skip
