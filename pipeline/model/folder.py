"""Two towers and one embedding space; model folders in and out."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import digest, write_json
from clipwright.pipeline.core.unsafe import refuse_code
from clipwright.pipeline.folders.records import MANIFEST, check_files, file_entries, read_manifest, write_manifest
from clipwright.pipeline.model.two_tower import ModelConfig, TwoTower, build_model
from clipwright.pipeline.pixels import evaluation_view
from clipwright.pipeline.tokenizers.base import TOKENIZERS, Tokenizer, trim

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MAKE_AGAIN = "export the run again, or import the model again"


class Model:
    """A model folder in memory, for evaluation: images and texts to unit vectors."""

    def __init__(self, config: ModelConfig, towers: TwoTower, tokenizer: Tokenizer, fingerprint: str) -> None:
        self.config, self.towers, self.tokenizer, self.fingerprint = config, towers.eval(), tokenizer, fingerprint
        self.embed_dim, self.image_size = config.embed_dim, config.image.image_size

    @property
    def device(self) -> torch.device:
        return next(self.towers.parameters()).device

    def view(self, data: bytes) -> np.ndarray:
        """Evaluation preprocessing of an image file: uint8 (S, S, 3). Raises pixels.PixelError."""
        form = self.config.preprocessing
        return evaluation_view(
            data,
            self.image_size,
            interpolation=form.interpolation,
            fit=form.fit,
            crop_rounding=form.crop_rounding,
        )

    @torch.inference_mode()
    def embed_images(self, views: np.ndarray) -> Tensor:
        """uint8 (B, S, S, 3) → float32 (B, E) on the CPU, unit rows."""
        return self.towers.encode_image(torch.from_numpy(views).to(self.device)).cpu()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Captions → float32 (B, E) on the CPU, unit rows."""
        tokens = self.tokenizer.encode(list(texts), self.config.text.context)
        tokens = trim(tokens, self.tokenizer.eot_id, self.config.text.pad)
        return self.towers.encode_text(torch.from_numpy(tokens).long().to(self.device)).cpu()


def save_model(
    folder: Path,
    *,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    tokenizer: Tokenizer,
    made_from: dict[str, Any],
    card: str,
) -> dict[str, Any]:
    """Writes a model folder and returns its manifest.

    config: plain tree with the fields of ModelConfig and `loss`; weights: the towers' tensors, and the loss's as
    `loss.logit_scale`, `loss.bias`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**config, "tokenizer_fingerprint": tokenizer.fingerprint}
    save_file({name: tensor.contiguous() for name, tensor in sorted(weights.items())}, folder / WEIGHTS)
    write_json(folder / CONFIG, config)
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors hides its file from all others
    (folder / "README.md").write_text(card, encoding="utf-8")
    files = [WEIGHTS, CONFIG, "README.md", *(p.name for p in tokenizer.save(folder))]
    fingerprint = model_fingerprint(config, weights)
    body = {"files": file_entries(folder, files), "made_from": made_from, "embed_dim": config["embed_dim"]}
    return write_manifest(folder, "model", fingerprint, body)


def model_fingerprint(config: dict[str, Any], weights: dict[str, Tensor]) -> str:
    """SHA-256 over tensors (name, dtype, shape, bytes), architecture, tokenizer and preprocessing."""
    tensors = [
        [name, str(t.dtype).removeprefix("torch."), list(t.shape), hashlib.sha256(_raw(t)).hexdigest()]
        for name, t in sorted(weights.items())
    ]
    return digest({"tensors": tensors, "config": config})


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def load_model(folder: str | Path, device: str = "auto") -> Model:
    """Opens a model folder. E_INPUT, E_MANIFEST, E_MODEL_HASH, E_MODEL_SHAPE, E_UNSAFE say what is wrong with it."""
    folder = Path(folder)
    manifest = _read_manifest(folder)
    check_files(folder, manifest["files"], "E_MODEL_HASH")
    refuse_code(folder, "a model folder")
    tree = _read_config(folder)
    # The loss and the tokenizer's fingerprint are part of the file, not of what the towers compute.
    kept = {k: v for k, v in tree.items() if k not in ("loss", "tokenizer_fingerprint")}
    try:
        config = resolve(ModelConfig, base=kept).value
    except ClipwrightError as error:
        place = f"{folder / CONFIG}: {error.where}"
        raise ClipwrightError(error.code, error.what, where=place, found=error.found, fix=error.fix) from None
    tokenizer = TOKENIZERS.build(config.tokenizer, folder=folder)
    if tokenizer.fingerprint != (known := tree.get("tokenizer_fingerprint")):
        raise ClipwrightError(
            "E_MODEL_HASH",
            "a tokenizer that is not the model's",
            where=folder,
            found=f"fingerprint {tokenizer.fingerprint[:16]}…, config.json says {str(known)[:16]}…",
            fix=MAKE_AGAIN,
        )
    towers = build_model(config, tokenizer)
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise _malformed(folder / WEIGHTS, str(error)) from None
    load_weights(towers, {k: v for k, v in weights.items() if not k.startswith("loss.")}, folder)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Model(config, towers.to(device), tokenizer, manifest["fingerprint"])


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with all that is read of it."""
    manifest = read_manifest(folder, "model")
    files: Any = manifest.get("files")
    files = files if isinstance(files, dict) else {}
    whole = all(isinstance(entry, dict) and entry.keys() >= {"bytes", "sha256"} for entry in files.values())
    if not whole or not files.keys() >= {WEIGHTS, CONFIG} or not isinstance(manifest.get("fingerprint"), str):
        raise _malformed(folder / MANIFEST, f"no fingerprint, or no size and hash of {WEIGHTS} and {CONFIG}")
    return manifest


def _read_config(folder: Path) -> dict[str, Any]:
    """The model's config, which may come from anyone: plugins, whose code would run, are not for it to name."""
    try:
        tree = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _malformed(folder / CONFIG, str(error)) from None
    if not isinstance(tree, dict) or "plugins" in tree:
        found = "it names plugins" if isinstance(tree, dict) else f"it holds a {type(tree).__name__}, no object"
        raise _malformed(folder / CONFIG, found)
    return tree


def _malformed(path: Path, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_MANIFEST", "a model folder that is not of its form", where=path, found=found, fix=MAKE_AGAIN
    )


def load_weights(towers: nn.Module, weights: dict[str, Tensor], where: Path) -> None:
    """Copies `weights` in; names, shapes and dtypes must be the model's and every number finite (E_MODEL_SHAPE)."""
    wanted = {name: (tuple(t.shape), t.dtype) for name, t in towers.state_dict().items()}
    found = {name: (tuple(t.shape), t.dtype) for name, t in weights.items()}
    wrong = next((name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)), None)
    detail = None
    if wrong is not None:
        detail = f"{wrong} is {found.get(wrong, 'missing')}, the config wants {wanted.get(wrong, 'no such tensor')}"
    elif (bad := next((n for n, t in weights.items() if not bool(torch.isfinite(t).all())), None)) is not None:
        detail = f"{bad} holds numbers that are not finite"
    if detail is not None:
        raise ClipwrightError(
            "E_MODEL_SHAPE", "weights that do not fit the config", where=where, found=detail, fix=MAKE_AGAIN
        )
    towers.load_state_dict(weights)
