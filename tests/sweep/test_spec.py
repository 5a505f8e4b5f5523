"""What sweep files are made of."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthlm_jax.errors import InputError
from depthlm_jax.sweep import spec

PATHS = ["data.sources.a.weight", "data.sources.b.weight", "data.sources.c.weight", "data.sources.d.weight"]


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 6))
def test_the_simplex_holds_every_mixture_of_its_lattice_once(count, steps):
    runs = spec.simplex(PATHS[:count], steps)
    parts = {tuple(round(weight * steps) for weight in run.values()) for run in runs}
    assert len(parts) == len(runs) == math.comb(steps + count - 1, count - 1)
    assert all(list(run) == PATHS[:count] and abs(sum(run.values()) - 1) < 1e-12 for run in runs)
    assert all(type(weight) is float and weight >= 0 for run in runs for weight in run.values())


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1), st.lists(st.integers(), min_size=1, max_size=3, unique=True), max_size=3))
def test_a_grid_holds_every_combination_once(table):
    runs = spec.grid(table)
    assert len({tuple(run.items()) for run in runs}) == len(runs) == math.prod(map(len, table.values()))
    assert all(run[path] in values for run in runs for path, values in table.items())


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 2**31), st.integers(1, 20))
def test_a_longer_random_list_begins_with_the_shorter_one(count, seed, more):
    table = {"optim.learning_rate": spec.log_uniform(1e-5, 1e-2), "optim.warmup_ratio": spec.uniform(0, 0.5)}
    choices = {"optim.name": ["adamw", "lion", "muon"]}
    runs = spec.random_search(table | choices, count, seed)
    assert spec.random_search(table | choices, count + more, seed)[:count] == runs
    alone = spec.random_search(table, count, seed)  # what is drawn for a path does not depend on the other paths
    assert [{path: run[path] for path in table} for run in runs] == alone
    assert all(1e-5 <= run["optim.learning_rate"] <= 1e-2 and 0 <= run["optim.warmup_ratio"] <= 0.5 for run in runs)
    mixtures = spec.dirichlet(PATHS, count, seed)
    assert spec.dirichlet(PATHS, count + more, seed)[:count] == mixtures
    assert all(abs(sum(run.values()) - 1) < 1e-3 and min(run.values()) >= 0 for run in mixtures)


def test_random_numbers_fill_their_range_and_choices_are_all_taken():
    table = {"a": spec.log_uniform(1e-4, 1.0), "b": ["x", "y"]}
    runs = spec.random_search(table, 400, seed=0)
    small = sum(run["a"] < 1e-2 for run in runs)  # each ratio is equally likely: half of them
    assert 160 < small < 240 and 160 < sum(run["b"] == "x" for run in runs) < 240
    assert len({run["a"] for run in runs}) > 390


def test_lists_are_crossed_and_put_behind_one_another():
    runs = spec.cross(spec.grid({"a": [1, 2]}), spec.seeds(2) + [{"train.seed": 9}])
    assert len(runs) == 6 and runs[0] == {"a": 1, "train.seed": 0, "model.seed": 0}
    assert runs[-1] == {"a": 2, "train.seed": 9}
    assert spec.cross() == [{}]


def test_what_cannot_be_swept_is_named():
    with pytest.raises(InputError, match="optim.name is swept twice\n.*list 1 and list 3"):
        spec.cross([{"optim.name": "lion"}], spec.seeds(1), [{"optim.name": "muon"}])
    wrong = (spec.simplex, PATHS, 0), (spec.dirichlet, PATHS, 0, 0), (spec.random_search, {}, -1, 0)
    for function, *arguments in wrong:
        with pytest.raises(InputError, match="is no count\n.*\n.*a whole number from 1 on"):
            function(*arguments)
