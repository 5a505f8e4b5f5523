"""sweep: runs of a recipe that differ in some fields, started and compared."""

import os
import shlex
import signal
import sys
from pathlib import Path

from absl import flags

from depthlm_jax import log, recipes
from depthlm_jax.cli import command
from depthlm_jax.errors import InputError
from depthlm_jax.sweep import expand, gke, local, place, progress, report, slurm
from depthlm_jax.sweep.expand import Run
from depthlm_jax.sweep.spec import Sweep


def define_flags(values: flags.FlagValues) -> None:
    command.define_path(values, "sweep", "sweep file, for example configs/sweeps/demo_mixture.py")
    command.define_path(values, "workdir", "folder of the sweep, with a folder for each run; an existing one goes on")
    command.define_config(values)
    flags.DEFINE_enum("target", "local", list(TARGETS), "where the runs are started", flag_values=values)
    command.define_text(
        values, "options", "more of them for sbatch (slurm) or launch (gke): '--topology=v5e-16 --image=… --volume=…'"
    )
    flags.DEFINE_integer(
        "parallel", None, "runs at a time; if not given: one here, as many as there is room for on a cluster",
        lower_bound=1, flag_values=values,
    )  # fmt: skip
    command.define_text(
        values, "run", "this run alone, by its number from 0, in this very process; slurm: number of the array's task"
    )
    flags.DEFINE_bool("report", False, "start nothing: compare the runs as far as they are", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "start nothing: print what would be run", flag_values=values)


def run(values: flags.FlagValues) -> dict:
    file, workdir = command.read_path(values, "sweep"), command.read_path(values, "workdir")
    sweep = expand.load(str(file))
    recipe, given = values["config"].config_filename, values["config"].override_values
    runs = expand.expand(sweep, recipe, recipes.load(recipe), given, workdir)
    if values.report:
        return report.write(sweep, place.in_order(workdir, runs), workdir)
    if values.run:
        return become(_numbered(place.in_order(workdir, runs), values.run))
    if values.dry_run:
        ordered = place.in_order(workdir, runs)
    else:
        held = place.hold(workdir)  # until the sweep ends
        ordered = place.settle(workdir, runs)
    result = TARGETS[values.target](values, sweep, ordered)
    if not values.dry_run:
        held.close()
    return result


def run_here(values: flags.FlagValues, sweep: Sweep, runs: list[Run]) -> dict:
    """Returns the report's result after all runs have ended; raises InputError if some failed."""
    if values.dry_run:
        return _show([local.command(run) for run in runs if not progress.of(run).finished])
    local.open_data(runs)
    parallel = values.parallel or 1
    failed, ended_by = local.launch(runs, parallel, sweep.retries, lambda run: report.line(sweep, run))
    for run in failed:
        log.say(f"{run.name} failed; the end of {run.workdir / progress.LOG}:\n{local.last_words(run)}")
    evaluated = any(progress.of(run).scores for run in runs)
    result = report.write(sweep, runs, Path(values.workdir)) if evaluated else {}
    if ended_by:
        log.say(f"stopped by {signal.Signals(ended_by).name}: the same command goes on")
    if ended_by == signal.SIGINT:
        raise KeyboardInterrupt
    if failed:
        raise InputError(
            f"sweep: {len(failed)} of {len(runs)} runs failed", found=", ".join(run.name for run in failed),
            expected="runs that finish", fix="see their logs; the same command goes on with what is not finished",
        )  # fmt: skip
    return result


def run_on_slurm(values: flags.FlagValues, sweep: Sweep, runs: list[Run]) -> dict:
    """Returns the number of the job whose tasks are the runs that are not finished."""
    numbers = [number for number, run in enumerate(runs) if not progress.of(run).finished]
    recipe, workdir = values["config"].config_filename, Path(values.workdir)
    arguments = ["sweep", f"--sweep={values.sweep}", f"--workdir={workdir}", "--run=slurm"]
    arguments += [f"--config={recipe}"] if recipe != sweep.recipe else []
    given = [f"--config.{path}={expand.text(value)}" for path, value in values["config"].override_values.items()]
    sbatch = slurm.command(workdir, numbers, values.parallel or 0, shlex.split(values.options), arguments + given)
    if values.dry_run or not numbers:
        return _show([sbatch] if numbers else [])
    job = slurm.submit(workdir, sbatch)
    log.say(f"job {job}: {len(numbers)} runs; output in {workdir / 'slurm'}; sweep --report compares them")
    return {"job": job}


def run_on_gke(values: flags.FlagValues, sweep: Sweep, runs: list[Run]) -> dict:
    """Returns the commands that gave Kubernetes a JobSet for each run that is not finished."""
    left = [(number, run) for number, run in enumerate(runs) if not progress.of(run).finished]
    commands = [gke.command(Path(values.workdir), *one, shlex.split(values.options)) for one in left]
    if values.dry_run:
        return _show(commands)
    for one in commands:
        gke.launch(one)
    return {"commands": [shlex.join(one) for one in commands]}


TARGETS = {  # what starts the runs, given flags, sweep and runs
    "local": run_here,
    "slurm": run_on_slurm,
    "gke": run_on_gke,
}


def become(run: Run) -> dict:
    """Turns this process into the training of a run, so that signals and exit status are those of `train`."""
    if progress.of(run).finished:
        log.say(f"{run.name} is finished")
        return {"run": run.name}
    log.say(f"{run.name}: {shlex.join(local.command(run))}")
    together = ["--distributed"] if slurm.has_several_processes() else []
    os.execv(sys.executable, [*local.command(run), *together])


def _numbered(runs: list[Run], given: str) -> Run:
    number = slurm.task() if given == "slurm" else int(given) if given.isdecimal() else -1
    if not 0 <= number < len(runs):
        raise InputError(
            f"sweep: there is no run {number if given == 'slurm' else given}", found=f"{len(runs)} runs",
            expected=f"0 to {len(runs) - 1}, or slurm", fix="give another --run; --dry_run lists the runs",
        )  # fmt: skip
    return runs[number]


def _show(commands: list[list[str]]) -> dict:
    lines = [shlex.join(one) for one in commands]
    log.say("\n".join(lines) or "all runs are finished")
    return {"commands": lines}
