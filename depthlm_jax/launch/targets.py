"""What is run to launch a job: by SLURM, on Kubernetes, on Cloud TPU VMs, or here."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable

import jinja2

from depthlm_jax.launch.job import ROOT, Job

PORT = 8476  # of process 0, on GPU nodes


@dataclasses.dataclass(frozen=True)
class Start:
    command: tuple[str, ...]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)  # beside the caller's
    text: str = ""  # of its standard input

    def __str__(self) -> str:
        """As a shell would be told; where there is a text, the text, which the command in its first line takes."""
        words = [*(f"{name}={shlex.quote(value)}" for name, value in self.environment.items())]
        command = " ".join([*words, shlex.join(self.command)])
        return f"# {command}\n{self.text}" if self.text else command


@dataclasses.dataclass(frozen=True)
class Target:
    start: Callable[[Job], Start]
    takes: tuple[str, ...] = ()  # flags, beside those of every target
    needs: tuple[str, ...] = ()  # of these
    program: str = ""  # that reaches it
    install: str = ""  # what that is a part of


def local(job: Job) -> Start:
    return Start((sys.executable, "-m", "depthlm_jax", *job.arguments))


def slurm(job: Job) -> Start:
    options = [f"--job-name={job.name}", f"--output={job.workdir}/slurm-%j.log", f"--nodes={job.place.hosts}",
               "--ntasks-per-node=1"]  # fmt: skip
    if job.place.chips:
        options.append(f"--gpus-per-node={job.place.chips}")
    if job.queue:
        options.append(f"--partition={job.queue}")
    command = ("sbatch", "--parsable", *options, *job.options, "launch/slurm.sbatch", *job.arguments)
    return Start(command, {"PYTHON": sys.executable})


def tpu_vm(job: Job) -> Start:
    settings = {
        "NAME": job.name, "ACCELERATOR": job.accelerator_type, "SLICES": str(job.place.slices), "VOLUME": job.volume,
        "SPOT": str(int(job.spot)),
    }  # fmt: skip
    return Start(("bash", "launch/tpu_vm.sh", *job.arguments), settings)


def gke(job: Job) -> Start:
    return Start(("kubectl", "apply", "--filename=-"), text=manifest(job))


def manifest(job: Job) -> str:
    """Returns launch/gke_jobset.yaml, filled in."""
    surroundings = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    surroundings.filters["quoted"] = lambda text: json.dumps(text, ensure_ascii=False)  # JSON's strings are YAML's
    host = f"{job.name}-slice-0-0.{job.name}"
    bucket = job.volume.removeprefix("gs://") if job.volume.startswith("gs://") else ""
    return surroundings.from_string((ROOT / "launch/gke_jobset.yaml").read_text()).render(
        name=job.name, queue=job.queue, slices=job.place.slices, place=job.place, image=job.image, spot=job.spot,
        volume={"bucket": bucket, "claim": job.volume}, coordinator=host, command=_container_command(job, host),
    )  # fmt: skip


def _container_command(job: Job, host: str) -> list[str]:
    train = [word.replace("$", "$$") for word in job.train]  # Kubernetes would fill in $(NAME)
    if job.place.processes > 1 and job.place.tpu:
        train += ["--distributed"]
    elif job.place.processes > 1:  # JAX itself would ask Kubernetes, which takes a package and permissions
        train += [f"--coordinator={host}:{PORT}", f"--processes={job.place.processes}", "--process=$(PROCESS)"]
    return ["bash", "launch/task.sh", "python", "-m", "depthlm_jax", "train", *train]


CLOUD = ("volume", "spot")
TARGETS = {
    "local": Target(local),
    "slurm": Target(
        slurm, ("name", "nodes", "gpus", "queue", "options"), (), "sbatch", "SLURM's commands (slurm-client on Debian)"
    ),
    "gke": Target(
        gke, ("name", "topology", "nodes", "gpus", "accelerator", "image", "queue", *CLOUD), ("image", "volume"),
        "kubectl", "Kubernetes' tools (kubernetes.io/docs/tasks/tools)",
    ),
    "tpu_vm": Target(
        tpu_vm, ("name", "topology", *CLOUD), ("topology", "volume"),
        "gcloud", "the Google Cloud CLI (cloud.google.com/sdk)",
    ),
}  # fmt: skip
