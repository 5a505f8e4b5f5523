"""How to ask an exported model without this package: a family's usage.py, filled in for a run."""

import ast
import json
import pprint
import textwrap
from pathlib import Path

from depthlm_jax import config as config_module
from depthlm_jax import config_rules
from depthlm_jax.data import reference, tasks

FAMILIES = Path(__file__).parent / "models"  # each has a usage.py, which stands by itself
LINE = 120  # characters
ASKED_FIRST = ("distance", "axis_distance")  # tasks that it can ask


class _Blank:
    """What the snippet fills in: formats to `{name}` with the format that it was given."""

    def __init__(self, name: str):
        self.name = name

    def __format__(self, spec: str) -> str:
        return f"{{{self.name}:{spec}}}" if spec else f"{{{self.name}}}"


def program(config: config_module.Config, folder: str) -> str | None:
    """Returns usage.py of the family with what the run was trained with; None: it cannot ask what was trained.

    Args:
      config: of the run.
      folder: where whoever runs it finds the model.
    """
    first = trained_tasks(config)[0]
    if first not in ASKED_FIRST:
        return None
    data, marker = config.data, config.data.reference
    values = {
        "FOLDER": folder, "FOCAL_PX": data.geometry.focal_px, "GEOMETRY": data.geometry.mode,
        "MARKER": reference.MARKERS.get(marker.mode, ()), "MARKER_SCALE": marker.scale,
        "MARKER_COLOR": config_rules.COLORS[marker.color], "QUESTION": question(first, data),
        "MAX_NEW_TOKENS": config.eval.max_new_tokens,
    }  # fmt: skip
    return fill((FAMILIES / config.model.family / "usage.py").read_text(encoding="utf-8"), values)


def trained_tasks(config: config_module.Config) -> list[str]:
    """Returns the tasks that are trained, the one to ask first in front."""
    trained = [task for task in config_rules.TASKS if getattr(config.data.tasks, task)]
    return sorted(trained, key=lambda task: ASKED_FIRST.index(task) if task in ASKED_FIRST else len(ASKED_FIRST))


def question(task: str, data: config_module.Data) -> str:
    """Returns a task's question, with `{x}`, `{nx}`, `{width}`, `{fx:.1f}` and the like for what an image decides."""
    row, mode = tasks.TASKS[task], data.reference.mode
    names = ("({nx}, {ny})", "({nx2}, {ny2})") if mode == "text_norm" else ("({x}, {y})", "({x2}, {y2})")
    places = reference.PLACES[mode]
    place = places[row.points - 1].format(*names, color=data.reference.color) if row.points else ""
    size = (_Blank("width"), _Blank("height")) if mode == "text_raw" and row.images == 1 else None
    camera = [_Blank(name) for name in ("fx", "fy", "cx", "cy")] * row.images
    opening = tasks.opening(row.images, size, camera if data.camera_hint == "intrinsics" else None)
    return tasks.widest(task, place, opening, reference.note(mode), ray_first=False).question


def fill(source: str, values: dict[str, object]) -> str:
    """Returns a program in which the constants of these names, each set once at the top level, have these values."""
    lines = source.splitlines()
    places = {
        node.targets[0].id: (node.lineno - 1, node.end_lineno)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for name, (start, end) in sorted(places.items(), key=lambda item: item[1], reverse=True):
        if name in values:
            lines[start:end] = _assignment(name, values[name])
    missing = values.keys() - places.keys()
    if missing:
        raise KeyError(f"the program has no {sorted(missing)}")
    return "\n".join(lines) + "\n"


def _assignment(name: str, value: object) -> list[str]:
    """Returns the lines that give a constant its value, as ruff writes them where it is a text."""
    if not isinstance(value, str):
        return f"{name} = {pprint.pformat(value, width=100, compact=True)}".splitlines()
    line = f"{name} = {json.dumps(value, ensure_ascii=False)}"
    if len(line) <= LINE:
        return [line]
    pieces = textwrap.wrap(
        value, LINE - 10, drop_whitespace=False, replace_whitespace=False, expand_tabs=False, break_on_hyphens=False
    )
    return [f"{name} = (", *(f"    {json.dumps(piece, ensure_ascii=False)}" for piece in pieces), ")"]
