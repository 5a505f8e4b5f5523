"""The report of a sweep: ranked table in report.md, a line for each run in runs.csv, pictures, all of it as a page."""

import csv
import math
from collections.abc import Callable
from pathlib import Path

from depthlm_jax import files, html_page, log
from depthlm_jax.errors import InputError
from depthlm_jax.eval.report import table as plain_table
from depthlm_jax.overview import history, page
from depthlm_jax.overview.blocks import Picture, Table, Text
from depthlm_jax.overview.history import History
from depthlm_jax.sweep import pictures, results
from depthlm_jax.sweep.expand import MEAN, Run, short, text
from depthlm_jax.sweep.results import Group, Result
from depthlm_jax.sweep.spec import Sweep

NOTE = (
    "± is half of the 95 % confidence interval of the mean (Student's t) over runs that differ in their seeds alone; "
    "only finished runs count."
)
UNITS: dict[str, tuple[str, Callable[[float], str]]] = {  # heading and text of what is no score
    "loss": ("loss", "{:.3f}".format),
    "samples": ("samples", "{:,.0f}".format),
    "device_seconds": ("device-hours", lambda seconds: f"{seconds / 3600:.3g}"),
}


def line(sweep: Sweep, run: Run) -> str:
    """Returns the score of a run in a few words."""
    (result,) = results.collect([run], sweep.metric)
    scores = [name for name in (f"{one}/delta1" for one in run.config.eval.sets) if name != sweep.metric]
    others = ", ".join(f"{name} {result.number(name):.3f}" for name in scores)
    return f"{sweep.metric} {result.number(sweep.metric):.3f}" + (f" ({others})" if others else "")


def write(sweep: Sweep, runs: list[Run], workdir: Path) -> dict:
    """Returns what the report holds for programs; writes report.md, runs.csv and pictures into the workdir.

    Raises:
      InputError: no run has come to an evaluation.
    """
    found = results.collect(runs, sweep.metric)
    if not any(result.progress.scores for result in found):
        raise InputError(
            f"{workdir}: nothing to compare", found=f"{len(runs)} runs, none of them evaluated",
            expected="runs that have come to an evaluation", fix="start the sweep, or wait for its runs",
        )  # fmt: skip
    files.make_writable(workdir)
    ranked = results.groups(found, sweep.metric)
    drawn = pictures.draw(ranked, results.swept_paths(found), sweep.metric, list(runs[0].config.eval.sets), workdir)
    ranking, summary = _ranking(ranked, found, sweep.metric), _summary(sweep, found)
    parts = [
        f"# {workdir.name}", summary, markdown(ranking), NOTE, _constants(found),
        *(f"![{file.stem}]({file.name})" for file in drawn), "## Runs", _runs(found, sweep.metric),
    ]  # fmt: skip
    (workdir / "report.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    head = [Text(summary), Table("", ranking), Text(NOTE), Text(_constants(found)), *map(_picture, drawn)]
    whole = page.compare(_histories(found, sweep.metric), workdir.name, head)
    (workdir / "report.html").write_text(whole, encoding="utf-8")
    _write_csv(found, workdir / "runs.csv")
    done = sum(result.progress.finished for result in found)
    log.say(_plain(ranked, sweep.metric))
    names = ", ".join(["report.html", "runs.csv", *(file.name for file in drawn)])
    log.say(f"{done} of {len(found)} runs finished · {workdir / 'report.md'}, {names}")
    return _for_programs(ranked, found, sweep.metric, workdir)


def _for_programs(ranked: list[Group], found: list[Result], metric: str, workdir: Path) -> dict:
    rows = []
    for group in ranked:
        mean, half = (None if math.isnan(number) else number for number in group.estimate(metric))
        rows.append({"values": group.values, "runs": len(group.results), metric: mean, "plus_minus": half})
    statuses = {result.run.name: result.progress.text for result in found}
    return {"metric": metric, "ranked": rows, "runs": statuses, "report": str(workdir / "report.md")}


def _summary(sweep: Sweep, found: list[Result]) -> str:
    done = sum(result.progress.finished for result in found)
    return f"{done} of {len(found)} runs of {found[0].run.recipe} are finished. Ranked by {sweep.metric}."


def _scores(found: list[Result], metric: str) -> list[str]:
    """Returns the columns with scores: that which ranks, δ1 of each set and their mean, AbsRel."""
    sets = list(found[0].run.config.eval.sets)
    each = [f"{name}/delta1" for name in (*sets, *([MEAN] if len(sets) > 1 else []))]
    return list(dict.fromkeys([metric, *each, f"{MEAN}/abs_rel"]))


def _others(found: list[Result]) -> list[str]:
    names = sorted({name for result in found for name in result.numbers})
    of_sources = [name for name in names if name.startswith(("loss/", "share/"))]
    return ["loss", *of_sources, "samples", "device_seconds"]


def _histories(found: list[Result], metric: str) -> list[History]:
    """Returns the runs that have come to an evaluation, the best first."""
    ranked = sorted(found, key=lambda result: results.rank(result.number(metric), metric))
    return [history.read(result.run.workdir) for result in ranked if result.progress.scores]


def _picture(file: Path) -> Picture:
    return Picture(html_page.data_uri("png", file.read_bytes()), pictures.CAPTIONS[file.name])


def _ranking(ranked: list[Group], found: list[Result], metric: str) -> list[list[str]]:
    paths, scores, others = results.swept_paths(found), _scores(found, metric), _others(found)
    heading = ["", *map(short, paths), "runs", *scores, *(_heading(name) for name in others)]
    lines = []
    for place, group in enumerate(ranked, start=1):
        count = f"{len(group.results)}" + (f" of {group.runs}" if len(group.results) < group.runs else "")
        values = [_value(group.values.get(path)) for path in paths]
        estimates = [_estimate(*group.estimate(name)) for name in scores]
        means = [_number(name, group.estimate(name)[0]) for name in others]
        lines.append([str(place), *values, count, *estimates, *means])
    return [heading, *lines]


def _runs(found: list[Result], metric: str) -> str:
    scores, others = _scores(found, metric), _others(found)
    heading = ["run", "status", *scores, *(_heading(name) for name in others)]
    lines = [
        [result.run.name, result.progress.text, *(_estimate(result.number(name), math.nan) for name in scores),
         *(_number(name, result.number(name)) for name in others)]
        for result in found
    ]  # fmt: skip
    return markdown([heading, *lines])


def _constants(found: list[Result]) -> str:
    """Returns what one and the same answer to every question would have scored."""
    scored = max(found, key=lambda result: len(result.progress.scores)).progress.scores
    texts = [
        f"{name}: {one['best_constant']['delta1']:.3f} ({one['best_constant']['answer']:.2f})"
        for name, one in scored.items()
    ]
    return f"δ1 of the best constant answer: {', '.join(texts)}."


def markdown(lines: list[list[str]]) -> str:
    """Returns a table in Markdown, its first line as header; all columns but those of text are flush right."""
    heading, *body = lines
    rule = ["---" if name in ("run", "status") else "---:" for name in heading]
    rows = ([cell.replace("|", "\\|") for cell in row] for row in [heading, rule, *body])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plain(ranked: list[Group], metric: str) -> str:
    rows = []
    for group in ranked:
        mean, half = group.estimate(metric)
        name = ", ".join(f"{short(path)}={_value(value)}" for path, value in group.values.items()) or "all"
        rows.append((name, {metric: mean, "±": half, "runs": len(group.results)}))
    return plain_table(rows, [metric, "±", "runs"])


def _value(value: object) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else text(value)


def _estimate(mean: float, half: float) -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def _heading(name: str) -> str:
    return UNITS[name][0] if name in UNITS else name.replace("/", " of ")


def _number(name: str, value: float) -> str:
    shown = UNITS[name][1] if name in UNITS else "{:.3f}".format
    return "–" if math.isnan(value) else shown(value)


def _write_csv(found: list[Result], file: Path) -> None:
    """Writes a line for each run; what is not known is empty."""
    paths = list(dict.fromkeys(path for result in found for path in result.run.values))
    numbers = list(dict.fromkeys(name for result in found for name in result.numbers))
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["run", "status", "step", *paths, *numbers])
        for result in found:
            values = [result.run.values.get(path, "") for path in paths]
            known = ["" if math.isnan(result.number(name)) else result.number(name) for name in numbers]
            writer.writerow([result.run.name, result.progress.text, result.progress.step, *values, *known])
