"""The commands of data preparation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from clipwright.pipeline.core.command import Call, command

if TYPE_CHECKING:
    from clipwright.data_prep.pack import Prepared

app = typer.Typer()


@command(app, "prep", kind="clipwright.data_prep.pack:PrepConfig")
def prep(call: Call) -> None:
    """Turn image-text pairs into a dataset folder of shards; run again to go on."""
    import time

    from clipwright.data_prep.pack import prepare

    started = time.monotonic()
    resolved = call.load()
    if call.dry_run:
        _dry_run(call, resolved)
        return
    folder = call.output()
    done = prepare(resolved, folder, fresh=call.fresh, quiet=call.quiet)
    manifest = done.manifest
    names = ("rows_in", "written", "merged", "rejected", "rejects", "fingerprint")
    result: dict[str, Any] = {name: manifest[name] for name in names}
    result |= {"shards": len(manifest["shards"]), "output": str(folder), "notes": done.notes}
    result["seconds"] = round(time.monotonic() - started, 3)
    text = "" if call.quiet else _summary(result, done)
    call.finish(result, text, then=f"clipwright train photos data.train={folder} -o RUN")


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
    from clipwright.data_prep.pack import open_source

    source = open_source(resolved.value, quiet=call.quiet)
    most = -(-source.count // resolved.value.shards.samples)
    result = {"rows_in": source.count, "shards_at_most": most, "columns": source.columns.names}
    names = ", ".join(source.columns.names)
    call.finish(result, f"prep: would read {source.count} rows and write at most {most} shards; columns {names}")
