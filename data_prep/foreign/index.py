"""`data index`: a manifest and sidecars for tars that another tool wrote. The tars are not modified."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.data_prep.build import prep_folder
from clipwright.data_prep.build.engines import WorkerPool, WorkerRuntime, worker_count
from clipwright.data_prep.build.finish import Contents, count_reasons, finish, no_samples
from clipwright.data_prep.build.plan import DuplicatePolicy, resolve_duplicates
from clipwright.data_prep.build.shards import receipt_path, rejects_path
from clipwright.data_prep.foreign.groups import TarJob, scan_tar, tar_rows_path, tar_stat
from clipwright.data_prep.sources import json_columns
from clipwright.data_prep.sources.caption_files import CaptionFilesConfig, CaptionRules
from clipwright.pipeline.core.activity import Progress
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write, canonical_json, digest
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.folders import output
from clipwright.pipeline.folders.describe import describe
from clipwright.pipeline.folders.output import FOREIGN, FOREIGN_SIDECAR, WORK
from clipwright.pipeline.folders.records import MANIFEST
from clipwright.pipeline.folders.schema import REJECTS_SCHEMA, parquet_bytes, sidecar_schema, user_columns

CLASS_NAMES = "classnames.txt"  # line k + 1 is the name of class k


@configclass
class ForeignIndexConfig(CaptionFilesConfig):
    """Sidecars and a manifest for a folder of WebDataset tars that another tool wrote.

    A `.cls` member becomes the column `label`, and with `classnames.txt` beside the tars or in the folder above, the
    column `class_name`; such samples need no captions.
    """

    data: str
    """Folder of tars. They are only read."""
    duplicates: DuplicatePolicy = "merge"
    """Samples with equal images: merge their captions into the first, keep only the first, or keep all."""
    runtime: WorkerRuntime = field(default_factory=WorkerRuntime)
    """How the command runs; does not change the result."""


@dataclass(frozen=True)
class Indexed:
    """The result of a run: the manifest, whether an earlier run had finished it, how many members were ignored, and
    notes for the user."""

    manifest: dict[str, Any]
    already_finished: bool
    ignored: int
    notes: list[str]


def find_tars(folder: Path) -> list[str]:
    """Returns the names of the tars in a folder, sorted. Raises E_INPUT, E_PREP_EMPTY."""
    if not folder.is_dir():
        found, fix = "no such folder", "check the path"
        if folder.exists():
            found, fix = f"it is {describe(folder).text}", describe(folder).advice or "name a folder of tars"
        raise ClipwrightError("E_INPUT", "the folder of tars does not exist", where=folder, found=found, fix=fix)
    names = sorted(path.name for path in folder.glob("*.tar") if path.is_file())
    if not names:
        found = describe(folder)
        raise ClipwrightError(
            "E_PREP_EMPTY",
            "the folder has no tars",
            where=folder,
            found=f"it is {found.text}",
            fix=found.advice or "check the path",
        )
    return names


def index(config: ForeignIndexConfig, *, fresh: bool = False, quiet: bool = False) -> Indexed:
    """Writes sidecars, rejects and manifest for a folder of tars, or resumes an unfinished run.

    A row is a group of adjacent members with one key. The names in its JSON member become the user's columns. The
    files written depend only on the tars and on `duplicates`. Raises E_INPUT, E_PREP_EMPTY, E_OUTPUT for a folder
    that holds another dataset, E_RESUME or E_DATA_HASH if the tars or the settings changed since it was finished.
    """
    folder = Path(config.data)
    names = find_tars(folder)
    job = TarJob(folder, CaptionRules.of(config, ""))
    class_names = read_class_names(folder)
    identity = {"verb": "data index", "duplicates": config.duplicates, "tars": len(names), **job.rules.identity()}
    if class_names is not None:
        identity["class_names"] = digest(class_names)
    output.check(folder, FOREIGN)
    if not fresh and (folder / MANIFEST).exists():
        manifest = prep_folder.finished(folder, identity, FOREIGN)
        assert manifest is not None
        return Indexed(manifest, True, 0, [])
    with output.claim(folder, FOREIGN, fresh=fresh):
        output.record_identity(folder, FOREIGN, identity)
        receipts = _scan_all(job, names, config, quiet)
        numbers = [number for receipt in receipts for number in receipt["labels"]]
        if class_names is not None and numbers:
            _check_labels(folder, class_names, min(numbers), max(numbers))
        used_names = class_names if numbers else None
        manifest = _write_dataset(folder, receipts, config.duplicates, identity, used_names)
        output.release(folder, FOREIGN)
    notes: list[str] = []
    if numbers:
        source = f"class names from {CLASS_NAMES}" if used_names else f"no {CLASS_NAMES} was found"
        notes.append(f"class labels {min(numbers)} to {max(numbers)} in the column label; {source}")
    return Indexed(manifest, False, sum(receipt["ignored"] for receipt in receipts), notes)


def read_class_names(folder: Path) -> list[str] | None:
    """Returns the lines of classnames.txt in the folder of the tars or the one above, or None. Raises E_CLASSES."""
    for path in (folder / CLASS_NAMES, folder.resolve().parent / CLASS_NAMES):
        if not path.is_file():
            continue
        try:
            names = [" ".join(line.split()) for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
        except (OSError, UnicodeDecodeError) as error:
            raise _class_mismatch(
                path, str(error), "write it as UTF-8 text, the name of class k in line k + 1"
            ) from None
        if "" in names:
            found = f"line {names.index('') + 1} is empty"
            raise _class_mismatch(path, found, "write the name of class k in line k + 1")
        return names
    return None


def _check_labels(folder: Path, class_names: list[str], low: int, high: int) -> None:
    """Raises E_CLASSES if a class number has no name."""
    if low >= 0 and high < len(class_names):
        return
    last = len(class_names) - 1
    found = f"{format_count(len(class_names), 'name')}, of the classes 0 to {last}; the labels are {low} to {high}"
    raise _class_mismatch(folder / CLASS_NAMES, found, "write the name of class k in line k + 1, or remove the file")


def _class_mismatch(path: Path, found: str, fix: str) -> ClipwrightError:
    return ClipwrightError("E_CLASSES", "the class names do not fit the labels", where=path, found=found, fix=fix)


def _scan_all(job: TarJob, names: list[str], config: ForeignIndexConfig, quiet: bool) -> list[dict[str, Any]]:
    """Returns the receipts of all tars, in order. Tars that an earlier run has read are not read again."""
    folder = job.folder
    receipts: dict[int, dict[str, Any]] = {}
    for number, name in enumerate(names):
        path = receipt_path(folder, number)
        receipt = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if receipt.get("stat") == tar_stat(folder / name) and receipt.get("tar") == name and "columns" in receipt:
            receipts[number] = receipt
    tasks = [(number, name) for number, name in enumerate(names) if number not in receipts]
    with (
        WorkerPool(worker_count(config.runtime.workers, len(tasks)), job) as pool,
        Progress("index", len(names), "tar", quiet=quiet, already_done=len(receipts)) as progress,
    ):
        for receipt in pool.run(scan_tar, tasks):
            receipts[receipt["number"]] = receipt
            progress.add(1, receipt["samples"] == 0)
    return [receipts[number] for number in sorted(receipts)]


def _write_dataset(
    folder: Path,
    receipts: list[dict[str, Any]],
    duplicates: DuplicatePolicy,
    identity: dict[str, Any],
    class_names: list[str] | None,
) -> dict[str, Any]:
    """Writes sidecars, rejects and manifest of the scanned tars. Raises E_PREP_EMPTY if no tar has a sample."""
    scanned = _ScannedTars(folder, receipts, duplicates, class_names)
    rejects = scanned.rejects()
    if scanned.samples == 0:
        output.release(folder, FOREIGN)
        fix = "a sample is KEY.jpg with KEY.txt or KEY.json: fix the tars, or make new ones with `clipwright prep`"
        if set(count_reasons(rejects)) == {"E_CAP_EMPTY"}:
            fix = "to index the images without captions, add caption=none; else set caption to their key in the JSON"
        raise no_samples(folder, rejects, fix=fix)
    staged = [scanned.stage_sidecar(number) for number in range(len(receipts))]
    shards = [shard for shard in staged if shard is not None]
    sidecars = [shard["sidecar"] for shard in shards]
    output.publish(*((folder / WORK / name, folder / name) for name in sidecars), synced=True)
    contents = Contents(
        name="tars",
        rows_in=scanned.rows_in,
        shards=shards,
        rejects=rejects,
        captions_dropped=sum(receipt["captions_dropped"] for receipt in receipts),
        blank=scanned.blank,
        identity=identity,
        foreign=True,
    )
    return finish(folder, contents)


class _ScannedTars:
    """The rows of all scanned tars, with duplicate images resolved over the complete dataset.

    Rows and samples are counted over all tars: tar n has the rows from `first_rows[n]` and the samples from
    `first_samples[n]`.
    """

    def __init__(
        self,
        folder: Path,
        receipts: list[dict[str, Any]],
        duplicates: DuplicatePolicy,
        class_names: list[str] | None,
    ) -> None:
        self.folder = folder
        self.receipts = receipts
        self.duplicates: DuplicatePolicy = duplicates
        self.first_rows: list[int] = np.cumsum([0, *(receipt["groups"] for receipt in receipts)]).tolist()
        self.first_samples: list[int] = np.cumsum([0, *(receipt["samples"] for receipt in receipts)]).tolist()
        self.rows_in = self.first_rows[-1]
        self.samples = self.first_samples[-1]
        keys = [key for number in range(len(receipts)) for key in self._rows(number, ["key"])["key"].to_pylist()]
        self.plan = resolve_duplicates(np.array([key.encode() for key in keys], dtype="S32"), duplicates)
        self.is_duplicate = self.plan.leaders != np.arange(self.samples)
        self.blank: list[str] = []  # keys of the samples staged so far
        self.extra_captions: dict[int, list[str]] = {}  # leading sample → captions merged into it
        self.kinds = json_columns.combine(receipt["columns"] for receipt in receipts)
        self.class_names: list[str] = []
        if class_names is not None and self.kinds is not None and "class_name" not in self.kinds:
            self.class_names = class_names
            self.kinds["class_name"] = "text"
        json_schema = json_columns.schema_of(self.kinds)
        columns = user_columns(json_schema)
        self.sidecar_schema = sidecar_schema(json_schema)
        self.column_names = dict(zip(json_schema.names, columns.names, strict=True))  # JSON name → sidecar name

    def rejects(self) -> pa.Table:
        """Returns the rejected and the duplicate rows of all tars, and collects the captions to merge."""
        rows: list[dict[str, Any]] = []
        for number, first_row in enumerate(self.first_rows[:-1]):
            for row in pq.read_table(rejects_path(self.folder, number)).to_pylist():
                rows.append({**row, "row": row["row"] + first_row})
        duplicates = np.flatnonzero(self.is_duplicate)
        leader_rows = self._leader_rows(duplicates)
        tars = self._tar_of(duplicates)
        for number in np.unique(tars).tolist():
            table = self._rows(number)
            for sample in duplicates[tars == number].tolist():
                row = table.slice(sample - self.first_samples[number], 1).to_pylist()[0]
                leader = int(self.plan.leaders[sample])
                if self.duplicates == "merge":
                    self.extra_captions.setdefault(leader, []).extend(row["captions"])
                row["row"] += self.first_rows[number]
                rows.append(_duplicate_reject(row, leader_rows[leader], self.duplicates))
        rows.sort(key=lambda row: row["row"])
        return pa.Table.from_pylist(rows, schema=REJECTS_SCHEMA)

    def stage_sidecar(self, number: int) -> dict[str, Any] | None:
        """Writes one tar's sidecar to the work folder; returns its manifest entry, or None if no sample is left.

        Call `rejects` first: it collects the captions of the duplicates.
        """
        receipt = self.receipts[number]
        rows: list[dict[str, Any]] = []
        for sample, row in enumerate(self._rows(number).to_pylist(), start=self.first_samples[number]):
            if self.is_duplicate[sample]:
                continue
            values = json_columns.row_of(row.pop("metadata"), self.kinds)
            label = values.get("label")
            if isinstance(label, int) and 0 <= label < len(self.class_names):
                values["class_name"] = self.class_names[label]
            for name, value in values.items():
                row[self.column_names[name]] = value
            row["row"] += self.first_rows[number]
            copy = int(self.plan.copies[sample])
            if copy:
                row["key"] += f"_{copy}"
            if row.pop("blank"):
                self.blank.append(row["key"])
            captions = [*row["captions"], *self.extra_captions.get(sample, [])]
            row["captions"] = list(dict.fromkeys(captions))
            rows.append(row)
        if not rows:
            return None
        name = receipt["tar"].removesuffix(".tar") + FOREIGN_SIDECAR
        data = parquet_bytes(pa.Table.from_pylist(rows, schema=self.sidecar_schema))
        atomic_write(self.folder / WORK / name, data)
        return {
            "sidecar": name,
            "sidecar_bytes": len(data),
            "sidecar_sha256": hashlib.sha256(data).hexdigest(),
            "tar": receipt["tar"],
            "tar_bytes": receipt["tar_bytes"],
            "tar_sha256": receipt["tar_sha256"],
            "samples": len(rows),
        }

    def _rows(self, number: int, columns: list[str] | None = None) -> pa.Table:
        return pq.read_table(tar_rows_path(self.folder, number), columns=columns)

    def _tar_of(self, samples: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.first_samples, samples, side="right") - 1

    def _leader_rows(self, duplicates: np.ndarray) -> dict[int, int]:
        """Returns the plan row of each sample in the tars that hold leaders of `duplicates`."""
        plan_rows: dict[int, int] = {}
        for number in np.unique(self._tar_of(self.plan.leaders[duplicates])).tolist():
            rows = self._rows(number, ["row"])["row"].to_pylist()
            for sample, row in enumerate(rows, start=self.first_samples[number]):
                plan_rows[sample] = self.first_rows[number] + row
        return plan_rows


def _duplicate_reject(row: dict[str, Any], leader_row: int, duplicates: DuplicatePolicy) -> dict[str, Any]:
    """Returns the reject of a row whose image an earlier row has."""
    content = {
        "captions": row["captions"],
        "source_key": row["source_key"],
        "columns": json.loads(row["metadata"] or "{}"),
    }
    return {
        "row": row["row"],
        "reason": "merged" if duplicates == "merge" else "duplicate",
        "detail": f"same image as row {leader_row}",
        "source": row["source"],
        "key": row["key"],
        "kept_row": leader_row,
        "kept_key": row["key"],
        "record": canonical_json(content),
    }
