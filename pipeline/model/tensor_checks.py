"""What a stored tensor may hold: names, shapes and types that are expected, and numbers that training can make."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# In names of tensors: the second moments of Adam and its relatives, and the variances of batch norm.
NOT_NEGATIVE = ("exp_avg_sq", "running_var")

Shape = tuple[tuple[int, ...], torch.dtype | str]  # a type by its name in the file if torch has none for it


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Returns shape and type of each tensor."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def shape_difference(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> str | None:
    """Returns the first difference between the tensors that are expected and those that are found, by name."""
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            needed = expected.get(name, "no such tensor")
            return f"{name} is {found.get(name, 'missing')}, but the config needs {needed}"
    return None


def invalid_numbers(name: str, tensor: Tensor) -> str | None:
    """Returns what is wrong with the numbers of a tensor, given its name; None if nothing is."""
    if not tensor.is_floating_point():
        return None
    if not bool(torch.isfinite(tensor).all()):
        return f"{name} contains numbers that are not finite"
    if any(part in name for part in NOT_NEGATIVE) and bool((tensor < 0).any()):
        return f"{name} contains negative numbers: its smallest is {float(tensor.min()):.4g}, 0 is allowed"
    return None


def module_shapes(module: nn.Module) -> dict[str, Shape]:
    return shapes(module.state_dict())
