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
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.place import ALONE, Place, detect

T = TypeVar("T")
Op = Literal["sum", "max", "logaddexp"]
Block = dict[str, Tensor]  # columns by the names of what is known of them, each (t, …)


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
    def first(self) -> bool:
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
def process_group(patience: float = 1800.0) -> Iterator[World]:
    """Joins (or makes) the process group and leaves it again, on every way out.

    patience: seconds after which an exchange fails that a rank does not join; E_RANK where the group does not meet.

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
            _meet(place, backend, patience)
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


def _meet(place: Place, backend: str, patience: float) -> None:
    """Joins the group once all ranks have said that they are there; E_RANK names those that have not."""
    limit = timedelta(seconds=patience)
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
            found=f"after {patience:g} s {lacking}: {said}",
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


def scatter_sum(tensor: Tensor) -> Tensor:
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


class Columns:
    """Columns (texts, say) that are visited block by block; those of this process alone.

    own: what is known of this rank's columns, each (t, …); laid out alike on all ranks.
    """

    ranks, rank = 1, 0

    def __init__(self, own: Block) -> None:
        self.own = own

    def reduce(
        self, work: Callable[[Block], Sequence[Tensor]], ops: Sequence[Op], more: Block | None = None
    ) -> Sequence[Tensor]:
        """What `work` says of each column of a block, merged over ranks by `ops`: (t, …) for this rank's columns.

        `work` is called on blocks that together hold every column of every rank once; what it gives is used up. more:
        what is known of this rank's columns by now, shown to `work` beside what `own` held.
        """
        return work(self.own | (more or {}))


class GatheredColumns(Columns):
    """The columns of all ranks, gathered: one block on each rank."""

    def __init__(self, own: Block) -> None:
        super().__init__({name: gather(tensor) for name, tensor in own.items()})
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()

    def reduce(
        self, work: Callable[[Block], Sequence[Tensor]], ops: Sequence[Op], more: Block | None = None
    ) -> Sequence[Tensor]:
        parts = work(self.own | {name: gather(tensor) for name, tensor in (more or {}).items()})
        return [_merge_own(part, op) for part, op in zip(parts, ops, strict=True)]


def _merge_own(part: Tensor, op: Op) -> Tensor:
    """Every rank's view of all columns, merged; this rank's columns of it."""
    if op == "sum":
        return scatter_sum(part)
    if dist.get_world_size() == 1:
        return part
    most = part.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    if op == "logaddexp":
        most += sum_ranks((part - most).exp()).log()
    return most.chunk(dist.get_world_size())[dist.get_rank()].contiguous()


class RingColumns(Columns):
    """The columns of all ranks, a rank's at a time: blocks travel from rank to rank, for what is too large to gather.

    While a rank works on one block the next arrives, and what the ranks before it found of that one. After as many
    hops as there are ranks a block's results are at home. At most two blocks and three sets of results are held, on
    any number of ranks.
    """

    def __init__(self, own: Block) -> None:
        super().__init__(own)
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()

    def reduce(
        self, work: Callable[[Block], Sequence[Tensor]], ops: Sequence[Op], more: Block | None = None
    ) -> Sequence[Tensor]:
        if self.ranks == 1:
            return super().reduce(work, ops, more)
        block = self.own | (more or {})
        names, results = list(block), None
        for hop in range(self.ranks):
            last = hop == self.ranks - 1
            arriving = None if last else _Hop(list(block.values()))
            found = work(block)
            if results is not None:  # sent before this block was worked on, needed behind it
                found = [_MERGE[op](*pair, out=pair[0]) for op, *pair in zip(ops, results.wait(), found, strict=True)]
            results = _Hop(found)
            del found
            if arriving is not None:
                block = dict(zip(names, arriving.wait(), strict=True))
        assert results is not None
        return results.wait()


_MERGE = {"sum": torch.add, "max": torch.maximum, "logaddexp": torch.logaddexp}


class _Hop:
    """Tensors on their way to the next rank while their like come from the one before."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        self.sent = [tensor.contiguous() for tensor in tensors]
        self.arriving = [torch.empty_like(tensor) for tensor in self.sent]
        moves = [dist.P2POp(dist.isend, tensor, (rank + 1) % size) for tensor in self.sent]
        moves += [dist.P2POp(dist.irecv, tensor, (rank - 1) % size) for tensor in self.arriving]
        self.moves = dist.batch_isend_irecv(moves) if moves else []

    def wait(self) -> list[Tensor]:
        """What came, once it is here and what was sent is gone."""
        for move in self.moves:
            move.wait()
        self.sent, self.moves = [], []  # a finished move still holds what it sent
        return self.arriving


EXCHANGES: dict[str, type[Columns]] = {"gather": GatheredColumns, "ring": RingColumns}


def sum_ranks(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether any rank says yes; all ranks get the same answer."""
    return any_of((flag,), device)[0]


def any_of(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Which of the flags any rank raises, by one exchange; all ranks get the same answer."""
    return [bool(votes) for votes in sum_ranks(torch.tensor([int(flag) for flag in flags], device=device)).tolist()]


def from_first(value: object) -> object:
    """Rank 0's `value` on every rank."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: T) -> list[T]:
    """Every rank's `value`, in rank order."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_first(work: Callable[[], None]) -> None:
    """Runs `work` on rank 0 while the others wait; its ClipwrightError is raised on all of them."""
    failure: object = None
    if dist.get_rank() == 0:
        try:
            work()
        except ClipwrightError as error:
            failure = error.args
    if (failure := from_first(failure)) is not None:
        assert isinstance(failure, tuple)
        code, what, where, found, fix = failure
        raise ClipwrightError(code, what, where=where, found=found, fix=fix)


def barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()
