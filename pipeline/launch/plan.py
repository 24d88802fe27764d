"""From a launch config and a command to the exact command lines that start its ranks, one per node."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from clipwright.pipeline.core.command import Call
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.distributed.launcher_env import DEFAULT_PORT

RANK_VERBS = ("train", "doctor", "embed")  # their processes share the work as ranks
ARRAY_VERBS = ("prep", "embed")  # their work can be split into parts for a job array
FORWARDED_ENV = ("NCCL_", "GLOO_", "UCX_", "FI_", "OMP_", "DS_", "PYTHONPATH")  # prefixes; sent to the hosts
LOCAL_HOSTS = ("localhost", "127.0.0.1")
HOSTFILE_LINE = "`HOST slots=NUMBER`"


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


@configclass
class LaunchConfig:
    """How the ranks of a command are started."""

    by: Literal["hostfile", "torchrun", "slurm", "kubernetes"]
    """Launcher: `hostfile` and `torchrun` start the ranks, `slurm` and `kubernetes` print a job."""
    hostfile: str | None = None
    """File with one line `HOST slots=RANKS` per node; hostfile only."""
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
    slurm: SlurmConfig = SlurmConfig()
    """Options of a Slurm job."""
    kubernetes: KubernetesConfig = KubernetesConfig()
    """Options of a Kubernetes job."""


@dataclass(frozen=True)
class NodeCommand:
    """The command that starts one node's ranks; `host` is empty for this node."""

    host: str
    arguments: list[str]
    env: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        return " ".join([*variables, shlex.join(self.arguments)])


def split(call: Call) -> tuple[list[str], list[str]]:
    """Returns the overrides of the launch config and the command to launch: `launch CONFIG [key=value …] VERB …`."""
    given = list(call.given)
    start = 1
    while start < len(given) and given[start] in call.overrides:
        start += 1
    inner = given[start:]
    if not inner or inner[0] not in (*RANK_VERBS, *ARRAY_VERBS) or any(word.startswith("-") for word in inner):
        raise _not_launchable(given, inner)
    if call.out is not None:
        inner += ["-o", str(call.out)]
    flags = {"--json": call.json, "--quiet": call.quiet, "--debug": call.debug, "--fresh": call.fresh}
    inner += [flag for flag, is_set in flags.items() if is_set]
    return given[1:start], inner


def check(config: LaunchConfig, call: Call, inner: list[str]) -> None:
    """Raises E_USAGE if this launcher cannot start this command."""
    verb = inner[0]
    if config.parts is None and verb in RANK_VERBS:
        return
    if config.by != "slurm" or verb not in ARRAY_VERBS:
        raise _not_launchable(list(call.given), inner)
    required(config, "parts")
    if "--fresh" in inner:
        raise _array_error(config, inner, "a job array cannot run with --fresh: each part would start over")
    if any(argument.startswith("runtime.part=") for argument in inner):
        raise _array_error(config, inner, "runtime.part is given, and parts= sets it for each job")


def _array_error(config: LaunchConfig, inner: list[str], what: str) -> ClipwrightError:
    return ClipwrightError(
        "E_USAGE",
        what,
        where=shlex.join(inner),
        found=f"parts={config.parts}",
        fix="leave out runtime.part and --fresh; to start over name a new folder",
    )


def _not_launchable(given: list[str], inner: list[str]) -> ClipwrightError:
    ranks, arrays = ", ".join(RANK_VERBS), " and ".join(ARRAY_VERBS)
    problem = f"{inner[0]!r} cannot be launched in this way" if inner else "no command to launch is given"
    return ClipwrightError(
        "E_USAGE",
        problem,
        where=shlex.join(["launch", *given]),
        found=f"{ranks} run as ranks, {arrays} as a Slurm array of parts",
        fix="put `launch CONFIG` before a command: clipwright launch torchrun processes=2 train photos … -o RUN",
    )


def required(config: LaunchConfig, *names: str) -> list[int]:
    """Returns the values of `names`; raises E_CONFIG_VALUE for one that is not set."""
    values = [getattr(config, name) for name in names]
    for name, value in zip(names, values, strict=True):
        if value is None:
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                f"{name} is not set",
                where=f"launch by {config.by}",
                fix=f"add {name}=NUMBER before the command that is launched",
            )
    return values


def node_commands(config: LaunchConfig, inner: list[str]) -> tuple[str, list[NodeCommand]]:
    """Returns a description of the world and the commands that start its ranks, for `hostfile` and `torchrun`."""
    return _hostfile_commands(config, inner) if config.by == "hostfile" else _torchrun_command(config, inner)


def _torchrun_command(config: LaunchConfig, inner: list[str]) -> tuple[str, list[NodeCommand]]:
    """torchrun on this node; with nodes=N the same command runs on each of N nodes, with the rendezvous at `master`."""
    [processes] = required(config, "processes")
    nodes = config.nodes or 1
    if nodes > 1:
        _, node_rank = required(config, "master", "node_rank")
        rendezvous = [
            f"--nnodes={nodes}",
            f"--node-rank={node_rank}",
            f"--master-addr={config.master}",
            f"--master-port={config.port}",
        ]
        master = f", master {config.master}:{config.port}"
    else:
        rendezvous = ["--standalone"]
        master = ""
    torchrun = [sys.executable, "-m", "torch.distributed.run", *rendezvous, f"--nproc-per-node={processes}"]
    # torchrun would set it to 1 itself, with a warning; runtime.threads decides.
    env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **config.env}
    description = f"world size {nodes * processes} = {_count_nodes(nodes)} × {processes} (by torchrun){master}"
    return description, [NodeCommand("", [*torchrun, "-m", "clipwright", *inner], env)]


def _hostfile_commands(config: LaunchConfig, inner: list[str]) -> tuple[str, list[NodeCommand]]:
    """DeepSpeed's launcher on each host of a hostfile, by ssh; folder and Python are at the same path on all hosts."""
    if config.hostfile is None:
        raise _hostfile_error("hostfile", "no hostfile is given", "", f"add hostfile=FILE with lines {HOSTFILE_LINE}")
    hosts = read_hostfile(Path(config.hostfile))
    if config.nodes is not None or config.processes is not None:
        listed = " ".join(f"{host} slots={slots}" for host, slots in hosts.items())
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "the hostfile already defines nodes and processes",
            where="nodes" if config.nodes is not None else "processes",
            found=f"{config.hostfile}: {listed}",
            fix="leave out nodes and processes, or edit the hostfile",
        )
    first_host = next(iter(hosts))
    master = config.master or first_host
    if len(hosts) > 1 and master in LOCAL_HOSTS:
        raise _hostfile_error(
            config.hostfile,
            "the other hosts cannot reach rank 0",
            f"the first host is {first_host}",
            "add master=ADDRESS, the address of the first host for the others",
        )
    inherited = {name: value for name, value in sorted(os.environ.items()) if name.startswith(FORWARDED_ENV)}
    remote_env = {**inherited, **config.env}
    world_info = json.dumps({host: list(range(slots)) for host, slots in hosts.items()})
    commands = list[NodeCommand]()
    for node_rank, host in enumerate(hosts):
        launcher = [
            sys.executable,
            "-u",
            "-m",
            "deepspeed.launcher.launch",
            f"--world_info={base64.urlsafe_b64encode(world_info.encode()).decode()}",
            f"--node_rank={node_rank}",
            f"--master_addr={master}",
            f"--master_port={config.port}",
            "--no_local_rank",
            "--log_level=error",
            "--module",
            "clipwright",
            *inner,
        ]
        if host in LOCAL_HOSTS:
            commands.append(NodeCommand("", launcher, config.env))
        else:
            commands.append(
                NodeCommand(host, ["ssh", "-o", "BatchMode=yes", host, _remote_shell(launcher, remote_env)])
            )
    master_text = f"master {master}:{config.port}"
    return f"world size {_layout(list(hosts.values()))} (from {config.hostfile}), {master_text}", commands


def _layout(slots: list[int]) -> str:
    """Returns `4 = 2 nodes × 2`, or `3 on 2 nodes (2 + 1)` for unequal nodes."""
    nodes = _count_nodes(len(slots))
    if len(set(slots)) == 1:
        return f"{sum(slots)} = {nodes} × {slots[0]}"
    return f"{sum(slots)} on {nodes} ({' + '.join(map(str, slots))})"


def _count_nodes(count: int) -> str:
    return f"{count} node{'s' if count > 1 else ''}"


def _remote_shell(arguments: list[str], env: dict[str, str]) -> str:
    """Returns the shell line for a host: it runs `arguments` and stops them when the ssh connection closes.

    ssh forwards no signals, and processes that it started would outlive it. The line therefore watches its standard
    input, which ends with the connection.
    """
    command = shlex.join(["env", *(f"{name}={value}" for name, value in env.items()), *arguments])
    return (
        f"cd {shlex.quote(str(Path.cwd()))} || exit 1; exec 3<&0; {command} </dev/null 3<&- & ranks=$!; "
        "{ cat <&3; kill -TERM $ranks; } >/dev/null 2>&1 & guard=$!; exec 3<&-; "
        "wait $ranks; code=$?; kill $guard 2>/dev/null; exit $code"
    )


def read_hostfile(path: Path) -> dict[str, int]:
    """Returns host → number of ranks, in order, from lines `HOST slots=NUMBER`; E_HOSTFILE names an invalid line.

    DeepSpeed runs on this machine alone if the file is missing; we do not.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        found = "the file does not exist" if isinstance(error, FileNotFoundError) else str(error)
        raise _hostfile_error(path, "the hostfile cannot be read", found, "check hostfile=FILE") from None
    hosts: dict[str, int] = {}
    for number, text in enumerate(lines, 1):
        line = text.partition("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(\w[\w.:@-]*)\s+slots=([1-9]\d{0,5})", line, re.ASCII)
        if match is None:
            raise _hostfile_error(f"{path}:{number}", "the line is malformed", repr(line), f"write {HOSTFILE_LINE}")
        host, slots = match[1], int(match[2])
        if host in hosts:
            raise _hostfile_error(
                f"{path}:{number}", f"{host} is listed on an earlier line", "", "give it all its slots on one line"
            )
        hosts[host] = slots
    if not hosts:
        raise _hostfile_error(path, "the hostfile lists no host", "", f"write lines {HOSTFILE_LINE}")
    return hosts


def _hostfile_error(where: object, what: str, found: str, fix: str) -> ClipwrightError:
    return ClipwrightError("E_HOSTFILE", what, where=where, found=found, fix=fix)
