"""The README's first command, whole: about ten minutes."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_local_script_trains_to_twice_the_best_constant_and_may_run_again(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "OMP_NUM_THREADS")}
    command = ["bash", "launch/local.sh"]
    for _ in range(2):
        done = subprocess.run(
            command, cwd=ROOT, env={**environment, "WORKDIR": str(tmp_path / "run")}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        scores = json.loads((tmp_path / "run/evaluation/metrics.json").read_text())
        assert scores["model"]["delta1"] >= 2 * scores["best_constant"]["delta1"]
        assert [word for word in ("best constant", "answers.png", "loss.png") if word not in done.stdout] == []
