"""Raw image-text pairs to shards, a trained two-tower model, scores, an index and search.

`load_model(folder)` opens a model folder, `open_index(folder)` an index, `open_dataset(folder)` a dataset. Modules are
imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipwright.eval.search.query import open_index
    from clipwright.pipeline.core.errors import ClipwrightError
    from clipwright.pipeline.folders.dataset import Dataset as open_dataset
    from clipwright.pipeline.model.folder import load_model

__all__ = ["ClipwrightError", "load_model", "open_dataset", "open_index"]

_EXPORTS = {
    "ClipwrightError": ("clipwright.pipeline.core.errors", "ClipwrightError"),
    "load_model": ("clipwright.pipeline.model.folder", "load_model"),
    "open_dataset": ("clipwright.pipeline.folders.dataset", "Dataset"),
    "open_index": ("clipwright.eval.search.query", "open_index"),
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'clipwright' has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__all__", "__doc__"]
