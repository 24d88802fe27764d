"""Optimizer state by parameter name: what a rank holds under any ZeRO stage, and how another layout reads it.

On disk, a rank's state is one-dimensional float32 slices named `KEY/PARAMETER@START`: `exp_avg/image.stem.weight@1024`
holds the running mean of that parameter's elements from 1024 on. Any stage and number of ranks can read what any other
wrote: each rank picks the slices it needs by name. The number of updates is the same for all and is in the manifest.

DeepSpeed keeps the state of flat tensors: under ZeRO 1 and 2 a rank's partition of each group's concatenated
parameters, under ZeRO 3 its partition of each parameter, padded, concatenated. Under ZeRO 0 every rank holds the state
of every parameter, and writes its share. Its public API does not replace this: `safe_get_local_optimizer_state` exists
for ZeRO 3 only, `safe_get_full_optimizer_state` all-reduces every parameter, and neither can set state before the first
step (test_deepspeed.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from clipwright.pipeline.core.messages import format_count


@dataclass(frozen=True)
class ParameterSlice:
    """Elements `start` to `start + length` of a parameter, at `offset` in a flat tensor."""

    name: str
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class StateTensor:
    """A tensor for which the optimizer keeps state, and the slices of parameters in it."""

    tensor: Tensor
    slices: list[ParameterSlice]


def state_layout(
    optimizer: Any, zero: int, names: Mapping[nn.Parameter, str], rank: int, world_size: int
) -> list[StateTensor]:
    """Returns what rank `rank` holds; optimizer: as `deepspeed.initialize` returns it."""
    if zero == 0:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return [StateTensor(p, [ParameterSlice(names[p], 0, p.numel(), 0)]) for p in parameters]
    if zero == 3:
        groups = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        return [StateTensor(flat, list(_zero3_slices(group, names, rank, world_size, flat))) for flat, group in groups]
    groups = zip(
        optimizer.single_partition_of_fp32_groups,
        optimizer.round_robin_bit16_groups,
        optimizer.round_robin_bit16_offsets,
        strict=True,
    )
    return [
        StateTensor(flat, list(_zero12_slices(group, offsets, names, rank, flat))) for flat, group, offsets in groups
    ]


def _zero12_slices(
    group: Sequence[nn.Parameter], offsets: Sequence[int], names: Mapping[nn.Parameter, str], rank: int, flat: Tensor
) -> Iterator[ParameterSlice]:
    """ZeRO 1 and 2: the group's parameters are concatenated and cut into equal partitions, the last one padded."""
    first = rank * flat.numel()
    for parameter, offset in zip(group, offsets, strict=True):
        start, end = max(offset, first), min(offset + parameter.numel(), first + flat.numel())
        if start < end:
            yield ParameterSlice(names[parameter], start - offset, end - start, start - first)


def _zero3_slices(
    group: Sequence[Any], names: Mapping[nn.Parameter, str], rank: int, world_size: int, flat: Tensor
) -> Iterator[ParameterSlice]:
    """ZeRO 3: each parameter is cut into equal partitions, the last one padded; a rank's own are concatenated."""
    offset = 0
    for parameter in group:
        size = parameter.partition_numel()
        assert size == -(-parameter.ds_numel // world_size), (names[parameter], size)
        length = min(parameter.ds_numel - rank * size, size)
        if length > 0:
            yield ParameterSlice(names[parameter], rank * size, length, offset)
        offset += size
    assert offset == flat.numel(), (offset, flat.shape)


def _share_of_rank(layout: Sequence[StateTensor], rank: int, world_size: int) -> Iterator[StateTensor]:
    """Yields a rank's share of what all ranks hold: an equal part of the concatenated parameters."""
    total = sum(held.tensor.numel() for held in layout)
    first, last = rank * total // world_size, (rank + 1) * total // world_size
    offset = 0
    for held in layout:
        [piece] = held.slices
        start, end = max(first - offset, 0), min(last - offset, piece.length)
        if start < end:
            yield StateTensor(held.tensor, [ParameterSlice(piece.name, start, end - start, start)])
        offset += piece.length


def state_slices(
    state: Mapping[Tensor, dict[str, Any]], layout: Sequence[StateTensor], zero: int, rank: int, world_size: int
) -> dict[str, Tensor]:
    """Returns host copies of the state that this rank writes: `{"KEY/PARAMETER@START": (n,) float32}`."""
    slices: dict[str, Tensor] = {}
    for held in _share_of_rank(layout, rank, world_size) if zero == 0 else layout:
        for key, value in state.get(held.tensor, {}).items():
            if key == "step" or value is None:
                continue
            assert value.shape == held.tensor.shape and value.dtype == torch.float32, (key, value.shape)
            flat = value.flatten()
            for piece in held.slices:
                part = flat[piece.offset : piece.offset + piece.length]
                slices[f"{key}/{piece.name}@{piece.start}"] = part.to("cpu", copy=True)
    return slices


def read_state(
    optimizer: torch.optim.Optimizer, layout: Sequence[StateTensor], files: Iterable[Path], updates: int | None
) -> None:
    """Gives `optimizer` its state from `files`, written by any layout.

    updates: how many updates it has made, None if its state does not count them. State that no file has stays as at the
    start of a run. ValueError for slices with gaps.
    """
    with ExitStack() as stack:
        stored: dict[tuple[str, str], list[tuple[int, Any]]] = defaultdict(list)
        for path in files:
            file = stack.enter_context(safe_open(path, framework="pt"))
            for name in file.keys():  # noqa: SIM118  it is no dictionary
                qualified, _, start = name.rpartition("@")
                key, _, parameter = qualified.partition("/")
                stored[key, parameter].append((int(start), file.get_slice(name)))
        keys = sorted({key for key, _ in stored})
        for held in layout:
            for key in keys:
                flat = torch.zeros(held.tensor.numel())
                counts = [_copy_overlaps(flat, piece, stored.get((key, piece.name), [])) for piece in held.slices]
                if sum(counts):
                    optimizer.state[held.tensor][key] = flat.view(held.tensor.shape).to(held.tensor.device)
            if held.tensor in optimizer.state and updates is not None:
                # The type that torch's fused AdamW has.
                step = torch.tensor(float(updates), dtype=torch.float32, device=held.tensor.device)
                optimizer.state[held.tensor]["step"] = step


def _copy_overlaps(flat: Tensor, piece: ParameterSlice, stored: Iterable[tuple[int, Any]]) -> int:
    """Copies a slice's elements from the stored slices that overlap it; returns how many: all or none."""
    count = 0
    for stored_start, part in stored:
        start = max(stored_start, piece.start)
        end = min(stored_start + part.get_shape()[0], piece.start + piece.length)
        if start < end:
            target = piece.offset + start - piece.start
            flat[target : target + end - start] = part[start - stored_start : end - stored_start]
            count += end - start
    if count not in (0, piece.length):
        raise ValueError(f"{count} of {format_count(piece.length, 'element')} of {piece.name} from {piece.start} on")
    return count
