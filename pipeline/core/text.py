"""How values that others wrote are echoed in a message: in one line, printable, and short."""

from __future__ import annotations

from clipwright.pipeline.core.messages import format_count

MAX_SHOWN = 200  # characters of one echoed value
MAX_LISTED = 20  # names of one echoed list


def valid_utf8(text: str) -> str:
    """Escapes lone surrogates, which JSON may contain and which represent invalid bytes in file names."""
    return text.encode("utf-8", "backslashreplace").decode()


def printable(text: str) -> str:
    """Escapes control characters and lone surrogates, so that a terminal shows them and does not obey them."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def shorten(text: str, limit: int = MAX_SHOWN) -> str:
    """Returns `text` in at most `limit` (60 or more) characters: a longer one loses its middle."""
    if len(text) <= limit:
        return text
    cut = f"… ({format_count(len(text), 'character')}) …"
    head = (limit - len(cut)) * 3 // 4
    tail = limit - len(cut) - head
    return f"{text[:head]}{cut}{text[-tail:]}"


def shown(value: object, limit: int = MAX_SHOWN) -> str:
    """Returns a value as a message echoes it: printable and shortened."""
    text = value if isinstance(value, str) else repr(value)
    return printable(shorten(text, limit))


def listed(names: list[str], limit: int = MAX_LISTED) -> str:
    """Returns names separated by commas; of a long list only the first, and how many more there are."""
    text = ", ".join(shown(name, 60) for name in names[:limit])
    return f"{text} and {len(names) - limit:,} more" if len(names) > limit else text
