"""Reads a run folder as it is, finished or not: config, log, status and checkpoints. Nothing in it is changed."""

from __future__ import annotations

import datetime
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipwright.pipeline.core.config import inline_yaml, resolve
from clipwright.pipeline.core.config_files import read_yaml
from clipwright.pipeline.core.errors import ClipwrightError, error_line
from clipwright.pipeline.core.lock import LOCK, held_by_other
from clipwright.pipeline.core.status import DONE, INTERRUPTED, PREEMPTED, STATUS
from clipwright.pipeline.folders.output import CONFIG, IDENTITY
from clipwright.pipeline.folders.records import read_manifest
from clipwright.pipeline.train.checkpoints.checkpoint import LATEST, saved_steps
from clipwright.pipeline.train.config import RunConfig
from clipwright.pipeline.train.run_folder import LOG

# A log line this much younger than the status is of a later start.
LATER_SECONDS = 5


@dataclass(frozen=True)
class State:
    """How far a run is: one word, and a sentence about the steps and the end of its last command."""

    word: str  # training, finished, stopped, failed or unfinished
    text: str


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint folder. `problem` says why its manifest cannot be used."""

    step: int
    folder: Path
    manifest: dict[str, Any]
    problem: str = ""

    @property
    def bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.manifest.get("files", {}).values())


class RunFolder:
    """The files of a run. A log line that cannot be read, such as one that is being written, is counted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree: dict[str, Any] = read_yaml(folder / CONFIG)
        self.log, self.unreadable_lines = _read_log(folder / LOG)
        self.status = _read_object(folder / STATUS)
        self.identity = _read_object(folder / IDENTITY)
        schedule = self.tree.get("schedule")
        if not isinstance(schedule, dict) or not all(isinstance(schedule.get(key), int) for key in _SCHEDULE_KEYS):
            raise ClipwrightError(
                "E_INPUT",
                "the run's config has no schedule",
                where=folder / CONFIG,
                found="schedule.samples and schedule.global_batch are not whole numbers",
                fix="restore the file; the checkpoints are not affected",
            )
        self.batch: int = schedule["global_batch"]
        self.steps: int = max(schedule["samples"] // self.batch, 1)  # as ScheduleConfig.steps

    @property
    def last_step(self) -> int:
        """The last step in the log, or of the newest checkpoint if the log is shorter."""
        logged = self.log[-1]["step"] if self.log else 0
        return max([logged, *saved_steps(self.folder)])

    def series(self, name: str) -> list[float]:
        """A logged number at every logged step; nan where it is missing or not finite."""
        return [_finite(record.get(name)) for record in self.log]

    def samples(self) -> list[float]:
        """The training samples at every logged step."""
        return [float(record.get("samples", record["step"] * self.batch)) for record in self.log]

    def state(self) -> State:
        """Returns how far the run is, from its log and its status."""
        steps = f"step {self.last_step:,} of {self.steps:,}"
        complete = self.last_step >= self.steps
        if held_by_other(self.folder / LOCK):
            return State("training", f"At {steps}. A process holds the folder's lock.")
        if self.status is None or self._logged_after_status():
            if complete:
                return State("finished", f"Logged: {steps}. The run did not write its status.")
            seen = f"The last log line was written at {self._log_time():%d %B %Y, %H:%M:%S} UTC. " if self.log else ""
            return State("unfinished", f"At {steps}. {seen}Its processes were killed; run the same command again.")
        code, error = self.status.get("exit_code"), self.status.get("error")
        message = error_line(error) if error else "no error was recorded"
        if complete:
            text = f"Done: {steps}."
            if code != DONE:
                text += f" The last command ended with exit code {code}: {message}"
            return State("finished", text)
        if code == DONE:
            return State("stopped", f"At {steps}: runtime.stop_at ended it there.")
        if code in (PREEMPTED, INTERRUPTED):
            cause = "SIGTERM or SIGUSR1" if code == PREEMPTED else "Ctrl-C"
            return State("stopped", f"At {steps}, by {cause}. Run the same command again to resume.")
        return State("failed", f"At {steps}, with exit code {code}: {message}")

    def checkpoints(self) -> list[SavedCheckpoint]:
        """Returns the checkpoint folders in order of their steps."""
        found: list[SavedCheckpoint] = []
        for step, folder in sorted(saved_steps(self.folder).items()):
            try:
                found.append(SavedCheckpoint(step, folder, read_manifest(folder, "checkpoint")))
            except ClipwrightError as error:
                found.append(SavedCheckpoint(step, folder, {}, error.found or error.what))
        return found

    def latest(self) -> str:
        """The name of the checkpoint folder that a resumed run takes first; empty if there is none."""
        try:
            return (self.folder / LATEST).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return ""

    def changed_keys(self) -> list[tuple[str, str, str]] | None:
        """Returns (key, value, default) as YAML of every config value that is not the default; None if not known.

        A config with plugins is not compared: that would run their code, and a run folder may come from anyone.
        """
        if "plugins" in self.tree:
            return None
        chosen = {
            key: {"name": value["name"]}
            for key, value in self.tree.items()
            if isinstance(value, dict) and isinstance(value.get("name"), str)
        }
        try:
            defaults = _leaves(_plain(resolve(RunConfig, base=chosen, partial=True).tree))
        except ClipwrightError:
            return None
        values = _leaves(self.tree)
        pairs = [(key, inline_yaml(value), inline_yaml(defaults.get(key))) for key, value in values.items()]
        return [(key, value, default) for key, value, default in pairs if value != default]

    def _log_time(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp((self.folder / LOG).stat().st_mtime, datetime.UTC)

    def _logged_after_status(self) -> bool:
        assert self.status is not None
        try:
            ended = datetime.datetime.fromisoformat(self.status["ended"])
        except (KeyError, TypeError, ValueError):
            return False
        return bool(self.log) and (self._log_time() - ended).total_seconds() > LATER_SECONDS


_SCHEDULE_KEYS = ("samples", "global_batch")


def _read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the records of log.jsonl in order of their steps, and the number of lines that are no record.

    A step that is logged again, after a resume, replaces what was logged from it on.
    """
    records: list[dict[str, Any]] = []
    unreadable = 0
    if not path.is_file():
        return records, unreadable
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError):
            unreadable += 1
            continue
        if not isinstance(step, int) or step < 1:
            unreadable += 1
            continue
        while records and records[-1]["step"] >= step:
            records.pop()
        records.append(record)
    return records, unreadable


def _read_object(path: Path) -> dict[str, Any] | None:
    """Returns the object of a JSON file; None if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _finite(value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan


def _plain(tree: Any) -> Any:
    """Returns a config tree with lists for tuples, as its YAML file has them."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns `section.key` → value of a config tree."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        leaves.update(_leaves(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return leaves
