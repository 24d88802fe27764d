"""Configs: defaults < YAML file < overrides, checked against a part's own frozen dataclass.

A choice from a registry is written `image: {name: vit_nano, depth: 6}`. Before validation it is expanded to its
preset's fields; a layer that changes `name` drops what lower layers set there, so a swap is one override.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.nearest import nearest
from clipwright.pipeline.core.plugins import load_plugins
from clipwright.pipeline.core.registry import Registry

T = TypeVar("T")


class Choice:
    """Marks a config field as a choice from `registry`: `Annotated[Base, Choice(REGISTRY, "default_name")]`.

    A list of choices is a field of type `tuple[Annotated[Base, Choice(REGISTRY)], ...]`. shared: fields of all families
    that keep their values from lower layers when a higher layer changes `name`.
    """

    def __init__(self, registry: Registry[Any], default: str | None = None, shared: Sequence[str] = ()) -> None:
        self.registry, self.default, self.shared = registry, default, shared

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        # Built when a config is loaded, not when the class is defined: plugins add families in between.
        kinds = tuple(entry.tagged for entry in self.registry.families)
        if len(kinds) == 1:
            return handler.generate_schema(kinds[0])
        return handler.generate_schema(Annotated[Union[kinds], Field(discriminator="name")])  # noqa: UP007


class Raw(str):
    """An override's text: how it is read depends on the field it meets."""


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """A validated config with the plain tree it came from and where each value was set."""

    value: T
    tree: dict[str, Any]
    origins: dict[str, str]
    plugins: list[dict[str, str]] = field(default_factory=list)

    def identity(self) -> dict[str, Any]:
        """What decides the result: all but `runtime`; plugins by file name and content hash.

        Paths in it are still as given; the part that owns a path replaces it by name and content hash.
        """
        tree = {k: v for k, v in self.tree.items() if k not in ("runtime", "plugins")}
        return {**tree, "plugins": self.plugins} if self.plugins else tree

    def yaml(self) -> str:
        return yaml.safe_dump(self.tree, sort_keys=False, allow_unicode=True)

    def show(self) -> str:
        """The resolved values as YAML, each with its origin as a comment."""
        lines = []
        for place, value in _leaves(self.tree, self.origins):
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
            text = text.removesuffix("\n").removesuffix("\n...")
            lines.append((f"{place}: {text}", self.origins.get(place, "default")))
        width = min(max((len(left) for left, _ in lines), default=0), 72)
        return "\n".join(f"{left:<{width}}  # {origin}" for left, origin in lines)


def config_path(verb: str, config: str) -> Path:
    """CONFIG with a `/` or ending in .yaml is a path, else a shipped config of this verb."""
    if "/" in config or config.endswith((".yaml", ".yml")):
        path = Path(config)
        if not path.is_file():
            raise ClipwrightError(
                "E_CONFIG_FILE", "no config file", where=config, found="the file is missing", fix="check the path"
            )
        return path
    names = shipped_configs().get(verb, {})
    if config not in names:
        raise ClipwrightError(
            "E_CONFIG_FILE",
            f"no shipped {verb} config of this name",
            where=config,
            found=f"there are {', '.join(sorted(names)) or 'none'}",
            fix=nearest(config, names) or "give a path with a / or ending in .yaml",
        )
    return names[config]


def shipped_configs() -> dict[str, dict[str, Path]]:
    """verb → name → path of the configs inside the package; a verb's folder may have folders for groups of them."""
    root = Path(str(resources.files("clipwright") / "configs"))
    return {
        folder.name: {path.stem: path for path in sorted(folder.rglob("*.yaml"))}
        for folder in sorted(root.iterdir())
        if folder.is_dir()
    }


def resolve(
    kind: type[T],
    *,
    verb: str = "",
    config: str | None = None,
    overrides: Sequence[str] = (),
    base: dict[str, Any] | None = None,
    partial: bool = False,
) -> Resolved[T]:
    """Merges preset, YAML and overrides into a validated `kind`.

    `base` is a lowest layer, for callers that hold a tree already (a run folder's config.yaml). `partial` lets
    required values be missing, for `config show`: they stand as `???` and `value` is not to be used. Raises
    E_CONFIG_FILE, E_CONFIG_KEY, E_CONFIG_CHOICE, E_CONFIG_VALUE, E_PLUGIN or E_USAGE.
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    folder = Path()
    if base is not None:
        layers.append(("base", dict(base)))
    if config is not None:
        path = config_path(verb, config)
        folder = path.parent
        layers.append((config, read_yaml(path)))
    layers.append(("command line", parse_overrides(overrides)))
    plugins = load_plugins(_plugin_paths(layers, folder))
    origins: dict[str, str] = {}
    tree = _merge(kind, layers, "", origins)
    try:
        value = TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        if not partial or any(found["type"] != "missing" for found in error.errors()):
            raise _value_error(error, tree, origins) from None
        value = cast(T, None)
        _mark_missing(error, tree, origins)
    if plugins:
        tree["plugins"] = [name for name, _ in plugins]
    hashes = [{"name": Path(name).name, "sha256": digest} for name, digest in plugins]
    return Resolved(value, tree, origins, hashes)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ClipwrightError(
            "E_CONFIG_FILE", "a config that is not YAML", where=path, found=str(error), fix="mend the file"
        ) from None
    if not isinstance(tree, dict):
        raise ClipwrightError(
            "E_CONFIG_FILE",
            "a config that is not a mapping",
            where=path,
            found=f"a {type(tree).__name__}",
            fix="write `section: {key: value}`",
        )
    return tree


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`section.key=value` words as a nested tree whose leaves wait for their field's type."""
    tree: dict[str, Any] = {}
    for word in overrides:
        name, sign, text = word.partition("=")
        if not sign or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", name):
            raise ClipwrightError(
                "E_USAGE", "not an override", where=word, found="no key=value", fix="write section.key=value"
            )
        node, *rest = tree, *name.split(".")
        for part in rest[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ClipwrightError(
                    "E_USAGE", "two overrides collide", where=word, found="a key below a value", fix="drop one of them"
                )
        node[rest[-1]] = Raw(text)
    return tree


def _plugin_paths(layers: list[tuple[str, dict[str, Any]]], folder: Path) -> list[Path]:
    """Takes `plugins` out of the layers; the highest that names any wins. A config file's are relative to it."""
    paths: list[Path] = []
    for origin, layer in layers:
        names = layer.pop("plugins", None)
        if names is not None:
            names = yaml.safe_load(names) if isinstance(names, Raw) else names
            base = Path() if origin in ("command line", "base") else folder
            paths = [(base / name).resolve() for name in ([names] if isinstance(names, str) else names)]
    return paths


def _merge(kind: type[Any], layers: list[tuple[str, Any]], place: str, origins: dict[str, str]) -> dict[str, Any]:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = get_type_hints(kind, include_extras=True)
    for origin, layer in layers:
        if not isinstance(layer, dict):
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "a section that is not a mapping",
                where=f"{place or 'config'} ({origin})",
                found=repr(str(layer)),
                fix=f"set its keys: {place}.key=value",
            )
        for key in layer:
            if key not in fields:
                raise ClipwrightError(
                    "E_CONFIG_KEY",
                    "unknown config key",
                    where=f"{_join(place, key)} ({origin})",
                    found=f"{place or 'the config'} has the keys {', '.join(fields)}",
                    fix=nearest(str(key), fields) or "remove it",
                )
    tree: dict[str, Any] = {}
    for name, spec in fields.items():
        set_here = [(origin, layer[name]) for origin, layer in layers if name in layer]
        where = _join(place, name)
        choice = _choice(hints[name])
        if choice is not None:
            tree[name] = _merge_choice(choice, set_here, where, origins)
        elif set_here and (element := list_choice(hints[name])) is not None:
            tree[name] = _merge_choice_list(hints[name], element, set_here, where, origins)
        elif dataclasses.is_dataclass(section := _bare(hints[name])):
            tree[name] = _merge(section, set_here, where, origins)  # pyright: ignore[reportArgumentType]
        elif set_here:
            tree[name] = _leaf(hints[name], set_here, where)
            origins[where] = set_here[-1][0]
        elif (default := _default(spec)) is not dataclasses.MISSING:
            tree[name] = default
            origins[where] = "default"
    return tree


def _merge_choice(
    choice: Choice, set_here: list[tuple[str, Any]], place: str, origins: dict[str, str]
) -> dict[str, Any]:
    name, start, named_by = choice.default, 0, "default"
    for i, (origin, layer) in enumerate(set_here):
        if not isinstance(layer, dict):
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "a choice that is not a mapping",
                where=f"{place} ({origin})",
                found=repr(str(layer)),
                fix=f"write {place}.name={layer}",
            )
        if "name" in layer and str(layer["name"]) != name:
            name, start, named_by = str(layer["name"]), i, origin
    if name is None:
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            f"no {choice.registry.kind} chosen",
            where=f"{place}.name",
            found="nothing",
            fix=f"choose one of {', '.join(choice.registry.entries)}",
        )
    entry = choice.registry.entry(name)
    preset = (f"preset {name}", dict(entry.presets[name]))
    kept = [(origin, {k: v for k, v in layer.items() if k in choice.shared}) for origin, layer in set_here[:start]]
    tree = _merge(entry.tagged, [preset, *kept, *set_here[start:], (named_by, {"name": name})], place, origins)
    return {"name": tree.pop("name"), **tree}


def _merge_choice_list(
    hint: Any, choice: Choice, set_here: list[tuple[str, Any]], place: str, origins: dict[str, str]
) -> Any:
    """Expands each element of a list of choices; the highest layer replaces the whole list."""
    origin = origins[place] = set_here[-1][0]
    value = _leaf(hint, set_here, place)
    if not isinstance(value, list):
        return value  # validation refuses it
    return [_merge_choice(choice, [(origin, item)], f"{place}.{i}", origins) for i, item in enumerate(value)]


def _leaf(hint: Any, set_here: list[tuple[str, Any]], place: str) -> Any:
    merged: Any = None
    for _, value in set_here:
        parsed = _parse(hint, value)
        # `where.split=train` adds to a mapping that a lower layer wrote; everything else is replaced whole.
        both = isinstance(parsed, dict) and isinstance(merged, dict)
        merged = {**merged, **parsed} if both else parsed
    return merged


def _parse(hint: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _parse(Any, item) for key, item in value.items()}
    if not isinstance(value, Raw):
        return value
    kinds = {_bare(arg) for arg in get_args(_bare(hint))} if _is_union(_bare(hint)) else {_bare(hint)}
    plain = str(value)
    looks_like_list = any(get_origin(kind) is list for kind in kinds) and plain.startswith("[")
    looks_like_none = type(None) in kinds and plain in ("null", "~")
    if str in kinds and not looks_like_list and not looks_like_none:
        return plain
    try:
        return yaml.safe_load(plain)
    except yaml.YAMLError:
        return plain


def _place(found: Any, tree: dict[str, Any]) -> tuple[list[str], Any]:
    """The keys of a pydantic error's place, without the tags of unions, and the value found there."""
    node: Any = tree
    parts: list[str] = []
    for part in found["loc"]:
        inside = isinstance(node, dict) and part in node
        if inside or (isinstance(node, list) and isinstance(part, int) and part < len(node)):
            node = cast(Any, node)[part]
            parts.append(str(part))
    if found["type"] == "missing":
        parts.append(str(found["loc"][-1]))
    return parts, node


def _value_error(error: ValidationError, tree: dict[str, Any], origins: dict[str, str]) -> ClipwrightError:
    errors = error.errors()
    # Of a field that may be a text or a list of sections, what is wrong inside the list says more than that it is none.
    same = [other for other in errors if other["loc"][: len(errors[0]["loc"]) - 1] == errors[0]["loc"][:-1]]
    first = max(same, key=lambda other: len(_place(other, tree)[0]))
    parts, value = _place(first, tree)
    place = ".".join(parts)
    if first["type"] == "missing":
        found, fix = "no value", f"set it: {place}=…"
    else:
        found, fix = f"{value!r}: {first['msg']}", "change the value"
    return ClipwrightError(
        "E_CONFIG_VALUE",
        "a config value that is not allowed",
        where=f"{place} ({origins.get(place, 'config')})",
        found=found,
        fix=fix,
    )


def _mark_missing(error: ValidationError, tree: dict[str, Any], origins: dict[str, str]) -> None:
    for found in error.errors():
        parts, section = _place(found, tree)
        section[parts[-1]] = "???"
        origins[".".join(parts)] = "required"


def schema(kind: type[Any]) -> dict[str, Any]:
    """JSON schema of a config, for editors."""
    return TypeAdapter(kind).json_schema()


def _choice(hint: Any) -> Choice | None:
    return next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Choice)), None)


def list_choice(hint: Any) -> Choice | None:
    """The choice that each element of a list is, if it is one."""
    arguments = get_args(hint)
    return _choice(arguments[0]) if get_origin(hint) is tuple and len(arguments) == 2 else None


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _default(spec: dataclasses.Field[Any]) -> Any:
    if spec.default is not dataclasses.MISSING:
        return spec.default
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return dataclasses.MISSING


def _join(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)


def _leaves(tree: dict[str, Any], origins: dict[str, str], place: str = "") -> Iterable[tuple[str, Any]]:
    """Every value that has an origin: a mapping that was set as a whole is one value."""
    for key, value in tree.items():
        where = _join(place, key)
        if isinstance(value, dict) and where not in origins:
            yield from _leaves(value, origins, where)
        else:
            yield where, value
