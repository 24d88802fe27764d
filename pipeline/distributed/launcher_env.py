"""The only reader of RANK, WORLD_SIZE and the like: which rank this process is, according to its launcher."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count

# torchrun's variables, which DeepSpeed, accelerate and others read.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DEFAULT_PORT = 29500
# Slurm jobs get a port each in this range, below the ports that systems give to clients.
FIRST_JOB_PORT, JOB_PORTS = 20000, 12000


@dataclass(frozen=True)
class LauncherEnv:
    """What a launcher's environment variables state about this process."""

    source: str  # the launcher's name
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1  # ranks on this node
    nodes: int = 1
    master_addr: str = ""  # host of rank 0, for the rendezvous
    master_port: int = 0

    def variables(self) -> dict[str, str]:
        """Returns the values as torchrun's variables, for libraries that read them from the environment."""
        values: dict[str, object] = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_RANK": self.local_rank,
        }
        if self.master_addr:
            values["LOCAL_WORLD_SIZE"] = self.local_world_size
            values["MASTER_ADDR"] = self.master_addr
            values["MASTER_PORT"] = self.master_port
        return {name: str(value) for name, value in values.items()}


SINGLE_PROCESS = LauncherEnv("one process")


def read_launcher_env(env: Mapping[str, str]) -> LauncherEnv:
    """Reads the variables of torchrun (or DeepSpeed), Slurm, MPI or Kubernetes; SINGLE_PROCESS if there are none.

    A launcher may itself be started once per node by another one: the two agree. Raises E_WORLD for two launchers that
    contradict each other, for an incomplete set of variables, and if no variable names the host of rank 0.
    """
    readers = (_read_torchrun, _read_slurm, _read_mpi, _read_kubernetes)
    results = [reader(env) for reader in readers]
    launchers = [launcher for launcher in results if launcher is not None]
    if not launchers:
        world_size = _number(env, "WORLD_SIZE", 1)
        if world_size > 1:
            raise _error("no variable states the rank of this process", f"WORLD_SIZE={world_size}", "RANK is not set")
        return SINGLE_PROCESS
    launcher = launchers[0]
    for other in launchers[1:]:
        _check_agreement(launcher, other)
    master_addr = env.get("MASTER_ADDR") or launcher.master_addr
    master_port = _number(env, "MASTER_PORT", launcher.master_port or DEFAULT_PORT)
    if not master_addr and launcher.world_size > 1:
        if launcher.nodes > 1 or launcher.source not in ("MPI", "Slurm"):
            raise _error(
                "no variable names the host of rank 0",
                launcher.source,
                f"MASTER_ADDR is not set, with {format_count(launcher.world_size, 'rank')}",
                "set MASTER_ADDR to the host of rank 0 (and MASTER_PORT to a free port on it) for all ranks",
            )
        master_addr = "127.0.0.1"
    return replace(launcher, master_addr=master_addr, master_port=master_port)


_RANK_VARIABLES = {
    "Slurm": "SLURM_PROCID, SLURM_NTASKS, SLURM_STEP_NUM_TASKS",
    "MPI": "OMPI_COMM_WORLD_RANK and _SIZE, PMI_RANK, PMI_SIZE",
    "Kubernetes": "JOB_COMPLETION_INDEX",
}


def _check_agreement(launcher: LauncherEnv, other: LauncherEnv) -> None:
    """E_WORLD unless both state the same rank, or `other` started `launcher` once per node."""
    node = launcher.rank // launcher.local_world_size
    same_rank = (other.rank, other.world_size) == (launcher.rank, launcher.world_size)
    once_per_node = (other.rank, other.world_size) == (node, launcher.nodes)
    if not (same_rank or once_per_node):
        raise _error(
            "the variables of two launchers contradict each other",
            f"{launcher.source} and {other.source}",
            f"rank {launcher.rank} of {launcher.world_size} according to {launcher.source}, "
            f"{other.rank} of {other.world_size} according to {other.source}",
            f"unset the variables of the one that did not start this process ({_RANK_VARIABLES[other.source]})",
        )


def _error(
    what: str, where: str, found: str, fix: str = "start the command with one launcher, or with none"
) -> ClipwrightError:
    return ClipwrightError("E_WORLD", what, where=where, found=found, fix=fix)


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name) or str(default)
    if not re.fullmatch(r"\d+", text):
        raise _error("a launcher's variable is not a number", f"{name}={text}", "allowed: an integer from 0")
    return int(text)


def _checked(launcher: LauncherEnv) -> LauncherEnv:
    """Returns `launcher`, with the number of nodes computed if it is 0. E_WORLD for ranks out of range."""
    rank, world_size = launcher.rank, launcher.world_size
    local_rank, local_world_size = launcher.local_rank, launcher.local_world_size
    if not (rank < world_size and local_rank < local_world_size <= world_size):
        found = f"rank {rank} of {world_size}, local rank {local_rank} of {local_world_size}"
        raise _error("the rank is not below the world size", launcher.source, found)
    equal_nodes = -(-world_size // local_world_size)
    return replace(launcher, nodes=launcher.nodes or equal_nodes)


def _read_torchrun(env: Mapping[str, str]) -> LauncherEnv | None:
    """Reads RANK and WORLD_SIZE, which DeepSpeed's launcher sets too; it calls LOCAL_WORLD_SIZE LOCAL_SIZE."""
    if not env.get("RANK"):
        return None
    if not env.get("WORLD_SIZE"):
        raise _error("no variable states the world size", f"RANK={env['RANK']}", "WORLD_SIZE is not set")
    is_deepspeed = "CROSS_SIZE" in env and "TORCHELASTIC_RUN_ID" not in env
    return _checked(
        LauncherEnv(
            source="DeepSpeed" if is_deepspeed else "torchrun",
            rank=_number(env, "RANK", 0),
            world_size=_number(env, "WORLD_SIZE", 1),
            local_rank=_number(env, "LOCAL_RANK", 0),
            local_world_size=_number(env, "LOCAL_WORLD_SIZE", _number(env, "LOCAL_SIZE", 1)),
            nodes=_number(env, "GROUP_WORLD_SIZE", _number(env, "CROSS_SIZE", 0)),
        )
    )


def _read_slurm(env: Mapping[str, str]) -> LauncherEnv | None:
    """Reads the variables of a task of `srun`: those of its step, which may have fewer tasks than the job."""
    world_size = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))
    if not env.get("SLURM_PROCID") or world_size < 2:
        return None
    tasks = _slurm_tasks(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "")
    if sum(tasks) != world_size:  # the list is the job's, or missing
        nodes = _number(env, "SLURM_STEP_NUM_NODES", _number(env, "SLURM_NNODES", 1))
        tasks = [world_size // nodes + (node < world_size % nodes) for node in range(nodes)]
    node = min(_number(env, "SLURM_NODEID", 0), len(tasks) - 1)
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
    job = _number(env, "SLURM_JOB_ID", 0)
    return _checked(
        LauncherEnv(
            source="Slurm",
            rank=_number(env, "SLURM_PROCID", 0),
            world_size=world_size,
            local_rank=_number(env, "SLURM_LOCALID", 0),
            local_world_size=tasks[node],
            nodes=len(tasks),
            master_addr=first_host(hosts),
            # Jobs on the same node must not share a port.
            master_port=FIRST_JOB_PORT + job % JOB_PORTS if job else DEFAULT_PORT,
        )
    )


def _slurm_tasks(text: str) -> list[int]:
    """Expands Slurm's list of tasks per node: `8(x2),4` → [8, 8, 4]."""
    tasks = list[int]()
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        tasks += [int(count)] * int(repeats or 1)
    return tasks


def first_host(nodelist: str) -> str:
    """Returns the first host of Slurm's compressed list: `gpu[007-010,12],cpu1` → gpu007."""
    first_entry = re.split(r",(?![^[]*\])", nodelist)[0]
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", first_entry)


def _read_mpi(env: Mapping[str, str]) -> LauncherEnv | None:
    """Reads the variables of mpirun: Open MPI's, or Hydra's (MPICH, Intel MPI and others)."""
    open_mpi = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
    hydra = ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"]
    for rank, size, local_rank, local_size in (open_mpi, hydra):
        if not env.get(rank):
            continue
        world_size = _number(env, size, 1)
        if world_size > 1:
            return _checked(
                LauncherEnv(
                    source="MPI",
                    rank=_number(env, rank, 0),
                    world_size=world_size,
                    local_rank=_number(env, local_rank, 0),
                    local_world_size=_number(env, local_size, 1),
                    nodes=0,
                )
            )
    return None


def _read_kubernetes(env: Mapping[str, str]) -> LauncherEnv | None:
    """Reads the variables of a pod of an Indexed Job, one rank per pod; its manifest sets WORLD_SIZE."""
    world_size = _number(env, "WORLD_SIZE", 1)
    if not env.get("JOB_COMPLETION_INDEX") or env.get("RANK") or world_size < 2:
        return None
    rank = _number(env, "JOB_COMPLETION_INDEX", 0)
    return _checked(LauncherEnv(source="Kubernetes", rank=rank, world_size=world_size, nodes=0))
