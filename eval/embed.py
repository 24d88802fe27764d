"""Embeds a dataset with a model into an embedding folder, in one process or in several, part by part."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from accelerate.state import PartialState
from accelerate.utils import gather_object
from pydantic import AfterValidator, Field

from clipwright.eval.embed_parts import RECEIPTS, PartWriter
from clipwright.pipeline.core.activity import Progress
from clipwright.pipeline.core.command import Call
from clipwright.pipeline.core.config import Resolved
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.part import Part
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.distributed.group import World
from clipwright.pipeline.folders import output
from clipwright.pipeline.folders.cache import CachedRuntime
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.folders.embeddings import fingerprint, part_name
from clipwright.pipeline.folders.output import CONFIG, EMBEDDING
from clipwright.pipeline.folders.records import MANIFEST, check_files, read_manifest, write_manifest, write_origin
from clipwright.pipeline.model.folder import Model, load_model

T = TypeVar("T")
RENDEZVOUS_SECONDS = 1800.0
COLLECTIVE_SECONDS = 7 * 86400.0  # ranks that are done wait for the slowest one
PARTS, MIN_PART_SAMPLES, MAX_PART_SAMPLES = 64, 256, 8192  # of the default of `part_samples`


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
    part_samples: Annotated[int, Field(ge=1)] | None = None
    """Samples per part; finished parts survive a stop. null: 1/64 of the dataset, at least 256 and at most 8,192."""
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


def embed(
    resolved: Resolved[EmbedConfig],
    out: Path,
    world: World,
    *,
    quiet: bool,
    fresh: bool,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Writes the embedding folder `out`; returns its manifest, and `new_rows`: how many rows this start embedded.

    The dataset is divided into parts of `part_samples` samples. Each is sealed when it is embedded, so that the same
    command, on any number of ranks, continues after a stop with the parts that are missing. The parts do not depend on
    the number of ranks. If one rank fails, all ranks raise its error. The manifest is written last. A folder of other
    inputs is refused: E_OUTPUT if it is finished, E_RESUME if not.

    A share of a job array (`runtime.part=K/N`) seals the K-th of N equal shares of the parts and returns their `rows`.
    `finish` writes the manifest; it raises E_UNFINISHED if a part is missing.

    say: prints a line for people.
    """
    config = resolved.value
    part = Part.read(config.runtime.part, planned=False)
    part.check(fresh=fresh)
    model, data = _open(config, str(_accelerate_state().device))
    writer = PartWriter(
        out=out,
        identity={
            "model": model.fingerprint,
            "data": data.fingerprint,
            "what": config.what,
            "part_samples": config.part_samples or _default_part_samples(data.samples),
        },
        model=model,
        data=data,
        what=config.what,
        batch=config.runtime.batch,
        workers=config.runtime.workers,
    )
    finished = _on_rank0(world, lambda: _finished_manifest(writer, fresh))
    if finished is not None:
        return {**finished, "new_rows": 0}
    with _claimed(world, writer, part, fresh):
        share = part.share(len(writer.ranges))
        receipts: dict[int, Any] = _on_rank0(world, lambda: {number: writer.sealed(number) for number in share})
        missing = [number for number, receipt in receipts.items() if receipt is None]
        if part.step == "finish":
            _require_no_missing(out, missing, len(share))
        elif 0 < len(missing) < len(share):
            say(f"resuming: {len(share) - len(missing)} of {format_count(len(share), 'part')} embedded already")
        own = [missing[i] for i in Part("all").share(len(missing), world.rank, world.size)]
        written = _on_all_ranks(lambda: _write(writer, own, part, quiet=quiet or not world.is_rank0))
        new = {number: receipt for rank_receipts in written for number, receipt in rank_receipts.items()}
        receipts.update(new)
        counts = {"new_rows": sum(receipt["rows"] for receipt in new.values())}
        if part.step == "share":
            rows = sum(receipt["rows"] for receipt in receipts.values())
            return {"identity": writer.identity, "dimension": model.embed_dim, "rows": rows, **counts}
        manifest = _on_rank0(world, lambda: _finish(writer, resolved, receipts))
    return {**manifest, **counts}


def kept_parts(out: Path) -> int:
    """Returns the number of sealed parts of an unfinished embedding folder."""
    return len(list((out / EMBEDDING.work).glob(RECEIPTS)))


def _open(config: EmbedConfig, device: str) -> tuple[Model, Dataset]:
    """Opens dataset and model on every rank; the dataset first, which takes less time."""
    opened: list[tuple[Model, Dataset]] = []

    def work() -> None:
        data = Dataset(config.data, cache=config.runtime.cache)
        if config.what == "text":
            data.require_captions("what=text")
        opened.append((load_model(Path(config.model), device), data))

    _on_all_ranks(work)
    return opened[0]


def _on_rank0(world: World, work: Callable[[], T]) -> T:
    """Runs `work` on rank 0; returns its result, or raises its error, on all ranks."""
    result: Any = _on_all_ranks(lambda: work() if world.is_rank0 else None)[0]
    return result


def _default_part_samples(samples: int) -> int:
    return min(max(-(-samples // PARTS), MIN_PART_SAMPLES), MAX_PART_SAMPLES)


def _finished_manifest(writer: PartWriter, fresh: bool) -> dict[str, Any] | None:
    """Checks the folder. Returns its manifest if it is a valid folder of these inputs; None if there is work to do."""
    if fresh:
        return None
    output.check(writer.out, EMBEDDING)
    if not (writer.out / MANIFEST).exists():
        return None
    manifest = read_manifest(writer.out, "embedding")
    what = "the embedding folder was made from other inputs"
    output.require_same(writer.out, what, manifest.get("identity", {}), writer.identity)
    check_files(writer.out, manifest["files"], "E_EMBED_HASH")
    return manifest


def check_inputs(call: Call, resolved: Resolved[EmbedConfig]) -> None:
    """Raises what `embed` would raise for its model, dataset and output folder."""
    config = resolved.value
    read_manifest(Path(config.model), "model")
    Dataset(config.data, cache=config.runtime.cache)
    output.check(call.output(), EMBEDDING)


@contextmanager
def _claimed(world: World, writer: PartWriter, part: Part, fresh: bool) -> Iterator[None]:
    """Claims the folder and records the identity, or compares it with the recorded one (E_RESUME).

    A share of a job array claims only its parts. If no part was sealed, nothing but status.json is left.
    """
    with ExitStack() as claims:

        def claim() -> None:
            out = writer.out
            name = f"share-{part.number}-of-{part.of}" if part.step == "share" else ""
            claims.enter_context(output.claim(out, EMBEDDING, fresh=fresh, part=name))
            found = output.recorded(out, EMBEDDING)
            if found is None:
                output.record_identity(out, EMBEDDING, writer.identity)
            else:
                what = "the unfinished embedding folder was made from other inputs"
                output.require_same(out, what, found.identity, writer.identity, code="E_RESUME")
            _failure_mark(out, part).unlink(missing_ok=True)

        _on_rank0(world, claim)
        try:
            yield
        finally:
            if world.is_rank0 and part.step != "share" and not kept_parts(writer.out):
                output.release(writer.out, EMBEDDING)


def _failure_mark(out: Path, part: Part) -> Path:
    """A file that a failing rank makes, so that the others stop after the part they are at."""
    return out / EMBEDDING.work / f"failed-{part.number}-of-{part.of}"


def _write(writer: PartWriter, numbers: list[int], part: Part, *, quiet: bool) -> dict[int, Any]:
    """Embeds and seals parts; returns their receipts."""
    receipts: dict[int, Any] = {}
    samples = sum(len(writer.ranges[number]) for number in numbers)
    failed = _failure_mark(writer.out, part)
    with Progress("embed", samples, "sample", quiet=quiet) as progress:
        for number in numbers:
            if failed.exists():
                break
            try:
                receipts[number] = writer.write(number, progress.add)
            except ClipwrightError:
                failed.touch()
                raise
    return receipts


def _require_no_missing(out: Path, missing: list[int], parts: int) -> None:
    """Raises E_UNFINISHED if the job array has not sealed every part."""
    if not missing:
        return
    names = ", ".join(map(part_name, missing[:6])) + (", …" if len(missing) > 6 else "")
    raise ClipwrightError(
        "E_UNFINISHED",
        "parts of the embedding folder are missing",
        where=out,
        found=f"{len(missing)} of {parts}: {names}",
        fix="run every runtime.part=K/N of the job array again; parts that are there are not embedded again",
    )


def _finish(writer: PartWriter, resolved: Resolved[EmbedConfig], receipts: dict[int, Any]) -> dict[str, Any]:
    """Writes config, origin and, last, the manifest; then removes what only resuming needs."""
    out = writer.out
    atomic_write(out / CONFIG, resolved.yaml())
    write_origin(out, model=resolved.value.model, data=resolved.value.data)
    ordered = [(number, receipts[number]) for number in sorted(receipts)]
    body = {
        "identity": writer.identity,
        "dimension": writer.model.embed_dim,
        "rows": sum(receipt["rows"] for _, receipt in ordered),
        "samples": writer.data.samples,
        "parts": [
            {"name": part_name(number), **{name: receipt[name] for name in ("samples", "rows", "binding")}}
            for number, receipt in ordered
        ],
        "files": {name: entry for _, receipt in ordered for name, entry in receipt["files"].items()},
    }
    manifest = write_manifest(out, "embedding", fingerprint(body), body)
    output.release(out, EMBEDDING)
    return manifest
