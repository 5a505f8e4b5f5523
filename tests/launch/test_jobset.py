"""Manifests: what Kubernetes and JobSet would take, with the hosts, chips and addresses that the place has."""

import copy
import re

import kubernetes_validate
import pytest
import yaml

from depthlm_jax.launch import place
from depthlm_jax.launch.job import Job
from depthlm_jax.launch.targets import manifest
from depthlm_jax.plan import topology

# jobset.x-k8s.io/v1alpha2, as its Go types name it: field → kind, choices, or fields of its own.
RULE = {
    "name": r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?",
    "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
    "onJobFailureReasons": [{
        "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy",
    }],
    "targetReplicatedJobs": [str],
}  # fmt: skip
SPEC = {
    "replicatedJobs": [{
        "name": r"[a-z]([-a-z0-9]*[a-z0-9])?", "groupName": str, "replicas": int, "template": "Job",
        "dependsOn": [{"name": str, "status": {"Ready", "Complete"}}],
    }],
    "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
    "successPolicy": {"operator": {"All", "Any"}, "targetReplicatedJobs": [str]},
    "failurePolicy": {"maxRestarts": int, "restartStrategy": {"Recreate", "BlockingRecreate"}, "rules": [RULE]},
    "startupPolicy": {"startupPolicyOrder": {"AnyOrder", "InOrder"}}, "suspend": bool,
    "coordinator": {"replicatedJob": str, "jobIndex": int, "podIndex": int}, "managedBy": str,
    "ttlSecondsAfterFinished": int,
}  # fmt: skip
TRAIN = ("--config=configs/qwen2_5_vl_3b.py", "--config.train.seed=1", "--workdir=/volume/runs/3b")
CLAIM = {"image": "registry.example/depthlm:tpu", "volume": "claim"}


def job(where: place.Place, **more) -> Job:
    return Job("depthlm-3b", TRAIN, "/volume/runs/3b", where, **{**CLAIM, **more})


def slices(name: str) -> place.Place:
    return place.of_slices(topology.parse(name))


H100 = place.of_nodes(4, 8, "nvidia-h100-80gb")
JOBS = {
    "one slice": job(slices("v5e-16")),
    "one host": job(slices("v6e-8"), spot=True),
    "slices": job(slices("2xv5p-128"), queue="research", volume="gs://bucket"),
    "GPU": job(H100, queue="research"),
    "one GPU node": job(place.of_nodes(1, 8, "nvidia-h100-80gb"), volume="gs://bucket", spot=True),
}


def check(value, rule, path: str) -> None:
    """Fails unless the value is what the rule says, without a field that it does not name."""
    if isinstance(rule, dict):
        assert type(value) is dict and value.keys() <= rule.keys(), f"{path}: {set(value) - set(rule)} is no field"
        for name, inner in value.items():
            check(inner, rule[name], f"{path}.{name}")
    elif isinstance(rule, list):
        for item in value:
            check(item, rule[0], f"{path}[]")
    elif rule == "Job":
        assert value.keys() <= {"metadata", "spec"}, path
        one = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "any"}, "spec": value["spec"]}
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
    elif isinstance(rule, set):
        assert value in rule, f"{path}: {value}"
    elif isinstance(rule, str):
        assert re.fullmatch(rule, value), f"{path}: {value}"
    else:
        assert type(value) is rule, f"{path}: {value!r}"


def parsed(one: Job) -> dict:
    return yaml.safe_load(manifest(one))


def check_jobset(values: dict) -> None:
    assert values.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert values["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and values["kind"] == "JobSet"
    pod = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": values["metadata"]}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    check(values["spec"], SPEC, "spec")


@pytest.mark.parametrize("one", JOBS.values(), ids=JOBS.keys())
def test_manifests_are_what_kubernetes_and_jobset_take(one):
    check_jobset(parsed(one))


@pytest.mark.parametrize(
    "path, value",
    [
        (("spec", "restarts"), 3),
        (("spec", "failurePolicy", "restartPolicy"), "Always"),
        (("spec", "failurePolicy", "restartStrategy"), "Never"),
        (("spec", "replicatedJobs", 0, "parallelism"), 3),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "nodeselector"), {}),
        (("spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 1, "onPodConditions"), "all"),
        (("metadata", "lables"), {}),
    ],
)
def test_the_check_sees_what_they_would_not_take(path, value):
    values = copy.deepcopy(parsed(JOBS["slices"]))
    node = values
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
        check_jobset(values)


def pod_of(values: dict) -> tuple[dict, dict, dict, dict]:
    """Returns the Job's spec, the Pod's spec, its container and the container's environment."""
    of_job = values["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = of_job["template"]["spec"]
    (container,) = pod["containers"]
    return of_job, pod, container, {entry["name"]: entry for entry in container["env"]}


def test_a_slice_is_a_job_and_a_host_is_a_pod():
    values = parsed(JOBS["one slice"])
    of_job, pod, container, environment = pod_of(values)
    assert values["spec"]["replicatedJobs"][0]["replicas"] == 1
    assert of_job["parallelism"] == of_job["completions"] == 4 and of_job["completionMode"] == "Indexed"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice", "cloud.google.com/gke-tpu-topology": "4x4",
    }  # fmt: skip
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == [
        "bash", "launch/task.sh", "python", "-m", "depthlm_jax", "train", *TRAIN, "--distributed",
    ]  # fmt: skip
    assert environment.keys() == {"JAX_COMPILATION_CACHE_DIR"}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "claim"}
    assert "suspend" not in values["spec"] and "labels" not in values["metadata"]


def test_several_slices_have_what_jax_needs_to_find_them():
    """MEGASCALE_*: what jax.distributed reads on TPUs, see jax/_src/clusters/cloud_tpu_cluster.py."""
    values = parsed(JOBS["slices"])
    of_job, pod, container, environment = pod_of(values)
    (replicated,) = values["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 2 and of_job["parallelism"] == 16
    # The address of the first Pod of the first Job: <jobset>-<replicated job>-<job>-<pod>.<jobset>
    address = f"{values['metadata']['name']}-{replicated['name']}-0-0.{values['metadata']['name']}"
    assert environment["MEGASCALE_COORDINATOR_ADDRESS"]["value"] == address
    assert environment["MEGASCALE_NUM_SLICES"]["value"] == "2"
    field = environment["MEGASCALE_SLICE_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['jobset.sigs.k8s.io/job-index']"
    topology_key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert values["metadata"]["annotations"] == {topology_key: "cloud.google.com/gke-nodepool"}
    assert values["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "research"} and values["spec"]["suspend"]
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "bucket"
    assert of_job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


def test_gpu_nodes_are_told_who_is_there():
    values = parsed(JOBS["GPU"])
    of_job, pod, container, environment = pod_of(values)
    assert of_job["parallelism"] == 4 and container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert container["command"][-3:] == [
        "--coordinator=depthlm-3b-slice-0-0.depthlm-3b:8476", "--processes=4", "--process=$(PROCESS)",
    ]  # fmt: skip
    field = environment["PROCESS"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert environment["JAX_LOCAL_DEVICE_IDS"]["value"] == "0,1,2,3,4,5,6,7"


@pytest.mark.parametrize("name", ["one host", "one GPU node"])
def test_one_host_needs_nobody(name):
    values = parsed(JOBS[name])
    of_job, pod, container, environment = pod_of(values)
    assert of_job["parallelism"] == 1 and container["command"][-1] == TRAIN[-1]
    assert environment.keys() == {"JAX_COMPILATION_CACHE_DIR"}
    assert list(container["resources"]["limits"].values()) == [8]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "cloud.google.com/gke-spot" in [toleration["key"] for toleration in pod["tolerations"]]


def test_a_stop_restarts_the_set_and_does_not_count():
    values = parsed(JOBS["one slice"])
    of_job, pod, _, _ = pod_of(values)
    assert pod["restartPolicy"] == "Never" and of_job["backoffLimit"] == 0  # what podFailurePolicy asks for
    stopped, disrupted = of_job["podFailurePolicy"]["rules"]
    assert stopped["action"] == disrupted["action"] == "FailJob"
    assert stopped["onExitCodes"] == {"containerName": "train", "operator": "In", "values": [75]}
    (rule,) = values["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert pod["terminationGracePeriodSeconds"] >= 60


def test_words_arrive_as_they_were_given():
    """Kubernetes fills in $(NAME), and turns $$ into $."""
    odd = ("--config.data.sources.main.path=a b: 'c' \"d\" # é", "--config.eval.answer_prefix=$(HOME) $x", "{{ x }}")
    one = Job("n", odd, "/volume/n", slices("v5e-8"), **CLAIM)
    _, _, container, _ = pod_of(parsed(one))
    assert tuple(word.replace("$$", "$") for word in container["command"][-3:]) == odd
    assert container["command"][-2].endswith("=$$(HOME) $$x")


@pytest.mark.parametrize(
    "name, hosts, chips, devices",
    [("v4-8", 1, 4, 4), ("v5e-4", 1, 4, 4), ("v5e-8", 1, 8, 8), ("v5e-16", 4, 4, 16), ("v5e-256", 64, 4, 256),
     ("v5p-128", 16, 4, 64), ("v6e-256", 64, 4, 256), ("tpu7x-16", 2, 4, 16), ("3xv6e-16", 4, 4, 48)],
)  # fmt: skip
def test_hosts_and_chips_of_slices(name, hosts, chips, devices):
    where = slices(name)
    assert (where.hosts, where.chips, where.devices) == (hosts, chips, devices)
