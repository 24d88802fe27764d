"""The process group: who are we, what do we exchange, and what do we agree on.

A process started by torchrun, Slurm, MPI or Kubernetes joins its group; a process started alone makes a group of
one, so that everything behind it has one path.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.distributed.launcher_env import ALONE, Place, detect

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place among its peers."""

    rank: int
    size: int
    local_rank: int
    local_size: int  # ranks on this machine
    device: torch.device
    place: Place = ALONE

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def __str__(self) -> str:
        """`world 32 = 4 nodes × 8 (from SLURM), master node1:29512, backend nccl`."""
        if self.size == 1:
            return "world 1"
        place, backend = self.place, "nccl" if self.device.type == "cuda" else "gloo"
        nodes = f"{place.nodes} node{'s' if place.nodes > 1 else ''}"
        spread = f"= {nodes} × {self.local_size}" if self.size == place.nodes * self.local_size else f"on {nodes}"
        return (
            f"world {self.size} {spread} (from {place.source}), master {place.master}:{place.port}, backend {backend}"
        )


@contextmanager
def process_group(timeout_seconds: float = 1800.0) -> Iterator[World]:
    """Joins (or makes) the process group and leaves it again, on every way out.

    timeout_seconds: after this time a collective that a rank does not join fails. E_RANK if the rendezvous fails.

    A process that does not destroy its group can end in SIGABRT. After an exception the group is left without a
    barrier: a peer may be gone.
    """
    place = detect(os.environ)
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(place.local_rank)
    device = torch.device("cuda", place.local_rank) if use_cuda else torch.device("cpu")
    backend = "nccl" if use_cuda else "gloo"
    names = place.variables()  # DeepSpeed asks for mpi4py when they are missing
    outside = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        if place is ALONE:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        else:
            _meet(place, backend, timeout_seconds)
        try:
            yield World(place.rank, place.size, place.local_rank, place.local_size, device, place)
        finally:
            dist.destroy_process_group()
    finally:
        # A process that goes on, or starts others, is no rank any more.
        for name, value in outside.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _meet(place: Place, backend: str, timeout_seconds: float) -> None:
    """Joins the group once all ranks have said that they are there; E_RANK names those that have not."""
    limit = timedelta(seconds=timeout_seconds)
    # Under torchrun its agent keeps the store, elsewhere the first rank does.
    keeps = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    names = [f"rank {rank}" for rank in range(place.size)]
    lacking = "rank 0 had not come"
    try:
        store = TCPStore(
            place.master, place.port, place.size, keeps, timeout=limit, wait_for_workers=False, multi_tenant=True
        )
        store = PrefixStore(f"clipwright/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        lacking = "rank 0 left before all had come"
        store.set(names[place.rank], "here")
        try:
            store.wait(names, limit)
        except dist.DistStoreError:
            missing = [name for name in names if not store.check([name])]
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            lacking = f"{', '.join(missing[:8])}{more} had not come"
            raise
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=limit)
    except dist.DistError as error:
        said = str(error).partition("\n")[0].partition(", keys: ")[0]
        raise ClipwrightError(
            "E_RANK",
            "ranks that did not meet",
            where=f"rank {place.rank} of {place.size} (from {place.source}) at {place.master}:{place.port}",
            found=f"after {timeout_seconds:g} s {lacking}: {said}",
            fix="start all ranks, with one MASTER_ADDR and MASTER_PORT that every machine reaches, and see whether one "
            "ended before",
        ) from None


def gather(tensor: Tensor) -> Tensor:
    """Every rank's `tensor` (equal shapes), concatenated along the first axis in rank order. No gradient."""
    size = dist.get_world_size()
    if size == 1:
        return tensor
    out = torch.empty(size * tensor.shape[0], *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    dist.all_gather_into_tensor(out, tensor.contiguous())
    return out


def reduce_scatter_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks of `tensor` (W·b, …), of which each rank gets its own b rows: the adjoint of `gather`.

    `tensor` is used up.
    """
    size = dist.get_world_size()
    if size == 1:
        return tensor
    tensor = tensor.contiguous()
    if dist.get_backend() == "gloo":  # it has no reduce-scatter; a sum for each rank in turn needs no second copy
        for rank, part in enumerate(tensor.chunk(size)):
            dist.reduce(part, dst=rank)
        return tensor.chunk(size)[dist.get_rank()].clone()
    out = torch.empty(tensor.shape[0] // size, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    dist.reduce_scatter_tensor(out, tensor)
    return out


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether any rank says yes; all ranks get the same answer."""
    return any_rank_flags((flag,), device)[0]


def any_rank_flags(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Which of the flags any rank raises, by one exchange; all ranks get the same answer."""
    return [
        bool(votes) for votes in all_reduce_sum(torch.tensor([int(flag) for flag in flags], device=device)).tolist()
    ]


def broadcast_object(value: object) -> object:
    """Rank 0's `value` on every rank."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_object(value: T) -> list[T]:
    """Every rank's `value`, in rank order."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run_on_rank0(work: Callable[[], None]) -> None:
    """Runs `work` on rank 0 while the others wait; its ClipwrightError is raised on all of them."""
    failure: object = None
    if dist.get_rank() == 0:
        try:
            work()
        except ClipwrightError as error:
            failure = error.args
    if (failure := broadcast_object(failure)) is not None:
        assert isinstance(failure, tuple)
        code, what, where, found, fix = failure
        raise ClipwrightError(code, what, where=where, found=found, fix=fix)


def barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()
