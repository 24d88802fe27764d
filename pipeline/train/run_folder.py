"""A run folder: which run it belongs to, whether that may be resumed, and its files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from clipwright.pipeline.core.config_files import read_yaml
from clipwright.pipeline.core.files import atomic_write
from clipwright.pipeline.folders import output
from clipwright.pipeline.folders.output import CONFIG, RUN, TOKENIZER
from clipwright.pipeline.tokenizers.base import Tokenizer

LOG, LEDGER = "log.jsonl", "ledger.jsonl"
# Keys of an identity that a resumed run may change if they are in `accept`: none that decides which samples a step
# sees, or the architecture of the weights.
ACCEPTABLE = re.compile(r"(optim|loss|data\.augment)\.(?!name$)[\w.]+|schedule\.(?!samples$|global_batch$)[\w.]+")


def stored_tree(run: Path) -> dict[str, Any] | None:
    """Returns the resolved config of the run in `run`, or None where no run was started."""
    path = run / CONFIG
    return read_yaml(path) if path.is_file() else None


def stored_identity(run: Path) -> dict[str, Any] | None:
    """Returns the identity of the run in `run`, or None where no run was started. Raises E_RESUME if it is not JSON."""
    found = output.recorded(run, RUN)
    return None if found is None else found.identity


def claim(
    run: Path,
    *,
    yaml: str,
    identity: dict[str, Any],
    fresh: bool,
    accept: Collection[str] = (),
    trained_tokenizer: Tokenizer | None = None,
) -> output.Claim:
    """Makes `run` the folder of this config: new, or an unfinished run whose identity differs only in keys of `accept`.

    `trained_tokenizer` is stored in it. Returns the claim, which the caller holds while it trains. Raises E_OUTPUT if
    the folder holds something else, E_RESUME with the changed keys if it holds another run, E_LOCKED if another process
    writes it.
    """
    claimed = output.claim(run, RUN, fresh=fresh)
    stored = stored_identity(run)
    if stored is not None:
        output.require_same(
            run,
            "the folder holds a run of another config",
            stored,
            identity,
            code="E_RESUME",
            accept=accept,
            acceptable=ACCEPTABLE,
        )
    if trained_tokenizer is not None:
        (run / TOKENIZER).mkdir(exist_ok=True)
        trained_tokenizer.save(run / TOKENIZER)
    atomic_write(run / CONFIG, yaml)
    # Written last: from now on the run counts as started.
    output.record_identity(run, RUN, identity)
    return claimed


class StepFile:
    """A file of one JSON object per line, each with its step; on resume it is cut back to the checkpoint's step.

    A line is complete in the file after `write`, and on the disk after `sync`.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._file = path.open("ab+")
        self._file.seek(0)
        kept_bytes = 0
        for line in self._file:
            if not 0 < _step_of(line) <= step:
                break
            kept_bytes += len(line)
        self._file.truncate(kept_bytes)

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
    """Returns a line's step; 0 for a partial line, which a kill or a lost disk may leave."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else 0
    except ValueError:
        return 0


def read_steps(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a `StepFile`."""
    with path.open("rb") as file:
        yield from (json.loads(line) for line in file)


def read_log(run: Path) -> list[dict[str, Any]]:
    """Returns the logged steps of a run, in order."""
    return list(read_steps(run / LOG))
