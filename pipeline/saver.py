"""Saves a run's checkpoints while it trains: all ranks together, whole or not at all.

A rank copies its state into host memory and goes on; a thread writes, syncs and hashes its files in a hidden folder.
Once those of all ranks are there the checkpoint is sealed by its manifest, renamed, and only then pointed to by
`latest`; old ones go last. Disk full, a lost disk, numbers that are not finite: what fails on one rank is raised on
all, and the older checkpoints stand.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from clipwright.pipeline.checkpoint import FOLDER, LATEST, LOSS, MOMENTS, OPTIMIZER, WEIGHTS, step_name
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.records import (
    atomic_write,
    digest,
    file_entries,
    fsync_folder,
    read_manifest,
    write_manifest,
)
from clipwright.pipeline.distributed import World, from_all, on_first
from clipwright.pipeline.engine import Engine
from clipwright.pipeline.run import RuntimeConfig

SPARE = 1.2  # times its bytes must be free before a checkpoint is begun


class Saver:
    """Saves a run's checkpoints, one at a time; every rank has one, and all call it alike.

    `late`, `pending` and `failed` are what this rank knows: all ranks must agree on them before they act.
    """

    def __init__(self, run: Path, world: World, runtime: RuntimeConfig, identity: dict[str, Any], step: int) -> None:
        """`step`: the checkpoint the run goes on from, 0 for none."""
        self.run, self.world, self.runtime, self.identity = run, world, runtime, identity
        self.begun = self.sealed = step  # newest that is on its way, newest that stands
        self._from = step
        self._own = {step}
        self._since = time.monotonic()
        self._writing: _Writing | None = None

    @property
    def late(self) -> bool:
        """Whether it is time for a checkpoint. Clocks differ between ranks: the first one's counts."""
        return self.world.first and time.monotonic() - self._since > self.runtime.save_minutes * 60

    @property
    def pending(self) -> bool:
        return self._writing is not None and self._writing.is_alive()

    @property
    def failed(self) -> bool:
        return self._writing is not None and self._writing.error is not None

    def due(self, step: int, late: bool) -> bool:
        """Whether to save behind step `step`."""
        return late or step % self.runtime.save_every == 0

    def save(self, engine: Engine, step: int, record: Mapping[str, Any] | None = None, *, wait: bool = False) -> None:
        """Copies every rank's state and begins to write it; with `wait`, until it is sealed.

        record: the log's newest, of which `keep_best` names a figure. Raises what an earlier one failed with.
        """
        if step != self.begun:
            self._seal()
            self._begin(engine, step, record or {})
        if wait:
            self._seal()

    def settle(self, pending: bool, failed: bool) -> None:
        """Seals the checkpoint that all ranks have written, if there is one; raises on all what failed on one.

        pending, failed: whether any rank's is.
        """
        if failed or not pending:
            self._seal()

    def _begin(self, engine: Engine, step: int, record: Mapping[str, Any]) -> None:
        self._since = time.monotonic()
        weights, state = engine.weights(), engine.optimizer_state()
        files = {OPTIMIZER.format(self.world.rank): state} if state else {}
        if self.world.first:
            files |= {WEIGHTS: weights, LOSS: _loss_state(engine)}
        body = {
            "step": step,
            "samples": step * engine.config.schedule.global_batch,
            "updates": engine.updates,
            "skipped": step - engine.updates,
            "world": self.world.size,
            "zero": engine.zero,
            "identity": self.identity,
            "metric": _metric(record, self.runtime.keep_best),
        }
        staged = self.run / FOLDER / f".{step_name(step)}.partial"
        own = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
        every: Any = from_all((own, _free(self.run)))
        need, free = sum(bytes for bytes, _ in every), min(free for _, free in every)
        on_first(lambda: self._stage(staged, need, free))
        self.begun = step
        self._writing = _Writing(staged, files, body, need)

    def _stage(self, staged: Path, need: int, free: int) -> None:
        """An empty folder for the files of all ranks, and what a kill left of others gone."""
        if free < SPARE * need:
            raise _full(self.run, need, free)
        try:
            for left in (self.run / FOLDER).glob(".*.partial"):
                shutil.rmtree(left)
            staged.mkdir(parents=True)
        except OSError as error:
            raise _refused(error, self.run, need) from None

    def _seal(self) -> None:
        """Waits for this rank's files, then seals the checkpoint if those of all are there."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.join()
        every: Any = from_all((writing.entries, writing.error))
        error = next((error for _, error in every if error is not None), None)
        if error is not None:
            if self.world.first:
                shutil.rmtree(writing.folder, ignore_errors=True)
            raise error
        body = {**writing.body, "files": {name: entry for entries, _ in every for name, entry in entries.items()}}
        on_first(lambda: self._publish(writing, body))
        self.sealed = self.begun
        self._own.add(self.sealed)

    def _publish(self, writing: _Writing, body: dict[str, Any]) -> None:
        name = step_name(body["step"])
        final = self.run / FOLDER / name
        try:
            write_manifest(writing.folder, "checkpoint", digest(body), body)
            if final.exists():  # broken, or this run would not have come here again
                shutil.rmtree(final)
            writing.folder.rename(final)
            fsync_folder(final.parent)
            atomic_write(self.run / LATEST, f"{name}\n")
            self._retain(body["step"])
        except OSError as error:
            shutil.rmtree(writing.folder, ignore_errors=True)
            raise _refused(error, self.run, writing.need) from None

    def _retain(self, sealed: int) -> None:
        """Removes what need not be kept; never before a newer checkpoint stands."""
        steps = {int(path.name.removeprefix("step-")): path for path in (self.run / FOLDER).glob("step-*")}
        # What lies behind the checkpoint this run went on from was broken.
        stray = {step for step in steps if step > self._from} - self._own - {sealed}
        good = sorted(steps.keys() - stray)
        kept = set(good[-self.runtime.keep :])
        if self.runtime.keep_every:
            kept |= {step for step in good if step % self.runtime.keep_every == 0}
        kept |= _best({step: steps[step] for step in good}, self.runtime.keep_best)
        for step in steps.keys() - kept:
            # A kill in between leaves no half of one under its name.
            shutil.rmtree(steps[step].rename(steps[step].with_name(f".{steps[step].name}.partial")))


class _Writing(threading.Thread):
    """This rank's files of one checkpoint, written, synced and hashed beside the training."""

    def __init__(self, folder: Path, files: dict[str, dict[str, Tensor]], body: dict[str, Any], need: int) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.folder, self.files, self.body, self.need = folder, files, body, need
        self.entries: dict[str, dict[str, Any]] = {}
        self.error: ClipwrightError | None = None
        self.start()

    def run(self) -> None:
        try:
            for name, tensors in self.files.items():
                self._write(self.folder / name, tensors)
            self.entries = file_entries(self.folder, self.files)
        except ClipwrightError as error:
            self.error = error
        except Exception as error:
            self.error = _refused(error, self.folder, self.need)
            if not isinstance(error, (OSError, SafetensorError)):
                raise
        self.files = {}

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        # Never sealed, never promoted: the last update may have overflowed after its loss was finite.
        bad = next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)
        if bad is not None:
            raise ClipwrightError(
                "E_NONFINITE",
                "weights that are not finite are not saved",
                where=f"{path.parent.parent.parent} step {self.body['step']}",
                found=f"{bad} holds them",
                fix="lower optim.lr or use precision=fp32, with --fresh or another -o; older checkpoints stand",
            )
        save_file(dict(sorted(tensors.items())), path)
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that nobody else may read
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _loss_state(engine: Engine) -> dict[str, Tensor]:
    """The loss's parameters and its small optimiser's state."""
    state = engine.loss_optimizer.state_dict()["state"]
    moments = {f"{MOMENTS}{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}
    both = {**engine.loss.state_dict(), **moments}
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in both.items()}


def _metric(record: Mapping[str, Any], name: str) -> dict[str, float]:
    """The figure of that name, by which the best checkpoint is known; there may be none yet."""
    if not name or not record or record.get(name, name) is None:
        return {}
    if not isinstance(record.get(name), (int, float)):
        numbers = ", ".join(sorted(key for key, value in record.items() if isinstance(value, (int, float))))
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "a figure that the log does not hold",
            where=f"runtime.keep_best: {name}",
            found=f"there are {numbers}",
            fix="name one of them",
        )
    return {name: record[name]}


def _best(folders: Mapping[int, Path], name: str) -> set[int]:
    """The step whose manifest has the best figure of that name: the highest, of losses the lowest."""
    if not name:
        return set()
    known = {step: read_manifest(folder, "checkpoint")["metric"].get(name) for step, folder in folders.items()}
    sign = -1 if name.endswith("loss") else 1
    found = [(sign * value, step) for step, value in known.items() if value is not None]
    return {max(found)[1]} if found else set()


def _free(folder: Path) -> int:
    """Bytes that may still be written there; none where the disk does not answer."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def _full(run: Path, need: int, free: int) -> ClipwrightError:
    return ClipwrightError(
        "E_DISK",
        "no room for a checkpoint",
        where=run,
        found=f"it needs {need:,} bytes, with room to spare {int(SPARE * need):,}; {free:,} are free",
        fix="free space and run the same command again; the older checkpoints stand",
    )


def _refused(error: Exception, folder: Path, need: int) -> ClipwrightError:
    """What the operating system said while a checkpoint was written; safetensors hands it on as text."""
    full = [f"os error {number}" for number in (errno.ENOSPC, errno.EDQUOT)]
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or any(text in str(error) for text in full):
        return _full(folder, need, _free(folder if folder.exists() else folder.parent))
    return ClipwrightError(
        "E_SYSTEM",
        "a checkpoint could not be written",
        where=getattr(error, "filename", None) or folder,
        found=getattr(error, "strerror", None) or str(error),
        fix="mend the path or its permissions, which all ranks must share, and run the same command again",
    )
