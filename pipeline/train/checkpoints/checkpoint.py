"""Checkpoints of a run, and how all ranks find the newest valid one, on any number of ranks.

    step-00001000/  model.safetensors  loss.safetensors  optimizer-00000.safetensors (one per rank)  manifest.json

The manifest, written last, has a SHA-256 per file. Loading verifies all files, divided among the ranks, and falls back
to the newest valid checkpoint. All files are safetensors and JSON: nothing in them can run code. `saver.py` writes
checkpoints.
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
MANIFEST_KEYS = {
    "step",
    "samples",
    "updates",
    "skipped",
    "world",
    "zero",
    "identity",
    "accepted",
    "figures",
    "files",
}
LOSS_OPTIMIZER_PREFIX = "optimizer."  # of the state of the loss's own optimizer, in the file of the loss


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder and manifest body."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    def changes(self, identity: dict[str, Any]) -> list[str]:
        """Returns `key: old → new` per change of a run that resumes here; E_RESUME for keys that must not change."""
        changes = differences(self.manifest["identity"], identity)
        refused = [line for line in changes if not run_folder.ACCEPTABLE.fullmatch(line.partition(": ")[0])]
        if refused:
            raise ClipwrightError(
                "E_RESUME",
                "the checkpoint belongs to a run of another config",
                where=self.folder,
                found="; ".join(refused),
                fix="remove the checkpoint, or start over with --fresh",
            )
        return changes

    def accepted(self, changes: list[str]) -> list[dict[str, Any]]:
        """Returns all accepted changes, earlier ones and `changes`, each with the step after which it applies."""
        accepted = list(self.manifest["accepted"])
        if changes:
            accepted.append({"step": self.step, "changed": changes})
        return accepted

    def weights(self) -> dict[str, Tensor]:
        """Returns the weights of the towers."""
        return self._tensors(WEIGHTS)

    def loss(self) -> dict[str, Tensor]:
        """Returns the parameters of the loss."""
        tensors = self._tensors(LOSS)
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(LOSS_OPTIMIZER_PREFIX)}

    def restore_weights(self, towers: TwoTower, loss: LossTerm) -> None:
        """Loads the weights; must be called before DeepSpeed partitions the parameters among the ranks."""
        load_weights(towers, self.weights(), self.folder / WEIGHTS)
        load_weights(loss, self.loss(), self.folder / LOSS)

    def restore_techniques(self, techniques: Technique) -> None:
        """Loads the state of the run's techniques."""
        state = self._tensors(TECHNIQUES) if TECHNIQUES in self.manifest["files"] else {}
        try:
            techniques.load_state(state)
        except KeyError as error:
            raise malformed(self.folder / TECHNIQUES, f"no tensor {error}") from None

    def restore_optimizers(self, engine: Engine) -> None:
        """Loads the optimizer state that this rank needs, from the files of all ranks."""
        others = (WEIGHTS, LOSS, TECHNIQUES)
        files = [self.folder / name for name in sorted(self.manifest["files"]) if name not in others]
        try:
            engine.restore_optimizer(files, self.manifest["updates"])
        except (SafetensorError, ValueError) as error:
            raise malformed(self.folder, str(error)) from None
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self._tensors(LOSS).items():
            if name.startswith(LOSS_OPTIMIZER_PREFIX):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = tensor
        engine.loss_optimizer.load_state_dict({**engine.loss_optimizer.state_dict(), "state": state})

    def _tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / name)
        except SafetensorError as error:
            raise malformed(self.folder / name, str(error)) from None


def malformed(path: Path, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_CKPT_HASH",
        "the checkpoint is malformed",
        where=path,
        found=found,
        fix="restore it, or start over with --fresh",
    )


def newest(run: Path, step: int | None = None, world: World | None = None) -> Checkpoint | None:
    """Returns the newest valid checkpoint of a run, or that of step `step`; None if the run has none yet.

    With `world`, all ranks must call it: they divide the files among them and return the same checkpoint. A corrupt
    checkpoint is named on stderr and the one before it is taken. Raises E_CKPT_HASH if checkpoints exist and none is
    valid, E_CKPT_NONE if that of `step` or all that were saved are missing, E_UNSAFE for one with a file that could run
    code.
    """
    names = [path.name for _, path in sorted(saved_steps(run).items(), reverse=True)]
    pointer = _read_pointer(run)
    if world is not None:  # on a shared file system some ranks may see more than others
        names, pointer = broadcast_object((names, pointer))  # pyright: ignore[reportGeneralTypeIssues]
    if step is not None:
        names = [name for name in names if name == step_name(step)]
        if not names:
            raise ClipwrightError(
                "E_CKPT_NONE", "the checkpoint does not exist", where=run, found=f"no step {step}", fix="leave step out"
            )
    elif pointer is not None and pointer not in names and names:
        _warn(
            world, f"warning: {run / LATEST} names {pointer}, which does not exist: taking the newest valid checkpoint"
        )
    failure: ClipwrightError | None = None
    for name in names:
        manifest, failure = _verify(run / FOLDER / name, world)
        if failure is None:
            assert manifest is not None
            return Checkpoint(run / FOLDER / name, manifest)
        if failure.code == "E_UNSAFE":  # the file was put there on purpose: an older checkpoint is no answer
            raise failure
        _warn(world, f"warning: skipping a corrupt checkpoint: {failure}")
    if failure is not None:
        raise ClipwrightError(
            "E_CKPT_HASH",
            "no checkpoint of this run is valid" if step is None else f"the checkpoint of step {step} is not valid",
            where=run,
            found=failure.found,
            fix="restore one, or start over with --fresh",
        )
    last_saved = _last_logged(run) if pointer is None else pointer
    if last_saved is not None:
        raise ClipwrightError(
            "E_CKPT_NONE",
            "the checkpoints of this run are missing",
            where=run / FOLDER,
            found=f"none exists, but {last_saved} was saved",
            fix="restore it, or start over with --fresh",
        )
    return None


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def saved_steps(run: Path) -> dict[int, Path]:
    """Returns the checkpoint folders by step, valid or not."""
    steps = {}
    for path in (run / FOLDER).glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match:
            steps[int(match[1])] = path
    return steps


def _warn(world: World | None, line: str) -> None:
    if world is None or world.is_rank0:
        print(line, file=sys.stderr, flush=True)


def _read_pointer(run: Path) -> str | None:
    """Returns the checkpoint's name in `latest`."""
    try:
        return (run / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None


def _last_logged(run: Path) -> str | None:
    """Returns the name of the newest checkpoint that the log mentions."""
    path = run / run_folder.LOG
    if not path.exists():
        return None
    step = max((record.get("saved", 0) for record in run_folder.read_steps(path)), default=0)
    return step_name(step) if step else None


def _verify(folder: Path, world: World | None) -> tuple[dict[str, Any] | None, ClipwrightError | None]:
    """Returns a checkpoint's manifest and the first failure of any rank; each rank hashes its share of the files."""
    manifest: dict[str, Any] | None = None
    failure: ClipwrightError | None = None
    try:
        manifest = _read_valid_manifest(folder)
        names = sorted(manifest["files"])
        own = names if world is None else names[world.rank :: world.size]
        check_files(folder, {name: manifest["files"][name] for name in own}, "E_CKPT_HASH")
    except ClipwrightError as error:
        failure = error
    except OSError as error:
        failure = malformed(folder, f"it cannot be read: {error.strerror or error}")
    if world is not None:
        failures = [error for error in all_gather_object(failure) if error is not None]
        failure = failures[0] if failures else None
    return manifest, failure


def _read_valid_manifest(folder: Path) -> dict[str, Any]:
    """Returns a checkpoint's manifest if it is byte for byte as it was written: its fingerprint covers its content."""
    manifest = read_manifest(folder, "checkpoint")
    refuse_code(folder, "a checkpoint")
    body = {key: value for key, value in manifest.items() if key not in ("format", "version", "fingerprint")}
    path = folder / MANIFEST
    if digest(body) != manifest.get("fingerprint") or path.read_bytes() != json_text(manifest).encode():
        raise malformed(path, "its fingerprint does not match its content")
    missing = sorted(MANIFEST_KEYS - body.keys()) or sorted({WEIGHTS, LOSS} - dict(body["files"]).keys())
    if missing:
        raise malformed(path, f"{missing[0]} is missing")
    if step_name(body["step"]) != folder.name:
        raise malformed(path, f"it is that of step {body['step']}")
    return manifest
