"""The contract of a foreign model format, and the registry of formats.

A format is one file in this folder. It opens a foreign model as a `ForeignModel` and names its tensors through a
`NameTable`, which import reads in one direction and export in the other. Writing the model folder and the parity
receipt are the same for all formats (`importing.py`, `parity.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import Registry, configclass
from clipwright.pipeline.folders.describe import TRANSFORMERS, describe, wrong_kind
from clipwright.pipeline.interop.weights import NameTable
from clipwright.pipeline.model.two_tower import ModelConfig
from clipwright.pipeline.tokenizers.base import Tokenizer


@configclass
class FormatConfig:
    """The field that every format's config has."""

    name: str
    """Preset name of the format; `clipwright list formats` shows all."""


@dataclass(frozen=True)
class ReferenceOutput:
    """What the original implementation computes for B images and T texts, in float32."""

    image_embeddings: Tensor
    """(B, E), of any length."""
    text_embeddings: Tensor
    """(T, E), of any length."""
    logits: Tensor
    """(B, T)."""


class Reference(Protocol):
    """The original implementation of a foreign model, which the parity receipt compares the import with."""

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 images (H, W, 3) of any size → normalized float32 (B, 3, S, S)."""
        ...

    def tokenize(self, texts: Sequence[str], context: int, pad_id: int) -> np.ndarray:
        """Texts → ids (T, context); `pad_id` pads where the format names no padding token."""
        ...

    def run(self, pixel_values: Tensor, token_ids: Tensor) -> ReferenceOutput:
        """Embeds what `preprocess` and `tokenize` returned."""
        ...


class ForeignModel(ABC):
    """A foreign model that was opened and checked, but whose weights have not been read yet."""

    folder: Path
    kind: str
    """The name of its class or architecture, such as CLIPModel."""
    library: str
    """Where that name comes from, such as transformers."""
    loss: str
    """The loss it was trained with, as named in LOSSES."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 over the names and hashes of all files that are read."""

    @abstractmethod
    def model_config(self) -> tuple[dict[str, Any], Tokenizer]:
        """Returns the fields of ModelConfig as a plain tree, and the tokenizer. Raises E_IMPORT, E_INPUT."""

    @abstractmethod
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns name → shape of every tensor the model must have. Raises E_IMPORT."""

    @abstractmethod
    def weights(self, config: ModelConfig, vocab_size: int) -> dict[str, Tensor]:
        """Reads the weights as float32 under our names, with `loss.logit_scale` and maybe `loss.bias`.

        Raises E_MODEL_SHAPE and E_INPUT.
        """

    @abstractmethod
    def reference(self) -> Reference:
        """Opens the model in the library it comes from."""


class Format(Protocol):
    """A foreign format."""

    def mismatch(self, folder: Path) -> ClipwrightError | None:
        """Returns None if `folder` is of this format, else the reason as an error. Reads as little as possible."""
        ...

    def open(self, folder: Path) -> ForeignModel:
        """Opens a folder of this format. Raises E_INPUT and E_IMPORT."""
        ...

    def name_table(self, config: ModelConfig) -> NameTable:
        """Returns the tensor names of a model with this config. Raises E_IMPORT if the format cannot represent it."""
        ...


FORMATS: Registry[Format] = Registry("format", "clipwright.pipeline.interop.formats")


def open_foreign_model(folder: Path) -> ForeignModel:
    """Opens a folder with the first format that matches. Raises E_INPUT, or E_IMPORT if there is none."""
    if not folder.is_dir():
        raise wrong_kind(folder, "model")
    found = describe(folder)
    if found.kind not in ("", TRANSFORMERS):
        raise ClipwrightError(
            "E_IMPORT",
            "this is not a model folder of transformers",
            where=folder,
            found=f"it is {found.text}",
            fix=found.advice,
        )
    mismatches: dict[str, ClipwrightError] = {}
    for name in FORMATS.entries:
        model_format = FORMATS.build(FORMATS.preset(name))
        error = model_format.mismatch(folder)
        if error is None:
            return model_format.open(folder)
        mismatches[name] = error
    if all(error.code == "E_INPUT" for error in mismatches.values()):
        raise next(iter(mismatches.values()))
    raise ClipwrightError(
        "E_IMPORT",
        "the format of the model folder is not supported",
        where=folder,
        found="; ".join(f"{name}: {error.found}" for name, error in mismatches.items()),
        fix="import a model in one of the formats that `clipwright list formats` shows",
    )


def incompatible(where: object, expected: object, got: object, fix: str = "") -> ClipwrightError:
    """Returns E_IMPORT: something a folder states is missing, contradicts another statement or is not supported."""
    return ClipwrightError(
        "E_IMPORT",
        "the model cannot be imported",
        where=where,
        found=f"expected {expected}, got {got}",
        fix=fix or "correct the file, or save the model and its processor again with save_pretrained",
    )
