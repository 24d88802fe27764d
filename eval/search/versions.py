"""Index folders: a FAISS index with its ids inside, the rows they mean, and a manifest that binds the two."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.eval.folders import CONFIG, claim, read_origin, write_origin
from clipwright.pipeline.core.config import Resolved
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write, digest, fsync_folder
from clipwright.pipeline.core.log import Progress
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.core.unsafe import refuse_code, unsafe
from clipwright.pipeline.folders.records import check_files, file_entries, read_manifest, write_manifest

CURRENT, VERSIONS, FAISS, ROWS = "current", "versions", "index.faiss", "rows-00000.parquet"
CANARIES = 16
_CHUNK = 1 << 16  # rows added at a time


@configclass
class IndexConfig:
    """What is indexed and how. `flat` compares a query with every row: exact."""

    embeddings: str
    recipe: Literal["flat"] = "flat"


@dataclass(frozen=True)
class Index:
    """One version of an index folder, opened and checked: `rows[i]` is what `ids[i]` means; ids ascend."""

    folder: Path
    manifest: dict[str, Any]
    faiss: Any
    rows: pa.Table
    ids: np.ndarray


def build(resolved: Resolved[IndexConfig], out: Path, *, fresh: bool, quiet: bool = False) -> dict[str, Any]:
    """Builds the next version in `out` and makes it the current one; returns its manifest, `name` and `made`.

    If the current version is whole and made from the same embeddings by the same recipe, nothing is done. Ids are
    never used twice in an index folder: a new version goes on counting where the last one ended.
    """
    config = resolved.value
    embeddings = Path(config.embeddings)
    source = read_manifest(embeddings, "embedding")
    check_files(embeddings, source["files"], "E_EMBED_HASH")
    refuse_code(embeddings, "an embedding folder")
    claim(out, (CURRENT, VERSIONS))
    if not fresh and (whole := _whole(out, source["fingerprint"], config.recipe)) is not None:
        return {**whole, "made": False}
    versions = out / VERSIONS
    versions.mkdir(exist_ok=True)
    staged = versions / ".version.partial"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        with Progress("index", source["rows"], "vectors", quiet=quiet) as progress:
            manifest = _write_version(staged, embeddings, source, config.recipe, _next_id(versions), progress)
        atomic_write(staged / CONFIG, resolved.yaml())
        name = f"{1 + max((int(p.name) for p in versions.glob('[0-9]*')), default=0):06d}"
        write_origin(staged, embeddings=embeddings, **read_origin(embeddings))
        staged.rename(versions / name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    fsync_folder(versions)
    atomic_write(out / CURRENT, name + "\n")
    return {**manifest, "name": name, "made": True}


def _whole(out: Path, embeddings: str, recipe: str) -> dict[str, Any] | None:
    """Manifest and `name` of the current version if it is of these embeddings and recipe and undamaged."""
    try:
        name, manifest = _current(out)
        if (manifest["embeddings"], manifest["recipe"]) != (embeddings, recipe):
            return None
        check_files(out / VERSIONS / name, manifest["files"], "E_INDEX_HASH")
    except ClipwrightError:
        return None
    return {**manifest, "name": name}


def _next_id(versions: Path) -> int:
    """The first id that no version has used."""
    return max((read_manifest(p.parent, "index")["next_id"] for p in versions.glob("[0-9]*/manifest.json")), default=0)


def _write_version(
    folder: Path, embeddings: Path, source: dict[str, Any], recipe: str, first: int, progress: Progress
) -> dict[str, Any]:
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(source["dimension"]))
    schema: pa.Schema | None = None
    writer: pq.ParquetWriter | None = None
    following = first
    try:
        for unit, rows in _parts(embeddings, source):
            ids = np.arange(following, following + len(unit), dtype=np.int64)
            for start in range(0, len(unit), _CHUNK):
                some = slice(start, start + _CHUNK)
                index.add_with_ids(_unit(unit[some]), ids[some])
                progress.add(len(ids[some]))
            table = rows.add_column(0, "id", pa.array(ids))
            schema = schema or table.schema
            writer = writer or pq.ParquetWriter(folder / ROWS, schema)
            writer.write_table(table.cast(schema))
            following += len(unit)
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        raise _disagree(embeddings, "no rows", "embed a dataset that has samples")
    faiss.write_index(index, str(folder / FAISS))
    files = file_entries(folder, [FAISS, ROWS])
    body = {
        "model": source["model"],
        "data": source["data"],
        "embeddings": source["fingerprint"],
        "what": source["what"],
        "dimension": source["dimension"],
        "metric": "inner_product",
        "recipe": recipe,
        "rows": following - first,
        "next_id": following,
        "files": files,
        "canaries": _canaries(index, np.arange(first, following)),
    }
    fingerprint = digest({"model": body["model"], "files": {name: entry["sha256"] for name, entry in files.items()}})
    return write_manifest(folder, "index", fingerprint, body)


def _parts(embeddings: Path, source: dict[str, Any]) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Vectors (float16, mapped) and rows of each part, in order."""
    for name in sorted(name for name in source["files"] if name.endswith(".npy")):
        unit = _vectors(embeddings / name)
        rows = pq.read_table((embeddings / name).with_suffix(".parquet"))
        if unit.shape != (rows.num_rows, source["dimension"]):
            found = f"vectors {unit.shape}, rows {rows.num_rows}, dimension {source['dimension']}"
            raise _disagree(embeddings / name, found, "run `clipwright embed` again with --fresh")
        yield unit, rows


def _vectors(path: Path) -> np.ndarray:
    """An npy file, mapped. E_UNSAFE for one of Python objects, which is a pickle."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        if "object" in str(error).lower():  # as a dtype
            raise unsafe(path, "a part of an embedding folder", str(error)) from None
        raise _disagree(path, str(error), "run `clipwright embed` again with --fresh") from None


def _unit(half: np.ndarray) -> np.ndarray:
    """float16 rows as float32 rows of length one again: rounding moved them by up to 5e-4."""
    rows = half.astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _canaries(index: Any, ids: np.ndarray) -> list[dict[str, int]]:
    """A few ids, spread over the index, with the id that their own vector finds first (a copy's may be lower)."""
    chosen = ids[np.unique(np.linspace(0, len(ids) - 1, CANARIES).astype(np.int64))]
    return [{"id": int(i), "top1": int(top)} for i, top in zip(chosen, _top1(index, chosen), strict=True)]


def _top1(index: Any, ids: np.ndarray) -> np.ndarray:
    """The lowest id among those that tie with the best hit of each row's own vector."""
    vectors = np.stack([index.reconstruct(int(i)) for i in ids])
    scores, found = index.search(vectors, min(8, index.ntotal))
    found = np.where(scores >= scores[:, :1] - 1e-6, found, np.iinfo(np.int64).max)
    return found.min(1)


def _current(folder: Path) -> tuple[str, dict[str, Any]]:
    """Name and manifest of the version that `current` names."""
    if not folder.is_dir():
        raise ClipwrightError(
            "E_INPUT", "no index folder", where=folder, found="there is no such folder", fix="check the path"
        )
    try:
        name = (folder / CURRENT).read_text(encoding="utf-8").strip()
    except OSError:
        name = ""
    if not name.isdigit():
        raise ClipwrightError(
            "E_MANIFEST",
            "an index folder without a current version",
            where=folder,
            found=f"`{CURRENT}` is missing or names no version: `clipwright index build` did not finish",
            fix="run that command again",
        )
    return name, read_manifest(folder / VERSIONS / name, "index")


def open_version(folder: Path) -> Index:
    """Opens the current version of an index folder.

    The manifest first, then size and SHA-256 of every file, and only then does FAISS read anything: its readers
    trust their input. Raises E_INPUT, E_MANIFEST, E_INDEX_HASH, E_UNSAFE, and E_INDEX_ROWS if vectors and rows
    disagree.
    """
    name, manifest = _current(folder)
    version = folder / VERSIONS / name
    check_files(version, manifest["files"], "E_INDEX_HASH")
    refuse_code(version, "an index folder")
    index = faiss.read_index(str(version / FAISS))
    rows = pq.read_table(version / ROWS)
    ids = np.asarray(rows["id"])
    inside = np.sort(faiss.vector_to_array(index.id_map)) if isinstance(index, faiss.IndexIDMap2) else np.empty(0)
    found = None
    if (index.ntotal, index.d) != (manifest["rows"], manifest["dimension"]):
        found = f"vectors {index.ntotal} × {index.d}, the manifest says {manifest['rows']} × {manifest['dimension']}"
    elif len(ids) != index.ntotal:
        found = f"{index.ntotal} vectors and {len(ids)} rows"
    elif not np.array_equal(ids, inside):
        found = "the ids beside the vectors are not the ids of the rows"
    else:
        found = _canary(index, manifest["canaries"])
    if found is not None:
        raise _disagree(version, found, "build the index again with --fresh")
    return Index(version, manifest, index, rows, ids)


def _canary(index: Any, canaries: list[dict[str, int]]) -> str | None:
    found = _top1(index, np.array([canary["id"] for canary in canaries]))
    for canary, top in zip(canaries, found, strict=True):
        if top != canary["top1"]:
            return f"the vector of id {canary['id']} finds {top} first, it found {canary['top1']} when it was built"
    return None


def _disagree(where: Path, found: str, fix: str) -> ClipwrightError:
    return ClipwrightError("E_INDEX_ROWS", "vectors and rows that disagree", where=where, found=found, fix=fix)
