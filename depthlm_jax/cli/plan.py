"""plan: does a recipe fit a TPU slice? Compiled for it, without one."""

import jax
from absl import flags

from depthlm_jax import config as config_module
from depthlm_jax import log
from depthlm_jax.cli import command
from depthlm_jax.eval import report
from depthlm_jax.plan import search, topology
from depthlm_jax.plan.program import Program, compile_step

GB, TERA = 2**30, 1e12


def define_flags(values: flags.FlagValues) -> None:
    command.define_config(values)
    command.define_text(values, "topology", "TPU slice: v5e-16, v5p-128, v6e-256, …; several as 2xv5e-256")
    flags.DEFINE_bool(
        "search", False, "find the least recomputation and the most rows a device that fit", flag_values=values
    )


def run(values: flags.FlagValues) -> dict:
    config = command.read_config(values)
    if not values.topology:
        raise command.UsageError(f"--topology is needed: one of {', '.join(topology.NAMES)}, or 2x… for two slices")
    jax.config.update("jax_platforms", "cpu")  # this machine's own devices are not asked for
    place = topology.find(values.topology)
    if not values.search:
        return _say(place, config, compile_step(config, place))
    rows, best = [], None
    for tried, program in search.tries(config, lambda one: compile_step(one, place)):
        best = (tried, program) if program.fits or best is None else best
        setting = f"remat={tried.model.remat}, {program.rows} rows a device"
        rows.append((setting, {"GiB": program.hbm_bytes / GB, "fits": "yes" if program.fits else "no"}))
        log.say(f"{setting}: {program.hbm_bytes / GB:.2f} GiB, {'fits' if program.fits else 'does not fit'}")
    log.say("\n" + report.table(rows, ["GiB", "fits"]) + "\n")
    tried, program = best
    return {"remat": tried.model.remat, "rows": program.rows, **_say(place, tried, program)}


def _say(place: topology.Topology, config: config_module.Config, program: Program) -> dict:
    """Prints what a program needs; returns it."""
    held, total = program.hbm_classes, program.hbm_bytes
    verdict = "fits" if program.fits else "does NOT fit"
    devices = len(place.devices)
    log.say(
        f"{place.name}: {verdict}: {total / GB:.2f} of {program.hbm_limit_bytes / GB:.2f} GiB a device · mesh "
        f"{program.mesh} · remat={config.model.remat} · {program.rows} rows a device × {program.micro_batches} "
        f"micro-batches = {program.samples:.0f} samples a step · compiled in {program.compile_seconds:.0f} s\n"
    )
    log.say(report.table([(name, {"GiB a device": size / GB}) for name, size in held.items()], ["GiB a device"]))
    sent = [
        (kind, {"runs": found["count"], "GB of results": found["bytes"] / 1e9})
        for kind, found in program.collectives.items()
    ]
    if sent:
        log.say("\n" + report.table(sent, ["runs", "GB of results"]))
    slowest = max(program.seconds.values())
    rate = program.samples / slowest / devices
    log.say(
        f"\nuseful {program.useful_flops / TERA:.1f} TFLOP a device and step; at their peaks "
        + ", ".join(f"{name} needs {seconds:.2f} s" for name, seconds in program.seconds.items())
        + f": at most {rate:.1f} samples/s a device, {program.useful_flops / slowest / place.chip.flops_s:.0%} MFU"
    )
    if not program.fits:
        log.say(f"\nTo make it fit: {_advice(config, program)}")
    return {
        "topology": place.name, "devices": devices, "fits": program.fits, "hbm_bytes": round(total),
        "hbm_limit_bytes": round(program.hbm_limit_bytes), "hbm_by_class": held, "collectives": program.collectives,
        "sent_bytes": program.sent_bytes, "useful_flops": program.useful_flops, "roofline_seconds": program.seconds,
        "micro_batches": program.micro_batches, "rows_per_device": program.rows, "samples": program.samples,
        "mesh": program.mesh, "compile_seconds": program.compile_seconds,
    }  # fmt: skip


def _advice(config: config_module.Config, program: Program) -> str:
    held = program.hbm_classes
    state = held["parameters"] + held["optimizer"] + held["gradients"]
    if state > program.hbm_limit_bytes / 2:
        return "divide the state among more devices (--config.mesh.fsdp), or take a larger slice"
    if program.rows > 1:
        return "raise --config.train.gradient_accumulation_steps, so that a device holds fewer rows at a time"
    if config.model.remat != "full":
        return "compute more again in the backward pass (--config.model.remat=full)"
    return "shorten rows (--config.data.max_tokens, data.max_patches), or split layers (--config.mesh.tensor=2)"
