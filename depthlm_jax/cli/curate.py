"""curate: a data set → records on disk."""

from absl import flags

from depthlm_jax import log
from depthlm_jax.cli import command
from depthlm_jax.data import synthetic

BUILDERS = {"synthetic": synthetic.build}


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("dataset", "synthetic", sorted(BUILDERS), "which data set", flag_values=values)
    command.define_path(values, "output", "folder for the records; a complete data set there is kept")
    flags.DEFINE_integer("train", 3000, "scenes of the training split", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("validation", 300, "scenes of the validation split", lower_bound=1, flag_values=values)


def run(values: flags.FlagValues) -> dict:
    output = command.read_path(values, "output")
    folder = BUILDERS[values.dataset](output, values.train, values.validation, log.Progress("scenes"))
    log.say(f"records: {folder}")
    return {"path": str(folder)}
