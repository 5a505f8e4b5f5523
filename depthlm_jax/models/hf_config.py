"""What the families share of config.json: the decoder's sizes, and errors that name a field. Host only."""

import dataclasses

from depthlm_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class DecoderSizes:
    """Names of config.json, but for two."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_width: int
    vocab_size: int
    rms_norm_eps: float
    initializer_range: float
    attention_bias: bool  # of the projections to queries, keys and values


def require(values: dict, name: str):
    """Returns a field of a JSON file; raises InputError if it is missing."""
    if name not in values:
        raise InputError(
            f"Hugging Face folder: {name} is missing", found=f"fields {sorted(values)}", expected=name,
            fix="use a folder of this family with its own config.json and preprocessor_config.json",
        )  # fmt: skip
    return values[name]


def require_value(values: dict, name: str, only: object, file: str = "config.json") -> None:
    """Raises InputError, naming the field, if it is there and asks for something that the port does not do."""
    if values.get(name, only) != only:
        raise InputError(
            f"{file}: {name} is not supported", found=repr(values[name]), expected=repr(only),
            fix="use a checkpoint with the published architecture",
        )  # fmt: skip
