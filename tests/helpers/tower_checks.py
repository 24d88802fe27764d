"""Helpers shared by the tests of the towers: random weights, reference layers, and mistakes that tests must detect."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipwright.pipeline.core.errors import ClipwrightError

Module = TypeVar("Module", bound=nn.Module)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Compares float64 results."""
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


def randomize(module: Module, scale: float = 0.3) -> Module:
    """Sets random parameters and batch statistics, in double and eval mode."""
    torch.manual_seed(1)
    module.double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(scale * torch.randn_like(p))
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.running_mean is not None and layer.running_var is not None
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2.0)
    return module


def perturb(module: Module, scale: float = 0.1) -> Module:
    """Moves every parameter away from its initial value: zeros would hide mistakes and gradients."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn_like(p)
    return module


def reference_layer_norm(layer: nn.LayerNorm, x: Tensor, eps: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / ((x**2).mean(-1, keepdim=True) + eps).sqrt() * layer.weight + layer.bias


def reference_batch_norm(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Normalizes (B, C, H, W) by the running statistics, with eps 1e-5."""
    shape = (1, -1, 1, 1)
    x = (x - layer.running_mean.view(shape)) / (layer.running_var.view(shape) + 1e-5).sqrt()
    return x * layer.weight.view(shape) + layer.bias.view(shape)


def reference_sinusoids(count: int, width: int) -> Tensor:
    """Computes sinusoidal positions (count, width) one number at a time, in float64."""
    angles = [[p / 10000 ** (2 * (d // 2) / width) for d in range(width)] for p in range(count)]
    values = [[math.cos(a) if d % 2 else math.sin(a) for d, a in enumerate(row)] for row in angles]
    return torch.tensor(values, dtype=torch.double)


def random_captions(ends: list[int], length: int, *, eot_id: int) -> Tensor:
    """Returns random ids from 1 to 48, one EOT per row at `ends`, and zeros after it."""
    torch.manual_seed(2)
    ids = torch.randint(1, 49, (len(ends), length))
    ids[ids == eot_id] += 1
    for row, end in enumerate(ends):
        ids[row, end] = eot_id
        ids[row, end + 1 :] = 0
    return ids


_attend = F.scaled_dot_product_attention


def swapped_keys_and_values(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
    return _attend(q, v, k, *args, **options)


def unscaled_scores(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
    return _attend(q, k, v, *args, **options, scale=1.0)


WRONG_ATTENTION = [swapped_keys_and_values, unscaled_scores]


def swap_key_and_value_weights(tower: nn.Module) -> None:
    """Exchanges k and v in the fused projections of every block."""
    for block in tower.blocks:
        q, k, v = block.attn.qkv.weight.detach().chunk(3)
        block.attn.qkv.weight.data = torch.cat([q, v, k])


def scale_scores_by_token_width(tower: nn.Module) -> None:
    """Scales attention scores by the root of the token width instead of the head width."""
    for block in tower.blocks:
        dim = block.attn.out.in_features
        for p in (block.attn.qkv.weight, block.attn.qkv.bias):
            p.data[:dim] *= block.attn.heads**-0.5


def assert_rejected(build: Callable[[], Any], *texts: str) -> ClipwrightError:
    """Asserts that `build` raises E_CONFIG_VALUE with a fix, and that the message contains `texts`."""
    with pytest.raises(ClipwrightError) as caught:
        build()
    error = caught.value
    assert error.code == "E_CONFIG_VALUE" and error.fix
    for text in texts:
        assert text in str(error), (text, str(error))
    return error
