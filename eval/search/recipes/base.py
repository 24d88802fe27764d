"""The contract of an index recipe: how the embeddings of an index version become a FAISS index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from clipwright.pipeline.core.registry import Registry, configclass


@configclass
class RecipeConfig:
    """The field that every recipe's config has. Further fields are stored in the index manifest."""

    name: str
    """Name of the recipe."""


@dataclass(frozen=True)
class IndexInput:
    """The embeddings to index, in blocks. They may be read more than once: to train an index, then to fill it."""

    rows: int
    dimension: int
    blocks: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]
    """Yields (embeddings, ids): float32 unit rows (n, dimension), and int64 ids (n,) that ascend."""


class Recipe(Protocol):
    """Builds one kind of FAISS index."""

    def build(self, embeddings: IndexInput) -> Any:
        """Returns a `faiss.IndexIDMap2` of inner products that holds every row under its id.

        The index must support `reconstruct`, which the check of an opened version uses.
        """
        ...

    def search_parameters(self) -> Any:
        """Returns the `faiss.SearchParameters` of a query; None for FAISS's defaults."""
        ...


RECIPES: Registry[Recipe] = Registry("index recipe", "clipwright.eval.search.recipes")
