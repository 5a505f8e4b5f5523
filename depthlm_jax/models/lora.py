"""LoRA: low-rank factors beside the kernels of linear layers. Source: Hu et al. 2021, as `peft` does it."""

import dataclasses
import difflib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from depthlm_jax.config import Lora
from depthlm_jax.errors import InputError
from depthlm_jax.hf import LINEAR, Rule
from depthlm_jax.models.layers import Linear

FACTORS = ("lora_a", "lora_b")


def add(module: nnx.Module, settings: Lora, rngs: nnx.Rngs) -> None:
    """Puts factors into every linear layer whose '/'-path matches the pattern: a random, b zero.

    Raises:
      InputError: the pattern is no regular expression, or matches no linear layer.
    """
    layers = {"/".join(map(str, path)): part for path, part in nnx.iter_modules(module) if isinstance(part, Linear)}
    for path in matching(settings.pattern, list(layers)):
        layer = layers[path]
        *stack, width = layer.kernel.shape[: -layer.out_axes]
        bound = 1 / math.sqrt(width)
        shape = (*stack, width, settings.rank)
        layer.lora_a = nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        layer.lora_b = nnx.Param(jnp.zeros((*stack, settings.rank, *layer.kernel.shape[-layer.out_axes :])))
        layer.lora_scale = settings.alpha / settings.rank


def matching(pattern: str, paths: list[str]) -> list[str]:
    """Returns the paths that the whole pattern matches; raises InputError if there are none."""
    try:
        found = [path for path in paths if re.fullmatch(pattern, path)]
    except re.error as error:
        raise InputError(
            "config: model.lora.pattern is no regular expression", found=f"{pattern!r}: {error}",
            expected="such as 'model/layers/self_attn/(q|v)_proj'", fix="set --config.model.lora.pattern",
        ) from error  # fmt: skip
    if not found:
        near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
        raise InputError(
            "config: model.lora.pattern matches no linear layer", found=repr(pattern),
            expected=f"the whole path of some of {len(paths)}, such as {', '.join(near)}",
            fix="set --config.model.lora.pattern",
        )  # fmt: skip
    return found


def rules(of_kernels: list[Rule], paths: set[str]) -> list[Rule]:
    """Returns the rules of the factors among `paths`: the names that `peft` gives them, beside their kernels'."""
    table = []
    for rule in of_kernels:
        layer, _, name = rule.path.rpartition("/")
        if name != "kernel" or f"{layer}/lora_a" not in paths:
            continue
        lead = "L" if "{}" in rule.tensor else ""
        width, out = rule.axes[len(lead)], rule.axes[len(lead) + 1 :]
        tensor = rule.tensor.removesuffix(".weight")
        table.append(Rule(f"{layer}/lora_a", f"{tensor}.lora_A.weight", LINEAR, f"{lead}{width}R"))
        table.append(Rule(f"{layer}/lora_b", f"{tensor}.lora_B.weight", rule.layout, f"{lead}R{out}"))
    return table


def merged(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, settings: Lora, *, stacked: bool) -> np.ndarray:
    """Returns kernel + a · b · alpha / rank, float32; beside it there is the product of one layer in memory."""
    out, scale = np.array(kernel, np.float32), np.float32(settings.alpha / settings.rank)
    for layer, a_of_layer, b_of_layer in zip(*((out, a, b) if stacked else (out[None], a[None], b[None])), strict=True):
        layer += np.tensordot(np.float32(a_of_layer), np.float32(b_of_layer), axes=1) * scale
    return out


def adapter_rules(of_factors: list[Rule], modules: dict[str, str]) -> list[Rule]:
    """Returns the rules with the names that `peft` gives the tensors in transformers 5.

    Args:
      of_factors: of `rules`.
      modules: of the family.
    """
    table = []
    for rule in of_factors:
        hub = next(hub for hub in modules if rule.tensor.startswith(hub))
        there = rule.tensor.replace(hub, modules[hub], 1)
        table.append(dataclasses.replace(rule, tensor=f"base_model.model.{there}"))
    return table


def targets(of_adapter: list[Rule], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Returns the names in transformers of the modules that have factors."""
    first = [name for rule in of_adapter for name in rule.tensors(shapes[rule.path]) if ".lora_A." in name]
    return [name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in first]


def adapter_config(settings: Lora, modules: list[str], base_model: str) -> dict:
    """Returns adapter_config.json of `peft`.

    Args:
      settings: rank and alpha.
      modules: of `targets`.
      base_model: hub id or folder.
    """
    return {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base_model, "r": settings.rank,
        "lora_alpha": settings.alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "target_modules": modules, "inference_mode": True,
    }  # fmt: skip
