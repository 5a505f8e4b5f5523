"""launch: a training run on a cluster, or what would be run there."""

import sys
from pathlib import Path

from absl import flags

from depthlm_jax import config as config_module
from depthlm_jax import log
from depthlm_jax.cli import command
from depthlm_jax.errors import InputError
from depthlm_jax.launch import checks, place, submit
from depthlm_jax.launch import job as jobs
from depthlm_jax.launch.targets import TARGETS
from depthlm_jax.plan import topology

WORDS = {
    "name": "of the job; default: depthlm- and the last part of --workdir (slurm, gke, tpu_vm)",
    "topology": "TPU slice: v5e-16, v5p-128, v6e-256, …; several as 2xv5e-256 (gke, tpu_vm)",
    "accelerator": "GPU, as GKE names it: nvidia-h100-80gb, … (gke)",
    "image": "that holds this repository: launch/Dockerfile (gke)",
    "volume": "mounted at /volume: a claim or gs://BUCKET (gke), SERVER:/SHARE or gs://BUCKET (tpu_vm)",
    "queue": "partition (slurm), or local queue of Kueue (gke)",
    "options": "more options for sbatch, in one word: '--time=12:00:00 --account=NAME' (slurm)",
}
OWN = (*WORDS, "nodes", "gpus", "spot")


def define_flags(values: flags.FlagValues) -> None:
    command.define_config(values)
    command.define_path(values, "workdir", "folder of the run, which all hosts see; an existing run is continued")
    flags.DEFINE_enum("target", None, list(TARGETS), "where it runs", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "print what would be run, and run nothing", flag_values=values)
    for name, text in WORDS.items():
        command.define_text(values, name, text)
    flags.DEFINE_integer("nodes", None, "with GPUs, or CPUs alone (slurm, gke)", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("gpus", None, "of a node (slurm, gke)", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("spot", False, "cheaper machines, which may be taken away (gke, tpu_vm)", flag_values=values)


def run(values: flags.FlagValues) -> dict:
    config = command.read_config(values)
    command.read_path(values, "workdir")
    target = _target(values)
    if not Path.cwd().samefile(jobs.ROOT):
        raise InputError(
            "launch: not at the root of the repository", found=Path.cwd(), expected=jobs.ROOT,
            fix=f"cd {jobs.ROOT}: what is launched looks for launch/, configs/ and .venv there",
        )  # fmt: skip
    job = read_job(values, config)
    start = TARGETS[target].start(job)
    result = {"target": target, "command": list(start.command), "environment": start.environment, "input": start.text}
    if values.dry_run:
        log.say(str(start))
        return result
    submit.check_installed(target, TARGETS[target])
    if target in ("local", "tpu_vm"):
        submit.become(start)
    if target == "slurm":
        submit.make_log_folder(Path(job.workdir))
    said = submit.submit(start)
    log.say(_next_steps(target, job, said))
    return result | {"said": said}


def read_job(values: flags.FlagValues, config: config_module.Config) -> jobs.Job:
    """Returns the job that the flags ask for, checked."""
    workdir, cloud = values.workdir, values.target in ("gke", "tpu_vm")
    name = values.name or jobs.name_of(workdir)
    words = {word: values[word].value for word in ("image", "queue", "accelerator")}
    checks.check_words({"name": name} | words | ({f"volume {values.target}": values.volume} if cloud else {}))
    checks.check_workdir(workdir)
    recipe = values["config"].config_filename
    if cloud:
        checks.check_mounted(workdir)
        recipe = checks.recipe_there(recipe)
    where, kind = _place(values)
    if values.target == "gke":
        checks.check_joined(where)
    if values.target != "local":  # which sees its own devices
        checks.check_mesh(config, where)
    given = command.overrides(values, sys.argv[1:])
    train = (f"--config={recipe}", *given, f"--workdir={workdir}")
    return jobs.Job(
        name, train, workdir, where, kind, values.image, values.volume, values.queue, values.spot,
        checks.split_options(values.options),
    )  # fmt: skip


def _target(values: flags.FlagValues) -> str:
    """Returns the target; raises UsageError for flags that it does not take or that it lacks."""
    name = values.target
    if name is None:
        raise command.UsageError(f"--target is needed: one of {', '.join(TARGETS)}")
    given = [flag for flag in OWN if values[flag].value not in (None, "", False)]
    strange = [flag for flag in given if flag not in TARGETS[name].takes]
    if strange:
        raise command.UsageError(
            f"--target={name} does not take --{strange[0]}; it takes "
            + (", ".join(f"--{flag}" for flag in TARGETS[name].takes) or "no flags but those of train")
        )
    lacking = [flag for flag in TARGETS[name].needs if flag not in given]
    if lacking:
        raise command.UsageError(f"--target={name} needs --{lacking[0]}: {WORDS[lacking[0]]}")
    return name


def _place(values: flags.FlagValues) -> tuple[place.Place, str]:
    """Returns where it runs, and what queued resources call one of its slices."""
    if values.topology and (values.nodes or values.gpus):
        raise command.UsageError("--topology is of TPUs, --nodes and --gpus of others: give one or the other")
    if values.topology:
        slices = topology.parse(values.topology)
        kind = place.accelerator_type(slices) if values.target == "tpu_vm" else ""
        return place.of_slices(slices), kind
    if values.target == "gke" and not (values.gpus and values.accelerator):
        raise command.UsageError("--target=gke needs --topology (TPUs), or --gpus and --accelerator (and --nodes)")
    return place.of_nodes(values.nodes or 1, values.gpus or 0, values.accelerator), ""


def _next_steps(target: str, job: jobs.Job, said: str) -> str:
    """Returns what the scheduler has said, where the log is and how to stop the job."""
    if target == "slurm":
        return f"job {said}: log {job.workdir}/slurm-{said}.log; squeue --jobs={said}; scancel {said}"
    first = f"{job.name}-slice-0"
    return f"{said}\nkubectl get jobset {job.name}; kubectl logs -f job/{first}; kubectl delete jobset {job.name}"
