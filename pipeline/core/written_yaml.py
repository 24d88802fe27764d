"""YAML as it was written: plain scalars stay text until the type of their field is known."""

from __future__ import annotations

from typing import Any

import yaml

MAX_DEPTH = 100  # of lists and mappings in each other
MAX_NODES = 10_000  # of one file, aliases expanded


class Raw(str):
    """A value as it was written without quotes: what it means depends on the type of its field."""


class YamlMistake(ValueError):
    """YAML that is valid but not allowed in a config; the message starts with the line."""


def parse_yaml(text: str) -> Any:
    """Parses YAML whose plain scalars become `Raw`, without interpretation; an empty value becomes None.

    Raises yaml.YAMLError, and YamlMistake for keys that are given twice, tags, and aliases that expand without end.
    """
    # The base loader resolves nothing: every scalar is text.
    root = yaml.compose(text, Loader=yaml.BaseLoader)
    return None if root is None else _Builder().build(root, 0)


class _Builder:
    """Builds the values of a tree of YAML nodes."""

    def __init__(self) -> None:
        self.nodes = 0

    def build(self, node: yaml.Node, depth: int) -> Any:
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise YamlMistake(f"line {_line(node)}: lists, mappings or aliases are nested too deeply")
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.rpartition(":")[2] not in ("str", "seq", "map"):
            raise YamlMistake(f"line {_line(node)}: the tag {node.tag} is not allowed")
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, depth)
        assert isinstance(node, yaml.ScalarNode)
        text = str(node.value)
        if node.style is not None:
            return text
        return Raw(text) if text else None

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        built: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlMistake(f"line {_line(key_node)}: a key is not a text")
            key, value = str(key_node.value), self.build(value_node, depth + 1)
            if key in lines:
                raise YamlMistake(f"line {_line(key_node)}: the key {key} is given twice, first in line {lines[key]}")
            lines[key] = _line(key_node)
            if key == "<<" and key_node.style is None:
                for mapping in value if isinstance(value, list) else [value]:
                    if not isinstance(mapping, dict):
                        raise YamlMistake(f"line {_line(key_node)}: << needs a mapping")
                    merged = {**mapping, **merged}
            else:
                built[key] = value
        return {**merged, **built}


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def inline_yaml(value: Any) -> str:
    """Returns a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")
