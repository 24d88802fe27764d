"""Suggestions for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `did you mean 'x'?`, or an empty string if no known name is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean '{matches[0]}'?" if matches else ""
