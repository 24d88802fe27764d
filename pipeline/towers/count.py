"""What a tower costs, in the field's unit."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from clipwright.pipeline.towers.base import ImageTower


def multiply_adds(tower: ImageTower) -> int:
    """Multiply-adds of one image's forward pass: convolutions, matrix products and both attention products only.

    Norms, activations and additions are left out, as in published GMACs. `tower` lies on the meta device.
    """
    tower.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(torch.empty(1, 3, tower.image_size, tower.image_size, device="meta"))
    return counter.get_total_flops() // 2
