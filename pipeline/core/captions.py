"""The one normal form of a caption, in which it is stored, compared, tokenized and searched."""

from __future__ import annotations

import re
import unicodedata

from clipwright.pipeline.core.messages import format_count

MAX_BYTES = 8192

# C0 and C1 control characters, and format characters that reorder or hide text (bidi overrides, zero-width no-break
# space). Joiners are kept: some scripts and emoji need them.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff]")
_SPACE = re.compile(r"\s+")


class CaptionError(ValueError):
    """A caption that is rejected; `args[0]` is its E_CAP code, `args[1]` the detail."""


def normalize(text: str) -> str:
    """Returns `text` in NFC, without control characters, white space collapsed.

    Raises CaptionError if it is empty, too long or has a lone surrogate.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CaptionError("E_CAP_ENCODING", f"not valid Unicode at character {error.start}") from None
    clean = _SPACE.sub(" ", _CONTROL.sub(" ", unicodedata.normalize("NFC", text))).strip()
    if not clean:
        raise CaptionError("E_CAP_EMPTY", "nothing but white space")
    size = len(clean.encode("utf-8"))
    if size > MAX_BYTES:
        raise CaptionError("E_CAP_LONG", f"{format_count(size, 'byte')}, {MAX_BYTES} allowed")
    return clean
