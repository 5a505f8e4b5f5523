"""What a run was started with, so that it can be started again: command, versions, revision, devices."""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import jax

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy",
            "transformers")  # fmt: skip


def describe(mesh: jax.sharding.Mesh) -> dict[str, object]:
    """Returns it as JSON can hold it; neither environment variables nor anything else that may be secret."""
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"), "command": shlex.join(sys.argv),
        "mesh": {name: int(size) for name, size in mesh.shape.items()}, "processes": jax.process_count(),
        "device": mesh.devices.flat[0].device_kind, **software(),
    }  # fmt: skip


def software() -> dict[str, str | None]:
    """Returns versions, and the revision of this code."""
    packages = {package: version(package) for package in PACKAGES}
    return {"revision": revision(), "python": platform.python_version(), **packages}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def revision() -> str | None:
    """Returns the git commit of this code, with a + if files differ from it; None outside a repository."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(["git", "-C", root, *what], capture_output=True, text=True, check=True, timeout=30).stdout
            for what in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):  # no git, or a repository that it does not trust
        return None
    return commit.strip() + "+" * bool(changes)


def differences(there: dict) -> list[str]:
    """Returns a line for each piece of software that is another one here than where `describe` gave `there`."""
    here = software()
    return [f"{name}: {there.get(name)} there, {here[name]} here" for name in here if there.get(name) != here[name]]
