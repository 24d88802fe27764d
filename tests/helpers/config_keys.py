"""The keys of every command's config, as `clipwright config reference` lists them."""

from __future__ import annotations

import re
from functools import cache

import clipwright.cli  # noqa: F401  registers the verbs
from clipwright.pipeline.core.command import COMMANDS
from clipwright.pipeline.core.reference import reference

_HEADING = re.compile(r"^(#{2,5}) (.+)$")
_ROW = re.compile(r"^\| `([^`]+)` \|")


@cache
def config_keys(verb: str) -> frozenset[str]:
    """Returns the keys of a verb; those of one family of a registry as `image.patch (vit)`.

    Keys that an earlier verb describes (`doctor` has those of `train`) are not listed again.
    """
    keys: set[str] = set()
    current, family = "", ""
    for line in reference(COMMANDS).splitlines():
        heading, row = _HEADING.match(line), _ROW.match(line)
        if heading is not None:
            level, text = len(heading[1]), heading[2]
            if level == 2:
                current = text
            if level <= 4:
                family = text.partition(", family ")[2]
        elif row is not None and current == verb:
            keys.add(f"{row[1]} ({family})" if family else row[1])
    return frozenset(keys)
