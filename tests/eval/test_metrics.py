import json
import math
from pathlib import Path

import numpy as np
import pytest

from depthlm_jax.errors import InputError
from depthlm_jax.eval.metrics import best_constant, depth_metrics

IBIMS = Path(__file__).parents[2].parent / "shared" / "data" / "ibims1"
ERRORS = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")


def depths(count=300, seed=0):
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(1, 0.8, count)), rng.integers(0, 20, count)


def test_worked_table():
    """Ratios 1, 1.25 (not below 1.25), 4 and a failure; log errors 0, ln 0.8, ln 4."""
    metrics = depth_metrics([2.0, 1.0, None, 4.0], np.array([2.0, 1.25, 3.0, 1.0]), ["a", "b", "b", "b"])
    assert metrics == pytest.approx(
        {
            "delta1": 1 / 4,
            "delta2": 2 / 4,
            "delta3": 2 / 4,
            "delta1_per_image": (1 + 0) / 2,
            "abs_rel": (0 + 0.2 + 3) / 3,
            "sq_rel": (0 + 0.05 + 9) / 3,
            "rmse": math.sqrt((0 + 0.0625 + 9) / 3),
            "rmse_log": 0.810680,
            "log10": (0 + 0.0969100 + 0.6020600) / 3,
            "silog": 71.1953,
            "parse_failure_rate": 1 / 4,
            "n": 4,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("name, power", [("delta1", 1), ("delta2", 2), ("delta3", 3)])
def test_thresholds_are_strict_on_both_sides(name, power):
    edge = 1.25**power
    for answer_m, right in [(edge, 0.0), (edge * 0.999, 1.0), (1 / edge, 0.0), (1.001 / edge, 1.0)]:
        assert depth_metrics([answer_m], np.array([1.0]), [0])[name] == right


def test_perfect_answers():
    truth_m, images = depths()
    metrics = depth_metrics(truth_m.tolist(), truth_m, images)
    assert metrics["delta1"] == metrics["delta2"] == metrics["delta3"] == metrics["delta1_per_image"] == 1
    assert all(metrics[name] == 0 for name in ERRORS) and metrics["parse_failure_rate"] == 0


def test_unit_of_length_matters_only_where_it_should():
    truth_m, images = depths()
    answer_m = truth_m * np.exp(np.random.default_rng(1).normal(0, 0.3, len(truth_m)))
    metres = depth_metrics(answer_m.tolist(), truth_m, images)
    doubled = depth_metrics((2 * answer_m).tolist(), 2 * truth_m, images)
    for name in metres:
        assert doubled[name] == pytest.approx(metres[name] * (2 if name in ("sq_rel", "rmse") else 1)), name


def test_silog_alone_forgives_a_common_scale():
    truth_m, images = depths()
    metrics = depth_metrics((1.5 * truth_m).tolist(), truth_m, images)
    assert metrics["silog"] == pytest.approx(0, abs=1e-6)
    assert metrics["delta1"] == 0 and metrics["delta2"] == 1
    assert metrics["abs_rel"] == pytest.approx(0.5) and metrics["rmse_log"] == pytest.approx(math.log(1.5))


@pytest.mark.parametrize("failure", [None, 0.0, -2.0, math.nan, math.inf])
def test_failures_are_wrong_in_every_delta_and_in_nothing_else(failure):
    truth_m, images = depths(100)
    answer_m = [failure] * 40 + (1.1 * truth_m[40:]).tolist()
    metrics = depth_metrics(answer_m, truth_m, images)
    assert metrics["delta1"] == metrics["delta2"] == metrics["delta3"] == 0.6
    assert metrics["parse_failure_rate"] == 0.4 and metrics["n"] == 100
    assert metrics["abs_rel"] == pytest.approx(0.1)


def test_nothing_parsed():
    metrics = depth_metrics([None, None], np.array([1.0, 2.0]), [0, 1])
    assert metrics["delta3"] == 0 and metrics["parse_failure_rate"] == 1
    assert all(math.isnan(metrics[name]) for name in ERRORS)


def test_constant_of_two_metres_on_real_depths():
    if not IBIMS.exists():
        pytest.skip(f"{IBIMS} is absent")
    records = [json.loads(line) for line in (IBIMS / "ibims1_subset.jsonl").read_text().splitlines()]
    truth_m = [depth for record in records for depth in record["depth"]]
    images = [record["image"] for record in records for _ in record["depth"]]
    right = sum(1.6 < depth < 2.5 for depth in truth_m)  # 2 / 1.25 and 2 · 1.25
    metrics = depth_metrics([2.0] * len(truth_m), np.array(truth_m), images)
    assert len(truth_m) == 2000 and 0.1 < right / 2000 < 0.5
    assert metrics["delta1"] == right / 2000 == pytest.approx(metrics["delta1_per_image"])
    assert best_constant(np.array(truth_m))[1] >= metrics["delta1"]


@pytest.mark.parametrize("seed", range(5))
def test_best_constant_is_at_least_as_good_as_any_on_a_fine_grid(seed):
    truth_m, images = depths(80, seed)
    value_m, delta1 = best_constant(truth_m)
    grid = [depth_metrics([c] * 80, truth_m, images)["delta1"] for c in np.geomspace(0.1, 60, 1500)]
    assert delta1 == depth_metrics([value_m] * 80, truth_m, images)["delta1"] >= max(grid)


@pytest.mark.parametrize(
    "truth_m, delta1", [([3.0], 1.0), ([1.0, 1.5624], 1.0), ([1.0, 1.5625], 0.5), ([9.0, 1.0, 1.2, 1.4], 0.75)]
)
def test_best_constant_worked(truth_m, delta1):
    value_m, found = best_constant(np.array(truth_m))
    assert found == delta1
    assert min(truth_m) <= value_m <= max(truth_m)


def test_wrong_input():
    with pytest.raises(InputError, match="0 points"):
        depth_metrics([], np.array([]), [])
    with pytest.raises(InputError, match="0 points"):
        best_constant(np.array([]))
    with pytest.raises(InputError, match="3 points, 2 of them not finite and positive"):
        best_constant(np.array([1.0, 0.0, math.nan]))
    with pytest.raises(InputError, match="1 answers, 2 depths, 2 image ids"):
        depth_metrics([1.0], np.array([1.0, 2.0]), [0, 0])
