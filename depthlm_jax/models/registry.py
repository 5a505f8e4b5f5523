"""The families by name, and a model as plain functions of (parameters, batch)."""

import dataclasses
from collections.abc import Callable

from flax import nnx

from depthlm_jax import tree
from depthlm_jax.errors import InputError
from depthlm_jax.hf import Rule
from depthlm_jax.models.qwen2_5_vl import config as qwen2_5_vl_config
from depthlm_jax.models.qwen2_5_vl import folder as qwen2_5_vl_folder
from depthlm_jax.models.qwen2_5_vl import model as qwen2_5_vl_model
from depthlm_jax.models.qwen2_5_vl import processor as qwen2_5_vl_processor
from depthlm_jax.models.qwen2_5_vl import weights as qwen2_5_vl_weights


@dataclasses.dataclass(frozen=True)
class Family:
    """What a folder under models/ provides."""

    read_config: Callable  # (config.json, preprocessor_config.json) → config
    module: type[nnx.Module]  # of (config, rngs, constrain, remat)
    rules: Callable  # config → [Rule]
    processor: Callable  # folder → processor
    write_scratch: Callable  # (hf_config, texts, folder): the files of a folder but the weights, from nothing
    copy_published: Callable  # (folder, folder) → warnings: the same, copied in the hub's form


FAMILIES = {
    "qwen2_5_vl": Family(
        read_config=qwen2_5_vl_config.read_config,
        module=qwen2_5_vl_model.Qwen25VL,
        rules=qwen2_5_vl_weights.rules,
        processor=qwen2_5_vl_processor.Processor,
        write_scratch=qwen2_5_vl_folder.write_scratch,
        copy_published=qwen2_5_vl_folder.copy_published,
    )
}


def family(name: str) -> Family:
    if name not in FAMILIES:
        raise InputError(
            f"config: unknown model.family {name!r}", found=name, expected=f"one of {sorted(FAMILIES)}",
            fix="set --config.model.family",
        )  # fmt: skip
    return FAMILIES[name]


@dataclasses.dataclass(frozen=True)
class Network:
    """A model without its parameters: pure functions of a nested dict of arrays."""

    rules: list[Rule]
    abstract: dict  # parameters as ShapeDtypeStruct, float32
    init: Callable  # key → parameters
    logits: Callable  # (parameters, batch) → logits_BAV
    prefill: Callable  # (parameters, batch, new_slots) → logits_BAV, cache
    decode_one: Callable  # (parameters, tokens_BQ, positions_BQ, slot, seen_BQS, cache) → logits_BQV, cache

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {path: leaf.shape for path, leaf in tree.flatten(self.abstract).items()}

    @property
    def axes(self) -> dict[str, str]:
        """{path: letters of the parameter's axes}."""
        return {rule.path: rule.axes for rule in self.rules}


def build(name: str, config, constrain: Callable = lambda x, letters: x, remat: bool = False) -> Network:
    """Returns the network of a family.

    Args:
      name: key of FAMILIES.
      config: what the family's `read_config` returned.
      constrain: (array, letters) → array, pins activations to a mesh.
      remat: recompute blocks in the backward pass.
    """
    this = family(name)

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return this.module(config, rngs, constrain, remat)

    graph, abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)

    def bind(method: str) -> Callable:
        return lambda parameters, *args: getattr(nnx.merge(graph, nnx.State(parameters)), method)(*args)

    return Network(
        rules=this.rules(config),
        abstract=nnx.to_pure_dict(abstract),
        init=lambda key: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param)),
        logits=bind("logits"),
        prefill=bind("prefill"),
        decode_one=bind("decode_one"),
    )
