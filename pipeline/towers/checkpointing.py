"""Activation checkpointing: chosen blocks keep only their input and are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.towers.base import ImageTower, TextTower

Blocks = Literal["none", "all"] | tuple[int, ...]  # of a tower's `block_list`, counted from 0


class Recomputed:
    """The forward of `block`, of which only input and random state are kept until the backward pass.

    Chen et al. 2016 ("Training deep nets with sublinear memory cost"). Drop path and dropout draw the same again;
    running statistics move in the first pass alone.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.forward: Callable[..., Any] = block.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a compiled graph repeats what the gradient needs, statistics left out
            return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, context_fn=self._contexts, **kwargs)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), still_statistics(self.block)


@contextmanager
def still_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms compute as ever but leave their running statistics as they are."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def checkpoint_activations(tower: ImageTower | TextTower, chosen: Blocks, where: str) -> None:
    """Makes the chosen blocks of `tower` recompute, in place; keys stay the same.

    E_CONFIG_VALUE for a number that no block has; `where` is the config's field.
    """
    blocks = tower.block_list()
    numbers = {"none": (), "all": range(len(blocks))}[chosen] if isinstance(chosen, str) else chosen
    wrong = [number for number in numbers if not 0 <= number < len(blocks)]
    if wrong:
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "a block that the tower does not have",
            where=f"{where}: {wrong[0]}",
            found=f"there are {len(blocks)}, counted from 0",
            fix=f"use 0 to {len(blocks) - 1}, all or none" if blocks else "use none",
        )
    for number in set(numbers):
        blocks[number].forward = Recomputed(blocks[number])
