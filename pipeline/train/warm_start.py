"""Warm start: a new run that starts with the weights of another run or of a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.folders.describe import describe
from clipwright.pipeline.folders.output import IDENTITY
from clipwright.pipeline.folders.records import MANIFEST
from clipwright.pipeline.losses.base import LossTerm
from clipwright.pipeline.model.folder import WEIGHTS, load_model, load_weights
from clipwright.pipeline.model.two_tower import TwoTower
from clipwright.pipeline.train import run_folder
from clipwright.pipeline.train.checkpoints import checkpoint
from clipwright.pipeline.train.techniques.base import Technique

OTHER_TOWERS = "give this run the towers, sizes and embed_dim of those weights, or start without init_from"


@dataclass(frozen=True)
class InitWeights:
    """Verified weights to start with.

    tokenizer: its fingerprint; image_size: of the image tower; loss: the parameters of the loss.
    """

    folder: Path
    fingerprint: str
    tokenizer: str
    image_size: int
    weights: dict[str, Tensor]
    loss: dict[str, Tensor]


def read(folder: Path) -> InitWeights:
    """Reads a model folder, or the newest checkpoint of a run.

    E_INPUT, E_CKPT_NONE, E_CKPT_HASH, and the errors of `load_model`.
    """
    if (folder / IDENTITY).is_file():
        found = checkpoint.newest(folder)
        if found is None:
            raise ClipwrightError(
                "E_CKPT_NONE",
                "the run has no checkpoint yet",
                where=folder,
                found="none was saved",
                fix="let it train until it has saved one",
            )
        stored = found.manifest["identity"]
        return InitWeights(
            folder=found.folder,
            fingerprint=found.manifest["fingerprint"],
            tokenizer=stored["tokenizer"]["fingerprint"],
            image_size=stored["image"]["image_size"],
            weights=found.weights(),
            loss=found.loss(),
        )
    if not (folder / MANIFEST).is_file():
        raise ClipwrightError(
            "E_INPUT",
            "init_from is neither a run nor a model folder",
            where=f"init_from: {folder}",
            found=f"it is {describe(folder).text}" if folder.exists() else "no such folder",
            fix="give the -o folder of `train`, `export` or `import`",
        )
    model = load_model(folder, device="cpu")
    tensors = load_file(folder / WEIGHTS)
    return InitWeights(
        folder=folder,
        fingerprint=model.fingerprint,
        tokenizer=model.tokenizer.fingerprint,
        image_size=model.image_size,
        weights=dict(model.towers.state_dict()),
        loss={name.removeprefix("loss."): t for name, t in tensors.items() if name.startswith("loss.")},
    )


def init_source(init_from: str, run: Path, *, fresh: bool) -> dict[str, str] | None:
    """Returns name and fingerprint of what `init_from` names, as they enter identity; None if it names nothing.

    A started run keeps the fingerprint it started with: it can resume when the source is gone or has trained on.
    E_CONFIG_VALUE if the source is the run itself.
    """
    if not init_from:
        return None
    folder = Path(init_from)
    if folder.resolve() == run.resolve():  # --fresh would remove it first
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "a run cannot start from itself",
            where=f"init_from: {init_from}",
            found="it is the output folder",
            fix="give another -o",
        )
    name = folder.absolute().name
    known = None if fresh else (run_folder.stored_identity(run) or {}).get("init_from")
    if known is not None and known["name"] == name:
        return known
    return {"name": name, "fingerprint": read(folder).fingerprint}


class WarmStart(Technique):
    """Starts a new run with the weights that `init_from` names, and with the loss's parameters if it has the same."""

    def __init__(self, init_from: str, source: dict[str, str], tokenizer: str) -> None:
        """source: what `init_source` returned; tokenizer: the fingerprint of this run's."""
        self.init_from, self.source, self.tokenizer = init_from, source, tokenizer

    def initialize(self, towers: TwoTower, loss: LossTerm) -> None:
        """Loads the weights; position tables of the image tower are resized if its image size differs.

        E_FINGERPRINT for another tokenizer, or if the source has trained on since this run started; E_MODEL_SHAPE for
        another architecture; E_CONFIG_VALUE for a tower whose weights fit one image size only.
        """
        init = read(Path(self.init_from))
        self._check(init)
        load_weights(towers, resize(init.weights, init.image_size, towers), init.folder, OTHER_TOWERS)
        if init.loss.keys() == loss.state_dict().keys():
            load_weights(loss, init.loss, init.folder, OTHER_TOWERS)
            loss.clamp()  # imported models may have a logit scale above the limit

    def _check(self, init: InitWeights) -> None:
        if init.tokenizer != self.tokenizer:
            difference = f"its tokenizer is {init.tokenizer[:16]}…, this run's is {self.tokenizer[:16]}…"
        elif init.fingerprint != self.source["fingerprint"]:
            difference = f"this run started with {self.source['fingerprint'][:16]}…, it is now {init.fingerprint[:16]}…"
        else:
            return
        raise ClipwrightError(
            "E_FINGERPRINT",
            "the run cannot start with these weights",
            where=f"init_from: {init.folder}",
            found=difference,
            fix="use the same tokenizer for this run, or start over with --fresh",
        )


def resize(weights: dict[str, Tensor], image_size: int, towers: TwoTower) -> dict[str, Tensor]:
    """Returns the weights of a model at `image_size` with the image tower's position tables fitted to `towers`.

    Weights of another architecture are returned unchanged; `load_weights` refuses them by name.
    """
    prefix = "image."
    image = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    if image_size == towers.image.image_size or image.keys() != towers.image.state_dict().keys():
        return weights
    resized = towers.image.resized(image)
    return {**weights, **{prefix + name: tensor for name, tensor in resized.items()}}
