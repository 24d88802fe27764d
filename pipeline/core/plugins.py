"""Plugins: Python files outside the package that register towers, losses, sources and so on."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import file_sha256


@cache
def import_plugin(path: Path, digest: str) -> None:
    """Imports a plugin file once; `digest` is the SHA-256 of its bytes. Raises E_PLUGIN if the import fails."""
    name = f"clipwright_plugin_{digest[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ClipwrightError(
            "E_PLUGIN",
            "a plugin cannot be imported",
            where=path,
            found=f"{type(error).__name__}: {error}",
            fix="run the file with python to see the traceback",
        ) from error


def load_plugins(paths: Iterable[Path]) -> list[tuple[str, str]]:
    """Imports plugin files; returns the path and SHA-256 of each. Raises E_PLUGIN if one is missing or fails."""
    loaded: list[tuple[str, str]] = []
    for path in paths:
        if path.suffix != ".py" or not path.is_file():
            raise ClipwrightError(
                "E_PLUGIN", "the plugin is missing or is not a .py file", where=path, fix="check the path"
            )
        digest = file_sha256(path)
        import_plugin(path, digest)
        loaded.append((str(path), digest))
    return loaded
