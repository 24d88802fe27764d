"""Registries of named presets: one new file in a folder adds a tower, loss, tokenizer, source or benchmark.

To add a family `mine` of, say, image towers:

1. Write `pipeline/towers/mine.py` with a config class (`@configclass`, a field `name: str` inherited from the kind's
   base config), the module or function that builds it, and the presets.
2. End the file with `IMAGE_TOWERS.add(MineConfig, Mine, {"mine_nano": {"depth": 4}}, source="the paper, table 2")`.

That is all: the registry imports every module of its package, so `clipwright list towers` shows `mine_nano`,
`image.name=mine_nano` selects it, and the tests that are parametrized over the registry cover it. The same file
outside the package is a plugin: `plugins: [mine.py]` in the config registers it.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar, dataclass_transform

from clipwright.pipeline.core.field_docs import field_docs
from clipwright.pipeline.core.hints import unknown_preset

C = TypeVar("C")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def configclass(cls: type[C]) -> type[C]:
    """Makes a keyword-only frozen dataclass that refuses unknown keys when it is validated.

    Every field has its description as a string literal directly below it (see `core.field_docs`).
    """
    cls.__pydantic_config__ = {"extra": "forbid"}  # pyright: ignore[reportAttributeAccessIssue]
    cls.__get_pydantic_json_schema__ = classmethod(_described_schema)  # pyright: ignore[reportAttributeAccessIssue]
    return dataclass(frozen=True, kw_only=True)(cls)


def _described_schema(cls: type[Any], core_schema: Any, handler: Any) -> dict[str, Any]:
    """Returns pydantic's JSON schema of a config class, with a description for each documented field."""
    schema = handler(core_schema)
    properties = handler.resolve_ref_schema(schema).get("properties", {})
    for name, text in field_docs(cls).items():
        if name in properties:
            properties[name]["description"] = text
    return schema


@dataclass(frozen=True)
class Entry:
    """One family: its config class, what it builds, its named presets, and the source of these."""

    config: type[Any]
    build: Callable[..., Any]
    presets: Mapping[str, Mapping[str, Any]]
    source: str
    family: str

    @cached_property
    def tagged(self) -> type[Any]:
        """The config class with `name` narrowed to this family's presets, by which pydantic selects a union member."""
        names = Literal[tuple(self.presets)]  # pyright: ignore[reportInvalidTypeForm]
        narrowed = dataclasses.make_dataclass(
            self.config.__name__, [("name", names)], bases=(self.config,), frozen=True, kw_only=True
        )
        narrowed.__pydantic_config__ = {"extra": "forbid"}
        narrowed.__doc__ = self.config.__doc__
        narrowed.__module__ = self.config.__module__
        return narrowed


class Registry(Generic[C]):
    """The families and presets of one kind, registered by the modules of one package (or by plugins).

    Each family's config class has a field `name: str`, the preset's name. A family registers itself with `add` at the
    end of its file.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, Entry] = {}
        self._discovered = False

    def add(
        self,
        config: type[Any],
        build: Callable[..., C],
        presets: Mapping[str, Mapping[str, Any]],
        source: str = "",
    ) -> None:
        """Registers a family under its preset names; `source` cites where the presets come from."""
        module = config.__module__
        if not module.startswith(f"{self.package}."):
            self.discover()  # a plugin must not take the name of a preset of ours
        # The file in the package, or the folder (`scenes` for `scenes/source.py`).
        file = module.removeprefix(f"{self.package}.").partition(".")[0]
        entry = Entry(config, build, presets, source, getattr(config, "family", file))
        for name in presets:
            known = self._entries.get(name)
            # The same file may be imported twice (a plugin named by two spellings of its path).
            assert known is None or known.config.__qualname__ == config.__qualname__, f"{self.kind} {name} exists"
            self._entries[name] = entry

    def discover(self) -> None:
        """Imports every module of the package and its sub-packages once, so that each registers its families."""
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self.package)
        for module in pkgutil.walk_packages(package.__path__, f"{self.package}."):
            importlib.import_module(module.name)

    @property
    def entries(self) -> dict[str, Entry]:
        """Preset name → family, in order of registration."""
        self.discover()
        return dict(self._entries)

    @property
    def families(self) -> list[Entry]:
        """The families, in order of registration."""
        return list({id(entry): entry for entry in self.entries.values()}.values())

    def entry(self, name: str) -> Entry:
        """Returns the family that has preset `name`; E_CONFIG_CHOICE names the nearest preset if there is none."""
        entries = self.entries
        if name not in entries:
            raise unknown_preset(self.kind, str(name), list(entries), f"name: {name}")
        return entries[name]

    def preset(self, name: str, **fields: Any) -> Any:
        """Returns the config of preset `name`, with `fields` changed."""
        entry = self.entry(name)
        return entry.tagged(**{"name": name, **entry.presets[name], **fields})

    def build(self, config: Any, **context: Any) -> C:
        """Builds what `config`, an instance of a family's config class, describes."""
        return self.entry(config.name).build(config, **context)
