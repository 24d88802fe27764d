"""Activation checkpointing: selected blocks keep only their input and are recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.towers.base import ImageTower, TextTower

Blocks = Literal["none", "all"] | tuple[int, ...]  # indices into a tower's `block_list`, from 0


class RecomputedForward:
    """Replaces the forward of `block`: only its input and the random state are kept until the backward pass.

    Chen et al. 2016 ("Training deep nets with sublinear memory cost"). Drop path and dropout draw the same numbers
    again; the running statistics of batch norms are updated by the first pass only.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.forward: Callable[..., Any] = block.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A compiled graph recomputes only what the gradient needs, so it never updates running statistics twice.
        if torch.compiler.is_compiling():
            return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, context_fn=self._contexts, **kwargs)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), frozen_running_statistics(self.block)


@contextmanager
def frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """Keeps the running statistics of batch norms in `module` unchanged; their outputs stay the same."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked = count


def checkpoint_activations(tower: ImageTower | TextTower, selected: Blocks, where: str) -> None:
    """Makes the selected blocks of `tower` recompute their activations, in place; state-dict keys stay the same.

    E_CONFIG_VALUE for an index without a block; `where` is the config field to name.
    """
    blocks = tower.block_list()
    if selected == "none":
        indices: tuple[int, ...] = ()
    elif selected == "all":
        indices = tuple(range(len(blocks)))
    else:
        indices = tuple(selected)
    for index in indices:
        if not 0 <= index < len(blocks):
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "the tower has no block with this index",
                where=f"{where}: {index}",
                found=f"the tower has {format_count(len(blocks), 'block')}, counted from 0",
                fix=f"use 0 to {len(blocks) - 1}, all or none" if blocks else "use none",
            )
    for index in set(indices):
        blocks[index].forward = RecomputedForward(blocks[index])
