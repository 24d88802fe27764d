"""Whether a checkpoint's state is one that training can be in: checked before a run resumes from it.

Hashes show that files are as they were written. These checks show that what was written can be trained on: finite
numbers, second moments that are not negative, a logit scale within its range, and every tensor that the config needs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.losses.base import MAX_LOG_SCALE, LossTerm
from clipwright.pipeline.model.tensor_checks import Shape, invalid_numbers, module_shapes, shape_difference

LOGIT_SCALE = "logit_scale"
LOSS_OPTIMIZER_PREFIX = "optimizer."  # of the state of the loss's own optimizer, in the file of the loss
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def invalid_state(path: Path, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_CKPT_STATE",
        "the checkpoint holds a state that training cannot be in",
        where=path,
        found=found,
        fix="restore it, or start over with --fresh",
    )


def check_numbers(path: Path, updates: int) -> None:
    """Checks the numbers in a safetensors file of a checkpoint after `updates` updates. Raises E_CKPT_STATE."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no dictionary
                found = _invalid(name, file.get_tensor(name), updates)
                if found is not None:
                    raise invalid_state(path, found)
    except SafetensorError as error:
        raise invalid_state(path, str(error)) from None


def _invalid(name: str, tensor: Tensor, updates: int) -> str | None:
    found = invalid_numbers(name, tensor)
    if found is not None:
        return found
    if name.rpartition(".")[2] == LOGIT_SCALE:
        # Compared as stored: the clamp rounds its limit to the type of the tensor.
        limit = torch.tensor(MAX_LOG_SCALE, dtype=tensor.dtype)
        if bool(((tensor < 0) | (tensor > limit)).any()):
            return f"{name} is {float(tensor.max()):.4g}; 0 to {MAX_LOG_SCALE:.4g} (ln 100) is allowed"
    if name.startswith(LOSS_OPTIMIZER_PREFIX) and name.endswith(".step") and float(tensor) != updates:
        return f"{name} counts {format_count(int(tensor), 'update')}, the manifest {updates:,}"
    return None


def weights_misfit(path: Path, towers: nn.Module) -> str | None:
    """Returns the first tensor in a file of weights that does not fit a run's towers; None if all do."""
    return shape_difference(module_shapes(towers), _header(path))


def loss_misfit(path: Path, loss: LossTerm, updates: int) -> str | None:
    """Returns the first tensor in the file of the loss that does not fit a run's loss after `updates` updates."""
    return shape_difference(_loss_shapes(loss, has_state=updates > 0), _header(path))


def optimizer_misfit(paths: Sequence[Path], towers: nn.Module, state_size: int, updates: int) -> str | None:
    """Returns the first parameter of which the files of the towers' optimizer have no complete state.

    state_size: tensors that the optimizer keeps per parameter.
    """
    slices: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for path in paths:
        for qualified, (shape, _) in _header(path).items():
            key, _, start = qualified.rpartition("@")
            if not start.isdecimal() or len(shape) != 1:
                return f"{qualified} is no slice of an optimizer's state"
            slices[key].append((int(start), shape[0]))
    if updates and state_size and not slices:
        return "there is no optimizer state"
    return _uncovered(slices, {name: p.numel() for name, p in towers.named_parameters() if p.requires_grad}, state_size)


def _uncovered(slices: dict[str, list[tuple[int, int]]], parameters: dict[str, int], state_size: int) -> str | None:
    """Returns the first parameter whose optimizer state has gaps or overlaps; one without any was never updated."""
    keys_of: dict[str, set[str]] = defaultdict(set)
    for qualified, found in slices.items():
        key, _, parameter = qualified.partition("/")
        if parameter not in parameters:
            return f"optimizer state of {parameter}, which is no trained parameter of the config"
        keys_of[parameter].add(key)
        end = 0
        for start, length in sorted(found):
            if start != end:
                return f"{qualified}: {'a gap' if start > end else 'an overlap'} at element {min(start, end)}"
            end = start + length
        if end != parameters[parameter]:
            return f"{qualified}: {end:,} of {format_count(parameters[parameter], 'element')}"
    for parameter, keys in keys_of.items():
        if len(keys) != state_size:
            needed = format_count(state_size, "tensor")
            return f"{parameter} has the optimizer state {', '.join(sorted(keys))}, not {needed}"
    return None


def _header(path: Path) -> dict[str, Shape]:
    """Returns shape and type of each tensor in a safetensors file."""
    with safe_open(path, framework="pt") as file:
        slices: dict[str, Any] = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        kinds = {name: str(part.get_dtype()) for name, part in slices.items()}
        return {
            name: (tuple(part.get_shape()), DTYPES.get(kinds[name]) or kinds[name]) for name, part in slices.items()
        }


def _loss_shapes(loss: LossTerm, *, has_state: bool) -> dict[str, Shape]:
    """Returns what the file of the loss must hold: its tensors and, after an update, its optimizer's state."""
    expected = module_shapes(loss)
    if has_state:
        for index, parameter in enumerate(p for p in loss.parameters() if p.requires_grad):
            prefix = f"{LOSS_OPTIMIZER_PREFIX}{index}."
            expected[f"{prefix}step"] = ((), torch.float32)
            for key in ("exp_avg", "exp_avg_sq"):
                expected[prefix + key] = (tuple(parameter.shape), parameter.dtype)
    return expected
