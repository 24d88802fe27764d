"""The page of a run folder: how far it is, its curves, its data, its checkpoints and its config."""

from __future__ import annotations

import datetime
import importlib.metadata
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipwright.eval.report.curves import Curves, training_seconds
from clipwright.eval.report.run_folder import RunFolder
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count, format_duration
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.folders.output import CONFIG
from clipwright.pipeline.folders.remote import is_remote
from clipwright.pipeline.page.render import percent, render
from clipwright.pipeline.page.thumbnail import thumbnail
from clipwright.pipeline.pixels import PixelError

TEMPLATE = Path(__file__).with_name("run.html")
SAMPLES = 24  # training samples shown
THUMBNAIL_SIDE, MAX_BYTES = 160, 8192  # a smaller image is shown as stored
MAX_CAPTIONS, MAX_CHARACTERS = 3, 200  # shown of each sample, and of each caption


@dataclass(frozen=True)
class SampleOnPage:
    """A training sample. `image` is None with the reason in `missing`."""

    image: bytes | None
    missing: str
    captions: list[str]
    key: str


def headline(run: RunFolder) -> dict[str, Any]:
    """Returns the numbers that the command prints with --json."""
    best = Curves(run).best_step()
    losses = [value for value in run.series("loss") if value == value]
    return {
        "run": str(run.folder),
        "state": run.state().word,
        "step": run.last_step,
        "steps": run.steps,
        "loss": losses[-1] if losses else None,
        "best_step": None if best is None else best[0],
        "best_recall_at_1": None if best is None else best[1],
    }


def make_page(run: RunFolder) -> str:
    """Returns the page of a run."""
    curves, state = Curves(run), run.state()
    validation = curves.validation()
    samples, samples_problem = _training_samples(run)
    sections = [("training", "Training"), ("validation", "Validation"), ("data", "Training data")]
    sections += [("checkpoints", "Checkpoints"), ("config", "Config"), ("environment", "Environment")]
    return render(
        TEMPLATE,
        title=f"Training run: {run.folder.resolve().name}",
        lead="A training run: its progress, its data, its checkpoints and its config.",
        sections=sections,
        state=state,
        facts=_facts(run),
        tiles=_tiles(run, curves),
        unreadable=format_count(run.unreadable_lines, "line") if run.unreadable_lines else "",
        figures=curves.training(),
        has_marks={"resumed": bool(curves.resumed), "skipped": bool(curves.skipped)},
        accepted=[change for record in run.log for change in record.get("accepted") or []],
        validation=validation,
        validation_data=(run.tree.get("runtime") or {}).get("validation") or "",
        samples=samples,
        samples_problem=samples_problem,
        data=_data_text(run),
        checkpoints=run.checkpoints(),
        latest=run.latest(),
        changed=run.changed_keys(),
        config=(run.folder / CONFIG).read_text(encoding="utf-8"),
        environment=_environment(run),
    )


def _facts(run: RunFolder) -> dict[str, str]:
    """The row under the title; what is not known is left out."""
    status = run.status or {}
    versions = status.get("versions") or {}
    facts = {
        "Folder": str(run.folder.resolve()),
        "Started": _time(status.get("started")),
        "Ended": _time(status.get("ended")),
        "Machine": str(status.get("host", "")),
        "Version": ", ".join(f"{name} {versions[name]}" for name in ("torch", "deepspeed") if name in versions),
        "Training time": format_duration(training_seconds(run)) if run.log else "",
        "Page written": f"{datetime.datetime.now(datetime.UTC):%d %B %Y, %H:%M} UTC "
        f"by clipwright {importlib.metadata.version('clipwright')}",
    }
    return {name: value for name, value in facts.items() if value}


def _time(text: Any) -> str:
    try:
        return f"{datetime.datetime.fromisoformat(text):%d %B %Y, %H:%M} UTC"
    except (TypeError, ValueError):
        return ""


def _tiles(run: RunFolder, curves: Curves) -> list[tuple[str, str, str]]:
    """Name, value and remark of the headline numbers."""
    losses = [value for value in run.series("loss") if value == value]
    tiles = [
        ("Steps", f"{run.last_step:,}", f"of {run.steps:,}, {percent(min(run.last_step / run.steps, 1))}"),
        ("Samples", f"{run.last_step * run.batch:,}", f"in batches of {run.batch:,}"),
    ]
    if losses:
        tiles.append(("Loss", f"{losses[-1]:.3f}", f"first {losses[0]:.3f}"))
    best = curves.best_step()
    if best is not None:
        tiles.append(("Validation", percent(best[1]), f"best mean recall@1, step {best[0]:,}"))
    return tiles


def _environment(run: RunFolder) -> list[tuple[str, str]]:
    status = run.status or {}
    rows = [("command", str(status.get("command", ""))), ("started in", str(status.get("folder", "")))]
    newest = next((saved for saved in reversed(run.checkpoints()) if not saved.problem), None)
    if newest is not None:
        rows.append(("ranks at the newest checkpoint", str(newest.manifest.get("world"))))
        rows.append(("ZeRO stage at the newest checkpoint", str(newest.manifest.get("zero"))))
    rows.append(("precision", str(run.tree.get("precision"))))
    rows += [(name, str(version)) for name, version in (status.get("versions") or {}).items()]
    return [(name, value) for name, value in rows if value]


def _data_entries(run: RunFolder) -> list[str]:
    """The datasets that the config names."""
    train = (run.tree.get("data") or {}).get("train")
    if isinstance(train, str):
        return [train]
    return [str(entry["path"]) for entry in train or [] if isinstance(entry, dict) and "path" in entry]


def _data_text(run: RunFolder) -> str:
    names = _data_entries(run)
    return f"Trained on {names[0]}." if len(names) == 1 else f"Trained on a mixture: {', '.join(names)}."


def _training_samples(run: RunFolder) -> tuple[list[SampleOnPage], str]:
    """Returns random training samples as they are stored, without augmentation, and what could not be read."""
    entries = _data_entries(run)
    samples: list[SampleOnPage] = []
    problems: list[str] = []
    for entry in entries:
        if is_remote(entry):
            problems.append(f"{entry} is remote and was not read.")
            continue
        try:
            data = Dataset(_local_folder(run, entry))
            if data.remote:
                problems.append(f"The images of {entry} are remote and were not read.")
                continue
            stored = ((run.identity or {}).get("data") or {}).get("train")
            if len(entries) == 1 and stored not in (None, data.fingerprint):
                problems.append(f"{entry} has changed since the run was started: these samples may be others.")
            samples += _draw(data, -(-SAMPLES // len(entries)))
        except ClipwrightError as error:
            problems.append(f"{entry} cannot be read: {error.what}, {error.found}.")
        except OSError as error:
            problems.append(f"{entry} cannot be read: {error.strerror}.")
    return samples, " ".join(problems)


def _local_folder(run: RunFolder, entry: str) -> Path:
    """A relative path is relative to the folder in which the run was started, or to the current one."""
    started_in = (run.status or {}).get("folder")
    if isinstance(started_in, str) and (Path(started_in) / entry).is_dir():
        return Path(started_in) / entry
    return Path(entry)


def _draw(data: Dataset, count: int) -> list[SampleOnPage]:
    numbers = sorted(random.Random(0).sample(range(data.samples), min(count, data.samples)))
    drawn: list[SampleOnPage] = []
    shard = first = 0
    for number in numbers:
        while number >= first + data.sizes[shard]:
            first += data.sizes[shard]
            shard += 1
        record = data.record(shard, number - first)
        image, missing = None, ""
        try:
            image = thumbnail(data.image(shard, number - first), THUMBNAIL_SIDE, max_bytes=MAX_BYTES)
        except ClipwrightError as error:
            missing = f"{error.what}"
        except PixelError:
            missing = "the image cannot be decoded"
        captions = [_shorten(text) for text in record["captions"][:MAX_CAPTIONS]]
        drawn.append(SampleOnPage(image, missing, captions, record["key"]))
    return drawn


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
