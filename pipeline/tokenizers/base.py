"""The contract of a tokenizer, and the registry of tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import Registry, configclass
from clipwright.pipeline.core.unsafe import kind_of, unsafe


@configclass
class TokenizerConfig:
    """Fields every tokenizer has.

    `trained_file`: the main file that `train` writes, for tokenizers that are trained on the captions or copied.
    `external_fields`: fields that point outside the run, to what `train` reads; neither a run's identity nor a model
    folder contains them.
    """

    trained_file: ClassVar[str | None] = None
    external_fields: ClassVar[tuple[str, ...]] = ()

    name: str

    def train(self, captions: Iterable[str], folder: Path) -> None:
        """Writes `trained_file` and any other files into `folder`, for `build(config, folder=folder)` to read."""
        raise AssertionError("a trained tokenizer defines train")


class Tokenizer(Protocol):
    """Text to ids. `fingerprint` is the SHA-256 of what decides them."""

    vocab_size: int
    sot_id: int  # -1 where nothing stands before a text
    eot_id: int
    pad_id: int
    unknown_ids: tuple[int, ...]  # those of what the vocabulary has no piece for: unknown, or spelt in bytes
    fingerprint: str

    def encode(self, texts: Sequence[str], context: int) -> np.ndarray:
        """Ids int32 (len(texts), context): SOT + ids + EOT + padding; too long → cut to context, last id EOT."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special ids are dropped."""
        ...

    def save(self, folder: Path) -> list[Path]:
        """Writes the tokenizer's files into `folder`; `build(config, folder=folder)` reads them back."""
        ...


def read_bounded(path: Path, most: int, unreadable: Callable[[Path, str], ClipwrightError]) -> bytes:
    """A tokenizer's file of at most `most` bytes: a model folder is not trusted. `unreadable` makes the error.

    E_UNSAFE for a pickle under its name.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise unreadable(path, error.strerror or str(error)) from None
    if len(data) > most:
        raise unreadable(path, f"more than {most} bytes")
    if found := kind_of(data):
        raise unsafe(path, "a tokenizer's file", found)
    return data


TOKENIZERS: Registry[Tokenizer] = Registry("tokenizer", "clipwright.pipeline.tokenizers")


LENGTH_STEP = 8  # trimmed captions are rounded up to a multiple of this


def trim(tokens: np.ndarray, eot_id: int, pad: str) -> np.ndarray:
    """Cuts token ids (B, context) to the longest caption, rounded up to 8, where the text tower allows it."""
    if pad != "longest":
        return tokens
    longest = int((tokens == eot_id).argmax(1).max()) + 1
    return tokens[:, : min(-(-longest // LENGTH_STEP) * LENGTH_STEP, tokens.shape[1])]
