"""What a run is given on a cluster: slices, hosts, chips, and the names that Google Cloud has for them."""

import dataclasses

from depthlm_jax.errors import InputError
from depthlm_jax.plan import topology

HOST_CHIPS = 4
WHOLE_HOST = "2x4"  # of v5e and v6e: one host with eight chips
NODE_LABELS = {
    "v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}  # fmt: skip
TYPES = {"v4": "v4", "v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}  # of queued resources, which know no tpu7x


@dataclasses.dataclass(frozen=True)
class Place:
    slices: int  # of TPUs; else 1
    hosts: int  # of a slice
    chips: int  # of a host; 0: it has CPUs alone
    devices: int  # that JAX sees, in all
    tpu: bool
    resource: str = ""  # how Kubernetes counts chips
    selectors: dict[str, str] = dataclasses.field(default_factory=dict)  # labels of its nodes

    @property
    def processes(self) -> int:
        return self.slices * self.hosts

    @property
    def device_ids(self) -> str:
        """The chips of a host, as JAX_LOCAL_DEVICE_IDS takes them."""
        return ",".join(map(str, range(self.chips)))


def of_slices(slices: topology.Slices) -> Place:
    """Returns the place that TPU slices are."""
    one_host = slices.shape == WHOLE_HOST
    hosts = 1 if one_host else slices.chips // HOST_CHIPS
    selectors = {
        "cloud.google.com/gke-tpu-accelerator": NODE_LABELS[slices.generation],
        "cloud.google.com/gke-tpu-topology": slices.shape,
    }
    return Place(
        slices.count, hosts, slices.chips // hosts, slices.devices, tpu=True, resource="google.com/tpu",
        selectors=selectors,
    )  # fmt: skip


def of_nodes(nodes: int, gpus: int, accelerator: str = "") -> Place:
    """Returns the place that nodes with so many GPUs (0: CPUs alone) are; `accelerator` is GKE's name of the GPU."""
    selectors = {"cloud.google.com/gke-accelerator": accelerator} if accelerator else {}
    return Place(1, nodes, gpus, nodes * max(1, gpus), tpu=False, resource="nvidia.com/gpu", selectors=selectors)


def accelerator_type(slices: topology.Slices) -> str:
    """Returns the name of one slice that queued resources take.

    Raises:
      InputError: they do not give it.
    """
    if slices.generation not in TYPES:
        raise InputError(
            f"launch: queued resources have no {slices.generation}", found=slices.generation,
            expected=f"one of {', '.join(TYPES)}", fix="launch it with --target=gke",
        )  # fmt: skip
    return f"{TYPES[slices.generation]}-{slices.number}"
