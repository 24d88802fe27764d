"""The contract of a tower: images or token ids in; a pooled embedding and tokens out.

Code outside this folder never asks which tower it holds. A tower is plain single-device PyTorch: it never imports
torch.distributed or DeepSpeed.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from clipwright.pipeline.core.registry import Registry, configclass
from clipwright.pipeline.towers.layers import BlockStack


class TowerOutput(NamedTuple):
    """The output of every tower.

    pooled (B, D): one embedding per sample, before the projection. tokens (B, N, D): image towers return patch tokens
    only, row-major, after the final norm where there is one; text towers return all positions. grid (h, w) with
    N = h·w; None for text. mask (B, N): true at real text positions; None for images. extra: further pooled
    embeddings (B, D) by name, each with a projection of its own.

    A named tuple, not a dataclass: DeepSpeed's ZeRO-3 hooks look for tensors in tuples, lists and dicts only. With an
    output type that they do not search, they release the tower's parameters before the backward pass needs them.
    """

    pooled: Float[Tensor, "b d"]
    tokens: Float[Tensor, "b n d"]
    grid: tuple[int, int] | None = None
    mask: Bool[Tensor, "b n"] | None = None
    extra: dict[str, Tensor] = {}  # noqa: RUF012  never modified


@configclass
class ImageTowerConfig:
    """Fields of every image tower.

    The class variable `family` names the family that `clipwright list` shows, where it differs from the file's name.
    """

    name: str
    """Preset name."""
    image_size: int = 224
    """Height and width of the input in pixels."""
    projection: Literal["linear", "none"] = "linear"
    """Projection of the pooled output to the embedding; `none` uses the pooled output itself."""


@configclass
class TextTowerConfig:
    """Fields of every text tower.

    The class variable `external_fields` names fields that refer to files outside the run, read when it starts; neither
    a run's identity nor a model folder contains them.
    """

    external_fields: ClassVar[tuple[str, ...]] = ()

    name: str
    """Preset name."""
    context: Annotated[int, Field(ge=8)] = 77
    """Maximum sequence length in tokens, SOT and EOT included."""
    pad: Literal["longest", "fixed"] = "longest"
    """Padding of a batch: to its longest caption or always to `context`."""
    projection: Literal["linear", "none"] = "linear"
    """Projection of the pooled output to the embedding; `none` uses the pooled output itself."""

    def resolved_fields(self, stored: dict[str, Any]) -> dict[str, Any]:
        """Returns fields that hold the content of `external_fields`; `stored` are those of the run's first start."""
        return {}


class Tower(nn.Module):
    """Base of image and text towers. `feature_dim` is the width of `TowerOutput.pooled`.

    `no_weight_decay`: suffixes of parameter names without weight decay, in addition to biases and norms (ndim ≤ 1).
    """

    feature_dim: int
    no_weight_decay: tuple[str, ...] = ()

    @property
    def token_dim(self) -> int:
        """The width of `TowerOutput.tokens`; equals `feature_dim` unless a tower's tokens have another width."""
        return self.feature_dim

    def block_list(self) -> list[nn.Module]:
        """Returns the blocks in order of computation; activation checkpointing selects among them by index.

        The default lists the blocks of every `BlockStack`.
        """
        return [block for stack in self.modules() if isinstance(stack, BlockStack) for block in stack]


class ImageTower(Tower):
    """Base of image towers: takes normalized float images (B, 3, H, W) with H = W = image_size.

    Images arrive channels-last in memory, the faster layout for convolutions; the layout does not change the result.
    `extra_names` lists the keys of `TowerOutput.extra`.
    """

    image_size: int
    extra_names: tuple[str, ...] = ()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> TowerOutput:
        raise AssertionError("a tower defines forward")

    def resized(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns a state dict of this tower at another image size, its position tables resized to this image size.

        E_CONFIG_VALUE from towers whose weights depend on the number of tokens (MLP-Mixer).
        """
        return state


class TextTower(Tower):
    """Base of text towers: takes token ids (B, N) with N ≤ context; `eot_id` marks the end of a caption."""

    context: int
    eot_id: int

    def forward(self, tokens: Int[Tensor, "b n"]) -> TowerOutput:
        raise AssertionError("a tower defines forward")

    def mask(self, tokens: Int[Tensor, "b n"]) -> Bool[Tensor, "b n"]:
        """Returns true at the positions up to and including the first EOT."""
        is_eot = (tokens == self.eot_id).int()
        return is_eot.cumsum(dim=1) - is_eot == 0


IMAGE_TOWERS: Registry[ImageTower] = Registry("image tower", "clipwright.pipeline.towers")
TEXT_TOWERS: Registry[TextTower] = Registry("text tower", "clipwright.pipeline.towers")


def parameter_count(module: nn.Module) -> int:
    """Returns the number of trainable parameters; buffers never count."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
