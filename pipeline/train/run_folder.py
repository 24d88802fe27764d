"""A run folder: which run it belongs to, whether that may be resumed, and its files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from clipwright.pipeline.core.config_files import read_yaml
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write
from clipwright.pipeline.core.streams import print_warning
from clipwright.pipeline.folders import output
from clipwright.pipeline.folders.output import CONFIG, IDENTITY, RUN, TOKENIZER
from clipwright.pipeline.folders.records import differences
from clipwright.pipeline.tokenizers.base import Tokenizer

LOG, LEDGER = "log.jsonl", "ledger.jsonl"
# Keys of an identity that a resumed run may change if they are in `accept`: none that decides which samples a step
# sees, or the architecture of the weights.
ACCEPTABLE = re.compile(r"(optim|loss|data\.augment)\.(?!name$)[\w.]+|schedule\.(?!samples$|global_batch$)[\w.]+")


def stored_tree(run: Path) -> dict[str, Any] | None:
    """Returns the resolved config of the run in `run`, or None where no run was started; E_RESUME if it was edited."""
    path = run / CONFIG
    if not path.is_file():
        return None
    edits = config_edits(run)
    if edits:
        raise ClipwrightError(
            "E_RESUME",
            "the config of this run was changed by hand",
            where=path,
            found="; ".join(edits[: output.SHOWN]),
            fix=f"undo the changes ({IDENTITY} has the run's values), or run the train command again, which writes the "
            "file again; to change a run, give it other values and name their keys in accept",
        )
    return read_yaml(path)


def config_edits(run: Path) -> list[str]:
    """Returns `key: recorded → found` for each value in config.yaml that is not the one in the run's identity.

    The identity has no `runtime`; it has fingerprints in place of some values, which are not compared.
    """
    identity = stored_identity(run)
    if identity is None or not (run / CONFIG).is_file():
        return []
    recorded = {key: value for key, value in identity.items() if key not in ("plugins", "init_from")}
    for section, key in (("data", "train"), ("tokenizer", "fingerprint")):
        recorded[section] = {name: value for name, value in recorded.get(section, {}).items() if name != key}
    return differences(recorded, _restricted(read_yaml(run / CONFIG), recorded))


def _restricted(tree: Any, like: Any) -> Any:
    """Returns `tree` with only the keys that `like` has."""
    if not isinstance(tree, dict) or not isinstance(like, dict):
        return tree
    return {key: _restricted(value, like[key]) for key, value in tree.items() if key in like}


def stored_identity(run: Path) -> dict[str, Any] | None:
    """Returns the identity of the run in `run`, or None where no run was started. Raises E_RESUME if it is not JSON."""
    found = output.recorded(run, RUN)
    return None if found is None else found.identity


def check(run: Path, identity: dict[str, Any], accept: Collection[str] = ()) -> None:
    """Raises E_OUTPUT if the folder holds something else than a run, E_RESUME if it holds another run."""
    output.check(run, RUN)
    _require_same_run(run, identity, accept)


def _require_same_run(run: Path, identity: dict[str, Any], accept: Collection[str]) -> None:
    """Raises E_RESUME if the identity of the run in `run` differs in other keys than those of `accept`."""
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
            remedies={"schedule.samples": f"train on in a new run by init_from={run} and another -o"},
        )


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
    _require_same_run(run, identity, accept)
    for edit in config_edits(run):
        print_warning(
            f"{run / CONFIG} was changed by hand ({edit}): it is not used, and is written again from the command line"
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
        self._last = b""
        for line in self._file:
            if not 0 < _step_of(line) <= step:
                break
            kept_bytes += len(line)
            self._last = line
        self._file.truncate(kept_bytes)

    def write(self, record: dict[str, Any]) -> None:
        text = json.dumps(record, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        self._last = text.encode() + b"\n"
        self._file.write(self._last)
        self._file.flush()

    def last_record(self) -> dict[str, Any]:
        """Returns the last object of the file, which is empty if there is none."""
        return json.loads(self._last) if self._last else {}

    def replace_last(self, record: dict[str, Any]) -> None:
        """Writes `record` in place of the last line."""
        self._file.truncate(self._file.seek(0, os.SEEK_END) - len(self._last))
        self.write(record)

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
    """Yields the objects of a `StepFile`, up to a partial line that a kill may leave. Raises E_INPUT for any other."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ClipwrightError(
                    "E_INPUT",
                    "a line of the run's records is not JSON",
                    where=f"{path} line {number}",
                    found=str(error),
                    fix="restore the file, or remove this line and those after it",
                ) from None


def read_log(run: Path) -> list[dict[str, Any]]:
    """Returns the logged steps of a run, in order."""
    return list(read_steps(run / LOG))
