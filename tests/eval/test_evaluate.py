import json

import pytest
import worlds

from depthlm_jax import run as runs
from depthlm_jax.data import pipeline
from depthlm_jax.data.records import open_source
from depthlm_jax.errors import InputError
from depthlm_jax.eval import evaluate

QUESTIONS = {"eval.samples": 19, "eval.batch_rows": 8, "eval.max_new_tokens": 4}


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
    report = evaluate.save(result, 7, tmp_path)

    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    assert json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse) == report
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["truth"] for line in lines] == result.truth.tolist()
    assert {"record_id", "pixels", "question", "text", "answer"} <= lines[0].keys()


def test_a_mesh_that_does_not_divide_the_rows_is_named(run, scenes):
    wanted = worlds.config(scenes, QUESTIONS | {"eval.batch_rows": 6})
    with pytest.raises(InputError, match="data × fsdp = 8 does not divide the rows") as error:
        runs.reopen(run.workdir, wanted)
    assert "6 rows at a time" in str(error.value) and "--config.eval.batch_rows" in str(error.value)
