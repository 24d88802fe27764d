"""SigLIP's tokenizer: an existing SentencePiece vocabulary on text without punctuation, as in transformers."""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Int32
from sentencepiece import SentencePieceProcessor

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write, digest
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.tokenizers.base import TOKENIZERS, TokenIds, TokenizerConfig, read_bounded

MODEL = "spiece.model"
MAX_MODEL_BYTES = 64 * 2**20  # of an untrusted model; a million pieces have 30 MB
META = "▁"  # how SentencePiece writes white space
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@configclass
class SigLIPTokenizerConfig(TokenizerConfig):
    """SigLIP's tokenizer. A run and its models keep their own copy of the vocabulary.

    Text that spells `end`, `unknown` or `pad` is encoded as that special token.
    """

    trained_file: ClassVar[str | None] = MODEL
    external_fields: ClassVar[tuple[str, ...]] = ("folder",)

    folder: str | None = None
    """Folder with spiece.model."""
    lower_case: bool = True
    """Whether text is lowercased."""
    end: str = "</s>"
    """Token that ends a text."""
    unknown: str = "<unk>"
    """Token of text that the vocabulary does not cover."""
    pad: str = "</s>"
    """Token that pads a text."""

    def train(self, captions: Iterable[str], folder: Path) -> None:
        """Copies the model in the config's folder; `captions` are not read. Raises E_CONFIG_VALUE without a folder."""
        if self.folder is None:
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "the tokenizer needs a folder",
                where="tokenizer.folder",
                found="not set",
                fix=f"set tokenizer.folder=DIR, a folder with {MODEL}",
            )
        path = Path(self.folder) / MODEL
        data = read_bounded(path, MAX_MODEL_BYTES, _unreadable)
        _open(path, data, self)
        atomic_write(folder / MODEL, data)


class SigLIPTokenizer:
    """Text to the ids of transformers' SiglipTokenizer: ids + end + padding, without a start. Raises E_INPUT.

    Zhai et al. 2023, section 3.1, and big_vision's canonical text: lowercase, no ASCII punctuation, single spaces.
    A text that already ends in `end` gets no second one.
    """

    sot_id = -1

    def __init__(self, config: SigLIPTokenizerConfig, folder: Path) -> None:
        path = folder / MODEL
        self._config = config
        self._model = read_bounded(path, MAX_MODEL_BYTES, _unreadable)
        self._pieces, self._special = _open(path, self._model, config)
        self.vocab_size = self._pieces.vocab_size()
        self.eot_id, self.pad_id = self._special[config.end], self._special[config.pad]
        unknown = self._special[config.unknown]
        self.unknown_ids = (unknown, *(i for i in range(self.vocab_size) if self._pieces.IsByte(i)))
        # Longest first, in case one token is a prefix of another.
        tokens = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, tokens)) + ")")
        self._prefix_length = len(self._pieces.encode(config.unknown, out_type=str))
        tree = {name: getattr(config, name) for name in ("lower_case", "end", "unknown", "pad")}
        self.fingerprint = digest({"siglip": tree, "model": self._model.hex()})

    def encode(self, texts: Sequence[str], context: int) -> Int32[np.ndarray, "texts context"]:
        """Returns int32 (len(texts), context): ids + EOT + padding; a truncated text ends in EOT."""
        rows = np.full((len(texts), context), self.pad_id, dtype=np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = self._ids(text)[: context - 1]
            ids = ids if ids[-1:] == [self.eot_id] else [*ids, self.eot_id]
            row[: len(ids)] = ids
        return rows

    def decode(self, ids: TokenIds) -> str:
        """Returns the text of `ids` up to the first EOT, without punctuation and special ids."""
        special = set(self._special.values())
        content = itertools.takewhile(lambda i: i != self.eot_id, map(int, ids))
        return self._pieces.decode([i for i in content if i not in special])

    def save(self, folder: Path) -> list[Path]:
        """Writes the model unchanged."""
        path = folder / MODEL
        atomic_write(path, self._model)
        return [path]

    def _ids(self, text: str) -> list[int]:
        parts = self._split.split(META + text.replace(META, " "))
        pieces: list[str] = []
        for number, part in enumerate(parts):
            if number % 2:
                pieces.append(part)
                continue
            pieces += self._text_pieces(part) if part else []
        if len(pieces) > 1 and pieces[0] == META and pieces[1] in self._special:
            pieces = pieces[1:]
        return [self._special.get(piece, self._pieces.piece_to_id(piece)) for piece in pieces]

    def _text_pieces(self, text: str) -> list[str]:
        """Splits ordinary text into pieces."""
        text = text.lower() if self._config.lower_case else text
        text = re.sub(r"\s+", " ", text.translate(_NO_PUNCTUATION)).strip()
        # A leading special token keeps SentencePiece from adding white space; its pieces are removed again.
        pieces = self._pieces.encode(self._config.unknown + text, out_type=str)
        return pieces[self._prefix_length :] if len(pieces) >= self._prefix_length else pieces


def _open(path: Path, data: bytes, config: SigLIPTokenizerConfig) -> tuple[SentencePieceProcessor, dict[str, int]]:
    """Opens the vocabulary; returns it and the ids of the special tokens. `path` is named in errors."""
    pieces = SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(data)
    except RuntimeError as error:
        raise _unreadable(path, str(error)) from None
    special: dict[str, int] = {}
    for role in ("end", "unknown", "pad"):
        token = getattr(config, role)
        number = pieces.piece_to_id(token)
        if pieces.id_to_piece(number) != token:
            raise _unreadable(path, f"it has no piece {token!r}, which tokenizer.{role} names")
        special[token] = number
    return pieces, special


def _unreadable(path: Path, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_INPUT",
        "the SigLIP tokenizer cannot be read",
        where=path,
        found=found,
        fix="restore the file, or save the tokenizer again with save_pretrained",
    )


TOKENIZERS.add(
    SigLIPTokenizerConfig,
    SigLIPTokenizer,
    {"siglip": {}},
    source="Zhai et al. 2023 and google-research/big_vision; any folder with spiece.model",
)
