"""The process group of a run: this rank, its device, and the collectives that the package uses.

A process that torchrun, DeepSpeed, Slurm, MPI or Kubernetes started joins its group; a process started alone makes a
group of one, so that all code after it has a single path.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.signals import deferred_signals
from clipwright.pipeline.distributed.launcher_env import SINGLE_PROCESS, VARIABLES, LauncherEnv, read_launcher_env
from clipwright.pipeline.distributed.rendezvous import meet

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's rank, the size of its group and the device it works on."""

    rank: int
    size: int
    local_rank: int
    local_size: int  # ranks on this node
    device: torch.device
    launcher: LauncherEnv = SINGLE_PROCESS

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def __str__(self) -> str:
        """Returns `world size 32 = 4 nodes × 8 (from Slurm), master node1:29512, backend nccl`."""
        if self.size == 1:
            return "world size 1"
        launcher = self.launcher
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        nodes = f"{launcher.nodes} node{'s' if launcher.nodes > 1 else ''}"
        if self.size == launcher.nodes * self.local_size:
            layout = f"= {nodes} × {self.local_size}"
        else:
            layout = f"on {nodes}"
        master = f"{launcher.master_addr}:{launcher.master_port}"
        return f"world size {self.size} {layout} (from {launcher.source}), master {master}, backend {backend}"


@contextmanager
def process_group(timeout_seconds: float = 1800.0, rendezvous_seconds: float | None = None) -> Iterator[World]:
    """Joins (or makes) the process group, and destroys it on exit, also after an exception.

    timeout_seconds: limit of a collective that some rank does not join. rendezvous_seconds: limit of the rendezvous,
    `timeout_seconds` by default. Raises E_RANK if the rendezvous or a later collective fails, and Preempted on all
    ranks if one of them is stopped before all have joined.

    A process that does not destroy its group can end in SIGABRT. There is no barrier before that: after an exception
    another rank may be gone.
    """
    launcher = read_launcher_env(os.environ)
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(launcher.local_rank)
    device = torch.device("cuda", launcher.local_rank) if use_cuda else torch.device("cpu")
    backend = "nccl" if use_cuda else "gloo"
    saved_env = {name: os.environ.get(name) for name in VARIABLES}
    os.environ.update(launcher.variables())  # DeepSpeed asks for mpi4py if they are missing
    try:
        if launcher is SINGLE_PROCESS:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        else:
            _join(launcher, backend, timeout_seconds, rendezvous_seconds or timeout_seconds)
        try:
            yield World(
                rank=launcher.rank,
                size=launcher.world_size,
                local_rank=launcher.local_rank,
                local_size=launcher.local_world_size,
                device=device,
                launcher=launcher,
            )
        except (RuntimeError, dist.DistError) as error:
            if not is_failed_collective(error):
                raise
            raise ClipwrightError(
                "E_RANK",
                "another rank has exited or cannot be reached",
                where=f"rank {launcher.rank} of {launcher.world_size} (from {launcher.source})",
                found=str(error).partition("\n")[0][:200],
                fix="look for the error of that rank, check the network between the nodes, and run the same command "
                "again",
            ) from None
        finally:
            dist.destroy_process_group()
    finally:
        # After the group, this process and those it starts must not take themselves for ranks.
        for name, value in saved_env.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def is_failed_collective(error: BaseException) -> bool:
    """Whether an error means that another rank could not be reached.

    NCCL's errors have a class of their own; gloo's are RuntimeErrors that name its source files.
    """
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _join(launcher: LauncherEnv, backend: str, timeout_seconds: float, rendezvous_seconds: float) -> None:
    """Initializes the group once every rank has come to the rendezvous."""
    with deferred_signals(signal.SIGTERM, signal.SIGUSR1) as deferred:
        store = meet(launcher, deferred, rendezvous_seconds)
        dist.init_process_group(
            backend,
            store=store,
            rank=launcher.rank,
            world_size=launcher.world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )


def all_gather(tensor: Tensor) -> Tensor:
    """Returns every rank's `tensor` (equal shapes), concatenated along the first axis in rank order. No gradient."""
    world_size = dist.get_world_size()
    if world_size == 1:
        return tensor
    out = torch.empty(world_size * tensor.shape[0], *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    dist.all_gather_into_tensor(out, tensor.contiguous())
    return out


def reduce_scatter_sum(tensor: Tensor) -> Tensor:
    """Returns this rank's b rows of the sum over ranks of `tensor` (world · b, …): the adjoint of `all_gather`.

    May overwrite `tensor`.
    """
    world_size = dist.get_world_size()
    if world_size == 1:
        return tensor
    tensor = tensor.contiguous()
    if dist.get_backend() == "gloo":  # gloo has no reduce-scatter; one reduce per rank needs no second copy
        for rank, chunk in enumerate(tensor.chunk(world_size)):
            dist.reduce(chunk, dst=rank)
        return tensor.chunk(world_size)[dist.get_rank()].clone()
    out = torch.empty(tensor.shape[0] // world_size, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    dist.reduce_scatter_tensor(out, tensor)
    return out


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sums `tensor` over ranks, in place, and returns it."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool, device: torch.device) -> bool:
    """Returns, on every rank, whether `flag` is set on any rank."""
    return any_rank_flags((flag,), device)[0]


def any_rank_flags(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Returns, on every rank, which of the flags are set on any rank; one all-reduce for all of them."""
    counts = all_reduce_sum(torch.tensor([int(flag) for flag in flags], device=device))
    return [count > 0 for count in counts.tolist()]


def broadcast_object(value: object) -> object:
    """Returns rank 0's `value` on every rank."""
    if dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_gather_object(value: T) -> list[T]:
    """Returns every rank's `value`, in rank order."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run_on_rank0(work: Callable[[], None]) -> None:
    """Runs `work` on rank 0 while the other ranks wait; a ClipwrightError of it is raised on every rank."""
    failure: object = None
    if dist.get_rank() == 0:
        try:
            work()
        except ClipwrightError as error:
            failure = error
    failure = broadcast_object(failure)
    if isinstance(failure, ClipwrightError):
        raise failure


def barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()
