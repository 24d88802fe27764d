"""A dataset through a model: an embedding folder, made by one process or by many."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.state import PartialState
from accelerate.utils import gather_object
from pydantic import AfterValidator, Field

from clipwright.eval.encode import dataset_images, encode_images, encode_texts, sidecar_slices
from clipwright.eval.folders import CONFIG, claim, write_origin
from clipwright.pipeline.core.config import Resolved
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write, digest, fsync_folder, write_json
from clipwright.pipeline.core.log import Progress
from clipwright.pipeline.core.part import Part
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.distributed.group import World
from clipwright.pipeline.folders.cache import CachedRuntime
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.folders.records import MANIFEST, check_files, file_entries, read_manifest, write_manifest
from clipwright.pipeline.model.folder import Model, load_model

T = TypeVar("T")
RENDEZVOUS_SECONDS = 1800.0
COLLECTIVE_SECONDS = 7 * 86400.0  # ranks that are done wait for the slowest one

# What a sidecar says about a sample; every other column is the user's own and goes into `metadata`.
SIDECAR = (
    *("row", "key", "captions", "width", "height", "offset", "size"),
    *("sha256", "dhash", "source", "source_key"),
)
_OWN = ("part-*.npy", "part-*.parquet", MANIFEST)


def _checked_part(text: str) -> str:
    Part.read(text, planned=False)
    return text


@configclass
class EmbedRuntime(CachedRuntime):
    """How embedding is spread over machines; not part of the result's identity.

    `part`: `K/N` embeds the K-th of N shares and leaves it for `finish`, which joins them: a job array.
    """

    batch: Annotated[int, Field(ge=1)] = 64
    workers: Annotated[int, Field(ge=1)] = 2  # threads that read and decode, in each process
    part: Annotated[str, AfterValidator(_checked_part)] = ""


@configclass
class EmbedConfig:
    """What is embedded: every image of a dataset, or every caption of every image."""

    model: str
    data: str
    what: Literal["image", "text"] = "image"
    runtime: EmbedRuntime = EmbedRuntime()


def _accelerate_state() -> PartialState:
    """Returns accelerate's view of the running process group: this rank's device, and whom `gather_object` asks."""
    # Without OMP_NUM_THREADS, accelerate sets the number of threads itself, and warns.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    # Without a GPU it takes launched processes for a group only if `cpu` is set.
    return PartialState(cpu=not torch.cuda.is_available())


def _on_all_ranks(work: Callable[[], T]) -> list[T]:
    """Runs `work` on every rank; returns the results in rank order or raises the first failing rank's error on all."""
    result: T | None = None
    failure: ClipwrightError | None = None
    try:
        result = work()
    except ClipwrightError as error:
        failure = error
    outcomes: Any = gather_object([(result, failure)])
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [result for result, _ in outcomes]


def embed(resolved: Resolved[EmbedConfig], out: Path, world: World, *, quiet: bool, fresh: bool) -> dict[str, Any]:
    """Writes the embedding folder `out` and returns its manifest with `made`: whether there was anything to do.

    Rank r embeds the r-th of equal contiguous ranges into part r, so parts in order are the dataset in order. Parts
    are staged and take their names when all ranks are done; the manifest is the last file. If one rank fails, all
    do, with its error. A finished folder of the same inputs is left alone, of others refused (E_OUTPUT). A share of a
    job array (`runtime.part`) leaves its parts staged, with a receipt each, and returns their `rows`; what it did
    before is not done again. `finish` gives the folder that as many ranks give; E_UNFINISHED without all receipts.
    """
    config = resolved.value
    part = Part.read(config.runtime.part, planned=False)
    part.check(fresh=fresh)
    device = str(_accelerate_state().device)
    opened: list[tuple[Model, Dataset]] = []
    cache = config.runtime.cache
    _on_all_ranks(lambda: opened.append((load_model(Path(config.model), device), Dataset(config.data, cache=cache))))
    [(model, data)] = opened
    body = {"model": model.fingerprint, "data": data.fingerprint, "what": config.what, "dimension": model.embed_dim}
    done = _on_all_ranks(lambda: _finished(out, body, fresh) if world.is_rank0 else None)[0]
    if done is not None:
        return {**done, "made": False}
    if part.step == "finish":
        manifest = _on_all_ranks(lambda: _join(out, resolved, body) if world.is_rank0 else None)[0]
        assert manifest is not None
        return {**manifest, "made": True}
    rows = part.share(data.samples, world.rank, world.size)
    own = _Part(out, (part.number - 1) * world.size + world.rank)
    quiet = quiet or world.rank > 0
    try:
        if part.step == "share":
            told = {**body, "of": part.of * world.size, "ranks": world.size}
            receipts = _on_all_ranks(lambda: own.once(told, lambda: own.write(model, data, rows, config, quiet)))
            made = any(made for _, made in receipts)
            return {**body, "rows": sum(receipt["rows"] for receipt, _ in receipts), "made": made}
        _on_all_ranks(lambda: _discard(out) if world.is_rank0 else None)
        parts = _on_all_ranks(lambda: own.write(model, data, rows, config, quiet))
        manifest = _on_all_ranks(lambda: _finish(out, resolved, body, parts) if world.is_rank0 else None)[0]
    finally:
        if part.step == "all":
            own.discard()
    assert manifest is not None
    return {**manifest, "made": True}


def _finished(out: Path, body: dict[str, Any], fresh: bool) -> dict[str, Any] | None:
    """Claims `out`. Its manifest if it is whole and of these inputs; None if there is work to do."""
    claim(out, _OWN)
    if (out / MANIFEST).exists() and not fresh:
        manifest = read_manifest(out, "embedding")
        changed = [name for name, value in body.items() if manifest[name] != value]
        if changed:
            raise ClipwrightError(
                "E_OUTPUT",
                "an embedding folder made from other inputs",
                where=out,
                found="; ".join(f"its {n} is {str(manifest[n])[:16]}, this one {str(body[n])[:16]}" for n in changed),
                fix="name a new folder, or add --fresh to replace it",
            )
        check_files(out, manifest["files"], "E_EMBED_HASH")
        return manifest
    return None


def _discard(out: Path) -> None:
    """Clears what an unfinished run has left."""
    (out / MANIFEST).unlink(missing_ok=True)
    for old in (*out.glob("part-*"), *out.glob("*.partial")):
        old.unlink()


def _join(out: Path, resolved: Resolved[EmbedConfig], body: dict[str, Any]) -> dict[str, Any]:
    """Joins the parts of a job array by their receipts. E_UNFINISHED where one is missing or of other inputs."""
    receipts = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob(staged_name("part-*.json"))]
    receipts = [receipt for receipt in receipts if receipt.items() >= body.items()]
    divisions = Counter((receipt["of"], receipt["ranks"]) for receipt in receipts).most_common(1)
    of, ranks = divisions[0][0] if divisions else (0, 1)
    by_number = {receipt["number"]: receipt for receipt in receipts if receipt["of"] == of}
    missing = sorted({number // ranks + 1 for number in range(of) if number not in by_number})
    if missing or not of:
        some = ", ".join(map(str, missing[:6])) + (", …" if len(missing) > 6 else "")
        lacking = f"{len(missing)} of {of // ranks} parts are not there: {some}" if of else "no part is there"
        raise ClipwrightError(
            "E_UNFINISHED",
            "parts that are missing or did not finish",
            where=out,
            found=f"of this model and dataset {lacking}",
            fix="run them again with runtime.part=K/N; those that are there are not embedded again",
        )
    parts = [by_number[number] for number in range(of)]
    for part in parts:
        for name, entry in part["files"].items():
            check_files(out, {_place(out, name).name: entry}, "E_EMBED_HASH")
    manifest = _finish(out, resolved, body, parts)
    for path in out.glob("*.partial"):  # receipts, and parts of an earlier division
        path.unlink()
    return manifest


class _Part:
    """One rank's rows: float16 unit vectors beside a table of what they are, staged until every rank is done."""

    def __init__(self, out: Path, number: int) -> None:
        self.out, self.number = out, number
        self.names = [f"part-{number:05d}{suffix}" for suffix in (".npy", ".parquet")]
        self.staged = [staged_path(out, name) for name in self.names]

    def once(self, told: dict[str, Any], work: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
        """The part's receipt, and whether it had to be written: not where an earlier one tells of the same part."""
        path, told = staged_path(self.out, f"part-{self.number:05d}.json"), {**told, "number": self.number}
        if path.is_file():
            receipt = json.loads(path.read_text(encoding="utf-8"))
            sizes = {name: entry["bytes"] for name, entry in receipt["files"].items()}
            places = {name: _place(self.out, name) for name in sizes}
            there = all(place.is_file() and place.stat().st_size == sizes[name] for name, place in places.items())
            if receipt.items() >= told.items() and there:
                return receipt, False
            path.unlink()
        receipt = {**told, **work()}
        write_json(path, receipt)
        return receipt, True

    def write(self, model: Model, data: Dataset, share: range, config: EmbedConfig, quiet: bool) -> dict[str, Any]:
        """Embeds samples `share` and returns the number of rows and each file's entry for the manifest."""
        start, stop = share.start, share.stop
        rows = _write_rows(self.staged[1], data, start, stop, config.what)
        if rows == 0:
            return {"rows": 0, "files": {}}
        vectors = np.lib.format.open_memmap(self.staged[0], "w+", np.float16, (rows, model.embed_dim))
        at = 0
        with Progress("embed", rows, f"{config.what}s", quiet=quiet) as progress:
            for unit in _vectors(model, data, start, stop, config):
                vectors[at : at + len(unit)] = unit.numpy()
                at += len(unit)
                progress.add(len(unit))
        assert at == rows, (at, rows)
        vectors.flush()
        entries = file_entries(self.staged[0].parent, [path.name for path in self.staged])
        return {
            "rows": rows,
            "files": {name: entries[path.name] for name, path in zip(self.names, self.staged, strict=True)},
        }

    def discard(self) -> None:
        for path in self.staged:
            path.unlink(missing_ok=True)


def staged_name(name: str) -> str:
    return f".{name}.partial"


def staged_path(out: Path, name: str) -> Path:
    return out / staged_name(name)


def _place(out: Path, name: str) -> Path:
    """Where a part's file is: staged, or under its name where a `finish` was stopped."""
    staged = staged_path(out, name)
    return staged if staged.exists() else out / name


def _vectors(model: Model, data: Dataset, start: int, stop: int, config: EmbedConfig) -> Iterator[torch.Tensor]:
    runtime = config.runtime
    if config.what == "image":
        images = dataset_images(data, range(start, stop))
        for _, unit in encode_images(model, images, batch=runtime.batch, workers=runtime.workers):
            yield unit
        return
    for _, _, table in sidecar_slices(data, start, stop):
        texts = [text for captions in table["captions"].to_pylist() for text in captions]
        yield from encode_texts(model, texts, batch=runtime.batch)


def _write_rows(path: Path, data: Dataset, start: int, stop: int, what: str) -> int:
    """The table beside the vectors: key, caption, captions, metadata, and where the image is (tar, offset, size)."""
    rows = 0
    writer: pq.ParquetWriter | None = None
    try:
        for shard, _, sidecar in sidecar_slices(data, start, stop):
            table = describe(sidecar, data.tar_name(shard), what)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table.cast(writer.schema))
            rows += table.num_rows
    finally:
        if writer is not None:
            writer.close()
    return rows


def describe(sidecar: pa.Table, tar: str, what: str) -> pa.Table:
    """The rows of an embedding part for a sidecar's: one a sample (with its first caption), or one a caption.

    The user's own columns become the struct `metadata`, so none of their names meets one of ours.
    """
    captions = sidecar["captions"].combine_chunks()
    if what == "text":
        sidecar, caption = sidecar.take(captions.value_parent_indices()), captions.flatten()
    else:
        caption = captions.values.take(captions.offsets[:-1])
    columns: dict[str, Any] = {"key": sidecar["key"], "caption": caption}
    columns["captions"] = sidecar["captions"]
    columns["tar"] = pa.array([tar] * sidecar.num_rows, pa.string())
    for name in ("offset", "size", "width", "height", "source"):
        columns[name] = sidecar[name]
    own = [name for name in sidecar.column_names if name not in SIDECAR]
    if own:
        arrays = [sidecar[name].combine_chunks() for name in own]
        columns["metadata"] = pa.StructArray.from_arrays(arrays, fields=[sidecar.schema.field(n) for n in own])
    return pa.table(columns)


def _finish(
    out: Path, resolved: Resolved[EmbedConfig], body: dict[str, Any], parts: list[dict[str, Any]]
) -> dict[str, Any]:
    """Gives the parts their names and writes config, origin and, last, the manifest."""
    files = {name: entry for part in parts for name, entry in part["files"].items()}
    for name in files:
        _place(out, name).replace(out / name)
    fsync_folder(out)
    atomic_write(out / CONFIG, resolved.yaml())
    write_origin(out, model=resolved.value.model, data=resolved.value.data)
    body = {**body, "rows": sum(part["rows"] for part in parts), "files": files}
    fingerprint = digest({**body, "files": {name: entry["sha256"] for name, entry in files.items()}})
    return write_manifest(out, "embedding", fingerprint, body)
