"""launch: what would be run, and what a user reads who asks for what cannot be."""

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from depthlm_jax import __main__ as program
from depthlm_jax import lock
from depthlm_jax.cli import command
from depthlm_jax.launch import job, targets

ROOT = Path(__file__).parents[2]
RECIPE = "--config=configs/qwen2_5_vl_3b.py"
SLURM = ["--target=slurm", "--nodes=4", "--gpus=8", "--workdir=runs/3b"]
TPU_VM = ["--target=tpu_vm", "--topology=2xv5e-64", "--volume=10.0.0.2:/share", "--workdir=/volume/runs/3b"]
GKE = ["--target=gke", "--topology=v5e-64", "--image=r/i:t", "--volume=claim", "--workdir=/volume/runs/3b"]
GPUS = [*GKE[:1], *GKE[2:], "--nodes=4", "--gpus=8", "--accelerator=nvidia-h100-80gb"]
OVERRIDES = [
    "--config.data.geometry.crop_width=(0,0)",
    "--config.optim.learning_rate=1e-05",
    "--noconfig.eval.expectation",
]


@pytest.fixture
def launch(capsys, monkeypatch):
    """Returns the function of flags → exit status, output, errors; called at the root of the repository."""
    monkeypatch.chdir(ROOT)

    def call(*flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["depthlm_jax", "launch", *flags])  # ml_collections looks for overrides there
        status = program.main(["launch", *flags])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return call


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Returns the function that puts a program on PATH, where there is else none."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def put(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(stat.S_IRWXU)

    return put


def test_slurm_dry_run_says_the_command(launch):
    status, out, _ = launch(RECIPE, *SLURM, *OVERRIDES, "--options=--time=12:00:00 --account=me", "--dry_run")
    assert status == 0
    words = shlex.split(out)
    assert words == [
        f"PYTHON={sys.executable}", "sbatch", "--parsable", "--job-name=depthlm-3b", "--output=runs/3b/slurm-%j.log",
        "--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--time=12:00:00", "--account=me",
        "launch/slurm.sbatch", "train", RECIPE, *OVERRIDES, "--workdir=runs/3b", "--distributed",
    ]  # fmt: skip
    assert not (ROOT / "runs/3b").exists()


def test_tpu_vm_dry_run_says_settings_and_command(launch):
    status, out, _ = launch(RECIPE, *TPU_VM, "--spot", "--name=mine", "--dry_run")
    assert status == 0
    assert shlex.split(out) == [
        "NAME=mine", "ACCELERATOR=v5litepod-64", "SLICES=2", "VOLUME=10.0.0.2:/share", "SPOT=1", "bash",
        "launch/tpu_vm.sh", "train", RECIPE, "--workdir=/volume/runs/3b", "--distributed",
    ]  # fmt: skip


def test_gke_dry_run_says_the_manifest(launch):
    status, out, _ = launch(RECIPE, *GKE, "--queue=research", "--dry_run", "--json")
    assert status == 0 and out.startswith("# kubectl apply --filename=-\n")
    said = json.loads(out.splitlines()[-1])
    assert said["command"] == ["kubectl", "apply", "--filename=-"] and said["target"] == "gke"
    assert said["input"] in out and '  name: "depthlm-3b"\n' in said["input"]
    assert launch(RECIPE, *GPUS, "--dry_run")[0] == 0


def test_local_dry_run_and_run(launch, tmp_path):
    flags = [RECIPE, "--target=local", f"--workdir={tmp_path}/run", "--config.train.max_steps=3"]
    status, out, _ = launch(*flags, "--dry_run")
    train = [f"--workdir={tmp_path}/run"]
    assert status == 0
    assert shlex.split(out) == [
        sys.executable, "-m", "depthlm_jax", "train", RECIPE, "--config.train.max_steps=3", *train,
    ]  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-m", "depthlm_jax", "launch", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 1 and "error: no data at source.path" in ran.stderr  # train's word


@pytest.mark.parametrize(
    "flags, text",
    [
        ([*SLURM], "--config is needed; recipes here: configs/demo.py"),
        ([RECIPE, "--target=slurm"], "--workdir is needed"),
        ([RECIPE, "--workdir=x"], "--target is needed: one of local, slurm, gke, tpu_vm"),
        ([RECIPE, "--workdir=x", "--target=moon"], "moon"),
        ([RECIPE, *SLURM, "--image=r/i"], "--target=slurm does not take --image; it takes --name, --nodes, --gpus"),
        ([RECIPE, "--workdir=x", "--target=local", "--gpus=1"], "does not take --gpus; it takes no flags but those of"),
        ([RECIPE, *TPU_VM[:2], *TPU_VM[3:]], "--target=tpu_vm needs --volume: mounted at /volume"),
        ([RECIPE, *GKE[:1], *GKE[2:]], "--target=gke needs --topology (TPUs), or --gpus and --accelerator"),
        ([RECIPE, *GPUS[:-1]], "--target=gke needs --topology (TPUs), or --gpus and --accelerator"),
        ([RECIPE, *GKE, "--gpus=8"], "--topology is of TPUs, --nodes and --gpus of others"),
        ([RECIPE, *SLURM, "--nodes=0"], "nodes"),
    ],
)
def test_wrong_usage(launch, flags, text):
    status, _, err = launch(*flags, "--dry_run")
    assert status == 2 and text in err, err


@pytest.mark.parametrize(
    "flags, texts",
    [
        ([RECIPE, *SLURM, "--config.train.max_step=3"], ["unknown field 'train.max_step'", "'train.max_steps'?"]),
        ([RECIPE, *SLURM, "--config.train.loss_on=all"], ["bad value of train.loss_on"]),
        (["--config=configs/qwen2_5_vl_3c.py", *SLURM], ["unknown recipe", "did you mean configs/qwen2_5_vl_3b.py?"]),
        ([RECIPE, *SLURM, "--config.mesh.fsdp=3"], ["axes do not multiply to the devices", "fsdp=3", "32 devices"]),
        ([RECIPE, *SLURM, "--config.mesh.tensor=2", "--config.data.global_batch_rows=24"],
         ["replica × data × fsdp = 16 does not divide the rows", "a multiple of 16"]),
        ([RECIPE, *TPU_VM, "--config.mesh.replica=1"], ["replica does not keep the slices apart"]),
        ([RECIPE, *TPU_VM, "--topology=v5e-65"], ["no TPU slice 'v5e-65'", "did you mean v5e-64"]),
        ([RECIPE, *TPU_VM, "--topology=tpu7x-16"], ["queued resources have no tpu7x", "--target=gke"]),
        ([RECIPE, *GKE, "--topology=2xv6e-8"], ["slices of one host are not joined", "2 slices of 8 chips"]),
        ([RECIPE, *GKE, "--workdir=runs/3b"], ["the workdir would be lost", "give --workdir=/volume/runs/NAME"]),
        ([RECIPE, *TPU_VM, "--workdir=gs://bucket/3b"], ["a workdir is a folder", "--volume=gs://BUCKET"]),
        ([RECIPE, *GKE, "--name=My_Run"], ["bad value of --name", "'My_Run'", "small letters"]),
        ([RECIPE, *GKE, f"--name={'a' * 41}"], ["bad value of --name"]),
        ([RECIPE, *GKE, "--image=a b"], ["bad value of --image"]),
        ([RECIPE, *GKE, "--volume=10.0.0.2:/share"], ["bad value of --volume", "a claim or gs://BUCKET"]),
        ([RECIPE, *TPU_VM, "--volume=claim"], ["bad value of --volume", "SERVER:/SHARE or gs://BUCKET"]),
        ([RECIPE, *GPUS, "--accelerator=H100"], ["bad value of --accelerator", "nvidia-h100-80gb"]),
        ([RECIPE, *SLURM, "--queue=a b"], ["bad value of --queue"]),
        ([RECIPE, *SLURM, "--options='--time"], ["bad value of --options", "No closing quotation"]),
    ],
)  # fmt: skip
def test_named_errors_come_before_anything_is_submitted(launch, flags, texts):
    status, out, err = launch(*flags, "--dry_run")
    assert status == 1 and out == "" and err.startswith("error: "), err
    assert [text for text in [*texts, "found:", "expected:", "fix:"] if text not in err] == [], err


def test_a_recipe_that_stays_behind_is_refused(launch, tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text((ROOT / "configs/qwen2_5_vl_3b.py").read_text())
    for flags in (GKE, TPU_VM):
        status, _, err = launch(f"--config={recipe}", *flags, "--dry_run")
        assert status == 1 and "does not travel with the repository" in err and "copy it into configs/" in err
        status, out, _ = launch(f"--config={ROOT}/{RECIPE[9:]}:x", *flags, "--dry_run")
        assert status == 0 and f"{RECIPE}:x" in out and f"{ROOT}/configs" not in out
    assert launch(f"--config={recipe}", *SLURM, "--dry_run")[0] == 0  # nodes of a cluster share their storage


def test_a_workdir_that_a_run_holds_is_refused(launch, tmp_path):
    flags = [RECIPE, *SLURM[:-1], f"--workdir={tmp_path}", "--dry_run"]
    with lock.hold(tmp_path):
        status, _, err = launch(*flags)
        assert status == 1 and f"{tmp_path}: another run trains here" in err and f"process {os.getpid()}" in err
    assert launch(*flags)[0] == 0


def test_it_is_run_at_the_root_of_the_repository(launch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = launch(f"--config={ROOT}/configs/demo.py", *SLURM, "--dry_run")
    assert status == 1 and "not at the root of the repository" in err and f"cd {ROOT}" in err


@pytest.mark.parametrize("flags, name", [(SLURM, "sbatch"), (GKE, "kubectl"), (TPU_VM, "gcloud")])
def test_a_target_that_is_not_installed_says_what_to_install(launch, monkeypatch, tmp_path, flags, name):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, err = launch(RECIPE, *flags)
    assert status == 1 and f"launch: no {name} on this machine" in err
    assert f"install {targets.TARGETS[flags[0].split('=')[1]].install}" in err and "--dry_run" in err


def test_what_a_scheduler_refuses_is_told_in_its_words(launch, programs, tmp_path):
    programs("kubectl", "echo 'Unable to connect to the server: dial tcp 10.0.0.1:443: i/o timeout' >&2; exit 1")
    status, _, err = launch(RECIPE, *GKE)
    assert status == 1 and "launch: kubectl failed with status 1" in err and "dial tcp 10.0.0.1:443" in err
    programs("sbatch", "echo 'sbatch: error: Unable to contact slurm controller' >&2; exit 2")
    status, _, err = launch(RECIPE, *SLURM[:-1], f"--workdir={tmp_path}/run")
    assert status == 1 and "launch: sbatch failed with status 2" in err and "Unable to contact slurm controller" in err


def test_what_is_submitted_is_what_the_dry_run_says(launch, programs, tmp_path):
    programs("kubectl", f'echo "$@" >{tmp_path}/arguments; /bin/cat >{tmp_path}/manifest; echo jobset created')
    status, out, _ = launch(RECIPE, *GKE)
    assert status == 0 and "jobset created" in out and "kubectl delete jobset depthlm-3b" in out
    assert (tmp_path / "arguments").read_text() == "apply --filename=-\n"
    dry = launch(RECIPE, *GKE, "--dry_run")[1]
    assert dry == f"# kubectl apply --filename=-\n{(tmp_path / 'manifest').read_text()}\n"
    programs("sbatch", f'printf \'%s\\n\' "$PYTHON" "$@" >{tmp_path}/arguments; echo 7')
    flags = [RECIPE, *SLURM[:-1], f"--workdir={tmp_path}/run", *OVERRIDES]
    status, out, _ = launch(*flags)
    assert status == 0 and f"job 7: log {tmp_path}/run/slurm-7.log" in out and "scancel 7" in out
    assert (tmp_path / "run").is_dir()  # where SLURM writes its log
    words = shlex.split(launch(*flags, "--dry_run")[1])
    assert (tmp_path / "arguments").read_text().splitlines() == [words[0].removeprefix("PYTHON="), *words[2:]]


def test_overrides_are_passed_on_as_they_were_written(launch):
    given = [
        "--config.data.geometry.focal_px",
        "500",
        "-config.model.random_weights",
        "--config.eval.answer_prefix=a  'b",
    ]
    status, out, _ = launch(RECIPE, *SLURM, *given, "--dry_run")
    words = shlex.split(out)
    start = words.index(RECIPE) + 1
    assert status == 0
    assert words[start:-2] == ["--config.data.geometry.focal_px=500", *given[2:]]


def test_names_of_runs():
    assert job.name_of("runs/3b") == "depthlm-3b" and job.name_of("/volume/My Run_1/") == "depthlm-my-run-1"
    assert len(job.name_of("x" * 90)) == job.LONGEST_NAME


def test_words_of_help_name_their_targets(launch):
    status, out, _ = launch("--help")
    assert status == 0 and "--[no]dry_run" in out and command.PROGRAM in out
