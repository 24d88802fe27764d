"""How the columns of all ranks are exchanged: gathered at once, or passed around a ring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from clipwright.pipeline.distributed.group import all_reduce_sum, gather, reduce_scatter_sum

Op = Literal["sum", "max", "logaddexp"]


Block = dict[str, Tensor]  # columns by the names of what is known of them, each (t, …)


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
        return reduce_scatter_sum(part)
    if dist.get_world_size() == 1:
        return part
    most = part.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    if op == "logaddexp":
        most += all_reduce_sum((part - most).exp()).log()
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
