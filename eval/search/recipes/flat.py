"""Exact search: a query is compared with every row."""

from __future__ import annotations

from dataclasses import dataclass

import faiss

from clipwright.eval.search.recipes.base import RECIPES, IndexInput, RecipeConfig
from clipwright.pipeline.core.registry import configclass


@configclass
class FlatConfig(RecipeConfig):
    """Exact inner-product search; fast enough for a few million rows."""


@dataclass(frozen=True)
class Flat:
    config: FlatConfig

    def build(self, embeddings: IndexInput) -> faiss.IndexIDMap2:
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(embeddings.dimension))
        for block, ids in embeddings.blocks():
            index.add_with_ids(block, ids)
        return index

    def search_parameters(self) -> None:
        return None


RECIPES.add(FlatConfig, Flat, {"flat": {}}, source="Johnson et al. 2017 (arXiv 1702.08734), IndexFlatIP")
