"""The life of an output folder: who may write it, locks, staging and publishing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import write_json
from clipwright.pipeline.core.lock import Holder
from clipwright.pipeline.core.status import STATUS
from clipwright.pipeline.folders import output
from clipwright.pipeline.folders.output import (
    DATASET,
    DEMO,
    EMBEDDING,
    EVALUATION,
    FOREIGN,
    INDEX,
    INSPECTION,
    MODEL,
    RUN,
    Kind,
)
from clipwright.pipeline.folders.records import write_manifest

KINDS = {kind.name: kind for kind in (DATASET, INSPECTION, RUN, MODEL, EMBEDDING, INDEX, EVALUATION)}
IDENTITY = {"seed": 0, "images": {"quality": 85}}
# What each kind of command leaves in its folder.
OWN = {
    "dataset": ["config.yaml", "plan.parquet", "rejects.parquet", ".prep/identity.json", ".data-000000.tar.partial"],
    "report": ["report.html", "report.json", "view.html"],
    "run": ["config.yaml", "tokenizer/bpe.txt"],
    "model": [],
    "embedding": [".embed/identity.json", ".embed/part-00000.json", ".part-00001.npy.partial"],
    "index": ["config.yaml", "current", "versions/000001/manifest.json"],
    "evaluation report": ["config.yaml", "report.json"],
}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, names: list[str], text: str = "{}") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def refused(action: Callable[[], Any], code: str = "E_OUTPUT") -> str:
    with pytest.raises(ClipwrightError) as caught:
        action()
    assert caught.value.code == code
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_claim_accepts_new_empty_and_own_folders(kind: Kind, tmp_path: Path) -> None:
    output.check(tmp_path / "new", kind)
    assert not (tmp_path / "new").exists()
    with output.claim(tmp_path / "new" / "deep", kind) as claim:
        assert claim.folder.is_dir() != kind.replaced
    (tmp_path / "empty").mkdir()
    output.claim(tmp_path / "empty", kind).release()
    own = fill(tmp_path / "own", [STATUS, *OWN[kind.name]])
    output.claim(own, kind).release()
    fill(tmp_path / "killed", [".config.yaml.0123abcd.partial"])  # what a killed `atomic_write` leaves
    output.claim(tmp_path / "killed", kind).release()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_claim_refuses_other_files_and_leaves_them_untouched(kind: Kind, tmp_path: Path) -> None:
    names = [name for name in OWN[kind.name] if "identity" not in name]
    folder = fill(tmp_path / "out", [*names, "thesis.tex"])
    before = content(folder)
    for action in (lambda: output.check(folder, kind), lambda: output.claim(folder, kind)):
        line = refused(action)
        assert "it holds thesis.tex" in line and "empty folder" in line
    assert content(folder) == before
    (tmp_path / "file").write_text("mine")
    assert "it is a file" in refused(lambda: output.claim(tmp_path / "file", kind))
    assert (tmp_path / "file").read_text() == "mine"


def test_claim_accepts_further_names(tmp_path: Path) -> None:
    folder = fill(tmp_path / "out", ["report.json", "predictions.parquet"])
    assert "predictions.parquet" in refused(lambda: output.claim(folder, EVALUATION))
    output.claim(folder, EVALUATION, also=["predictions.parquet"]).release()


def test_folder_with_recorded_identity_is_accepted(tmp_path: Path) -> None:
    folder = fill(tmp_path / "out", ["notes.txt"])
    output.record_identity(folder, RUN, IDENTITY)
    found = output.check(folder, RUN)
    assert found is not None and found.identity == IDENTITY and found.manifest is None
    (folder / "identity.json").write_text("{")
    line = refused(lambda: output.check(folder, RUN), "E_RESUME")
    assert "identity.json" in line and "--fresh" in line


def test_finished_dataset_is_recognized_by_its_manifest(tmp_path: Path) -> None:
    write_manifest(fill(tmp_path, ["data-000000.tar"]), "dataset", "f" * 64, {"identity": IDENTITY, "shards": []})
    found = output.check(tmp_path, DATASET)
    assert found is not None and found.identity == IDENTITY and found.manifest is not None
    assert "it is a dataset folder" in refused(lambda: output.check(tmp_path, EMBEDDING))
    assert refused(lambda: output.check(tmp_path, RUN))
    assert "clipwright prep" in refused(lambda: output.check(tmp_path, FOREIGN))


def test_changed_identity_is_refused_with_the_changed_keys(tmp_path: Path) -> None:
    new = {"seed": 1, "images": {"quality": 85}}
    output.require_same(tmp_path, "a run of another config", IDENTITY, dict(IDENTITY))
    line = refused(lambda: output.require_same(tmp_path, "another run", IDENTITY, new, code="E_RESUME"), "E_RESUME")
    assert (
        line.startswith("error[E_RESUME]: another run — ")
        and "seed: 0 → 1" in line
        and "--fresh" in line
        and "accept" not in line
    )
    output.require_same(tmp_path, "a run", IDENTITY, new, accept=["seed"])
    many = {f"key{i}": i for i in range(9)}
    assert "and 3 more" in refused(lambda: output.require_same(tmp_path, "a run", {}, many))


def test_model_folder_replaces_only_a_model_folder(tmp_path: Path) -> None:
    write_manifest(fill(tmp_path / "model", ["model.safetensors"]), "model", "f" * 64, {})
    output.check(tmp_path / "model", MODEL)
    write_manifest(fill(tmp_path / "data", ["data-000000.tar"]), "dataset", "f" * 64, {})
    assert "it holds no model: it is a dataset folder" in refused(lambda: output.check(tmp_path / "data", MODEL))


def test_demo_refuses_the_config_of_another_command(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {train: x}\n")
    assert "config.yaml" in refused(lambda: output.check(tmp_path, DEMO))
    (tmp_path / "config.yaml").write_text("steps: {}\n")
    output.check(tmp_path, DEMO)


def test_index_of_tars_leaves_other_files_untouched(tmp_path: Path) -> None:
    fill(tmp_path, ["0.tar", "0.parquet", "notes.txt", ".hidden.partial"])
    output.check(tmp_path, FOREIGN)
    for name in ("0.sidecar.parquet", "rejects.parquet"):
        (tmp_path / name).write_text("mine")
        assert name in refused(lambda: output.check(tmp_path, FOREIGN))
        (tmp_path / name).unlink()
    write_json(tmp_path / STATUS, {"verb": "prep"})
    assert STATUS in refused(lambda: output.check(tmp_path, FOREIGN))
    write_json(tmp_path / STATUS, {"verb": "data index"})
    output.check(tmp_path, FOREIGN)
    before = content(tmp_path)
    with output.claim(tmp_path, FOREIGN):
        output.record_identity(tmp_path, FOREIGN, {"verb": "data index"})
    fill(tmp_path, ["0.sidecar.parquet", "rejects.parquet"])
    write_manifest(tmp_path, "dataset", "f" * 64, {"identity": {"verb": "data index"}})
    output.clear(tmp_path, FOREIGN)
    assert content(tmp_path) == before


def test_second_process_is_refused_while_the_first_holds_the_claim(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom clipwright.pipeline.folders import output\n"
        "with output.claim(Path(sys.argv[1]), output.DATASET):\n"
        "    print('claimed', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "claimed\n"
        for fresh in (False, True):
            line = refused(lambda fresh=fresh: output.claim(tmp_path / "out", DATASET, fresh=fresh), "E_LOCKED")
            assert f"process {first.pid} on {os.uname().nodename}, started 20" in line and f"kill {first.pid}" in line
        first.kill()
    output.claim(tmp_path / "out", DATASET).release()


def test_parts_of_one_division_are_written_at_once_and_exclude_the_complete_folder(tmp_path: Path) -> None:
    with output.claim(tmp_path, DATASET, part="share-1-of-2"), output.claim(tmp_path, DATASET, part="share-2-of-2"):
        for part in ("share-1-of-2", "share-1-of-3", ""):
            refused(lambda part=part: output.claim(tmp_path, DATASET, part=part), "E_LOCKED")
        output.claim(tmp_path, DATASET, part="plan-1-of-1").release()
    dead = json.loads('{"token": "x", "host": "n", "machine": "m", "pid": 1, "started": "s", "command": "c"}')
    dead |= {"process_start": "1", "machine": Holder.this_process().machine}
    (tmp_path / ".lock-share-1-of-9").write_text(json.dumps(dead))
    with output.claim(tmp_path, DATASET):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        refused(lambda: output.claim(tmp_path, DATASET, part="share-1-of-2"), "E_LOCKED")
    assert not list(tmp_path.iterdir())


def test_clear_removes_what_the_command_wrote_and_nothing_else(tmp_path: Path) -> None:
    names = ["data-000000.tar", "data-000000.parquet", "rejects.parquet", "config.yaml", STATUS, ".x.partial"]
    write_manifest(fill(tmp_path, names), "dataset", "f" * 64, {"identity": IDENTITY})
    (tmp_path / "thesis.tex").write_text("years")
    before = content(tmp_path)
    assert "thesis.tex" in refused(lambda: output.clear(tmp_path, DATASET))
    assert content(tmp_path) == before
    (tmp_path / "thesis.tex").unlink()
    output.clear(tmp_path, DATASET)
    assert not list(tmp_path.iterdir())
    output.clear(tmp_path / "absent", DATASET)
    write_manifest(fill(tmp_path / "other", ["part-00000.npy"]), "embedding", "f" * 64, {})
    assert "it holds" in refused(lambda: output.clear(tmp_path / "other", DATASET))


def test_interrupted_clear_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_manifest(fill(tmp_path, ["a-000000.tar", "a-000001.tar"]), "dataset", "f" * 64, {"identity": IDENTITY})
    removed: list[str] = []

    def stop(path: Path) -> None:
        if len(removed) == 2:
            raise KeyboardInterrupt
        removed.append(path.name)
        path.unlink()

    with monkeypatch.context() as patch:
        patch.setattr(output, "_remove", stop)
        with pytest.raises(KeyboardInterrupt):
            output.clear(tmp_path, DATASET)
    assert removed == ["manifest.json", "a-000000.tar"]
    output.clear(tmp_path, DATASET)
    assert not list(tmp_path.iterdir())


def test_staged_folder_is_renamed_when_complete(tmp_path: Path) -> None:
    final = tmp_path / "models" / "m"
    with output.staging(final) as staged:
        fill(staged, ["a", "deep/b"], "new")
        assert staged.name == ".m.partial" and not final.exists()
    assert content(final) == {"a": b"new", "deep/b": b"new"}
    with output.staging(final) as staged:
        fill(staged, ["c"])
    assert content(final) == {"c": b"{}"} and [path.name for path in final.parent.iterdir()] == ["m"]


def test_error_before_publish_keeps_the_old_folder(tmp_path: Path) -> None:
    final = fill(tmp_path / "m", ["a"], "old")
    with pytest.raises(KeyboardInterrupt), output.staging(final) as staged:
        fill(staged, ["a"], "new")
        raise KeyboardInterrupt
    assert content(tmp_path) == {"m/a": b"old"}


def test_kill_before_publish_keeps_the_old_folder(tmp_path: Path) -> None:
    final = fill(tmp_path / "m", ["a"], "old")
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom clipwright.pipeline.folders import output\n"
        "with output.staging(Path(sys.argv[1])) as staged:\n"
        "    (staged / 'a').write_text('new')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(final)], check=False).returncode == -9
    assert content(final) == {"a": b"old"} and (tmp_path / ".m.partial").is_dir()
    with output.staging(final) as staged:
        assert not list(staged.iterdir())
        fill(staged, ["a"], "new")
    assert content(tmp_path) == {"m/a": b"new"}


def test_failed_rename_restores_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = fill(tmp_path / "m", ["a"], "old")
    staged = fill(output.staged_path(final), ["a"], "new")

    def fail(path: Path, target: Path) -> Path:
        raise OSError("disk gone")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk gone"):
            output.publish((staged, final))
    assert content(final) == {"a": b"old"}
    # A kill after the new folder has its name leaves the old one aside; the next publication removes it.
    fill(tmp_path / ".m.old.partial", ["a"], "older")
    output.publish((staged, final))
    assert content(tmp_path) == {"m/a": b"new"}
    # A kill between the two renames leaves no folder of the name; the next command puts the old one back.
    final.rename(tmp_path / ".m.old.partial")
    with pytest.raises(KeyboardInterrupt), output.staging(final):
        raise KeyboardInterrupt
    assert content(tmp_path) == {"m/a": b"new"}


def test_published_files_are_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, [".a.partial", ".b.partial"], "new")
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(handle: int) -> None:
        done.append("fsync")
        fsync(handle)

    def note_replace(path: Path, target: Path) -> Path:
        done.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    finals = [tmp_path / "a", tmp_path / "b"]
    output.publish(*((output.staged_path(final), final) for final in finals))
    assert done == ["fsync", "fsync", "a", "b", "fsync"]


def test_staged_names(tmp_path: Path) -> None:
    assert output.is_staged(output.staged_path(tmp_path / "a.npy").name) and not output.is_staged("a.npy.partial")
    fill(tmp_path, [".a.npy.partial", ".deep.partial/x", "a.npy", "mine.partial"])
    output.remove_staged(tmp_path)
    assert sorted(content(tmp_path)) == ["a.npy", "mine.partial"]


def test_release_removes_what_only_resuming_needs(tmp_path: Path) -> None:
    with output.claim(tmp_path, DATASET):
        output.record_identity(tmp_path, DATASET, IDENTITY)
        assert output.started(tmp_path, DATASET) and json.loads((tmp_path / ".prep/identity.json").read_text())
        output.release(tmp_path, DATASET)
    assert not list(tmp_path.iterdir())
