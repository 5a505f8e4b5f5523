"""report: one HTML page about a run, or about several side by side."""

from pathlib import Path

from absl import flags

from depthlm_jax import html_page, log
from depthlm_jax.cli import command
from depthlm_jax.overview import history, page


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string(
        "workdir", [], "folder of a run; given several times, the runs are compared", flag_values=values
    )
    command.define_path(values, "output", "page to write; of one run: report.html in its workdir, if not given")


def run(values: flags.FlagValues) -> dict:
    workdirs = [Path(workdir) for workdir in values.workdir]
    if not workdirs:
        raise command.UsageError("--workdir is needed")
    if len(workdirs) > 1 and not values.output:
        raise command.UsageError("--output is needed: a page about several runs belongs to none of them")
    output = Path(values.output or workdirs[0] / "report.html")
    runs = [history.read(workdir) for workdir in workdirs]
    html_page.check_name(output)
    output.write_text(page.render(runs), encoding="utf-8")
    log.say(f"{', '.join(page.name_runs(runs))}: {output}")
    return {"output": str(output), "steps": {str(one.workdir): one.step for one in runs}}
