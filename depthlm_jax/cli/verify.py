"""verify: PyTorch and JAX side by side."""

from absl import flags

from depthlm_jax import log
from depthlm_jax import verify as verification
from depthlm_jax.cli import command
from depthlm_jax.errors import InputError

LIMITS = {"max_abs_logit_diff": 1e-4, "kl": 1e-6, "loss_diff": 1e-5}


def define_flags(values: flags.FlagValues) -> None:
    command.define_path(values, "hf_dir", "the folder to check")


def run(values: flags.FlagValues) -> dict:
    folder = command.read_path(values, "hf_dir")
    found = verification.verify(folder)
    for name, limit in LIMITS.items():
        log.say(f"{name:20} {found[name]:.3g}   (limit {limit:g})")
    log.say(f"{'greedy_equal':20} {found['greedy_equal']}")
    worse = [name for name, limit in LIMITS.items() if not found[name] <= limit]
    if worse or not found["greedy_equal"]:
        raise InputError(
            f"{folder}: PyTorch and JAX disagree", found=found, expected=LIMITS,
            fix="check that config.json belongs to these weights; else report it with this output",
        )  # fmt: skip
    return found
