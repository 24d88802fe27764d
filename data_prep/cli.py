"""The commands of data preparation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from clipwright.pipeline.core.command import Call, command

if TYPE_CHECKING:
    from pathlib import Path

    from clipwright.data_prep.build.pack import Prepared

app = typer.Typer()
data_app = typer.Typer(help="Check and look at dataset folders.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@command(app, "prep", kind="clipwright.data_prep.build.pack:PrepConfig")
def prep(call: Call) -> None:
    """Turn image-text pairs into a dataset folder of shards; run again to go on."""
    import time

    from clipwright.data_prep.build.pack import prepare

    started = time.monotonic()
    resolved = call.load()
    if call.dry_run:
        _dry_run(call, resolved)
        return
    folder = call.output()
    if resolved.value.runtime.part not in ("", "finish"):
        _prep_part(call, resolved, folder)
        return
    done = prepare(resolved, folder, fresh=call.fresh, quiet=call.quiet)
    manifest = done.manifest
    names = ("rows_in", "written", "merged", "rejected", "rejects", "fingerprint")
    result: dict[str, Any] = {name: manifest[name] for name in names}
    result |= {"shards": len(manifest["shards"]), "output": str(folder), "notes": done.notes}
    result["seconds"] = round(time.monotonic() - started, 3)
    text = _summary(result, done)
    call.finish(result, text, then=f"clipwright train photos data.train={folder} -o RUN")


def _prep_part(call: Call, resolved: Any, folder: Path) -> None:
    from dataclasses import asdict

    from clipwright.data_prep.build.parts import prepare_part

    call.writes_status = False  # the folder's tells of the whole run
    part = resolved.value.runtime.part
    done = prepare_part(resolved, folder, fresh=call.fresh, quiet=call.quiet)
    told = f"{done.shards} shards, {done.samples} samples written, {done.rejected} merged or rejected"
    if part.startswith("plan"):
        told = f"{done.shards} shards to write" if part == "plan" else "its share of the images is hashed"
    if done.already:
        told = "finished before, nothing to do"
    call.finish({"part": part, "output": str(folder), **asdict(done)}, f"prep: part {part}: {told}")


def _summary(result: dict[str, Any], done: Prepared) -> str:
    counts = "{rows_in} rows in = {written} written + {merged} merged + {rejected} rejected".format(**result)
    reasons = ", ".join(f"{reason} {n}" for reason, n in result["rejects"].items())
    how = "finished before, nothing to do" if done.already else f"{result['seconds']:.1f} s"
    lines = [f"prep: {counts}" + (f" ({reasons})" if reasons else "")]
    if done.manifest["captions_dropped"]:
        lines.append(f"prep: {done.manifest['captions_dropped']} bad captions left out of written samples")
    lines += [f"prep: {note}" for note in done.notes]
    lines.append(f"prep: {result['shards']} shards in {result['output']}, {how}")
    lines.append(f"prep: fingerprint {result['fingerprint']}")
    return "\n".join(lines)


def _dry_run(call: Call, resolved: Any) -> None:
    from clipwright.data_prep.build.pack import open_source

    source = open_source(resolved.value, quiet=call.quiet)
    most = -(-source.count // resolved.value.shards.samples)
    result = {"rows_in": source.count, "shards_at_most": most, "columns": source.columns.names}
    names = ", ".join(source.columns.names) or "none"
    call.finish(result, f"prep: would read {source.count} rows and write at most {most} shards; columns {names}")


@command(
    data_app,
    "data verify",
    kind="clipwright.data_prep.inspect.dataset_files:DataConfig",
    subject="data",
    metavar="DATASET",
)
def data_verify(call: Call) -> None:
    """Read every byte of a dataset folder against its manifest."""
    from pathlib import Path

    from clipwright.data_prep.inspect.verify import require_ok, verify

    result = verify(Path(call.load().value.data), quiet=call.quiet)
    _report(call, result)
    lines = [f"bad {fault['text']}" for fault in result["faults"]]
    lines.append(f"verify: {result['shards_ok']} shards ok, {result['shards_bad']} bad, {result['samples']} samples")
    if result["ok"]:
        lines.append(f"verify: every byte is what the manifest says, fingerprint {result['fingerprint']}")
    then = f"clipwright data stats {result['data']}" if result["ok"] else ""
    call.finish(result, "\n".join(lines), then=then)
    require_ok(result)


@command(
    data_app,
    "data stats",
    kind="clipwright.data_prep.inspect.dataset_files:DataConfig",
    subject="data",
    metavar="DATASET",
)
def data_stats(call: Call) -> None:
    """Sizes, caption lengths, scripts, duplicates and reject reasons of a dataset folder."""
    from pathlib import Path

    from clipwright.data_prep.inspect.stats import stats, table

    result = stats(Path(call.load().value.data), quiet=call.quiet)
    _report(call, result)
    call.finish(result, table(result), then=f"clipwright data view {result['data']} -o PAGES")


@command(
    data_app,
    "data index",
    kind="clipwright.data_prep.foreign.index:ForeignIndexConfig",
    subject="data",
    metavar="FOLDER",
    output=False,
)
def data_index(call: Call) -> None:
    """Write sidecars and a manifest beside tars that others made, which stay untouched; run again to go on."""
    from pathlib import Path

    from clipwright.data_prep.foreign.index import find_tars, index

    config = call.load().value
    folder = Path(config.data)
    if call.dry_run:
        names = find_tars(folder)
        size = sum((folder / name).stat().st_size for name in names)
        call.finish({"tars": len(names), "bytes": size}, f"index: would read {len(names)} tars, {size / 1e6:.1f} MB")
        return
    done = index(config, fresh=call.fresh, quiet=call.quiet)
    call.out = folder  # whose status.json is ours to write now
    manifest = done.manifest
    result: dict[str, Any] = {name: manifest[name] for name in ("rows_in", "written", "merged", "rejected", "rejects")}
    result |= {"fingerprint": manifest["fingerprint"], "data": str(folder), "ignored": done.ignored}
    counts = "{rows_in} groups in = {written} written + {merged} merged + {rejected} rejected".format(**result)
    reasons = ", ".join(f"{reason} {n}" for reason, n in result["rejects"].items())
    lines = [f"index: {counts}" + (f" ({reasons})" if reasons else "")]
    if done.ignored:
        lines.append(f"index: {done.ignored} members are no part of a sample and were passed over")
    lines.append("index: finished before, nothing to do" if done.already else f"index: manifest in {folder}")
    call.finish(result, "\n".join(lines), then=f"clipwright data verify {folder}")


@command(data_app, "data view", kind="clipwright.data_prep.inspect.view:ViewConfig", subject="data", metavar="DATASET")
def data_view(call: Call) -> None:
    """Write a static page of kept pairs and of rejected pairs with their reasons: `data view DATASET -o PAGES`."""
    from clipwright.data_prep.inspect.view import view

    config, out = call.load().value, call.output()
    if call.dry_run:
        call.finish({"data": config.data}, f"would write {out / 'view.html'} about {config.data}")
        return
    result = view(config, out, quiet=call.quiet)
    shown = f"{result['kept']} kept and {result['rejected']} rejected pairs"
    call.finish(result, f"view: {shown} in {result['page']}, {result['bytes'] / 1e6:.1f} MB")


def _report(call: Call, result: dict[str, Any]) -> None:
    """With -o, the result as report.json."""
    from clipwright.data_prep.inspect.dataset_files import REPORT, claim_report
    from clipwright.pipeline.core.files import write_json

    if call.out is not None and not call.dry_run:
        claim_report(call.out)
        write_json(call.out / REPORT, result)
