"""The contract that every index recipe keeps, and recipes with parameters."""

from __future__ import annotations

import json
from pathlib import Path

import faiss
import numpy as np
import pytest

from clipwright.eval.search.recipes.base import RECIPES, IndexInput
from clipwright.eval.search.versions import open_version
from clipwright.pipeline.core.config_files import config_path

PLUGIN = """
from dataclasses import dataclass
import faiss
from clipwright.eval.search.recipes.base import RECIPES, RecipeConfig
from clipwright.pipeline.core.registry import configclass

@configclass
class HnswConfig(RecipeConfig):
    links: int = 8
    ef: int = 32

@dataclass(frozen=True)
class Hnsw:
    config: HnswConfig

    def build(self, embeddings):
        graph = faiss.IndexHNSWFlat(embeddings.dimension, self.config.links, faiss.METRIC_INNER_PRODUCT)
        index = faiss.IndexIDMap2(graph)
        for block, ids in embeddings.blocks():
            index.add_with_ids(block, ids)
        return index

    def search_parameters(self):
        return faiss.SearchParametersHNSW(efSearch=self.config.ef)

RECIPES.add(HnswConfig, Hnsw, {"hnsw_test": {}})
"""


@pytest.mark.parametrize("name", RECIPES.entries)
def test_recipe_contract(name: str) -> None:
    """A recipe keeps the ids it is given, finds each row by its own embedding, and has a shipped config."""
    rows = np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    ids = np.arange(1000, 1200, dtype=np.int64)
    recipe = RECIPES.build(RECIPES.preset(name))
    index = recipe.build(IndexInput(200, 16, lambda: ((rows[i : i + 64], ids[i : i + 64]) for i in range(0, 200, 64))))
    assert sorted(faiss.vector_to_array(index.id_map)) == ids.tolist()
    scores, found = index.search(rows, 1, params=recipe.search_parameters())
    assert found[:, 0].tolist() == ids.tolist() and scores[:, 0] == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(index.reconstruct(1007), rows[7], atol=1e-5)
    assert config_path("index", name).is_file()


def test_recipe_of_a_plugin_is_recorded_with_its_parameters(cli, refused, embedded, model, tmp_path) -> None:
    (tmp_path / "hnsw.py").write_text(PLUGIN)
    plugin = f"plugins={tmp_path / 'hnsw.py'}"
    out = tmp_path / "index"
    arguments = ("index", "build", f"embeddings={embedded}", plugin, "recipe.name=hnsw_test", "-o", out)
    done = cli(*arguments, "recipe.ef=64")
    assert done.returncode == 0 and "hnsw_test" in done.stdout, done.stderr
    manifest = json.loads((out / "versions/000001/manifest.json").read_text())
    assert (manifest["recipe"], manifest["recipe_parameters"]) == ("hnsw_test", {"links": 8, "ef": 64})
    assert "already built" in cli(*arguments, "recipe.ef=64").stdout
    assert json.loads(cli(*arguments, "--json").stdout)["name"] == "000002"  # other parameters
    refused(cli("search", out, "text=a", f"model={model}"), "E_MANIFEST", 3, "hnsw_test", "flat", "plugin")
    done = cli("search", out, "text=a", f"model={model}", plugin, "k=3")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 4, done.stderr


def test_index_searches_with_the_parameters_of_its_recipe(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_version(indexed)
    parameters = faiss.SearchParameters()
    used = []
    monkeypatch.setattr(type(index.recipe), "search_parameters", lambda self: used.append(self) or parameters)
    scores, ids = index.search(index.faiss.reconstruct(int(index.ids[2]))[None], 50)
    assert used == [index.recipe] and ids.shape == scores.shape == (1, 7) and ids[0, 0] == index.ids[2]


def test_recipes_are_listed(cli) -> None:
    rows = json.loads(cli("list", "recipes", "--json").stdout)["recipes"]
    assert [row["name"] for row in rows] == list(RECIPES.entries) and rows[0]["kind"] == "index recipe"
    assert "recipes" in cli("list", "nothing").stderr
