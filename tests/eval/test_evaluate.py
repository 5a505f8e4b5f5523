import doctest
import json

import jax
import numpy as np
import pytest
import worlds

from depthlm_jax import config as config_module
from depthlm_jax import run as runs
from depthlm_jax.cli import evaluate as command
from depthlm_jax.data import pipeline
from depthlm_jax.data.records import open_source
from depthlm_jax.data.tasks import parse_answer, parse_number
from depthlm_jax.errors import InputError
from depthlm_jax.eval import evaluate, metrics

QUESTIONS = {"eval.samples": 19, "eval.batch_rows": 8, "eval.max_new_tokens": 4}
BEGIN = "<think> The point is around "
NUMBERS = {"eval.answer_prefix": BEGIN, "eval.expectation": True}


def open_run(scenes, workdir, changes=None) -> runs.Run:
    return runs.open_run(worlds.config(scenes, QUESTIONS | (changes or {})), workdir)


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory) -> runs.Run:
    return open_run(scenes, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def result(run) -> evaluate.Result:
    return evaluate.evaluate(run, runs.first_parameters(run))


def test_every_question_is_answered_in_its_order(run, result):
    records = open_source(run.config.eval.source)
    asked = list(pipeline.evaluation_questions(records, run.processor, run.config))
    examples = [example for questions in asked for example in questions.examples]
    assert [(a.record_id, a.pixels, a.truth) for a in result.answers] == [
        (e.record_id, e.questions[0].pixels, e.questions[0].truth) for e in examples
    ]
    assert len(examples) + result.questions_not_asked == 19
    assert result.excluded_points == sum(questions.excluded for questions in asked)
    assert [shown.record_id for shown in result.shown] == [e.record_id for e in examples]


def test_answers_do_not_depend_on_their_neighbours(run, result, tmp_path):
    other = open_run(open_path(run), tmp_path / "other", {"eval.batch_rows": 16})
    again = evaluate.evaluate(other, runs.first_parameters(other))
    assert [a.text for a in again.answers] == [a.text for a in result.answers]


def open_path(run: runs.Run) -> str:
    return run.config.eval.source.path


def test_an_untrained_model_is_not_measured_but_counted(result):
    scores = result.scores()
    assert scores["model"]["parse_failure_rate"] == 1
    assert scores["model"]["delta1"] == 0
    assert scores["model"]["abs_rel"] is None
    assert 0 < scores["best_constant"]["delta1"] < 1


def test_a_run_is_evaluated_as_it_was_trained(run, scenes, capsys):
    wanted = worlds.config(scenes, QUESTIONS | {"data.label_kind": "ray", "eval.samples": 3, "mesh.fsdp": 2})
    again = runs.reopen(run.workdir, wanted)
    assert again.config.data.label_kind == "z"
    assert again.config.eval.samples == 3
    assert again.mesh.shape["fsdp"] == 2
    assert (
        "was trained with another value, which is used: data.label_kind: 'z' there, 'ray' here"
        in capsys.readouterr().out
    )


def test_files_hold_all_answers(result, tmp_path):
    report = evaluate.save(result, 7, config_module.Eval(), tmp_path)

    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    assert json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse) == report
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["truth"] for line in lines] == result.truth.tolist()
    assert {"record_id", "pixels", "question", "text", "answer", "expected", "mass"} <= lines[0].keys()
    assert {(line["expected"], line["mass"]) for line in lines} == {(None, None)} and report["expectation"] is None


def test_a_mesh_that_does_not_divide_the_rows_is_named(run, scenes):
    wanted = worlds.config(scenes, QUESTIONS | {"eval.batch_rows": 6})
    with pytest.raises(InputError, match="data × fsdp = 8 does not divide the rows") as error:
        runs.reopen(run.workdir, wanted)
    assert "6 rows at a time" in str(error.value) and "--config.eval.batch_rows" in str(error.value)


@pytest.fixture(scope="module")
def begun(scenes, tmp_path_factory) -> runs.Run:
    return open_run(scenes, tmp_path_factory.mktemp("begun"), NUMBERS)


@pytest.fixture(scope="module")
def numbers(begun) -> evaluate.Result:
    return evaluate.evaluate(begun, runs.first_parameters(begun))


def test_answers_begin_as_they_are_told_to_and_end_with_their_number(begun, numbers, result):
    assert [a.question for a in numbers.answers] == [a.question for a in result.answers]
    for answer in numbers.answers:
        assert answer.text.startswith(BEGIN) and not set(answer.text.removeprefix(BEGIN)) - set("0123456789.")
        assert answer.answer in (None, parse_number(answer.text.removeprefix(BEGIN)))


def test_mass_is_no_more_than_that_of_the_first_token(begun, numbers):
    """Of prompts as the processor makes them; an untrained model says some number with some probability."""
    (examples, *_) = evaluate._groups(begun, evaluate.Result())
    prompts = evaluate._prompts(begun, examples)
    sample = begun.processor.encode(examples[0].images, [(examples[0].questions[0].text, None)], begin=BEGIN)
    assert prompts["tokens_BT"][0, : len(sample.tokens_T)].tolist() == sample.tokens_T.tolist()
    logits_BAV = jax.jit(begun.network.logits)(runs.first_parameters(begun), prompts)
    p_BV = np.asarray(jax.nn.softmax(logits_BAV[:, 0]))
    first_B = p_BV[:, [*begun.processor.digit_tokens, begun.processor.point_token]].sum(axis=1)
    for answer, first in zip(numbers.answers, first_B.tolist(), strict=False):
        assert 0.2 * first < answer.mass < first < 1
        assert 0 < answer.expected < 10**8


def test_expectations_are_scored_beside_the_answers(numbers, result, tmp_path):
    report = evaluate.save(numbers, 7, config_module.Eval(), tmp_path)
    ids, expected = [a.record_id for a in numbers.answers], [a.expected for a in numbers.answers]
    mass = float(np.mean([a.mass for a in numbers.answers]))
    assert report["expectation"] == {**metrics.depth_metrics(expected, numbers.truth, ids), "mass": pytest.approx(mass)}
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["expected"] for line in lines] == expected
    with_line, without = (command.table(scores, 7, "m").splitlines() for scores in (report, result.scores()))
    assert len(with_line) == 1 + len(without) and "distinct" in with_line[0]
    assert with_line[3].startswith(f"expectation, of {100 * mass:.1f} % of the probability")
    assert f"{report['expectation']['abs_rel']:.3f}" in with_line[3]


@pytest.mark.parametrize(
    ("said", "task", "number"),
    [
        ("2.35m", "distance", 2.35), ("2.3.5m", "distance", 2.3), (".5m", "distance", 0.5), ("12.m", "distance", 12),
        ("0.00m", "distance", None), ("0.00m", "translation", 0), ("m", "distance", None), (".m", "distance", None),
        ("2.35", "distance", None),
    ],
)  # fmt: skip
def test_the_number_after_the_beginning_is_the_answer(begun, said, task, number):
    processor = begun.processor
    ids = dict(zip("0123456789.m", [*processor.digit_tokens, processor.point_token, 0], strict=True))
    tokens_G = np.array([ids[letter] for letter in said])
    text, answer = evaluate._read(begun, evaluate._ends(begun), tokens_G, task)
    assert answer == number
    assert text == BEGIN + ("2.3" if said == "2.3.5m" else said.rstrip("m"))


@pytest.mark.parametrize("text", ["", ".", "1.2.3", "2 ", "1e999", "nan", "-1", "0", "²", "2.5 m"])
def test_what_is_no_number_of_an_answer_is_none_by_itself(text):
    assert parse_number(text) is None and parse_answer(f"<answer>{text}m</answer>") is None


def test_expectation_without_a_beginning_is_refused(scenes):
    with pytest.raises(InputError, match=r"eval\.expectation needs eval\.answer_prefix") as error:
        worlds.config(scenes, {"eval.expectation": True})
    assert "--config.eval.answer_prefix" in str(error.value) and "The point is around" in str(error.value)
    assert worlds.config(scenes, {"eval.answer_prefix": BEGIN}).eval.expectation is False


def test_distinct_answers_of_a_hundred():
    assert doctest.testmod(evaluate).failed == 0
    rng = np.random.default_rng(0)
    numbers = [None] * 30 + np.round(rng.exponential(3, 370), 1).tolist()
    draws = [rng.choice(np.array(numbers, float), 100, replace=False) for _ in range(4000)]
    average = np.mean([len(np.unique(draw[~np.isnan(draw)])) for draw in draws])
    assert evaluate.distinct_per_100(numbers) == pytest.approx(average, abs=0.2)
    assert evaluate.distinct_per_100([None, None]) == 0


@pytest.mark.parametrize(
    "task, prefix, hint", [("speed", BEGIN, "none"), ("distance", BEGIN.rstrip(), "none"), ("distance", BEGIN, "ray")]
)
def test_a_prefix_that_no_answer_follows(scenes, tmp_path, task, prefix, hint):
    changes = {"eval.task": task, "eval.answer_prefix": prefix, "data.camera_hint": hint}
    run = open_run(scenes, tmp_path, changes)
    with pytest.raises(InputError, match=r"(?s)does not follow eval.answer_prefix.*'<answer> ', for"):
        evaluate.evaluate(run, {})
