"""The first check of a command line: do its config, keys and presets exist? Nothing is imported for it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipwright.pipeline.core import outline
from clipwright.pipeline.core.command import COMMANDS
from clipwright.pipeline.core.config_files import config_path, is_path, read_config, shipped_configs
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.hints import UnknownKey, unknown_preset, value_at
from clipwright.pipeline.core.overrides import parse_overrides
from clipwright.pipeline.core.written_yaml import Raw

Layer = tuple[str, Mapping[str, Any]]  # where it comes from, and its keys as they were written


def check_names(kind: str, *, verb: str, folder: str, config: str | None, overrides: Sequence[str]) -> None:
    """Checks the names in a config file and in overrides against the config class `MODULE:CLASS`.

    folder: the folder of configs/ in which `config` is looked up. Values are not checked, and nothing is checked with
    plugins, which may register what no file of ours names. Raises E_CONFIG_FILE, E_CONFIG_KEY, E_CONFIG_CHOICE,
    E_CONFIG_VALUE for an empty value, and E_USAGE.
    """
    layers: list[Layer] = []
    if config is not None:
        _check_config(kind, verb, folder, config)
        tree = read_config(config_path(folder, config))
        _check_verb_of(kind, config, tree)
        layers.append((config, tree))
    layers.append(("command line", parse_overrides(overrides)))
    if any("plugins" in layer for _, layer in layers):
        return
    try:
        _check_section(kind, layers, "")
    except UnknownKey as unknown:
        dataset = value_at([layer for _, layer in layers], "data", "train")
        raise unknown.error(outline.keys(kind), verb, dataset) from None


def _check_config(kind: str, verb: str, folder: str, config: str) -> None:
    """Raises an error for a CONFIG that is a key without its value, a folder, or a shipped config of another verb."""
    if config in shipped_configs().get(folder, {}) or (is_path(config) and Path(config).is_file()):
        return
    if config in outline.keys(kind) or config in outline.fields(kind):
        field = outline.fields(kind).get(config)
        is_section = field is not None and bool(field.section or field.registry)
        raise ClipwrightError(
            "E_USAGE",
            "a config key has no value",
            where=f"clipwright {verb} {config}",
            found=f"{config} is a key, not a config",
            fix=f"write {config}.KEY=VALUE" if is_section else f"write {config}=VALUE",
        )
    others = [other for other, spec in COMMANDS.items() if config in shipped_configs().get(spec.config_folder, {})]
    if others and not is_path(config):
        raise ClipwrightError(
            "E_CONFIG_FILE",
            f"there is no shipped {verb} config of this name",
            where=config,
            found=f"it is a config of {others[0]}",
            fix=f"use clipwright {others[0]} {config}",
        )
    if Path(config).exists():
        raise ClipwrightError(
            "E_USAGE",
            "a folder or file stands where a config is expected",
            where=f"clipwright {verb} {config}",
            found=f"{config} is a {'folder' if Path(config).is_dir() else 'file'}",
            fix=f"write it with its key, KEY={config}; clipwright {verb} --help lists the keys",
        )


def _check_verb_of(kind: str, config: str, tree: Mapping[str, Any]) -> None:
    """Raises E_CONFIG_FILE for a file whose keys are those of another verb's config."""
    keys = set(tree) - {"plugins"}
    if keys <= set(outline.fields(kind)):
        return
    verbs = [verb for verb, spec in COMMANDS.items() if spec.kind and keys <= set(outline.fields(spec.kind))]
    if verbs:
        raise ClipwrightError(
            "E_CONFIG_FILE",
            "the config is for another command",
            where=config,
            found=f"it has the keys {', '.join(sorted(keys))}",
            fix=f"use clipwright {verbs[0]} {config}",
        )


def _check_section(kind: str, layers: Sequence[Layer], place: str) -> None:
    known = outline.fields(kind)
    for origin, layer in layers:
        for key, value in layer.items():
            if key not in known:
                raise UnknownKey(place, key, origin, list(known), value)
    for key, field in known.items():
        values = [(origin, layer[key]) for origin, layer in layers if layer.get(key) is not None]
        inner = f"{place}.{key}" if place else key
        sections = [(origin, value) for origin, value in values if isinstance(value, Mapping)]
        if field.registry and not field.is_list:
            _check_choice(field, sections, inner)
        elif field.section:
            _check_section(field.section, sections, inner)
        else:
            _check_empty(field, values, inner)


def _check_choice(field: outline.FieldOutline, layers: Sequence[Layer], place: str) -> None:
    """Checks the preset that the layers choose, and the keys of the layers that are not dropped by a change of it."""
    name, start, named_by = field.default, 0, ""
    for number, (origin, layer) in enumerate(layers):
        if layer.get("name") is not None and str(layer["name"]) != name:
            name, start, named_by = str(layer["name"]), number, origin
    if name is None:
        return  # the value is missing: validation says so
    registry = outline.registry(field.registry)
    family = registry.family(name)
    if family is None:
        raise unknown_preset(registry.kind, name, registry.presets, f"{place}.name: {name} ({named_by})")
    if any(len(layer) > 1 or "name" not in layer for _, layer in layers[start:]):
        _check_section(family.config, layers[start:], place)


def _check_empty(field: outline.FieldOutline, values: Sequence[tuple[str, Any]], place: str) -> None:
    """Raises E_CONFIG_VALUE for an override without a value where no empty text is meant."""
    takes_text = re.search(r"\b(int|float|bool|Literal|None)\b", field.annotation) is None
    for origin, value in values:
        if isinstance(value, Raw) and not value and not (takes_text and field.has_default):
            null = ", or null" if "None" in field.annotation else ""
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "the config value is empty",
                where=f"{place} ({origin})",
                found=f"{place}= without a value",
                fix=f"write {place}=VALUE{null}, or leave it out",
            )
