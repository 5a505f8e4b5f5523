"""Every command in configs/sweeps/README.md is run as it is printed, on fewer samples."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import worlds
from launching import ROOT

README = ROOT / "configs/sweeps/README.md"
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README.read_text(), flags=re.DOTALL)).replace("\\\n", "")
COMMANDS = [line for line in BLOCKS.splitlines() if line.startswith("python -m depthlm_jax")]
EXTRA = (  # that makes the demo's sweep end soon
    "--config.train.max_steps=2 --config.data.global_batch_rows=8 --config.eval.sets.near.samples=8 "
    "--config.eval.sets.far.samples=8"
)


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with what the commands name; a complete data set is kept by `curate`."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    scenes = worlds.render(tmp_path / "scenes")
    for world in ("near", "far"):
        home = tmp_path / f"runs/synthetic/{world}_1000_100/synthetic_depth"
        home.mkdir(parents=True)
        (home / "1.0.0").symlink_to(scenes)
    (own,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (tmp_path / "my_mixture.py").write_text(own)
    return tmp_path


@pytest.mark.slow
def test_readme_commands_run_in_their_order(place):
    assert len(COMMANDS) == 7
    results, environment = [], os.environ | {"PYTHONPATH": str(ROOT)}
    for command in COMMANDS:
        extra = EXTRA if "demo_mixture" in command else ""
        extra += " --parallel=2" if extra and "--report" not in command else ""
        words = [sys.executable, *shlex.split(f"{command} {extra} --json")[1:]]
        done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        assert "stopped by" not in done.stdout, done.stdout  # somebody else's signal
        results.append(json.loads(done.stdout.splitlines()[-1]))
    swept, dry, slurm, gke, report = results[2:]
    assert set(swept["runs"].values()) == {"finished"} and len(swept["ranked"]) == 5
    assert swept == report
    assert len(dry["commands"]) == len(gke["commands"]) == 12 and len(slurm["commands"]) == 1
    jobset = subprocess.run(f"{gke['commands'][0]} --dry_run", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert jobset.returncode == 0 and "kind: JobSet" in jobset.stdout, jobset.stderr
    assert '"--workdir=/volume/runs/mine/runs/near=1,far=0,optim.learning_rate=0.001,seed=0"' in jobset.stdout
    assert (place / "runs/demo_mixture/mixture.png").is_file()


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README.read_text()))
def test_links_lead_to_files(link):
    assert (README.parent / link).exists()
