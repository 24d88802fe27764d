"""Untrusted model folders: the error names what is wrong, and nothing in the folder is run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.folders.records import file_entries
from clipwright.pipeline.model.folder import load_model, save_model
from clipwright.pipeline.model.two_tower import ModelConfig, build_model
from clipwright.pipeline.tokenizers.base import TOKENIZERS

Change = Callable[[Path, dict[str, Any], dict[str, Any]], object]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = ("image.image_size=32", "image.dim=32", "image.depth=1", "image.heads=2", "embed_dim=16")
    tree = resolve(ModelConfig, overrides=[*sizes, "text.width=32", "text.depth=1", "text.heads=2"])
    tokenizer = TOKENIZERS.build(tree.value.tokenizer)
    weights = dict(build_model(tree.value, tokenizer).state_dict())
    folder = tmp_path / "model"
    save_model(folder, config=tree.tree, weights=weights, tokenizer=tokenizer, made_from={}, card="a test's model\n")
    return folder


def modify(folder: Path, change: Change) -> None:
    """Changes a folder's manifest, config or files, and updates the hashes to match."""
    manifest, config = (json.loads((folder / name).read_text()) for name in ("manifest.json", "config.json"))
    written = change(folder, manifest, config)
    (folder / "config.json").write_text(written if isinstance(written, str) else json.dumps(config))
    if isinstance(manifest.get("files"), dict):
        manifest["files"] |= file_entries(folder, manifest["files"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


def delete(manifest: dict[str, Any], name: str) -> None:
    del manifest[name]


@pytest.mark.parametrize(
    ("change", "code", "culprit", "found"),
    [
        (lambda _, manifest, config: delete(manifest, "files"), "E_MANIFEST", "manifest.json", "size and hash"),
        (lambda _, manifest, config: delete(manifest["files"], "config.json"), "E_MANIFEST", "manifest.json", "hash"),
        (lambda _, manifest, config: delete(manifest, "fingerprint"), "E_MANIFEST", "manifest.json", "fingerprint"),
        (lambda *_: "[]", "E_MANIFEST", "config.json", "a list"),
        (lambda *_: "no JSON", "E_MANIFEST", "config.json", "Expecting value"),
        (
            lambda folder, *_: (folder / "model.safetensors").write_bytes(b"\xff" * 99),
            "E_MANIFEST",
            "model.safetensors",
            "header",
        ),
        (lambda _, manifest, config: config.update(embed_dim=-1), "E_CONFIG_VALUE", "embed_dim", "greater than"),
        (
            lambda _, manifest, config: config["preprocessing"].update(std=[0, 1, 1]),
            "E_CONFIG_VALUE",
            "preprocessing.std",
            "greater than 0",
        ),
    ],
)
def test_malformed_model_folder_is_rejected(model: Path, change: Change, code: str, culprit: str, found: str) -> None:
    load_model(model, device="cpu")
    modify(model, change)
    with pytest.raises(ClipwrightError) as caught:
        load_model(model, device="cpu")
    assert caught.value.code == code and found in caught.value.found
    assert str(model) in caught.value.where and culprit in caught.value.where


def test_model_folder_cannot_name_plugins(model: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "evil.py"
    plugin.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    modify(model, lambda _, manifest, config: config.update(plugins=[str(plugin)]))
    with pytest.raises(ClipwrightError, match="plugins") as caught:
        load_model(model, device="cpu")
    assert caught.value.code == "E_MANIFEST" and not (tmp_path / "ran").exists()
