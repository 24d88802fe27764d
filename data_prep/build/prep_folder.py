"""The output folder of a preparation: its state, the order of its parts, and starting it.

`pipeline.folders.output` decides what the folder may hold; here is what only a preparation has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write
from clipwright.pipeline.core.lock import LOCK, Lock
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.folders import output
from clipwright.pipeline.folders.output import CONFIG, DATASET, PLAN, WORK, Kind

SCAN = "scan.json"
TURN = "plan"  # of the lock that the parts hold in turn
WAIT_SECONDS = 0.2


@contextmanager
def in_turn(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Lets one part at a time through; calls `on_wait` if this process has to wait."""
    path = folder / f"{LOCK}-{TURN}"
    waited = False
    while True:
        try:
            lock = Lock(path, folder)
            break
        except ClipwrightError:
            if not waited:
                on_wait()
            waited = True
            time.sleep(WAIT_SECONDS)
    with lock:
        yield


def finished(folder: Path, identity: Mapping[str, Any], kind: Kind = DATASET) -> dict[str, Any] | None:
    """Returns the manifest of a folder that this config has finished, or None if there is work to do.

    Raises E_OUTPUT for a folder that holds something else, E_RESUME for an output of another config, and E_DATA_HASH
    for a finished dataset whose shards are missing or changed.
    """
    found = output.check(folder, kind)
    if found is None:
        return None
    state = "an unfinished" if found.manifest is None else "a finished"
    what = f"the folder holds {state} dataset of another config"
    output.require_same(folder, what, found.identity, identity, code="E_RESUME")
    if found.manifest is not None:
        _check_shards(folder, found.manifest)
    return found.manifest


def start(folder: Path, identity: Mapping[str, Any], resolved_yaml: str) -> None:
    """Records the run's config and identity, and removes what an interrupted run left half-written."""
    output.remove_staged(folder)
    output.remove_staged(folder / WORK)
    if not started(folder):
        # Left by a run that wrote no sample; the input may have changed since.
        (folder / PLAN).unlink(missing_ok=True)
    atomic_write(folder / CONFIG, resolved_yaml)
    output.record_identity(folder, DATASET, identity)


def started(folder: Path) -> bool:
    """Whether a run has recorded its identity in this folder."""
    return output.started(folder, DATASET)


def _check_shards(folder: Path, manifest: Mapping[str, Any]) -> None:
    for shard in manifest["shards"]:
        tar = folder / shard["tar"]
        if not (folder / shard["sidecar"]).is_file() or not tar.is_file() or tar.stat().st_size != shard["tar_bytes"]:
            raise ClipwrightError(
                "E_DATA_HASH",
                "a shard of a finished dataset is missing or changed",
                where=tar,
                found=f"the manifest lists it with {format_count(shard['tar_bytes'], 'byte')} and a sidecar",
                fix="restore it, or make the dataset again with --fresh",
            )
