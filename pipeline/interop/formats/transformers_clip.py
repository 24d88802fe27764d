"""CLIPModel folders of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.interop.formats.base import FORMATS, FormatConfig, incompatible
from clipwright.pipeline.interop.huggingface.model import TransformersFormat
from clipwright.pipeline.interop.huggingface.tokenizer import TokenizerTree, clip_tokenizer, generic_tokenizer
from clipwright.pipeline.interop.huggingface.towers import CheckedConfig, nearest_preset, shared_rules
from clipwright.pipeline.interop.weights import NameTable, TensorRule, rename, rename_module
from clipwright.pipeline.model.two_tower import ModelConfig
from clipwright.pipeline.tokenizers.base import Tokenizer
from clipwright.pipeline.towers.base import IMAGE_TOWERS, TEXT_TOWERS

LEGACY_EOS = 2  # what early CLIP folders state as eos_token_id; transformers then pools a text at its largest id


@configclass
class TransformersCLIPConfig(FormatConfig):
    """A CLIPModel of transformers with its processor, as `save_pretrained` writes it."""


class TransformersCLIP(TransformersFormat):
    """Radford et al. 2021; both towers are projected into the shared space."""

    model_type = "clip"
    model_class = "CLIPModel"
    config_class = "CLIPConfig"
    image_processor_class = "CLIPImageProcessorPil"
    loss = "softmax"
    crops_by_default = True
    sentencepiece = False

    def embed_dim(self, config: CheckedConfig) -> int:
        return config.positive_int("projection_dim")

    def image_fields(self, config: CheckedConfig) -> dict[str, Any]:
        return nearest_preset(IMAGE_TOWERS, "clip_vit_", config.image_fields(), "image_size")

    def text_fields(self, config: CheckedConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        fields = config.text_fields(tokenizer.vocab_size)
        fields["pool"] = self._pooling(config, tokenizer)
        return nearest_preset(TEXT_TOWERS, "clip_text_", fields, "context")

    def _pooling(self, config: CheckedConfig, tokenizer: Tokenizer) -> str:
        name = "text_config.eos_token_id"
        end = config.get(name)
        expected = f"the tokenizer's end of text, {tokenizer.eot_id}"
        if end == LEGACY_EOS and tokenizer.eot_id != LEGACY_EOS:
            if tokenizer.eot_id != tokenizer.vocab_size - 1:
                raise incompatible(config.where(name), expected, f"{end}, which means the largest id")
            return "argmax"
        if end != tokenizer.eot_id:
            raise incompatible(config.where(name), expected, end)
        return "eot"

    def convert_tokenizer(self, folder: Path, theirs: Any) -> tuple[TokenizerTree, Tokenizer]:
        return clip_tokenizer(theirs) or generic_tokenizer(folder)

    def name_table(self, config: ModelConfig) -> NameTable:
        return NameTable(
            [
                *shared_rules(config),
                rename("image.cls_token", "vision_model.embeddings.class_embedding"),
                rename("image.patch_embed.weight", "vision_model.embeddings.patch_embedding.weight"),
                *rename_module("image.norm_pre", "vision_model.pre_layrnorm"),  # the name has this typo
                rename("image_projection.weight", "visual_projection.weight"),
                rename("text_projection.weight", "text_projection.weight"),
                TensorRule(("loss.logit_scale",), ("logit_scale",), our_shape=(1,), foreign_shape=()),
            ]
        )


FORMATS.add(
    TransformersCLIPConfig,
    TransformersCLIP,
    {"transformers_clip": {}},
    source="CLIPModel of huggingface/transformers; Radford et al. 2021",
)
