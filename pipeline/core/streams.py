"""The streams of a command: stdout carries its result and nothing else; notes, progress and errors go to stderr."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

# Control characters but tab and line feed, marks that change the direction of text, and lone surrogates.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_reserved: TextIO | None = None


class _Seen:
    """What the display of activities knows of messages and does around them."""

    last_message = 0.0  # on the monotonic clock
    around_message: Callable[[], AbstractContextManager[None]] = nullcontext


seen = _Seen()


def escape_controls(text: str) -> str:
    """Returns text that a terminal shows and does not obey: control characters become `\\x1b` and the like."""
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def result_stream() -> TextIO:
    """Returns the stdout that a command was started with."""
    return sys.stdout if _reserved is None else _reserved


def print_result(text: str) -> None:
    """Prints a part of a command's result on stdout."""
    _print(text, result_stream())


def print_note(text: object) -> None:
    """Prints a line for people on stderr. A reader that has gone, such as a killed launcher, changes nothing else."""
    with suppress(BrokenPipeError):
        _print(escape_controls(str(text)), sys.stderr)


def _print(text: str, stream: TextIO) -> None:
    with seen.around_message():
        print(text, file=stream, flush=True)
    seen.last_message = time.monotonic()


def print_warning(text: str) -> None:
    """Prints a warning on stderr, also with --quiet: it asks the user to act."""
    print_note(f"warning: {text}")


def json_line(value: Any) -> str:
    """Returns a command's result as one line of JSON: null for NaN and infinity, escapes for control characters."""
    text = json.dumps(_finite(value), sort_keys=True, ensure_ascii=False, allow_nan=False)
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


@contextmanager
def reserved_stdout(*, quiet: bool) -> Iterator[None]:
    """Reserves stdout for `print_result`; what libraries and workers print goes to stderr, if quiet nowhere."""
    global _reserved
    old = sys.stdout
    with suppress(OSError, ValueError):
        old.flush()
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        others = nowhere if quiet else sys.stderr
        saved, others_number = None, _number(others)
        if others_number is not None:
            with suppress(OSError):  # stdout is closed
                saved = os.dup(1)
                os.dup2(others_number, 1)
        # A test may have replaced sys.stdout by another file.
        stream = old
        if saved is not None and _number(old) == 1:
            stream = os.fdopen(os.dup(saved), "w", encoding=old.encoding, errors="backslashreplace")
        _reserved = stream
        sys.stdout = others
        try:
            yield
        finally:
            sys.stdout = old
            _reserved = None
            if stream is not old:
                with suppress(OSError):  # the reader has gone
                    stream.close()
            if saved is not None:
                os.dup2(saved, 1)
                os.close(saved)


def _number(stream: TextIO) -> int | None:
    """Returns the file descriptor of a stream, if it has one."""
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None
