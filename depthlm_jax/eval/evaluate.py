"""A model's answers on an evaluation set."""

import dataclasses
import json
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


@dataclasses.dataclass(frozen=True)
class Result:
    """Answers in the order of the questions."""

    examples: list[Example]
    texts: list[str]
    answers_m: list[float | None]
    excluded: int  # points whose marker does not fit into the image
    short: int  # questions that could not be asked, because an image has too few points

    @property
    def truth_m(self) -> np.ndarray:
        return np.array([example.truth_m for example in self.examples])

    def scores(self) -> dict:
        """Returns the metrics of the model and of the best constant answer."""
        ids = [example.record_id for example in self.examples]
        constant_m, _ = metrics.best_constant(self.truth_m)
        return {
            "model": metrics.depth_metrics(self.answers_m, self.truth_m, ids),
            "best_constant": {
                "answer_m": constant_m,
                **metrics.depth_metrics([constant_m] * len(ids), self.truth_m, ids),
            },
            "excluded_points": self.excluded,
            "questions_not_asked": self.short,
        }


def evaluate(run: Run, parameters: dict) -> Result:
    """Returns greedy answers to the questions of `eval.source`.

    Args:
      run: config, processor, mesh and network.
      parameters: on the mesh, float32.

    Raises:
      InputError: no question can be asked.
    """
    config = run.config
    records = open_source(config.eval.source)
    asked = list(
        log.track(
            pipeline.evaluation_questions(records, run.processor, config),
            min(config.eval.samples, len(records)),
            "images",
        )
    )
    examples = [example for questions in asked for example in questions.examples]
    if not examples:
        raise InputError(
            f"{config.eval.source.path}: no question to ask", found=f"{len(records)} records, no usable point",
            expected="labelled points with room for the marker", fix="give another eval.source",
        )  # fmt: skip
    dtype = jnp.dtype(config.model.compute_dtype)
    stops = run.processor.stop_tokens
    greedy = decode.make_greedy(run.network, dtype, config.eval.max_new_tokens, stops)
    texts = []
    for batch, count in log.track(
        _batches(run, examples), -(-len(examples) // config.eval.batch_rows), "answer batches"
    ):
        tokens_BG = np.asarray(greedy(parameters, sharding.put_batch(run.mesh, batch)))
        texts += [run.processor.decode(decode.cut(tokens_G, stops)) for tokens_G in tokens_BG[:count]]
    excluded, short = sum(q.excluded for q in asked), sum(q.short for q in asked)
    return Result(examples, texts, [tasks.parse_answer(text) for text in texts], excluded, short)


def _batches(run: Run, examples: list[Example]) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Yields batches of one prompt a row, and how many of their rows are questions (the rest repeat the last one)."""
    rows = run.config.eval.batch_rows
    for start in range(0, len(examples), rows):
        group = examples[start : start + rows]
        samples = [run.processor.encode([example.image], example.question, None) for example in group]
        padded = [*samples, *[samples[-1]] * (rows - len(samples))]
        shape = _shape(run, samples)
        merged = run.processor.config.patches_per_merged
        yield packing.stack([packing.pack([sample], shape, merged) for sample in padded]), len(group)


def _shape(run: Run, samples: list[batch_contract.Sample]) -> batch_contract.RowShape:
    full = pipeline.row_shape(run.config.data, run.processor.config)
    tokens = max(len(sample.tokens_T) for sample in samples)
    patches = max(len(sample.patches_PC) for sample in samples)
    unit = run.processor.config.patch_slot_unit
    return batch_contract.RowShape(
        _round_up(tokens, max(1, full.tokens // SIZE_STEPS)),
        _round_up(patches, unit * max(1, full.patches // unit // SIZE_STEPS)),
        1,
        full.channels,
    )


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def save(result: Result, step: int, folder: Path) -> dict:
    """Writes metrics.json and predictions.jsonl; returns the content of the former."""
    report = {"step": step, **result.scores()}
    (folder / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")
    with (folder / "predictions.jsonl").open("w") as out:
        for example, text, answer_m in zip(result.examples, result.texts, result.answers_m, strict=True):
            line = {
                "record_id": example.record_id, "pixel": example.pixel, "truth_m": example.truth_m,
                "answer_m": answer_m, "text": text, "question": example.question,
            }  # fmt: skip
            out.write(json.dumps(line) + "\n")
    return report
