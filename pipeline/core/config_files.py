"""Config files: shipped ones by name, others by path."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.nearest import nearest
from clipwright.pipeline.core.written_yaml import YamlMistake, parse_yaml


def config_path(verb: str, config: str) -> Path:
    """Returns the file of CONFIG: a path if it has a `/` or ends in .yaml, else a shipped config of the verb."""
    if is_path(config):
        path = Path(config)
        if not path.is_file():
            raise ClipwrightError("E_CONFIG_FILE", "the config file does not exist", where=config, fix="check the path")
        return path
    names = shipped_configs().get(verb, {})
    if config not in names:
        raise ClipwrightError(
            "E_CONFIG_FILE",
            f"there is no shipped {verb} config of this name",
            where=config,
            found=f"the shipped ones are {', '.join(sorted(names)) or 'none'}",
            fix=nearest(config, names) or "give a path that contains / or ends in .yaml",
        )
    return names[config]


def is_path(config: str) -> bool:
    """Whether CONFIG is a path, not the name of a shipped config."""
    return "/" in config or config.endswith((".yaml", ".yml"))


@cache
def shipped_configs() -> dict[str, dict[str, Path]]:
    """Returns verb → name → path of the configs in the package; a verb's folder may group them in sub-folders."""
    root = Path(str(resources.files("clipwright") / "configs"))
    return {
        folder.name: {path.stem: path for path in sorted(folder.rglob("*.yaml"))}
        for folder in sorted(root.iterdir())
        if folder.is_dir()
    }


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file that clipwright wrote; raises E_CONFIG_FILE."""
    return _read(path, yaml.safe_load)


def read_config(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file that a person wrote, its plain scalars as `Raw`; raises E_CONFIG_FILE."""
    return _read(path, parse_yaml)


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, YamlMistake, UnicodeDecodeError, OSError, RecursionError) as error:
        has_tab = "'\\t'" in str(error)
        raise ClipwrightError(
            "E_CONFIG_FILE",
            "the config is not valid YAML",
            where=path,
            found=str(error),
            fix="indent with spaces, not with tabs" if has_tab else "fix the file",
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        kind = "a list" if isinstance(tree, list) else "a text"
        raise ClipwrightError(
            "E_CONFIG_FILE",
            "the config is not a mapping",
            where=path,
            found=f"it is {kind}",
            fix="write `section: {key: value}`",
        )
    return tree
