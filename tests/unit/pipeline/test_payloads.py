"""Files that would run code if a library opened them carelessly, wherever an untrusted file may be: all are refused.

Each payload creates a canary file when it is opened carelessly; the first test shows that.
"""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from embedding_maker import make_embeddings, seal
from safetensors.torch import save_file

from clipwright.data_prep.foreign.index import ForeignIndexConfig, index
from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import digest
from clipwright.pipeline.core.unsafe import kind_of, refuse_code
from clipwright.pipeline.folders.records import file_entries, write_manifest
from clipwright.pipeline.model.folder import save_model
from clipwright.pipeline.model.two_tower import ModelConfig, build_model
from clipwright.pipeline.tokenizers.base import TOKENIZERS
from clipwright.pipeline.train.config import RunConfig

Payload = Callable[[], bytes]


class Bomb:
    """Creates the canary file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def bomb(canary: Path) -> bytes:
    return pickle.dumps(Bomb(canary))


@pytest.fixture
def torch_bomb(canary: Path) -> bytes:
    out = io.BytesIO()
    torch.save({"weight": Bomb(canary)}, out)
    return out.getvalue()


@pytest.fixture
def source(canary: Path) -> str:
    """Python code that creates the canary file when it is imported."""
    return f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nclass T: pass\n"


def objects(canary: Path) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([Bomb(canary)], dtype=object), allow_pickle=True)
    return out.getvalue()


def yaml_bomb(canary: Path) -> str:
    return f"!!python/object/apply:os.mknod [{canary}]\n"


def test_payloads_run_when_opened_carelessly(canary: Path, bomb: bytes, torch_bomb: bytes) -> None:
    for open_carelessly in (
        lambda: pickle.loads(bomb),
        lambda: torch.load(io.BytesIO(torch_bomb), weights_only=False),
        lambda: np.load(io.BytesIO(objects(canary)), allow_pickle=True),
        lambda: yaml.unsafe_load(yaml_bomb(canary)),
    ):
        open_carelessly()
        assert canary.exists(), open_carelessly
        canary.unlink()
    assert kind_of(bomb) == "a pickle" and "zip" in kind_of(torch_bomb)
    # A valid safetensors file whose header length looks like a pickle's first bytes.
    header = json.dumps({"__metadata__": {"a": "x" * 613}}).encode()
    assert len(header) == 0x280 and kind_of((0x280).to_bytes(8, "little") + header) == ""


# Model folders


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder, beside a dataset folder `empty` without samples."""
    (tmp_path / "empty").mkdir()
    write_manifest(tmp_path / "empty", "dataset", "f", {"shards": []})
    sizes = ("image.image_size=32", "image.dim=32", "image.depth=1", "image.heads=2", "embed_dim=16")
    tree = resolve(ModelConfig, overrides=[*sizes, "text.width=32", "text.depth=1", "text.heads=2"])
    tokenizer = TOKENIZERS.build(tree.value.tokenizer)
    weights = dict(build_model(tree.value, tokenizer).state_dict())
    folder = tmp_path / "model"
    save_model(folder, config=tree.tree, weights=weights, tokenizer=tokenizer, made_from={}, card="a test's model\n")
    return folder


def update_manifest(folder: Path) -> None:
    """Sets the manifest's hashes to those of the files in the folder, as an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = file_entries(folder, [p.name for p in folder.iterdir() if p.name != "manifest.json"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "vocab.pkl", "_C.pyd", "modeling.py", "notes"])
def test_model_folder_with_executable_file_is_refused(
    name: str, model: Path, tmp_path: Path, here: Any, bomb: bytes, torch_bomb: bytes, source: str, canary: Path
) -> None:
    data = source.encode() if name.endswith(".py") else torch_bomb if name.startswith("weights") else bomb
    (model / name).write_bytes(data)
    for in_manifest in (False, True):
        if in_manifest:
            update_manifest(model)
        error = here(tmp_path, "embed", f"model={model}", "data=empty", "-o", "out", code=3).error
        assert error.startswith("error[E_UNSAFE]: a model folder could run code — ") and name in error, error
    assert not canary.exists()


def test_pickle_named_safetensors_is_refused(
    model: Path, tmp_path: Path, here: Any, bomb: bytes, torch_bomb: bytes, canary: Path
) -> None:
    for data in (bomb, torch_bomb):
        (model / "model.safetensors").write_bytes(data)
        error = here(tmp_path, "embed", f"model={model}", "data=empty", "-o", "out", code=3).error
        assert error.startswith("error[E_MODEL_HASH]: ")
        update_manifest(model)
        error = here(tmp_path, "embed", f"model={model}", "data=empty", "-o", "out", code=3).error
        assert error.startswith("error[E_UNSAFE]: ") and "model.safetensors" in error
    assert not canary.exists()


def test_model_config_that_names_plugins_is_refused(
    model: Path, tmp_path: Path, here: Any, source: str, canary: Path
) -> None:
    (tmp_path / "evil.py").write_text(source)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "plugins": [str(tmp_path / "evil.py")]}))
    update_manifest(model)
    error = here(tmp_path, "embed", f"model={model}", "data=empty", "-o", "out", code=3).error
    assert error.startswith("error[E_MANIFEST]: ") and "it names plugins" in error and not canary.exists()


@pytest.mark.parametrize("only", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_import_of_pickled_weights_is_refused(
    only: str, tmp_path: Path, here: Any, torch_bomb: bytes, canary: Path
) -> None:
    (tmp_path / "foreign").mkdir()
    for file, tree in (
        ("config.json", {"model_type": "clip", "text_config": {}, "vision_config": {}}),
        ("preprocessor_config.json", {}),
    ):
        (tmp_path / "foreign" / file).write_text(json.dumps(tree))
    (tmp_path / "foreign" / only).write_bytes(torch_bomb)
    error = here(tmp_path, "import", "foreign", "-o", "out", code=3).error
    assert error.startswith("error[E_IMPORT]: ") and only in error and "run code" in error
    assert not canary.exists() and not (tmp_path / "out").exists()


# Checkpoints and run folders


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a config and a checkpoint without manifest; see `write_checkpoint_manifest`."""
    folder = tmp_path / "run"
    saved = folder / "checkpoints" / "step-00000002"
    saved.mkdir(parents=True)
    resolved = resolve(RunConfig, overrides=["data.train=nowhere"])
    (folder / "config.yaml").write_text(resolved.yaml())
    for name in ("model.safetensors", "loss.safetensors", "optimizer-00000.safetensors"):
        save_file({"weight": torch.zeros(2)}, saved / name)
    return folder


def write_checkpoint_manifest(folder: Path) -> None:
    body = {"step": 2, "files": file_entries(folder, [p.name for p in folder.iterdir() if p.name != "manifest.json"])}
    write_manifest(folder, "checkpoint", digest(body), body)


@pytest.mark.parametrize("in_manifest", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "optimizer-00000.safetensors",
        "model.safetensors",
        "mp_rank_00_model_states.pt",
        "state.pkl",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ],
)
def test_checkpoint_with_a_pickle_is_refused(
    name: str, in_manifest: bool, run: Path, tmp_path: Path, here: Any, bomb: bytes, torch_bomb: bytes, canary: Path
) -> None:
    saved = run / "checkpoints" / "step-00000002"
    if not in_manifest:
        write_checkpoint_manifest(saved)
    (saved / name).write_bytes(torch_bomb if name.endswith(".pt") else bomb)
    if in_manifest:
        write_checkpoint_manifest(saved)
    error = here(tmp_path, "export", "run", "-o", "out", code=3).error
    assert error.startswith("error[E_UNSAFE]: a checkpoint could run code — ") and name in error, error
    assert not canary.exists() and not (tmp_path / "out").exists()


def test_no_older_checkpoint_is_taken_instead_of_an_unsafe_one(
    run: Path, tmp_path: Path, here: Any, bomb: bytes
) -> None:
    saved = run / "checkpoints" / "step-00000002"
    write_checkpoint_manifest(saved)
    (run / "checkpoints" / "step-00000003").mkdir()
    for path in saved.iterdir():
        (run / "checkpoints" / "step-00000003" / path.name).write_bytes(path.read_bytes())
    (run / "checkpoints" / "step-00000003" / "state.pkl").write_bytes(bomb)
    error = here(tmp_path, "export", "run", "-o", "out", code=3).error
    assert error.startswith("error[E_UNSAFE]: ") and "step-00000003" in error


@pytest.mark.parametrize("place", ["train.yaml", "run/config.yaml", "override"])
def test_config_with_python_objects_is_refused(place: str, run: Path, tmp_path: Path, here: Any, canary: Path) -> None:
    text = yaml_bomb(canary)
    command = ["export", "run"] if place.startswith("run") else ["train", "./train.yaml"]
    if place == "override":
        command = ["train", "photos", "data.train=nowhere", f"optim.lr={text.strip()}"]
    else:
        (tmp_path / place).write_text(f"optim: {{lr: {text.strip()}}}" if place == "train.yaml" else text)
    error = here(tmp_path, *command, "-o", "out", code=2).error
    code = "E_CONFIG_VALUE" if place == "override" else "E_CONFIG_FILE"
    assert error.startswith(f"error[{code}]: ") and "python/object" in error
    assert not canary.exists()


# Tokenizers


def test_tokenizer_folder_with_custom_code_is_refused(tmp_path: Path, source: str, canary: Path) -> None:
    from tokenizers import Tokenizer, models

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenization_evil.py").write_text(source)
    config = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["tokenization_evil.T", None]}, "eos_token": "b"}
    for with_json in (False, True):
        if with_json:
            Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")).save(str(folder / "tokenizer.json"))
        for file in ("tokenizer_config.json", "config.json"):
            (folder / file).write_text(json.dumps(config))
            with pytest.raises(ClipwrightError) as caught:
                TOKENIZERS.preset("huggingface", folder=str(folder)).train([], tmp_path)
            assert caught.value.code == "E_UNSAFE" and "auto_map" in caught.value.where
            assert "tokenization_evil.T" in caught.value.found
            (folder / file).unlink()
    assert not canary.exists()


@pytest.mark.parametrize(
    ("preset", "file"),
    [("sentencepiece", "sentencepiece.model"), ("siglip", "spiece.model"), ("huggingface", "tokenizer.json")],
)
def test_vocabulary_that_is_a_pickle_is_refused(
    preset: str, file: str, tmp_path: Path, bomb: bytes, canary: Path
) -> None:
    (tmp_path / file).write_bytes(bomb)
    with pytest.raises(ClipwrightError) as caught:
        TOKENIZERS.build(TOKENIZERS.preset(preset), folder=tmp_path)
    assert caught.value.code == "E_UNSAFE" and file in caught.value.where and not canary.exists()


# Embeddings and indexes


@pytest.mark.parametrize("payload", ["objects", "pickle", "beside", "truncated"])
def test_embedding_part_of_objects_is_refused(
    payload: str, tmp_path: Path, here: Any, bomb: bytes, canary: Path
) -> None:
    folder = tmp_path / "embeddings"
    make_embeddings(folder, [1], dim=4)
    if payload == "beside":
        (folder / "metadata.pkl").write_bytes(bomb)
    else:
        valid = (folder / "part-00000.npy").read_bytes()
        data = {"objects": objects(canary), "pickle": bomb, "truncated": valid[:-3]}[payload]
        (folder / "part-00000.npy").write_bytes(data)
    seal(folder)
    error = here(tmp_path, "index", "build", "flat", f"embeddings={folder}", "-o", "index", code=3).error
    code = "E_INDEX_ROWS" if payload == "truncated" else "E_UNSAFE"
    assert error.startswith(f"error[{code}]: ") and ("metadata.pkl" if payload == "beside" else "part-0") in error
    assert not canary.exists() and not list((tmp_path / "index").glob("versions/0*"))


@pytest.mark.parametrize("name", ["index.pkl", "rows-00000.parquet", "index.faiss"])
def test_index_with_a_pickle_is_refused(name: str, tmp_path: Path, here: Any, bomb: bytes, canary: Path) -> None:
    version = tmp_path / "index" / "versions" / "000001"
    version.mkdir(parents=True)
    (tmp_path / "index" / "current").write_text("000001\n")
    faiss.write_index(faiss.IndexFlatIP(4), str(version / "index.faiss"))
    pq.write_table(pa.table({"id": [0]}), version / "rows-00000.parquet")
    (version / name).write_bytes(bomb)
    pq.write_table(pa.table({"id": [0]}), version / "canaries.parquet")
    files = file_entries(version, ["index.faiss", "rows-00000.parquet", "canaries.parquet"])
    body = {"model": "m", "data": "d", "what": "image", "dimension": 4, "recipe": "flat", "rows": 0, "next_id": 0}
    write_manifest(version, "index", "f", {**body, "files": files})
    error = here(tmp_path, "search", "index", "text=a dog", code=3).error
    assert error.startswith("error[E_UNSAFE]: an index folder could run code — ") and name in error
    assert not canary.exists()


# Data


def test_executable_members_of_foreign_tars_are_never_opened(
    tmp_path: Path, here: Any, bomb: bytes, torch_bomb: bytes, canary: Path
) -> None:
    """As images they are refused and counted, and never opened."""
    members = {"pkl": bomb, "pyd": bomb, "pt": torch_bomb, "npy": objects(canary), "pth": torch_bomb}
    tars = tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tars / "0.tar", "w") as tar:
        for number, (extension, data) in enumerate(members.items()):
            for name, content in ((f"{number}.{extension}", data), (f"{number}.txt", b"a caption")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    with pytest.raises(ClipwrightError) as caught:
        index(ForeignIndexConfig(data=str(tars)), quiet=True)
    assert caught.value.code == "E_PREP_EMPTY" and f"E_PAIR_IMAGE {len(members)}" in caught.value.found
    assert ".pkl" in caught.value.found and not canary.exists()


@pytest.mark.parametrize("name", ["pairs.pkl", "pairs.npy", "pairs.pt", "pairs.parquet"])
def test_table_that_is_a_pickle_is_refused(name: str, tmp_path: Path, here: Any, bomb: bytes, canary: Path) -> None:
    (tmp_path / name).write_bytes(objects(canary) if name.endswith(".npy") else bomb)
    error = here(tmp_path, "prep", "table", f"source.path={name}", "-o", "out", code=3).error
    assert error.startswith("error[E_TABLE]: ") and name in error and not canary.exists()


def test_nested_folders_are_searched_and_zip_files_are_found(tmp_path: Path, bomb: bytes) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    refuse_code(tmp_path, "a folder")
    with zipfile.ZipFile(tmp_path / "a" / "b" / "data", "w") as archive:
        archive.writestr("archive/data.pkl", bomb)
    with pytest.raises(ClipwrightError) as caught:
        refuse_code(tmp_path, "a folder")
    assert caught.value.code == "E_UNSAFE" and "a/b/data" in caught.value.where and "zip" in caught.value.found
