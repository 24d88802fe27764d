"""Caption selection: normalized, each text once, invalid captions dropped."""

from __future__ import annotations

from collections.abc import Iterable

from clipwright.data_prep.sources.base import Caption
from clipwright.data_prep.sources.encodings import likely_encoding
from clipwright.pipeline.core.captions import CaptionError, normalize


def select_captions(captions: Iterable[Caption]) -> tuple[list[str], int]:
    """Returns the captions to keep, in order, and the number of invalid captions that were dropped.

    A repeated text is kept once and does not count as invalid. Raises the CaptionError of the first invalid caption
    if no caption is left.
    """
    kept: dict[str, None] = {}
    dropped = 0
    first_error: CaptionError | None = None
    for caption in captions:
        try:
            kept[normalize(_decode(caption))] = None
        except CaptionError as error:
            dropped += 1
            first_error = first_error or error
    if not kept:
        raise first_error or CaptionError("E_CAP_EMPTY", "no caption")
    return list(kept), dropped


def _decode(caption: Caption) -> str:
    if caption is None:
        raise CaptionError("E_CAP_EMPTY", "no caption")
    if isinstance(caption, tuple):
        raise CaptionError(*caption)
    if isinstance(caption, str):
        return caption
    try:
        return caption.decode("utf-8")
    except UnicodeDecodeError as error:
        likely = likely_encoding(caption)
        detail = f"not valid UTF-8 at byte {error.start}; if the file is {likely}, set source.encoding={likely}"
        raise CaptionError("E_CAP_ENCODING", detail) from None
