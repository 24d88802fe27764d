"""The launch config: which launcher, how many ranks, and what is requested from a cluster."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.distributed.launcher_env import DEFAULT_PORT

# A name of a Kubernetes object, or nothing.
OptionalName = Annotated[str, Field(pattern=r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
# An amount as Kubernetes writes it (`64Gi`, `500m`, `8`), or nothing.
Quantity = Annotated[str, Field(pattern=r"^(\d+(\.\d+)?([KMGTPE]i?|k|m)?)?$")]


@configclass
class SlurmConfig:
    """What a job requests from a Slurm cluster."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "clipwright"
    """Name of the job, and prefix of its log files."""
    time: Annotated[str, Field(pattern=r"^[\d:-]+$")] = "24:00:00"
    """Time limit, in Slurm's format."""
    partition: Annotated[str, Field(pattern=r"^[\w.,-]*$")] = ""
    """Partition; empty for the cluster's default."""
    account: Annotated[str, Field(pattern=r"^[\w.-]*$")] = ""
    """Account that is charged; empty for the user's default."""
    cpus_per_task: Annotated[int, Field(ge=1)] = 8
    """CPU cores per rank."""
    warning: Annotated[int, Field(ge=1)] = 120
    """Seconds before the time limit at which the ranks are signaled to save."""
    setup: tuple[str, ...] = ()
    """Shell lines that run before the ranks start, such as `module load cuda`."""


@configclass
class KubernetesConfig:
    """The pods of a Kubernetes job."""

    name: Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,50}[a-z0-9])?$")] = "clipwright"
    """Name of the Job and its Service."""
    image: str = "clipwright"
    """Container image."""
    claim: str = "clipwright"
    """Persistent volume claim that holds data and runs."""
    mount: Annotated[str, Field(pattern=r"^/")] = "/work"
    """Path at which every pod mounts the claim; the command runs there."""
    shared_memory: str = "16Gi"
    """Size limit of /dev/shm, through which loader workers send batches."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Failures per pod before the job fails; exits with saved state do not count."""
    grace: Annotated[int, Field(ge=1)] = 120
    """Seconds between a pod's SIGTERM and SIGKILL, for saving."""
    namespace: OptionalName = ""
    """Namespace of the Job and its Service; empty for that of kubectl's context."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels that a node must have, such as `{gpu: h100}`."""
    tolerations: tuple[dict[str, Any], ...] = ()
    """Taints that the pods tolerate, such as `{key: nvidia.com/gpu, operator: Exists}`."""
    secrets: tuple[Name, ...] = ()
    """Secrets whose keys become environment variables of every rank, such as credentials of a bucket."""
    pull_secrets: tuple[Name, ...] = ()
    """Secrets with which the container image is pulled."""
    pull_policy: Literal["", "Always", "IfNotPresent", "Never"] = ""
    """When a node pulls the image; empty for the cluster's default."""
    service_account: OptionalName = ""
    """Service account of the pods; empty for the namespace's default."""
    priority_class: OptionalName = ""
    """Priority class of the pods; empty for the cluster's default."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name under which the cluster offers GPUs."""
    cpus: Quantity = ""
    """CPU cores that a pod requests; empty for none."""
    memory: Quantity = ""
    """Memory that a pod requests and is limited to; empty for none."""
    volumes: dict[Name, Annotated[str, Field(pattern=r"^/")]] = field(default_factory=dict)
    """Further persistent volume claims, each with the path at which every pod mounts it."""


@configclass
class LaunchConfig:
    """How the ranks of a command are started."""

    by: Literal["hostfile", "torchrun", "slurm", "kubernetes"]
    """Launcher: `hostfile` and `torchrun` start the ranks, `slurm` and `kubernetes` print a job."""
    hostfile: str | None = None
    """File with one line `[USER@]HOST[:SSH_PORT] slots=RANKS` per node; hostfile only."""
    nodes: Annotated[int, Field(ge=1)] | None = None
    """Number of nodes; torchrun, slurm and kubernetes."""
    processes: Annotated[int, Field(ge=1)] | None = None
    """Ranks per node, one per GPU; torchrun, slurm and kubernetes."""
    parts: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Number of jobs in the array; slurm with prep or embed only."""
    gpus: bool = True
    """Request one GPU per rank from the cluster."""
    node_rank: Annotated[int, Field(ge=0)] | None = None
    """Rank of this node, from 0; torchrun on several nodes only."""
    master: Annotated[str, Field(pattern=r"^[\w.:-]+$")] | None = None
    """Address of rank 0's host as the other nodes reach it; by default the first host."""
    port: Annotated[int, Field(ge=1, le=65535)] = DEFAULT_PORT
    """Port of the rendezvous on that host; slurm derives one from the job id instead."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables for every rank."""
    check: Literal["all", "config", "none"] = "all"
    """What is checked first: the command's config, data, model and output folder; only its config; nothing."""
    slurm: SlurmConfig = SlurmConfig()
    """Options of a Slurm job."""
    kubernetes: KubernetesConfig = KubernetesConfig()
    """Options of a Kubernetes job."""
