"""The runs of a sweep, and what is said of one that cannot be run."""

import json
import shlex
import sys
from pathlib import Path

import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import demo
from depthlm_jax import __main__ as program
from depthlm_jax import config as config_module
from depthlm_jax import recipes
from depthlm_jax.cli import command
from depthlm_jax.config import eval_sets, sources
from depthlm_jax.errors import InputError
from depthlm_jax.sweep import expand, place
from depthlm_jax.sweep.spec import Sweep, cross, grid, seeds, simplex

ROOT = Path(__file__).parents[2]
WEIGHTS = ["data.sources.near.weight", "data.sources.far.weight"]
FILE = """
from depthlm_jax.sweep.spec import *

def get_config():
    from configs import demo
    from depthlm_jax.config import eval_sets, sources
    config = demo.get_config()
    config.data.sources = sources({{"near": {{}}, "far": {{}}}})
    config.eval.sets = eval_sets({{"near": {{}}, "far": {{}}}})
    return config

def get_sweep():
    return {sweep}
"""


@pytest.fixture(scope="module")
def recipe():
    config = demo.get_config()
    config.data.sources = sources({"near": {}, "far": {}})
    config.eval.sets = eval_sets({"near": {}, "far": {}})
    return config


def runs_of(recipe, runs: list, given=None, workdir="w", **more) -> list[expand.Run]:
    return expand.expand(Sweep("recipe.py", runs, **more), "recipe.py", recipe, given or {}, Path(workdir))


def test_a_run_is_the_recipe_with_the_base_the_command_line_and_its_own_values(recipe):
    runs = runs_of(recipe, cross(simplex(WEIGHTS, 2), seeds(2)), {"train.max_steps": 7},
                   base={"train.max_steps": 9, "optim.learning_rate": 1})  # fmt: skip
    assert len(runs) == 6
    names = ["near=1,far=0,seed=0", "near=1,far=0,seed=1", "near=0.5,far=0.5,seed=0"]
    assert [run.name for run in runs][:3] == names
    config = runs[3].config
    assert (config.data.sources["near"].weight, config.train.seed, config.model.seed) == (0.5, 1, 1)
    assert (config.train.max_steps, config.optim.learning_rate) == (7, 1.0)
    assert config.train.compilation_cache == "w/programs" and runs[3].workdir == Path("w/runs") / runs[3].name
    assert config_module.parse(recipe).train.max_steps == 600, "the recipe itself is as it was"
    assert runs_of(recipe, [{}], {"train.compilation_cache": "x"})[0].config.train.compilation_cache == "x"


VALUES = {
    "optim.learning_rate": st.floats(1e-9, 1.0), "train.seed": st.integers(0, 2**31 - 1),
    "data.geometry.crop_width": st.tuples(st.integers(0, 500), st.integers(500, 900)),
    "eval.expectation": st.just(False), "model.random_weights": st.booleans(),
    "data.sources.near.path": st.text(st.characters(codec="utf-8", exclude_categories=("C",)), max_size=300),
    "data.sources.near.weight": st.floats(0, 1e9), "data.reference.mode": st.sampled_from(["arrow", "text_raw"]),
}  # fmt: skip


@settings(deadline=None)
@given(st.fixed_dictionaries({}, optional=VALUES), st.fixed_dictionaries({}, optional=VALUES))
def test_names_are_files_that_differ_and_depend_on_nothing_but_values(one, other):
    both = expand._names([one, other])
    assert all(0 < len(name.encode()) < 200 and "/" not in name and not name.startswith(".") for name in both)
    assert all(shlex.quote(name) == name for name in both)
    if one != other and repr(one) != repr(other):
        assert both[0] != both[1]
    assert expand._names([one]) == both[:1]


@pytest.mark.parametrize("path, value", [
    ("optim.learning_rate", 1e-05), ("optim.learning_rate", 1 / 3), ("train.seed", 3), ("eval.task", "speed"),
    ("data.geometry.crop_width", (80, 112)), ("model.random_weights", True),
    ("data.sources.near.path", "a b='c'.jsonl"), ("model.hf_config.hidden_size", 32), ("optim.weight_decay", 1),
])  # fmt: skip
def test_train_reads_from_the_command_line_what_the_sweep_has_checked(recipe, tmp_path, monkeypatch, path, value):
    file = tmp_path / "recipe.py"
    file.write_text(FILE.format(sweep="None"))
    (run,) = expand.expand(Sweep(str(file), [{path: value}]), str(file), recipe, {}, tmp_path)
    values, arguments = flags.FlagValues(), run.arguments()[1:]
    command.define_config(values)
    command.define_path(values, "workdir", "")
    monkeypatch.setattr(sys, "argv", ["depthlm_jax", *arguments])
    command._parse(values, "train", arguments)
    assert command.read_config(values) == run.config


WRONG = {
    "unknown path": ([{"optim.learning_rat": 1.0}], ["run optim.learning_rat=1: ", "mean 'optim.learning_rate'?"]),
    "unknown source": ([{"data.sources.naer.weight": 1.0}], ["unknown field", "mean 'data.sources.near.weight'?"]),
    "wrong type": ([{"train.max_steps": 1.5}], ["bad value of train.max_steps", "1.5 of type float", "int"]),
    "text for a number": ([{"optim.learning_rate": "1e-3"}], ["bad value of optim.learning_rate", "of type str"]),
    "wrong type in a dict": ([{"model.hf_config.hidden_size": "x"}], ["model.hf_config.hidden_size", "expected: int"]),
    "no value": ([{"train.seed": None}], ["bad value of train.seed", "None of type NoneType"]),
    "outside its range": ([{"optim.warmup_ratio": 2.0}], ["run optim.warmup_ratio=2", "0 to 1"]),
    "every weight zero": ([dict.fromkeys(WEIGHTS, 0.0)], ["run near=0,far=0: ", "every source is off"]),
    "the same twice": ([{"train.seed": 1}, {"train.seed": 1}], ["two runs are the same", "seed=1 and seed=1-"]),
    "the same as the recipe": ([{}, {"train.max_steps": 600}], ["two runs are the same", "base and train.max_steps="]),
}


@pytest.mark.parametrize("runs, texts", WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_with_a_run_is_told_before_any_starts(recipe, runs, texts):
    with pytest.raises(InputError) as error:
        runs_of(recipe, runs)
    assert [text for text in texts if text not in str(error.value)] == []


def test_a_metric_that_is_measured_nowhere_is_named(recipe):
    with pytest.raises(InputError, match="metric 'rooms/delta1' is measured nowhere") as error:
        runs_of(recipe, [{}], metric="rooms/delta1")
    assert "one of mean/delta1" in str(error.value) and "far/abs_rel" in str(error.value)
    without = recipe.copy_and_resolve_references()
    without.eval.sets = eval_sets({})
    with pytest.raises(InputError, match="give the recipe eval.sets"):
        runs_of(without, [{}])


def test_a_value_of_the_command_line_does_not_undo_the_sweep(recipe):
    with pytest.raises(InputError, match="--config.train.seed would undo the sweep"):
        runs_of(recipe, seeds(2), {"train.seed": 5})


def test_a_workdir_takes_more_runs_but_no_other_sweep(recipe, tmp_path):
    first = runs_of(recipe, grid({"train.seed": [0, 1]}), workdir=tmp_path)
    assert place.settle(tmp_path, first) == first
    more = runs_of(recipe, grid({"train.seed": [2, 1, 0]}), workdir=tmp_path)
    assert [run.name for run in place.settle(tmp_path, more)] == ["seed=0", "seed=1", "seed=2"]  # numbers stay
    kept = json.loads((tmp_path / "sweep.json").read_text())
    assert [run["name"] for run in kept["runs"]] == ["seed=0", "seed=1", "seed=2"]
    with pytest.raises(InputError, match=r"holds another sweep\n.*run seed=2 is there, not here"):
        place.settle(tmp_path, first)
    changed = runs_of(recipe, grid({"train.seed": [0, 1, 2]}), {"train.max_steps": 5}, workdir=tmp_path)
    with pytest.raises(InputError, match=r"seed=0, train.max_steps: None there, 5 here"):
        place.in_order(tmp_path, changed)
    with place.hold(tmp_path), pytest.raises(InputError, match="another sweep is run here\n.*found:    process "):
        place.hold(tmp_path)


def call(capsys, monkeypatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["depthlm_jax", "sweep", *arguments])  # ml_collections looks for overrides there
    status = program.main(["sweep", *arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


FILES = {
    "Sweep(__file__, [])": "a sweep without runs",
    "Sweep(__file__, [[1]])": "runs that are none\n  found:    [1]",
    "[{}]": "get_sweep() returns no sweep\n  found:    list",
    "Sweep(__file__)": "sweep.py:13: the sweep cannot be run\n  found:    TypeError",
    "Sweep('configs/none.py', [{}])": "unknown recipe 'configs/none.py'",
    "Sweep(__file__, grid({'train.seeds': [1]}))": "did you mean 'train.seed'?",
}


@pytest.mark.parametrize("sweep, text", FILES.items())
def test_a_sweep_file_that_is_none_is_an_error(capsys, monkeypatch, tmp_path, sweep, text):
    (tmp_path / "sweep.py").write_text(FILE.format(sweep=sweep))
    status, _, err = call(capsys, monkeypatch, f"--sweep={tmp_path}/sweep.py", f"--workdir={tmp_path}/w", "--dry_run")
    assert status == 1 and text in err
    assert not (tmp_path / "w").exists()


def test_dry_runs_print_what_would_run_and_leave_nothing(capsys, monkeypatch, tmp_path):
    sweep = "Sweep(__file__, cross(simplex(['data.sources.near.weight', 'data.sources.far.weight'], 1), seeds(2)))"
    (tmp_path / "sweep.py").write_text(FILE.format(sweep=sweep))
    common = [f"--sweep={tmp_path}/sweep.py", f"--workdir={tmp_path}/w", "--dry_run", "--config.train.max_steps=5"]
    status, out, _ = call(capsys, monkeypatch, *common, "--json")
    *lines, result = out.splitlines()
    assert status == 0 and len(lines) == 4 and json.loads(result)["commands"] == lines
    words = shlex.split(lines[1])
    assert words[:4] == [sys.executable, "-m", "depthlm_jax", "train"]
    expected = {f"--config={tmp_path}/sweep.py", f"--workdir={tmp_path}/w/runs/near=1,far=0,seed=1",
                "--config.train.max_steps=5", "--config.model.seed=1",
                "--config.data.sources.far.weight=0.0"}  # fmt: skip
    assert expected <= set(words)

    cluster = ["--target=slurm", "--parallel=3", "--options=--time=1:00:00"]
    words = shlex.split(call(capsys, monkeypatch, *common, *cluster)[1])
    assert words[:3] == ["sbatch", "--parsable", "--array=0-3%3"] and "--time=1:00:00" in words
    script = words.index(str(ROOT / "launch/slurm.sbatch"))
    assert words[script + 1 :] == ["sweep", *common[:2], "--run=slurm", common[3]]

    lines = call(capsys, monkeypatch, *common, "--target=gke", "--options=--topology=v5e-16")[1].splitlines()
    words = shlex.split(lines[3])
    assert words[3:7] == ["launch", "--target=gke", "--name=depthlm-w-3", "--topology=v5e-16"]
    assert f"--workdir={tmp_path}/w/runs/near=0,far=1,seed=1" in words
    assert not (tmp_path / "w").exists()


def test_a_cluster_that_is_not_there_or_takes_nothing_is_named(capsys, monkeypatch, tmp_path):
    (tmp_path / "sweep.py").write_text(FILE.format(sweep="Sweep(__file__, seeds(2))"))
    common = [f"--sweep={tmp_path}/sweep.py", f"--workdir={tmp_path}/w", "--target=slurm"]
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, err = call(capsys, monkeypatch, *common)
    assert status == 1 and "sweep: no sbatch here" in err and "--target=local" in err
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    status, _, err = call(capsys, monkeypatch, *common, "--options=--partition=x")
    assert status == 1 and "sbatch did not take the job\n  found:    sbatch: error: invalid partition" in err
    status, _, err = call(capsys, monkeypatch, *common[:2], "--run=slurm")
    assert status == 1 and "--run=slurm outside an array job" in err
    status, _, err = call(capsys, monkeypatch, *common[:2], "--run=7")
    assert status == 1 and "there is no run 7\n  found:    2 runs" in err


def test_every_sweep_that_comes_with_the_code_expands(monkeypatch):
    monkeypatch.chdir(ROOT)
    files = recipes.names("sweeps")
    assert "configs/sweeps/demo_mixture.py" in files
    for file in files:
        sweep = expand.load(file)
        assert expand.expand(sweep, sweep.recipe, recipes.load(sweep.recipe), {}, Path("w"))
