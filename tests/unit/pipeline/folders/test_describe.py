"""A folder or file of the wrong kind is named as what it is, with the command that reads it or converts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.folders.records import read_manifest

CLIP = json.dumps({"model_type": "clip"})
# Name of an input → its files.
INPUTS: dict[str, dict[str, str]] = {
    "dataset": {"manifest.json": json.dumps({"format": "dataset", "version": 1, "fingerprint": "", "shards": []})},
    "model": {"manifest.json": json.dumps({"format": "model", "version": 1}), "config.json": "{}"},
    "embedding": {"manifest.json": json.dumps({"format": "embedding", "version": 1}), "config.yaml": ""},
    "index": {"current": "000001", "versions/000001/manifest.json": json.dumps({"format": "index", "version": 1})},
    "run": {"config.yaml": "", "identity.json": "{}", "ledger.jsonl": "", "checkpoints/latest": ""},
    "report": {"report.json": "{}", "config.yaml": ""},
    "half_dataset": {".prep/plan.parquet": "", "config.yaml": ""},
    "half_embedding": {"part-00000.npy": "", "part-00000.parquet": ""},
    "newer": {"manifest.json": json.dumps({"format": "dataset", "version": 2})},
    "damaged": {"manifest.json": "{"},
    "hf": {"config.json": CLIP, "model.safetensors": ""},
    "open_clip": {"open_clip_config.json": "{}", "config.json": CLIP},
    "sentence": {"modules.json": "[]", "0_CLIPModel/config.json": CLIP, "1_Dense/config.json": "{}"},
    "tars": {"00000.tar": "", "00000.parquet": ""},
    "tables": {"a.parquet": "", "b.parquet": ""},
    "my photos": {"2020/a.JPG": "", "2020/a.txt": ""},
    "above": {"shards/manifest.json": json.dumps({"format": "dataset", "version": 1})},
    "empty": {},
    "other": {"notes.md": ""},
}
FILES = ("pairs.parquet", "pairs.csv", "a.tar", "a.jpg", "model.safetensors", "notes.md")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    for name, files in INPUTS.items():
        (root / name).mkdir()
        for file, text in files.items():
            (root / name / file).parent.mkdir(parents=True, exist_ok=True)
            (root / name / file).write_text(text)
    for name in FILES:
        (root / name).write_text("")
    return root


@pytest.mark.parametrize(
    ("line", "code", "what", "found", "remedy"),
    [
        ("data stats embedding", "E_MANIFEST", "not a dataset folder", "an embedding folder", "index build reads it"),
        ("data stats model", "E_MANIFEST", "not a dataset folder", "a model folder", "model=DIR"),
        ("data stats run", "E_MANIFEST", "not a dataset folder", "a run folder", "clipwright export run -o MODEL"),
        ("data stats index", "E_MANIFEST", "not a dataset folder", "an index folder", "search reads it"),
        ("data stats report", "E_MANIFEST", "not a dataset folder", "a report folder", "that the report is about"),
        ("data stats half_dataset", "E_MANIFEST", "dataset folder", "an unfinished dataset folder", "writes it again"),
        ("data stats half_embedding", "E_MANIFEST", "dataset", "an unfinished embedding folder", "writes it again"),
        ("data stats newer", "E_MANIFEST", "another version", "version 2 (expected 1)", "make the folder again"),
        ("data stats damaged", "E_MANIFEST", "cannot be read", "damaged/manifest.json", "make the folder again"),
        ("data stats tars", "E_MANIFEST", "not a dataset folder", "a folder of tars", "clipwright data index tars"),
        ("data stats tables", "E_MANIFEST", "dataset", "table files (.parquet)", "source.path='tables/*.parquet'"),
        ("data stats my_photos", "E_MANIFEST", "dataset", "a folder of images", "prep folder source.path='my photos'"),
        ("data stats above", "E_MANIFEST", "dataset", "that holds shards/", "name above/shards"),
        ("data stats empty", "E_MANIFEST", "dataset", "an empty folder", "check the path"),
        ("data stats other", "E_MANIFEST", "dataset", "a folder without a manifest", "check the path"),
        ("data stats hf", "E_MANIFEST", "dataset", "a model folder of transformers", "name a dataset folder"),
        ("data stats nowhere", "E_INPUT", "does not exist", "no such folder", "check the path"),
        ("data stats pairs.parquet", "E_INPUT", "dataset", "a table file (.parquet)", "prep table source.path=pairs"),
        ("data stats pairs.csv", "E_INPUT", "dataset", "a table file (.csv)", "prep table source.path=pairs.csv"),
        ("data stats a.tar", "E_INPUT", "dataset", "a tar file", "clipwright data index ."),
        ("data stats a.jpg", "E_INPUT", "dataset", "an image file", "prep folder source.path=."),
        ("data stats notes.md", "E_INPUT", "dataset", "a file", "name a folder"),
        ("export model -o x", "E_INPUT", "not a run folder", "a model folder", "model=DIR"),
        ("export embedding -o x", "E_INPUT", "not a run folder", "an embedding folder", "embeddings=DIR"),
        ("export nowhere -o x", "E_INPUT", "the run folder does not exist", "no such folder", "check the path"),
        ("data ledger dataset", "E_INPUT", "not a run folder", "a dataset folder", "train, embed and eval read it"),
        ("search embedding text=a", "E_MANIFEST", "not an index folder", "an embedding folder", "index build reads it"),
        ("search index/versions/000001 text=a", "E_MANIFEST", "index", "one version of an index", "above it"),
        ("index build flat embeddings=index -o x", "E_MANIFEST", "an embedding folder", "an index folder", "search"),
        ("embed model=run data=dataset -o x", "E_MANIFEST", "a model folder", "a run folder", "export run -o MODEL"),
        ("embed model=hf data=dataset -o x", "E_MANIFEST", "model", "of transformers", "clipwright import hf -o MODEL"),
        ("embed model=sentence data=dataset -o x", "E_MANIFEST", "model", "of sentence-transformers", "0_CLIPModel"),
        ("embed model=model.safetensors data=dataset -o x", "E_INPUT", "model", "a file of weights", "its folder"),
        ("import sentence -o x", "E_IMPORT", "transformers", "sentence-transformers", "import sentence/0_CLIPModel"),
        ("import open_clip -o x", "E_IMPORT", "transformers", "of open_clip", "the transformers folder"),
        ("import run -o x", "E_IMPORT", "transformers", "a run folder", "clipwright export run -o MODEL"),
        ("import model -o x", "E_IMPORT", "transformers", "a model folder", "model=DIR"),
        ("data index my_photos", "E_PREP_EMPTY", "no tars", "folder of images", "prep folder source.path='my photos'"),
        ("data index pairs.csv", "E_INPUT", "folder of tars", "a table file", "prep table source.path=pairs.csv"),
        ("prep folder source.path=pairs.csv -o x", "E_INPUT", "input folder", "a table file", "clipwright prep table"),
        ("prep table source.path=my_photos -o x", "E_INPUT", "input file", "folder of images", "prep folder"),
        ("prep table source.path=tables -o x", "E_INPUT", "input file", "of table files", "'tables/*.parquet'"),
    ],
)  # fmt: skip
def test_a_path_of_the_wrong_kind_is_named(
    line: str, code: str, what: str, found: str, remedy: str, inputs: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.folder = inputs
    words = [word.replace("my_photos", "my photos") for word in line.split()]
    if words[:2] == ["data", "stats"]:  # many rows: without a process for each
        monkeypatch.chdir(inputs)
        with pytest.raises(ClipwrightError) as caught:
            read_manifest(Path(words[2]), "dataset")
        error = str(caught.value)
    else:
        error = cli.error(*words, code=3)
    assert error.startswith(f"error[{code}]"), error
    stated, *_, fix = error.split(" — ")
    assert what in stated and found in error and remedy in fix, error
