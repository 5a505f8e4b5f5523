"""Real processes on loopback, connected by jax.distributed: the same global batches whatever does the work."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import worlds

from depthlm_jax.data import pipeline

ROOT = Path(__file__).parents[1]
STEPS, STOP = 4, 2
CHANGES = {"data.max_tokens": 500, "data.max_patches": 256, "data.max_answer_tokens": 160, "data.geometry.flip": 0.5,
           "data.tasks.two_points": 1.0, "data.geometry.crop_width": (32, 64)}  # fmt: skip
HOST = """
import hashlib, json, sys
from pathlib import Path

import jax
import worlds
from absl import flags
from depthlm_jax.data import pipeline

def main(scenes, base, address, host, hosts, workers, steps, state, changes):
    jax.distributed.initialize(address, hosts, host)
    assert (jax.process_index(), jax.process_count()) == (host, hosts)
    config = worlds.two_sources(Path(scenes), changes | {"data.workers": workers})
    processor = worlds.processor_of(base)
    own = config.data.global_batch_rows // hosts
    batches = pipeline.training_batches(
        pipeline.open_sources(config), processor, config, range(host * own, (host + 1) * own)
    )
    if state:
        batches.set_state(state)
    for _ in range(steps):
        rows = next(batches)
        fields = [rows.arrays[name] for name in sorted(rows.arrays)]
        digests = [hashlib.sha256(b"".join(field.tobytes() for field in row)).hexdigest() for row in zip(*fields)]
        print("STEP " + json.dumps({"rows": digests, "names": rows.about.record_ids, "state": batches.get_state()}))
    batches.close()

if __name__ == "__main__":  # worker processes import this file
    flags.FLAGS.mark_as_parsed()
    main(**json.loads(sys.argv[1]))
"""


SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def world(scenes, tmp_path_factory):
    """Returns the function (hosts, workers, steps, state) → one entry a step, of all hosts together."""
    folder = tmp_path_factory.mktemp("hosts")
    base, script = folder / "base", folder / "host.py"
    worlds.processor(worlds.HF_CONFIG, base)
    script.write_text(HOST)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}

    def run(hosts: int, workers: int, steps: int, state: dict | None = None) -> list[dict]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        common = {"scenes": str(scenes), "base": str(base), "address": address, "hosts": hosts, "workers": workers,
                  "steps": steps, "state": state, "changes": CHANGES}  # fmt: skip
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), json.dumps(common | {"host": host})], env=environment, cwd=folder,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for host in range(hosts)
        ]  # fmt: skip
        outputs = [process.communicate(timeout=300) for process in processes]
        assert [process.returncode for process in processes] == [0] * hosts, [error[-2000:] for _, error in outputs]
        of_hosts = [
            [json.loads(line[5:]) for line in out.splitlines() if line.startswith("STEP ")] for out, _ in outputs
        ]
        return [joined(parts) for parts in zip(*of_hosts, strict=True)]

    return run


def joined(parts: tuple[dict, ...]) -> dict:
    """Returns a step of all hosts; every host has to name the same position."""
    (state,) = {json.dumps(part["state"], sort_keys=True) for part in parts}
    rows, names = (sum((part[field] for part in parts), []) for field in ("rows", "names"))
    assert len(set(rows)) == len(rows)  # no two processes have the same samples
    return {"rows": rows, "names": names, "state": json.loads(state)}


@pytest.fixture(scope="module")
def alone(world) -> list[dict]:
    return world(1, 0, STEPS)


def test_the_process_of_the_tests_makes_the_same(scenes, alone, tmp_path):
    config = worlds.two_sources(scenes, CHANGES)
    processor = worlds.processor(worlds.HF_CONFIG, tmp_path / "base")
    batches = pipeline.training_batches(pipeline.open_sources(config), processor, config)
    assert list(next(batches).about.record_ids) == alone[0]["names"]
    batches.close()


@pytest.mark.parametrize(
    ("hosts", "workers"), [(2, 1), *(pytest.param(*one, marks=SLOW) for one in ((1, 2), (1, 1), (2, 0), (4, 0)))]
)
def test_hosts_and_workers_change_nothing(world, alone, hosts, workers):
    assert world(hosts, workers, STEPS) == alone


@pytest.mark.parametrize(("hosts", "workers"), [(1, 2), *(pytest.param(*one, marks=SLOW) for one in ((4, 0), (2, 0)))])
def test_a_resume_with_other_hosts_and_workers_changes_nothing(world, alone, hosts, workers):
    assert world(hosts, workers, STEPS - STOP, alone[STOP - 1]["state"]) == alone[STOP:]
