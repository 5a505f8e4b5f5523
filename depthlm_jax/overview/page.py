"""The page about one run, or about several side by side."""

import re
import time
from collections.abc import Sequence

from depthlm_jax import config as config_module
from depthlm_jax import html_page, log
from depthlm_jax.errors import InputError
from depthlm_jax.overview import chart
from depthlm_jax.overview.blocks import STYLE, TEMPLATE, Bar, Charts, Facts, Fold, Key, Section, Stack, Table, Text
from depthlm_jax.overview.evaluations import evaluation_section, last_scores, score_chart
from depthlm_jax.overview.history import History

CURVES = (  # metric, title, unit, factor, log axis, from zero
    ("loss", "Loss", "nats per supervised token", 1, True, False),
    ("mean_token_accuracy", "Token accuracy", "% of supervised tokens", 100, False, False),
    ("learning_rate", "Learning rate", "per step", 1, False, True),
    ("grad_norm", "Gradient norm", "before clipping", 1, True, True),
    ("samples_per_second", "Speed", "samples/s, all devices", 1, False, True),
    ("data_wait", "Waiting for data", "% of the time", 100, False, True),
    ("mfu", "Model FLOP utilisation", "% of the peak", 100, False, True),
)
KINDS = {"step": 0, "data": 1, "compile": 4, "start": 5, "save": 2, "evaluation": 6, "lost": 3}  # of time → colour
COMPARED = ("loss", "samples_per_second")  # of several runs, in their table
MOST_RUNS = chart.COLORS * len(chart.DASHES)  # whose lines can be told apart
SHOWN = 20  # of long lists
VERSIONS = ("python", "jax", "libtpu", "flax", "optax", "transformers")
USERS_OWN = ("model.hf_config.",)  # what is not a choice of this code's fields


def render(runs: list[History]) -> str:
    """Returns a page about a run, or one that compares several."""
    if not runs:
        raise InputError("nothing to show", found="no run", expected="at least one", fix="give --workdir=RUN")
    if len(runs) > 1:
        return compare(runs, f"{len(runs)} runs compared")
    (run,), (name,) = runs, name_runs(runs)
    sections = [_curves(runs, [name]), _mixture(run), *(evaluation_section(run, name) for name in run.sets),
                *([] if run.sets else [Section("Evaluations", [Text("None yet.")])]),
                _time(run), _faults(run), _config(run), _starts(run)]  # fmt: skip
    return _page(name, f"{run.workdir} · ", _head(run), sections)


def compare(runs: list[History], title: str, head: Sequence = ()) -> str:
    """Returns a page about runs side by side; blocks in `head` come first."""
    left_out = [Text(f"The first {MOST_RUNS} of {len(runs)} runs.")] if len(runs) > MOST_RUNS else []
    runs = runs[:MOST_RUNS]
    names = name_runs(runs)
    sections = [
        Section("Runs", [_overview(runs, names), *left_out]), _differences(runs, names), _curves(runs, names),
        _compared_scores(runs, names), *_compared_answers(runs, names),
    ]  # fmt: skip
    return _page(title, "", list(head), sections)


def _page(title: str, where: str, head: list, sections: list[Section]) -> str:
    values = {"under": f"{where}page of {time.strftime('%Y-%m-%d %H:%M %Z')}", "head": head, "sections": sections}
    return html_page.render(title, TEMPLATE, STYLE, values)


def name_runs(runs: list[History]) -> list[str]:
    """Returns the name of each workdir; whole paths where two have the same."""
    names = [run.workdir.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.workdir) for run in runs]


def _head(run: History) -> list:
    remarks = [Text(remark, bad=True) for remark in run.remarks[:SHOWN]]
    return [Facts(_facts(run)), Text(_goes_on(run)), *remarks]


def _facts(run: History) -> list[tuple[str, str, str]]:
    last = run.config.train.max_steps
    facts = [("steps", f"{run.step:,}", f"of {last:,}")]
    for name, title, unit, factor, *_ in (CURVES[0], CURVES[4]):
        values = run.values(name)
        if values:
            facts.append((title.lower(), chart.brief(factor * values[-1][1]), unit))
    for name in run.sets:
        scores = last_scores(run, name)
        if scores:
            constant = scores["constant"]
            beside = f"best constant {constant:.3f}" if constant is not None else ""
            facts.append((f"δ1, {name}", f"{scores['delta1']:.3f}", beside))
    whole = sum(run.spent[kind] for kind in KINDS)
    if whole:
        facts.append(("time", log.clock(whole), f"{run.spent['step'] / whole:.0%} of it in steps"))
    if run.parameters:
        count, trained = run.parameters
        part = f"{trained / count:.2%} of them trained" if trained < count else "all of them trained"
        facts.append(("parameters", _count(count), part))
    if run.starts:
        mesh = run.starts[-1].get("mesh", {})
        parts = [f"{name} {size}" for name, size in mesh.items() if size > 1]
        facts.append(("mesh", " × ".join(parts) or "1 device", str(run.starts[-1].get("device", ""))))
    return facts


def _count(number: int) -> str:
    """Returns '3.1 B'."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _goes_on(run: History) -> str:
    if run.step >= run.config.train.max_steps:
        return "All steps are done."
    kept = f"the last checkpoint is of step {run.saved_step:,}" if run.saved_step else "no checkpoint yet"
    return f"Not at its end: it is training still, or goes on when train is started again; {kept}."


def _curves(runs: list[History], names: list[str]) -> Section:
    charts = [
        chart.line_chart(title, unit, _lines(runs, names, metric, factor), log=log_axis, zero=zero)
        for metric, title, unit, factor, log_axis, zero in CURVES
    ]
    by_source = sorted({name for run in runs for record in run.metrics for name in record if name.startswith("loss/")})
    if len(runs) == 1:
        lines = [chart.Line(name[5:], runs[0].values(name), place) for place, name in enumerate(by_source)]
        charts.insert(1, chart.line_chart("Loss by source", CURVES[0][2], lines, log=True))
    else:
        charts += [
            chart.line_chart(f"Loss, {name[5:]}", CURVES[0][2], _lines(runs, names, name, 1), log=True)
            for name in by_source
        ]
    found = [one for one in charts if one]
    missing = "No metrics yet: metrics.jsonl has its first line after the first step."
    return Section("Training", [Charts(found)] if found else [Text(missing)])


def _lines(runs: list[History], names: list[str], metric: str, factor: float) -> list[chart.Line]:
    return [
        chart.Line(name if len(runs) > 1 else "", [(step, factor * value) for step, value in run.values(metric)], place)
        for place, (run, name) in enumerate(zip(runs, names, strict=True))
    ]


def _mixture(run: History) -> Section:
    """Shares are means over steps: lines of metrics stand for different numbers of them."""
    found, before = dict.fromkeys(run.config.data.sources, 0.0), 0
    for record in run.metrics:
        for name in found:
            found[name] += (record["step"] - before) * record.get(f"share/{name}", 0.0)
        before = record["step"]
    total = sum(found.values())
    lines = [["source", "weight", "intended share", "realised share"]]
    for name, source in run.config.data.sources.items():
        intended = run.shares.get(name, 0.0) if run.shares else None
        realised = found[name] / total if total else None
        lines.append([name, f"{source.weight:g}", _share(intended), _share(realised)])
    blocks = [Table("", lines)]
    if not run.shares:
        blocks.append(Text("Shares go by sizes here: what is intended is known from the first checkpoint on."))
    return Section("Mixture", blocks)


def _share(value: float | None) -> str | Bar:
    return "–" if value is None else Bar(f"{value:.1%}", value)


def _time(run: History) -> Section:
    whole = sum(run.spent[kind] for kind in KINDS)
    if not whole:
        return Section("Time", [Text("Not known yet: goodput.jsonl has no line.")])
    parts = [
        (kind, run.spent[kind] / whole, f"{run.spent[kind]:,.1f} s ({run.spent[kind] / whole:.0%})", color)
        for kind, color in KINDS.items()
    ]
    again = run.spent["starts"] - 1
    said = "Started once" if not again else f"Started {again + 1} times"
    lost = "lost: what a later start had to do again, and what came after a start's last line"
    text = Text(f"{said}, {log.clock(whole)} in all; {lost}.")
    return Section("Time", [Stack("Time in seconds by kind", parts), text])


def _faults(run: History) -> Section:
    blocks = []
    if run.skipped:
        steps = {line["step"]: line for line in run.skipped}
        lines = [["step", "loss", "gradient norm", "samples"]]
        for step, line in list(steps.items())[:SHOWN]:
            ids = [one for other in run.skipped if other["step"] == step for one in other.get("record_ids", [])]
            more = f" and {len(ids) - 4} more" if len(ids) > 4 else ""
            lines.append([str(step), str(line.get("loss")), str(line.get("grad_norm")), ", ".join(ids[:4]) + more])
        title = f"Steps that changed nothing, as loss or gradient was not finite: {len(steps)}"
        blocks.append(Table(title, lines, words=True))
    if run.bad:
        lines = [["record", "what is wrong"]]
        lines += [[str(line.get("record")), str(line.get("reason"))] for line in run.bad[:SHOWN]]
        blocks.append(Table(f"Records that were left out: {len(run.bad)}", lines, words=True))
    for name, count in (("steps", len({line["step"] for line in run.skipped})), ("records", len(run.bad))):
        if count > SHOWN:
            blocks.append(Text(f"Of {count} {name} the first {SHOWN} are shown."))
    return Section("Faults", blocks or [Text("No step was skipped, no record left out.")])


def _config(run: History) -> Section:
    default, now = config_module.flatten(config_module.Config()), config_module.flatten(run.config)
    default = {path: default.get(re.sub(r"^data\.sources\.[^.]+", "data.sources.main", path)) for path in now}
    changed = [path for path in now if now[path] != default[path] and not path.startswith(USERS_OWN)]
    lines = [[path, str(now[path]), "–" if default[path] is None else str(default[path])] for path in changed]
    every = [["field", "value"], *([path, str(value)] for path, value in now.items())]
    return Section("Config", [
        Table("What differs from the defaults", [["field", "here", "default"], *lines], words=True),
        Fold(f"all {len(now)} fields", [Table("", every, words=True)]),
    ])  # fmt: skip


def _starts(run: History) -> Section:
    if not run.starts:
        return Section("Starts", [Text("None is recorded.")])
    lines = [["time", "command", "devices", "revision", "versions"]]
    for start in run.starts[-SHOWN:]:
        sizes = {"processes": start.get("processes"), **start.get("mesh", {})}
        where = f"{start.get('device')}: " + ", ".join(f"{name} {size}" for name, size in sizes.items())
        revision = str(start.get("revision") or "–")
        revision = revision[:10] + "+" * revision.endswith("+")
        versions = ", ".join(f"{name} {start[name]}" for name in VERSIONS if start.get(name))
        lines.append([str(start.get("time")), str(start.get("command")), where, revision, versions])
    more = [Text(f"The last {SHOWN} of {len(run.starts)}.")] if len(run.starts) > SHOWN else []
    return Section("Starts", [Table("", lines, words=True), *more])


# Several runs


def _overview(runs: list[History], names: list[str]) -> Table:
    sets = sorted({name for run in runs for name in run.sets})
    lines = [["run", "steps", "loss", "samples/s", "parameters", *(f"δ1, {name}" for name in sets)]]
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        numbers = [chart.brief(found[-1][1]) if found else "–" for found in map(run.values, COMPARED)]
        scores = [last_scores(run, name) for name in sets]
        lines.append([
            Key(name, **chart.style(place)), f"{run.step:,} of {run.config.train.max_steps:,}", *numbers,
            _count(run.parameters[0]) if run.parameters else "–",
            *(Bar(f"{one['delta1']:.3f}", one["delta1"]) if one else "–" for one in scores),
        ])  # fmt: skip
    return Table("", lines)


def _differences(runs: list[History], names: list[str]) -> Section:
    flat = [config_module.flatten(run.config) for run in runs]
    paths = sorted({path for one in flat for path in one})
    differ = [path for path in paths if any(one.get(path) != flat[0].get(path) for one in flat)]
    lines = [["", *names], *([path, *(str(one.get(path, "–")) for one in flat)] for path in differ)]
    wide = len(names) > len(differ)
    if wide:
        lines = [list(line) for line in zip(*lines, strict=True)]  # a run in each
    found = Table("Fields that differ", lines, words=not wide) if differ else Text("No field differs.")
    return Section("Config", [found])


def _compared_scores(runs: list[History], names: list[str]) -> Section:
    sets = sorted({name for run in runs for name in run.evaluations})
    charts = [score_chart(runs, names, name) for name in sets]
    found = [one for one in charts if one]
    missing = "Each set was evaluated once: its δ1 stands above." if sets else "None yet."
    return Section("Evaluations", [Charts(found)] if found else [Text(missing)])


def _compared_answers(runs: list[History], names: list[str]) -> list[Section]:
    """Returns what each run has answered on each set, shown when asked for."""
    sets = sorted({name for run in runs for name in run.sets})
    having = {one: [(run, name) for run, name in zip(runs, names, strict=True) if one in run.sets] for one in sets}
    return [
        Section(f"Answers: {one}", [Fold(name, evaluation_section(run, one).blocks) for run, name in having[one]])
        for one in sets
    ]
