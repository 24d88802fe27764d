"""What a tower costs, in the field's unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from clipwright.pipeline.towers.base import ImageTower


def multiply_adds(tower: ImageTower) -> int:
    """Multiply-adds of one image's forward pass: convolutions, matrix products and both attention products only.

    Norms, activations and additions are left out, as in published GMACs. `tower` lies on the meta device; of blocks
    that are written alike only the first is run.
    """
    tower.eval()
    known: dict[Any, tuple[int, torch.Size]] = {}
    repeated: list[int] = []

    def counted(block: nn.Module) -> Callable[[Tensor], Tensor]:
        forward, kind = block.forward, repr(block)

        def run(x: Tensor) -> Tensor:
            key = (kind, x.shape)
            if key in known:
                repeated.append(known[key][0])
                return x.new_empty(known[key][1])
            with FlopCounterMode(display=False) as inner:
                out = forward(x)
            known[key] = inner.get_total_flops(), out.shape
            return out

        return run

    blocks = tower.block_list()
    for block in blocks:
        block.forward = counted(block)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(torch.empty(1, 3, tower.image_size, tower.image_size, device="meta"))
    for block in blocks:
        del block.forward  # the class's is back
    return (counter.get_total_flops() + sum(repeated)) // 2
