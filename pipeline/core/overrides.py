"""`section.key=value` arguments."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.written_yaml import Raw


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Returns `section.key=value` arguments as a nested tree; its leaves are parsed when the field's type is known.

    Of several overrides of one key the last wins, so that a script can append the user's to its own.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        name, sign, text = override.partition("=")
        if not sign or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", name):
            raise ClipwrightError("E_USAGE", "an override is malformed", where=override, fix="write section.key=value")
        *sections, key = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ClipwrightError(
                    "E_USAGE",
                    "two overrides contradict each other",
                    where=override,
                    found=f"{section} has a value of its own",
                    fix="remove one of them",
                )
        node[key] = Raw(text)
    return tree
