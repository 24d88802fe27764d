"""A run folder: whose it is, whether it may be resumed, and what lies in it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from clipwright.pipeline.core.config import read_yaml
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import STATUS, atomic_write, write_json
from clipwright.pipeline.folders.records import differences
from clipwright.pipeline.tokenizers.base import Tokenizer

CONFIG, IDENTITY = "config.yaml", "identity.json"
LOG, LEDGER = "log.jsonl", "ledger.jsonl"
TOKENIZER = "tokenizer"  # the folder of a tokenizer that was learned for this run
# Keys of an identity that a run may change on its way, if asked to: nothing that decides which samples a step sees, or
# what its weights are weights of.
ACCEPTABLE = re.compile(r"(optim|loss|data\.augment)\.(?!name$)[\w.]+|schedule\.(warmup|decay|final_lr_ratio)")


def stored_tree(run: Path) -> dict[str, Any] | None:
    """The resolved config of the run in `run`, or None where no run was started."""
    path = run / CONFIG
    return read_yaml(path) if path.is_file() else None


def stored_identity(run: Path) -> dict[str, Any] | None:
    """The identity of the run in `run`, or None where no run has begun."""
    path = run / IDENTITY
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ClipwrightError(
            "E_RESUME",
            "a run folder that does not say whose it is",
            where=path,
            found=f"not JSON: {error}",
            fix="restore the file, or start over with --fresh",
        ) from None


def claim(
    run: Path,
    *,
    yaml: str,
    identity: dict[str, Any],
    fresh: bool,
    accept: Collection[str] = (),
    learned: Tokenizer | None = None,
) -> None:
    """Makes `run` this config's folder: new, or an unfinished run of equal identity but for the keys in `accept`.

    `learned`: a trained tokenizer to store in it. E_OUTPUT when the folder holds something else, E_RESUME (listing the
    changed keys) when it is another run's.
    """
    if fresh and (run / IDENTITY).is_file():
        shutil.rmtree(run)
    if (stored := stored_identity(run)) is not None:
        changed = {line.partition(": ")[0]: line for line in differences(stored, identity)}
        if refused := [line for key, line in changed.items() if key not in accept]:
            open_to = all(ACCEPTABLE.fullmatch(key) for key in changed)
            raise ClipwrightError(
                "E_RESUME",
                "the folder holds a run of another config",
                where=run,
                found="; ".join(refused),
                fix="use the old values, "
                + (f"go on with the new ones by accept=[{','.join(changed)}], " if open_to else "")
                + "another -o, or --fresh to start over",
            )
    elif run.exists():
        # What a start leaves that was refused or killed before it had an identity is no obstacle to the next.
        odd = {path.name for path in run.iterdir()} - {STATUS, CONFIG, TOKENIZER} if run.is_dir() else {run.name}
        if odd := sorted(name for name in odd if not name.endswith(".partial")):
            raise ClipwrightError(
                "E_OUTPUT",
                "the output folder holds something else",
                where=run,
                found=f"no {IDENTITY} but {odd[0]}",
                fix="choose an empty folder",
            )
    run.mkdir(parents=True, exist_ok=True)
    if learned is not None:
        (run / TOKENIZER).mkdir(exist_ok=True)
        learned.save(run / TOKENIZER)
    atomic_write(run / CONFIG, yaml)
    # Last: with it the run has begun.
    write_json(run / IDENTITY, identity)


class StepFile:
    """A file of one JSON object a step or so; on resume it is cut back to the checkpoint's step.

    Each line is whole in the file once it is written, and on the disk once `sync` was called.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._file = path.open("ab+")
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if not 0 < _step_of(line) <= step:
                break
            whole += len(line)
        self._file.truncate(whole)

    def write(self, record: dict[str, Any]) -> None:
        text = json.dumps(record, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        self._file.write(text.encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


def _step_of(line: bytes) -> int:
    """A line's step; 0 for what a kill or a lost disk left of one."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else 0
    except ValueError:
        return 0


def read_steps(path: Path) -> Iterator[dict[str, Any]]:
    """What stands in a `StepFile`, one after another."""
    with path.open("rb") as file:
        yield from (json.loads(line) for line in file)


def read_log(run: Path) -> list[dict[str, Any]]:
    """The logged steps of a run, in order."""
    return list(read_steps(run / LOG))
