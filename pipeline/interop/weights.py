"""Foreign weights: checked tensors, and a name table that is read both ways."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.nearest import nearest


@dataclass(frozen=True)
class TensorRule:
    """Tensors that hold the same numbers under our names and under foreign names.

    The tensors of each side, concatenated along their first dimension, are equal. `our_parts` and `foreign_parts` state
    how the rows are divided among several tensors: (1, 2) means a third and two thirds, () equal parts. `our_shape`
    and `foreign_shape`, given together, are the arguments of `reshape` where the sides differ in shape.
    """

    ours: tuple[str, ...]
    foreign: tuple[str, ...]
    our_parts: tuple[int, ...] = ()
    foreign_parts: tuple[int, ...] = ()
    our_shape: tuple[int, ...] | None = None
    foreign_shape: tuple[int, ...] | None = None


def rename(ours: str, foreign: str) -> TensorRule:
    """Returns the rule of a tensor that differs only in its name."""
    return TensorRule((ours,), (foreign,))


def rename_module(ours: str, *foreign: str) -> list[TensorRule]:
    """Returns the rules of a module's weight and bias; several foreign modules are stacked into one of ours."""
    return [TensorRule((f"{ours}.{kind}",), tuple(f"{name}.{kind}" for name in foreign)) for kind in ("weight", "bias")]


class NameTable:
    """The names of a model's tensors here and in a foreign format. It covers every tensor exactly once."""

    def __init__(self, rules: Iterable[TensorRule]) -> None:
        self.rules = list(rules)
        for names in (self.our_names, self.foreign_names):
            assert len(set(names)) == len(names), sorted(names)

    @property
    def our_names(self) -> list[str]:
        return [name for rule in self.rules for name in rule.ours]

    @property
    def foreign_names(self) -> list[str]:
        return [name for rule in self.rules for name in rule.foreign]

    def to_ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Converts all tensors of a foreign model to our names and shapes."""
        assert tensors.keys() == set(self.foreign_names), tensors.keys() ^ set(self.foreign_names)
        converted: dict[str, Tensor] = {}
        for rule in self.rules:
            joined = _join([tensors[name] for name in rule.foreign], rule.our_shape)
            converted.update(_split(joined, rule.ours, rule.our_parts))
        return converted

    def to_foreign(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Converts all tensors of a model of ours to the foreign names and shapes."""
        assert tensors.keys() == set(self.our_names), tensors.keys() ^ set(self.our_names)
        converted: dict[str, Tensor] = {}
        for rule in self.rules:
            joined = _join([tensors[name] for name in rule.ours], rule.foreign_shape)
            converted.update(_split(joined, rule.foreign, rule.foreign_parts))
        return converted


def _join(tensors: Sequence[Tensor], shape: tuple[int, ...] | None) -> Tensor:
    joined = torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
    return joined if shape is None else joined.reshape(shape)


def _split(tensor: Tensor, names: tuple[str, ...], parts: tuple[int, ...]) -> dict[str, Tensor]:
    if len(names) == 1:
        return {names[0]: tensor}
    parts = parts or (1,) * len(names)
    rows, rest = divmod(len(tensor), sum(parts))
    assert rest == 0, (names, tuple(tensor.shape))
    pieces = tensor.split([rows * part for part in parts])
    # Copies, since safetensors refuses tensors that share memory.
    return {name: piece.clone() for name, piece in zip(names, pieces, strict=True)}


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raises E_MODEL_SHAPE unless names and shapes are `shapes` and every number is a finite float."""
    unexpected = tensors.keys() - shapes.keys()
    for name, shape in shapes.items():
        if name not in tensors:
            got = "no such tensor"
            if unexpected:
                examples = ", ".join(sorted(unexpected)[:3])
                got = f"no such tensor, but {examples}; {nearest(name, sorted(unexpected))}"
            raise weights_mismatch(folder, name, f"a tensor of shape {shape}", got)
        if tuple(tensors[name].shape) != shape:
            raise weights_mismatch(folder, name, f"shape {shape}", f"shape {tuple(tensors[name].shape)}")
    if unexpected:
        name = min(unexpected)
        raise weights_mismatch(folder, name, "no such tensor", f"shape {tuple(tensors[name].shape)}")
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise weights_mismatch(folder, name, "float32, float16 or bfloat16", str(tensor.dtype))
        if not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise weights_mismatch(folder, name, "finite numbers", f"{count} that are not finite")


def weights_mismatch(folder: Path, name: str, expected: str, got: str) -> ClipwrightError:
    """Returns E_MODEL_SHAPE for the tensor `name`."""
    return ClipwrightError(
        "E_MODEL_SHAPE",
        "the weights do not match the config",
        where=f"{folder}: {name}",
        found=f"expected {expected}, got {got}",
        fix="save the model again, for transformers with save_pretrained",
    )
