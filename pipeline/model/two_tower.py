"""Two towers and one embedding space."""

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
    """How a picture becomes the tower's input; the defaults are CLIP's.

    Pixels are normalised: (x/255 - mean) / std. The other fields are those of `pixels.evaluation_view`, which
    evaluation and embedding look through; training crops at random.
    """

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[Positive, Positive, Positive] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Interpolation = "bicubic"
    fit: Literal["crop", "squash"] = "crop"
    crop_rounding: Literal["even", "down"] = "even"


@configclass
class ModelConfig:
    """What decides a model's function, weights apart."""

    image: Annotated[ImageTowerConfig, Choice(IMAGE_TOWERS, "vit_nano")]
    text: Annotated[TextTowerConfig, Choice(TEXT_TOWERS, "text_nano")]
    tokenizer: Annotated[TokenizerConfig, Choice(TOKENIZERS, "clip_bpe")]
    embed_dim: Annotated[int, Field(ge=1, le=65_536)] = 512
    preprocessing: Preprocessing = Preprocessing()


class TwoTower(nn.Module):
    """An image tower and a text tower, each with its projection into the shared space.

    A tower's extra pooled vectors (DeiT's `dist`) have projections of their own, and an image's vector is the mean of
    all unit vectors, renormalised. Training sees that same mean, so that what is trained is what is used and every
    projection learns without a teacher; a distillation loss would take the extra vector alone.
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
        """Unit vectors of upright RGB views; normalised here, on the device, so that uint8 travels."""
        # A view of what pixels come as, so images are channels-last in memory: convolutions are faster for it.
        images = (views.permute(0, 3, 1, 2).float() - self.mean) / self.std
        out = self.image(images)
        vector = F.normalize(self.image_projection(out.pooled).float(), dim=-1)
        if not self.extra_projections:
            return vector
        extra = [F.normalize(p(out.extra[name]).float(), dim=-1) for name, p in self.extra_projections.items()]
        return F.normalize(torch.stack([vector, *extra]).mean(dim=0), dim=-1)

    def encode_text(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b e"]:
        """Unit vectors of token ids, padded to any common length up to the context."""
        return F.normalize(self.text_projection(self.text(tokens).pooled).float(), dim=-1)

    def forward(
        self, views: UInt8[Tensor, "b h w 3"], tokens: Int[Tensor, "t n"]
    ) -> tuple[Float[Tensor, "b e"], Float[Tensor, "t e"]]:
        # One call for both towers: under ZeRO-3 separate engine calls are silently wrong from the second step on.
        return self.encode_image(views), self.encode_text(tokens)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters free of weight decay: biases, norms, and what the towers name (positions, tokens)."""
        named: set[str] = set()
        for side, tower in (("image", self.image), ("text", self.text)):
            for name, parameter in tower.named_parameters(prefix=side):
                if parameter.ndim <= 1 or name.endswith(tower.no_weight_decay):
                    named.add(name)
        return named


def _projection(config: Any, width: int, embed_dim: int, side: str) -> nn.Module:
    if config.projection == "none":
        if width != embed_dim:
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "a tower without projection whose width is not the embedding's",
                where=f"{side}.name={config.name}",
                found=f"the tower gives {width} numbers, embed_dim is {embed_dim}",
                fix=f"set embed_dim={width} or {side}.projection=linear",
            )
        return nn.Identity()
    linear = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(linear.weight, std=width**-0.5)
    return linear


def build_model(config: ModelConfig, tokenizer: Tokenizer) -> TwoTower:
    return TwoTower(config, vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id)
