"""Config files: shipped ones by name, others by path."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.nearest import nearest


def config_path(verb: str, config: str) -> Path:
    """Returns the file of CONFIG: a path if it has a `/` or ends in .yaml, else a shipped config of the verb."""
    if "/" in config or config.endswith((".yaml", ".yml")):
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


def shipped_configs() -> dict[str, dict[str, Path]]:
    """Returns verb → name → path of the configs in the package; a verb's folder may group them in sub-folders."""
    root = Path(str(resources.files("clipwright") / "configs"))
    return {
        folder.name: {path.stem: path for path in sorted(folder.rglob("*.yaml"))}
        for folder in sorted(root.iterdir())
        if folder.is_dir()
    }


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file; raises E_CONFIG_FILE."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ClipwrightError(
            "E_CONFIG_FILE", "the config is not valid YAML", where=path, found=str(error), fix="fix the file"
        ) from None
    if not isinstance(tree, dict):
        raise ClipwrightError(
            "E_CONFIG_FILE",
            "the config is not a mapping",
            where=path,
            found=f"its type is {type(tree).__name__}",
            fix="write `section: {key: value}`",
        )
    return tree
