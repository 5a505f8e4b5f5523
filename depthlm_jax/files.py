"""Files that a user may have damaged, and folders that may not be writable: errors that say so."""

import json
import os
from pathlib import Path

from depthlm_jax.errors import InputError


def read_json(file: Path, fix: str) -> dict:
    """Returns the JSON object in a file; raises InputError, which proposes `fix`, if there is none."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read", found=error, expected="a JSON file", fix=fix) from error
    if not isinstance(values, dict):
        raise InputError(f"{file}: not a JSON object", found=type(values).__name__, expected="{…}", fix=fix)
    return values


def write_json(file: Path, values: dict) -> None:
    """Writes a JSON object, whole or not at all."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.write_text(json.dumps(values, indent=2) + "\n")
    unfinished.replace(file)


def make_writable(folder: Path) -> None:
    """Makes a folder; raises InputError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write_test"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written", found=error, expected="a folder that this user can write",
            fix="give another folder, or change its permissions",
        ) from error  # fmt: skip


def read_lines(file: Path) -> list[dict]:
    """Returns the objects of a file of JSON lines, none where there is no file; one that is being written is left out.

    Raises:
      InputError: another line cannot be read.
    """
    *lines, _ = file.read_text().split("\n") if file.exists() else [""]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise InputError(
            f"{file}: a line cannot be read", found=error, expected="one JSON object a line", fix="remove that line",
        ) from error  # fmt: skip


def readable_lines(file: Path) -> tuple[list[dict], list[str]]:
    """Returns the JSON objects of a file, one a line, and a remark on each line that is none; no file has neither."""
    records, remarks = [], []
    lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if isinstance(values, dict):
            records.append(values)
        else:
            torn = "torn, as a killed process leaves it" if number == len(lines) else "no JSON object"
            remarks.append(f"{file}:{number}: {torn}; it is left out")
    return records, remarks


class Lines:
    """JSON lines that are added to a file; those that the disk does not take are kept until it does."""

    def __init__(self, file: Path):
        self.file, self.waiting = file, b""
        self._cut_unfinished()

    def _cut_unfinished(self) -> None:
        """A process killed while it wrote leaves half a line, which the next one would be glued to."""
        if self.file.exists():
            text = self.file.read_bytes()
            if not text.endswith(b"\n"):
                os.truncate(self.file, text.rfind(b"\n") + 1)

    def add(self, values: dict) -> None:
        """Writes a line, after those that wait, whole or not at all."""
        self.waiting += json.dumps(values).encode() + b"\n"
        try:
            size = self.file.stat().st_size if self.file.exists() else 0
            with self.file.open("ab", buffering=0) as out:
                if out.write(self.waiting) < len(self.waiting):
                    os.truncate(self.file, size)
                    return
        except OSError:  # a disk that is full or gone is told of where a save fails
            return
        self.waiting = b""
