"""A model's answers on an evaluation set."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from depthlm_jax import batch as batch_contract
from depthlm_jax import log, sharding
from depthlm_jax.data import packing, pipeline, tasks
from depthlm_jax.data.records import open_source
from depthlm_jax.data.transforms import Example
from depthlm_jax.errors import InputError
from depthlm_jax.eval import decode, metrics
from depthlm_jax.run import Run

SIZE_STEPS = 8  # a row's sizes are rounded up to eighths of the training row: few compilations, little padding
SHOWN = 24  # questions whose images are kept for a picture


@dataclasses.dataclass(frozen=True)
class Answer:
    """One question and what the model said."""

    record_id: str
    pixels: tuple[tuple[int, int], ...]  # x, y of the points asked about, in the image that markers were drawn on
    question: str
    truth: float  # in the unit of the task: metres, but of speed m/s, of time s
    text: str
    answer: float | None  # None: no number could be read


@dataclasses.dataclass
class Result:
    """All answers in the order of the questions; only the first questions keep their images."""

    answers: list[Answer] = dataclasses.field(default_factory=list)
    shown: list[Example] = dataclasses.field(default_factory=list)
    excluded_points: int = 0  # no candidates, because the marker does not fit into the image
    questions_not_asked: int = 0  # because an image has too few points

    @property
    def truth(self) -> np.ndarray:
        return np.array([answer.truth for answer in self.answers])

    @property
    def numbers(self) -> list[float | None]:
        return [answer.answer for answer in self.answers]

    def scores(self) -> dict:
        """Returns the metrics of the model and of the best constant answer; None where nothing could be measured."""
        ids = [answer.record_id for answer in self.answers]
        constant_m, _ = metrics.best_constant(self.truth)
        model = metrics.depth_metrics(self.numbers, self.truth, ids)
        constant = metrics.depth_metrics([constant_m] * len(ids), self.truth, ids)
        return {
            "model": {name: None if math.isnan(value) else value for name, value in model.items()},
            "best_constant": {"answer": constant_m, **constant},
            "excluded_points": self.excluded_points,
            "questions_not_asked": self.questions_not_asked,
        }


def evaluate(run: Run, parameters: dict) -> Result:
    """Returns greedy answers to the questions of `eval.source`.

    Args:
      run: config, processor, mesh and network.
      parameters: on the mesh, float32.

    Raises:
      InputError: no question can be asked.
    """
    settings, stops = run.config.eval, run.processor.stop_tokens
    dtype = jnp.dtype(run.config.model.compute_dtype)
    greedy = decode.make_greedy(run.network, dtype, settings.max_new_tokens, stops)
    result, progress = Result(), log.Progress("answers")
    for examples in _groups(run, result):
        batch = sharding.put_batch(run.mesh, _prompts(run, examples))
        tokens_BG = np.asarray(greedy(parameters, batch))[: len(examples)]
        for example, tokens_G in zip(examples, tokens_BG, strict=True):
            text = run.processor.decode(decode.cut(tokens_G, stops))
            (asked,) = example.questions
            about = example.record_id, asked.pixels, asked.text, asked.truth
            result.answers.append(Answer(*about, text, tasks.parse_answer(text, asked.task)))
        result.shown += examples[: SHOWN - len(result.shown)]
        progress(len(result.answers) + result.questions_not_asked, settings.samples)
    if not result.answers:
        pairs = tasks.TASKS[settings.task].images == 2
        raise InputError(
            f"{settings.source.path}: no question to ask",
            found=f"{result.questions_not_asked} questions of {settings.task} without an answer in the records; "
            f"{result.excluded_points} points that the marker does not fit to",
            expected="pose and scene of neighbouring records" if pairs else "labelled points with room for the marker",
            fix="give another eval.source or eval.task",
        )  # fmt: skip
    return result


def _groups(run: Run, result: Result) -> Iterator[list[Example]]:
    """Yields the questions in groups of eval.batch_rows, the last may be smaller; `result` counts the rest."""
    waiting: list[Example] = []
    rows = run.config.eval.batch_rows
    records = open_source(run.config.eval.source, field="eval.source")
    for questions in pipeline.evaluation_questions(records, run.processor, run.config):
        result.excluded_points += questions.excluded
        result.questions_not_asked += questions.short
        waiting += questions.examples
        while len(waiting) >= rows:
            yield waiting[:rows]
            waiting = waiting[rows:]
    if waiting:
        yield waiting


def _prompts(run: Run, examples: list[Example]) -> dict[str, np.ndarray]:
    """Returns a batch of one prompt a row; rows without a question repeat the last one."""
    samples = [run.processor.encode(example.images, [(example.questions[0].text, None)]) for example in examples]
    padded = [*samples, *[samples[-1]] * (run.config.eval.batch_rows - len(samples))]
    shape, merged = _row_shape(run, samples), run.processor.config.patches_per_merged
    return packing.stack([packing.pack([sample], shape, merged) for sample in padded])


def _row_shape(run: Run, samples: list[batch_contract.Sample]) -> batch_contract.RowShape:
    full, unit = pipeline.row_shape(run.config.data, run.processor.config), run.processor.config.patch_slot_unit
    tokens = max(len(sample.tokens_T) for sample in samples)
    patches = max(len(sample.patches_PC) for sample in samples)
    return batch_contract.RowShape(
        _round_up(tokens, max(1, full.tokens // SIZE_STEPS)),
        _round_up(patches, unit * max(1, full.patches // unit // SIZE_STEPS)),
        answers=1,
        channels=full.channels,
    )


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def save(result: Result, step: int, folder: Path) -> dict:
    """Writes metrics.json and predictions.jsonl; returns the content of the former."""
    report = {"step": step, **result.scores()}
    (folder / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [json.dumps(dataclasses.asdict(answer)) for answer in result.answers]
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    return report
