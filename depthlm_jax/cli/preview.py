"""preview: one HTML page with the first training samples as the model sees them, the mixture and the rows' filling."""

import collections
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
from absl import flags

from depthlm_jax import config as config_module
from depthlm_jax import config_rules, html_page, log
from depthlm_jax import run as runs
from depthlm_jax.batch import RowShape
from depthlm_jax.cli import command
from depthlm_jax.data import mixture, packing, pipeline, plan
from depthlm_jax.errors import InputError
from depthlm_jax.eval import page, report
from depthlm_jax.models import registry

PLANNED_STEPS, MOST_SAMPLES = 20, 10_000  # planning ends when one of them is reached
LEAST_SAMPLES = 2 * mixture.BLOCK  # but not before: shares are kept block by block
MIXTURE = ["records", "weight", "intended share", "realised share", "epochs begun"]
FILL = ["a row holds", "mean used", "mean filled", "least filled"]


@dataclasses.dataclass(frozen=True)
class Ahead:
    """The first steps of a run, planned."""

    rows: list[list[plan.Slot]]
    position: plan.Position  # after them

    @property
    def slots(self) -> list[plan.Slot]:
        return [slot for row in self.rows for slot in row]


def define_flags(values: flags.FlagValues) -> None:
    command.define_config(values)
    command.define_path(values, "output", "page to write, for example preview.html")
    flags.DEFINE_integer("samples", 16, "how many of the first samples of training", lower_bound=1, flag_values=values)


def run(values: flags.FlagValues) -> dict:
    config, output = command.read_config(values), command.read_path(values, "output")
    html_page.check_name(output)
    sources = pipeline.open_sources(config, log.Progress("index"))
    with tempfile.TemporaryDirectory() as folder:
        runs.write_base(config, Path(folder))
        processor = registry.family(config.model.family).processor(Path(folder))
    shape = pipeline.row_shape(config.data, processor.config)
    log.say("planning the first steps, without their images")
    ahead = plan_ahead(plan.Planner(sources, processor, config, shape, plan.Position()), values.samples)
    shared = mixture_rows(config, {name: len(records) for name, records in sources.items()}, ahead)
    filled, binds = filled_rows(ahead.rows, shape)
    note = f"{len(ahead.slots) / len(ahead.rows):.2f} samples a row; {packing.LIMITS[binds]} is reached first"
    planned = f"the first {ahead.position.step} steps planned: {len(ahead.rows)} rows, {len(ahead.slots)} samples"
    log.say(f"{planned}\n\n{report.table(shared, MIXTURE)}\n\n{report.table(filled, FILL)}\n{note}\n")

    maker = pipeline.SampleMaker(sources, processor, config)
    samples, dropped = make(maker, ahead.slots[: values.samples])
    if not samples:
        raise InputError(
            "nothing to show", found=f"{len(dropped)} records, none of which gave a sample", expected="at least one",
            fix="correct the records or data.geometry; the reasons stand above",
        )  # fmt: skip
    tables = [
        page.Table("Mixture", report.cells(shared, MIXTURE), planned),
        page.Table("Rows", report.cells(filled, FILL), note),
    ]
    marked = config.data.reference.mode in config_rules.MARKERS
    output.write_text(page.render(tables, samples, dropped, processor.tokenizer.decode, marked), encoding="utf-8")
    log.say(f"{len(samples)} samples, {len(dropped)} dropped: {output}")
    shares = {name: {key: row[f"{key} share"] for key in ("intended", "realised")} for name, row in shared}
    return {
        "output": str(output), "samples": len(samples), "dropped": len(dropped), "shares": shares,
        "filled": {name: row["mean filled"] for name, row in filled}, "binds": packing.LIMITS[binds],
        "samples_per_row": len(ahead.slots) / len(ahead.rows),
    }  # fmt: skip


def plan_ahead(planner: plan.Planner, wanted: int) -> Ahead:
    """Returns enough whole steps to tell shares and filling, with at least the wanted number of samples."""
    rows, count = [], 0
    while count < max(wanted, LEAST_SAMPLES) or (count < MOST_SAMPLES and planner.position.step < PLANNED_STEPS):
        more, position = planner.next_step()
        rows += more
        count += sum(map(len, more))
    return Ahead(rows, position)


def mixture_rows(
    config: config_module.Config, sizes: dict[str, int], ahead: Ahead
) -> list[tuple[str, dict[str, float]]]:
    """Returns a row of MIXTURE for each source of the config; `sizes`: records of those that are on."""
    planned = collections.Counter(slot.source for slot in ahead.slots)
    rows = []
    for name, source in config.data.sources.items():
        shares = ahead.position.shares.get(name, 0.0), planned[name] / planned.total()
        numbers = {"weight": source.weight} | dict(zip(("intended share", "realised share"), shares, strict=True))
        if name in sizes:
            numbers |= {"records": sizes[name], "epochs begun": -(-ahead.position.draws[name] // sizes[name])}
        rows.append((name, numbers))
    return rows


def filled_rows(rows: list[list[plan.Slot]], shape: RowShape) -> tuple[list[tuple[str, dict[str, float]]], str]:
    """Returns a row of FILL for each budget, and the name of the one that is filled best."""
    used_R3 = np.array([np.sum([slot.size for slot in row], axis=0) for row in rows])
    holds_3 = np.array([shape.tokens, shape.patches, shape.answers])
    share_R3 = used_R3 / holds_3
    table = [
        (name, dict(zip(FILL, numbers, strict=True)))
        for name, *numbers in zip(
            packing.LIMITS, holds_3.tolist(), used_R3.mean(axis=0).tolist(), share_R3.mean(axis=0).tolist(),
            share_R3.min(axis=0).tolist(), strict=True,
        )
    ]  # fmt: skip
    return table, max(table, key=lambda row: row[1]["mean filled"])[0]


def make(maker: pipeline.SampleMaker, slots: list[plan.Slot]) -> tuple[list[page.Made], list[pipeline.Dropped]]:
    """Returns the samples of the slots, and what gave none, which is also said."""
    samples, dropped = [], []
    for slot in slots:
        made = maker(slot)
        if isinstance(made, pipeline.Dropped):
            dropped.append(made)
            log.say(f"no sample: {made.reason if made.bad else f'{made.record_id}: {made.reason}'}")
        else:
            samples.append(page.Made(slot.source, *made))
    return samples, dropped
