"""From a launch config and a command of ours to the exact lines that start its ranks, one line a machine."""

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

VERBS = ("train", "doctor", "embed")  # whose processes share their work as ranks
ARRAYS = ("prep", "embed")  # whose work is cut into parts that a job array does
CARRIED = ("NCCL_", "GLOO_", "UCX_", "FI_", "OMP_", "DS_", "PYTHONPATH")  # this shell's variables that hosts get too
_PORT = 29500


@configclass
class SlurmConfig:
    """What the job asks of its cluster. `setup`: lines of shell before the ranks start (modules, environment)."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "clipwright"
    time: Annotated[str, Field(pattern=r"^[\d:-]+$")] = "24:00:00"
    partition: Annotated[str, Field(pattern=r"^[\w.,-]*$")] = ""
    account: Annotated[str, Field(pattern=r"^[\w.-]*$")] = ""
    cpus_per_task: Annotated[int, Field(ge=1)] = 8
    warning: Annotated[int, Field(ge=1)] = 120  # seconds before the time limit at which the ranks are told to save
    setup: tuple[str, ...] = ()


@configclass
class KubernetesConfig:
    """The pods. `claim` is the volume claim that holds data and runs, mounted at `mount` in every pod."""

    name: Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,50}[a-z0-9])?$")] = "clipwright"
    image: str = "clipwright"
    claim: str = "clipwright"
    mount: Annotated[str, Field(pattern=r"^/")] = "/work"
    shared_memory: str = "16Gi"
    retries: Annotated[int, Field(ge=0)] = 3  # failures of a pod that are forgiven; stopping with state saved is none
    grace: Annotated[int, Field(ge=1)] = 120  # seconds between a pod's SIGTERM and its end


@configclass
class LaunchConfig:
    """How ranks are started. Not all keys concern each way; `nodes` and `processes` of a hostfile stand in it.

    `master`: host of rank 0 as the others reach it; by default the first. `env`: variables for every rank.
    """

    by: Literal["hostfile", "torchrun", "slurm", "kubernetes"]
    hostfile: str | None = None
    nodes: Annotated[int, Field(ge=1)] | None = None
    processes: Annotated[int, Field(ge=1)] | None = None  # on each machine: one a GPU
    parts: Annotated[int, Field(ge=1, le=100_000)] | None = None  # slurm, prep and embed: an array of so many jobs
    gpus: bool = True  # whether each process asks the cluster for a GPU
    node_rank: Annotated[int, Field(ge=0)] | None = None  # torchrun on several machines: which of them this is
    master: Annotated[str, Field(pattern=r"^[\w.:-]+$")] | None = None
    port: Annotated[int, Field(ge=1, le=65535)] = _PORT
    env: dict[str, str] = field(default_factory=dict)
    slurm: SlurmConfig = SlurmConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()


@dataclass(frozen=True)
class Part:
    """The line that starts one machine's ranks; `host` is empty where it is this machine."""

    host: str
    line: list[str]
    env: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in self.env.items()), shlex.join(self.line)])


def split(call: Call) -> tuple[list[str], list[str]]:
    """The overrides of the launch config and the command to launch: `launch CONFIG [key=value …] VERB …`."""
    given = list(call.given)
    start = next((i for i, word in enumerate(given) if i > 0 and word not in call.overrides), len(given))
    inner = given[start:]
    if not inner or inner[0] not in (*VERBS, *ARRAYS) or any(word.startswith("-") for word in inner):
        raise _nothing(given, inner)
    if call.out is not None:
        inner += ["-o", str(call.out)]
    flags = {"--json": call.json, "--quiet": call.quiet, "--debug": call.debug, "--fresh": call.fresh}
    return given[1:start], inner + [flag for flag, on in flags.items() if on]


def check(config: LaunchConfig, call: Call, inner: list[str]) -> None:
    """E_USAGE where this launcher cannot start this command in this way."""
    verb = inner[0]
    if config.parts is None and verb in VERBS:
        return
    if config.by != "slurm" or verb not in ARRAYS:
        raise _nothing(list(call.given), inner)
    required(config, "parts")
    if any(word.startswith("runtime.part=") for word in inner) or "--fresh" in inner:
        raise ClipwrightError(
            "E_USAGE",
            "parts said twice" if "--fresh" not in inner else "parts that would start all over",
            where=shlex.join(inner),
            found=f"parts={config.parts} gives each job its runtime.part, and each goes on where it stopped",
            fix="leave out runtime.part and --fresh; to start over give a new folder",
        )


def _nothing(given: list[str], inner: list[str]) -> ClipwrightError:
    found = repr(inner[0]) if inner else "no command"
    return ClipwrightError(
        "E_USAGE",
        "nothing to launch",
        where=shlex.join(["launch", *given]),
        found=f"{found}; {', '.join(VERBS)} run as ranks, {' and '.join(ARRAYS)} as a Slurm array of parts",
        fix="put `launch CONFIG` before a command: clipwright launch torchrun processes=2 train photos … -o RUN",
    )


def required(config: LaunchConfig, *names: str) -> list[int]:
    """The values of `names`; E_CONFIG_VALUE for one that is not set."""
    values = [getattr(config, name) for name in names]
    for name, value in zip(names, values, strict=True):
        if value is None:
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "a missing value",
                where=name,
                found=f"launch by {config.by} needs it",
                fix=f"add {name}=NUMBER before the command that is launched",
            )
    return values


def parts(config: LaunchConfig, inner: list[str]) -> tuple[str, list[Part]]:
    """What will run, in words and as lines: `hostfile` and `torchrun`, which start ranks themselves."""
    return _hosts(config, inner) if config.by == "hostfile" else _torchrun(config, inner)


def _torchrun(config: LaunchConfig, inner: list[str]) -> tuple[str, list[Part]]:
    """torch's launcher on this machine; with nodes=N the same on each of N, which meet at `master`."""
    [processes] = required(config, "processes")
    nodes = config.nodes or 1
    meeting, where = ["--standalone"], ""
    if nodes > 1:
        _, node_rank = required(config, "master", "node_rank")
        meeting = [f"--nnodes={nodes}", f"--node-rank={node_rank}"]
        meeting += [f"--master-addr={config.master}", f"--master-port={config.port}"]
        where = f", master {config.master}:{config.port}"
    line = [sys.executable, "-m", "torch.distributed.run", *meeting, f"--nproc-per-node={processes}"]
    # torchrun sets it to 1 by itself, and warns; runtime.threads decides.
    env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **config.env}
    told = f"world {nodes * processes} = {_nodes(nodes)} × {processes} (by torchrun){where}"
    return told, [Part("", [*line, "-m", "clipwright", *inner], env)]


def _hosts(config: LaunchConfig, inner: list[str]) -> tuple[str, list[Part]]:
    """DeepSpeed's launcher on every host of a hostfile, reached by ssh; all hosts see this folder and this Python."""
    if config.hostfile is None:
        raise _hostfile_error(
            "hostfile", "no hostfile", "none is named", "add hostfile=FILE, of lines `HOST slots=NUMBER`"
        )
    hosts = read_hostfile(Path(config.hostfile))
    if config.nodes is not None or config.processes is not None:
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "machines said twice",
            where="nodes" if config.nodes is not None else "processes",
            found=f"{config.hostfile} says {' '.join(f'{host} slots={n}' for host, n in hosts.items())}",
            fix="leave nodes and processes out, or edit the hostfile",
        )
    first, slots = next(iter(hosts)), list(hosts.values())
    master = config.master or first
    if len(hosts) > 1 and master in _HERE:
        raise _hostfile_error(config.hostfile, "hosts that cannot meet", f"the first is {first}", "add master=ADDRESS")
    info = base64.urlsafe_b64encode(json.dumps({host: list(range(n)) for host, n in hosts.items()}).encode()).decode()
    world, even = sum(slots), len(set(slots)) == 1
    spread = (
        f"= {_nodes(len(hosts))} × {slots[0]}" if even else f"on {_nodes(len(hosts))} ({' + '.join(map(str, slots))})"
    )
    carried = {name: value for name, value in sorted(os.environ.items()) if name.startswith(CARRIED)} | config.env
    made = []
    for node, host in enumerate(hosts):
        line = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={info}", f"--node_rank={node}"]
        line += [f"--master_addr={master}", f"--master_port={config.port}", "--no_local_rank", "--log_level=error"]
        line += ["--module", "clipwright", *inner]
        if host in _HERE:
            made.append(Part("", line, config.env))
        else:
            made.append(Part(host, ["ssh", "-o", "BatchMode=yes", host, _remote(line, carried)]))
    return f"world {world} {spread} (from {config.hostfile}), master {master}:{config.port}", made


_HERE = ("localhost", "127.0.0.1")
_FORM = "`HOST slots=NUMBER`"


def _nodes(count: int) -> str:
    return f"{count} node{'s' if count > 1 else ''}"


def _remote(line: list[str], env: dict[str, str]) -> str:
    """What a host's shell runs: the line, told to stop when the connection's standard input ends.

    ssh hands on no signal, and what it started would outlive it.
    """
    told = shlex.join(["env", *(f"{name}={value}" for name, value in env.items()), *line])
    return (
        f"cd {shlex.quote(str(Path.cwd()))} || exit 1; exec 3<&0; {told} </dev/null 3<&- & ranks=$!; "
        "{ cat <&3; kill -TERM $ranks; } >/dev/null 2>&1 & guard=$!; exec 3<&-; "
        "wait $ranks; code=$?; kill $guard 2>/dev/null; exit $code"
    )


def read_hostfile(path: Path) -> dict[str, int]:
    """Host → ranks on it, in order, of a file of lines `HOST slots=NUMBER`; E_HOSTFILE names the line it refuses.

    DeepSpeed goes on with this machine alone where the file is missing; we do not.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        found = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise _hostfile_error(path, "a hostfile that cannot be read", found, "check hostfile=FILE") from None
    hosts: dict[str, int] = {}
    for number, text in enumerate(lines, 1):
        if not (line := text.partition("#")[0].strip()):
            continue
        match = re.fullmatch(r"(\w[\w.:@-]*)\s+slots=([1-9]\d{0,5})", line, re.ASCII)
        if match is None:
            raise _hostfile_error(
                f"{path}:{number}", "a line that names no host", repr(line), "write `HOST slots=NUMBER`"
            )
        if match[1] in hosts:
            found = f"{match[1]} stands on an earlier line"
            raise _hostfile_error(f"{path}:{number}", "a host named twice", found, "give it all its slots on one line")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise _hostfile_error(path, "a hostfile without a host", "no line names one", f"write lines {_FORM}")
    return hosts


def _hostfile_error(where: object, what: str, found: str, fix: str) -> ClipwrightError:
    return ClipwrightError("E_HOSTFILE", what, where=where, found=found, fix=fix)
