"""A new run that begins with the weights of another run, or of a model folder, of the same architecture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.folders.output import IDENTITY
from clipwright.pipeline.folders.records import MANIFEST
from clipwright.pipeline.model.folder import WEIGHTS, load_model, load_weights
from clipwright.pipeline.train import run_folder
from clipwright.pipeline.train.checkpoints import checkpoint
from clipwright.pipeline.train.config import Parts


@dataclass(frozen=True)
class Source:
    """What a run begins with, verified; `loss`: the parameters of its loss."""

    folder: Path
    fingerprint: str
    tokenizer: str  # its fingerprint
    weights: dict[str, Tensor]
    loss: dict[str, Tensor]


def read(folder: Path) -> Source:
    """A model folder, or the newest checkpoint of a run.

    E_INPUT, E_CKPT_NONE, E_CKPT_HASH, and what `load_model` raises.
    """
    if (folder / IDENTITY).is_file():
        found = checkpoint.newest(folder)
        if found is None:
            fix = "let it train until it has saved"
            raise ClipwrightError("E_CKPT_NONE", "a run without checkpoint", where=folder, found="none yet", fix=fix)
        tokenizer = found.manifest["identity"]["tokenizer"]["fingerprint"]
        return Source(found.folder, found.manifest["fingerprint"], tokenizer, found.weights(), found.loss())
    if not (folder / MANIFEST).is_file():
        raise ClipwrightError(
            "E_INPUT",
            "neither a run nor a model folder",
            where=f"init_from: {folder}",
            found=f"no {IDENTITY} and no {MANIFEST}",
            fix="give the -o folder of `train`, `export` or `import`",
        )
    model = load_model(folder, device="cpu")
    loss = {name[5:]: t for name, t in load_file(folder / WEIGHTS).items() if name.startswith("loss.")}
    return Source(folder, model.fingerprint, model.tokenizer.fingerprint, dict(model.towers.state_dict()), loss)


def init_source(init_from: str, run: Path, *, fresh: bool) -> dict[str, str] | None:
    """Name and fingerprint of what `init_from` names, as they enter identity; None where it names nothing.

    A run that has begun keeps what it was begun with: it may go on when the other is gone, or has trained on.
    E_CONFIG_VALUE if that is the run itself.
    """
    if not init_from:
        return None
    folder = Path(init_from)
    if folder.resolve() == run.resolve():  # --fresh would remove it first
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "a run that begins with itself",
            where=f"init_from: {init_from}",
            found="it is the output folder too",
            fix="give another -o",
        )
    name = folder.absolute().name
    known = None if fresh else (run_folder.stored_identity(run) or {}).get("init_from")
    return (
        known
        if known is not None and known["name"] == name
        else {"name": name, "fingerprint": read(folder).fingerprint}
    )


def begin(parts: Parts, init_from: str, known: dict[str, str]) -> None:
    """Gives a new run's towers the weights, and its loss the parameters if it has the same ones.

    E_FINGERPRINT for another tokenizer, or where the other run has trained on since this one was begun; E_MODEL_SHAPE
    for another architecture.
    """
    found = read(Path(init_from))
    differs = None
    if found.tokenizer != parts.tokenizer.fingerprint:
        differs = f"its tokenizer is {found.tokenizer[:16]}…, this run's {parts.tokenizer.fingerprint[:16]}…"
    elif found.fingerprint != known["fingerprint"]:
        differs = f"this run was begun with {known['fingerprint'][:16]}…, by now it is {found.fingerprint[:16]}…"
    if differs is not None:
        raise ClipwrightError(
            "E_FINGERPRINT",
            "weights that a run cannot begin with",
            where=f"init_from: {found.folder}",
            found=differs,
            fix="give this run that tokenizer, or begin anew with --fresh",
        )
    load_weights(parts.towers, found.weights, found.folder)
    if found.loss.keys() == parts.loss.state_dict().keys():
        load_weights(parts.loss, found.loss, found.folder)
