"""SiglipModel folders of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.interop.formats.base import FORMATS, FormatConfig, incompatible
from clipwright.pipeline.interop.huggingface.model import TransformersFormat
from clipwright.pipeline.interop.huggingface.tokenizer import (
    TokenizerTree,
    clip_tokenizer,
    generic_tokenizer,
    siglip_tokenizer,
)
from clipwright.pipeline.interop.huggingface.towers import CheckedConfig, nearest_preset, shared_rules
from clipwright.pipeline.interop.weights import NameTable, TensorRule, rename, rename_module
from clipwright.pipeline.model.two_tower import ModelConfig
from clipwright.pipeline.tokenizers.base import Tokenizer
from clipwright.pipeline.towers.base import IMAGE_TOWERS, TEXT_TOWERS


@configclass
class TransformersSigLIPConfig(FormatConfig):
    """A SiglipModel of transformers with its processor, as `save_pretrained` writes it."""


class TransformersSigLIP(TransformersFormat):
    """Zhai et al. 2023; the image tower ends in attention pooling, and neither tower has a projection."""

    model_type = "siglip"
    model_class = "SiglipModel"
    config_class = "SiglipConfig"
    image_processor_class = "SiglipImageProcessorPil"
    loss = "sigmoid"
    crops_by_default = False
    sentencepiece = True

    def embed_dim(self, config: CheckedConfig) -> int:
        image_width = config.positive_int("vision_config.hidden_size")
        text_width = config.positive_int("text_config.projection_size")
        if image_width != text_width:
            expected = f"vision_config.hidden_size, {image_width}"
            raise incompatible(config.where("text_config.projection_size"), expected, text_width)
        return image_width

    def image_fields(self, config: CheckedConfig) -> dict[str, Any]:
        name = "vision_config.vision_use_head"
        if config.get(name) is not True:
            fix = "import a model with its attention-pooling head"
            raise incompatible(config.where(name), True, config.get(name), fix)
        return nearest_preset(IMAGE_TOWERS, "siglip_vit_", config.image_fields(), "image_size")

    def text_fields(self, config: CheckedConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        fields = {**config.text_fields(tokenizer.vocab_size), "head": self.embed_dim(config)}
        return nearest_preset(TEXT_TOWERS, "siglip_text_", fields, "context")

    def convert_tokenizer(self, folder: Path, theirs: Any) -> tuple[TokenizerTree, Tokenizer]:
        if theirs.pad_token_id is None:
            where = f"{folder / 'tokenizer_config.json'}: pad_token"
            raise incompatible(where, "a token to pad with", "nothing")
        return siglip_tokenizer(folder, theirs) or clip_tokenizer(theirs) or generic_tokenizer(folder)

    def name_table(self, config: ModelConfig) -> NameTable:
        pool, head = "image.attention_pool", "vision_model.head"
        projections = [
            TensorRule(
                ours=(f"{pool}.q.{kind}", f"{pool}.kv.{kind}"),
                foreign=(f"{head}.attention.in_proj_{kind}",),
                our_parts=(1, 2),
            )
            for kind in ("weight", "bias")
        ]
        return NameTable(
            [
                *shared_rules(config),
                *rename_module("image.patch_embed", "vision_model.embeddings.patch_embedding"),
                TensorRule((f"{pool}.query",), (f"{head}.probe",), our_shape=(-1,), foreign_shape=(1, 1, -1)),
                *projections,
                *rename_module(f"{pool}.out", f"{head}.attention.out_proj"),
                *rename_module(f"{pool}.norm", f"{head}.layernorm"),
                *rename_module(f"{pool}.mlp.fc1", f"{head}.mlp.fc1"),
                *rename_module(f"{pool}.mlp.fc2", f"{head}.mlp.fc2"),
                *rename_module("text.head", "text_model.head"),
                rename("loss.logit_scale", "logit_scale"),
                rename("loss.bias", "logit_bias"),
            ]
        )


FORMATS.add(
    TransformersSigLIPConfig,
    TransformersSigLIP,
    {"transformers_siglip": {}},
    source="SiglipModel of huggingface/transformers; Zhai et al. 2023",
)
