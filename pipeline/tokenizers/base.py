"""The contract of a tokenizer, and the registry of tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Integer

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.registry import Registry, configclass
from clipwright.pipeline.core.unsafe import kind_of, unsafe


@configclass
class TokenizerConfig:
    """The fields that every tokenizer has."""

    trained_file: ClassVar[str | None] = None
    """The main file that `train` writes, for tokenizers that are trained on the captions or copied from a folder."""
    external_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that name what `train` reads; neither a run's identity nor a model folder contains them."""

    name: str
    """Name of a tokenizer; `clipwright list tokenizers` lists them."""

    def train(self, captions: Iterable[str], folder: Path) -> None:
        """Writes `trained_file` and any other files into `folder`, for `build(config, folder=folder)` to read."""
        raise AssertionError("a trained tokenizer defines train")


TokenIds = Sequence[int] | Integer[np.ndarray, " n"]


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids. `fingerprint` is the SHA-256 of everything that determines them."""

    vocab_size: int
    sot_id: int  # -1 if the tokenizer adds no start of text
    eot_id: int
    pad_id: int
    unknown_ids: tuple[int, ...]  # ids of text that the vocabulary does not cover: unknown, or single bytes
    fingerprint: str

    def encode(self, texts: Sequence[str], context: int) -> Int32[np.ndarray, "texts context"]:
        """Returns int32 (len(texts), context): SOT + ids + EOT + padding; a truncated text ends in EOT."""
        ...

    def decode(self, ids: TokenIds) -> str:
        """Returns the text of `ids` without special ids."""
        ...

    def save(self, folder: Path) -> list[Path]:
        """Writes the tokenizer's files into `folder`; `build(config, folder=folder)` reads them back."""
        ...


def read_bounded(path: Path, max_bytes: int, unreadable: Callable[[Path, str], ClipwrightError]) -> bytes:
    """Reads an untrusted file of at most `max_bytes` bytes. Raises `unreadable(...)`, or E_UNSAFE for a pickle."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise unreadable(path, error.strerror or str(error)) from None
    if len(data) > max_bytes:
        raise unreadable(path, f"more than {format_count(max_bytes, 'byte')}")
    found = kind_of(data)
    if found:
        raise unsafe(path, "a tokenizer's file", found)
    return data


TOKENIZERS: Registry[Tokenizer] = Registry("tokenizer", "clipwright.pipeline.tokenizers")


LENGTH_STEP = 8  # tokens; the length of trimmed captions is a multiple of it


def trim(tokens: Integer[np.ndarray, "b n"], eot_id: int, pad: str) -> Integer[np.ndarray, "b m"]:
    """Trims token ids (B, context) to the longest caption, rounded up to 8, if the text tower's `pad` is `longest`."""
    if pad != "longest":
        return tokens
    longest = int((tokens == eot_id).argmax(1).max()) + 1
    return tokens[:, : min(-(-longest // LENGTH_STEP) * LENGTH_STEP, tokens.shape[1])]
