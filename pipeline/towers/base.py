"""The contract of a tower: images or tokens in, a pooled vector and tokens out.

Nothing outside this folder asks which tower it holds. A tower is plain single-device PyTorch: it never imports
torch.distributed or DeepSpeed.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clipwright.pipeline.core.registry import Registry, configclass


class TowerOutput(NamedTuple):
    """What every tower returns.

    pooled (B, D); tokens (B, N, D): patch tokens only, row-major, after the final norm where there is one (text: all
    positions); grid (h, w) with N = h·w (text: None); mask (B, N): which text positions are real (images: None);
    extra: further pooled vectors (B, D) by name, each with its own projection.
    A named tuple, not a dataclass: DeepSpeed's ZeRO-3 hooks look for tensors in tuples, lists and dicts only, and a
    tower whose output they cannot see loses its own parameters in the backward pass.
    """

    pooled: Float[Tensor, "b d"]
    tokens: Float[Tensor, "b n d"]
    grid: tuple[int, int] | None = None
    mask: Bool[Tensor, "b n"] | None = None
    extra: dict[str, Tensor] = {}  # noqa: RUF012  never written to


@configclass
class ImageTowerConfig:
    """Fields every image tower has. `projection: none` makes `pooled` itself the embedding.

    A class variable `family` is what a tower is listed under, if that is not its file's name.
    """

    name: str
    image_size: int = 224
    projection: Literal["linear", "none"] = "linear"


@configclass
class TextTowerConfig:
    """Fields every text tower has; `context` is the longest token sequence, SOT and EOT included.

    `external_fields`: fields that point outside the run, to what is read when it starts; neither a run's identity nor
    a model folder contains them.
    """

    external_fields: ClassVar[tuple[str, ...]] = ()

    name: str
    context: int = 77
    pad: Literal["longest", "fixed"] = "longest"
    projection: Literal["linear", "none"] = "linear"

    def resolved_fields(self, stored: dict[str, Any]) -> dict[str, Any]:
        """What the fields in `external_fields` bring in, as further fields; `stored`: those that the run began with."""
        return {}


class ImageTower(nn.Module):
    """Base of image towers: float images (B, 3, H, W), normalised, H = W = image_size.

    They come channels-last in memory, the faster layout for convolutions; another one gives the same.
    """

    feature_dim: int
    image_size: int
    extra_names: tuple[str, ...] = ()  # names in TowerOutput.extra
    no_weight_decay: tuple[str, ...] = ()  # ends of parameter names free of decay, beyond biases and norms (ndim <= 1)

    @property
    def token_dim(self) -> int:
        """Width of `TowerOutput.tokens`; feature_dim unless a tower's tokens and pooled differ in width."""
        return self.feature_dim

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> TowerOutput:
        raise AssertionError("a tower defines forward")

    def block_list(self) -> list[nn.Module]:
        """Its blocks in order of computation, which activation checkpointing chooses among by number."""
        return []

    def resized(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of this tower at another image size, its position tables resized to fit this one."""
        return state


class TextTower(nn.Module):
    """Base of text towers: token ids (B, N), N ≤ context; `eot_id` marks the end of a caption."""

    feature_dim: int
    context: int
    eot_id: int
    no_weight_decay: tuple[str, ...] = ()

    @property
    def token_dim(self) -> int:
        """Width of `TowerOutput.tokens`; feature_dim unless a tower's tokens and pooled differ in width."""
        return self.feature_dim

    def forward(self, tokens: Int[Tensor, "b n"]) -> TowerOutput:
        raise AssertionError("a tower defines forward")

    def block_list(self) -> list[nn.Module]:
        """Its blocks in order of computation, which activation checkpointing chooses among by number."""
        return []

    def mask(self, tokens: Int[Tensor, "b n"]) -> Bool[Tensor, "b n"]:
        """True at the positions up to and including the first EOT."""
        is_eot = (tokens == self.eot_id).int()
        return is_eot.cumsum(dim=1) - is_eot == 0


IMAGE_TOWERS: Registry[ImageTower] = Registry("image tower", "clipwright.pipeline.towers")
TEXT_TOWERS: Registry[TextTower] = Registry("text tower", "clipwright.pipeline.towers")


def parameter_count(module: nn.Module) -> int:
    """Trainable parameters; buffers never count."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
