"""An optimiser's state by parameter: what a rank holds under any ZeRO stage, and how another layout finds it again.

On disk a rank's state is one-dimensional float32 slices named `KEY/PARAMETER@START`: `exp_avg/image.stem.weight@1024`
holds the running mean of that parameter's numbers from 1024 on. Whatever stage and number of ranks wrote them, any
other reads by name the parts it needs. Adam's count of updates is one number for all, and stands in the manifest.

DeepSpeed keeps state for flat tensors: under ZeRO 1 and 2 a rank's stretch of each group of parameters laid end to
end, under ZeRO 3 its stretch of each parameter, padded, laid end to end. Under ZeRO 0 every rank holds the state of
every parameter, and writes its part of them.
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


@dataclass(frozen=True)
class Piece:
    """Numbers `start` to `start + length` of a parameter, and where they lie in a flat tensor."""

    name: str
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class Held:
    """A tensor for which the optimiser keeps state, and the parameters' pieces in it."""

    tensor: Tensor
    pieces: list[Piece]


def layout(optimizer: Any, zero: int, names: Mapping[nn.Parameter, str], rank: int, world: int) -> list[Held]:
    """What rank `rank` of `world` holds; `optimizer` as DeepSpeed gives it back."""
    if zero == 0:
        every = (p for group in optimizer.param_groups for p in group["params"])
        return [Held(p, [Piece(names[p], 0, p.numel(), 0)]) for p in every]
    if zero == 3:
        groups = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        return [Held(flat, list(_padded(group, names, rank, world, flat))) for flat, group in groups]
    groups = zip(
        optimizer.single_partition_of_fp32_groups,
        optimizer.round_robin_bit16_groups,
        optimizer.round_robin_bit16_offsets,
        strict=True,
    )
    return [Held(flat, list(_end_to_end(group, offsets, names, rank, flat))) for flat, group, offsets in groups]


def _end_to_end(
    group: Sequence[nn.Parameter], offsets: Sequence[int], names: Mapping[nn.Parameter, str], rank: int, flat: Tensor
) -> Iterator[Piece]:
    """ZeRO 1 and 2: the group's parameters one after another, cut into equal stretches, the last one padded."""
    first = rank * flat.numel()
    for parameter, at in zip(group, offsets, strict=True):
        start, end = max(at, first), min(at + parameter.numel(), first + flat.numel())
        if start < end:
            yield Piece(names[parameter], start - at, end - start, start - first)


def _padded(
    group: Sequence[Any], names: Mapping[nn.Parameter, str], rank: int, world: int, flat: Tensor
) -> Iterator[Piece]:
    """ZeRO 3: each parameter cut into equal stretches, the last one padded; a rank's own one after another."""
    at = 0
    for parameter in group:
        share = parameter.partition_numel()
        assert share == -(-parameter.ds_numel // world), (names[parameter], share)
        length = min(parameter.ds_numel - rank * share, share)
        if length > 0:
            yield Piece(names[parameter], rank * share, length, at)
        at += share
    assert at == flat.numel(), (at, flat.shape)


def _share(held: Sequence[Held], rank: int, world: int) -> Iterator[Held]:
    """A rank's part of what all hold: an equal stretch of all parameters laid end to end."""
    whole, at = sum(one.tensor.numel() for one in held), 0
    first, last = rank * whole // world, (rank + 1) * whole // world
    for one in held:
        [piece] = one.pieces
        start, end = max(first - at, 0), min(last - at, piece.length)
        if start < end:
            yield Held(one.tensor, [Piece(piece.name, start, end - start, start)])
        at += piece.length


def slices(state: Mapping[Tensor, dict[str, Any]], held: Sequence[Held], zero: int, rank: int, world: int) -> Any:
    """Copies, in host memory, of the state that this rank is to write: `{"KEY/PARAMETER@START": (n,) float32}`."""
    found: dict[str, Tensor] = {}
    for one in _share(held, rank, world) if zero == 0 else held:
        for key, value in state.get(one.tensor, {}).items():
            if key == "step" or value is None:
                continue
            assert value.shape == one.tensor.shape and value.dtype == torch.float32, (key, value.shape)
            flat = value.flatten()
            for piece in one.pieces:
                own = flat[piece.offset : piece.offset + piece.length]
                found[f"{key}/{piece.name}@{piece.start}"] = own.to("cpu", copy=True)
    return found


def restore(optimizer: torch.optim.Optimizer, held: Sequence[Held], files: Iterable[Path], updates: int) -> None:
    """Gives `optimizer` what `files` hold of its state, from any layout; `updates`: how many it has made.

    What no file holds stays as at the start of a run. ValueError for slices with gaps.
    """
    with ExitStack() as ends:
        written: dict[tuple[str, str], list[tuple[int, Any]]] = defaultdict(list)
        for path in files:
            file = ends.enter_context(safe_open(path, framework="pt"))
            for name in file.keys():  # noqa: SIM118  it is no dictionary
                place, _, start = name.rpartition("@")
                key, _, parameter = place.partition("/")
                written[key, parameter].append((int(start), file.get_slice(name)))
        for one in held:
            for key in sorted({key for key, _ in written}):
                flat = torch.zeros(one.tensor.numel())
                if sum([_fill(flat, piece, written.get((key, piece.name), [])) for piece in one.pieces]):
                    optimizer.state[one.tensor][key] = flat.view(one.tensor.shape).to(one.tensor.device)
            if one.tensor in optimizer.state and "betas" in optimizer.defaults:
                # As torch's fused AdamW has it.
                count = torch.tensor(float(updates), dtype=torch.float32, device=one.tensor.device)
                optimizer.state[one.tensor]["step"] = count


def _fill(flat: Tensor, piece: Piece, written: Iterable[tuple[int, Any]]) -> int:
    """Copies a piece's numbers from the slices that overlap it; how many there were: all or none."""
    count = 0
    for at, part in written:
        start, end = max(at, piece.start), min(at + part.get_shape()[0], piece.start + piece.length)
        if start < end:
            to = piece.offset + start - piece.start
            flat[to : to + end - start] = part[start - at : end - at]
            count += end - start
    if count not in (0, piece.length):
        raise ValueError(f"{count} of {piece.length} numbers of {piece.name} from {piece.start} on")
    return count
