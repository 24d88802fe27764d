"""`data index`: a manifest and sidecars beside tars that others made, which stay as they are."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.data_prep.build import output
from clipwright.data_prep.build.engines import Engine, workers_for
from clipwright.data_prep.build.pack import RuntimeConfig
from clipwright.data_prep.build.plan import Duplicates, Plan, decide
from clipwright.data_prep.build.shards import REJECTS, SIDECAR, WORK, receipt_path, rejects_path, user_columns
from clipwright.data_prep.foreign import json_columns
from clipwright.data_prep.foreign.groups import parquet_bytes, part_path, scan_tar, tar_stat
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import STATUS, atomic_write, canonical_json, write_json
from clipwright.pipeline.core.log import Progress
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.folders.records import (
    MANIFEST,
    DatasetFingerprint,
    file_entries,
    read_manifest,
    write_manifest,
)

SUFFIX = ".sidecar.parquet"  # not .parquet: img2dataset leaves a table of that name beside each tar


@configclass
class IndexConfig:
    """The folder of tars, and what becomes of images that stand in it more than once, as in `prep`."""

    data: str
    duplicates: Duplicates = "merge"
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True)
class Indexed:
    """What a run gives back: its manifest, whether it was finished before, how many members are no part of a pair."""

    manifest: dict[str, Any]
    already: bool
    ignored: int


def find_tars(folder: Path) -> list[str]:
    """Names of the tars of a folder, sorted. Raises E_INPUT, E_PREP_EMPTY."""
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "there is no such folder"
        raise ClipwrightError("E_INPUT", "no folder of tars", where=folder, found=found, fix="check the path")
    names = sorted(path.name for path in folder.glob("*.tar") if path.is_file())
    if not names:
        raise ClipwrightError(
            "E_PREP_EMPTY", "a folder without tars", where=folder, found="no *.tar in it", fix="check the path"
        )
    return names


def index(config: IndexConfig, *, fresh: bool = False, quiet: bool = False) -> Indexed:
    """Writes sidecars, rejects and the manifest of a folder of tars, or goes on where an earlier run stopped.

    A row is a group of adjacent members of one key; what its JSON member says fills the user's own columns. Files
    depend on tars and `duplicates` alone. Raises E_INPUT, E_PREP_EMPTY, E_OUTPUT for a folder that is a dataset of
    another making, E_RESUME, E_DATA_HASH when it was finished with other tars or settings.
    """
    folder = Path(config.data)
    names = find_tars(folder)
    identity = {"verb": "data index", "duplicates": config.duplicates, "tars": len(names)}
    _claimable(folder, names)
    if fresh:
        _clear(folder, names)
    if (folder / MANIFEST).exists():
        manifest = output.finished(folder, identity)
        assert manifest is not None
        return Indexed(manifest, True, 0)
    with output.claim(folder):
        write_json(folder / WORK / output.IDENTITY, identity)
        receipts = _scan_all(folder, names, config, quiet)
        manifest = _Finish(folder, receipts, config.duplicates).write(identity)
        output.release(folder)
    return Indexed(manifest, False, sum(receipt["ignored"] for receipt in receipts))


def _ours(folder: Path, names: Iterable[str]) -> list[Path]:
    """The files that a run writes beside the tars, the manifest first, which says that the others are whole."""
    sidecars = [folder / (name.removesuffix(".tar") + SUFFIX) for name in names]
    return [folder / MANIFEST, folder / output.REJECTS, *sidecars]


def _claimable(folder: Path, names: list[str]) -> None:
    """E_OUTPUT where files stand in the way that this command has not written."""
    known = folder / WORK / output.IDENTITY
    if (folder / MANIFEST).exists():
        ours = read_manifest(folder, "dataset").get("foreign") is True
        odd = [] if ours else ["a dataset that `clipwright prep` made"]
    elif known.exists():
        ours = json.loads(known.read_text(encoding="utf-8")).get("verb") == "data index"
        odd = [] if ours else ["an unfinished run of `clipwright prep`"]
    else:
        odd = [path.name for path in _ours(folder, names) if path.exists()]
        odd += [STATUS] if (folder / STATUS).exists() and not _our_status(folder / STATUS) else []
    if odd:
        raise ClipwrightError(
            "E_OUTPUT",
            "a folder that cannot be indexed",
            where=folder,
            found=f"it holds {', '.join(odd[:3])}",
            fix="give a folder of tars alone",
        )


def _our_status(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["verb"] == "data index"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _clear(folder: Path, names: list[str]) -> None:
    stale = [] if not (folder / MANIFEST).exists() else read_manifest(folder, "dataset")["shards"]
    for path in [*_ours(folder, names), *(folder / shard["sidecar"] for shard in stale)]:
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / WORK, ignore_errors=True)


def _scan_all(folder: Path, names: list[str], config: IndexConfig, quiet: bool) -> list[dict[str, Any]]:
    """The receipts of all tars, in order; those that an earlier run has read are not read again."""
    receipts: dict[int, dict[str, Any]] = {}
    for number, name in enumerate(names):
        path = receipt_path(folder, number)
        receipt = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if receipt.get("stat") == tar_stat(folder / name) and receipt.get("tar") == name and "columns" in receipt:
            receipts[number] = receipt
    todo = [(number, name) for number, name in enumerate(names) if number not in receipts]
    with (
        Engine(workers_for(config.runtime.workers, len(todo)), folder) as engine,
        Progress("index", len(names), "tars", quiet=quiet, already_done=len(receipts)) as progress,
    ):
        for receipt in engine.run(scan_tar, todo):
            receipts[receipt["number"]] = receipt
            progress.add(1, receipt["samples"] == 0)
    return [receipts[number] for number in sorted(receipts)]


class _Finish:
    """From what all tars hold to sidecars, rejects and manifest."""

    def __init__(self, folder: Path, receipts: list[dict[str, Any]], duplicates: Duplicates) -> None:
        self.folder, self.receipts, self.duplicates = folder, receipts, duplicates
        self.firsts = np.concatenate([[0], np.cumsum([r["groups"] for r in receipts])]).tolist()
        self.starts = np.concatenate([[0], np.cumsum([r["samples"] for r in receipts])]).tolist()
        keys = [self._part(number, ["key"])["key"].to_pylist() for number in range(len(receipts))]
        self.keys = np.array([key.encode() for part in keys for key in part], dtype="S32")
        self.plan: Plan = decide(self.keys, duplicates)
        self.following = self.plan.heads != np.arange(len(self.keys))
        self.rejects = [pq.read_table(rejects_path(folder, number)) for number in range(len(receipts))]
        self.kinds = json_columns.together(receipt["columns"] for receipt in receipts)
        own = json_columns.schema_of(self.kinds)
        named = user_columns(own)
        self.schema = pa.schema([*SIDECAR, *named])
        self.names = dict(zip(own.names, named.names, strict=True))  # of columns, in the JSON and in the sidecar
        self.twins: dict[int, list[str]] = {}  # captions that leading rows take over
        self.captions = 0
        self.fingerprint = DatasetFingerprint()

    def write(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Sidecars under staged names, then all under their own, the manifest last. E_PREP_EMPTY without a sample."""
        rejects = self._all_rejects()
        reasons = Counter(row["reason"] for row in rejects)
        if not len(self.keys):
            raise self._empty(rejects, reasons)
        shards = [made for number in range(len(self.receipts)) if (made := self._shard(number)) is not None]
        staged = {self.folder / shard["sidecar"]: self.folder / WORK / shard["sidecar"] for shard in shards}
        atomic_write(self.folder / WORK / output.REJECTS, parquet_bytes(rejects, REJECTS))
        staged[self.folder / output.REJECTS] = self.folder / WORK / output.REJECTS
        for final, work in staged.items():
            work.replace(final)
        merged = reasons.pop("merged", 0)
        body = {
            "name": "tars",
            "foreign": True,
            "shards": shards,
            "rows_in": self.firsts[-1],
            "written": sum(shard["samples"] for shard in shards),
            "merged": merged,
            "rejected": reasons.total(),
            "rejects": dict(sorted(reasons.items())),
            "captions": self.captions,
            "captions_dropped": sum(receipt["captions_dropped"] for receipt in self.receipts),
            "files": file_entries(self.folder, [output.REJECTS]),
            "identity": identity,
        }
        assert body["rows_in"] == body["written"] + merged + body["rejected"], "a row that stands not exactly once"
        return write_manifest(self.folder, "dataset", self.fingerprint.hexdigest(), body)

    def _part(self, number: int, columns: list[str] | None = None) -> pa.Table:
        return pq.read_table(part_path(self.folder, number), columns=columns)

    def _all_rejects(self) -> list[dict[str, Any]]:
        """The rejects of all tars and the followers of equal images, whose captions are handed to the first."""
        rows = [
            {**row, "row": row["row"] + first}
            for first, table in zip(self.firsts, self.rejects, strict=False)
            for row in table.to_pylist()
        ]
        follows = np.flatnonzero(self.following)
        numbers = np.searchsorted(self.starts, follows, side="right") - 1
        heads: dict[int, int] = {}  # leading sample → its row
        for number in np.unique(np.searchsorted(self.starts, self.plan.heads[follows], side="right") - 1).tolist():
            known = self._part(number, ["row"])["row"].to_pylist()
            heads |= {self.starts[number] + i: self.firsts[number] + row for i, row in enumerate(known)}
        for number in np.unique(numbers).tolist():
            table = self._part(number)
            for place in follows[numbers == number].tolist():
                twin = table.slice(place - self.starts[number], 1).to_pylist()[0]
                head = int(self.plan.heads[place])
                if self.duplicates == "merge":
                    self.twins.setdefault(head, []).extend(twin["captions"])
                rows.append(_follower(twin, heads[head], self.firsts[number], self.duplicates))
        return sorted(rows, key=lambda row: row["row"])

    def _shard(self, number: int) -> dict[str, Any] | None:
        """One sidecar, staged, and its entry in the manifest; None where no sample is left."""
        start, receipt = self.starts[number], self.receipts[number]
        rows: list[dict[str, Any]] = []
        for i, row in enumerate(self._part(number).to_pylist()):
            if self.following[start + i]:
                continue
            copy = int(self.plan.copies[start + i])
            own = json_columns.row_of(row.pop("about"), self.kinds)
            row |= {self.names[name]: value for name, value in own.items()}
            row["row"] += self.firsts[number]
            row["key"] += f"_{copy}" if copy else ""
            row["captions"] = list(dict.fromkeys([*row["captions"], *self.twins.get(start + i, [])]))
            self.captions += len(row["captions"])
            self.fingerprint.sample(row["key"], row["sha256"], row["captions"])
            rows.append(row)
        if not rows:
            return None
        self.fingerprint.shard(len(rows))
        name, data = receipt["tar"].removesuffix(".tar") + SUFFIX, parquet_bytes(rows, self.schema)
        atomic_write(self.folder / WORK / name, data)
        made = {"sidecar": name, "sidecar_bytes": len(data), "sidecar_sha256": hashlib.sha256(data).hexdigest()}
        return made | {"samples": len(rows)} | {key: receipt[key] for key in ("tar", "tar_bytes", "tar_sha256")}

    def _empty(self, rejects: list[dict[str, Any]], reasons: Counter[str]) -> ClipwrightError:
        counts = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common()) or "no groups of members"
        first = "".join(f"; the first is {one['source']}: {one['detail']}" for one in rejects[:1])
        output.release(self.folder)
        return ClipwrightError(
            "E_PREP_EMPTY",
            "tars without a single sample",
            where=self.folder,
            found=f"{len(rejects)} rows: {counts}{first}",
            fix="a sample is KEY.jpg beside KEY.txt or KEY.json: mend the tars or make them with `clipwright prep`",
        )


def _follower(twin: dict[str, Any], head: int, first: int, duplicates: str) -> dict[str, Any]:
    """A row whose image stands earlier, as the rejects tell it."""
    columns = json.loads(twin["about"] or "{}")
    whole = {"captions": twin["captions"], "source_key": twin["source_key"], "columns": columns}
    return {
        "row": twin["row"] + first,
        "reason": "merged" if duplicates == "merge" else "duplicate",
        "detail": f"same image as row {head}",
        "source": twin["source"],
        "key": twin["key"],
        "kept_row": head,
        "kept_key": twin["key"],
        "record": canonical_json(whole),
    }
