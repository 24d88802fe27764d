"""Checkpoints, and how a run finds the newest that is whole, on any number of ranks.

    step-00001000/  model.safetensors  loss.safetensors  optimizer-00000.safetensors (one a rank)  manifest.json

The manifest, written last, has a SHA-256 a file. Loading verifies every file, the ranks sharing the work, and falls
back to the newest that is whole. All files are safetensors and JSON: nothing in them can run code. `saver.py` writes
them.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import digest, json_text
from clipwright.pipeline.core.unsafe import refuse_code
from clipwright.pipeline.distributed.group import World, all_gather_object, broadcast_object
from clipwright.pipeline.folders.records import MANIFEST, check_files, differences, read_manifest
from clipwright.pipeline.losses.base import LossTerm
from clipwright.pipeline.model.folder import load_weights
from clipwright.pipeline.model.two_tower import TwoTower
from clipwright.pipeline.train import run_folder
from clipwright.pipeline.train.engine import Engine
from clipwright.pipeline.train.techniques.base import Technique

FOLDER, LATEST = "checkpoints", "latest"
WEIGHTS, LOSS, OPTIMIZER = "model.safetensors", "loss.safetensors", "optimizer-{:05d}.safetensors"
TECHNIQUES = "techniques.safetensors"  # only if a technique has state
SAID = {"step", "samples", "updates", "skipped", "world", "zero", "identity", "accepted", "figures", "files"}
MOMENTS = "optimizer."  # begins the names of the loss's own optimiser in its file


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder and manifest body."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    def changes(self, identity: dict[str, Any]) -> list[str]:
        """`key: old → new` where a run that goes on from here differs; E_RESUME for what no run may change."""
        found = differences(self.manifest["identity"], identity)
        if refused := [line for line in found if not run_folder.ACCEPTABLE.fullmatch(line.partition(": ")[0])]:
            raise ClipwrightError(
                "E_RESUME",
                "a checkpoint of another run",
                where=self.folder,
                found="; ".join(refused),
                fix="take it away, or start over with --fresh",
            )
        return found

    def accepted(self, changes: list[str]) -> list[dict[str, Any]]:
        """What was changed on the way here, and now, each with the step behind which it counts."""
        now = [{"step": self.step, "changed": changes}] if changes else []
        return self.manifest["accepted"] + now

    def weights(self) -> dict[str, Tensor]:
        return self._tensors(WEIGHTS)

    def loss(self) -> dict[str, Tensor]:
        """The parameters of the loss."""
        return {name: tensor for name, tensor in self._tensors(LOSS).items() if not name.startswith(MOMENTS)}

    def restore_weights(self, towers: TwoTower, loss: LossTerm) -> None:
        """To be called before DeepSpeed takes the towers and divides them among ranks as its stage has it."""
        load_weights(towers, self.weights(), self.folder / WEIGHTS)
        load_weights(loss, self.loss(), self.folder / LOSS)

    def restore_techniques(self, techniques: Technique) -> None:
        """Restores the state of the run's techniques."""
        state = self._tensors(TECHNIQUES) if TECHNIQUES in self.manifest["files"] else {}
        try:
            techniques.load_state(state)
        except KeyError as error:
            raise malformed(self.folder / TECHNIQUES, f"no tensor {error}") from None

    def restore_optimizers(self, engine: Engine) -> None:
        """To be called once DeepSpeed has the towers; reads what this rank needs from the files of all ranks."""
        files = [
            self.folder / name for name in sorted(self.manifest["files"]) if name not in (WEIGHTS, LOSS, TECHNIQUES)
        ]
        try:
            engine.restore_optimizer(files, self.manifest["updates"])
        except (SafetensorError, ValueError) as error:
            raise malformed(self.folder, str(error)) from None
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self._tensors(LOSS).items():
            if name.startswith(MOMENTS):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = tensor
        whole = engine.loss_optimizer.state_dict()
        engine.loss_optimizer.load_state_dict({**whole, "state": state})

    def _tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / name)
        except SafetensorError as error:
            raise malformed(self.folder / name, str(error)) from None


def malformed(path: Path, found: str) -> ClipwrightError:
    fix = "restore it, or start over with --fresh"
    return ClipwrightError("E_CKPT_HASH", "a checkpoint that is not of its form", where=path, found=found, fix=fix)


def newest(run: Path, step: int | None = None, world: World | None = None) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or step `step`; with `world`, ranks share the work and find the same.

    A broken one is named on stderr and the one before it is taken. E_CKPT_HASH when checkpoints exist and none is
    whole, E_CKPT_NONE when `step` was asked for and is missing, or all that were saved are; None when the run has none
    yet. E_UNSAFE for one with a file that could run code.
    """
    names = [path.name for _, path in sorted(saved_steps(run).items(), reverse=True)]
    pointer = _pointer(run)
    if world is not None:  # on a shared disk some may see more than others
        names, pointer = broadcast_object((names, pointer))  # pyright: ignore[reportGeneralTypeIssues]
    if step is not None:
        names = [name for name in names if name == step_name(step)]
        if not names:
            raise ClipwrightError(
                "E_CKPT_NONE", "no such checkpoint", where=run, found=f"no step {step}", fix="leave step out"
            )
    elif pointer is not None and pointer not in names and names:
        _warn(world, f"warning: {run / LATEST} names {pointer}, which is not there: taking the newest that is whole")
    broken: ClipwrightError | None = None
    for name in names:
        manifest, wrong = _verified(run / FOLDER / name, world)
        if wrong is None:
            assert manifest is not None
            return Checkpoint(run / FOLDER / name, manifest)
        if wrong.code == "E_UNSAFE":  # somebody put it there: no older checkpoint makes that good
            raise wrong
        broken = wrong
        _warn(world, f"warning: skipping a broken checkpoint: {wrong}")
    if broken is not None:
        raise ClipwrightError(
            "E_CKPT_HASH",
            "no checkpoint of this run is whole" if step is None else "the checkpoint is not whole",
            where=run,
            found=broken.found,
            fix="restore one, or start over with --fresh",
        )
    if pointer is not None or (pointer := _logged(run)) is not None:
        raise ClipwrightError(
            "E_CKPT_NONE",
            "the checkpoints of this run are gone",
            where=run / FOLDER,
            found=f"none is there, but {pointer} was saved",
            fix="restore it, or start over with --fresh",
        )
    return None


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def saved_steps(run: Path) -> dict[int, Path]:
    """The checkpoints' folders by step, whole or broken."""
    found = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in (run / FOLDER).glob("step-*"))
    return {int(match[1]): path for match, path in found if match is not None}


def _warn(world: World | None, line: str) -> None:
    if world is None or world.is_rank0:
        print(line, file=sys.stderr, flush=True)


def _pointer(run: Path) -> str | None:
    """What `latest` names."""
    try:
        return (run / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None


def _logged(run: Path) -> str | None:
    """The newest checkpoint that the log knows of."""
    path = run / run_folder.LOG
    saved = max((record.get("saved", 0) for record in run_folder.read_steps(path)), default=0) if path.exists() else 0
    return step_name(saved) if saved else None


def _verified(folder: Path, world: World | None) -> tuple[dict[str, Any] | None, ClipwrightError | None]:
    """A folder's manifest, or what is wrong with it; each rank hashes its share of the files."""
    manifest: dict[str, Any] | None = None
    wrong: ClipwrightError | None = None
    try:
        manifest = _manifest(folder)
        names = sorted(manifest["files"])
        own = names if world is None else names[world.rank :: world.size]
        check_files(folder, {name: manifest["files"][name] for name in own}, "E_CKPT_HASH")
    except ClipwrightError as error:
        wrong = error
    except OSError as error:
        wrong = malformed(folder, f"it cannot be read: {error.strerror or error}")
    return manifest, wrong if world is None else next(
        (one for one in all_gather_object(wrong) if one is not None), None
    )


def _manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest, to the last byte as it was written; its fingerprint covers all that stands in it."""
    manifest = read_manifest(folder, "checkpoint")
    refuse_code(folder, "a checkpoint")
    body = {key: value for key, value in manifest.items() if key not in ("format", "version", "fingerprint")}
    text = (folder / MANIFEST).read_bytes()
    if digest(body) != manifest.get("fingerprint") or text != json_text(manifest).encode():
        found = "its fingerprint is not that of what it says"
    elif missing := sorted(SAID - body.keys()) or sorted({WEIGHTS, LOSS} - dict(body["files"]).keys()):
        found = f"it says nothing of {missing[0]}"
    elif step_name(body["step"]) != folder.name:
        found = f"it is the one of step {body['step']}"
    else:
        return manifest
    raise malformed(folder / MANIFEST, found)
