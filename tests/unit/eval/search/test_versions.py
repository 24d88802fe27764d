"""Index folders: embeddings and rows that belong together, or an error."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipwright.eval.search.versions import IndexBuildConfig, build, open_version
from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.folders.records import file_entries, write_manifest


def make_embeddings(folder: Path, sizes: list[int], dim: int = 24, seed: int = 0) -> np.ndarray:
    """Writes an embedding folder of random unit rows in parts of the given sizes; returns the rows."""
    folder.mkdir(parents=True)
    rows = np.random.default_rng(seed).standard_normal((sum(sizes), dim)).astype(np.float32)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    start = 0
    for part, size in enumerate(sizes):
        np.save(folder / f"part-{part:05d}.npy", rows[start : start + size])
        numbers = range(start, start + size)
        table = pa.table({"key": [f"{i:032x}" for i in numbers], "caption": [f"caption {i}" for i in numbers]})
        pq.write_table(table, folder / f"part-{part:05d}.parquet")
        start += size
    files = file_entries(folder, [path.name for path in folder.iterdir()])
    body = {"model": "m" * 64, "data": "d" * 64, "what": "image", "dimension": dim, "rows": start, "files": files}
    write_manifest(folder, "embedding", f"{seed}" * 64, body)
    return rows.astype(np.float32)


def make_index(embeddings: Path, out: Path, *, fresh: bool = False) -> dict:
    return build(resolve(IndexBuildConfig, base={"embeddings": str(embeddings)}), out, fresh=fresh)


def rewrite_manifest(version: Path, **changes) -> None:
    """Writes a manifest with the hashes of the current files, so that only the later checks can fail."""
    manifest = json.loads((version / "manifest.json").read_text())
    manifest["files"] = file_entries(version, manifest["files"])
    (version / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_every_row_is_its_own_top1_hit_over_uneven_parts(tmp_path):
    rows = make_embeddings(tmp_path / "e", [3, 1, 17, 5, 2, 31, 1, 8, 4, 11, 6, 9])
    make_index(tmp_path / "e", tmp_path / "index")
    index = open_version(tmp_path / "index")
    scores, ids = index.faiss.search(rows, 1)
    captions = index.rows["caption"].to_pylist()
    assert captions == [f"caption {i}" for i in range(len(rows))]  # part order is the dataset's
    assert [captions[i] for i in ids[:, 0]] == [f"caption {i}" for i in range(len(rows))]
    np.testing.assert_allclose(scores[:, 0], np.linalg.norm(rows, axis=1), atol=1e-5)


def test_equal_inputs_give_equal_folders(tmp_path):
    make_embeddings(tmp_path / "e", [5, 9])
    first, second = (make_index(tmp_path / "e", tmp_path / name) for name in ("a", "b"))
    assert first["fingerprint"] == second["fingerprint"] and first["files"] == second["files"]


def test_versions_are_numbered_and_ids_are_never_reused(tmp_path):
    make_embeddings(tmp_path / "e", [5, 9], seed=1)
    make_embeddings(tmp_path / "f", [4], seed=2)
    out = tmp_path / "index"
    assert make_index(tmp_path / "e", out)["made"]
    assert not make_index(tmp_path / "e", out)["made"]
    first = {path: path.read_bytes() for path in (out / "versions/000001").iterdir()}
    assert make_index(tmp_path / "f", out)["name"] == "000002"
    assert (out / "current").read_text() == "000002\n"
    assert {path: path.read_bytes() for path in (out / "versions/000001").iterdir()} == first
    assert open_version(out).ids.tolist() == [14, 15, 16, 17]
    assert make_index(tmp_path / "f", out, fresh=True)["name"] == "000003"
    assert open_version(out).ids.tolist() == [18, 19, 20, 21]


def test_corrupt_version_is_built_again(tmp_path):
    make_embeddings(tmp_path / "e", [5, 9])
    make_index(tmp_path / "e", tmp_path / "index")
    (tmp_path / "index/versions/000001/index.faiss").write_bytes(b"")
    assert make_index(tmp_path / "e", tmp_path / "index")["name"] == "000002"
    assert len(open_version(tmp_path / "index").ids) == 14


def test_interrupted_build_keeps_the_current_version(tmp_path, monkeypatch):
    make_embeddings(tmp_path / "e", [5, 9], seed=1)
    make_embeddings(tmp_path / "f", [4], seed=2)
    make_index(tmp_path / "e", tmp_path / "index")
    replace = Path.replace

    def interrupted(staged: Path, final: Path) -> Path:
        if final.name == "000002":
            raise KeyboardInterrupt
        return replace(staged, final)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_index(tmp_path / "f", tmp_path / "index")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "index/versions").iterdir()] == ["000001"]
    assert len(open_version(tmp_path / "index").ids) == 14


@pytest.mark.parametrize("name", ["index.faiss", "rows-00000.parquet"])
def test_changed_files_are_never_read(name, tmp_path, monkeypatch):
    make_embeddings(tmp_path / "e", [40])
    make_index(tmp_path / "e", tmp_path / "index")
    file = tmp_path / "index/versions/000001" / name
    content = file.read_bytes()
    monkeypatch.setattr("faiss.read_index", lambda *_: pytest.fail("faiss read a changed file"))
    for corrupt in (content[:-1], content[:100], b"", content + b"\0", *(flip(content, i) for i in range(0, 400, 37))):
        file.write_bytes(corrupt)
        with pytest.raises(ClipwrightError) as error:
            open_version(tmp_path / "index")
        assert error.value.code == "E_INDEX_HASH" and name in error.value.where
    file.unlink()
    with pytest.raises(ClipwrightError, match="E_INDEX_HASH"):
        open_version(tmp_path / "index")


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :]


def test_swapped_rows_and_embeddings_are_refused(tmp_path):
    """Every hash is correct but the pairing is wrong: only counts, ids and canaries show it."""
    make_embeddings(tmp_path / "e", [40], seed=1)
    make_embeddings(tmp_path / "f", [40], seed=2)
    for name in ("e", "f"):
        make_index(tmp_path / name, tmp_path / f"index-{name}")
    version, other = (tmp_path / f"index-{name}/versions/000001" for name in ("e", "f"))
    rows = pq.read_table(version / "rows-00000.parquet")

    def reason() -> str:
        with pytest.raises(ClipwrightError) as error:
            open_version(tmp_path / "index-e")
        assert error.value.code == "E_INDEX_ROWS"
        return error.value.found

    pq.write_table(rows.take(list(range(39, -1, -1))), version / "rows-00000.parquet")
    rewrite_manifest(version)
    assert "ids" in reason()
    pq.write_table(rows, version / "rows-00000.parquet")
    rewrite_manifest(version, dimension=25)
    assert "40 × 24" in reason() and "40 × 25" in reason()
    canaries = json.loads((version / "manifest.json").read_text())["canaries"]
    canaries[3]["top1"] += 1
    rewrite_manifest(version, dimension=24, canaries=canaries)
    assert f"id {canaries[3]['id']}" in reason()
    assert other.exists()


def test_commands_name_the_corrupt_file(quick_cli, refused, embedded, indexed, tmp_path):
    again = quick_cli("index", "build", "flat", f"embeddings={embedded}", "-o", indexed, "--json")
    assert json.loads(again.stdout)["name"] == "000001" and not json.loads(again.stdout)["made"]

    corrupt = shutil.copytree(embedded, tmp_path / "corrupt")
    (corrupt / "part-00000.npy").write_bytes(flip((embedded / "part-00000.npy").read_bytes(), 150))
    out = tmp_path / "out"
    refused(
        quick_cli("index", "build", f"embeddings={corrupt}", "-o", out), "E_EMBED_HASH", 3, corrupt / "part-00000.npy"
    )
    refused(quick_cli("index", "build", f"embeddings={indexed}", "-o", out), "E_MANIFEST", 3, indexed)
    assert not out.exists()
    (tmp_path / "notes.txt").write_text("mine")
    refused(quick_cli("index", "build", f"embeddings={embedded}", "-o", tmp_path), "E_OUTPUT", 2, "it holds")

    index = shutil.copytree(indexed, tmp_path / "index")
    version = index / "versions/000001"
    pq.write_table(pq.read_table(version / "rows-00000.parquet").slice(1), version / "rows-00000.parquet")
    refused(quick_cli("search", index, "text=a"), "E_INDEX_HASH", 3, "rows-00000.parquet")
    rewrite_manifest(version)
    refused(quick_cli("search", index, "text=a"), "E_INDEX_ROWS", 3, "7 embeddings and 6 rows", "--fresh")
    (index / "current").unlink()
    refused(quick_cli("search", index, "text=a"), "E_MANIFEST", 3, index, "index build")
    refused(quick_cli("search", tmp_path / "nowhere", "text=a"), "E_INPUT", 3, tmp_path / "nowhere")
