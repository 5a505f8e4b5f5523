"""launch/tpu_vm.sh against a gcloud that plays what a cloud does and writes down what it was asked."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each file of $PLAY holds answers to one question, a line an answer; the last one is given again and again.
GCLOUD = r"""#!/bin/bash
printf '%s\x1f' "$@" >>"$PLAY/asked"
printf '\n' >>"$PLAY/asked"
answer() {
  local file=$PLAY/$1 first rest
  { IFS= read -r first; rest=$(cat); } <"$file"
  [[ -z $rest ]] || printf '%s\n' "$rest" >"$file"
  printf '%s\n' "$first"
}
case "$3 $4 $*" in
  "queued-resources describe "*)
    said=$(answer resource)
    case $said in
      ABSENT) echo "ERROR: (gcloud) NOT_FOUND: Resource was not found" >&2; exit 1 ;;
      UNREACHED) echo "ERROR: (gcloud) There was a problem refreshing your current auth tokens" >&2; exit 1 ;;
      *) echo "$said" ;;
    esac ;;
  "tpu-vm describe "*networkEndpoints*) echo 10.1.2.3 ;;
  "tpu-vm describe "*) answer node ;;
  "tpu-vm ssh "*--worker=0*" state"*) answer first ;;
  "tpu-vm ssh "*" state"*) answer workers | tr , '\n' ;;
  "tpu-vm ssh "*--output-directory=*) last=${!#}; echo log >"${last#*=}/0.log" ;;
  "tpu-vm scp "*) cp "$5" "$PLAY/code.tgz" ;;
esac
"""
SETTINGS = {
    "NAME": "run", "PROJECT": "project", "ZONE": "zone", "ACCELERATOR": "v5litepod-16", "VOLUME": "10.0.0.2:/share",
    "POLL_SECONDS": "0",
}  # fmt: skip
PLACE = ["--project=project", "--zone=zone"]
TRAIN = ["train", "--config=configs/demo.py", "--workdir=/volume/runs/a b", "--distributed"]
WORKER = "bash depthlm_jax/launch/tpu_worker.sh"
START = f"{WORKER} start train --config=configs/demo.py --workdir=/volume/runs/a\\ b --distributed"
ASK = ["compute", "tpus", "queued-resources"]
CREATE = [
    *ASK, "create", "run", *PLACE, "--node-id=run", "--accelerator-type=v5litepod-16",
    "--runtime-version=v2-alpha-tpuv5-lite", "--quiet",
]  # fmt: skip
DELETE = [*ASK, "delete", "run", *PLACE, "--force", "--quiet"]


class Cloud:
    def __init__(self, folder: Path, **play: list[str]):
        """Plays `resource` (states of the queued resource), `first`, `workers` and `node`."""
        self.folder = folder
        for name, answers in ({"node": ["READY"]} | play).items():
            (folder / name).write_text("\n".join(answers) + "\n")
        (folder / "bin").mkdir()
        (folder / "bin/gcloud").write_text(GCLOUD)
        (folder / "bin/gcloud").chmod(0o755)

    def run(self, **settings: str) -> subprocess.CompletedProcess:
        environment = os.environ | SETTINGS | {"LOGS": f"{self.folder}/logs", "PLAY": str(self.folder)} | settings
        environment["PATH"] = f"{self.folder}/bin:{environment['PATH']}"
        command = ["bash", "launch/tpu_vm.sh", *TRAIN]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)

    def asked(self) -> list[list[str]]:
        lines = (self.folder / "asked").read_text().splitlines()
        return [line.rstrip("\x1f").split("\x1f") for line in lines]

    def changes(self) -> list[list[str]]:
        """Returns what was created and deleted."""
        return [words for words in self.asked() if words[3] in ("create", "delete")]

    def commands(self, verb: str) -> list[list[str]]:
        """Returns the calls that copy (scp), or that ask workers to prepare or start."""
        return [words for words in self.asked() if words[3] == verb or f"tpu_worker.sh {verb}" in words[-1]]


def test_one_slice_is_asked_for_prepared_followed_and_deleted(tmp_path):
    states = ["ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    cloud = Cloud(tmp_path, resource=states, first=["none", "running", "ended 0"], workers=["ended 0,ended 0"])
    done = cloud.run(DELETE="1")
    assert done.returncode == 0, done.stderr
    assert cloud.changes() == [CREATE, DELETE]
    ((*copy, source, target), *_) = [[*words[:4], words[4], words[5]] for words in cloud.commands("scp")]
    assert copy == ["compute", "tpus", "tpu-vm", "scp"] and source.endswith(".tgz") and target == "run:depthlm_jax.tgz"
    (prepared,) = cloud.commands("prepare")
    ssh = ["compute", "tpus", "tpu-vm", "ssh", "run", *PLACE, "--worker=all", "--quiet"]
    unpack = "mkdir -p depthlm_jax && tar -xzf depthlm_jax.tgz -C depthlm_jax"
    assert prepared == [*ssh, f"--command={unpack} && {WORKER} prepare 10.0.0.2:/share"]
    with tarfile.open(tmp_path / "code.tgz") as code:
        assert {"depthlm_jax/__main__.py", "configs/demo.py", "launch/tpu_worker.sh"} <= set(code.getnames())
    assert cloud.commands("start") == [[*ssh, f"--command={START}"]]
    for line in ("run is ABSENT", "run is WAITING_FOR_RESOURCES", "run is ACTIVE", "workers: 2 ended 0"):
        assert line in done.stdout, done.stdout
    assert (tmp_path / "logs/run/0.log").read_text() == "log\n"


def test_a_slice_that_is_there_and_runs_is_followed(tmp_path):
    cloud = Cloud(tmp_path, resource=["ACTIVE"], first=["running", "running", "ended 0"], workers=["ended 0"])
    done = cloud.run()
    assert done.returncode == 0, done.stderr
    assert cloud.changes() == cloud.commands("scp") == cloud.commands("start") == []
    still = "run is still there, and costs until: gcloud compute tpus queued-resources delete run --project=project"
    assert still in done.stdout


@pytest.mark.parametrize("resource, node", [("SUSPENDED", "READY"), ("SUSPENDING", "READY"), ("ACTIVE", "PREEMPTED")])
def test_a_slice_that_is_taken_away_is_asked_for_again(tmp_path, resource, node):
    states = ["ABSENT", "ACTIVE", "ACTIVE", resource, "ABSENT", "ACTIVE"]
    first = ["none", "running", "running", "none", "running", "ended 0"]
    cloud = Cloud(tmp_path, resource=states, first=first, workers=["ended 0"], node=["READY", node, "READY"])
    done = cloud.run(SPOT="1")
    assert done.returncode == 0, done.stdout + done.stderr
    spot = [*CREATE, "--spot"]
    assert cloud.changes() == [spot, DELETE, spot]
    assert [words[-1] for words in cloud.commands("start")] == [f"--command={START}"] * 2
    assert f"run is {resource if node == 'READY' else node}" in done.stdout


@pytest.mark.parametrize("left", ["SUSPENDED", "FAILED"])
def test_what_is_left_of_one_is_deleted_first(tmp_path, left):
    states = [left, "ABSENT", "ACTIVE"]
    cloud = Cloud(tmp_path, resource=states, first=["none", "ended 0"], workers=["ended 0"])
    assert cloud.run().returncode == 0
    assert cloud.changes() == [DELETE, CREATE]


def test_several_slices_know_of_each_other(tmp_path):
    cloud = Cloud(tmp_path, resource=["ABSENT", "ACTIVE"], first=["none", "ended 0"], workers=["ended 0,ended 0"])
    done = cloud.run(SLICES="2", ACCELERATOR="v6e-16", RUNTIME="image", DELETE="1")
    assert done.returncode == 0, done.stderr
    shape = ["--node-count=2", "--node-prefix=run", "--accelerator-type=v6e-16", "--runtime-version=image", "--quiet"]
    assert cloud.changes() == [[*ASK, "create", "run", *PLACE, *shape], DELETE]
    assert [words[5] for words in cloud.commands("scp")] == ["run-0:depthlm_jax.tgz", "run-1:depthlm_jax.tgz"]
    started = {words[4]: words[-1] for words in cloud.commands("start")}
    assert started == {
        f"run-{slice_id}": "--command=MEGASCALE_COORDINATOR_ADDRESS=10.1.2.3 MEGASCALE_NUM_SLICES=2 "
        f"MEGASCALE_SLICE_ID={slice_id} {START}"
        for slice_id in range(2)
    }
    (address,) = [words for words in cloud.asked() if "networkEndpoints" in words[-1]]
    assert address[4] == "run-0"  # whose first worker is process 0
    assert sorted(file.parent.name for file in (tmp_path / "logs").rglob("0.log")) == ["run-0", "run-1"]


def test_a_run_that_fails_ends_it_with_the_logs(tmp_path):
    cloud = Cloud(tmp_path, resource=["ACTIVE"], first=["none", "running", "ended 1"], workers=["ended 1,ended 1"])
    done = cloud.run()
    assert done.returncode == 1
    assert f"error: the run has failed: see {tmp_path}/logs" in done.stderr
    assert (tmp_path / "logs/run/0.log").exists() and len(cloud.commands("start")) == 1
    assert cloud.changes() == []


def test_workers_that_were_stopped_are_started_again(tmp_path):
    """The first worker ends with 0, as all do when one of them gets SIGTERM; that one ends with 75."""
    first = ["none", "running", "ended 0", "none", "running", "ended 0"]
    cloud = Cloud(tmp_path, resource=["ACTIVE"], first=first, workers=["ended 0,ended 75", "ended 0,ended 0"])
    done = cloud.run()
    assert done.returncode == 0, done.stderr
    assert "stopped, and the slices are still there: starts again" in done.stdout
    assert len(cloud.commands("start")) == 2 and cloud.changes() == []


def test_a_slice_that_never_comes_is_not_asked_for_for_ever(tmp_path):
    cloud = Cloud(tmp_path, resource=["ABSENT", "PROVISIONING", "FAILED"], first=["none"], workers=["none"])
    done = cloud.run()
    assert done.returncode == 1 and "run is FAILED before it was ever ACTIVE" in done.stderr
    assert cloud.changes() == [CREATE]


def test_a_cloud_that_cannot_be_asked(tmp_path):
    cloud = Cloud(tmp_path, resource=["UNREACHED"], first=["none"], workers=["none"])
    done = cloud.run()
    assert done.returncode == 1 and cloud.changes() == []
    assert "refreshing your current auth tokens" in done.stderr and "gcloud cannot say how run is" in done.stderr


def test_a_cloud_that_cannot_be_asked_for_a_while_is_asked_again(tmp_path):
    states = ["ACTIVE", "UNREACHED", "UNREACHED", "ACTIVE"]
    cloud = Cloud(tmp_path, resource=states, first=["running", "running", "", "", "ended 0"], workers=["ended 0"])
    assert cloud.run().returncode == 0 and cloud.changes() == []


@pytest.mark.parametrize(
    "settings, text",
    [
        *(({name: ""}, f"{name} is not set") for name in ("NAME", "PROJECT", "ZONE", "ACCELERATOR", "VOLUME")),
        ({"ACCELERATOR": "v5e-16"}, "ACCELERATOR=v5e-16; expected v4-…, v5litepod-…"),
        ({"SLICES": "0"}, "SLICES=0; expected a number from 1 on"),
        ({"SPOT": "yes"}, "SPOT=yes; expected 0 or 1"),
        ({"DELETE": "yes"}, "DELETE=yes; expected 0 or 1"),
        ({"VOLUME": "bucket"}, "VOLUME=bucket; expected SERVER:/SHARE or gs://BUCKET"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_asked(tmp_path, settings, text):
    cloud = Cloud(tmp_path, resource=["ABSENT"], first=["none"], workers=["none"])
    done = cloud.run(**settings)
    assert done.returncode == 2 and f"error: {text}" in done.stderr, done.stderr
    assert not (tmp_path / "asked").exists()
