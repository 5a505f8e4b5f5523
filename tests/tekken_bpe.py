"""The real Tekken vocabulary (Pixtral's) as a Hugging Face folder, for tests that need its exact ids."""

import base64
import json
import sys
from pathlib import Path

import bpe

from depthlm_jax.models import tokenizer
from depthlm_jax.models.pixtral import tokenizer as family
from depthlm_jax.models.pixtral.tokenizer import FORMAT

WHEEL = bpe.Wheel(
    "mistral-common==1.13.1",
    "mistral_common/data/tekken_240911.json",
    sha256="1948e2d48b0e7377f1bb5f1210f1ae5f984934e75713fc07e2452729b8365316",
)
# Special tokens come first. Those after the family's are for uses that a test does not have.
FURTHER_SPECIAL_TOKENS = ("[PREFIX]", "[MIDDLE]", "[SUFFIX]")


def tokenizer_folder() -> Path:
    """Returns the folder, built at the first call on this machine.

    Raises:
      bpe.Unavailable: the vocabulary is not in the cache and cannot be downloaded.
    """
    return bpe.cached_folder("tekken_bpe", (sys.modules[__name__], bpe, tokenizer, family), _write_folder)


def published() -> dict:
    """Returns the content of tekken.json."""
    return json.loads(WHEEL.read())


def ranks(content: dict) -> dict[bytes, int]:
    """Returns the ranks of the tokens that are not special; the file holds more than the model has."""
    config = content["config"]
    count = config["default_vocab_size"] - config["default_num_special_tokens"]
    return {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in content["vocab"][:count]}


def _write_folder(folder: Path) -> None:
    content = published()
    rank_of, first = ranks(content), content["config"]["default_num_special_tokens"]
    named = [*FORMAT.special_tokens, *FURTHER_SPECIAL_TOKENS]
    special = [*named, *(f"<SPECIAL_{number}>" for number in range(len(named), first))]
    special_ids = {token: number for number, token in enumerate(special)}
    tokenizer.save_tokenizer(
        FORMAT,
        folder,
        vocab=special_ids | {bpe.spelled(token): first + rank for token, rank in rank_of.items()},
        merges=bpe.merges(rank_of),
        special_tokens=special_ids,
    )
