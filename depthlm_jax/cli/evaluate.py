"""evaluate: answers on an evaluation set."""

from pathlib import Path

from absl import flags

from depthlm_jax import files, log
from depthlm_jax import run as runs
from depthlm_jax.cli import command
from depthlm_jax.eval import evaluate, report

COLUMNS = ["delta1", "delta2", "delta3", "abs_rel", "rmse", "parse_failure_rate", "distinct", "n"]


def define_flags(values: flags.FlagValues) -> None:
    command.define_config(values)
    command.define_path(values, "workdir", "folder of the run whose latest checkpoint answers")
    command.define_path(values, "output", "folder for metrics.json, predictions.jsonl and pictures")


def run(values: flags.FlagValues) -> dict:
    config, workdir = command.read_config(values), command.read_path(values, "workdir")
    output = Path(values.output or workdir / "evaluation")
    this = runs.reopen(workdir, config)
    files.make_writable(output)
    step, parameters = runs.trained_parameters(this)
    result = evaluate.evaluate(this, parameters)
    scores = evaluate.save(result, step, this.config.eval, output)
    first = result.answers[: len(result.shown)]
    numbers, texts = [answer.answer for answer in first], [answer.text for answer in first]
    report.answer_sheet(result.shown, numbers, texts, output / "answers.png")
    unit = report.UNITS[this.config.eval.task]
    report.scatter(result.truth, result.numbers, output / "scatter.png", unit)
    log.say(table(scores, step, unit))
    ratio = scores["model"]["delta1"] / scores["best_constant"]["delta1"]
    log.say(f"δ1 is {ratio:.2f} × the best constant answer's")
    log.say(f"excluded points: {result.excluded_points} · questions not asked: {result.questions_not_asked}")
    log.say(f"pictures and files: {output}")
    return scores


def table(scores: dict, step: int, unit: str) -> str:
    """Returns the scores as a table; `distinct` counts the different numbers in 100 answers."""
    constant, expectation = scores["best_constant"], scores["expectation"]
    rows = [(f"model, step {step}", scores["model"]), (f"best constant, {constant['answer']:.2f} {unit}", constant)]
    if expectation:
        rows.insert(1, (f"expectation, of {100 * expectation['mass']:.1f} % of the probability", expectation))
    return report.table(rows, COLUMNS)
