"""The parts of an embedding folder: which samples each has, and how one is embedded, sealed and found again."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from clipwright.eval.encode import dataset_images, encode_images, encode_texts, sidecar_slices
from clipwright.pipeline.core.files import digest, staged_path, write_json
from clipwright.pipeline.folders import output
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.folders.embeddings import binding, canary_samples, part_name
from clipwright.pipeline.folders.output import EMBEDDING
from clipwright.pipeline.folders.records import file_difference, file_entries
from clipwright.pipeline.folders.schema import CANARY, EMBEDDING_SCHEMA, METADATA, own_columns
from clipwright.pipeline.model.folder import Model

What = Literal["image", "text"]
RECEIPTS = "part-*.json"


@dataclass(frozen=True)
class PartWriter:
    """Embeds parts of a dataset into the folder `out`.

    A part is sealed when its two files have their final names and its receipt is written. The receipt is what the
    manifest needs of the part; it stays in the folder's work folder until the manifest is written.
    """

    out: Path
    identity: dict[str, Any]
    model: Model
    data: Dataset
    what: What
    batch: int
    workers: int

    @cached_property
    def ranges(self) -> list[range]:
        """The samples of each part."""
        samples, step = self.data.samples, self.identity["part_samples"]
        return [range(start, min(start + step, samples)) for start in range(0, samples, step)]

    @cached_property
    def canaries(self) -> Sequence[int]:
        """The samples whose images are kept with their rows."""
        return canary_samples(self.data.samples, len(self.ranges)) if self.what == "image" else []

    def sealed(self, number: int) -> dict[str, Any] | None:
        """Returns the receipt of a part of this identity whose files are there and unchanged, or None."""
        path = self._receipt_path(number)
        try:
            receipt = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if receipt.pop("identity", None) != digest(self.identity):
            return None
        if any(file_difference(self.out / name, entry) for name, entry in receipt["files"].items()):
            return None
        return receipt

    def write(self, number: int, progress: Callable[[int], None]) -> dict[str, Any]:
        """Embeds and seals a part; returns its receipt. `progress` is called with numbers of samples as they are done.

        Interrupted, it leaves nothing of the part.
        """
        samples = self.ranges[number]
        names = [f"{part_name(number)}{suffix}" for suffix in (".npy", ".parquet")]
        staged = [staged_path(self.out / name) for name in names]
        try:
            rows = self._write_rows(staged[1], samples)
            if rows == 0:
                progress(len(samples))
                receipt: dict[str, Any] = {"samples": len(samples), "rows": 0, "binding": "", "files": {}}
            else:
                self._write_embeddings(staged[0], rows, samples, progress)
                entries = file_entries(self.out, [path.name for path in staged])
                files = {name: entries[path.name] for name, path in zip(names, staged, strict=True)}
                table = pq.read_table(staged[1], columns=["key", "caption"])
                bound = binding(self.identity, samples.start, table, files[names[0]]["sha256"])
                receipt = {"samples": len(samples), "rows": rows, "binding": bound, "files": files}
                output.publish(*((path, self.out / name) for path, name in zip(staged, names, strict=True)))
        finally:
            for path in staged:
                path.unlink(missing_ok=True)
        write_json(self._receipt_path(number), {**receipt, "identity": digest(self.identity)})
        return receipt

    def _receipt_path(self, number: int) -> Path:
        return self.out / EMBEDDING.work / f"{part_name(number)}.json"

    def _write_embeddings(self, path: Path, rows: int, samples: range, progress: Callable[[int], None]) -> None:
        stored = np.lib.format.open_memmap(path, "w+", np.float16, (rows, self.model.embed_dim))
        written = 0
        for embeddings, done in self._embeddings(samples):
            stored[written : written + len(embeddings)] = embeddings.numpy()
            written += len(embeddings)
            progress(done)
        assert written == rows, (written, rows)
        stored.flush()

    def _embeddings(self, samples: range) -> Iterator[tuple[torch.Tensor, int]]:
        """Yields embeddings in order, each batch with the number of samples that it completes."""
        if self.what == "image":
            images = dataset_images(self.data, samples)
            for keys, embeddings in encode_images(self.model, images, batch=self.batch, workers=self.workers):
                yield embeddings, len(keys)
            return
        for _, _, rows in sidecar_slices(self.data, samples.start, samples.stop):
            captions = rows["captions"].combine_chunks()
            owners = captions.value_parent_indices().to_pylist()
            texts, done, written = captions.flatten().to_pylist(), 0, 0
            for embeddings in encode_texts(self.model, texts, batch=self.batch):
                written += len(embeddings)
                complete = len(rows) if written == len(texts) else owners[written]
                yield embeddings, complete - done
                done = complete

    def _write_rows(self, path: Path, samples: range) -> int:
        """Writes the row table of a part; returns the number of rows. Without rows there is no table."""
        rows, start = 0, samples.start
        writer: pq.ParquetWriter | None = None
        try:
            for shard, first, sidecar in sidecar_slices(self.data, samples.start, samples.stop):
                stop = start + sidecar.num_rows
                chosen = self.canaries[bisect_left(self.canaries, start) : bisect_left(self.canaries, stop)]
                images = {sample - start: self.data.image(shard, first + sample - start) for sample in chosen}
                table = embedding_rows(sidecar, self.data.tar_name(shard), self.what, images)
                writer = writer or pq.ParquetWriter(path, table.schema)
                if table.num_rows:
                    writer.write_table(table.cast(writer.schema))
                rows += table.num_rows
                start = stop
        finally:
            if writer is not None:
                writer.close()
        return rows


def embedding_rows(sidecar: pa.Table, tar: str, what: What, canaries: dict[int, bytes]) -> pa.Table:
    """Returns embedding rows for sidecar rows: one per sample with its first caption, or (`text`) one per caption.

    A sample without captions has a row with a null caption, or, for `text`, none. The user's own columns become the
    struct `metadata`, so that none of them collides with a column of ours. canaries: row → stored bytes of its image.
    """
    captions = sidecar["captions"].combine_chunks()
    if what == "text":
        sidecar, caption = sidecar.take(captions.value_parent_indices()), captions.flatten()
    else:
        counts = captions.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        first = pa.array(captions.offsets.to_numpy()[:-1], mask=counts == 0)
        caption = captions.values.take(first)
    count = sidecar.num_rows
    derived: dict[str, Any] = {
        "caption": caption,
        "tar": pa.array([tar] * count, pa.string()),
        CANARY: pa.array([canaries.get(i) for i in range(count)], pa.binary()),
    }
    columns: dict[str, Any] = {}
    for field in EMBEDDING_SCHEMA:
        column = derived[field.name] if field.name in derived else sidecar[field.name]
        columns[field.name] = column.cast(field.type)
    own = own_columns(sidecar.schema)
    if own:
        columns[METADATA] = pa.StructArray.from_arrays(
            [sidecar[field.name].combine_chunks() for field in own], fields=own
        )
    return pa.table(columns)
