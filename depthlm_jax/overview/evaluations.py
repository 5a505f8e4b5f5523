"""What the page says of an evaluation set: scores, how they went, answers against the truth."""

import math

import numpy as np

from depthlm_jax import html_page
from depthlm_jax.eval import report
from depthlm_jax.overview import chart
from depthlm_jax.overview.blocks import Bar, Charts, Fold, Picture, Section, Table, Text
from depthlm_jax.overview.history import Answers, History, is_number

COLUMNS = {
    "delta1": "δ1", "delta2": "δ2", "delta3": "δ3", "abs_rel": "AbsRel", "rmse": "RMSE", "silog": "SIlog",
    "parse_failure_rate": "unreadable", "distinct": "distinct", "n": "n",
}  # fmt: skip
CAPTIONS = {
    "worst.png": "The worst answers", "best.png": "The best answers", "answers.png": "The first questions, in order",
}  # fmt: skip
SHOWN, CHARACTERS = 20, 200  # of unreadable answers, and of each


def last_scores(run: History, name: str) -> dict[str, float | None] | None:
    """Returns δ1 of the last evaluation of a set, and that of the best constant answer; None where there is none."""
    found, constant = run.scores(name), run.scores(name, "best_constant")
    return {"delta1": found[-1][1], "constant": constant[-1][1] if constant else None} if found else None


def score_chart(runs: list[History], names: list[str], name: str) -> dict | None:
    """Returns δ1 over steps on one set, of one run or several; None where nothing was evaluated twice."""
    having = [(place, run) for place, run in enumerate(runs) if name in run.evaluations]
    lines = [chart.Line(names[place] if len(runs) > 1 else "model", run.scores(name), place) for place, run in having]
    if len(runs) == 1:
        lines.append(chart.Line("expectation", runs[0].scores(name, "expectation"), 1))
    constant = next((found for _, run in having if (found := run.scores(name, "best_constant"))), [])
    lines.append(chart.Line("best constant", constant, None))
    if max((len(line.points) for line in lines), default=0) < 2:
        return None
    return chart.line_chart(f"δ1, {name}", "share within a factor of 1.25", lines, zero=True)


def evaluation_section(run: History, name: str) -> Section:
    """Returns what there is of one set."""
    lines, answers = run.evaluations.get(name, []), run.answers.get(name, Answers())
    task = lines[-1].get("task") if lines else None
    unit = report.UNITS.get(task, "m")
    blocks = [Table("", _score_lines(lines, unit))] if lines else [Text("No scores: no evaluation of it was recorded.")]
    charts = [score_chart([run], [""], name), _scatter(answers, unit), *_ranges(lines[-1:], unit)]
    blocks.append(Charts([one for one in charts if one]))
    heading = f"Evaluation: {name}" + (f", {task}" if task else "")
    return Section(heading, [*blocks, *_unreadable(answers), *_pictures(answers)])


def _score_lines(lines: list[dict], unit: str) -> list[list[str]]:
    """Returns the scores of the last evaluation, of the one with the best δ1 if that is another, and of its peers."""
    last, best = lines[-1], max(lines, key=_delta1)
    rows = [(f"model, step {last['step']:,}", last["scores"].get("model"))]
    if best is not last:
        rows.append((f"best of {len(lines)}, step {best['step']:,}", best["scores"].get("model")))
    rows.append((f"expectation, step {last['step']:,}", last["scores"].get("expectation")))
    constant = last["scores"].get("best_constant") or {}
    answer = f", {constant['answer']:.2f} {unit}" if is_number(constant.get("answer")) else ""
    rows.append((f"best constant{answer}", constant))
    _, *cells = report.cells([(text, scores) for text, scores in rows if scores], list(COLUMNS))
    return [["", *COLUMNS.values()], *cells]


def _delta1(line: dict) -> float:
    value = (line["scores"].get("model") or {}).get("delta1")
    return value if is_number(value) else -math.inf


def _ranges(last: list[dict], unit: str) -> list[Table]:
    rows = []
    for part in (part for line in last for part in line.get("ranges") or []):
        low, high, delta1, error = (part.get(key) for key in ("low", "high", "delta1", "abs_rel"))
        text = f"{low:g} – {high:g}" if is_number(high) else f"{low:g} or more"
        bar = Bar(f"{delta1:.3f}", delta1) if is_number(delta1) else "–"
        rows.append([text, bar, f"{error:.3f}" if is_number(error) else "–", str(part.get("n", "–"))])
    header = [f"truth ({unit})", "δ1", "AbsRel", "n"]
    return [Table(f"By range of the truth, step {last[0]['step']:,}", [header, *rows])] if rows else []


def _scatter(answers: Answers, unit: str) -> dict | None:
    if not answers.predictions:
        return None
    truth = [line["truth"] for line in answers.predictions]
    said = [line.get("answer") for line in answers.predictions]
    names = [
        f"{line.get('record_id')} {line.get('pixels')}: truth {chart.brief(line['truth'])} {unit}, answer "
        + ("unreadable" if line.get("answer") is None else f"{chart.brief(line['answer'])} {unit}")
        for line in answers.predictions
    ]
    judged = report.judge(truth, said)
    points = list(zip(truth, judged.shown.tolist(), strict=True))
    groups = {group: np.flatnonzero(chosen).tolist() for group, chosen in judged.groups.items()}
    return chart.scatter_chart("Answers", unit, points, groups, names, (judged.low, judged.high))


def _unreadable(answers: Answers) -> list[Fold]:
    lines = [line for line in answers.predictions if line.get("answer") is None]
    if not lines:
        return []
    rows = [["record", "truth", "what was written"]]
    for line in lines[:SHOWN]:
        rows.append([str(line.get("record_id")), chart.brief(line["truth"]), str(line.get("text", ""))[:CHARACTERS]])
    more = [Text(f"and {len(lines) - SHOWN} more")] if len(lines) > SHOWN else []
    return [Fold(f"{len(lines)} of {len(answers.predictions)} answers could not be read",
                 [Table("", rows, words=True), *more])]  # fmt: skip


def _pictures(answers: Answers) -> list[Fold]:
    return [
        Fold(CAPTIONS[name], [Picture(html_page.data_uri("png", content), f"{CAPTIONS[name]}: marker, truth, answer")])
        for name, content in answers.pictures.items()
    ]
