"""A run folder: whose it is, whether it may be resumed, and what lies in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from clipwright.pipeline.core.config import read_yaml
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.records import STATUS, atomic_write, differences, write_json
from clipwright.pipeline.tokenizers.base import Tokenizer

CONFIG, IDENTITY = "config.yaml", "identity.json"
TOKENIZER = "tokenizer"  # the folder of a tokenizer that was learned for this run


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


def claim(run: Path, *, yaml: str, identity: dict[str, Any], fresh: bool, learned: Tokenizer | None = None) -> None:
    """Makes `run` this config's folder: new, or an unfinished run of equal identity. `learned`: what it is to keep.

    E_OUTPUT when the folder holds something else, E_RESUME (listing the changed keys) when it is another run's.
    """
    if fresh and (run / IDENTITY).is_file():
        shutil.rmtree(run)
    if (stored := stored_identity(run)) is not None:
        if changed := differences(stored, identity):
            raise ClipwrightError(
                "E_RESUME",
                "the folder holds a run of another config",
                where=run,
                found="; ".join(changed),
                fix="use the old values, another -o, or --fresh to start over",
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


def read_log(run: Path) -> list[dict[str, Any]]:
    """The logged steps of a run, in order."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
