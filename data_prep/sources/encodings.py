"""Text encodings: names that Python knows, byte order marks, and the encoding that a file most likely has."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable
from dataclasses import dataclass

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.text import shown

# Longest first: the mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SAMPLE_BYTES = 1 << 16
_HIGH_BYTES = re.compile(rb"[\x80-\xff]+")
_MIN_SHARE = 0.8  # of the letters outside ASCII that must be of the encoding's script
_MIN_TYPICAL_SHARE = 0.03


def check_encoding(name: str, key: str = "source.encoding") -> str:
    """Returns Python's name of an encoding. Raises E_CONFIG_VALUE if there is none, or if it does not encode text.

    key: the config key that names it, for the message.
    """
    try:
        io.TextIOWrapper(io.BytesIO(), encoding=name)  # refuses codecs that do not encode text
        return codecs.lookup(name).name
    except (LookupError, ValueError) as error:
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "the encoding is unknown",
            where=f"{key}: {shown(name)}",
            found=shown(str(error)),
            fix="use an encoding of Python, such as utf-8, cp949, latin-1, shift_jis or utf-16",
        ) from None


def byte_order_mark(data: bytes) -> tuple[str, int]:
    """Returns the encoding that a byte order mark at the start states, and the mark's length; else ("", 0)."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return encoding, len(mark)
    return "", 0


def likely_encoding(data: bytes) -> str:
    """Returns the encoding that a text most likely has.

    Judged by the script: a wrong encoding gives characters of several scripts, or none at all.
    """
    data = data[:_SAMPLE_BYTES]
    marked, _ = byte_order_mark(data)
    if marked:
        return marked.removesuffix("-le").removesuffix("-be")  # the mark itself tells the byte order
    zeros = (data[0::2].count(0), data[1::2].count(0))
    if max(zeros) > len(data) // 8:
        return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    if _decode(data, "utf-8"):
        return "utf-8"
    runs = _HIGH_BYTES.findall(data)
    # In languages of the Latin script, letters outside ASCII mostly stand alone.
    if sum(map(len, runs)) >= 1.5 * len(runs):
        for script in _SCRIPTS:
            if script.matches(_decoded_letters(data, script.encoding)):
                return script.encoding
    return "cp1252" if re.search(rb"[\x80-\x9f]", data) else "latin-1"


@dataclass(frozen=True)
class _Script:
    """What text looks like in the right encoding: most letters satisfy `belongs`, and a few are among `typical`."""

    encoding: str
    belongs: Callable[[str], bool]
    typical: Callable[[str], bool] | None = None

    def matches(self, letters: str) -> bool:
        if sum(map(self.belongs, letters)) < max(_MIN_SHARE * len(letters), 1):
            return False
        return self.typical is None or sum(map(self.typical, letters)) >= _MIN_TYPICAL_SHARE * len(letters)


def _decode(data: bytes, encoding: str) -> str:
    """Returns the decoded text, or an empty string if the data has not this encoding."""
    try:
        # A sample of a longer text may end inside a character.
        return codecs.getincrementaldecoder(encoding)().decode(data, final=len(data) < _SAMPLE_BYTES)
    except UnicodeDecodeError:
        return ""


def _decoded_letters(data: bytes, encoding: str) -> str:
    """Returns the letters outside ASCII, and what cannot be printed."""
    text = _decode(data, encoding)
    return "".join(letter for letter in text if letter > "\x7f" and (letter.isalpha() or not letter.isprintable()))


def _is_between(*ranges: str) -> Callable[[str], bool]:
    return lambda letter: any(first <= letter <= last for first, last in ranges)


def _encodes_as(encoding: str, first_lead: int, last_lead: int) -> Callable[[str], bool]:
    """Whether a character is among the common ones of a Chinese encoding, which stand under these lead bytes."""

    def belongs(letter: str) -> bool:
        code = letter.encode(encoding, "ignore")
        return len(code) == 2 and first_lead <= code[0] <= last_lead

    return belongs


_KANA = _is_between("ぁヿ")
_CYRILLIC = _is_between("ая", "ёё")  # lower-case letters, which tell encodings of one script apart

# In the order of the tests: an encoding with a narrow script before those that accept nearly all bytes.
_SCRIPTS = (
    _Script("cp949", _is_between("가힣")),
    _Script("euc_jp", _is_between("ぁヿ", "一龥"), _KANA),
    _Script("shift_jis", _is_between("ぁヿ", "一龥"), _KANA),
    _Script("gb18030", _encodes_as("gb2312", 0xB0, 0xD7)),
    _Script("big5", _encodes_as("big5", 0xA4, 0xC6)),
    _Script("cp1255", _is_between("את")),
    _Script("cp1253", _is_between("άώ"), _is_between("άί")),
    _Script("cp1251", _CYRILLIC),
    _Script("koi8_r", _CYRILLIC),
    _Script("cp1256", _is_between("ءي")),
    _Script("tis_620", _is_between("ก๛")),
)
