"""export: parameters → a Hugging Face folder."""

from absl import flags

from depthlm_jax import config as config_module
from depthlm_jax import log, release
from depthlm_jax import run as runs
from depthlm_jax.cli import command


def define_flags(values: flags.FlagValues) -> None:
    command.define_path(values, "workdir", "folder of the run whose latest checkpoint is written")
    command.define_path(values, "hf_dir", "instead of --workdir: a Hugging Face folder to write again")
    command.define_path(values, "output", "the folder to write")


def run(values: flags.FlagValues) -> dict:
    output = command.read_path(values, "output")
    if bool(values.workdir) == bool(values.hf_dir):
        raise command.UsageError("give either --workdir or --hf_dir")
    if values.hf_dir:
        release.convert_folder(command.read_path(values, "hf_dir"), output, config_module.Model.family)
        step = None
    else:
        workdir = command.read_path(values, "workdir")
        step = release.export_run(runs.reopen(workdir), output)
    log.say(f"wrote {output}: {', '.join(sorted(file.name for file in output.iterdir()))}")
    return {"output": str(output), "step": step}
