"""Commands of data preparation: prep, data verify, data stats, data index, data view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from clipwright.pipeline.core.command import Call, Command, Outcome
from clipwright.pipeline.core.messages import command_line, format_count

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from clipwright.data_prep.build.pack import Prepared

app = typer.Typer()
data_app = typer.Typer(help="Check, inspect and index dataset folders.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@Command(
    app,
    "prep",
    kind="clipwright.data_prep.build.pack:PrepConfig",
    resumes=True,
    inputs="clipwright.data_prep.build.pack:check_inputs",
    flags=("-o", "--dry-run", "--fresh"),
    examples=(
        "clipwright prep table source.path=pairs.parquet source.caption=captions -o shards",
        "clipwright prep folder source.path=photos images.resize=shortest images.size=256 -o shards",
    ),
)
def prep(call: Call) -> Outcome:
    """Convert image-text pairs to a dataset folder of shards; run the same command again to resume."""
    import time

    from clipwright.data_prep.build.pack import prepare

    started = time.monotonic()
    resolved = call.load()
    if call.dry_run:
        return _dry_run(resolved, quiet=call.quiet)
    folder = call.output()
    if resolved.value.runtime.part not in ("", "finish"):
        return _prep_part(call, resolved, folder)
    done = prepare(resolved, folder, fresh=call.fresh, quiet=call.quiet)
    names = ("rows_in", "written", "merged", "rejected", "rejects", "fingerprint")
    result: dict[str, Any] = {name: done.manifest[name] for name in names}
    result["shards"] = len(done.manifest["shards"])
    result["decisions"] = done.manifest.get("decisions", {})
    result["output"] = str(folder)
    result["notes"] = done.notes
    result["seconds"] = round(time.monotonic() - started, 3)
    if done.manifest["captions"]:
        then = command_line("train", "photos", f"data.train={folder}", "-o", "RUN")
    else:
        then = command_line("embed", "model=MODEL", f"data={folder}", "-o", "EMBEDDINGS")
    view = command_line("data", "view", folder, "-o", "PAGES")
    return Outcome(result, _summary(result, done), next=(view, then) if result["rejected"] else then)


def _prep_part(call: Call, resolved: Any, folder: Path) -> Outcome:
    """Runs one part of a job array."""
    from dataclasses import asdict

    from clipwright.data_prep.build.parts import prepare_part

    call.status.disable()  # the folder's status describes the complete job
    part = resolved.value.runtime.part
    done = prepare_part(resolved, folder, fresh=call.fresh, quiet=call.quiet)
    if done.already_finished:
        summary = "finished before, nothing to do"
    elif part == "plan":
        summary = f"{format_count(done.shards, 'shard')} to write"
    elif part.startswith("plan"):
        summary = "this part of the images is hashed"
    else:
        summary = (
            f"{format_count(done.shards, 'shard')}, {format_count(done.samples, 'sample')} written, "
            f"{done.rejected} merged or rejected"
        )
    return Outcome({"part": part, "output": str(folder), **asdict(done)}, f"prep: part {part}: {summary}")


def _summary(result: dict[str, Any], done: Prepared) -> str:
    lines = [f"prep: {_counts(result, 'rows')}"]
    if done.manifest["captions_dropped"]:
        lines.append(
            f"prep: {format_count(done.manifest['captions_dropped'], 'invalid caption')} dropped from written samples"
        )
    lines += [f"prep: {note}" for note in [*_decisions(done.manifest), *done.notes]]
    duration = "finished before, nothing to do" if done.already_finished else f"{result['seconds']:.1f} s"
    lines.append(f"prep: {format_count(result['shards'], 'shard')} in {result['output']}, {duration}")
    lines.append(f"prep: fingerprint {result['fingerprint']}")
    return "\n".join(lines)


def _decisions(manifest: dict[str, Any]) -> list[str]:
    """Returns what soft rules found in the samples of a dataset."""
    blank = manifest.get("decisions", {}).get("blank", 0)
    if not blank:
        return []
    return [f"{format_count(blank, 'blank image')} of one color only kept, listed in decisions.parquet"]


def _counts(result: dict[str, Any], unit: str) -> str:
    """Returns `5,000 rows in = 4,998 written + 0 merged + 2 rejected (E_IMG_EMPTY 2)`"""
    counts = f"{result['rows_in']:,} {unit} in = {result['written']:,} written + {result['merged']:,} merged"
    counts += f" + {result['rejected']:,} rejected"
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in result["rejects"].items())
    return f"{counts} ({reasons})" if reasons else counts


def _dry_run(resolved: Any, *, quiet: bool) -> Outcome:
    from clipwright.data_prep.build.pack import open_source

    source = open_source(resolved.value, quiet=quiet)
    most = -(-source.count // resolved.value.shards.samples)
    result = {"rows_in": source.count, "shards_at_most": most, "columns": source.columns.names}
    names = ", ".join(source.columns.names) or "none"
    return Outcome(
        result,
        f"prep: would read {format_count(source.count, 'row')} and write at most "
        f"{format_count(most, 'shard')}; columns: {names}",
    )


@Command(
    data_app,
    "data verify",
    kind="clipwright.data_prep.inspect.argument:DatasetArgument",
    subject="data",
    metavar="DATASET",
    flags=("-o",),
    examples=("clipwright data verify shards",),
)
def data_verify(call: Call) -> Outcome:
    """Compare every byte of a dataset folder with its manifest."""
    from pathlib import Path

    from clipwright.data_prep.inspect.verify import failure, verify

    with _report_folder(call):
        result = verify(Path(call.load().value.data), quiet=call.quiet)
        _write_report(call, result)
    lines = [f"bad {fault['text']}" for fault in result["faults"]]
    lines.append(
        f"verify: {format_count(result['shards_ok'], 'shard')} ok, {result['shards_bad']} bad, "
        f"{format_count(result['samples'], 'sample')}"
    )
    if not result["ok"]:
        return Outcome(result, "\n".join(lines), error=failure(result))
    lines.append(f"verify: every byte matches the manifest, fingerprint {result['fingerprint']}")
    return Outcome(result, "\n".join(lines), next=command_line("data", "stats", Path(result["data"])))


@Command(
    data_app,
    "data stats",
    kind="clipwright.data_prep.inspect.argument:DatasetArgument",
    subject="data",
    metavar="DATASET",
    flags=("-o",),
    examples=("clipwright data stats shards",),
)
def data_stats(call: Call) -> Outcome:
    """Print sizes, caption lengths, scripts, duplicates and reject reasons of a dataset folder."""
    from pathlib import Path

    from clipwright.data_prep.inspect.stats import stats, table

    with _report_folder(call):
        result = stats(Path(call.load().value.data), quiet=call.quiet)
        _write_report(call, result)
    return Outcome(result, table(result), next=command_line("data", "view", Path(result["data"]), "-o", "PAGES"))


@Command(
    data_app,
    "data index",
    kind="clipwright.data_prep.foreign.index:ForeignIndexConfig",
    resumes=True,
    subject="data",
    metavar="FOLDER",
    flags=("--dry-run", "--fresh"),
    examples=("clipwright data index /data/cc12m",),
)
def data_index(call: Call) -> Outcome:
    """Write sidecars and a manifest for tars made by other tools; the tars stay untouched. Run again to resume."""
    from pathlib import Path

    from clipwright.data_prep.foreign.index import find_tars, index

    config = call.load().value
    folder = Path(config.data)
    if call.dry_run:
        names = find_tars(folder)
        size = sum((folder / name).stat().st_size for name in names)
        result = {"tars": len(names), "bytes": size}
        return Outcome(result, f"index: would read {format_count(len(names), 'tar')}, {size / 1e6:.1f} MB")
    done = index(config, fresh=call.fresh, quiet=call.quiet)
    call.status.claim(folder)
    names = ("rows_in", "written", "merged", "rejected", "rejects", "fingerprint")
    result: dict[str, Any] = {name: done.manifest[name] for name in names}
    result["data"] = str(folder)
    result["ignored"] = done.ignored
    result["decisions"] = done.manifest.get("decisions", {})
    result["notes"] = done.notes
    lines = [f"index: {_counts(result, 'groups')}"]
    if done.ignored:
        lines.append(f"index: {format_count(done.ignored, 'member')} without a sample ignored")
    lines += [f"index: {note}" for note in [*_decisions(done.manifest), *done.notes]]
    lines.append("index: finished before, nothing to do" if done.already_finished else f"index: manifest in {folder}")
    return Outcome(result, "\n".join(lines), next=command_line("data", "verify", folder))


@Command(
    data_app,
    "data view",
    kind="clipwright.data_prep.inspect.view:ViewConfig",
    subject="data",
    metavar="DATASET",
    flags=("-o", "--dry-run"),
    examples=("clipwright data view shards -o pages",),
)
def data_view(call: Call) -> Outcome:
    """Write a static page of written pairs, and of rejected pairs with their reasons."""
    from clipwright.data_prep.inspect.view import view

    config, out = call.load().value, call.output()
    if call.dry_run:
        return Outcome({"data": config.data}, f"would write {out / 'view.html'} for {config.data}")
    result = view(config, out, quiet=call.quiet)
    shown = f"{result['kept']} kept and {format_count(result['rejected'], 'rejected pair')}"
    return Outcome(result, f"view: {shown} in {result['page']}, {result['bytes'] / 1e6:.1f} MB")


def _report_folder(call: Call) -> AbstractContextManager[object]:
    """Claims the folder of the report for as long as the command runs, if -o is given."""
    from contextlib import nullcontext

    from clipwright.pipeline.folders.output import INSPECTION, claim

    return nullcontext() if call.out is None else claim(call.out, INSPECTION)


def _write_report(call: Call, result: dict[str, Any]) -> None:
    """Writes the result as report.json if -o is given."""
    from clipwright.pipeline.core.files import write_json
    from clipwright.pipeline.folders.output import REPORT

    if call.out is not None:
        write_json(call.out / REPORT, result)
