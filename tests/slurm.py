"""A real SLURM on this machine: one node, its own ports and keys, started for tests and stopped after them."""

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from launching import ROOT, free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
CPUS = max(2, os.cpu_count() or 1)
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits as long as a credential lives.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=20
SchedulerParameters=sched_min_interval=100000,sched_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES State=UP OverSubscribe=FORCE:4
"""


def missing() -> str:
    """Returns why no SLURM can be started here; empty: one can."""
    lacking = [name for name in DAEMONS if shutil.which(name) is None]
    if lacking:
        return f"no {', '.join(lacking)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd and munged are started by root alone"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One node with two CPUs or more, on which four jobs may share each of them."""

    folder: Path
    environment: dict[str, str]  # with which SLURM's commands find it

    def call(self, *command: str, more: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        """Returns a command that has ended, run from the root of the repository; `more` joins its environment."""
        environment = self.environment | (more or {})
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    def submit(self, *arguments: str, more: dict[str, str] | None = None) -> str:
        """Returns the number of the job that `sbatch *arguments` has queued."""
        done = self.call("sbatch", "--parsable", *arguments, more=more)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Returns what SLURM says of a job: {'JobState': 'RUNNING', 'Restarts': '0', 'ExitCode': '0:0', …}."""
        text = self.call("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def state(self, job: str) -> str:
        """Returns PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, …; of an array, name one of its jobs: 7_0."""
        return self.job(job).get("JobState", "UNKNOWN")

    def await_state(self, job: str, *states: str, seconds: float = 900) -> str:
        """Returns the state in which the job is found, one of `states`."""
        limit = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < limit, f"job {job} is {state}, not {states}: {self.job(job)}"
            time.sleep(0.2)
        return state


@contextlib.contextmanager
def start(folder: Path) -> Iterator[Cluster]:
    """Gives a cluster whose files are in `folder`; the path of munge's socket limits how long its name may be."""
    host = socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    ports = {"controller_port": free_port(), "node_port": free_port()}
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, host=host, cpus=CPUS, **ports))
    (folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "XLA_FLAGS"))},
        "SLURM_CONF": str(conf), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }  # fmt: skip
    files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
    munge = [f"--{name}={folder}/munge.{end}" for name, end in files.items()]
    commands = (["munged", "--foreground", "--force", *munge], ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-c"])
    daemons = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out").open("w") as out:
                daemons.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=folder))
            if command[0] == "munged":
                _await(lambda: (folder / "munge.socket").exists(), folder)
        cluster = Cluster(folder, environment)
        _await(lambda: cluster.call("sinfo", "--noheader", "--format=%T").stdout.strip() == "idle", folder)
        try:
            yield cluster
        finally:  # what the jobs started would outlive the daemons
            cluster.call("scancel", "--user=root")
            cluster.call("scancel", "--user=root", "--signal=KILL", "--full")
            _await(lambda: not cluster.call("squeue", "--noheader").stdout.strip(), folder)
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _await(condition, folder: Path, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        logs = (*folder.glob("*.log"), *folder.glob("*.out"))
        assert time.monotonic() < limit, [file.read_text()[-2000:] for file in logs]
        time.sleep(0.2)
