"""The real Qwen2.5 vocabulary as a Hugging Face folder, for tests that need its exact ids."""

import base64
import sys
from pathlib import Path

import bpe

from depthlm_jax.models import tokenizer
from depthlm_jax.models.qwen2_5_vl import tokenizer as family
from depthlm_jax.models.qwen2_5_vl.tokenizer import FORMAT

WHEEL = bpe.Wheel(
    "dashscope==2.0.2",
    "dashscope/resources/qwen.tiktoken",
    sha256="b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
)
FIRST_SPECIAL_ID = 151643
SPECIAL_TOKENS = (  # in the order of their ids
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<tool_call>", "</tool_call>",
    "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip


def tokenizer_folder() -> Path:
    """Returns the folder, built at the first call on this machine.

    Raises:
      bpe.Unavailable: the vocabulary is not in the cache and cannot be downloaded.
    """
    return bpe.cached_folder("qwen2_5_bpe", (sys.modules[__name__], bpe, tokenizer, family), _write_folder)


def ranks() -> dict[bytes, int]:
    lines = (line.split() for line in WHEEL.read().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _write_folder(folder: Path) -> None:
    rank_of = ranks()
    tokenizer.save_tokenizer(
        FORMAT,
        folder,
        vocab={bpe.spelled(token): rank for token, rank in rank_of.items()},
        merges=bpe.merges(rank_of),
        special_tokens={token: FIRST_SPECIAL_ID + i for i, token in enumerate(SPECIAL_TOKENS)},
    )
