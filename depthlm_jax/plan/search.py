"""The largest number of rows a device, and the least recomputation, that fit."""

import dataclasses
from collections.abc import Callable, Iterator

from depthlm_jax import config as config_module

LEAST_FIRST = ("none", "dots", "attended", "full")  # what the backward pass computes again


def tries(config: config_module.Config, compile_: Callable) -> Iterator[tuple[config_module.Config, object]]:
    """Yields each recipe that is compiled, and its `program.Program`, which `compile_` makes.

    With one row a device, policies are tried from the least recomputation on until one fits; then rows are doubled as
    long as they fit and divide the batch.
    """
    fitting = None
    for remat in LEAST_FIRST:
        one = _with(config, remat, 0)
        program = compile_(one)
        yield one, program
        if program.fits:
            fitting = program
            break
    while fitting is not None and fitting.micro_batches % 2 == 0:
        more = _with(config, one.model.remat, fitting.micro_batches // 2)
        program = compile_(more)
        yield more, program
        fitting = program if program.fits else None


def _with(config: config_module.Config, remat: str, micro_batches: int) -> config_module.Config:
    model = dataclasses.replace(config.model, remat=remat)
    train = dataclasses.replace(config.train, gradient_accumulation_steps=micro_batches)
    return dataclasses.replace(config, model=model, train=train)
