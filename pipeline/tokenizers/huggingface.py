"""Any Hugging Face tokenizer in a local folder, opened with the `tokenizers` library."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tokenizers import Tokenizer

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write, digest
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.core.unsafe import unsafe
from clipwright.pipeline.tokenizers.base import TOKENIZERS, TokenizerConfig, read_bounded

TOKENIZER, SPECIAL, SETTINGS = "tokenizer.json", "special_tokens_map.json", "tokenizer_config.json"
MAX_BYTES = 128 * 2**20  # of a file; a vocabulary of 256,000 pieces has 34 MB, and a model folder is not trusted
NO_START = -1


@configclass
class HuggingFaceTokenizerConfig(TokenizerConfig):
    """The tokenizer in `folder`, as its authors saved it. A run and its models keep their own copy."""

    trained_file: ClassVar[str | None] = TOKENIZER
    external_fields: ClassVar[tuple[str, ...]] = ("folder",)

    folder: str | None = None

    def train(self, captions: Iterable[str], folder: Path) -> None:
        """Copies what is in the config's folder; nothing is learned. E_CONFIG_VALUE without one, E_INPUT for a bad one.

        E_UNSAFE for one with code of its own.

        A folder without tokenizer.json is opened by transformers, offline and without running code of the folder's.
        """
        if self.folder is None:
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "no tokenizer folder",
                where="tokenizer.folder",
                found="nothing",
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
    """Text to the ids of tokenizer.json in `folder`, framed as it frames a single text; E_INPUT if it cannot be.

    What stands before and after a text is what the tokenizer's own post-processor puts there, such as [CLS] and [SEP];
    T5 has no start. Where it puts none, they are eos_token or sep_token, and bos_token or cls_token unless that is the
    end too. Padding is pad_token, else the end. Text that spells a special token gives its id, as in transformers.
    """

    def __init__(self, config: HuggingFaceTokenizerConfig, folder: Path) -> None:
        path = folder / TOKENIZER
        self._data, self._special = read_bounded(path, MAX_BYTES, _unreadable), _special_tokens(folder)
        self._tokenizer, (self.sot_id, self.eot_id, self.pad_id) = _open(path, self._data, self._special)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        tree = json.loads(self._data)
        self.unknown_ids = _unknown_ids(tree["model"], vocabulary)
        # Of the content: writing the file anew changes no id, nor do padding and truncation, which are ours.
        content = {key: value for key, value in tree.items() if key not in ("padding", "truncation")}
        self.fingerprint = digest({"tokenizer": content, "ids": [self.sot_id, self.eot_id, self.pad_id]})

    def encode(self, texts: Sequence[str], context: int) -> np.ndarray:
        """Ids int32 (len(texts), context): start + ids + EOT + padding; too long → cut to context, last id EOT."""
        assert context >= 2, context
        rows = np.full((len(texts), context), self.pad_id, dtype=np.int32)
        start = [] if self.sot_id == NO_START else [self.sot_id]
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        for row, encoding in zip(rows, encodings, strict=True):
            ids = [*[*start, *encoding.ids][: context - 1], self.eot_id]
            row[: len(ids)] = ids
        return rows

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` up to the first EOT, normalised as it was encoded; special ids are dropped."""
        real = itertools.takewhile(lambda i: i != self.eot_id, map(int, ids))
        return self._tokenizer.decode(list(real), skip_special_tokens=True)

    def save(self, folder: Path) -> list[Path]:
        """Writes the tokenizer as it was read, and its special tokens."""
        atomic_write(folder / TOKENIZER, self._data)
        atomic_write(folder / SPECIAL, json.dumps(self._special, ensure_ascii=False, indent=2, sort_keys=True) + "\n")
        return [folder / TOKENIZER, folder / SPECIAL]


def _open(path: Path, data: bytes, special: dict[str, str]) -> tuple[Tokenizer, tuple[int, int, int]]:
    """The tokenizer, and its ids of start, end and padding; `path` is for errors."""
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises plain Exceptions
        raise _unreadable(path, str(error)) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tree = json.loads(data)
    before, after = _frame(tree.get("post_processor"))
    if len(before) > 1 or len(after) > 1:
        found = f"{len(before)} tokens before a text and {len(after)} after it; allowed is at most one on each side"
        raise _unusable(path, found, "save the tokenizer with another post-processor")
    known = {role: i for role, token in special.items() if (i := tokenizer.token_to_id(token)) is not None}
    end = after[0] if after else known.get("eos_token", known.get("sep_token"))
    if end is None:
        named = ", ".join(f"{role} {token}" for role, token in sorted(special.items())) or "none"
        raise _unusable(
            path,
            f"no token that ends a text: the post-processor adds none, and the special tokens are {named}",
            "name an eos_token or sep_token of the vocabulary in tokenizer_config.json",
        )
    start = before[0] if before else NO_START
    if not before and not after:
        named_start = known.get("bos_token", known.get("cls_token", NO_START))
        start = NO_START if named_start == end else named_start
    if start == end:
        found = f"id {end} both starts and ends a text, so no end can be found"
        raise _unusable(path, found, "save the tokenizer with an eos_token of its own")
    pad = (tree.get("padding") or {"pad_id": end})["pad_id"]
    return tokenizer, (start, end, known.get("pad_token", pad))


def _frame(processor: dict[str, Any] | None) -> tuple[list[int], list[int]]:
    """The ids that a post-processor puts before and after a single text."""
    kind = (processor or {}).get("type")
    if processor is None or kind not in ("Sequence", "BertProcessing", "RobertaProcessing", "TemplateProcessing"):
        return [], []  # ByteLevel only moves offsets
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
    """The ids of what the vocabulary has no piece for: unknown, or the 256 bytes that spell it."""
    unknown = model.get("unk_id") if model["type"] == "Unigram" else vocabulary.get(model.get("unk_token") or "")
    spelt = [vocabulary.get(f"<0x{byte:02X}>") for byte in range(256)] if model.get("byte_fallback") else []
    return tuple(sorted({i for i in (unknown, *spelt) if i is not None}))


def _refuse_code(folder: Path) -> None:
    """E_UNSAFE where the folder names Python code that its tokenizer is made of: its own ids would be others."""
    for name in (SETTINGS, "config.json"):
        if not (path := folder / name).is_file():
            continue
        try:
            tree = json.loads(read_bounded(path, MAX_BYTES, _unreadable))
        except (ValueError, RecursionError) as error:
            raise _unreadable(path, str(error)) from None
        named = tree.get("auto_map") if isinstance(tree, dict) else None
        if named and (name == SETTINGS or "AutoTokenizer" in named):  # a model's own code is none of a tokenizer's
            raise unsafe(f"{path}: auto_map", "a tokenizer folder", f"it names {named}")


def _special_tokens(folder: Path) -> dict[str, str]:
    """Role (`eos_token`, …) → token, as the folder's files name them."""
    found: dict[str, str] = {}
    for name in (SPECIAL, SETTINGS):
        path = folder / name
        if not path.is_file():
            continue
        try:
            tree = json.loads(read_bounded(path, MAX_BYTES, _unreadable))
        except (ValueError, RecursionError) as error:
            raise _unreadable(path, str(error)) from None
        if not isinstance(tree, dict):
            raise _unreadable(path, f"a {type(tree).__name__}, no object")
        for role in ("bos_token", "eos_token", "cls_token", "sep_token", "pad_token"):
            token = tree.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[role] = token
    return found


def _convert(folder: Path) -> tuple[bytes, dict[str, str]]:
    """tokenizer.json and the special tokens of a folder in an older form, such as vocab.txt."""
    from transformers import AutoTokenizer  # noqa: PLC0415  a second, which only such a folder costs

    try:
        opened = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a library meets in a stranger's folder
        raise _unreadable(folder, f"no {TOKENIZER}, and transformers says: {error}") from None
    backend = getattr(opened, "backend_tokenizer", None)
    if backend is None:
        raise _unreadable(folder, f"no {TOKENIZER}, and transformers has none for a {type(opened).__name__}")
    special = {role: str(token) for role, token in opened.special_tokens_map.items() if isinstance(token, str)}
    return backend.to_str().encode(), special


def _unreadable(path: Path, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_INPUT",
        "a Hugging Face tokenizer that cannot be read",
        where=path,
        found=found,
        fix="restore the file, or save the tokenizer anew with save_pretrained",
    )


def _unusable(path: Path, found: str, fix: str) -> ClipwrightError:
    return ClipwrightError("E_INPUT", "a tokenizer that captions cannot use", where=path, found=found, fix=fix)


TOKENIZERS.add(
    HuggingFaceTokenizerConfig,
    HuggingFaceTokenizer,
    {"huggingface": {}},
    source="any local folder with tokenizer.json, or that transformers can open",
)
