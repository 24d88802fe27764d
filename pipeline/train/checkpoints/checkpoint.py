"""Checkpoints of a run, and how all ranks find the newest valid one, on any number of ranks.

    step-00001000/  model.safetensors  loss.safetensors  optimizer-00000.safetensors (one per rank)  manifest.json

The manifest, written last, has a SHA-256 per file. Loading verifies all files, divided among the ranks, and falls back
to the newest valid checkpoint. All files are safetensors and JSON: nothing in them can run code. `saver.py` writes
checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import digest, json_text
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.streams import print_note
from clipwright.pipeline.core.unsafe import refuse_code
from clipwright.pipeline.distributed.group import World, all_gather_object, broadcast_object
from clipwright.pipeline.folders.records import MANIFEST, check_files, differences, read_manifest
from clipwright.pipeline.losses.base import LossTerm
from clipwright.pipeline.model.folder import load_weights
from clipwright.pipeline.model.two_tower import TwoTower
from clipwright.pipeline.train import run_folder
from clipwright.pipeline.train.checkpoints.state_checks import (
    LOSS_OPTIMIZER_PREFIX,
    check_numbers,
    invalid_state,
    loss_misfit,
    optimizer_misfit,
    weights_misfit,
)
from clipwright.pipeline.train.engine import Engine
from clipwright.pipeline.train.techniques.base import Technique

FOLDER, LATEST = "checkpoints", "latest"
WEIGHTS, LOSS, OPTIMIZER = "model.safetensors", "loss.safetensors", "optimizer-{:05d}.safetensors"
TECHNIQUES = "techniques.safetensors"  # only if a technique has state
MANIFEST_TYPES = {
    "step": int,
    "samples": int,
    "updates": int,
    "skipped": int,
    "world": int,
    "zero": int,
    "identity": dict,
    "accepted": list,
    "hook_pending": bool,
    "files": dict,
}


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

    def misfit(self, towers: TwoTower, loss: LossTerm, state_size: int) -> ClipwrightError | None:
        """Returns E_CKPT_STATE if a tensor is missing or has another shape than this run's; reads only headers.

        state_size: tensors that the towers' optimizer keeps per parameter.
        """
        updates = self.manifest["updates"]
        found = weights_misfit(self.folder / WEIGHTS, towers)
        if found is not None:
            return invalid_state(self.folder / WEIGHTS, found)
        found = loss_misfit(self.folder / LOSS, loss, updates)
        if found is not None:
            return invalid_state(self.folder / LOSS, found)
        found = optimizer_misfit(self._optimizer_files(), towers, state_size, updates)
        return None if found is None else invalid_state(self.folder, found)

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
        try:
            engine.restore_optimizer(self._optimizer_files(), self.manifest["updates"])
        except (SafetensorError, ValueError) as error:
            raise malformed(self.folder, str(error)) from None
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self._tensors(LOSS).items():
            if name.startswith(LOSS_OPTIMIZER_PREFIX):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = tensor
        engine.loss_optimizer.load_state_dict({**engine.loss_optimizer.state_dict(), "state": state})

    def _optimizer_files(self) -> list[Path]:
        others = (WEIGHTS, LOSS, TECHNIQUES)
        return [self.folder / name for name in sorted(self.manifest["files"]) if name not in others]

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


def newest(
    run: Path,
    step: int | None = None,
    world: World | None = None,
    misfit: Callable[[Checkpoint], ClipwrightError | None] = lambda found: None,
) -> Checkpoint | None:
    """Returns the newest valid checkpoint of a run, or that of step `step`; None if the run has none yet.

    With `world`, all ranks must call it: they divide the files among them and return the same checkpoint. A corrupt
    checkpoint, and one for which `misfit` returns an error, is named on stderr, and the one before it is taken. If
    checkpoints exist and none is valid, the last one's error is raised: E_CKPT_HASH, or E_CKPT_STATE for numbers and
    tensors that training cannot have made. E_CKPT_NONE if that of `step` or all that were saved are missing, E_UNSAFE
    for one with a file that could run code.
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
            found = Checkpoint(run / FOLDER / name, manifest)
            failure = _first_failure(lambda: misfit(found), run / FOLDER / name, world)  # noqa: B023  called at once
            if failure is None:
                return found
        if failure.code in ("E_UNSAFE", "E_RESUME"):  # put there on purpose: an older checkpoint is no answer
            raise failure
        _warn(world, f"warning: skipping a corrupt checkpoint: {failure}")
    if failure is not None:
        raise ClipwrightError(
            failure.code,
            "no checkpoint of this run is valid" if step is None else f"the checkpoint of step {step} is not valid",
            where=run,
            found=f"{failure.where}: {failure.found}",
            fix="restore one, or start over with --fresh",
        )
    evidence: Any = _evidence_of_saves(run) if pointer is None else f"{pointer} was saved, as {LATEST} states"
    if world is not None:
        evidence = broadcast_object(evidence)
    if evidence is not None:
        raise ClipwrightError(
            "E_CKPT_NONE",
            "the checkpoints of this run are missing",
            where=run / FOLDER,
            found=f"none exists, but {evidence}",
            fix="restore them, or start over with --fresh",
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
        print_note(line)


def _read_pointer(run: Path) -> str | None:
    """Returns the checkpoint's name in `latest`."""
    try:
        return (run / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None


def _evidence_of_saves(run: Path) -> str | None:
    """Returns what shows that checkpoints were saved which are gone now; None if the run may have saved none yet.

    A run that was killed before its first checkpoint has a ledger and a log too. Its log has the first step, and says
    that nothing was saved; and it has fewer steps than two intervals of `save_every`.
    """
    ledger_path, log_path = run / run_folder.LEDGER, run / run_folder.LOG
    steps = sum(1 for _ in run_folder.read_steps(ledger_path)) if ledger_path.exists() else 0
    records = list(run_folder.read_steps(log_path)) if log_path.exists() else []
    saved = max((record.get("saved", 0) for record in records), default=0)
    if saved:
        return f"{step_name(saved)} was saved, as {run_folder.LOG} states"
    interval = (run_folder.stored_tree(run) or {}).get("runtime", {}).get("save_every")
    if steps > 1 and not records:
        count = format_count(steps, "step")
        return f"{run_folder.LEDGER} has {count}, and the log, which names the saved ones, is empty or missing"
    if isinstance(interval, int) and steps >= 2 * interval:
        return f"{run_folder.LEDGER} has {format_count(steps, 'step')}, with a checkpoint every {interval:,}"
    return None


def _verify(folder: Path, world: World | None) -> tuple[dict[str, Any] | None, ClipwrightError | None]:
    """Returns a checkpoint's manifest and the first failure of any rank; each rank checks its share of the files."""
    manifests: list[dict[str, Any]] = []

    def check() -> None:
        manifest = _read_valid_manifest(folder)
        names = sorted(manifest["files"])
        own = names if world is None else names[world.rank :: world.size]
        check_files(folder, {name: manifest["files"][name] for name in own}, "E_CKPT_HASH")
        for name in own:
            check_numbers(folder / name, manifest["updates"])
        manifests.append(manifest)

    failure = _first_failure(check, folder, world)
    return (manifests[0] if manifests else None), failure


def _first_failure(
    check: Callable[[], ClipwrightError | None], folder: Path, world: World | None
) -> ClipwrightError | None:
    """Returns the first error that `check` of a checkpoint raises or returns on any rank."""
    failure: ClipwrightError | None = None
    try:
        failure = check()
    except ClipwrightError as error:
        failure = error
    except (OSError, SafetensorError) as error:
        failure = malformed(folder, f"it cannot be read: {getattr(error, 'strerror', None) or error}")
    if world is not None:
        failure = next((error for error in all_gather_object(failure) if error is not None), None)
    return failure


def _read_valid_manifest(folder: Path) -> dict[str, Any]:
    """Returns a checkpoint's manifest if it is byte for byte as it was written: its fingerprint covers its content."""
    manifest = read_manifest(folder, "checkpoint")
    refuse_code(folder, "a checkpoint")
    body = {key: value for key, value in manifest.items() if key not in ("format", "version", "fingerprint")}
    path = folder / MANIFEST
    if digest(body) != manifest.get("fingerprint") or path.read_bytes() != json_text(manifest).encode():
        raise malformed(path, "its fingerprint does not match its content")
    for key, kind in MANIFEST_TYPES.items():
        if not isinstance(body.get(key), kind):
            raise malformed(path, f"{key} is missing or not of type {kind.__name__}")
    missing = sorted({WEIGHTS, LOSS} - body["files"].keys())
    if missing:
        raise malformed(path, f"{missing[0]} is missing")
    if step_name(body["step"]) != folder.name:
        raise malformed(path, f"it is that of step {body['step']}")
    if min(body["updates"], body["skipped"]) < 0 or body["updates"] + body["skipped"] != body["step"]:
        found = f"updates {body['updates']} and skipped {body['skipped']} do not add up to step {body['step']}"
        raise invalid_state(path, found)
    return manifest
