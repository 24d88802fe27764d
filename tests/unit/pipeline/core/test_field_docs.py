"""Descriptions of config fields, read from the source."""

from __future__ import annotations

from typing import Any, ClassVar

from clipwright.pipeline.core.config import schema
from clipwright.pipeline.core.field_docs import field_docs
from clipwright.pipeline.core.registry import Registry, configclass


@configclass
class Base:
    name: str
    """The preset's name."""
    rate: float = 0.1
    """Samples per second."""


@configclass
class Derived(Base):
    """A class docstring is no field's description."""

    kind: ClassVar[str] = "derived"
    """Nor is that of a class variable."""
    rate: float = 0.2
    """Samples per minute."""
    bare: int = 1


REGISTRY: Registry[Any] = Registry("thing", "clipwright.pipeline.losses")
REGISTRY.add(Derived, lambda config: config, {"one": {}, "two": {}})


def test_field_docs_follow_the_bases() -> None:
    assert field_docs(Derived) == {"name": "The preset's name.", "rate": "Samples per minute."}


def test_a_registry_entry_inherits_the_docs_of_its_config() -> None:
    assert field_docs(REGISTRY.entry("two").tagged) == field_docs(Derived)


def test_the_schema_has_the_descriptions() -> None:
    properties = schema(Derived)["properties"]
    assert properties["rate"]["description"] == "Samples per minute."
    assert "description" not in properties["bare"]
