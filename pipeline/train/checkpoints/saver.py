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
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write, digest, fsync_folder
from clipwright.pipeline.distributed.group import World, all_gather_object, run_on_rank0
from clipwright.pipeline.folders.records import file_entries, read_manifest, write_manifest
from clipwright.pipeline.train.checkpoints.checkpoint import (
    FOLDER,
    LATEST,
    LOSS,
    MOMENTS,
    OPTIMIZER,
    TECHNIQUES,
    WEIGHTS,
    saved_steps,
    step_name,
)
from clipwright.pipeline.train.checkpoints.copies import Copies
from clipwright.pipeline.train.config import RuntimeConfig
from clipwright.pipeline.train.engine import Engine
from clipwright.pipeline.train.techniques.base import Technique

SPARE = 1.2  # times its bytes must be free before a checkpoint is begun


def staged(run: Path, step: int) -> Path:
    """Where a checkpoint lies until it is whole."""
    return run / FOLDER / f".{step_name(step)}.partial"


class Saver:
    """Saves a run's checkpoints, one at a time; every rank has one, and all call it alike.

    `late`, `pending` and `failed` are what this rank knows: all ranks must agree on them before they act.
    """

    def __init__(
        self,
        run: Path,
        world: World,
        runtime: RuntimeConfig,
        about: dict[str, Any],
        step: int,
        techniques: Technique | None = None,
    ) -> None:
        """about: what all manifests say of the run; step: the checkpoint it goes on from, 0 for none."""
        self.run, self.world, self.runtime, self.about = run, world, runtime, about
        self.techniques = techniques or Technique()
        self.begun = self.sealed = step  # newest that is on its way, newest that stands
        self._from = step
        self._own = {step}
        self._figures: dict[str, Any] = {}  # since the last checkpoint
        self._noted: set[str] = set()
        self._since = time.monotonic()
        self._writing: _Writing | None = None
        self._copies = Copies(run, runtime.copy_to) if runtime.copy_to else None
        if world.is_rank0:  # what a kill left of others
            for left in (run / FOLDER).glob(".*.partial"):
                shutil.rmtree(left, ignore_errors=True)

    @property
    def late(self) -> bool:
        """Whether it is time for a checkpoint. Clocks differ between ranks: the first one's counts."""
        return self.world.is_rank0 and time.monotonic() - self._since > self.runtime.save_minutes * 60

    @property
    def pending(self) -> bool:
        return self._writing is not None and self._writing.is_alive()

    @property
    def failed(self) -> bool:
        return self._writing is not None and self._writing.error is not None

    def due(self, step: int, late: bool) -> bool:
        """Whether to save behind step `step`."""
        return late or step % self.runtime.save_every == 0

    def note(self, figures: Mapping[str, Any]) -> None:
        """Figures of the model as it is; the one that `keep_best` names counts for the next checkpoint."""
        self._figures |= figures

    def save(self, engine: Engine, step: int, *, wait: bool = False) -> None:
        """Copies every rank's state and begins to write it; with `wait`, until it is sealed.

        Raises what an earlier one failed with.
        """
        if step != self.begun:
            self.seal()
            self._begin(engine, step)
        if wait:
            self.seal()

    def settle(self, pending: bool, failed: bool) -> None:
        """Seals the checkpoint that all ranks have written, if there is one; raises on all what failed on one.

        pending, failed: whether any rank's is.
        """
        if failed or not pending:
            self.seal()

    def finish(self) -> None:
        """Waits for what is copied elsewhere, and removes what had to stay for that."""
        if self._copies is not None and self.world.is_rank0:
            self._copies.finish()
            self._retain(self.sealed)

    def _begin(self, engine: Engine, step: int) -> None:
        self._since = time.monotonic()
        weights, state = engine.weights(), engine.optimizer_state()
        technique_state = self.techniques.state()
        files = {OPTIMIZER.format(self.world.rank): state} if state else {}
        if self.world.is_rank0:
            files |= {WEIGHTS: weights, LOSS: _loss_state(engine)}
            if technique_state:
                files[TECHNIQUES] = {
                    name: tensor.detach().to("cpu", copy=True) for name, tensor in technique_state.items()
                }
        body = {
            "step": step,
            "samples": step * engine.config.schedule.global_batch,
            "updates": engine.updates,
            "skipped": step - engine.updates,
            "world": self.world.size,
            "zero": engine.zero,
            **self.about,
            "figures": self._chosen(),
        }
        own = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
        every: Any = all_gather_object((own, _free(self.run)))
        need, free = sum(bytes for bytes, _ in every), min(free for _, free in every)
        run_on_rank0(lambda: self._stage(step, need, free))
        self.begun = step
        self._writing = _Writing(self.run, files, body, need)

    def _chosen(self) -> dict[str, float]:
        """The figure that the best is known by, if it was noted since the last checkpoint."""
        name, found, self._figures = self.runtime.keep_best, self._figures, {}
        self._noted |= {key for key, value in found.items() if isinstance(value, (int, float))}
        if name and name not in self._noted and self.world.is_rank0:
            print(
                f"warning: runtime.keep_best={name}: the figures so far are {', '.join(sorted(self._noted)) or 'none'}",
                file=sys.stderr,
                flush=True,
            )
        return {name: found[name]} if name and found.get(name) is not None else {}

    def _stage(self, step: int, need: int, free: int) -> None:
        """An empty folder for the files of all ranks."""
        if free < SPARE * need:
            raise _full(self.run, need, free)
        try:
            staged(self.run, step).mkdir(parents=True)
        except OSError as error:
            raise _refused(error, self.run, need) from None

    def seal(self) -> None:
        """Waits for this rank's files, then seals the checkpoint if those of all are there; every rank must call."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.join()
        every: Any = all_gather_object((writing.entries, writing.error))
        error = next((error for _, error in every if error is not None), None)
        if error is not None:
            if self.world.is_rank0:
                shutil.rmtree(writing.folder, ignore_errors=True)
            raise error
        body = {**writing.body, "files": {name: entry for entries, _ in every for name, entry in entries.items()}}
        run_on_rank0(lambda: self._publish(writing, body))
        self.sealed = self.begun
        self._own.add(self.sealed)
        if self._copies is not None and self.world.is_rank0:
            self._copies.start()

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
        steps = saved_steps(self.run)
        # What lies behind the checkpoint this run went on from was broken.
        stray = {step for step in steps if step > self._from} - self._own - {sealed}
        going = steps.keys() - kept({step: steps[step] for step in steps.keys() - stray}, self.runtime)
        for step in going - (self._copies.busy if self._copies is not None else set()):
            # A kill in between leaves no half of one under its name.
            shutil.rmtree(steps[step].rename(steps[step].with_name(f".{steps[step].name}.partial")))


class _Writing(threading.Thread):
    """This rank's files of one checkpoint, written, synced and hashed beside the training."""

    def __init__(self, saved: Path, files: dict[str, dict[str, Tensor]], body: dict[str, Any], need: int) -> None:
        """`saved`: the run; `need`: bytes of all ranks' files."""
        super().__init__(name="checkpoint", daemon=True)
        self.saved, self.files, self.body, self.need = saved, files, body, need
        self.folder = staged(saved, body["step"])
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
            self.error = _refused(error, self.saved, self.need)
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
                where=f"{self.saved} step {self.body['step']}",
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


def kept(folders: Mapping[int, Path], runtime: RuntimeConfig) -> set[int]:
    """The steps whose checkpoints stay: the newest, every `keep_every` steps one, and the best.

    The best has the highest figure of that name in its manifest, of losses the lowest.
    """
    found = set(sorted(folders)[-runtime.keep :])
    if runtime.keep_every:
        found |= {step for step in folders if step % runtime.keep_every == 0}
    if name := runtime.keep_best:
        sign = -1 if name.endswith("loss") else 1
        known = {step: _figure(folder, name) for step, folder in folders.items()}
        ranked = [(sign * value, step) for step, value in known.items() if value is not None]
        found |= {max(ranked)[1]} if ranked else set()
    return found


def _figure(folder: Path, name: str) -> float | None:
    with suppress(ClipwrightError):  # a broken one has none
        return read_manifest(folder, "checkpoint").get("figures", {}).get(name)
    return None


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
        found=f"it needs {need:,} bytes, with room to spare {int(SPARE * need):,}; {free:,} are free, a quota apart",
        fix="free space and run the same command again; the older checkpoints stand",
    )


def _refused(error: Exception, run: Path, need: int) -> ClipwrightError:
    """What the operating system said while a checkpoint was written; safetensors hands it on as text."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if getattr(error, "errno", None) in full or any(f"os error {number}" in str(error) for number in full):
        return _full(run, need, _free(run))
    return ClipwrightError(
        "E_SYSTEM",
        "a checkpoint could not be written",
        where=getattr(error, "filename", None) or run,
        found=getattr(error, "strerror", None) or str(error),
        fix="mend the path or its permissions, which all ranks must share, and run the same command again",
    )
