"""The only reader of RANK, WORLD_SIZE and their like: which process am I, by what a launcher says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from clipwright.pipeline.core.errors import ClipwrightError


@dataclass(frozen=True)
class Place:
    """What a launcher's variables say of this process."""

    source: str  # who says so
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # ranks on this machine
    nodes: int = 1
    master: str = ""  # host of rank 0, where the group meets
    port: int = 0

    def variables(self) -> dict[str, str]:
        """The place in torchrun's words, for libraries that read it from the environment."""
        named = {"RANK": self.rank, "WORLD_SIZE": self.size, "LOCAL_RANK": self.local_rank}
        if self.master:
            named |= {"LOCAL_WORLD_SIZE": self.local_size, "MASTER_ADDR": self.master, "MASTER_PORT": self.port}
        return {name: str(value) for name, value in named.items()}


ALONE = Place("one process")
_PORT = 29500


def detect(env: Mapping[str, str]) -> Place:
    """This process's place by the variables of torchrun (or DeepSpeed), Slurm, MPI or Kubernetes; alone without any.

    A launcher that was itself started by another, once on each node, agree_to_stop with it. E_WORLD for two that do not
    agree, for half a set of variables, and where no variable says on which host the group meets.
    """
    told = [place for reader in (_torchrun, _slurm, _mpi, _kubernetes) if (place := reader(env)) is not None]
    if not told:
        if (size := _number(env, "WORLD_SIZE", 1)) > 1:
            raise _refusal("a process without a rank", f"WORLD_SIZE={size}", "no variable says which rank this is")
        return ALONE
    place = told[0]
    for other in told[1:]:
        each_node = (other.rank, other.size) == (place.rank // place.local_size, place.nodes)
        if (other.rank, other.size) != (place.rank, place.size) and not each_node:
            raise _refusal(
                "two launchers that disagree",
                f"{place.source} and {other.source}",
                f"{place.source} says rank {place.rank} of {place.size}, {other.source} {other.rank} of {other.size}",
                f"unset the variables of the one that did not start this process ({_VARIABLES[other.source]})",
            )
    master, port = env.get("MASTER_ADDR") or place.master, _number(env, "MASTER_PORT", place.port or _PORT)
    if not master and place.size > 1:
        if place.nodes > 1 or place.source not in ("MPI", "SLURM"):
            fix = "set MASTER_ADDR to the host of rank 0 (and MASTER_PORT to a free port of it) for all ranks"
            raise _refusal("ranks that cannot meet", place.source, f"{place.size} ranks and no MASTER_ADDR", fix)
        master = "127.0.0.1"
    return replace(place, master=master, port=port)


_VARIABLES = {
    "SLURM": "SLURM_PROCID, SLURM_NTASKS, SLURM_STEP_NUM_TASKS",
    "MPI": "OMPI_COMM_WORLD_RANK and _SIZE, PMI_RANK, PMI_SIZE",
    "Kubernetes": "JOB_COMPLETION_INDEX",
}


def _refusal(what: str, where: str, found: str, fix: str = "") -> ClipwrightError:
    fix = fix or "start it by one launcher, or without any"
    return ClipwrightError("E_WORLD", what, where=where, found=found, fix=fix)


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name) or str(default)
    if not re.fullmatch(r"\d+", text):
        raise _refusal("a launcher's variable that is no number", f"{name}={text}", "a number from 0 up is allowed")
    return int(text)


def _placed(source: str, rank: int, size: int, local_rank: int, local_size: int, nodes: int = 0, **meet: Any) -> Place:
    """A place whose numbers fit each other; without `nodes`, as many as ranks of equal machines need."""
    if not (rank < size and local_rank < local_size <= size):
        found = f"rank {rank} of {size}, on this machine {local_rank} of {local_size}"
        raise _refusal("a rank outside its world", source, found)
    return Place(source, rank, size, local_rank, local_size, nodes or -(-size // local_size), **meet)


def _torchrun(env: Mapping[str, str]) -> Place | None:
    """RANK and WORLD_SIZE, which DeepSpeed's launcher sets too; it calls LOCAL_WORLD_SIZE LOCAL_SIZE."""
    if not env.get("RANK"):
        return None
    if not env.get("WORLD_SIZE"):
        raise _refusal("a rank without a world", f"RANK={env['RANK']}", "WORLD_SIZE is not set")
    source = "DeepSpeed" if "CROSS_SIZE" in env and "TORCHELASTIC_RUN_ID" not in env else "torchrun"
    local_size = _number(env, "LOCAL_WORLD_SIZE", _number(env, "LOCAL_SIZE", 1))
    nodes = _number(env, "GROUP_WORLD_SIZE", _number(env, "CROSS_SIZE", 0))
    rank, size = _number(env, "RANK", 0), _number(env, "WORLD_SIZE", 1)
    return _placed(source, rank, size, _number(env, "LOCAL_RANK", 0), local_size, nodes)


def _slurm(env: Mapping[str, str]) -> Place | None:
    """A task of `srun`: its step's numbers, which may be fewer than the job's."""
    size = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))
    if not env.get("SLURM_PROCID") or size < 2:
        return None
    listed = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    tasks = [  # `8(x2),4`: the third node has 4
        int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", listed) for _ in range(int(times or 1))
    ]
    if sum(tasks) != size:  # the job's list, or none
        nodes = _number(env, "SLURM_STEP_NUM_NODES", _number(env, "SLURM_NNODES", 1))
        tasks = [size // nodes + (node < size % nodes) for node in range(nodes)]
    node = min(_number(env, "SLURM_NODEID", 0), len(tasks) - 1)
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
    job = _number(env, "SLURM_JOB_ID", 0)
    return _placed(
        *("SLURM", _number(env, "SLURM_PROCID", 0), size, _number(env, "SLURM_LOCALID", 0), tasks[node], len(tasks)),
        master=first_host(hosts),
        port=20000 + job % 12000 if job else _PORT,  # jobs on one machine meet apart, below the ports of clients
    )


def first_host(nodelist: str) -> str:
    """The first host of Slurm's compressed list: `gpu[007-010,12],cpu1` → gpu007."""
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", nodelist)[0])


def _mpi(env: Mapping[str, str]) -> Place | None:
    """A process of mpirun: Open MPI's variables, or those of MPICH, Intel MPI and whoever else uses Hydra."""
    for rank, size, local_rank, local_size in (
        [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")],
        ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"],
    ):
        if env.get(rank) and (world := _number(env, size, 1)) > 1:
            local = _number(env, local_rank, 0), _number(env, local_size, 1)
            return _placed("MPI", _number(env, rank, 0), world, *local)
    return None


def _kubernetes(env: Mapping[str, str]) -> Place | None:
    """A pod of an Indexed Job, one process each; WORLD_SIZE, from its manifest, says of how many."""
    size = _number(env, "WORLD_SIZE", 1)
    if not env.get("JOB_COMPLETION_INDEX") or env.get("RANK") or size < 2:
        return None
    return _placed("Kubernetes", _number(env, "JOB_COMPLETION_INDEX", 0), size, 0, 1)
