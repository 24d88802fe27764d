"""Freezing: parameters of a tower, or of its first blocks, that training leaves unchanged."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.model.two_tower import TwoTower
from clipwright.pipeline.towers.base import ImageTower, TextTower
from clipwright.pipeline.train.techniques.base import TECHNIQUES, Technique, TechniqueConfig

Frozen = Literal["none", "all"] | Annotated[int, Field(ge=1)]


@configclass
class FreezeConfig(TechniqueConfig):
    """Which parameters are frozen. The projections into the shared space are always trained."""

    image: Frozen = "none"
    """Of the image tower: `none`, `all`, or the number of its first blocks, frozen together with the stem."""
    text: Frozen = "none"
    """Of the text tower: `none`, `all`, or the number of its first blocks, frozen together with the embeddings."""


class Freeze(Technique):
    """Takes parameters out of training: they have no gradient and no optimizer state.

    Only parameters: running statistics of batch norm still move, and dropout is still drawn.
    Source: Zhai et al. 2022, "LiT: Zero-shot transfer with locked-image text tuning", section 3.
    """

    def __init__(self, config: FreezeConfig) -> None:
        self.config = config

    def prepare(self, towers: TwoTower) -> None:
        """Freezes; E_CONFIG_VALUE for more blocks than a tower has, or if nothing is left to train."""
        for side, tower in (("image", towers.image), ("text", towers.text)):
            for parameter in frozen_parameters(tower, getattr(self.config, side), f"techniques: freeze.{side}"):
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in towers.parameters()):
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "every parameter of the model is frozen",
                where="techniques: freeze",
                found=f"image: {self.config.image}, text: {self.config.text}",
                fix="freeze fewer blocks, or set image.projection=linear or text.projection=linear",
            )


def frozen_parameters(tower: ImageTower | TextTower, frozen: Frozen, where: str) -> list[nn.Parameter]:
    """Returns the parameters that `frozen` names: with N blocks, all up to the last one of block N.

    Parameters are in the order of their registration, so that a stem or embedding, which comes before the blocks, and
    what lies between blocks, such as Swin's mergings, are included. `where`: the config field, for E_CONFIG_VALUE.
    """
    if frozen == "none":
        return []
    parameters = list(tower.parameters())
    if frozen == "all":
        return parameters
    blocks = tower.block_list()
    if frozen > len(blocks):
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "more blocks are to be frozen than the tower has",
            where=f"{where}: {frozen}",
            found=f"the tower has {len(blocks)}",
            fix=f"use 1 to {len(blocks)}, all or none" if blocks else "use all or none",
        )
    inside = {id(parameter) for parameter in blocks[frozen - 1].parameters()}
    last = max(index for index, parameter in enumerate(parameters) if id(parameter) in inside)
    return parameters[: last + 1]


TECHNIQUES.add(
    FreezeConfig,
    Freeze,
    {"freeze": {}},
    source="Zhai et al. 2022, LiT: Zero-Shot Transfer with Locked-image text Tuning",
)
