"""Any text encoder of `transformers` in a local folder, as a text tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import TEXT_TOWERS, TextTower, TextTowerConfig, TowerOutput
from clipwright.pipeline.towers.huggingface_encoder import (
    CONFIG,
    build_encoder,
    load_pretrained_encoder,
    mismatched_weights,
    position_count,
    read_architecture,
    weights_sha256,
)


@configclass
class HuggingFaceTextConfig(TextTowerConfig):
    """The encoder described by config.json in `folder`, with random weights or, if `pretrained`, those of the folder.

    The first start of a run stores `architecture` and `weights`, so a model folder does not need the encoder's folder.
    With `pretrained` the folder must be kept until the run has finished.
    """

    external_fields: ClassVar[tuple[str, ...]] = ("folder", "pretrained")

    folder: str | None = None
    """Local folder of the encoder, with config.json."""
    pretrained: bool = False
    """Start from the weights in `folder`."""
    pool: Literal["mean", "cls", "eot"] = "mean"
    """Pooled output: mean of the real tokens, the first position, or the first EOT."""
    architecture: dict[str, Any] | None = None
    """Content of config.json; stored by the first start of a run."""
    weights: str | None = None
    """SHA-256 of the pretrained weights; stored by the first start of a run."""

    def resolved_fields(self, stored: dict[str, Any]) -> dict[str, Any]:
        missing = self.folder is not None and not (Path(self.folder) / CONFIG).is_file()
        if missing and not self.pretrained and stored.get("architecture"):
            return {"architecture": stored["architecture"], "weights": None}
        return {
            "architecture": self.architecture or read_architecture(_encoder_folder(self)),
            "weights": weights_sha256(_encoder_folder(self)) if self.pretrained else None,
        }


class HuggingFaceText(TextTower):
    """Token ids (B, N), N ≤ context → pooled (B, D), tokens (B, N, D), mask (B, N) up to and including EOT.

    D is the encoder's hidden size; the attention mask hides what follows EOT. Of an encoder-decoder (T5) only the
    encoder is used; modules that do not affect the output, such as BERT's pooler, are not built. Dropout is as in
    config.json. E_CONFIG_VALUE for a model that is not a text encoder or does not support the context or vocabulary
    size; E_INPUT and E_MODEL_SHAPE for a folder or weights that cannot be read or do not match. Pickle files are never
    opened.
    """

    no_weight_decay = ("position_embeddings.weight", "wpe.weight", "relative_attention_bias.weight")

    def __init__(self, config: HuggingFaceTextConfig, *, vocab_size: int, eot_id: int) -> None:
        super().__init__()
        self.context = config.context
        self.eot_id = eot_id
        self.pool = config.pool
        architecture = config.architecture or read_architecture(_encoder_folder(config))
        where = f"text.folder={config.folder}" if config.folder else f"text.name={config.name}"
        self.encoder = build_encoder(architecture, where)
        self.feature_dim: int = self.encoder.config.hidden_size
        self._check_sizes(vocab_size, where)
        if config.pretrained:
            self._load(_encoder_folder(config), architecture, config.weights)

    def forward(self, tokens: Int[Tensor, "b n"]) -> TowerOutput:
        assert tokens.shape[1] <= self.context, (tokens.shape, self.context)
        mask = self.mask(tokens)
        x = self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        if self.pool == "mean":
            real = mask[..., None].to(x.dtype)
            return TowerOutput((x * real).sum(dim=1) / real.sum(dim=1), x, mask=mask)
        position = mask.sum(dim=1) - 1 if self.pool == "eot" else torch.zeros_like(tokens[:, 0])
        return TowerOutput(x[torch.arange(len(x), device=x.device), position], x, mask=mask)

    def block_list(self) -> list[nn.Module]:
        from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: PLC0415

        return [module for module in self.encoder.modules() if isinstance(module, GradientCheckpointingLayer)]

    def _check_sizes(self, vocab_size: int, where: str) -> None:
        capacity = self.encoder.get_input_embeddings().num_embeddings
        if vocab_size > capacity:
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "the tokenizer's vocabulary is larger than the text encoder's",
                where=where,
                found=f"the tokenizer has {format_count(vocab_size, 'id')}, the text encoder "
                f"{format_count(capacity, 'embedding')}",
                fix="use the encoder's own tokenizer: tokenizer.name=huggingface tokenizer.folder=DIR",
            )
        positions = position_count(self.encoder)
        if positions is not None and self.context > positions:
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "the context is longer than the text encoder supports",
                where=f"text.context={self.context}",
                found=f"{where} has {format_count(positions, 'position')}",
                fix=f"set text.context={positions} or less",
            )

    def _load(self, folder: Path, architecture: dict[str, Any], expected_sha256: str | None) -> None:
        """Loads the folder's weights; all weights must be present, finite and of the right shape."""
        sha256 = weights_sha256(folder)  # raises for missing files
        if expected_sha256 is not None and sha256 != expected_sha256:
            raise ClipwrightError(
                "E_INPUT",
                "the pretrained weights changed after the run started",
                where=folder,
                found=f"SHA-256 {sha256[:16]}…, the run started with {expected_sha256[:16]}…",
                fix="restore the files, or start over with --fresh",
            )
        weights = load_pretrained_encoder(folder, architecture).state_dict()
        for name, tensor in weights.items():
            if not bool(torch.isfinite(tensor).all()):
                raise mismatched_weights(folder, f"{name} contains non-finite values")
        self.encoder.load_state_dict(weights, strict=True)


def _encoder_folder(config: HuggingFaceTextConfig) -> Path:
    if config.folder is None:
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "the text encoder has no folder",
            where="text.folder",
            found="not set",
            fix="set text.folder=DIR, a folder with config.json",
        )
    return Path(config.folder)


TEXT_TOWERS.add(
    HuggingFaceTextConfig,
    HuggingFaceText,
    {"huggingface": {}},
    source="any local folder of a transformers text encoder",
)
