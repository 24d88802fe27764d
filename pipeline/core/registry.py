"""Registries of named presets: one new file in a folder adds a tower, loss, tokenizer, source or benchmark."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar, dataclass_transform

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.nearest import nearest

C = TypeVar("C")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def configclass(cls: type[C]) -> type[C]:
    """A keyword-only frozen dataclass that refuses unknown keys when validated."""
    cls.__pydantic_config__ = {"extra": "forbid"}  # pyright: ignore[reportAttributeAccessIssue]
    return dataclass(frozen=True, kw_only=True)(cls)


@dataclass(frozen=True)
class Entry:
    """One family: its config class, the thing it builds, and its named presets."""

    config: type[Any]
    build: Callable[..., Any]
    presets: Mapping[str, Mapping[str, Any]]
    source: str

    @cached_property
    def tagged(self) -> type[Any]:
        """The config class with `name` narrowed to this family's presets, so that a union can be told apart."""
        names = Literal[tuple(self.presets)]  # pyright: ignore[reportInvalidTypeForm]
        made = dataclasses.make_dataclass(
            self.config.__name__, [("name", names)], bases=(self.config,), frozen=True, kw_only=True
        )
        made.__pydantic_config__ = {"extra": "forbid"}
        made.__doc__, made.__module__ = self.config.__doc__, self.config.__module__
        return made


class Registry(Generic[C]):
    """Families and presets of one kind, found by importing every module of a package.

    Each family's config class has a field `name: str`, the preset's name. A family registers itself at the end of
    its file with `add`; a plugin file outside the package does the same.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self.package = kind, package
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
        if not config.__module__.startswith(self.package):
            self.discover()  # a plugin's names must not take ours
        entry = Entry(config, build, presets, source)
        for name in presets:
            known = self._entries.get(name)
            # The same file may be imported twice (a plugin named by two spellings of its path).
            assert known is None or known.config.__qualname__ == config.__qualname__, f"{self.kind} {name} exists"
            self._entries[name] = entry

    def discover(self) -> None:
        """Imports every module of the package and its sub-packages once, so that each registers its entries."""
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self.package)
        for module in pkgutil.walk_packages(package.__path__, f"{self.package}."):
            importlib.import_module(module.name)

    @property
    def entries(self) -> dict[str, Entry]:
        """Preset name → family entry, in order of registration."""
        self.discover()
        return dict(self._entries)

    @property
    def families(self) -> list[Entry]:
        return list({id(e): e for e in self.entries.values()}.values())

    def entry(self, name: str) -> Entry:
        """The family that holds preset `name`; E_CONFIG_CHOICE names the nearest when there is none."""
        entries = self.entries
        if name not in entries:
            raise ClipwrightError(
                "E_CONFIG_CHOICE",
                f"unknown {self.kind}",
                where=f"name: {name}",
                found=f"no {self.kind} has this name",
                fix=nearest(str(name), entries) or f"choose one of {', '.join(entries)}",
            )
        return entries[name]

    def preset(self, name: str, **fields: Any) -> Any:
        """The config of preset `name`, with `fields` changed."""
        entry = self.entry(name)
        return entry.tagged(**{"name": name, **entry.presets[name], **fields})

    def build(self, config: Any, **context: Any) -> C:
        """Builds what `config` (an instance of a family's config class) describes."""
        return self.entry(config.name).build(config, **context)
