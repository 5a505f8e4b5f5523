"""The families by name, and a model as plain functions of (parameters, batch)."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from flax import nnx

from depthlm_jax import files, tree
from depthlm_jax.config import Lora
from depthlm_jax.errors import InputError
from depthlm_jax.hf import Rule
from depthlm_jax.models import flops, lora
from depthlm_jax.models.execution import Execution
from depthlm_jax.models.pixtral import config as pixtral_config
from depthlm_jax.models.pixtral import folder as pixtral_folder
from depthlm_jax.models.pixtral import model as pixtral_model
from depthlm_jax.models.pixtral import processor as pixtral_processor
from depthlm_jax.models.pixtral import weights as pixtral_weights
from depthlm_jax.models.qwen2_5_vl import config as qwen2_5_vl_config
from depthlm_jax.models.qwen2_5_vl import folder as qwen2_5_vl_folder
from depthlm_jax.models.qwen2_5_vl import model as qwen2_5_vl_model
from depthlm_jax.models.qwen2_5_vl import processor as qwen2_5_vl_processor
from depthlm_jax.models.qwen2_5_vl import weights as qwen2_5_vl_weights
from depthlm_jax.models.vision_language import VisionLanguage


@dataclasses.dataclass(frozen=True)
class Family:
    """What a folder under models/ provides."""

    model_type: str  # in config.json
    read_config: Callable  # (config.json, preprocessor_config.json) → config
    module: type[VisionLanguage]  # of (config, rngs, how)
    rules: Callable  # config → [Rule]
    parts: Callable  # config → beginning of paths → count of data.work, for models.flops
    attended: Callable  # config → pairs of data.work → channels
    modules: dict[str, str]  # beginning of a tensor's name on the hub → of its module's in transformers 5
    processor: Callable  # folder → processor
    write_scratch: Callable  # (hf_config, texts, folder): the files of a folder but the weights, from nothing
    preprocessor: dict  # the published preprocessor_config.json
    copy_published: Callable  # (folder, folder) → warnings: the same, copied in the hub's form


FAMILIES = {
    "qwen2_5_vl": Family(
        model_type=qwen2_5_vl_config.MODEL_TYPE,
        read_config=qwen2_5_vl_config.read_config,
        module=qwen2_5_vl_model.Qwen25VL,
        rules=qwen2_5_vl_weights.rules,
        parts=qwen2_5_vl_weights.parts,
        attended=qwen2_5_vl_weights.attended,
        modules=qwen2_5_vl_weights.MODULES,
        processor=qwen2_5_vl_processor.Processor,
        write_scratch=qwen2_5_vl_folder.write_scratch,
        preprocessor=qwen2_5_vl_config.PREPROCESSOR,
        copy_published=qwen2_5_vl_folder.copy_published,
    ),
    "pixtral": Family(
        model_type=pixtral_config.MODEL_TYPE,
        read_config=pixtral_config.read_config,
        module=pixtral_model.Pixtral,
        rules=pixtral_weights.rules,
        parts=pixtral_weights.parts,
        attended=pixtral_weights.attended,
        modules=pixtral_weights.MODULES,
        processor=pixtral_processor.Processor,
        write_scratch=pixtral_folder.write_scratch,
        preprocessor=pixtral_config.PREPROCESSOR,
        copy_published=pixtral_folder.copy_published,
    ),
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

    rules: list[Rule]  # of the parameters that a Hugging Face folder has
    lora_rules: list[Rule]  # of those beside them
    operations: (
        Callable  # factors of the learning rate by path → floating-point operations for each of data.work's COUNTS
    )
    abstract: dict  # parameters as ShapeDtypeStruct
    init: Callable  # key → parameters
    logits: Callable  # (parameters, batch) → logits_BAV
    prefill: Callable  # (parameters, batch, new_slots) → logits_BAV, cache
    decode_one: Callable  # (parameters, tokens_BQ, positions_BQ, slot, seen_BQS, cache) → logits_BQV, cache

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {path: leaf.shape for path, leaf in tree.flatten(self.abstract).items()}

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters that a Hugging Face folder has."""
        shapes = self.shapes
        return {rule.path: shapes[rule.path] for rule in self.rules}

    @property
    def lora_paths(self) -> list[str]:
        return [rule.path for rule in self.lora_rules]

    @property
    def axes(self) -> dict[str, str]:
        """{path: letters of the parameter's axes}."""
        return {rule.path: rule.axes for rule in [*self.rules, *self.lora_rules]}


def family_of(folder: Path) -> str:
    """Returns the name of the family that a Hugging Face folder is of.

    Raises:
      InputError: config.json is missing, or of a kind that is none of the families.
    """
    values = files.read_json(folder / "config.json", "give a complete Hugging Face folder")
    names = {this.model_type: name for name, this in FAMILIES.items()}
    found = values.get("model_type")
    if found not in names:
        raise InputError(
            f"{folder}/config.json: another kind of model", found=f"model_type {found!r}",
            expected=f"one of {sorted(names)}", fix="use a folder of one of these families",
        )  # fmt: skip
    return names[found]


def build(name: str, config, how: Execution | None = None, low_rank: Lora | None = None) -> Network:
    """Returns the network of a family.

    Args:
      name: key of FAMILIES.
      config: what the family's `read_config` returned.
      how: it runs; None: on one device, keeping what the backward pass needs.
      low_rank: factors to be added, if its pattern is not empty.

    Raises:
      InputError: the pattern matches no linear layer.
    """
    this = family(name)

    def make(rngs: nnx.Rngs) -> nnx.Module:
        module = this.module(config, rngs, how or Execution())
        if low_rank is not None and low_rank.pattern:
            lora.add(module, low_rank, rngs)
        return module

    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)
    abstract, rules = nnx.to_pure_dict(state), this.rules(config)

    low_rank_rules = lora.rules(rules, set(tree.flatten(abstract)))
    axes = {rule.path: rule.axes for rule in [*rules, *low_rank_rules]}
    shapes = {path: leaf.shape for path, leaf in tree.flatten(abstract).items()}

    def bind(method: str) -> Callable:
        return lambda parameters, *args: getattr(nnx.merge(graph, nnx.State(parameters)), method)(*args)

    return Network(
        rules=rules,
        lora_rules=low_rank_rules,
        operations=functools.partial(flops.per_count, this.parts(config), this.attended(config), shapes, axes),
        abstract=abstract,
        init=lambda key: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param)),
        logits=bind("logits"),
        prefill=bind("prefill"),
        decode_one=bind("decode_one"),
    )
