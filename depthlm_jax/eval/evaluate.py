"""A model's answers on an evaluation set."""

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from depthlm_jax import batch as batch_contract
from depthlm_jax import config as config_module
from depthlm_jax import files, log, sharding
from depthlm_jax.data import packing, pipeline, tasks
from depthlm_jax.data.records import open_source
from depthlm_jax.data.transforms import Example
from depthlm_jax.errors import InputError
from depthlm_jax.eval import decode, metrics, report
from depthlm_jax.run import Run

SIZE_STEPS = 8  # a row's sizes are rounded up to eighths of the training row: few compilations, little padding
SHOWN = 24  # questions whose images are kept for a picture: the first, and half as many of the best and of the worst


@dataclasses.dataclass(frozen=True)
class Answer:
    """One question and what the model said."""

    record_id: str
    pixels: tuple[tuple[int, int], ...]  # x, y of the points asked about, in the image that markers were drawn on
    question: str
    truth: float  # in the unit of the task: metres, but of speed m/s, of time s
    text: str
    answer: float | None  # None: no number could be read
    expected: float | None  # mean of the numbers that may follow eval.answer_prefix; None: none, or not asked for
    mass: float | None  # probability of those numbers

    @property
    def ratio(self) -> float:
        """How many times too large or too small the answer is; infinite of one that cannot be read."""
        return max(self.answer / self.truth, self.truth / self.answer) if self.answer else math.inf


@dataclasses.dataclass
class Result:
    """All answers in the order of the questions; only the first questions keep their images."""

    answers: list[Answer] = dataclasses.field(default_factory=list)
    shown: list[Example] = dataclasses.field(default_factory=list)
    ranked: list[tuple[Answer, Example]] = dataclasses.field(default_factory=list)  # the best ones, then the worst
    excluded_points: int = 0  # no candidates, because the marker does not fit into the image
    questions_not_asked: int = 0  # because an image has too few points

    def add(self, answers: list[Answer], examples: list[Example]) -> None:
        """Takes the answers to the next questions."""
        self.answers += answers
        self.shown += examples[: SHOWN - len(self.shown)]
        ranked = sorted([*self.ranked, *zip(answers, examples, strict=True)], key=lambda pair: pair[0].ratio)
        self.ranked = ranked if len(ranked) <= SHOWN else [*ranked[: SHOWN // 2], *ranked[-(SHOWN // 2) :]]

    @property
    def truth(self) -> np.ndarray:
        return np.array([answer.truth for answer in self.answers])

    @property
    def numbers(self) -> list[float | None]:
        return [answer.answer for answer in self.answers]

    def scores(self) -> dict:
        """Returns the metrics of the model and of the best constant answer; None where nothing could be measured."""
        constant_m, _ = metrics.best_constant(self.truth)
        masses = [answer.mass for answer in self.answers if answer.mass is not None]
        expected = [answer.expected for answer in self.answers]
        return {
            "model": {**self._metrics(self.numbers), "distinct": distinct_per_100(self.numbers)},
            "expectation": {**self._metrics(expected), "mass": sum(masses) / len(masses)} if masses else None,
            "best_constant": {"answer": constant_m, **self._metrics([constant_m] * len(self.answers))},
            "excluded_points": self.excluded_points,
            "questions_not_asked": self.questions_not_asked,
        }

    def ranges(self) -> list[dict[str, float | None]]:
        """Returns n, δ1 and AbsRel by range of the truth."""
        return metrics.by_range(self.numbers, self.truth)

    def _metrics(self, numbers: list[float | None]) -> dict[str, float | None]:
        values = metrics.depth_metrics(numbers, self.truth, [answer.record_id for answer in self.answers])
        return {name: None if math.isnan(value) else value for name, value in values.items()}


def distinct_per_100(numbers: list[float | None]) -> float:
    """Returns how many different numbers 100 random ones of these answers hold on average; of fewer, all are taken.

    >>> distinct_per_100([1.5, 1.5, 2.25, None]), distinct_per_100([3.0] * 500)
    (2.0, 1.0)

    Source: Hurlbert 1971, rarefaction: the probability that a number is missing is C(n − its count, 100) / C(n, 100).
    """
    count, drawn = len(numbers), min(len(numbers), 100)
    uses = collections.Counter(number for number in numbers if number is not None).values()
    return sum(1 - math.comb(count - use, drawn) / math.comb(count, drawn) for use in uses)


def make_decoder(run: Run) -> Callable:
    """Returns the decoder of `evaluate`; one that is kept compiles once."""
    settings, dtype = run.config.eval, jnp.dtype(run.config.model.compute_dtype)
    return decode.make_decoder(run.network, dtype, settings.max_new_tokens, _ends(run), settings.expectation)


def evaluate(
    run: Run, parameters: dict, decoder: Callable | None = None, progress: Callable[[int, int], None] | None = None
) -> Result:
    """Returns the answers to the questions of `eval.source`: greedy ones and, if asked for, expectations.

    Several processes all have all answers.

    Args:
      run: config, processor, mesh and network.
      parameters: on the mesh.
      decoder: of `make_decoder`; None: made for this once.
      progress: is told (questions done, of how many); None: printed.

    Raises:
      InputError: no question can be asked.
    """
    settings, ends, result = run.config.eval, _ends(run), Result()
    decoder, progress = decoder or make_decoder(run), progress or log.Progress("answers")
    mine = list(sharding.host_rows(run.mesh, settings.batch_rows))
    for examples in _groups(run, result):
        local = {name: array[mine] for name, array in _prompts(run, examples).items()}
        decoded = decoder(parameters, sharding.put_batch(run.mesh, local, settings.batch_rows))
        decoded = multihost_utils.process_allgather(decoded, tiled=True)
        result.add(list(_answers(run, ends, examples, decoded)), examples)
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


def _ends(run: Run) -> decode.Stops | decode.Numbers:
    """Returns what an answer ends with: after eval.answer_prefix, whatever does not belong to its number."""
    settings, processor = run.config.eval, run.processor
    if not settings.answer_prefix:
        return decode.Stops(processor.stop_tokens)
    expected = tasks.beginnings(settings.task, ray_first=run.config.data.camera_hint == "ray")
    if settings.answer_prefix not in expected:
        raise InputError(
            "config: the answer's number does not follow eval.answer_prefix", found=repr(settings.answer_prefix),
            expected=" or ".join(map(repr, expected)) + f", for {settings.task}", fix="set --config.eval.answer_prefix",
        )  # fmt: skip
    return decode.Numbers(processor.digit_tokens, processor.point_token, tasks.TASKS[settings.task].may_be_zero)


def _answers(
    run: Run, ends: decode.Stops | decode.Numbers, examples: list[Example], decoded: decode.Decoded
) -> Iterator[Answer]:
    """Yields the answers of the first rows; the others repeat the last question."""
    for row, example in enumerate(examples):
        (asked,) = example.questions
        text, answer = _read(run, ends, decoded.tokens_BG[row], asked.task)
        mass = None if decoded.mass_B is None else float(decoded.mass_B[row])
        expected = float(decoded.expected_B[row]) if mass else None
        yield Answer(
            example.record_id, asked.pixels, asked.text, asked.truth, text, answer, expected=expected, mass=mass
        )


def _read(run: Run, ends: decode.Stops | decode.Numbers, tokens_G: np.ndarray, task: str) -> tuple[str, float | None]:
    """Returns an answer as text and as number; a number that has no end is none."""
    if isinstance(ends, decode.Stops):
        text = run.processor.decode(decode.cut(tokens_G, ends.tokens))
        return text, tasks.parse_answer(text, task)
    number, ended = decode.cut_number(tokens_G, ends)
    text = run.processor.decode(number)
    return run.config.eval.answer_prefix + text, tasks.parse_number(text, task) if ended else None


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
    begin = run.config.eval.answer_prefix
    samples = [
        run.processor.encode(example.images, [(example.questions[0].text, None)], begin=begin) for example in examples
    ]
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


def save(result: Result, step: int, settings: config_module.Eval, folder: Path) -> dict:
    """Writes metrics.json, which also says what was evaluated, predictions.jsonl and pictures; returns the former."""
    found = {"step": step, "eval": dataclasses.asdict(settings), **result.scores()}
    found["ranges"] = result.ranges()
    files.make_writable(folder)
    files.write_json(folder / "metrics.json", found)
    lines = [json.dumps(dataclasses.asdict(answer)) for answer in result.answers]
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    half = len(result.ranked) // 2
    sheets = {
        "answers": list(zip(result.answers, result.shown, strict=False)),
        "best": result.ranked[: len(result.ranked) - half],
        "worst": result.ranked[::-1][:half],
    }
    for name, pairs in sheets.items():
        if pairs:
            answers, examples = zip(*pairs, strict=True)
            numbers, texts = [answer.answer for answer in answers], [answer.text for answer in answers]
            report.answer_sheet(examples, numbers, texts, folder / f"{name}.png")
    report.scatter(result.truth, result.numbers, folder / "scatter.png", report.UNITS[settings.task])
    return found
