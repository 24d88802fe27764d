"""Index folders: embeddings and rows that belong together, or an error."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_maker import make_embeddings, rehash, seal

from clipwright.eval.search.query import Searcher
from clipwright.eval.search.versions import IndexBuildConfig, build, open_version
from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import digest
from clipwright.pipeline.folders.records import file_entries


def make_index(embeddings: Path, out: Path, *, fresh: bool = False) -> dict:
    return build(resolve(IndexBuildConfig, base={"embeddings": str(embeddings)}), out, fresh=fresh)


def rewrite_manifest(version: Path, *, seal: bool = True, **changes) -> None:
    """Writes a manifest with the hashes of the current files and, sealed, the fingerprint that fits them."""
    manifest = json.loads((version / "manifest.json").read_text()) | changes
    manifest["files"] = file_entries(version, manifest["files"])
    if seal:
        files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        manifest["fingerprint"] = digest({"model": manifest["model"], "files": files})
    (version / "manifest.json").write_text(json.dumps(manifest))


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


def test_equal_embeddings_are_found_in_the_order_of_their_ids(tmp_path):
    make_embeddings(tmp_path / "e", [6, 6])
    vectors = np.load(tmp_path / "e/part-00000.npy")
    vectors[:] = vectors[0]
    for number in range(2):
        np.save(tmp_path / f"e/part-0000{number}.npy", vectors)
    seal(tmp_path / "e")
    make_index(tmp_path / "e", tmp_path / "index")
    index = open_version(tmp_path / "index")
    assert index.canaries["top1"].to_pylist() == [0] * 8
    [hits] = Searcher(index, None).nearest(index.faiss.reconstruct(3)[None], 20)
    assert [hit["id"] for hit in hits] == list(range(12)) and [hit["rank"] for hit in hits] == list(range(1, 13))
    assert [hit["score"] for hit in hits] == pytest.approx([1] * 12, abs=1e-6)


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


@pytest.mark.parametrize("name", ["index.faiss", "rows-00000.parquet", "canaries.parquet"])
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


def replace_column(path: Path, name: str, values: list) -> None:
    table = pq.read_table(path)
    at = table.schema.get_field_index(name)
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type)), path)


def test_swapped_rows_and_embeddings_are_refused(tmp_path):
    """Every hash is correct but the pairing is wrong: counts, ids, canaries and the fingerprint show it."""
    make_embeddings(tmp_path / "e", [40], seed=1)
    make_index(tmp_path / "e", tmp_path / "index-e")
    version = tmp_path / "index-e/versions/000001"
    names = ("rows-00000.parquet", "canaries.parquet", "manifest.json")
    content = {name: (version / name).read_bytes() for name in names}
    rows = pq.read_table(version / "rows-00000.parquet")
    canaries = pq.read_table(version / "canaries.parquet").to_pylist()
    canary = canaries[3]
    assert (
        [entry["id"] for entry in canaries] == [entry["top1"] for entry in canaries] == [0, 6, 11, 17, 22, 28, 33, 39]
    )
    assert [np.linalg.norm(entry["embedding"]) for entry in canaries] == pytest.approx([1] * 8, abs=1e-6)
    manifest = json.loads((version / "manifest.json").read_text())
    stated = {"what": "image", "metric": "inner_product", "rows": 40, "next_id": 40, "dimension": 24, "recipe": "flat"}
    assert manifest.items() >= stated.items() and manifest["model"] == "1" * 64

    def reason() -> str:
        with pytest.raises(ClipwrightError) as error:
            open_version(tmp_path / "index-e")
        assert error.value.code == "E_INDEX_ROWS"
        for name, data in content.items():
            (version / name).write_bytes(data)
        return error.value.found

    pq.write_table(rows.take(list(range(39, -1, -1))), version / "rows-00000.parquet")
    rewrite_manifest(version)
    assert "ids" in reason()
    rewrite_manifest(version, dimension=25)
    assert "40 × 24" in (found := reason()) and "40 × 25" in found
    for name, row in (("key", f"{canary['id'] + 1:032x}"), ("caption", f"caption {canary['id'] + 1}")):
        values = rows[name].to_pylist()
        replace_column(version / "rows-00000.parquet", name, values[1:] + values[:1])
        rewrite_manifest(version)
        assert (found := reason()).startswith("id 0 was key ") and "caption 0" in found
        assert row in rows[name].to_pylist()
    top1 = pq.read_table(version / "canaries.parquet")["top1"].to_pylist()
    replace_column(version / "canaries.parquet", "top1", [*top1[:3], top1[3] + 1, *top1[4:]])
    rewrite_manifest(version)
    assert f"the top-1 hit of id {canary['id']} is {top1[3]}; when the index was built it was {top1[3] + 1}" in reason()
    values = rows["caption"].to_pylist()  # of a row that is not a canary
    assert all(entry["id"] != 1 for entry in pq.read_table(version / "canaries.parquet").to_pylist())
    replace_column(version / "rows-00000.parquet", "caption", [values[0], "another", *values[2:]])
    rewrite_manifest(version, seal=False)
    assert "the manifest was changed" in reason()
    open_version(tmp_path / "index-e")


@pytest.fixture(scope="module")
def parted(tmp_path_factory: pytest.TempPathFactory, cli, make_model, make_dataset) -> dict[str, Path]:
    """Embeddings of images and of captions in parts of two samples, and the images embedded by another checkpoint."""
    folder = tmp_path_factory.mktemp("parted")
    data = make_dataset(folder / "data", 8, shard=3)
    made = {"model": make_model(folder / "model")}
    for name, model, what in (("image", 0, "image"), ("text", 0, "text"), ("other", 1, "image")):
        place = made["model"] if model == 0 else make_model(folder / "other-model", seed=model)
        arguments = (f"model={place}", f"data={data}", f"what={what}", "part_samples=2", "-o", folder / name)
        assert cli("embed", *arguments).returncode == 0
        made[name] = folder / name
    return made


def swap_rows(folder: Path, parted: dict) -> None:
    table = pq.read_table(folder / "part-00001.parquet")
    pq.write_table(table.take(list(range(len(table)))[::-1]), folder / "part-00001.parquet")


def swap_captions(folder: Path, parted: dict) -> None:
    captions = pq.read_table(folder / "part-00001.parquet")["caption"].to_pylist()
    replace_column(folder / "part-00001.parquet", "caption", captions[::-1])


def swap_vectors(folder: Path, parted: dict) -> None:
    vectors = np.load(folder / "part-00001.npy")
    np.save(folder / "part-00001.npy", vectors[::-1])


def foreign_part(folder: Path, parted: dict) -> None:
    vectors = np.load(folder / "part-00001.npy")
    np.save(folder / "part-00001.npy", np.roll(np.load(folder / "part-00002.npy"), 1, 0)[: len(vectors)])


def other_checkpoint(folder: Path, parted: dict) -> None:
    for path in folder.glob("part-*.npy"):
        shutil.copy(parted["other"] / path.name, path)


def swap_parts(folder: Path, parted: dict) -> None:
    for suffix in (".npy", ".parquet"):
        first, second = (folder / f"part-0000{number}{suffix}" for number in (1, 2))
        first.rename(folder / "aside")
        second.rename(first)
        (folder / "aside").rename(second)


def swap_vectors_of_parts(folder: Path, parted: dict) -> None:
    swap_parts(folder, parted)
    for number in (1, 2):
        shutil.copy(parted["image"] / f"part-0000{number}.npy", folder)


CHANGES = [swap_rows, swap_vectors, foreign_part, other_checkpoint, swap_parts, swap_vectors_of_parts, swap_captions]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_build_refuses_rows_of_other_embeddings(quick_cli, refused, parted, change, tmp_path):
    """The hashes of the files fit; the part is named by the hash that binds its rows to its embeddings."""
    folder = shutil.copytree(parted["image"], tmp_path / "embeddings")
    change(folder, parted)
    rehash(folder)
    number = 0 if change is other_checkpoint else 1
    done = quick_cli("index", "build", "flat", f"embeddings={folder}", "-o", tmp_path / "index")
    refused(done, "E_INDEX_ROWS", 3, folder / f"part-0000{number}.npy", f"samples {2 * number} to", "--fresh")
    assert not (tmp_path / "index").exists()


def drop_part(parts: list[dict]) -> list[dict]:
    return parts[:1] + parts[2:]


def drop_last_part(parts: list[dict]) -> list[dict]:
    return parts[:-1]


def reorder_parts(parts: list[dict]) -> list[dict]:
    return [parts[1], parts[0], *parts[2:]]


def rename_parts(parts: list[dict]) -> list[dict]:
    return [{**part, "name": f"part-{number:05d}"} for number, part in enumerate(reorder_parts(parts))]


def change_binding(parts: list[dict]) -> list[dict]:
    return [*parts[:3], {**parts[3], "binding": parts[2]["binding"]}]


def keep(parts: list[dict]) -> list[dict]:
    return parts


@pytest.mark.parametrize(
    ("change", "changes", "named"),
    [
        (drop_part, {}, ("part-00002.npy", "in the place of part-00001")),
        (drop_last_part, {}, ("6 samples and 6 rows", "states 8 and 8")),
        (drop_last_part, {"samples": 6, "rows": 6}, ("manifest.json", "the manifest was changed")),
        (reorder_parts, {}, ("part-00001.npy", "in the place of part-00000")),
        (rename_parts, {}, ("part-00000.npy", "samples 0 to 1")),
        (change_binding, {}, ("part-00003.npy", "samples 6 to 7")),
        (keep, {"dimension": 15}, ("part-00000.npy", "dimension 15")),
    ],
)
def test_build_refuses_parts_that_are_missing_or_in_another_order(
    quick_cli, refused, parted, change, changes, named, tmp_path
):
    folder = shutil.copytree(parted["image"], tmp_path / "embeddings")
    parts = change(json.loads((folder / "manifest.json").read_text())["parts"])
    rehash(folder, parts=parts, **changes)
    done = quick_cli("index", "build", "flat", f"embeddings={folder}", "-o", tmp_path / "index")
    refused(done, "E_INDEX_ROWS", 3, *named, "--fresh")


@pytest.mark.parametrize(
    ("what", "change"),
    [
        *(("image", change) for change in (swap_rows, swap_vectors, foreign_part, other_checkpoint)),
        ("image", swap_vectors_of_parts),
        *(("text", change) for change in (swap_rows, swap_vectors, foreign_part, swap_captions)),
    ],
)
def test_search_refuses_embeddings_that_the_model_does_not_make(quick_cli, refused, parted, change, what, tmp_path):
    """Every hash fits: only the model can tell which image or caption an embedding belongs to."""
    folder = shutil.copytree(parted[what], tmp_path / "embeddings")
    change(folder, parted)
    seal(folder)
    built = quick_cli("index", "build", "flat", f"embeddings={folder}", "-o", tmp_path / "index")
    assert built.returncode == 0, built.stderr
    done = quick_cli("search", tmp_path / "index", "text=a", f"model={parted['model']}")
    named = "image" if what == "image" else "caption"
    refused(done, "E_INDEX_ROWS", 3, f"what the model makes of its {named}", "id ", "key ", "another model", "--fresh")


@pytest.mark.parametrize(("distance", "accepted"), [(0.01, True), (0.03, False)])
def test_search_tolerates_rounding_of_embeddings_only(quick_cli, refused, parted, distance, accepted, tmp_path):
    folder = shutil.copytree(parted["image"], tmp_path / "embeddings")
    vectors = np.load(folder / "part-00002.npy").astype(np.float32)
    aside = np.roll(vectors, 1, 1)
    aside -= (aside * vectors).sum(1, keepdims=True) * vectors
    vectors += distance * aside / np.linalg.norm(aside, axis=1, keepdims=True)
    np.save(folder / "part-00002.npy", vectors.astype(np.float16))
    seal(folder)
    assert quick_cli("index", "build", "flat", f"embeddings={folder}", "-o", tmp_path / "index").returncode == 0
    done = quick_cli("search", tmp_path / "index", "text=a", f"model={parted['model']}")
    if accepted:
        assert done.returncode == 0, done.stderr
    else:
        refused(done, "E_INDEX_ROWS", 3, "id 4", "distance 0.030 (at most 0.02)")


def test_build_refuses_a_manifest_that_names_another_model(quick_cli, refused, parted, tmp_path):
    folder = shutil.copytree(parted["image"], tmp_path / "embeddings")
    identity = json.loads((folder / "manifest.json").read_text())["identity"]
    rehash(folder, identity={**identity, "model": "m" * 64})
    done = quick_cli("index", "build", "flat", f"embeddings={folder}", "-o", tmp_path / "index")
    refused(done, "E_INDEX_ROWS", 3, folder / "part-00000.npy", "samples 0 to 1")
    for name, value in (("parts", None), ("parts", [{}]), ("identity", {}), ("rows", "8")):
        manifest = json.loads((parted["image"] / "manifest.json").read_text()) | {name: value}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        done = quick_cli("index", "build", "flat", f"embeddings={folder}", "-o", tmp_path / "index")
        refused(done, "E_MANIFEST", 3, folder / "manifest.json", name, "--fresh")


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
    manifest = json.loads((version / "manifest.json").read_text())
    del manifest["files"]["canaries.parquet"], manifest["what"]
    (version / "manifest.json").write_text(json.dumps(manifest))
    refused(quick_cli("search", index, "text=a"), "E_MANIFEST", 3, "no what, canaries.parquet", "--fresh")
    (index / "current").unlink()
    refused(quick_cli("search", index, "text=a"), "E_MANIFEST", 3, index, "index build")
    refused(quick_cli("search", tmp_path / "nowhere", "text=a"), "E_INPUT", 3, tmp_path / "nowhere")
