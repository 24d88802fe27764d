"""What an unknown key, preset or flag probably means."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.nearest import nearest, nearest_name
from clipwright.pipeline.core.other_tools import SYNONYMS, TOOLS, Flag, equal_model, normalized

MAX_SUGGESTIONS = 3
MAX_LISTED = 12  # presets in an error; more are left to `clipwright list`
LISTS = {"image tower": "towers", "text tower": "towers"}  # kind of registry → what to list
EPOCHS = ("epochs", "num_epochs", "epoch", "num_train_epochs", "max_epochs")
# Of complete keys, more characters must be equal: they have their sections in common.
SIMILAR_KEY = 0.8


class UnknownKey(Exception):
    """A layer of a config sets a key that does not exist. `place`: its section; `siblings`: the keys that exist."""

    def __init__(self, place: str, key: str, origin: str, siblings: Sequence[str], value: Any) -> None:
        super().__init__(key)
        self.place, self.key, self.origin, self.siblings, self.value = place, key, origin, siblings, value

    @property
    def written(self) -> str:
        return f"{self.place}.{self.key}" if self.place else self.key

    def error(self, keys: Sequence[str], verb: str = "", dataset: object = None) -> ClipwrightError:
        """Returns E_CONFIG_KEY with the key that was probably meant; keys: all of the config; dataset: `data.train`."""
        if self.key in EPOCHS and "schedule.samples" in keys:
            fix = _epochs_hint(self.value, dataset)
        else:
            fix = self._suggestion(keys, verb)
        return ClipwrightError(
            "E_CONFIG_KEY",
            "the config key does not exist",
            where=f"{self.written} ({self.origin})",
            found=f"{self.place or 'the config'} has the keys {', '.join(self.siblings)}",
            fix=fix or (f"clipwright {verb} --help lists the keys" if verb else "remove it"),
        )

    def _suggestion(self, keys: Sequence[str], verb: str) -> str:
        inner = [f"{self.place}.{name}" if self.place else name for name in self.siblings]
        in_section = nearest_name(self.key, self.siblings, SIMILAR_KEY)
        if in_section:
            return f"did you mean '{inner[list(self.siblings).index(in_section)]}'?"
        foreign = foreign_hint(self.written, verb, keys) or foreign_hint(self.key, verb, keys)
        if foreign:
            meant = [key for key in keys if key.startswith(f"{self.place}.") and f"use {key}" == foreign]
            return f"{meant[0]} exists with another {self.place}.name" if meant and meant[0] not in inner else foreign
        same = [key for key in keys if key.rpartition(".")[2] == self.key]
        if 1 <= len(same) <= MAX_SUGGESTIONS:
            return f"did you mean {' or '.join(map(repr, same))}?"
        if self.place:
            return nearest(self.written, inner) if nearest_name(self.key, self.siblings) else ""
        return nearest(self.key, self.siblings) or nearest(self.written, keys, SIMILAR_KEY)


def foreign_hint(name: str, verb: str, keys: Sequence[str]) -> str:
    """Returns what a flag or key of another tool is called here; empty if it is unknown or not for this verb."""
    wanted = normalized(name)
    for flags in TOOLS.values():
        for flag in flags:
            if wanted in flag.names and _is_for(flag, verb, keys):
                return flag.advice
    key = SYNONYMS.get(wanted, "")
    if key and (key in keys or key == "-o"):
        return f"use {key}"
    return ""


def _is_for(flag: Flag, verb: str, keys: Sequence[str]) -> bool:
    return flag.verb == verb or (flag.key != "" and flag.key in keys)


def unknown_preset(kind: str, name: str, presets: Sequence[str], where: str) -> ClipwrightError:
    """Returns E_CONFIG_CHOICE for a preset that does not exist, with the nearest one, or the equal architecture."""
    equal = equal_model(name, presets)
    fix = f"use {equal}, the same architecture" if equal else nearest(name, presets)
    if not fix and len(presets) > MAX_LISTED:
        fix = f"see all: clipwright list {LISTS.get(kind, f'{kind}s')}"
    return ClipwrightError(
        "E_CONFIG_CHOICE",
        f"there is no {kind} of this name",
        where=where,
        fix=fix or f"choose one of {', '.join(presets)}",
    )


def flag_hint(flag: str, verb: str, keys: Sequence[str]) -> str:
    """Returns what to write instead of a flag that does not exist: `--batch-size` → `use schedule.global_batch`."""
    name = flag.lstrip("-").partition("=")[0]
    if name in keys:
        return f"write {name}=VALUE, without dashes"
    if normalized(name) in EPOCHS and "schedule.samples" in keys:
        return _epochs_hint(None, None)
    foreign = foreign_hint(name, verb, keys)
    if foreign:
        return foreign
    same = [key for key in keys if key.rpartition(".")[2] == normalized(name)]
    if 1 <= len(same) <= MAX_SUGGESTIONS:
        return f"write {' or '.join(f'{key}=VALUE' for key in same)}"
    return ""


def _epochs_hint(value: Any, dataset: object) -> str:
    """Returns how many samples so many epochs are, if the dataset is here; else how to find out."""
    how = "set schedule.samples to epochs × samples of the dataset; `clipwright data stats DATASET` prints them"
    samples = _samples(dataset)
    try:
        epochs = float(str(value))
    except ValueError:
        return how
    if samples is None or not 0 < epochs < 1e6:
        return how
    count = format_count(samples, "sample")
    return f"set schedule.samples={round(epochs * samples)}: {epochs:g} × the {count} of {dataset}"


def _samples(dataset: object) -> int | None:
    """Returns the number of samples that a local dataset folder states."""
    if not isinstance(dataset, str):
        return None
    try:
        manifest: Any = json.loads((Path(dataset) / "manifest.json").read_text(encoding="utf-8"))
        return int(manifest["written"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def value_at(layers: Sequence[Mapping[str, Any]], section: str, key: str) -> object:
    """Returns the value that the highest layer sets for `section.key`, as it was written."""
    for layer in reversed(layers):
        inner = layer.get(section)
        if isinstance(inner, Mapping) and key in inner:
            return inner[key]
    return None
