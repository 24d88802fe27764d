"""A Hugging Face tokenizer in a local folder, opened with the `tokenizers` library."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write, digest
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.core.unsafe import unsafe
from clipwright.pipeline.tokenizers.base import TOKENIZERS, TokenIds, TokenizerConfig, read_bounded

TOKENIZER, SPECIAL, SETTINGS = "tokenizer.json", "special_tokens_map.json", "tokenizer_config.json"
MAX_BYTES = 128 * 2**20  # of an untrusted file; a vocabulary of 256,000 pieces has 34 MB
NO_START = -1


@configclass
class HuggingFaceTokenizerConfig(TokenizerConfig):
    """A tokenizer as its authors saved it. A run and its models keep their own copy."""

    trained_file: ClassVar[str | None] = TOKENIZER
    external_fields: ClassVar[tuple[str, ...]] = ("folder",)

    folder: str | None = None
    """Folder with tokenizer.json, or another one that transformers can open."""

    def train(self, captions: Iterable[str], folder: Path) -> None:
        """Copies the tokenizer in the config's folder; `captions` are not read.

        A folder without tokenizer.json is opened by transformers, offline and without running its code. Raises
        E_CONFIG_VALUE if no folder is set, E_INPUT if it cannot be used, and E_UNSAFE if it has code of its own.
        """
        if self.folder is None:
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "the tokenizer needs a folder",
                where="tokenizer.folder",
                found="not set",
                fix="set tokenizer.folder=DIR, a folder with tokenizer.json",
            )
        source = Path(self.folder)
        _refuse_code(source)
        path = source / TOKENIZER
        if path.is_file() or not source.is_dir():
            data, special = read_bounded(path, MAX_BYTES, _unreadable), _special_tokens(source)
        else:
            data, special = _convert(source)
        _open(path, data, special)
        atomic_write(folder / TOKENIZER, data)
        atomic_write(folder / SPECIAL, json.dumps(special, ensure_ascii=False, indent=2, sort_keys=True) + "\n")


class HuggingFaceTokenizer:
    """Text to the ids of tokenizer.json in `folder`. Raises E_INPUT if it cannot be used.

    Start and end of a text are what the tokenizer's own post-processor adds, such as [CLS] and [SEP]; T5 has no start.
    If it adds neither, the end is eos_token or sep_token, and the start bos_token or cls_token, unless that is also the
    end. Padding is pad_token, or else the end. As in transformers, text that spells a special token is encoded as it.
    """

    def __init__(self, config: HuggingFaceTokenizerConfig, folder: Path) -> None:
        path = folder / TOKENIZER
        self._data, self._special = read_bounded(path, MAX_BYTES, _unreadable), _special_tokens(folder)
        self._tokenizer, (self.sot_id, self.eot_id, self.pad_id) = _open(path, self._data, self._special)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        tree = json.loads(self._data)
        self.unknown_ids = _unknown_ids(tree["model"], vocabulary)
        # Of the parsed content, since formatting changes no id; padding and truncation are done here.
        content = {key: value for key, value in tree.items() if key not in ("padding", "truncation")}
        self.fingerprint = digest({"tokenizer": content, "ids": [self.sot_id, self.eot_id, self.pad_id]})

    def encode(self, texts: Sequence[str], context: int) -> Int32[np.ndarray, "texts context"]:
        """Returns int32 (len(texts), context): start + ids + end + padding; a truncated text ends in the end id."""
        assert context >= 2, context
        rows = np.full((len(texts), context), self.pad_id, dtype=np.int32)
        start = [] if self.sot_id == NO_START else [self.sot_id]
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        for row, encoding in zip(rows, encodings, strict=True):
            ids = [*[*start, *encoding.ids][: context - 1], self.eot_id]
            row[: len(ids)] = ids
        return rows

    def decode(self, ids: TokenIds) -> str:
        """Returns the normalized text of `ids` up to the first end, without special ids."""
        content = itertools.takewhile(lambda i: i != self.eot_id, map(int, ids))
        return self._tokenizer.decode(list(content), skip_special_tokens=True)

    def save(self, folder: Path) -> list[Path]:
        """Writes the tokenizer unchanged, and its special tokens."""
        atomic_write(folder / TOKENIZER, self._data)
        atomic_write(folder / SPECIAL, json.dumps(self._special, ensure_ascii=False, indent=2, sort_keys=True) + "\n")
        return [folder / TOKENIZER, folder / SPECIAL]


def _open(path: Path, data: bytes, special: dict[str, str]) -> tuple[Tokenizer, tuple[int, int, int]]:
    """Opens the tokenizer; returns it and its ids of start, end and padding. `path` is named in errors."""
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises plain Exceptions
        raise _unreadable(path, str(error)) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tree = json.loads(data)
    before, after = _frame(tree.get("post_processor"))
    if len(before) > 1 or len(after) > 1:
        found = (
            f"it adds {format_count(len(before), 'token')} before a text and {len(after)} after it (at "
            "most one each is allowed)"
        )
        raise _unusable(path, found, "save the tokenizer with another post-processor")
    ids: dict[str, int] = {}
    for role, token in special.items():
        token_id = tokenizer.token_to_id(token)
        if token_id is not None:
            ids[role] = token_id
    end = after[0] if after else ids.get("eos_token", ids.get("sep_token"))
    if end is None:
        named = ", ".join(f"{role} {token}" for role, token in sorted(special.items())) or "none"
        raise _unusable(
            path,
            f"no token marks the end of a text: the post-processor adds none, and the special tokens are {named}",
            "name an eos_token or sep_token of the vocabulary in tokenizer_config.json",
        )
    start = before[0] if before else NO_START
    if not before and not after:
        named_start = ids.get("bos_token", ids.get("cls_token", NO_START))
        start = NO_START if named_start == end else named_start
    if start == end:
        found = f"id {end} both starts and ends a text, so the end cannot be located"
        raise _unusable(path, found, "save the tokenizer with an eos_token of its own")
    pad = (tree.get("padding") or {"pad_id": end})["pad_id"]
    return tokenizer, (start, end, ids.get("pad_token", pad))


def _frame(processor: dict[str, Any] | None) -> tuple[list[int], list[int]]:
    """Returns the ids that a post-processor adds before and after a single text."""
    kind = (processor or {}).get("type")
    if processor is None or kind not in ("Sequence", "BertProcessing", "RobertaProcessing", "TemplateProcessing"):
        return [], []  # ByteLevel changes only offsets
    if kind == "Sequence":
        frames = [_frame(part) for part in processor["processors"]]
        return [i for before, _ in reversed(frames) for i in before], [i for _, after in frames for i in after]
    if kind != "TemplateProcessing":
        return [processor["cls"][1]], [processor["sep"][1]]
    sides: tuple[list[int], list[int]] = ([], [])
    side = 0
    for piece in processor["single"]:
        if "Sequence" in piece:
            side = 1
        else:
            sides[side].extend(processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    return sides


def _unknown_ids(model: dict[str, Any], vocabulary: dict[str, int]) -> tuple[int, ...]:
    """Returns the ids of text that the vocabulary does not cover: unknown, and the 256 single bytes."""
    unknown = model.get("unk_id") if model["type"] == "Unigram" else vocabulary.get(model.get("unk_token") or "")
    byte_ids = [vocabulary.get(f"<0x{byte:02X}>") for byte in range(256)] if model.get("byte_fallback") else []
    return tuple(sorted({i for i in (unknown, *byte_ids) if i is not None}))


def _refuse_code(folder: Path) -> None:
    """Raises E_UNSAFE if the folder names Python code for its tokenizer, without which the ids would differ."""
    for name in (SETTINGS, "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            tree = json.loads(read_bounded(path, MAX_BYTES, _unreadable))
        except (ValueError, RecursionError) as error:
            raise _unreadable(path, str(error)) from None
        named = tree.get("auto_map") if isinstance(tree, dict) else None
        if named and (name == SETTINGS or "AutoTokenizer" in named):  # config.json may name code for the model only
            raise unsafe(f"{path}: auto_map", "a tokenizer folder", f"it names {named}")


def _special_tokens(folder: Path) -> dict[str, str]:
    """Returns role (`eos_token`, …) → token, as stated in the folder's files."""
    tokens: dict[str, str] = {}
    for name in (SPECIAL, SETTINGS):
        path = folder / name
        if not path.is_file():
            continue
        try:
            tree = json.loads(read_bounded(path, MAX_BYTES, _unreadable))
        except (ValueError, RecursionError) as error:
            raise _unreadable(path, str(error)) from None
        if not isinstance(tree, dict):
            raise _unreadable(path, f"the top level is a {type(tree).__name__}, not an object")
        for role in ("bos_token", "eos_token", "cls_token", "sep_token", "pad_token"):
            token = tree.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                tokens[role] = token
    return tokens


def _convert(folder: Path) -> tuple[bytes, dict[str, str]]:
    """Converts a folder in an older format, such as vocab.txt, to tokenizer.json and special tokens."""
    from transformers import AutoTokenizer  # noqa: PLC0415  takes a second that only such a folder needs

    try:
        opened = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # an untrusted folder may make the library raise anything
        raise _unreadable(folder, f"no {TOKENIZER}, and transformers cannot open it: {error}") from None
    backend = getattr(opened, "backend_tokenizer", None)
    if backend is None:
        raise _unreadable(folder, f"no {TOKENIZER}, and transformers cannot convert a {type(opened).__name__}")
    special = {role: str(token) for role, token in opened.special_tokens_map.items() if isinstance(token, str)}
    return backend.to_str().encode(), special


def _unreadable(path: Path, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_INPUT",
        "the Hugging Face tokenizer cannot be read",
        where=path,
        found=found,
        fix="restore the file, or save the tokenizer again with save_pretrained",
    )


def _unusable(path: Path, found: str, fix: str) -> ClipwrightError:
    return ClipwrightError("E_INPUT", "the tokenizer cannot encode captions", where=path, found=found, fix=fix)


TOKENIZERS.add(
    HuggingFaceTokenizerConfig,
    HuggingFaceTokenizer,
    {"huggingface": {}},
    source="any local folder with tokenizer.json, or that transformers can open",
)
