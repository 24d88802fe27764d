"""Checkpoints that are either whole or absent.

A checkpoint is written into a hidden folder, every file synced, sealed by a manifest with a SHA-256 a file, renamed,
and only then pointed to by `latest`; old ones go last. Loading verifies every file and falls back to the newest that
is whole. The files of `deepspeed/` are pickles: they are read only after their hashes were found right.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.records import (
    atomic_write,
    check_files,
    digest,
    file_entries,
    fsync_folder,
    read_manifest,
)
from clipwright.pipeline.core.records import write_manifest as write_folder_manifest
from clipwright.pipeline.distributed import any_rank, barrier
from clipwright.pipeline.engine import Engine

WEIGHTS, LOSS = "model.safetensors", "loss.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder and manifest body."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    def weights(self) -> dict[str, Tensor]:
        return load_file(self.folder / WEIGHTS)

    def loss(self) -> dict[str, Tensor]:
        return load_file(self.folder / LOSS)


def save(run: Path, engine: Engine, *, step: int, identity: dict[str, Any], keep: int) -> None:
    """Saves step `step` of every rank's state; every rank must call."""
    name = f"step-{step:08d}"
    staged, final = run / "checkpoints" / f".{name}.partial", run / "checkpoints" / name
    if engine.world.first:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
    barrier()
    weights = engine.weights()
    engine.save(staged)
    if engine.world.first:
        save_file({k: v.contiguous() for k, v in sorted(weights.items())}, staged / WEIGHTS)
        state = engine.loss_optimizer.state_dict()["state"]
        extra = {f"optimizer.{i}.{k}": v for i, entry in state.items() for k, v in entry.items()}
        own = {k: v.detach().cpu() for k, v in engine.loss.state_dict().items()}
        save_file({**own, **extra}, staged / LOSS)
    # Never sealed, never promoted: the last update may have overflowed after its loss was finite.
    bad = next((name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())), None)
    if any_rank(bad is not None, engine.world.device):
        raise ClipwrightError(
            "E_NONFINITE",
            "weights that are not finite are not saved",
            where=f"{run} step {step}",
            found=f"{bad or 'a tensor of another rank'} holds them",
            fix="lower optim.lr or use precision=fp32, with --fresh or another -o; older checkpoints stand",
        )
    barrier()  # every rank's files are there before they are hashed
    if engine.world.first:
        _seal(staged, step=step, world=engine.world.size, zero=engine.zero, identity=identity)
        if final.exists():  # left by a run that was cut back behind it
            shutil.rmtree(final)
        staged.rename(final)
        fsync_folder(final.parent)
        atomic_write(run / "latest", f"{name}\n")
        for old in sorted(final.parent.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    barrier()


def _seal(folder: Path, *, step: int, world: int, zero: int, identity: dict[str, Any]) -> None:
    names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    for name in names:
        handle = os.open(folder / name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    body = {
        "step": step,
        "world": world,
        "zero": zero,
        "identity": identity,
        "files": file_entries(folder, names),
    }
    write_folder_manifest(folder, "checkpoint", digest(body["files"]), body)


def drop_after(run: Path, step: int) -> None:
    """Removes checkpoints behind `step`: the run was cut back to it because they are broken."""
    for folder in (run / "checkpoints").glob("step-*"):
        if folder.name > f"step-{step:08d}":
            shutil.rmtree(folder)


def load_into(checkpoint: Checkpoint, engine: Engine) -> None:
    """Restores every rank's state from a verified checkpoint of the same world size and ZeRO stage."""
    found = (checkpoint.manifest["world"], checkpoint.manifest["zero"])
    if found != (engine.world.size, engine.zero):
        raise ClipwrightError(
            "E_RESUME",
            "a checkpoint of another layout",
            where=checkpoint.folder,
            found=f"saved by {found[0]} ranks under ZeRO {found[1]}, now {engine.world.size} under ZeRO {engine.zero}",
            fix="resume with the same number of ranks and runtime.zero",
        )
    engine.load(checkpoint.folder)
    tensors = checkpoint.loss()
    engine.loss.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("optimizer.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    whole = engine.loss_optimizer.state_dict()
    engine.loss_optimizer.load_state_dict({**whole, "state": state})


def newest(run: Path, step: int | None = None) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or step `step`.

    A broken one is named on stderr and the one before it is taken. E_CKPT_HASH when checkpoints exist and none is
    whole, E_CKPT_NONE when `step` was asked for and is missing; None when the run has none yet.
    """
    folders = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    if step is not None:
        folders = [folder for folder in folders if folder.name == f"step-{step:08d}"]
        if not folders:
            raise ClipwrightError(
                "E_CKPT_NONE", "no such checkpoint", where=run, found=f"no step {step}", fix="leave step out"
            )
    broken: ClipwrightError | None = None
    for folder in folders:
        try:
            manifest = read_manifest(folder, "checkpoint")
            check_files(folder, manifest["files"], "E_CKPT_HASH")
        except ClipwrightError as error:
            broken = error
            print(f"warning: skipping a broken checkpoint: {error}", file=sys.stderr, flush=True)
            continue
        return Checkpoint(folder, manifest)
    if broken is not None:
        raise ClipwrightError(
            "E_CKPT_HASH",
            "no checkpoint of this run is whole" if step is None else "the checkpoint is not whole",
            where=run,
            found=broken.found,
            fix="restore one, or start over with --fresh",
        )
    return None
