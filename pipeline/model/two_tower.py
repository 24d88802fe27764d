"""The model: two towers and one embedding space."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from pydantic import Field
from torch import Tensor, nn

from clipwright.pipeline.core.config import Choice
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.pixels import Interpolation
from clipwright.pipeline.tokenizers.base import TOKENIZERS, Tokenizer, TokenizerConfig
from clipwright.pipeline.towers.base import (
    IMAGE_TOWERS,
    TEXT_TOWERS,
    ImageTower,
    ImageTowerConfig,
    TextTower,
    TextTowerConfig,
)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@configclass
class Preprocessing:
    """How an image becomes the tower's input; the defaults are CLIP's.

    Pixels are normalized as (x/255 - mean) / std. The other fields are those of `pixels.evaluation_view`, which
    evaluation and embedding use; training crops at random.
    """

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of the red, green and blue channel, in 0 … 1."""
    std: tuple[Positive, Positive, Positive] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of the red, green and blue channel, in 0 … 1."""
    interpolation: Interpolation = "bicubic"
    """Resampling filter in evaluation."""
    fit: Literal["crop", "squash"] = "crop"
    """crop: resize the shorter side and crop the center; squash: resize both sides."""
    crop_rounding: Literal["even", "down"] = "even"
    """How a crop offset of half a pixel is rounded: even (torchvision) or down (transformers)."""


@configclass
class ModelConfig:
    """Everything that determines what a model computes, except its weights."""

    image: Annotated[ImageTowerConfig, Choice(IMAGE_TOWERS, "vit_nano")]
    """Image tower; `clipwright list towers` lists them."""
    text: Annotated[TextTowerConfig, Choice(TEXT_TOWERS, "text_nano")]
    """Text tower; `clipwright list towers` lists them."""
    tokenizer: Annotated[TokenizerConfig, Choice(TOKENIZERS, "clip_bpe")]
    """Tokenizer; `clipwright list tokenizers` lists them."""
    embed_dim: Annotated[int, Field(ge=1, le=65_536)] = 512
    """Dimension of the embeddings."""
    preprocessing: Preprocessing = Preprocessing()
    """Normalization of pixels, and resizing in evaluation."""


class TwoTower(nn.Module):
    """An image tower and a text tower, each with its projection into the shared space.

    A tower's extra pooled features (DeiT's `dist`) have projections of their own. An image's embedding is then the
    renormalized mean of all unit embeddings, in training too, so every projection learns without a teacher; a
    distillation loss would use the extra embedding alone.
    Source: Radford et al. 2021, section 2.3. The temperature belongs to the loss, not to the model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, *, vocab_size: int, eot_id: int) -> None:
        super().__init__()
        self.image: ImageTower = IMAGE_TOWERS.build(config.image)
        self.text: TextTower = TEXT_TOWERS.build(config.text, vocab_size=vocab_size, eot_id=eot_id)
        self.image_projection = _projection(config.image, self.image.feature_dim, config.embed_dim, "image")
        self.text_projection = _projection(config.text, self.text.feature_dim, config.embed_dim, "text")
        self.extra_projections = nn.ModuleDict(
            {
                name: _projection(config.image, self.image.feature_dim, config.embed_dim, "image")
                for name in self.image.extra_names
            }
        )
        self.register_buffer("mean", torch.tensor(config.preprocessing.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(config.preprocessing.std).view(3, 1, 1) * 255, persistent=False)

    def encode_image(self, views: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b e"]:
        """Embeds upright RGB views. Pixels are normalized here, on the device, so that only uint8 is copied to it."""
        # `permute` keeps the memory layout, so images are channels-last, which makes convolutions faster.
        images = (views.permute(0, 3, 1, 2).float() - self.mean) / self.std
        out = self.image(images)
        embedding = F.normalize(self.image_projection(out.pooled).float(), dim=-1)
        if not self.extra_projections:
            return embedding
        extra = [F.normalize(p(out.extra[name]).float(), dim=-1) for name, p in self.extra_projections.items()]
        return F.normalize(torch.stack([embedding, *extra]).mean(dim=0), dim=-1)

    def encode_text(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b e"]:
        """Embeds token ids, padded to any common length up to the context."""
        return F.normalize(self.text_projection(self.text(tokens).pooled).float(), dim=-1)

    def forward(
        self, views: UInt8[Tensor, "b h w 3"], tokens: Int[Tensor, "t n"]
    ) -> tuple[Float[Tensor, "b e"], Float[Tensor, "t e"]]:
        # One call for both towers: under ZeRO-3, separate engine calls give wrong results from the second step on.
        return self.encode_image(views), self.encode_text(tokens)

    def no_weight_decay(self) -> set[str]:
        """Returns the parameters without weight decay: biases, norms, and those the towers name (positions, tokens)."""
        names: set[str] = set()
        for side, tower in (("image", self.image), ("text", self.text)):
            for name, parameter in tower.named_parameters(prefix=side):
                if parameter.ndim <= 1 or name.endswith(tower.no_weight_decay):
                    names.add(name)
        return names


def _projection(config: Any, width: int, embed_dim: int, side: str) -> nn.Module:
    if config.projection == "none":
        if width != embed_dim:
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "a tower without projection must have the width of the embedding",
                where=f"{side}.name={config.name}",
                found=f"the tower's width is {width}, embed_dim is {embed_dim}",
                fix=f"set embed_dim={width} or {side}.projection=linear",
            )
        return nn.Identity()
    linear = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(linear.weight, std=width**-0.5)
    return linear


def build_model(config: ModelConfig, tokenizer: Tokenizer) -> TwoTower:
    return TwoTower(config, vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id)
