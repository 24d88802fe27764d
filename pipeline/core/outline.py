"""Sections, keys and presets of configs, read from the source without importing it.

A config class lives beside the code that it configures, which may import torch for seconds. Help, hints, `list` and the
first check of a command line need names only, so they parse the files. `tests/unit/pipeline/core/test_outline.py`
compares the result with the imported classes and registries.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from clipwright.pipeline.core.field_docs import class_ast, classes_of, documented_fields, imports_of, module_ast


@dataclass(frozen=True)
class FieldOutline:
    """One field of a config class: what it is, and what it leads to."""

    name: str
    doc: str
    annotation: str
    """Its type as written in the source."""
    section: str = ""
    """MODULE:CLASS if it is a section."""
    registry: str = ""
    """MODULE:NAME of the registry if it is a choice."""
    base: str = ""
    """MODULE:CLASS with the keys that all its families share."""
    default: str | None = None
    """The preset that is chosen by default."""
    is_list: bool = False
    """Whether it is a list of choices or sections."""
    has_default: bool = False
    """Whether it may be left out."""


@dataclass(frozen=True)
class FamilyOutline:
    """One family of a registry."""

    config: str
    """MODULE:CLASS of its config."""
    family: str
    source: str
    presets: tuple[str, ...]


@dataclass(frozen=True)
class RegistryOutline:
    """The families of a registry, in no particular order."""

    kind: str
    families: list[FamilyOutline] = field(default_factory=list)

    def family(self, preset: str) -> FamilyOutline | None:
        """Returns the family that has a preset."""
        return next((family for family in self.families if preset in family.presets), None)

    @property
    def presets(self) -> list[str]:
        return [preset for family in self.families for preset in family.presets]


@cache
def fields(name: str) -> dict[str, FieldOutline]:
    """Returns the fields of the config class `MODULE:CLASS`, those of its bases first."""
    module, _, class_name = name.partition(":")
    file = _file(module)
    node = class_ast(file, class_name)
    found: dict[str, FieldOutline] = {}
    for base in reversed(node.bases):  # the order in which a dataclass collects its fields
        target = _target(module, base)
        if target is not None:
            found.update(fields(target))
    declared = {
        statement.target.id: statement
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
    for key, doc in documented_fields(node).items():
        found[key] = _field(module, key, doc, declared[key])
    return found


@cache
def registry(name: str) -> RegistryOutline:
    """Returns what the modules of a registry's package add to the registry `MODULE:NAME`."""
    module, _, variable = name.partition(":")
    kind, package = _registry_arguments(module, variable)
    outline = RegistryOutline(kind)
    root = _file(package).parent
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        inner = ".".join([package, *(part for part in parts if part != "__init__")])
        outline.families.extend(_added_families(inner, path, name, package))
    return outline


def keys(name: str) -> list[str]:
    """Returns all keys of the config class `MODULE:CLASS`, dotted, those of every family of a choice included."""
    return list(dict.fromkeys(_keys(name, "")))


def _keys(name: str, place: str) -> Iterator[str]:
    for key, outline in fields(name).items():
        inner = f"{place}{key}"
        if outline.registry and not outline.is_list:
            for family in registry(outline.registry).families:
                yield from _keys(family.config, f"{inner}.")
        elif outline.section and not outline.is_list:
            yield from _keys(outline.section, f"{inner}.")
        else:
            yield inner


def _field(module: str, name: str, doc: str, node: ast.AnnAssign) -> FieldOutline:
    annotation = _expanded(module, node.annotation)
    has_default = node.value is not None
    written = ast.unparse(annotation)
    is_list = isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) in ("tuple", "list")
    for inner in ast.walk(annotation):
        if not isinstance(inner, ast.Tuple) or len(inner.elts) != 2:
            continue
        base, call = inner.elts
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "Choice":
            target = _target(module, call.args[0])
            assert target is not None, written
            default = ast.literal_eval(call.args[1]) if len(call.args) > 1 else None
            return FieldOutline(
                name,
                doc,
                written,
                registry=target,
                base=_target(module, base) or "",
                default=default,
                is_list=is_list,
                has_default=has_default,
            )
    target = _target(module, annotation)
    section = target if target is not None and _is_config(target) else ""
    return FieldOutline(name, doc, written, section=section, has_default=has_default)


def _expanded(module: str, annotation: ast.expr) -> ast.expr:
    """Returns what a type alias such as `PositiveInt = Annotated[int, Field(ge=1)]` stands for."""
    if isinstance(annotation, ast.Name):
        place = imports_of(_file(module)).get(annotation.id, module)
        if place.startswith("clipwright."):
            return _aliases(_file(place)).get(annotation.id, annotation)
    return annotation


@cache
def _aliases(file: Path) -> dict[str, ast.expr]:
    """Returns name → value of the plain assignments of a file."""
    return {ast.unparse(node.targets[0]): node.value for node in module_ast(file).body if isinstance(node, ast.Assign)}


def _added_families(module: str, path: Path, registry_name: str, package: str) -> Iterator[FamilyOutline]:
    """Yields the families of the calls `REGISTRY.add(Config, build, {"preset": …}, source="…")` of one file."""
    for statement in module_ast(path).body:
        call = statement.value if isinstance(statement, ast.Expr) else None
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute) or call.func.attr != "add":
            continue
        if _target(module, call.func.value) != registry_name:
            continue
        config, _, presets = call.args[:3]
        target = _target(module, config)
        assert target is not None, ast.unparse(config)
        sources = [ast.literal_eval(word.value) for word in call.keywords if word.arg == "source"]
        file = module.removeprefix(f"{package}.").partition(".")[0]
        names = tuple(_dict_keys(path, presets))
        yield FamilyOutline(target, _family(target) or file, sources[0] if sources else "", names)


def _dict_keys(path: Path, node: ast.expr) -> Iterator[str]:
    """Yields the keys of a dict display; `**NAME` stands for a dict display of the same file."""
    if isinstance(node, ast.Name):
        node = _aliases(path)[node.id]
    assert isinstance(node, ast.Dict), f"{path}: presets are written as a dict display: {ast.unparse(node)}"
    for key, value in zip(node.keys, node.values, strict=True):
        if key is None:
            yield from _dict_keys(path, value)
        else:
            yield ast.literal_eval(key)


def _family(config: str) -> str:
    """Returns the class variable `family` of a config class, if it has one."""
    module, _, class_name = config.partition(":")
    for statement in class_ast(_file(module), class_name).body:
        if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == "family" and statement.value:
            return ast.literal_eval(statement.value)
    return ""


def _registry_arguments(module: str, variable: str) -> tuple[str, str]:
    """Returns kind and package of `NAME: Registry[…] = Registry("kind", "package")`."""
    for statement in module_ast(_file(module)).body:
        if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == variable:
            assert isinstance(statement.value, ast.Call), variable
            kind, package = (ast.literal_eval(argument) for argument in statement.value.args)
            return kind, package
    raise LookupError(f"{module}:{variable}")


def _is_config(name: str) -> bool:
    """Whether MODULE:CLASS is a class made with `configclass`."""
    module, _, class_name = name.partition(":")
    node = classes_of(_file(module)).get(class_name)
    return node is not None and any(ast.unparse(decorator) == "configclass" for decorator in node.decorator_list)


def _target(module: str, node: ast.expr) -> str | None:
    """Returns MODULE:NAME of a name that a module defines or imports from a module of ours."""
    if not isinstance(node, ast.Name):
        return None
    imported = imports_of(_file(module)).get(node.id)
    if imported is not None:
        return f"{imported}:{node.id}" if imported.startswith("clipwright.") else None
    is_defined = node.id in classes_of(_file(module)) or node.id in _assigned(_file(module))
    return f"{module}:{node.id}" if is_defined else None


@cache
def _assigned(file: Path) -> set[str]:
    """Returns the names that a file assigns with an annotation, as registries are."""
    return {ast.unparse(node.target) for node in module_ast(file).body if isinstance(node, ast.AnnAssign)}


@cache
def _file(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return Path(spec.origin)
