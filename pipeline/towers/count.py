"""The cost of a tower in multiply-adds, the unit of published GMACs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from clipwright.pipeline.towers.base import ImageTower


def multiply_adds(tower: ImageTower) -> int:
    """Returns the multiply-adds of one image's forward pass; `tower` must be on the meta device.

    Counts convolutions, matrix products and both products of attention. Norms, activations and additions are left
    out, as in published GMACs. Of blocks with equal settings and input shape only the first is run.
    """
    tower.eval()
    known: dict[Any, tuple[int, torch.Size]] = {}
    repeated: list[int] = []

    def counted(block: nn.Module) -> Callable[[Tensor], Tensor]:
        forward = block.forward
        settings = repr(block)

        def run(x: Tensor) -> Tensor:
            key = (settings, x.shape)
            if key in known:
                flops, output_shape = known[key]
                repeated.append(flops)
                return x.new_empty(output_shape)
            with FlopCounterMode(display=False) as block_counter:
                out = forward(x)
            known[key] = block_counter.get_total_flops(), out.shape
            return out

        return run

    blocks = tower.block_list()
    for block in blocks:
        block.forward = counted(block)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(torch.empty(1, 3, tower.image_size, tower.image_size, device="meta"))
    for block in blocks:
        del block.forward  # restores the method of the class
    return (counter.get_total_flops() + sum(repeated)) // 2
