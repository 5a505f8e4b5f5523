"""What a sweep's report says, against numbers worked out by hand."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import demo
from depthlm_jax import config as config_module
from depthlm_jax.config import eval_sets, sources
from depthlm_jax.errors import InputError
from depthlm_jax.sweep import expand, progress, report, results
from depthlm_jax.sweep.spec import Sweep, cross, grid, seeds, simplex

SETS = ("rooms", "streets")
NAMES = ("near", "far", "deep", "wet")


def weights(count: int) -> list[str]:
    return [f"data.sources.{name}.weight" for name in NAMES[:count]]


def make(runs: list, workdir: Path, metric: str = "mean/delta1", count: int = 2) -> tuple[Sweep, list[expand.Run]]:
    recipe = demo.get_config()
    recipe.data.sources = sources({name: {} for name in NAMES[:count]})
    recipe.eval.sets = eval_sets({name: {} for name in SETS})
    recipe.train.max_steps = 100
    sweep = Sweep("recipe.py", runs, metric=metric)
    return sweep, expand.expand(sweep, "recipe.py", recipe, {}, workdir)


def write_lines(file: Path, lines: list[dict]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def evaluation(step: int, name: str, delta1: float, abs_rel: float | None) -> dict:
    model = {"delta1": delta1, "abs_rel": abs_rel, "rmse": 1.0, "silog": 9.0, "parse_failure_rate": 0.0, "n": 512}
    scores = {"model": model, "expectation": None, "best_constant": {"answer": 2.5, "delta1": 0.2}}
    ranges = [{"low": 0.0, "high": 2.0, "n": 120, "delta1": 0.5}]
    return {"step": step, "set": name, "task": "distance", "seconds": 12.3, "scores": scores, "ranges": ranges}


def train(run: expand.Run, delta1: tuple, step: int = 100, evaluated: int | None = None) -> None:
    """Leaves what a run leaves in its workdir: 3000 samples, four devices for 30 s and 70 s."""
    on = {name: source.weight for name, source in run.config.data.sources.items() if source.weight}
    draws = {name: 10 + round(3000 * weight / sum(on.values())) for name, weight in on.items()}
    waiting = [[name, number] for name in on for number in range(10)]
    folder = run.workdir / "checkpoints" / str(step) / "run"
    folder.mkdir(parents=True)
    (folder / "metadata").write_text(json.dumps({"data": {"draws": draws, "waiting": waiting}}))
    config_module.save(run.config, run.workdir / "config.json")
    early = evaluation(50, "rooms", 0.01, None)
    last = step if evaluated is None else evaluated
    errors = [0.5 - one / 2 if one else None for one in delta1]  # of answers that cannot be read there are none
    lines = [evaluation(last, *one) for one in zip(SETS, delta1, errors, strict=True)]
    write_lines(run.workdir / "evaluations.jsonl", [early, *lines])
    metrics = [{"step": 50, "loss": 2.0}, {"step": step, "loss": 1.25, "loss/near": 1.5}]
    write_lines(run.workdir / "metrics.jsonl", metrics)
    write_lines(run.workdir / "starts.jsonl", [{"mesh": {"replica": 1, "data": 2, "fsdp": 2, "tensor": 1}}])
    spent = dict.fromkeys(("start", "compile", "data", "save", "evaluation"), 10.0)
    first, second = spent | {"step": 50.0}, spent | {"step": 20.0}
    starts = [{"began": 0.0, "from_step": 0, "step": 50, "seconds": first},
              {"began": 9.0, "from_step": 50, "step": step, "seconds": second}]  # fmt: skip
    write_lines(run.workdir / "goodput.jsonl", starts)


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_intervals_are_those_of_a_table_of_students_t():
    assert results.interval([0.5, 0.6, 0.7]) == pytest.approx((0.6, 4.302653 * 0.1 / math.sqrt(3)), abs=1e-6)
    assert results.interval([0.2, 0.4]) == pytest.approx((0.3, 12.706205 * 0.1), abs=1e-6)
    assert results.interval([1.0] * 31) == (1.0, 0.0)
    mean, half = results.interval([0.5])
    assert mean == 0.5 and math.isnan(half)
    assert all(math.isnan(number) for number in results.interval([]))
    assert math.isnan(results.interval([0.5, math.nan])[0])


@pytest.mark.filterwarnings("error")
def test_runs_that_differ_in_seeds_are_averaged_and_ranked(tmp_path, capsys):
    sweep, runs = make(cross(simplex(weights(2), 2), seeds(3)), tmp_path)
    even = [(0.6, 0.4), (0.7, 0.5), (0.8, 0.6)]  # means 0.5, 0.6, 0.7
    for run, scores in zip(runs[3:6], even, strict=True):
        train(run, scores)
    train(runs[0], (0.9, 0.1))  # alone: no interval
    train(runs[1], (1.0, 1.0), step=50)  # not finished: not counted
    result = report.write(sweep, runs, tmp_path)

    text = (tmp_path / "report.md").read_text()
    table = rows(text.split("## Runs")[0])
    assert table[0] == ["", "near", "far", "runs", "mean/delta1", "rooms/delta1", "streets/delta1", "mean/abs_rel",
                        "loss", "loss of near", "share of far", "share of near", "samples", "device-hours"]  # fmt: skip
    assert table[2] == ["1", "0.5", "0.5", "3", "0.600 ± 0.248", "0.700 ± 0.248", "0.500 ± 0.248", "0.200 ± 0.124",
                        "1.250", "1.500", "0.500", "0.500", "3,000", "0.189"]  # 4 devices × 170 s; fmt: skip
    assert table[3][:6] == ["2", "1", "0", "1 of 3", "0.500", "0.900"] and table[3][10:12] == ["0.000", "1.000"]
    assert table[4][:6] == ["3", "0", "1", "0 of 3", "–", "–"]
    assert "4 of 9 runs of recipe.py are finished. Ranked by mean/delta1." in text
    assert "δ1 of the best constant answer: rooms: 0.200 (2.50), streets: 0.200 (2.50)." in text
    assert "![mixture](mixture.png)" in text and (tmp_path / "mixture.png").exists()

    status = {row[0]: row[1] for row in rows(text.split("## Runs")[1])[2:]}
    assert status["near=1,far=0,seed=0"] == "finished" and status["near=1,far=0,seed=1"] == "step 50/100"
    assert status["near=0,far=1,seed=2"] == "not begun"
    assert result["ranked"][0]["mean/delta1"] == pytest.approx(0.6) and result["ranked"][2]["mean/delta1"] is None
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert "far=0.5, near=0.5" in capsys.readouterr().out

    page = (tmp_path / "report.html").read_text()
    assert "4 of 9 runs of recipe.py are finished. Ranked by mean/delta1." in page and "0.600 ± 0.248" in page
    assert page.count('<img src="data:image/png;base64,') == 1 and "δ1, rooms" in page
    names = re.findall(r"<summary>(.*?)</summary>", page.split("Answers: rooms")[1].split("Answers: streets")[0])
    best = ["near=1,far=0,seed=1", "near=0.5,far=0.5,seed=2", "near=0.5,far=0.5,seed=1"]
    assert names[:3] == best and len(names) == 5

    with (tmp_path / "runs.csv").open() as file:
        lines = {line["run"]: line for line in csv.DictReader(file)}
    assert len(lines) == 9
    one = lines["near=0.5,far=0.5,seed=1"]
    assert float(one["rooms/delta1"]) == 0.7 and float(one["device_seconds"]) == 4 * 170 and one["samples"] == "3000"
    assert one["data.sources.far.weight"] == "0.5" and one["train.seed"] == "1" and float(one["share/far"]) == 0.5
    assert lines["near=0,far=1,seed=0"]["rooms/delta1"] == ""


def test_errors_rank_from_below(tmp_path):
    sweep, runs = make(grid({"optim.learning_rate": [1.0, 1e-3, 1e-2]}), tmp_path, "streets/abs_rel")
    for run, scores in zip(runs, ((0.9, 0.0), (0.9, 0.1), (0.1, 0.9)), strict=True):
        train(run, scores)
    best, middle, last = report.write(sweep, runs, tmp_path)["ranked"]
    assert best["values"] == {"optim.learning_rate": 1e-2} and best["streets/abs_rel"] == pytest.approx(0.05)
    assert middle["streets/abs_rel"] == pytest.approx(0.45) and last["streets/abs_rel"] is None
    assert (tmp_path / "values.png").is_file()


def test_a_run_is_finished_when_its_last_step_is_saved_and_evaluated(tmp_path):
    _, (run,) = make([{}], tmp_path)
    log = run.workdir / progress.LOG
    assert progress.of(run).text == "not begun"
    train(run, (0.5, 0.5), evaluated=90)
    assert progress.of(run).text == "not evaluated" and not progress.of(run).finished
    log.write_text("error: no\n--- sweep: exit status 1\n")
    assert progress.of(run).text == "failed after step 100/100, exit status 1"
    log.write_text("error: no\n--- sweep: exit status 1\n--- sweep: attempt 2, now\n")
    assert progress.of(run).text == "not evaluated"
    write_lines(run.workdir / "evaluations.jsonl", [evaluation(100, name, 0.5, None) for name in SETS])
    with (run.workdir / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 100, "se')  # of a run that was killed
    assert progress.of(run).text == "finished" and progress.of(run).finished
    (run.workdir / "checkpoints/100").rename(run.workdir / "checkpoints/100.orbax-checkpoint-tmp")
    assert not progress.of(run).finished


def test_nothing_to_compare_is_an_error(tmp_path):
    sweep, runs = make(seeds(2), tmp_path)
    with pytest.raises(InputError, match="nothing to compare\n.*2 runs, none of them evaluated"):
        report.write(sweep, runs, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count, steps", [(2, 4), (3, 3), (4, 2)])
def test_mixtures_of_any_number_of_sources_are_drawn(tmp_path, count, steps):
    values = cross(simplex(weights(count), steps), grid({"optim.learning_rate": [1e-3, 3e-2]}), seeds(2))
    sweep, runs = make(values, tmp_path, count=count)
    chance = np.random.default_rng(0)
    for run in runs:
        share = run.config.data.sources["near"].weight
        noise = chance.normal(0, 0.02, 2) + 2 * run.config.optim.learning_rate
        train(run, tuple(np.clip([0.2 + 0.5 * share, 0.6 - 0.4 * share**2] + noise, 0, 1).tolist()))
    report.write(sweep, runs, tmp_path)
    pictures = [np.asarray(Image.open(tmp_path / name).convert("L")) for name in ("mixture.png", "values.png")]
    assert all((picture < 250).mean() > 0.01 for picture in pictures)
    assert all((picture[:3] > 250).all() and (picture[:, :3] > 250).all() for picture in pictures)  # nothing is cut off


@pytest.mark.filterwarnings("error")
def test_one_value_of_each_kind_is_drawn(tmp_path):
    values = grid({"optim.name": ["lion", "muon"], "model.lora.rank": [4, 8, 64], "data.geometry.crop_width": [(0, 9)]})
    sweep, runs = make(values, tmp_path)
    for number, run in enumerate(runs):
        train(run, (0.1 * number, 0.2))
    report.write(sweep, runs, tmp_path)
    assert not (tmp_path / "mixture.png").exists() and (tmp_path / "values.png").exists()
