"""Model folders: write, read and check them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipwright.pipeline.core.activity import phase
from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import digest, write_json
from clipwright.pipeline.core.unsafe import refuse_code
from clipwright.pipeline.folders.records import MANIFEST, check_files, file_entries, read_manifest, write_manifest
from clipwright.pipeline.model.tensor_checks import invalid_numbers, module_shapes, shape_difference, shapes
from clipwright.pipeline.model.two_tower import ModelConfig, TwoTower, build_model
from clipwright.pipeline.pixels import evaluation_view
from clipwright.pipeline.tokenizers.base import TOKENIZERS, Tokenizer, trim

WEIGHTS, CONFIG = "model.safetensors", "config.json"
RECREATE = "export the run again, or import the model again"


class Model:
    """A model folder in memory, for evaluation: images and texts to unit-length embeddings."""

    def __init__(self, config: ModelConfig, towers: TwoTower, tokenizer: Tokenizer, fingerprint: str) -> None:
        self.config, self.towers, self.tokenizer, self.fingerprint = config, towers.eval(), tokenizer, fingerprint
        self.embed_dim, self.image_size = config.embed_dim, config.image.image_size

    @property
    def device(self) -> torch.device:
        return next(self.towers.parameters()).device

    def view(self, data: bytes) -> UInt8[np.ndarray, "h w 3"]:
        """Preprocesses an image file for evaluation: uint8 (S, S, 3). Raises pixels.PixelError."""
        preprocessing = self.config.preprocessing
        return evaluation_view(
            data,
            self.image_size,
            interpolation=preprocessing.interpolation,
            fit=preprocessing.fit,
            crop_rounding=preprocessing.crop_rounding,
        )

    @torch.inference_mode()
    def embed_images(self, views: UInt8[np.ndarray, "b h w 3"]) -> Float[Tensor, "b e"]:
        """Embeds views: uint8 (B, S, S, 3) → float32 (B, E) on the CPU, unit rows."""
        return self.towers.encode_image(torch.from_numpy(views).to(self.device)).cpu()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "b e"]:
        """Embeds captions → float32 (B, E) on the CPU, unit rows."""
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

    config: plain tree with the fields of ModelConfig and `loss`. weights: the towers' tensors, and those of the loss as
    `loss.logit_scale` and `loss.bias`. card: the text of README.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**config, "tokenizer_fingerprint": tokenizer.fingerprint}
    save_file({name: tensor.contiguous() for name, tensor in sorted(weights.items())}, folder / WEIGHTS)
    write_json(folder / CONFIG, config)
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors makes its file readable by the owner only
    (folder / "README.md").write_text(card, encoding="utf-8")
    files = [WEIGHTS, CONFIG, "README.md", *(p.name for p in tokenizer.save(folder))]
    fingerprint = model_fingerprint(config, weights)
    body = {"files": file_entries(folder, files), "made_from": made_from, "embed_dim": config["embed_dim"]}
    return write_manifest(folder, "model", fingerprint, body)


def model_fingerprint(config: dict[str, Any], weights: dict[str, Tensor]) -> str:
    """Returns the SHA-256 over tensors (name, dtype, shape, bytes), architecture, tokenizer and preprocessing."""
    tensors = [
        [name, str(t.dtype).removeprefix("torch."), list(t.shape), hashlib.sha256(_raw(t)).hexdigest()]
        for name, t in sorted(weights.items())
    ]
    return digest({"tensors": tensors, "config": config})


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def load_model(folder: str | Path, device: str = "auto") -> Model:
    """Opens and checks a model folder. Raises E_INPUT, E_MANIFEST, E_MODEL_HASH, E_MODEL_SHAPE and E_UNSAFE."""
    folder = Path(folder)
    phase(f"loading the model {folder.name}")
    manifest = _read_manifest(folder)
    check_files(folder, manifest["files"], "E_MODEL_HASH")
    refuse_code(folder, "a model folder")
    tree = _read_config(folder)
    # The file also states the loss and the tokenizer's fingerprint, which the towers do not need.
    model_fields = {key: value for key, value in tree.items() if key not in ("loss", "tokenizer_fingerprint")}
    config = resolve_model_config(model_fields, folder / CONFIG, plugins=_plugin_names(manifest))
    tokenizer = TOKENIZERS.build(config.tokenizer, folder=folder)
    recorded = str(tree.get("tokenizer_fingerprint"))
    if tokenizer.fingerprint != recorded:
        raise ClipwrightError(
            "E_MODEL_HASH",
            "the tokenizer is not the one of this model",
            where=folder,
            found=f"fingerprint {tokenizer.fingerprint[:16]}… (config.json states {recorded[:16]}…)",
            fix=RECREATE,
        )
    towers = build_model(config, tokenizer)
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise _malformed(folder / WEIGHTS, str(error)) from None
    load_weights(towers, {name: tensor for name, tensor in weights.items() if not name.startswith("loss.")}, folder)
    _check_numbers({name: tensor for name, tensor in weights.items() if name.startswith("loss.")}, folder)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Model(config, towers.to(device), tokenizer, manifest["fingerprint"])


def resolve_model_config(tree: dict[str, Any], where: Path, plugins: Sequence[str] = ()) -> ModelConfig:
    """Validates the fields of a ModelConfig; an error names `where`, the file or folder that they come from.

    plugins: file names of the plugins that the model was made with, for the error about a name that none registered.
    """
    try:
        return resolve(ModelConfig, base=tree).value
    except ClipwrightError as error:
        place, fix = f"{where}: {error.where}", error.fix
        if error.code == "E_CONFIG_CHOICE":
            files = f"[{','.join(plugins)}]" if len(plugins) > 1 else "".join(plugins) or "FILE.py"
            fix = f"add plugins={files} with the path of the plugin that registers it"
        raise ClipwrightError(error.code, error.what, where=place, found=error.found, fix=fix) from None


def _plugin_names(manifest: dict[str, Any]) -> list[str]:
    """Returns the file names of the plugins that a manifest states; they are shown, never loaded."""
    made_from: Any = manifest.get("made_from")
    plugins = made_from.get("plugins") if isinstance(made_from, dict) else None
    return [str(plugin.get("name")) for plugin in plugins or [] if isinstance(plugin, dict)]


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest and checks the fields that `load_model` uses."""
    manifest = read_manifest(folder, "model")
    files: Any = manifest.get("files")
    files = files if isinstance(files, dict) else {}
    complete = all(isinstance(entry, dict) and entry.keys() >= {"bytes", "sha256"} for entry in files.values())
    if not complete or not files.keys() >= {WEIGHTS, CONFIG} or not isinstance(manifest.get("fingerprint"), str):
        found = f"the fingerprint or the size and hash of {WEIGHTS} or {CONFIG} is missing"
        raise _malformed(folder / MANIFEST, found)
    return manifest


def _read_config(folder: Path) -> dict[str, Any]:
    """Reads the model's config. It is untrusted, so it may not name plugins, whose code would run."""
    try:
        tree = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _malformed(folder / CONFIG, str(error)) from None
    if not isinstance(tree, dict) or "plugins" in tree:
        found = (
            "it names plugins" if isinstance(tree, dict) else f"the top level is a {type(tree).__name__}, not an object"
        )
        raise _malformed(folder / CONFIG, found)
    return tree


def _malformed(path: Path, found: str) -> ClipwrightError:
    return ClipwrightError("E_MANIFEST", "the model folder is malformed", where=path, found=found, fix=RECREATE)


def load_weights(module: nn.Module, weights: dict[str, Tensor], where: Path, fix: str = RECREATE) -> None:
    """Loads `weights`. Raises E_MODEL_SHAPE if a name, shape, type or number is not that of such a model's weights."""
    found = shape_difference(module_shapes(module), shapes(weights))
    if found is not None:
        raise _invalid_weights("the weights do not match the config", where, found, fix)
    _check_numbers(weights, where, fix)
    module.load_state_dict(weights)


def _check_numbers(tensors: dict[str, Tensor], where: Path, fix: str = RECREATE) -> None:
    for name, tensor in tensors.items():
        found = invalid_numbers(name, tensor)
        if found is not None:
            raise _invalid_weights("the weights hold invalid numbers", where, found, fix)


def _invalid_weights(what: str, where: Path, found: str, fix: str) -> ClipwrightError:
    return ClipwrightError("E_MODEL_SHAPE", what, where=where, found=found, fix=fix)
