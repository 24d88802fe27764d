"""Which captions of a row are kept: in the one normal form, each text once, bad ones left out."""

from __future__ import annotations

from collections.abc import Iterable

from clipwright.data_prep.sources.base import Caption
from clipwright.pipeline.core.captions import CaptionError, normalise


def choose(texts: Iterable[Caption]) -> tuple[list[str], int]:
    """The captions to keep, in order, and how many were dropped as bad.

    A repeated text is kept once and is not bad. Raises CaptionError, that of the first bad caption, when none is
    left.
    """
    kept: dict[str, None] = {}
    dropped = 0
    first: CaptionError | None = None
    for text in texts:
        try:
            kept[normalise(_text(text))] = None
        except CaptionError as error:
            dropped += 1
            first = first or error
    if not kept:
        raise first or CaptionError("E_CAP_EMPTY", "no caption")
    return list(kept), dropped


def _text(text: Caption) -> str:
    if text is None:
        raise CaptionError("E_CAP_EMPTY", "no caption")
    if isinstance(text, tuple):
        raise CaptionError(*text)
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CaptionError("E_CAP_ENCODING", f"not valid UTF-8 at byte {error.start}") from None
