"""Captions in text and JSON files, one rule for folders and for members of tars: names, encodings, keys, lines."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from clipwright.data_prep.sources.base import NO_CAPTIONS, Caption
from clipwright.data_prep.sources.encodings import check_encoding, likely_encoding
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import configclass

JSON_SUFFIX = ".json"
# A language between stem and suffix, as in a.en.txt or a.pt-br.txt.
_LANGUAGE = re.compile(r"[a-z]{2}([-_][A-Za-z]{2,4})?")


@configclass
class CaptionFilesConfig:
    """How captions are read from text and JSON files.

    A list of captions in the JSON is used first, then the text, then a single caption in the JSON.
    """

    caption: str | list[str] = field(default_factory=lambda: ["captions", "caption", "text", "blip_caption"])
    """JSON keys of captions, a text or a list, of which the first in the file is used; `none`: images only."""
    text: Literal["lines", "whole"] = "lines"
    """How a text file is read: each line is a caption, or the whole file is one."""
    text_suffixes: list[str] = field(default_factory=lambda: [".txt", ".caption"])
    """Endings of text files: of `a.jpg` they may be named a.txt, a.jpg.txt or a.en.txt."""
    encoding: str = "utf-8"
    """Encoding of the text and JSON files."""


class CaptionFileError(ValueError):
    """A caption file that cannot be used; `args` are E_CAP code and detail."""


@dataclass(frozen=True)
class CaptionRules:
    """The rules of a CaptionFilesConfig. `prefix` is put before its keys in messages: `source.` or nothing."""

    keys: tuple[str, ...]
    captioned: bool
    whole: bool
    text_suffixes: tuple[str, ...]
    encoding: str
    prefix: str

    @classmethod
    def of(cls, config: CaptionFilesConfig, prefix: str) -> CaptionRules:
        """Raises E_CONFIG_VALUE for an unknown encoding or an ending without a dot."""
        captioned = config.caption != NO_CAPTIONS
        keys = (config.caption,) if isinstance(config.caption, str) else tuple(config.caption)
        suffixes = tuple(suffix.lower() for suffix in config.text_suffixes)
        for suffix in suffixes:
            if not suffix.startswith(".") or len(suffix) < 2 or suffix == JSON_SUFFIX or "/" in suffix:
                raise ClipwrightError(
                    "E_CONFIG_VALUE",
                    "a text file cannot have this ending",
                    where=f"{prefix}text_suffixes: {suffix}",
                    found="an ending starts with a dot, has no slash, and .json is not text",
                    fix="give endings such as [.txt, .caption]",
                )
        encoding = check_encoding(config.encoding, f"{prefix}encoding")
        return cls(keys if captioned else (), captioned, config.text == "whole", suffixes, encoding, prefix)

    def identity(self) -> dict[str, Any]:
        return {
            "caption": list(self.keys) if self.captioned else NO_CAPTIONS,
            "text": "whole" if self.whole else "lines",
            "text_suffixes": list(self.text_suffixes),
            "encoding": self.encoding,
        }

    def split_name(self, name: str) -> tuple[str, int] | None:
        """Returns a caption file's name without its ending, and the ending's rank; None for another file.

        Text files rank in the order of `text_suffixes`, JSON files after them.
        """
        lower = name.lower()
        for rank, suffix in enumerate((*self.text_suffixes, JSON_SUFFIX)):
            if lower.endswith(suffix):
                return name[: -len(suffix)], rank
        return None

    def is_json(self, rank: int) -> bool:
        return rank == len(self.text_suffixes)

    def texts(self, data: bytes, name: str) -> list[Caption]:
        """Returns the captions of a text file. Raises CaptionFileError."""
        text = self._decode(data, name)
        # Not splitlines, which also splits at rare separators that may occur inside a caption.
        lines = [text] if self.whole else text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        return [line for line in lines if line.strip()]

    def read_object(self, data: bytes, name: str) -> dict[str, Any]:
        """Returns the object of a JSON file. Raises CaptionFileError."""
        try:
            value = parse_json(self._decode(data, name))
        except (ValueError, RecursionError) as error:
            if isinstance(error, CaptionFileError):
                raise
            raise CaptionFileError("E_CAP_FILE", f"{name} is not JSON: {str(error)[:200]}") from None
        if not isinstance(value, dict):
            raise CaptionFileError("E_CAP_FILE", f"{name} holds a {type(value).__name__}, expected an object")
        return value

    def caption_key(self, metadata: dict[str, Any]) -> str:
        """Returns the key whose value are the captions, or an empty text; the other keys are metadata."""
        return next((key for key in self.keys if metadata.get(key) is not None), "")

    def choose(self, texts: list[Caption], metadata: dict[str, Any], name: str) -> list[Caption]:
        """Returns the captions among those of the text files and those of the JSON file `name`."""
        key = self.caption_key(metadata)
        if not key:
            return texts
        value = metadata[key]
        if texts and not isinstance(value, list):
            return texts
        values = value if isinstance(value, list) else [value]
        return [_caption(item, key, name) for item in values if item is not None] or texts

    def _decode(self, data: bytes, name: str) -> str:
        try:
            text = data.decode("utf-8-sig" if self.encoding == "utf-8" else self.encoding)
        except UnicodeDecodeError as error:
            byte = f"byte {error.object[error.start]:#04x} at position {error.start}"
            likely = likely_encoding(error.object)
            detail = f"{name} is not {self.encoding} ({byte}); set {self.prefix}encoding={likely}"
            raise CaptionFileError("E_CAP_ENCODING", detail) from None
        if "\0" in text:  # UTF-16 without a byte order mark is valid UTF-8, with a zero byte beside every letter
            encoding = likely_encoding(data)
            detail = f"{name} is not text in {self.encoding}: it has zero bytes; set {self.prefix}encoding={encoding}"
            raise CaptionFileError("E_CAP_ENCODING", detail)
        return text


def parse_json(text: str) -> Any:
    """Parses JSON; NaN, infinities and numbers beyond float64 become null. Raises ValueError, RecursionError."""
    return json.loads(text, parse_constant=lambda _: None, parse_float=_finite_or_none)


def _finite_or_none(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def without_language(stem: str) -> str | None:
    """Returns a caption file's name without its language, `a` for `a.en`; None if it names none."""
    start, dot, language = stem.rpartition(".")
    return start if dot and start and _LANGUAGE.fullmatch(language) else None


def _caption(item: Any, key: str, name: str) -> Caption:
    """Returns a caption from a JSON file; an object or a list in its place is an error."""
    if isinstance(item, str):
        return item
    if isinstance(item, (int, float)) and not isinstance(item, bool):
        return str(item)
    kind = type(item).__name__
    return "E_CAP_FILE", f"{name} has a {kind} under {key!r}, expected text or a list of texts"
