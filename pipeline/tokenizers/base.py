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

    `learned` names the main file that `learn` writes, where a tokenizer is learned from the captions it is trained on
    or copied. `outside`: fields that point outside a run, to what `learn` brings in; neither a run's identity nor a
    model folder has them.
    """

    learned: ClassVar[str | None] = None
    outside: ClassVar[tuple[str, ...]] = ()

    name: str

    def learn(self, captions: Iterable[str], folder: Path) -> None:
        """Writes `learned`, and what else there is, into `folder`; `build(config, folder=folder)` then reads it."""
        raise AssertionError("a tokenizer that is learned defines learn")


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
