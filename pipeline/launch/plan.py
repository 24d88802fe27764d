"""From a launch config and a command to the exact command lines that start its ranks, one per node."""

from __future__ import annotations

import base64
import json
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from clipwright.pipeline.core.command import Call
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.launch.config import LaunchConfig
from clipwright.pipeline.launch.hosts import HOSTFILE_LINE, LOCAL_ADDRESSES, hostfile_error, read_hostfile

RANK_VERBS = ("train", "doctor", "embed")  # their processes share the work as ranks
ARRAY_VERBS = ("prep", "embed")  # their work can be split into parts for a job array
FORWARDED_ENV = ("NCCL_", "GLOO_", "UCX_", "FI_", "OMP_", "DS_", "PYTHONPATH")  # prefixes; sent to the hosts


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
    if config.by in ("slurm", "kubernetes") and "--fresh" in inner:
        raise _job_error(
            config, inner, "a job cannot run with --fresh: it would start over each time it is queued again"
        )
    if config.parts is None and verb in RANK_VERBS:
        return
    if config.by != "slurm" or verb not in ARRAY_VERBS:
        raise _not_launchable(list(call.given), inner)
    required(config, "parts")
    if any(argument.startswith("runtime.part=") for argument in inner):
        raise _job_error(config, inner, "runtime.part is given, and parts= sets it for each job")


def _job_error(config: LaunchConfig, inner: list[str], what: str) -> ClipwrightError:
    return ClipwrightError(
        "E_USAGE",
        what,
        where=shlex.join(inner),
        found=f"launch by {config.by}",
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


def world_size(config: LaunchConfig) -> int:
    """Returns the number of ranks; 1 for each job of an array. Raises E_CONFIG_VALUE, E_HOSTFILE."""
    if config.parts is not None:
        return 1
    if config.by == "hostfile":
        return sum(host.slots for host in read_hostfile(Path(config.hostfile or "")))
    [processes] = required(config, "processes")
    return (config.nodes or 1) * processes


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
        master = f", {_master_text(str(config.master), config.port)}"
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
        raise hostfile_error("hostfile", "no hostfile is given", "", f"add hostfile=FILE with lines {HOSTFILE_LINE}")
    hosts = read_hostfile(Path(config.hostfile))
    if config.nodes is not None or config.processes is not None:
        listed = " ".join(f"{host.address} slots={host.slots}" for host in hosts)
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "the hostfile already defines nodes and processes",
            where="nodes" if config.nodes is not None else "processes",
            found=f"{config.hostfile}: {listed}",
            fix="leave out nodes and processes, or edit the hostfile",
        )
    first_host = hosts[0].address
    master = config.master or first_host
    if len(hosts) > 1 and master in LOCAL_ADDRESSES:
        raise hostfile_error(
            config.hostfile,
            "the other hosts cannot reach rank 0",
            f"the first host is {first_host}",
            "add master=ADDRESS, the address of the first host for the others",
        )
    inherited = {name: value for name, value in sorted(os.environ.items()) if name.startswith(FORWARDED_ENV)}
    remote_env = {**inherited, **config.env}
    world_info = json.dumps({host.address: list(range(host.slots)) for host in hosts})
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
        if host.is_local:
            commands.append(NodeCommand("", launcher, config.env))
        else:
            ssh = ["ssh", "-o", "BatchMode=yes", *host.ssh_arguments, _remote_shell(launcher, remote_env)]
            commands.append(NodeCommand(host.address, ssh))
    layout = _layout([host.slots for host in hosts])
    return f"world size {layout} (from {config.hostfile}), {_master_text(master, config.port)}", commands


def _master_text(address: str, port: int) -> str:
    return f"master [{address}]:{port}" if ":" in address else f"master {address}:{port}"


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
