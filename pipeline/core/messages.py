"""How counts, durations and command lines are written in messages."""

from __future__ import annotations

import shlex
from pathlib import Path


def format_count(count: int, noun: str, plural: str = "") -> str:
    """Returns `1 shard`, `2 shards` or `1,204 shards`; `plural` is given where it is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def format_duration(seconds: float) -> str:
    """Returns `42s`, `2m28s` or `25h16m`, rounded to the last unit shown."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    return f"{total // 3600}h{total % 3600 // 60:02d}m"


def command_line(*words: str | Path) -> str:
    """Returns `clipwright WORDS` as a shell takes it: words are quoted, a path that looks like a flag gets `./`."""
    texts = [f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word) for word in words]
    return shlex.join(["clipwright", *texts])
