"""Configs: defaults < YAML file < overrides, validated against a frozen dataclass.

A choice from a registry is written `image: {name: vit_nano, depth: 6}`. Before validation it is expanded to the fields
of its preset. A layer that changes `name` drops what lower layers set there, so one override swaps the choice.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from clipwright.pipeline.core import outline
from clipwright.pipeline.core.config_files import config_path, read_config
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.hints import UnknownKey, value_at
from clipwright.pipeline.core.nearest import nearest
from clipwright.pipeline.core.overrides import parse_overrides
from clipwright.pipeline.core.plugins import load_plugins
from clipwright.pipeline.core.registry import Registry
from clipwright.pipeline.core.text import shown
from clipwright.pipeline.core.type_text import type_text
from clipwright.pipeline.core.values import ValueMismatch, bare_type, parse_flow, plain, read_value
from clipwright.pipeline.core.written_yaml import Raw, inline_yaml

T = TypeVar("T")


class Choice:
    """Marks a config field as a choice from `registry`: `Annotated[Base, Choice(REGISTRY, "default_name")]`.

    A list of choices is a field of type `tuple[Annotated[Base, Choice(REGISTRY)], ...]`. shared: fields of all families
    that keep their values from lower layers when a higher layer changes `name`.
    """

    def __init__(self, registry: Registry[Any], default: str | None = None, shared: Sequence[str] = ()) -> None:
        self.registry, self.default, self.shared = registry, default, shared

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        # Built when a config is loaded, not when its class is defined: plugins add families in between.
        kinds = tuple(entry.tagged for entry in self.registry.families)
        if len(kinds) == 1:
            return handler.generate_schema(kinds[0])
        return handler.generate_schema(Annotated[Union[kinds], Field(discriminator="name")])  # noqa: UP007


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """A validated config, the plain tree it was made from, and where each value was set."""

    value: T
    tree: dict[str, Any]
    origins: dict[str, str]
    plugins: list[dict[str, str]] = field(default_factory=list)

    def identity(self) -> dict[str, Any]:
        """Returns everything that decides the result: all but `runtime`; plugins by file name and content hash.

        Paths in it are as given; the code that owns a path replaces it by file name and content hash.
        """
        tree = {k: v for k, v in self.tree.items() if k not in ("runtime", "plugins")}
        return {**tree, "plugins": self.plugins} if self.plugins else tree

    def yaml(self) -> str:
        return yaml.safe_dump(self.tree, sort_keys=False, allow_unicode=True)

    def show(self) -> str:
        """Returns the values as one line of YAML each, with the origin as a comment."""
        lines = [
            (f"{key}: {inline_yaml(value)}", self.origins.get(key, "default"))
            for key, value in _leaves(self.tree, self.origins)
        ]
        width = min(max((len(line) for line, _ in lines), default=0), 72)
        return "\n".join(f"{line:<{width}}  # {origin}" for line, origin in lines)


def resolve(
    kind: type[T],
    *,
    verb: str = "",
    config: str | None = None,
    overrides: Sequence[str] = (),
    base: dict[str, Any] | None = None,
    partial: bool = False,
) -> Resolved[T]:
    """Merges preset, YAML file and overrides into a validated instance of `kind`.

    `base` is the lowest layer, for callers that have a tree (the config.yaml of a run folder). With `partial`, for
    `config show`, required values may be missing: they are `???` in the tree, and `value` must not be used. Raises
    E_CONFIG_FILE, E_CONFIG_KEY, E_CONFIG_CHOICE, E_CONFIG_VALUE, E_PLUGIN or E_USAGE.
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    folder = Path()
    if base is not None:
        layers.append(("base", dict(base)))
    if config is not None:
        path = config_path(verb, config)
        folder = path.parent
        layers.append((config, read_config(path)))
    layers.append(("command line", parse_overrides(overrides)))
    plugins = load_plugins(_plugin_paths(layers, folder))
    origins: dict[str, str] = {}
    try:
        tree = _merge(kind, layers, "", origins)
    except UnknownKey as unknown:
        dataset = value_at([layer for _, layer in layers], "data", "train")
        raise unknown.error(_known_keys(kind), verb, dataset) from None
    try:
        value = TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        problems = error.errors()
        missing = [problem["loc"] for problem in problems if problem["type"] == "missing"]
        wrong = [problem for problem in problems if problem["type"] != "missing"]
        if partial:
            problems = wrong
        elif not any(loc[: len(problem["loc"]) - 1] == problem["loc"][:-1] for problem in wrong for loc in missing):
            problems = wrong or problems  # what is wrong is reported before what is missing elsewhere
        if problems:
            raise _value_error(problems, tree, origins) from None
        value = cast(T, None)
        _mark_missing(error, tree, origins)
    if plugins:
        tree["plugins"] = [name for name, _ in plugins]
    hashes = [{"name": Path(name).name, "sha256": digest} for name, digest in plugins]
    return Resolved(value, tree, origins, hashes)


def _plugin_paths(layers: list[tuple[str, dict[str, Any]]], folder: Path) -> list[Path]:
    """Removes `plugins` from the layers; the highest layer that has it wins. In a file, paths are relative to it."""
    paths: list[Path] = []
    for origin, layer in layers:
        names = layer.pop("plugins", None)
        if names is None:
            continue
        names = _leaf(str | list[str], [(origin, names)], "plugins")
        names = names if isinstance(names, list) else [names]
        if not all(isinstance(name, str) and name for name in names):
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "the config value is not allowed",
                where=f"plugins ({origin})",
                found=f"{names!r} (allowed: a file, or a list of files)",
                fix="write plugins=FILE.py or plugins=[FILE.py, FILE.py]",
            )
        base = Path() if origin in ("command line", "base") else folder
        paths = [(base / name).resolve() for name in names]
    return paths


def _known_keys(kind: type[Any]) -> list[str]:
    """Returns all keys of a config as far as its source can be read; only hints need them."""
    try:
        return outline.keys(f"{kind.__module__}:{kind.__qualname__}")
    except (AssertionError, KeyError, LookupError, ImportError, OSError, ValueError):
        return []


def _section_layers(
    values: list[tuple[str, Any]], place: str, registry: Registry[Any] | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """Returns the layers of a section: an empty one sets nothing, and an override may give it as `{key: value}`.

    registry: of the choice that the section is.
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    for origin, value in values:
        if isinstance(value, Raw) and value.startswith("{"):
            try:
                value = parse_flow(value)  # its values are read with the types of the section's fields
            except ValueMismatch as mismatch:
                raise _not_allowed(place, origin, value, str(mismatch), "a section") from None
        if value is None:
            continue
        if not isinstance(value, dict):
            is_preset = registry is not None and str(value) in registry.entries
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "a section must be a mapping",
                where=f"{place or 'config'} ({origin})",
                found=repr(str(value)),
                fix=f"write {place}.name={value}" if is_preset else f"set the keys in it: {place}.key=value",
            )
        layers.append((origin, value))
    return layers


def _merge(kind: type[Any], layers: list[tuple[str, Any]], place: str, origins: dict[str, str]) -> dict[str, Any]:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = get_type_hints(kind, include_extras=True)
    layers = _section_layers(layers, place)
    for origin, layer in layers:
        for key in layer:
            if key not in fields:
                raise UnknownKey(place, str(key), origin, list(fields), layer[key])
    tree: dict[str, Any] = {}
    for name, spec in fields.items():
        values = [(origin, layer[name]) for origin, layer in layers if name in layer]
        where = _join(place, name)
        choice = choice_of(hints[name])
        if choice is not None:
            tree[name] = _merge_choice(choice, values, where, origins)
        elif values and (element := list_choice(hints[name])) is not None:
            tree[name] = _merge_choice_list(hints[name], element, values, where, origins)
        elif dataclasses.is_dataclass(section := bare_type(hints[name])):
            tree[name] = _merge(section, values, where, origins)  # pyright: ignore[reportArgumentType]
        elif values:
            tree[name] = _leaf(hints[name], values, where)
            origins[where] = values[-1][0]
        elif (default := _default(spec)) is not dataclasses.MISSING:
            tree[name] = read_value(hints[name], default)
            origins[where] = "default"
    return tree


def _merge_choice(choice: Choice, values: list[tuple[str, Any]], place: str, origins: dict[str, str]) -> dict[str, Any]:
    name, start, named_by = choice.default, 0, "default"
    values = _section_layers(values, place, choice.registry)
    for i, (origin, layer) in enumerate(values):
        if "name" in layer and str(layer["name"]) != name:
            name, start, named_by = str(layer["name"]), i, origin
    if name is None:
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            f"no {choice.registry.kind} is chosen",
            where=f"{place}.name",
            fix=f"choose one of {', '.join(choice.registry.entries)}",
        )
    entry = choice.registry.entry(name)
    preset = (f"preset {name}", dict(entry.presets[name]))
    kept = [(origin, {k: v for k, v in layer.items() if k in choice.shared}) for origin, layer in values[:start]]
    tree = _merge(entry.tagged, [preset, *kept, *values[start:], (named_by, {"name": name})], place, origins)
    return {"name": tree.pop("name"), **tree}


def _merge_choice_list(
    hint: Any, choice: Choice, values: list[tuple[str, Any]], place: str, origins: dict[str, str]
) -> Any:
    """Expands each element of a list of choices; the highest layer replaces the complete list."""
    origin = origins[place] = values[-1][0]
    value = _leaf(hint, values[-1:], place)
    if not isinstance(value, list | tuple):
        return value  # validation refuses it
    return [_merge_choice(choice, [(origin, item)], f"{place}.{i}", origins) for i, item in enumerate(value)]


def _leaf(hint: Any, values: list[tuple[str, Any]], place: str) -> Any:
    merged: Any = None
    for origin, value in values:
        try:
            found = read_value(hint, value)
        except ValueMismatch as mismatch:
            raise _not_allowed(place, origin, value, str(mismatch), type_text(hint)) from None
        # `where.split=train` adds to the mapping of a lower layer; any other value replaces that of a lower layer.
        if isinstance(found, dict) and isinstance(merged, dict):
            merged = {**merged, **found}
        else:
            merged = found
    return merged


def _not_allowed(place: str, origin: str, value: Any, mismatch: str, allowed: str) -> ClipwrightError:
    shown = "an empty value" if value is None or value == "" else repr(plain(value))
    return ClipwrightError(
        "E_CONFIG_VALUE",
        "the config value is not allowed",
        where=f"{place} ({origin})",
        found=f"{shown} {mismatch} (allowed: {allowed})",
        fix="change the value",
    )


def _location(problem: Any, tree: dict[str, Any]) -> tuple[list[str], Any]:
    """Returns the keys that lead to a pydantic error, without the tags of unions, and the value there."""
    node: Any = tree
    keys: list[str] = []
    for key in problem["loc"]:
        in_mapping = isinstance(node, dict) and key in node
        in_list = isinstance(node, list) and isinstance(key, int) and key < len(node)
        if in_mapping or in_list:
            node = cast(Any, node)[key]
            keys.append(str(key))
    if problem["type"] == "missing":
        keys.append(str(problem["loc"][-1]))
    return keys, node


def _value_error(errors: list[ErrorDetails], tree: dict[str, Any], origins: dict[str, str]) -> ClipwrightError:
    # A field that may be a text or a list of sections gives one error per alternative: the deepest one is reported.
    parent = errors[0]["loc"][:-1]
    same_field = [problem for problem in errors if problem["loc"][: len(parent)] == parent]
    deepest = max(same_field, key=lambda problem: len(_location(problem, tree)[0]))
    keys, value = _location(deepest, tree)
    key = ".".join(keys)
    if deepest["type"] == "missing":
        numbers = [number for number, part in enumerate(keys) if part.isdigit()]
        # An element of a list has no key of its own.
        fix = f"give every element of {'.'.join(keys[: numbers[-1]])} its {keys[-1]}" if numbers else f"set {key}=…"
        return ClipwrightError("E_CONFIG_VALUE", "a required config value is missing", where=key, fix=fix)
    names = re.findall(r"'([^']*)'", str(deepest.get("ctx", {}).get("expected", "")))
    return ClipwrightError(
        "E_CONFIG_VALUE",
        "the config value is not allowed",
        where=f"{key} ({origins.get(key, 'config')})",
        found=f"{shown(repr(value))}: {deepest['msg']}",
        fix=(nearest(value, names) if isinstance(value, str) else "") or "change the value",
    )


def _mark_missing(error: ValidationError, tree: dict[str, Any], origins: dict[str, str]) -> None:
    for problem in error.errors():
        keys, section = _location(problem, tree)
        section[keys[-1]] = "???"
        origins[".".join(keys)] = "required"


def schema(kind: type[Any]) -> dict[str, Any]:
    """Returns the JSON schema of a config, for editors."""
    return TypeAdapter(kind).json_schema()


def choice_of(hint: Any) -> Choice | None:
    """Returns the `Choice` that a type is annotated with."""
    return next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Choice)), None)


def list_choice(hint: Any) -> Choice | None:
    """Returns the `Choice` of the elements of a list type."""
    arguments = get_args(hint)
    return choice_of(arguments[0]) if get_origin(hint) is tuple and len(arguments) == 2 else None


def _default(spec: dataclasses.Field[Any]) -> Any:
    if spec.default is not dataclasses.MISSING:
        return spec.default
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return dataclasses.MISSING


def _join(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)


def _leaves(tree: dict[str, Any], origins: dict[str, str], place: str = "") -> Iterable[tuple[str, Any]]:
    """Yields every value that has an origin: a mapping that was set as a whole is one value."""
    for key, value in tree.items():
        where = _join(place, key)
        if isinstance(value, dict) and where not in origins:
            yield from _leaves(value, origins, where)
        else:
            yield where, value
