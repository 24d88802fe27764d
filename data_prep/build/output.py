"""The output folder of a run: whose it is, whether it is unfinished or finished, and starting over."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipwright.data_prep.build.shards import WORK
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import STATUS, atomic_write, write_json
from clipwright.pipeline.folders.records import MANIFEST, differences, read_manifest

CONFIG, PLAN, REJECTS = "config.yaml", "plan.parquet", "rejects.parquet"
IDENTITY, SCAN = "identity.json", "scan.json"
# What a run leaves that ended before its first shard, or in which no row was good.
_LEFT = {STATUS, CONFIG, PLAN, REJECTS, WORK}
_SHARD = re.compile(r"[\w-]+-\d{6}\.(tar|parquet)(\.partial)?")


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it against a second run at the same time (E_OUTPUT)."""
    with _lock(folder, "lock", "another run writes it now"):
        yield


@contextmanager
def claim_part(folder: Path, name: str) -> Iterator[None]:
    """The same for one part of a run, beside other parts."""
    other = f"part {name} is being written by another process"
    with _lock(folder, "lock", "a whole run writes it now", shared=True), _lock(folder, f"lock-{name}", other):
        yield


@contextmanager
def claim_shards(folder: Path, of: int) -> Iterator[None]:
    """Holds the folder against those who divide its shards into another number of parts, some of them these."""
    with _lock(folder, f"parts-{of}", "its shards are being divided otherwise", shared=True):
        for other in (folder / WORK).glob("parts-*"):
            if other.name != f"parts-{of}":
                count = other.name.removeprefix("parts-")
                with _lock(folder, other.name, f"parts of {count} are being written, this is one of {of}"):
                    pass
        yield


@contextmanager
def in_turn(folder: Path, say: Callable[[], None]) -> Iterator[None]:
    """One part at a time; `say` is called by one that must wait."""
    with (folder / WORK / "lock-plan").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _lock(folder: Path, name: str, found: str, *, shared: bool = False) -> Iterator[None]:
    (folder / WORK).mkdir(parents=True, exist_ok=True)
    with (folder / WORK / name).open("a+") as file:  # over NFS a shared lock wants reading, another one writing
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(folder, found, "wait for it or give another folder") from None
        yield


def finished(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of a folder that this very config has finished; None when there is work to do.

    Raises E_OUTPUT for a folder that is not ours, E_RESUME for one of another config, E_DATA_HASH for a finished one
    whose shards are gone.
    """
    if folder.exists() and not folder.is_dir():
        raise _taken(folder, "a file of this name", "give another name")
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder, "dataset")
        _same(folder, manifest.get("identity", {}), identity, "finished")
        _all_there(folder, manifest)
        return manifest
    known = folder / WORK / IDENTITY
    if known.is_file():
        _same(folder, json.loads(known.read_text(encoding="utf-8")), identity, "unfinished")
    elif folder.is_dir() and (odd := sorted({path.name for path in folder.iterdir()} - _LEFT)):
        raise _taken(folder, f"it holds {', '.join(odd[:3])}", "give a new or an empty folder")
    return None


def start(folder: Path, identity: Mapping[str, Any], resolved_yaml: str) -> None:
    """Notes what this run is, and clears what an interrupted one left half-written."""
    for path in [*folder.glob("*.partial"), *(folder / WORK).glob("*.partial")]:
        path.unlink()
    if not begun(folder):
        (folder / PLAN).unlink(missing_ok=True)  # of a run that ended without a good row; the input may have changed
    atomic_write(folder / CONFIG, resolved_yaml)
    write_json(folder / WORK / IDENTITY, identity)


def begun(folder: Path) -> bool:
    """Whether a run of this folder has noted what it is."""
    return (folder / WORK / IDENTITY).is_file()


def clear(folder: Path) -> None:
    """Removes what earlier runs wrote, the manifest first, and nothing else. E_OUTPUT for a folder that is not ours."""
    if not folder.is_dir():
        return
    ours = (folder / WORK / IDENTITY).is_file()
    if (folder / MANIFEST).exists():
        ours = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("format") == "dataset"
    names = {path.name for path in folder.iterdir()}
    odd = sorted(n for n in names - _LEFT - {MANIFEST} if not (ours and _SHARD.fullmatch(n)))
    if odd or (MANIFEST in names and not ours):
        found = f"it holds {', '.join(odd[:3]) or 'a manifest of another format'}"
        raise _taken(folder, found, "remove it yourself or give another folder")
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in names - {MANIFEST, WORK}:
        (folder / name).unlink()
    shutil.rmtree(folder / WORK, ignore_errors=True)


def release(folder: Path) -> None:
    """Ends the run: what it kept for resuming is no longer needed."""
    shutil.rmtree(folder / WORK, ignore_errors=True)


def _taken(folder: Path, found: str, fix: str) -> ClipwrightError:
    return ClipwrightError("E_OUTPUT", "an output folder that cannot be used", where=folder, found=found, fix=fix)


def _all_there(folder: Path, manifest: Mapping[str, Any]) -> None:
    for shard in manifest["shards"]:
        tar = folder / shard["tar"]
        if not (folder / shard["sidecar"]).is_file() or not tar.is_file() or tar.stat().st_size != shard["tar_bytes"]:
            raise ClipwrightError(
                "E_DATA_HASH",
                "a finished dataset of which a shard is missing or changed",
                where=tar,
                found=f"the manifest says {shard['tar_bytes']} bytes, with a sidecar beside it",
                fix="restore it, or make the dataset again with --fresh",
            )


def _same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], state: str) -> None:
    if changed := differences(before, now):
        more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
        raise ClipwrightError(
            "E_RESUME",
            f"an {state} dataset of another config"
            if state == "unfinished"
            else "a finished dataset of another config",
            where=folder,
            found="; ".join(changed[:6]) + more,
            fix="give another folder, undo the change, or start over with --fresh",
        )
