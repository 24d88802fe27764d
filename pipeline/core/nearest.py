"""Suggestions for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SIMILAR = 0.7  # share of equal characters above which a name may be a misspelling of another


def nearest_name(name: str, known: Iterable[str], cutoff: float = SIMILAR) -> str:
    """Returns the known name that `name` is probably a misspelling of, in any case; empty if there is none."""
    names = {other.lower(): other for other in known}
    matches = difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=cutoff)
    return names[matches[0]] if matches else ""


def nearest(name: str, known: Iterable[str], cutoff: float = SIMILAR) -> str:
    """Returns `did you mean 'x'?`, or an empty string if no known name is similar."""
    match = nearest_name(name, known, cutoff)
    return f"did you mean '{match}'?" if match else ""
