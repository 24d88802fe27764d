"""Index folders: numbered versions, each a FAISS index, its rows, and a manifest that binds the two."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.eval.search.recipes.base import RECIPES, IndexInput, Recipe, RecipeConfig
from clipwright.eval.search.rows import ROWS, choose_canaries, read_rows, write_rows
from clipwright.pipeline.core.activity import Progress, phase
from clipwright.pipeline.core.config import Choice, Resolved
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write, digest
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.core.text import shown
from clipwright.pipeline.core.unsafe import refuse_code
from clipwright.pipeline.folders import output
from clipwright.pipeline.folders.describe import INDEX_FILES, wrong_kind
from clipwright.pipeline.folders.embeddings import Embeddings, rows_error
from clipwright.pipeline.folders.output import CONFIG, CURRENT, INDEX, VERSIONS
from clipwright.pipeline.folders.records import (
    MANIFEST,
    check_files,
    file_entries,
    read_manifest,
    read_origin,
    write_manifest,
    write_origin,
)
from clipwright.pipeline.folders.schema import CANARY_SCHEMA

FAISS, CANARIES = "index.faiss", "canaries.parquet"
CANARY_ROWS = 8  # rows whose embeddings are computed again when the index is opened with its model
CAPTION_SHOWN = 80  # characters of a caption in an error
BUILD_AGAIN = "build the index again with --fresh"
_MANIFEST = ("fingerprint", "model", "data", "what", "dimension", "recipe", "rows", "next_id", "files")


@configclass
class IndexBuildConfig:
    """An embedding folder and the recipe that turns it into an index."""

    embeddings: str
    """Embedding folder to index."""
    recipe: Annotated[RecipeConfig, Choice(RECIPES, "flat")]
    """Kind of index; `clipwright list recipes` shows all."""


@dataclass(frozen=True)
class Index:
    """One version of an index folder, opened and checked. `rows[i]` is the row of `ids[i]`; ids ascend.

    canaries: a table of `schema.CANARY_SCHEMA`.
    """

    folder: Path
    manifest: dict[str, Any]
    faiss: Any
    recipe: Recipe
    rows: pa.Table
    ids: np.ndarray
    canaries: pa.Table

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the cosines (Q, k) and ids (Q, k) of the nearest rows to float32 unit rows (Q, E)."""
        return self.faiss.search(queries, min(k, self.faiss.ntotal), params=self.recipe.search_parameters())


def build(resolved: Resolved[IndexBuildConfig], out: Path, *, fresh: bool, quiet: bool = False) -> dict[str, Any]:
    """Builds the next version in `out` and makes it the current version.

    If the current version is valid and was made from the same embeddings by the same recipe, nothing is built. Ids
    are never reused within an index folder: a new version continues after the last id of all versions.

    Returns the version's manifest, its `name`, and `made`: whether it was built now.
    """
    config = resolved.value
    source = Embeddings(config.embeddings)
    with output.claim(out, INDEX):
        current = None if fresh else _reusable_version(out, source.fingerprint, config.recipe)
        if current is not None:
            return {**current, "made": False}
        versions = out / VERSIONS
        name = f"{1 + max((int(path.name) for path in versions.glob('[0-9]*')), default=0):06d}"
        with (
            output.staging(versions / name) as staged,
            Progress("index", source.rows, "embedding", quiet=quiet) as progress,
        ):
            manifest = _write_version(staged, source, config.recipe, _next_id(versions), progress)
            atomic_write(staged / CONFIG, resolved.yaml())
            write_origin(staged, embeddings=source.folder, **read_origin(source.folder))
        atomic_write(out / CURRENT, name + "\n")
        return {**manifest, "name": name, "made": True}


def open_version(folder: Path) -> Index:
    """Opens the current version of an index folder.

    FAISS readers trust their input, so the manifest and the size and SHA-256 of every file are checked first. Raises
    E_INPUT, E_MANIFEST, E_INDEX_HASH, E_UNSAFE, and E_INDEX_ROWS if embeddings and rows do not match.
    """
    phase("opening the index")
    name, manifest = _current_version(folder)
    version = folder / VERSIONS / name
    _require_complete(version, manifest)
    check_files(version, manifest["files"], "E_INDEX_HASH")
    refuse_code(version, "an index folder")
    recipe = _recorded_recipe(version, manifest)
    index = faiss.read_index(str(version / FAISS))
    rows, ids = read_rows(version)
    opened = Index(version, manifest, index, recipe, rows, ids, pq.read_table(version / CANARIES))
    mismatch = _find_mismatch(opened)
    if mismatch is not None:
        raise rows_error(version, mismatch, BUILD_AGAIN)
    return opened


def _require_complete(version: Path, manifest: Mapping[str, Any]) -> None:
    """Raises E_MANIFEST for a manifest without something that opening the version needs."""
    missing = [name for name in _MANIFEST if name not in manifest]
    files: Any = manifest.get("files")
    if "files" not in missing:
        missing += [name for name in (FAISS, ROWS, CANARIES) if name not in files]
    if missing:
        raise ClipwrightError(
            "E_MANIFEST",
            "the index manifest is malformed",
            where=version / MANIFEST,
            found=f"it has no {', '.join(missing)}",
            fix=BUILD_AGAIN,
        )


def _reusable_version(out: Path, embeddings: str, recipe: RecipeConfig) -> dict[str, Any] | None:
    """Returns the current version's manifest and `name` if it is valid and of these embeddings and this recipe."""
    wanted = {"embeddings": embeddings, **_recipe_entries(recipe)}
    try:
        name, manifest = _current_version(out)
        if any(manifest.get(key) != value for key, value in wanted.items()):
            return None
        check_files(out / VERSIONS / name, manifest["files"], "E_INDEX_HASH")
    except ClipwrightError:
        return None
    return {**manifest, "name": name}


def _recipe_entries(recipe: RecipeConfig) -> dict[str, Any]:
    """Returns what the manifest records of a recipe: its name, and its parameters if it has any."""
    parameters = {key: value for key, value in dataclasses.asdict(recipe).items() if key != "name"}
    if not parameters:
        return {"recipe": recipe.name}
    return {"recipe": recipe.name, "recipe_parameters": parameters}


def _recorded_recipe(version: Path, manifest: dict[str, Any]) -> Recipe:
    name = manifest["recipe"]
    if name not in RECIPES.entries:
        raise ClipwrightError(
            "E_MANIFEST",
            "the index was built with an unknown recipe",
            where=version,
            found=f"recipe {name!r} (known: {', '.join(RECIPES.entries)})",
            fix="load the plugin that defines the recipe, or build the index again",
        )
    return RECIPES.build(RECIPES.preset(name, **manifest.get("recipe_parameters", {})))


def _next_id(versions: Path) -> int:
    """Returns the first id that no version has used."""
    return max((read_manifest(p.parent, "index")["next_id"] for p in versions.glob("[0-9]*/manifest.json")), default=0)


def _write_version(
    folder: Path, source: Embeddings, recipe: RecipeConfig, first_id: int, progress: Progress
) -> dict[str, Any]:
    parts = list(source.parts())
    if not parts:
        raise rows_error(source.folder, "the embedding folder has no rows", "embed a dataset that has samples")
    next_id = write_rows(folder, parts, first_id)

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        block_id = first_id
        for block in source.blocks():
            yield block, np.arange(block_id, block_id + len(block), dtype=np.int64)
            block_id += len(block)
            progress.add(len(block))

    rows = next_id - first_id
    index = RECIPES.build(recipe).build(IndexInput(rows, source.dimension, blocks))
    faiss.write_index(index, str(folder / FAISS))
    canaries = choose_canaries(parts, source.identity["what"], first_id, CANARY_ROWS)
    top1 = pa.array(_top1(index, np.array(canaries["embedding"].to_pylist(), np.float32)))
    canaries = canaries.append_column("top1", top1).select(CANARY_SCHEMA.names).cast(CANARY_SCHEMA)
    pq.write_table(canaries, folder / CANARIES)
    files = file_entries(folder, [FAISS, ROWS, CANARIES])
    body = {
        "model": source.identity["model"],
        "data": source.identity["data"],
        "embeddings": source.fingerprint,
        "what": source.identity["what"],
        "dimension": source.dimension,
        "metric": "inner_product",
        **_recipe_entries(recipe),
        "rows": rows,
        "next_id": next_id,
        "files": files,
    }
    return write_manifest(folder, "index", _fingerprint(body), body)


def _fingerprint(manifest: Mapping[str, Any]) -> str:
    files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    return digest({"model": manifest["model"], "files": files})


def _top1(index: Any, embeddings: np.ndarray) -> np.ndarray:
    """Searches for float32 unit embeddings (n, E); returns the lowest of the ids that tie for the first place."""
    scores, hits = index.search(embeddings, min(8, index.ntotal))
    hits = np.where(scores >= scores[:, :1] - 1e-6, hits, np.iinfo(np.int64).max)
    return hits.min(1)


def _find_mismatch(opened: Index) -> str | None:
    """Returns why embeddings, rows, canaries and manifest do not belong together; None if they do."""
    index, ids, manifest = opened.faiss, opened.ids, opened.manifest
    if (index.ntotal, index.d) != (manifest["rows"], manifest["dimension"]):
        recorded = f"{manifest['rows']} × {manifest['dimension']}"
        return f"the index has {index.ntotal} × {index.d} values, the manifest states {recorded}"
    if len(ids) != index.ntotal:
        return f"{format_count(index.ntotal, 'embedding')} and {format_count(len(ids), 'row')}"
    index_ids = faiss.vector_to_array(index.id_map) if isinstance(index, faiss.IndexIDMap2) else np.empty(0)
    if not np.array_equal(ids, np.sort(index_ids)):
        return "the ids of the embeddings are not the ids of the rows"
    canaries = opened.canaries.to_pylist()
    positions = np.searchsorted(ids, [canary["id"] for canary in canaries])
    rows = opened.rows.select(["id", "key", "caption"]).take(np.minimum(positions, len(ids) - 1)).to_pylist()
    top1_ids = _top1(index, np.array([canary["embedding"] for canary in canaries], np.float32).reshape(-1, index.d))
    for canary, row, top in zip(canaries, rows, top1_ids.tolist(), strict=True):
        if any(row[name] != canary[name] for name in row):
            return f"id {canary['id']} was {_describe(canary)} when the index was built, its row is {_describe(row)}"
        if top != canary["top1"]:
            return f"the top-1 hit of id {canary['id']} is {top}; when the index was built it was {canary['top1']}"
    if _fingerprint(manifest) != manifest["fingerprint"]:
        return "the fingerprint in the manifest is not that of its files: the manifest was changed"
    return None


def _describe(row: Mapping[str, Any]) -> str:
    return f"key {row['key']} {shown(row['caption'] or '', CAPTION_SHOWN)!r}"


def _current_version(folder: Path) -> tuple[str, dict[str, Any]]:
    """Returns the name and the manifest of the version that the file `current` names."""
    if not any((folder / name).exists() for name in INDEX_FILES):
        raise wrong_kind(folder, "index")
    try:
        name = (folder / CURRENT).read_text(encoding="utf-8").strip()
    except OSError:
        name = ""
    if not name.isdigit():
        raise ClipwrightError(
            "E_MANIFEST",
            "the index folder has no current version",
            where=folder,
            found=f"`{CURRENT}` is missing or names no version: `clipwright index build` did not finish",
            fix="run `clipwright index build` again",
        )
    return name, read_manifest(folder / VERSIONS / name, "index")
