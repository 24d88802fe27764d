"""The CLIP and SigLIP towers of transformers: what their configs state, checked, and their common tensor names."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.registry import Registry
from clipwright.pipeline.interop.formats.base import incompatible
from clipwright.pipeline.interop.huggingface.folder import CONFIG
from clipwright.pipeline.interop.weights import TensorRule, rename, rename_module
from clipwright.pipeline.model.two_tower import ModelConfig

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
MAX_DEPTH = 1000  # blocks; an untrusted config is built, without storage, before the weights are read


class CheckedConfig:
    """A config object of transformers whose values come from an untrusted folder. Each method raises E_IMPORT."""

    def __init__(self, folder: Path, config: Any) -> None:
        self.folder, self.config = folder, config

    def where(self, name: str) -> str:
        """Returns how an error names a key of config.json."""
        return f"{self.folder / CONFIG}: {name}"

    def get(self, name: str) -> Any:
        """Returns the value of `section.key`."""
        value: Any = self.config
        for attribute in name.split("."):
            value = getattr(value, attribute)
        return value

    def positive_int(self, name: str) -> int:
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise incompatible(self.where(name), "a positive integer", repr(value))
        return value

    def square(self, name: str) -> int:
        """Returns a size given as a number or as two equal numbers."""
        value = self.get(name)
        if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise incompatible(self.where(name), "one positive integer", repr(value))
        return value

    def block_fields(self, section: str, width_name: str) -> dict[str, Any]:
        """Returns our fields for the transformer blocks of a tower; `width_name` is our name for the width."""
        activation = self.get(f"{section}.hidden_act")
        if activation not in ACTIVATIONS:
            raise incompatible(self.where(f"{section}.hidden_act"), " or ".join(ACTIVATIONS), repr(activation))
        eps = self.get(f"{section}.layer_norm_eps")
        if not isinstance(eps, float) or not 0 < eps < math.inf:
            raise incompatible(self.where(f"{section}.layer_norm_eps"), "a positive number", repr(eps))
        depth = self.positive_int(f"{section}.num_hidden_layers")
        if depth > MAX_DEPTH:
            raise incompatible(self.where(f"{section}.num_hidden_layers"), f"at most {MAX_DEPTH}", depth)
        width = self.positive_int(f"{section}.hidden_size")
        heads = self.positive_int(f"{section}.num_attention_heads")
        if width % heads:
            expected = f"a divisor of hidden_size, {width}"
            raise incompatible(self.where(f"{section}.num_attention_heads"), expected, heads)
        return {
            width_name: width,
            "heads": heads,
            "depth": depth,
            "mlp_ratio": self.positive_int(f"{section}.intermediate_size") / width,
            "act": ACTIVATIONS[activation],
            "ln_eps": eps,
        }

    def image_fields(self) -> dict[str, Any]:
        """Returns our fields for an image tower, without its preset's name."""
        channels = self.positive_int("vision_config.num_channels")
        if channels != 3:
            raise incompatible(self.where("vision_config.num_channels"), 3, channels, "import a model of RGB images")
        size, patch = self.square("vision_config.image_size"), self.square("vision_config.patch_size")
        return {
            "image_size": size,
            "patch": patch,
            "drop_rest": size % patch != 0,  # SigLIP's largest model sees 384 pixels in patches of 14
            **self.block_fields("vision_config", "dim"),
        }

    def text_fields(self, vocab_size: int) -> dict[str, Any]:
        """Returns our fields for a text tower, without its preset's name and its pooling."""
        rows = self.positive_int("text_config.vocab_size")
        if vocab_size > rows:
            raise incompatible(
                self.where("text_config.vocab_size"), f"at least the tokenizer's {format_count(vocab_size, 'id')}", rows
            )
        return {
            "context": self.positive_int("text_config.max_position_embeddings"),
            **self.block_fields("text_config", "width"),
        }


def nearest_preset(registry: Registry[Any], prefix: str, fields: dict[str, Any], size: str) -> dict[str, Any]:
    """Returns a tower's config: the preset that differs at most in `size`, else the first one with `fields` changed.

    Only presets whose name starts with `prefix` are considered.
    """
    candidates = [registry.preset(name, **fields) for name in registry.entries if name.startswith(prefix)]
    for candidate in candidates:
        if candidate == registry.preset(candidate.name, **{size: fields[size]}):
            return dataclasses.asdict(candidate)
    return dataclasses.asdict(candidates[0])


def shared_rules(config: ModelConfig) -> list[TensorRule]:
    """Returns the rules that CLIP and SigLIP have in common: blocks, position tables, token table, final norms."""
    image: Any = config.image
    text: Any = config.text
    rules: list[TensorRule] = []
    for i in range(image.depth):
        rules += _block_rules(f"image.blocks.{i}", f"vision_model.encoder.layers.{i}")
    for i in range(text.depth):
        rules += _block_rules(f"text.blocks.{i}", f"text_model.encoder.layers.{i}")
    rules += [
        rename("text.token_embed.weight", "text_model.embeddings.token_embedding.weight"),
        rename("text.pos_embed", "text_model.embeddings.position_embedding.weight"),
        rename("image.pos_embed", "vision_model.embeddings.position_embedding.weight"),
        *rename_module("image.norm", "vision_model.post_layernorm"),
        *rename_module("text.norm", "text_model.final_layer_norm"),
    ]
    return rules


def _block_rules(ours: str, foreign: str) -> list[TensorRule]:
    attention = f"{foreign}.self_attn"
    return [
        *rename_module(f"{ours}.attn.qkv", f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
        *rename_module(f"{ours}.attn.out", f"{attention}.out_proj"),
        *rename_module(f"{ours}.norm1", f"{foreign}.layer_norm1"),
        *rename_module(f"{ours}.norm2", f"{foreign}.layer_norm2"),
        *rename_module(f"{ours}.mlp.fc1", f"{foreign}.mlp.fc1"),
        *rename_module(f"{ours}.mlp.fc2", f"{foreign}.mlp.fc2"),
    ]
