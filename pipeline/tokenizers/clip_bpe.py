"""CLIP's tokenizer: lowercase byte-level BPE with 49,408 ids, with the text cleaning of OpenAI or transformers."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import html
import io
import itertools
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import ftfy
import numpy as np
import regex
from jaxtyping import Int32
from tokenizers import Regex, models, normalizers, pre_tokenizers

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write, canonical_json
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.tokenizers.base import TOKENIZERS, TokenIds, TokenizerConfig

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"  # openai/CLIP, MIT; a header line, then one merge per line
MERGES = 49152 - 256 - 2
MAX_BYTES = 16 * 2**20  # of an untrusted, decompressed vocabulary; the shipped one has 3.2 MB
SOT, EOT = "<|startoftext|>", "<|endoftext|>"
CACHE_WORDS = 2**18  # words whose ids are cached; some tens of MB


@configclass
class CLIPBPEConfig(TokenizerConfig):
    """CLIP's BPE tokenizer.

    The two cleanings differ on curly quotes, entities, full-width text, ligatures and mojibake. A model imported from
    a `CLIPModel` folder needs that of transformers.
    """

    clean: Literal["openai", "transformers"] = "openai"
    """Text cleaning: openai fixes mojibake and HTML entities, transformers only normalizes to NFC."""


_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# OpenAI matches lowercase text case-insensitively, which matters twice: `'ſ` is a word, and U+0345, whose other case is
# a letter, is dropped. transformers matches case-sensitively.
_OPENAI_WORDS = regex.compile(_WORDS, regex.IGNORECASE)
# Printable ASCII (for openai, without entities): cleaning only lowercases it, and Python's `re` can split it.
_PLAIN = {"openai": re.compile(r"[\t\n\r -%'-~]*"), "transformers": re.compile(r"[\t\n\r -~]*")}
_PLAIN_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")
_SPECIAL = re.compile(rf"({re.escape(SOT)}|{re.escape(EOT)})")


class CLIPBPE:
    """Text to CLIP's ids: SOT 49406, EOT 49407, padding 0.

    Radford et al. 2021, section 2.4, and openai/CLIP's simple_tokenizer.py. The vocabulary is read from `folder`, or
    else the shipped one is used. Raises E_INPUT if it is missing or malformed. As in both originals, text that spells a
    special token is encoded as that token.
    """

    def __init__(self, config: CLIPBPEConfig, folder: Path | None = None) -> None:
        self.clean = config.clean
        path = (folder or Path(__file__).parent) / VOCABULARY
        self._file, vocabulary = read_vocabulary(path)
        merges = parse_merges(path, vocabulary)
        self._symbols = byte_symbols()
        self._tokens = token_list(merges)
        vocab = {token: i for i, token in enumerate(self._tokens)}
        self._bpe = models.BPE(vocab, merges, end_of_word_suffix="</w>")
        self._split = pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True)
        self._normalize = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._cache: dict[str, list[int]] = {}
        self.vocab_size = len(vocab)
        self.sot_id, self.eot_id, self.pad_id = vocab[SOT], vocab[EOT], 0
        self.unknown_ids: tuple[int, ...] = ()  # every byte has a token
        # Of the decompressed vocabulary, since compressing it again changes no id.
        identity = canonical_json(dataclasses.asdict(config)).encode()
        self.fingerprint = hashlib.sha256(vocabulary + identity).hexdigest()

    def encode(self, texts: Sequence[str], context: int) -> Int32[np.ndarray, "texts context"]:
        """Returns int32 (len(texts), context): SOT + ids + EOT + zeros; a truncated text ends in EOT."""
        assert context >= 2, context
        rows = np.full((len(texts), context), self.pad_id, dtype=np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.sot_id]
            for word in self._words(text):
                cached = self._cache.get(word)
                ids += self._word_ids(word) if cached is None else cached
                if len(ids) >= context:
                    break
            ids = [*ids[: context - 1], self.eot_id]
            row[: len(ids)] = ids
        return rows

    def decode(self, ids: TokenIds) -> str:
        """Returns the lowercase text of `ids` up to the first EOT, without SOT."""
        content = itertools.takewhile(lambda i: i != self.eot_id, map(int, ids))
        symbols = "".join(self._tokens[i].replace("</w>", " ") for i in content if i != self.sot_id)
        byte_of = {symbol: value for value, symbol in enumerate(self._symbols)}
        byte_of[" "] = ord(" ")
        return bytes(byte_of[symbol] for symbol in symbols).decode("utf-8", errors="replace").strip()

    def save(self, folder: Path) -> list[Path]:
        """Writes the vocabulary unchanged."""
        path = folder / VOCABULARY
        atomic_write(path, self._file)
        return [path]

    def _words(self, text: str) -> list[str]:
        """Cleans the text and splits it into words for BPE."""
        if _PLAIN[self.clean].fullmatch(text) and "<|" not in text:
            return _PLAIN_WORDS.findall(text.lower())
        if self.clean == "openai":
            text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
            return _OPENAI_WORDS.findall(text.lower())
        words: list[str] = []
        for piece in _SPECIAL.split(text):
            if _SPECIAL.fullmatch(piece):
                words.append(piece)
                continue
            for word, _ in self._split.pre_tokenize_str(self._normalize.normalize_str(piece)):
                # What lowercasing turned into a special token is ordinary text to transformers, which splits it.
                words += ["<|", word[2:-2], "|>"] if _SPECIAL.fullmatch(word) else [word]
        return words

    def _word_ids(self, word: str) -> list[int]:
        if word in (SOT, EOT):
            return [self.sot_id if word == SOT else self.eot_id]
        symbols = "".join(self._symbols[byte] for byte in word.encode())
        ids = [token.id for token in self._bpe.tokenize(symbols)]
        if len(self._cache) >= CACHE_WORDS:
            self._cache.clear()
        self._cache[word] = ids
        return ids


def byte_symbols() -> list[str]:
    """Returns the printable character for each byte 0..255, as in GPT-2: itself, or one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = itertools.count(256)
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def token_list(merges: Sequence[tuple[str, str]]) -> list[str]:
    """Returns the token of each id: 256 symbols by code point, the same as word endings, the merges, SOT, EOT."""
    single = sorted(byte_symbols())
    return [*single, *(s + "</w>" for s in single), *("".join(merge) for merge in merges), SOT, EOT]


def read_vocabulary(path: Path) -> tuple[bytes, bytes]:
    """Reads the vocabulary file; returns its bytes as stored and decompressed."""
    try:
        with path.open("rb") as file:
            packed = file.read(MAX_BYTES)
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            return packed, file.read(MAX_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise ClipwrightError(
            "E_INPUT",
            "CLIP's vocabulary cannot be read",
            where=path,
            found=str(error),
            fix="export the model again, or copy the file from clipwright/pipeline/tokenizers",
        ) from error


def parse_merges(path: Path, vocabulary: bytes) -> list[tuple[str, str]]:
    """Returns the merges by rank. Raises E_INPUT unless their number is CLIP's and each merges known symbols."""
    lines = vocabulary.decode("utf-8", errors="replace").split("\n")[1 : MERGES + 1]
    pairs = [tuple(line.split()) for line in lines]
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    known = {s + end for s in byte_symbols() for end in ("", "</w>")} | {left + right for left, right in merges}
    if len(merges) != MERGES or len(known) != 2 * 256 + MERGES or not all(known.issuperset(m) for m in merges):
        raise ClipwrightError(
            "E_INPUT",
            "the file is not CLIP's vocabulary",
            where=path,
            found=f"{format_count(len(merges), 'merge')} (expected a header line and "
            f"{format_count(MERGES, 'distinct merge')} of known symbols)",
            fix="export the model again, or copy the file from clipwright/pipeline/tokenizers",
        )
    return merges


TOKENIZERS.add(CLIPBPEConfig, CLIPBPE, {"clip_bpe": {}}, source="Radford et al. 2021 and openai/CLIP")
