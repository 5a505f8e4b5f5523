"""Every command in launch/README.md is run as it is printed; they are dry runs."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from depthlm_jax import __main__ as program

ROOT = Path(__file__).parents[2]
README = (ROOT / "launch/README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)).replace("\\\n", "")
COMMANDS = [line for line in BLOCKS.splitlines() if line]


def run(command: str, capsys, monkeypatch) -> tuple[int, str, str]:
    arguments = shlex.split(command)[3:]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["depthlm_jax", *arguments])  # ml_collections looks for overrides there
    return (program.main(arguments), *capsys.readouterr())


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_launch_commands_run(command, capsys, monkeypatch):
    status, out, err = run(command, capsys, monkeypatch)
    assert status == 0 and "train" in out, err


def test_there_is_no_other_command():
    assert len(COMMANDS) == 5
    assert all(line.startswith("python -m depthlm_jax launch ") and " --dry_run " in line for line in COMMANDS)


def test_files_that_it_names_exist():
    names = set(re.findall(r"`(?:launch/)?([\w.]+\.(?:sh|sbatch|yaml)|Dockerfile)`", README))
    assert {"slurm.sbatch", "tpu_vm.sh", "gke_jobset.yaml", "Dockerfile", "task.sh"} <= names
    assert [name for name in names if not (ROOT / "launch" / name).exists()] == []
    here = {file.name for file in (ROOT / "launch").iterdir()} - {"README.md", "environment.sh", "requirements_tpu.txt"}
    assert here == names
