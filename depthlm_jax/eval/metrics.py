"""How good a list of answers is."""

import math
from collections.abc import Sequence

import numpy as np

from depthlm_jax.errors import InputError

EDGES_M = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0)  # ranges of true depths that are also told apart
DELTA = 1.25  # δk: the share of points with max(p/g, g/p) < 1.25^k, strictly


def depth_metrics(predicted: Sequence[float | None], truth_m: np.ndarray, image_ids: Sequence) -> dict[str, float]:
    """Returns the metrics of one evaluation set, over all points and, for δ1, also as the mean over images.

    A failure (None, or a number that is not finite and positive) is wrong in every δ and absent from the errors, which
    are NaN if nothing was parsed.

    Args:
      predicted: answers in metres, None where none could be read.
      truth_m: (N,) unrounded true depths in metres, > 0.
      image_ids: which image each point belongs to.

    Raises:
      InputError: no points, different lengths, or a true depth that is not finite and positive.

    Source: DepthLM section 4 (δ1 pooled over points); the others as in the monocular depth literature, `silog` being
      100·√(variance of log p − log g).
    """
    truth_m = _checked(truth_m)
    if not len(predicted) == len(image_ids) == len(truth_m):
        raise InputError(
            "metrics: lists of different lengths", expected="one answer and one image id a point",
            found=f"{len(predicted)} answers, {len(truth_m)} depths, {len(image_ids)} image ids",
            fix="pass the three lists of the same samples",
        )  # fmt: skip
    answer_m = np.array([np.nan if p is None else p for p in predicted], np.float64)
    parsed = np.isfinite(answer_m) & (answer_m > 0)
    ratio = np.full(len(truth_m), np.inf)
    ratio[parsed] = _ratio(answer_m[parsed], truth_m[parsed])
    _, image = np.unique(np.asarray(image_ids), return_inverse=True)
    per_image = np.bincount(image, ratio < DELTA) / np.bincount(image)
    return {
        **{f"delta{k}": float(np.mean(ratio < DELTA**k)) for k in (1, 2, 3)},
        "delta1_per_image": float(per_image.mean()),
        **_errors(answer_m[parsed], truth_m[parsed]),
        "parse_failure_rate": float(np.mean(~parsed)),
        "n": len(truth_m),
    }


def by_range(predicted: Sequence[float | None], truth_m: np.ndarray) -> list[dict[str, float | None]]:
    """Returns n, δ1 and AbsRel of the points in each range of true depths that has any; the last has no upper end.

    Raises:
      InputError: as `depth_metrics`.
    """
    truth_m = _checked(truth_m)
    which = np.searchsorted(EDGES_M, truth_m, side="right") - 1
    found = []
    for place in np.unique(which):
        chosen = np.flatnonzero(which == place)
        values = depth_metrics([predicted[i] for i in chosen], truth_m[chosen], chosen)
        high = EDGES_M[place + 1] if place + 1 < len(EDGES_M) else None
        numbers = {name: None if math.isnan(values[name]) else values[name] for name in ("n", "delta1", "abs_rel")}
        found.append({"low": EDGES_M[place], "high": high, **numbers})
    return found


def _ratio(p: np.ndarray, g: np.ndarray) -> np.ndarray:
    return np.maximum(p / g, g / p)


def _errors(p: np.ndarray, g: np.ndarray) -> dict[str, float]:
    def mean(term: np.ndarray) -> float:
        return float(term.mean()) if len(term) else math.nan

    log_error = np.log(p) - np.log(g)
    return {
        "abs_rel": mean(np.abs(p - g) / g),
        "sq_rel": mean((p - g) ** 2 / g),
        "rmse": mean((p - g) ** 2) ** 0.5,
        "rmse_log": mean(log_error**2) ** 0.5,
        "log10": mean(np.abs(log_error)) / math.log(10),
        "silog": 100 * mean((log_error - mean(log_error)) ** 2) ** 0.5,
    }


def best_constant(truth_m: np.ndarray) -> tuple[float, float]:
    """Returns (value_m, δ1): the single answer that is right for the most points, to print beside a model.

    A constant c is right for g if g/1.25 < c < g·1.25, so some c is right for a whole set of depths exactly if
    their largest is below 1.25² times their smallest: the fullest such window of the sorted depths wins.

    Raises:
      InputError: no points, or a true depth that is not finite and positive.
    """
    ordered_m = np.sort(_checked(truth_m))
    end = np.searchsorted(ordered_m, ordered_m * DELTA**2, side="left")
    first = int(np.argmax(end - np.arange(len(ordered_m))))
    value_m = np.sqrt(ordered_m[first] * ordered_m[end[first] - 1])
    return float(value_m), float(np.mean(_ratio(value_m, ordered_m) < DELTA))


def _checked(truth_m: np.ndarray) -> np.ndarray:
    truth_m = np.asarray(truth_m, np.float64)
    wrong = int(np.sum(~(np.isfinite(truth_m) & (truth_m > 0))))
    if truth_m.size == 0 or wrong:
        raise InputError(
            "metrics: true depths", found=f"{truth_m.size} points, {wrong} of them not finite and positive",
            expected="at least one point, every depth finite and > 0 m", fix="check eval.source and eval.samples",
        )  # fmt: skip
    return truth_m
