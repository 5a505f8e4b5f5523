"""evaluate: answers on evaluation sets."""

from pathlib import Path

from absl import flags

from depthlm_jax import files, log
from depthlm_jax import run as runs
from depthlm_jax.cli import command
from depthlm_jax.eval import evaluate, report, sets

COLUMNS = ["delta1", "delta2", "delta3", "abs_rel", "rmse", "parse_failure_rate", "distinct", "n"]


def define_flags(values: flags.FlagValues) -> None:
    command.define_config(values)
    command.define_path(values, "workdir", "folder of the run whose latest checkpoint answers")
    command.define_path(values, "output", "folder for metrics.json, predictions.jsonl and pictures")


def run(values: flags.FlagValues) -> dict:
    config, workdir = command.read_config(values), command.read_path(values, "workdir")
    output = Path(values.output or workdir / sets.FOLDER)
    this = runs.reopen(workdir, config)
    files.make_writable(output)
    step, parameters = runs.trained_parameters(this)
    scores = _one(this, step, parameters, output) if this.config.eval.source.path or not this.config.eval.sets else {}
    if this.config.eval.sets:
        scores["sets"] = sets.Sets(this, output).evaluate(step, list(this.config.eval.sets), parameters, log.say)
    return scores


def _one(this: runs.Run, step: int, parameters: dict, output: Path) -> dict:
    """Returns the scores of eval.source."""
    result = evaluate.evaluate(this, parameters)
    scores = evaluate.save(result, step, this.config.eval, output)
    log.say(table(scores, step, report.UNITS[this.config.eval.task]))
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
