"""Embeds a dataset with a model into an embedding folder, in one process or in several."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
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
from clipwright.pipeline.core.config import Resolved
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write, digest, staged_path, write_json
from clipwright.pipeline.core.log import Progress
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.part import Part
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.distributed.group import World
from clipwright.pipeline.folders import output
from clipwright.pipeline.folders.cache import CachedRuntime
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.folders.output import CONFIG, EMBEDDING
from clipwright.pipeline.folders.records import (
    MANIFEST,
    check_files,
    file_entries,
    read_manifest,
    write_manifest,
    write_origin,
)
from clipwright.pipeline.folders.schema import EMBEDDING_SCHEMA, METADATA, own_columns
from clipwright.pipeline.model.folder import Model, load_model

T = TypeVar("T")
RENDEZVOUS_SECONDS = 1800.0
COLLECTIVE_SECONDS = 7 * 86400.0  # ranks that are done wait for the slowest one


def _checked_part(text: str) -> str:
    Part.read(text, planned=False)
    return text


@configclass
class EmbedRuntime(CachedRuntime):
    """How embedding uses the machines. Not part of the result's identity."""

    batch: Annotated[int, Field(ge=1)] = 64
    """Images or texts per batch."""
    workers: Annotated[int, Field(ge=1)] = 2
    """Threads per process that read and decode images."""
    part: Annotated[str, AfterValidator(_checked_part)] = ""
    """Part of a job array: `K/N` embeds the K-th of N shares, `finish` joins them; empty: embed everything."""


@configclass
class EmbedConfig:
    """The model, and what it embeds: every image of a dataset, or every caption of every image."""

    model: str
    """Model folder."""
    data: str
    """Dataset folder, local or remote."""
    what: Literal["image", "text"] = "image"
    """`image`: one row per sample; `text`: one row per caption."""
    runtime: EmbedRuntime = EmbedRuntime()
    """How embedding uses the machine. Not part of the folder's identity."""


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
    """Writes the embedding folder `out`; returns its manifest and `made`: whether anything had to be embedded.

    Rank r embeds the r-th of equal contiguous ranges into part r, so that the parts in order are the dataset in order.
    Parts are staged and renamed when all ranks are done; the manifest is written last. If one rank fails, all ranks
    raise its error. A finished folder of the same inputs is kept, of other inputs refused (E_OUTPUT).

    A share of a job array (`runtime.part=K/N`) leaves its parts staged, each with a receipt, and returns their `rows`;
    a part that has a receipt is not embedded again. `finish` then makes the folder that as many ranks would make; it
    raises E_UNFINISHED if a receipt is missing.
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
    finished = _on_all_ranks(lambda: _finished_manifest(out, body, fresh) if world.is_rank0 else None)[0]
    if finished is not None:
        return {**finished, "made": False}
    with ExitStack() as claims:

        def claim() -> None:
            if world.is_rank0:
                claims.enter_context(output.claim(out, EMBEDDING))

        _on_all_ranks(claim)
        if part.step == "finish":
            manifest = _on_all_ranks(lambda: _join_parts(out, resolved, body) if world.is_rank0 else None)[0]
            assert manifest is not None
            return {**manifest, "made": True}
        rows = part.share(data.samples, world.rank, world.size)
        own_part = _EmbeddingPart(out, (part.number - 1) * world.size + world.rank)
        quiet = quiet or world.rank > 0
        try:
            if part.step == "share":
                identity = {**body, "of": part.of * world.size, "ranks": world.size}
                receipts = _on_all_ranks(
                    lambda: own_part.write_once(identity, lambda: own_part.write(model, data, rows, config, quiet))
                )
                made = any(written for _, written in receipts)
                return {**body, "rows": sum(receipt["rows"] for receipt, _ in receipts), "made": made}
            _on_all_ranks(lambda: output.clear(out, EMBEDDING) if world.is_rank0 else None)
            parts = _on_all_ranks(lambda: own_part.write(model, data, rows, config, quiet))
            manifest = _on_all_ranks(lambda: _finish(out, resolved, body, parts) if world.is_rank0 else None)[0]
        finally:
            if part.step == "all":
                own_part.discard()
        assert manifest is not None
        return {**manifest, "made": True}


def _finished_manifest(out: Path, body: dict[str, Any], fresh: bool) -> dict[str, Any] | None:
    """Checks `out`. Returns its manifest if it is a valid folder of these inputs; None if there is work to do."""
    output.check(out, EMBEDDING)
    if fresh or not (out / MANIFEST).exists():
        return None
    manifest = read_manifest(out, "embedding")
    made_from = {name: manifest[name] for name in body}
    output.require_same(out, "the embedding folder was made from other inputs", made_from, body)
    check_files(out, manifest["files"], "E_EMBED_HASH")
    return manifest


def _join_parts(out: Path, resolved: Resolved[EmbedConfig], body: dict[str, Any]) -> dict[str, Any]:
    """Joins the parts of a job array by their receipts. Raises E_UNFINISHED if a part is missing."""
    receipts = [
        json.loads(path.read_text(encoding="utf-8")) for path in out.glob(staged_path(out / "part-*.json").name)
    ]
    receipts = [receipt for receipt in receipts if receipt.items() >= body.items()]
    divisions = Counter((receipt["of"], receipt["ranks"]) for receipt in receipts).most_common(1)
    of, ranks = divisions[0][0] if divisions else (0, 1)
    by_number = {receipt["number"]: receipt for receipt in receipts if receipt["of"] == of}
    missing = sorted({number // ranks + 1 for number in range(of) if number not in by_number})
    if missing or not of:
        if of:
            numbers = ", ".join(map(str, missing[:6])) + (", …" if len(missing) > 6 else "")
            found = (
                f"{len(missing)} of {format_count(of // ranks, 'part')} of this model and dataset missing: {numbers}"
            )
        else:
            found = "no part of this model and dataset is there"
        raise ClipwrightError(
            "E_UNFINISHED",
            "parts of the job array are missing or did not finish",
            where=out,
            found=found,
            fix="run the missing parts with runtime.part=K/N; finished parts are not embedded again",
        )
    parts = [by_number[number] for number in range(of)]
    for part in parts:
        for name, entry in part["files"].items():
            check_files(out, {_current_path(out, name).name: entry}, "E_EMBED_HASH")
    manifest = _finish(out, resolved, body, parts)
    output.remove_staged(out)  # receipts, and parts of an earlier division
    return manifest


class _EmbeddingPart:
    """The rows of one rank: float16 unit embeddings and the table of their rows, staged until every rank is done."""

    def __init__(self, out: Path, number: int) -> None:
        self.out, self.number = out, number
        self.names = [f"part-{number:05d}{suffix}" for suffix in (".npy", ".parquet")]
        self.staged = [staged_path(out / name) for name in self.names]

    def write_once(self, identity: dict[str, Any], work: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
        """Runs `work` unless a receipt of the same identity exists; returns the receipt, and whether work was done."""
        identity = {**identity, "number": self.number}
        path = staged_path(self.out / f"part-{self.number:05d}.json")
        if path.is_file():
            receipt = json.loads(path.read_text(encoding="utf-8"))
            if receipt.items() >= identity.items() and self._has_files(receipt):
                return receipt, False
            path.unlink()
        receipt = {**identity, **work()}
        write_json(path, receipt)
        return receipt, True

    def _has_files(self, receipt: dict[str, Any]) -> bool:
        for name, entry in receipt["files"].items():
            path = _current_path(self.out, name)
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                return False
        return True

    def write(self, model: Model, data: Dataset, samples: range, config: EmbedConfig, quiet: bool) -> dict[str, Any]:
        """Embeds a range of samples; returns the number of rows and the manifest entry of each file."""
        rows = _write_rows(self.staged[1], data, samples, config.what)
        if rows == 0:
            return {"rows": 0, "files": {}}
        stored = np.lib.format.open_memmap(self.staged[0], "w+", np.float16, (rows, model.embed_dim))
        written = 0
        with Progress("embed", rows, config.what, quiet=quiet) as progress:
            for embeddings in _embeddings(model, data, samples, config):
                stored[written : written + len(embeddings)] = embeddings.numpy()
                written += len(embeddings)
                progress.add(len(embeddings))
        assert written == rows, (written, rows)
        stored.flush()
        entries = file_entries(self.staged[0].parent, [path.name for path in self.staged])
        return {
            "rows": rows,
            "files": {name: entries[path.name] for name, path in zip(self.names, self.staged, strict=True)},
        }

    def discard(self) -> None:
        for path in self.staged:
            path.unlink(missing_ok=True)


def _current_path(out: Path, name: str) -> Path:
    """Returns where a part's file is: staged, or under its final name after an interrupted `finish`."""
    staged = staged_path(out / name)
    return staged if staged.exists() else out / name


def _embeddings(model: Model, data: Dataset, samples: range, config: EmbedConfig) -> Iterator[torch.Tensor]:
    runtime = config.runtime
    if config.what == "image":
        images = dataset_images(data, samples)
        for _, embeddings in encode_images(model, images, batch=runtime.batch, workers=runtime.workers):
            yield embeddings
        return
    for _, _, rows in sidecar_slices(data, samples.start, samples.stop):
        texts = [text for captions in rows["captions"].to_pylist() for text in captions]
        yield from encode_texts(model, texts, batch=runtime.batch)


def _write_rows(path: Path, data: Dataset, samples: range, what: str) -> int:
    """Writes the row table of a part; returns the number of rows. Without rows there is no table."""
    rows = 0
    writer: pq.ParquetWriter | None = None
    try:
        for shard, _, sidecar in sidecar_slices(data, samples.start, samples.stop):
            table = embedding_rows(sidecar, data.tar_name(shard), what)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table.cast(writer.schema))
            rows += table.num_rows
    finally:
        if writer is not None:
            writer.close()
    return rows


def embedding_rows(sidecar: pa.Table, tar: str, what: str) -> pa.Table:
    """Returns embedding rows for sidecar rows: one per sample with its first caption, or (`text`) one per caption.

    The user's own columns become the struct `metadata`, so that none of them collides with a column of ours.
    """
    captions = sidecar["captions"].combine_chunks()
    if what == "text":
        sidecar, caption = sidecar.take(captions.value_parent_indices()), captions.flatten()
    else:
        caption = captions.values.take(captions.offsets[:-1])
    derived: dict[str, Any] = {"caption": caption, "tar": pa.array([tar] * sidecar.num_rows, pa.string())}
    columns = {name: derived[name] if name in derived else sidecar[name] for name in EMBEDDING_SCHEMA.names}
    own = own_columns(sidecar.schema)
    if own:
        columns[METADATA] = pa.StructArray.from_arrays(
            [sidecar[field.name].combine_chunks() for field in own], fields=own
        )
    return pa.table(columns)


def _finish(
    out: Path, resolved: Resolved[EmbedConfig], body: dict[str, Any], parts: list[dict[str, Any]]
) -> dict[str, Any]:
    """Renames the staged parts and writes config, origin and, last, the manifest."""
    files = {name: entry for part in parts for name, entry in part["files"].items()}
    renames = [(_current_path(out, name), out / name) for name in files]
    output.publish(*renames)
    atomic_write(out / CONFIG, resolved.yaml())
    write_origin(out, model=resolved.value.model, data=resolved.value.data)
    body = {**body, "rows": sum(part["rows"] for part in parts), "files": files}
    fingerprint = digest({**body, "files": {name: entry["sha256"] for name, entry in files.items()}})
    return write_manifest(out, "embedding", fingerprint, body)
