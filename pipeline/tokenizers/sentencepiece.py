"""SentencePiece: a tokenizer trained on the dataset's own captions, for any language."""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Int32
from pydantic import Field
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from clipwright.pipeline.core.captions import MAX_BYTES
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.tokenizers.base import TOKENIZERS, TokenIds, TokenizerConfig, read_bounded

MODEL = "sentencepiece.model"
MAX_MODEL_BYTES = 64 * 2**20  # of an untrusted model; a million pieces have 30 MB
PAD, UNKNOWN, SOT, EOT = 0, 1, 2, 3

# SentencePiece's messages about an impossible vocabulary size: the largest and the smallest that is possible.
_TOO_LARGE = re.compile(r"Vocabulary size too high .*<= (\d+)")
_TOO_SMALL = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")


@configclass
class SentencePieceConfig(TokenizerConfig):
    """Byte-pair encoding trained on the captions.

    The pieces are 4 special ones, the 256 bytes, characters, and merges of them. Characters too rare for a piece are
    encoded as bytes, so nothing is unknown.
    """

    trained_file: ClassVar[str | None] = MODEL

    vocab_size: Annotated[int, Field(ge=1, le=1_000_000)] = 8000
    """Number of pieces."""
    normalization: Literal["nmt_nfkc_cf", "nmt_nfkc"] = "nmt_nfkc_cf"
    """Unicode normalization of SentencePiece: NFKC with (nmt_nfkc_cf) or without (nmt_nfkc) case folding."""

    def train(self, captions: Iterable[str], folder: Path) -> None:
        """Trains on `captions`; equal captions give equal bytes.

        Raises E_CONFIG_VALUE if they do not allow this vocabulary size, E_INPUT if they allow none.
        """
        # BPE counts integers; the sums of logarithms in a unigram model may round differently on another machine.
        model = io.BytesIO()
        try:
            SentencePieceTrainer.train(
                sentence_iterator=iter(captions),
                model_writer=model,
                model_type="bpe",
                vocab_size=self.vocab_size,
                normalization_rule_name=self.normalization,
                byte_fallback=True,
                max_sentence_length=MAX_BYTES,
                num_threads=1,
                pad_id=PAD,
                unk_id=UNKNOWN,
                bos_id=SOT,
                eos_id=EOT,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise _training_error(self.vocab_size, str(error)) from None
        atomic_write(folder / MODEL, model.getvalue())


def _training_error(vocab_size: int, reason: str) -> ClipwrightError:
    large, small = _TOO_LARGE.search(reason), _TOO_SMALL.search(reason)
    if large is None and small is None:
        return ClipwrightError(
            "E_INPUT",
            "no tokenizer can be trained on these captions",
            where="tokenizer.name=sentencepiece",
            found=reason,
            fix="prepare other captions or choose another tokenizer",
        )
    if large is not None:
        what = "the vocabulary is larger than the captions allow"
        allowed, size = f"at most {large[1]}", f"{large[1]} or less"
    else:
        assert small is not None
        what = "the vocabulary is too small for the characters of the captions"
        allowed, size = f"at least {small[1]}", f"{small[1]} or more"
    return ClipwrightError(
        "E_CONFIG_VALUE",
        what,
        where=f"tokenizer.vocab_size={vocab_size}",
        found=f"{format_count(vocab_size, 'piece')} ({allowed} possible)",
        fix=f"set tokenizer.vocab_size={size}",
    )


class SentencePiece:
    """Text to the ids of the model in `folder`: padding 0, SOT 2, EOT 3. Raises E_INPUT if it is missing or foreign.

    Kudo and Richardson 2018. Canonically equivalent texts have equal ids, such as Hangul as syllables and as letters.
    """

    sot_id, eot_id, pad_id = SOT, EOT, PAD
    # Unknown, and the 256 bytes, which follow the special pieces.
    unknown_ids: tuple[int, ...] = (UNKNOWN, *range(EOT + 1, EOT + 257))

    def __init__(self, config: SentencePieceConfig, folder: Path) -> None:
        path = folder / MODEL
        self._model = read_bounded(path, MAX_MODEL_BYTES, _unreadable)
        self._pieces = SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(self._model)
        except RuntimeError as error:
            raise _unreadable(path, str(error)) from None
        ids = (self._pieces.pad_id(), self._pieces.unk_id(), self._pieces.bos_id(), self._pieces.eos_id())
        if ids != (PAD, UNKNOWN, SOT, EOT):
            raise _unreadable(path, f"ids {ids} of pad, unknown, start and end (expected {(PAD, UNKNOWN, SOT, EOT)})")
        self.vocab_size = self._pieces.vocab_size()
        self.fingerprint = hashlib.sha256(b"sentencepiece of NFC\n" + self._model).hexdigest()

    def encode(self, texts: Sequence[str], context: int) -> Int32[np.ndarray, "texts context"]:
        """Returns int32 (len(texts), context): SOT + ids + EOT + padding; a truncated text ends in EOT."""
        assert context >= 2, context
        rows = np.full((len(texts), context), PAD, dtype=np.int32)
        composed = [unicodedata.normalize("NFC", text) for text in texts]
        for row, ids in zip(rows, self._pieces.encode(composed, out_type=int, num_threads=1), strict=True):
            ids = [SOT, *ids[: context - 2], EOT]
            row[: len(ids)] = ids
        return rows

    def decode(self, ids: TokenIds) -> str:
        """Returns the normalized text of `ids` up to the first EOT, without special ids."""
        content = list(map(int, ids))
        content = content[: content.index(EOT)] if EOT in content else content
        return self._pieces.decode([i for i in content if i not in (PAD, UNKNOWN, SOT)])

    def save(self, folder: Path) -> list[Path]:
        """Writes the model unchanged."""
        path = folder / MODEL
        atomic_write(path, self._model)
        return [path]


def _unreadable(path: Path, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_INPUT",
        "the SentencePiece model cannot be read",
        where=path,
        found=found,
        fix="restore the file, export the model again, or train with --fresh",
    )


TOKENIZERS.add(SentencePieceConfig, SentencePiece, {"sentencepiece": {}}, source="Kudo and Richardson 2018")
