"""Saves a run's checkpoints during training: on all ranks together, complete or not at all.

A rank copies its state into host memory and continues training; a thread writes, syncs and hashes its files in a
staged folder. Once the files of all ranks are written, the checkpoint is committed: its manifest is written, the folder
renamed, and `latest` set to it; after that, old checkpoints are removed. What fails on one rank (a full disk, a lost
disk, values that are not finite) is raised on all ranks, and the older checkpoints remain.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from clipwright.pipeline.core.activity import during
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write, digest, fsync_path, staged_path
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.streams import print_warning
from clipwright.pipeline.core.system_errors import rank_name, system_error
from clipwright.pipeline.distributed.group import World, all_gather_object, run_on_rank0
from clipwright.pipeline.folders.output import discard, publish, remove_staged
from clipwright.pipeline.folders.records import file_entries, write_manifest
from clipwright.pipeline.train.checkpoints.checkpoint import (
    FOLDER,
    LATEST,
    LOSS,
    OPTIMIZER,
    TECHNIQUES,
    WEIGHTS,
    saved_steps,
    step_name,
)
from clipwright.pipeline.train.checkpoints.copies import Copies
from clipwright.pipeline.train.checkpoints.state_checks import LOSS_OPTIMIZER_PREFIX
from clipwright.pipeline.train.config import RuntimeConfig
from clipwright.pipeline.train.engine import Engine
from clipwright.pipeline.train.run_folder import LOG, read_log
from clipwright.pipeline.train.techniques.base import Technique

FREE_SPACE_FACTOR = 1.2  # times a checkpoint's bytes must be free before it is started


def staged_folder(run: Path, step: int) -> Path:
    """Returns where a checkpoint is written until it is committed."""
    return staged_path(run / FOLDER / step_name(step))


class Saver:
    """Saves a run's checkpoints, one at a time. Every rank has a saver, and all ranks call its methods alike.

    `late`, `pending` and `failed` are this rank's: the ranks must combine them before they act on them.
    """

    def __init__(
        self,
        run: Path,
        world: World,
        runtime: RuntimeConfig,
        metadata: dict[str, Any],
        step: int,
        techniques: Technique | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """metadata: further entries of all manifests; step: that of the checkpoint the run resumes from, or 0.

        say: prints a line for people.
        """
        self.run, self.world, self.runtime, self.metadata = run, world, runtime, metadata
        self.techniques = techniques or Technique()
        self.started = self.committed = step  # the newest checkpoint being written, the newest that is complete
        self._resumed_from = step
        self._own_steps = {step}
        self._say = say
        self._figures: dict[int, float] = {}  # of the name `keep_best`, by step
        self._known_figures: set[str] = set()
        self._last_save = time.monotonic()
        self._writer: _Writer | None = None
        self._copies = Copies(run, runtime.copy_to) if runtime.copy_to else None
        if world.is_rank0:
            remove_staged(run / FOLDER)  # left by a killed run
            if runtime.keep_best and (run / LOG).exists():
                for record in read_log(run):
                    self.note(record)

    @property
    def late(self) -> bool:
        """Whether the time for a checkpoint has come, by rank 0's clock."""
        return self.world.is_rank0 and time.monotonic() - self._last_save > self.runtime.save_minutes * 60

    @property
    def pending(self) -> bool:
        """Whether this rank's files are being written."""
        return self._writer is not None and self._writer.is_alive()

    @property
    def failed(self) -> bool:
        """Whether writing this rank's files has failed."""
        return self._writer is not None and self._writer.error is not None

    def due(self, step: int, late: bool) -> bool:
        """Whether to save after step `step`; late: whether any rank's `late` is set."""
        return late or step % self.runtime.save_every == 0

    def note(self, record: Mapping[str, Any]) -> None:
        """Takes from the record of a step, or from its scores, the figure by which `keep_best` judges that step."""
        figures = {name: v for name, v in record.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        self._known_figures |= figures.keys()
        if self.runtime.keep_best in figures:
            self._figures[record["step"]] = figures[self.runtime.keep_best]
            if record["step"] == self.committed and self.world.is_rank0:
                self._remove_old(self.committed)

    def save(self, engine: Engine, step: int, *, wait: bool = False, hook_pending: bool = False) -> None:
        """Copies every rank's state and starts to write it; with `wait`, returns once it is committed.

        hook_pending: the techniques' `after_update` of this step has failed, and must run again on resume. Raises the
        error of an earlier checkpoint that could not be written.
        """
        if step != self.started:
            self.commit()
            self._start(engine, step, hook_pending)
        if wait:
            self.commit()

    def commit_if_written(self, pending: bool, failed: bool) -> None:
        """Commits the checkpoint if all ranks have written it, or raises if it failed; the flags are any rank's."""
        if failed or not pending:
            self.commit()

    def finish(self) -> None:
        """Waits for copies in a bucket, then removes checkpoints that were kept only for them."""
        if self._copies is not None and self.world.is_rank0:
            with during("copying the checkpoint"):
                self._copies.finish()
            self._remove_old(self.committed)

    @contextmanager
    def committed_on_error(self) -> Iterator[None]:
        """Commits the checkpoint that is being written before an error leaves the block on all ranks."""
        try:
            yield
        except ClipwrightError:
            self.commit()
            raise

    def _start(self, engine: Engine, step: int, hook_pending: bool) -> None:
        self._last_save = time.monotonic()
        weights, optimizer_state = engine.weights(), engine.optimizer_state()
        technique_state = self.techniques.state()
        files: dict[str, dict[str, Tensor]] = {}
        if optimizer_state:
            files[OPTIMIZER.format(self.world.rank)] = optimizer_state
        if self.world.is_rank0:
            files[WEIGHTS] = weights
            files[LOSS] = _loss_state(engine)
            if technique_state:
                files[TECHNIQUES] = _to_host(technique_state)
        body = {
            "step": step,
            "samples": step * engine.config.schedule.global_batch,
            "updates": engine.updates,
            "skipped": step - engine.updates,
            "world": self.world.size,
            "zero": engine.zero,
            "hook_pending": hook_pending,
            **self.metadata,
        }
        own_bytes = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
        by_rank = all_gather_object((own_bytes, _free_bytes(self.run)))
        needed = sum(rank_bytes for rank_bytes, _ in by_rank)
        free = min(rank_free for _, rank_free in by_rank)
        run_on_rank0(lambda: self._stage(step, needed, free))
        self.started = step
        self._writer = _Writer(self.run, self.world, files, body, needed)

    def _warn_of_unknown_figure(self) -> None:
        name = self.runtime.keep_best
        if name and name not in self._known_figures:
            known = ", ".join(sorted(self._known_figures)) or "none"
            print_warning(f"runtime.keep_best={name} is not a logged figure; figures so far: {known}")

    def _stage(self, step: int, needed: int, free: int) -> None:
        """Makes an empty folder for the files of all ranks. Raises E_DISK if there is not enough free space."""
        if free < FREE_SPACE_FACTOR * needed:
            raise _disk_full(self.run, needed, free)
        try:
            staged_folder(self.run, step).mkdir(parents=True)
        except OSError as error:
            raise write_error(error, self.run, self.world, needed) from None

    def commit(self) -> None:
        """Waits for all ranks' files and commits the checkpoint, if one is being written; all ranks must call it."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        writer.join()
        by_rank = all_gather_object((writer.entries, writer.error))
        errors = [error for _, error in by_rank if error is not None]
        if errors:
            if self.world.is_rank0:
                shutil.rmtree(writer.folder, ignore_errors=True)
            raise errors[0]
        entries = {name: entry for rank_entries, _ in by_rank for name, entry in rank_entries.items()}
        run_on_rank0(lambda: self._publish(writer, {**writer.body, "files": entries}))
        self.committed = self.started
        self._own_steps.add(self.committed)
        if self.world.is_rank0:
            self._warn_of_unknown_figure()
            if self._copies is not None:
                self._copies.start()

    def _publish(self, writer: _Writer, body: dict[str, Any]) -> None:
        name = step_name(body["step"])
        try:
            write_manifest(writer.folder, "checkpoint", digest(body), body)
            # It replaces a folder of this name, which is corrupt: otherwise the run would have resumed from it.
            publish((writer.folder, self.run / FOLDER / name), synced=True)
            atomic_write(self.run / LATEST, f"{name}\n")
            self._remove_old(body["step"])
        except OSError as error:
            shutil.rmtree(writer.folder, ignore_errors=True)
            raise write_error(error, self.run, self.world, writer.needed) from None
        # Now, while the other ranks wait: if the run ends with an error of theirs, this process exits with them.
        self._say(f"saved step {body['step']:,} in {self.run / FOLDER / name}")

    def _remove_old(self, newest: int) -> None:
        """Removes checkpoints that need not be kept; only called once a newer one is complete."""
        folders = saved_steps(self.run)
        # Those after the checkpoint that this run resumed from were corrupt.
        corrupt = {step for step in folders if step > self._resumed_from} - self._own_steps - {newest}
        valid = {step: folder for step, folder in folders.items() if step not in corrupt}
        removable = folders.keys() - steps_to_keep(valid, self.runtime, self._figures)
        if self._copies is not None:
            removable -= self._copies.in_progress
        for step in removable:
            # Renamed first: a kill leaves no incomplete checkpoint under its name.
            discard(folders[step])


class _Writer(threading.Thread):
    """Writes, syncs and hashes this rank's files of one checkpoint during training."""

    def __init__(
        self, run: Path, world: World, files: dict[str, dict[str, Tensor]], body: dict[str, Any], needed: int
    ) -> None:
        """body: of the manifest, without the files; needed: bytes of all ranks' files."""
        super().__init__(name="checkpoint", daemon=True)
        self.run_path, self.world, self.files, self.body, self.needed = run, world, files, body, needed
        self.folder = staged_folder(run, body["step"])
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
            self.error = write_error(error, self.run_path, self.world, self.needed)
            if not isinstance(error, (OSError, SafetensorError)):
                raise
        self.files = {}

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        # The last update may have overflowed after its loss was finite.
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ClipwrightError(
                    "E_NONFINITE",
                    f"{name} is not finite: the checkpoint is not saved",
                    where=f"{self.run_path} step {self.body['step']}",
                    fix="lower optim.lr or use precision=fp32, with --fresh or another -o; older checkpoints remain",
                )
        save_file(dict(sorted(tensors.items())), path)
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read its files
        fsync_path(path)


def _loss_state(engine: Engine) -> dict[str, Tensor]:
    """Returns the loss's parameters and the state of its small optimizer, in host memory."""
    tensors = dict(engine.loss.state_dict())
    for index, entry in engine.loss_optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            tensors[f"{LOSS_OPTIMIZER_PREFIX}{index}.{key}"] = value
    return _to_host(tensors)


def _to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies in host memory."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def steps_to_keep(steps: Collection[int], runtime: RuntimeConfig, figures: Mapping[int, float]) -> set[int]:
    """Returns the steps whose checkpoints are kept: the newest ones, every `keep_every` steps one, and the best.

    figures: of the name `keep_best`, by step. The best has the highest one, of a loss the lowest; among equal ones, the
    earliest step.
    """
    kept = set(sorted(steps)[-runtime.keep :])
    if runtime.keep_every:
        kept |= {step for step in steps if step % runtime.keep_every == 0}
    sign = 1 if runtime.keep_best.endswith("loss") else -1
    ranked = [(sign * figures[step], step) for step in steps if step in figures]
    if runtime.keep_best and ranked:
        kept.add(min(ranked)[1])
    return kept


def _free_bytes(folder: Path) -> int:
    """Returns the bytes that may still be written to the disk; 0 if it does not answer."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return 0
    return disk.f_bavail * disk.f_frsize


def _disk_full(run: Path, needed: int, free: int) -> ClipwrightError:
    with_margin = int(FREE_SPACE_FACTOR * needed)
    return ClipwrightError(
        "E_DISK",
        "there is not enough disk space for a checkpoint",
        where=run,
        found=f"it needs {format_count(needed, 'byte')}, {with_margin:,} with a margin; {free:,} are free, "
        "not counting quotas",
        fix="free space and run the same command again; the older checkpoints remain",
    )


def write_error(error: Exception, run: Path, world: World, needed: int) -> ClipwrightError:
    """Returns E_DISK or E_SYSTEM for a checkpoint that this rank could not write.

    safetensors passes errors of the operating system on as text only.
    """
    number = re.search(r"os error (\d+)", str(error))
    if number is not None and not isinstance(error, OSError):
        error = OSError(int(number[1]), os.strerror(int(number[1])))
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _disk_full(run, needed, _free_bytes(run))
        error.filename = error.filename or run
        return system_error(error, world.rank, "a checkpoint could not be written")
    return ClipwrightError(
        "E_SYSTEM",
        "a checkpoint could not be written",
        where=run,
        found=f"{type(error).__name__}: {error} on {rank_name(world.rank)}",
        fix="run the same command again to resume; --debug shows the traceback",
    )
