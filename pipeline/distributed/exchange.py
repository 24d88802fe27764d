"""How a loss sees the columns (texts) of all ranks: all-gathered at once, or passed around a ring of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from clipwright.pipeline.distributed.group import all_gather, all_reduce_sum, reduce_scatter_sum

Op = Literal["sum", "max", "logaddexp"]


Block = dict[str, Tensor]  # columns: tensors by name, each (t, …), with equal t


class Columns:
    """The columns of one process, visited block by block.

    own: tensors of this rank's columns, each (t, …); equal names, shapes and dtypes on all ranks.
    """

    ranks, rank = 1, 0

    def __init__(self, own: Block) -> None:
        self.own = own

    def reduce(
        self, work: Callable[[Block], Sequence[Tensor]], ops: Sequence[Op], extra: Block | None = None
    ) -> Sequence[Tensor]:
        """Calls `work` on blocks and merges its results over ranks by `ops`: (t, …) for each of this rank's columns.

        The blocks together hold every column of every rank once. The results of `work` may be overwritten. extra:
        further tensors of this rank's columns, added to those in `own`.
        """
        return work(self.own | (extra or {}))


class GatheredColumns(Columns):
    """The columns of all ranks, all-gathered: one block on each rank."""

    def __init__(self, own: Block) -> None:
        super().__init__({name: all_gather(tensor) for name, tensor in own.items()})
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()

    def reduce(
        self, work: Callable[[Block], Sequence[Tensor]], ops: Sequence[Op], extra: Block | None = None
    ) -> Sequence[Tensor]:
        gathered = {name: all_gather(tensor) for name, tensor in (extra or {}).items()}
        results = work(self.own | gathered)
        return [_reduce_scatter(result, op) for result, op in zip(results, ops, strict=True)]


def _reduce_scatter(values: Tensor, op: Op) -> Tensor:
    """Merges `values` (world · t, …) over ranks by `op` and returns this rank's t rows."""
    if op == "sum":
        return reduce_scatter_sum(values)
    if dist.get_world_size() == 1:
        return values
    merged = values.clone()
    dist.all_reduce(merged, op=dist.ReduceOp.MAX)
    if op == "logaddexp":
        merged += all_reduce_sum((values - merged).exp()).log()
    return merged.chunk(dist.get_world_size())[dist.get_rank()].contiguous()


class RingColumns(Columns):
    """The columns of all ranks, one rank's block at a time: blocks travel around a ring, if too large to gather.

    While a rank works on one block, the next one arrives together with the previous ranks' results for it. After as
    many hops as there are ranks, the results of a block are back on its own rank. A rank holds at most two blocks and
    three sets of results, whatever the world size.
    """

    def __init__(self, own: Block) -> None:
        super().__init__(own)
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()

    def reduce(
        self, work: Callable[[Block], Sequence[Tensor]], ops: Sequence[Op], extra: Block | None = None
    ) -> Sequence[Tensor]:
        if self.ranks == 1:
            return super().reduce(work, ops, extra)
        block = self.own | (extra or {})
        names = list(block)
        results: _Hop | None = None
        for hop in range(self.ranks):
            is_last = hop == self.ranks - 1
            next_block = None if is_last else _Hop(list(block.values()))
            merged = list(work(block))
            if results is not None:  # sent before this block was worked on, needed only now
                merged = [
                    _MERGE[op](earlier, current, out=earlier)
                    for op, earlier, current in zip(ops, results.wait(), merged, strict=True)
                ]
            results = _Hop(merged)
            del merged
            if next_block is not None:
                block = dict(zip(names, next_block.wait(), strict=True))
        assert results is not None
        return results.wait()


_MERGE = {"sum": torch.add, "max": torch.maximum, "logaddexp": torch.logaddexp}


class _Hop:
    """Tensors on their way to the next rank, while those of the previous rank arrive."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        next_rank, previous_rank = (rank + 1) % world_size, (rank - 1) % world_size
        self.sent = [tensor.contiguous() for tensor in tensors]
        self.arriving = [torch.empty_like(tensor) for tensor in self.sent]
        operations = [dist.P2POp(dist.isend, tensor, next_rank) for tensor in self.sent]
        operations += [dist.P2POp(dist.irecv, tensor, previous_rank) for tensor in self.arriving]
        self.requests = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> list[Tensor]:
        """Returns the received tensors, once they are complete and the sent ones may be overwritten."""
        for request in self.requests:
            request.wait()
        self.sent, self.requests = [], []  # a finished request still holds what it sent
        return self.arriving


EXCHANGES: dict[str, type[Columns]] = {"gather": GatheredColumns, "ring": RingColumns}
