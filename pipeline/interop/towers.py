"""CLIP's and SigLIP's towers as transformers describes and names them, in our terms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clipwright.pipeline.core.log import quiet_transformers
from clipwright.pipeline.core.registry import Registry
from clipwright.pipeline.interop.source import KINDS, Source, refused
from clipwright.pipeline.tokenizers.base import Tokenizer
from clipwright.pipeline.towers.base import IMAGE_TOWERS, TEXT_TOWERS

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
MAX_DEPTH = 1000  # blocks; a stranger's config is built, without storage, before the weights are met
OLD_EOS = 2  # what early CLIP folders state; transformers then reads a text at its largest id


def image_size(source: Source) -> int:
    """The side of the square pictures that the image tower takes."""
    return _square(source, "vision_config.image_size")


def image_fields(source: Source) -> dict[str, Any]:
    """The image tower's config."""
    vision = source.config.vision_config
    channels = _whole(source, "vision_config.num_channels")
    if channels != 3:
        raise refused(source.key("vision_config.num_channels"), 3, channels, "import a model of RGB pictures")
    if source.kind == "siglip" and vision.vision_use_head is not True:
        fix = "import a model with its attention-pooling head"
        raise refused(source.key("vision_config.vision_use_head"), True, vision.vision_use_head, fix)
    size, patch = image_size(source), _square(source, "vision_config.patch_size")
    # SigLIP's largest sees 384 pixels in patches of 14.
    fields = {"image_size": size, "patch": patch, "drop_rest": size % patch != 0}
    fields |= _blocks(source, "vision_config", "dim")
    return _preset(IMAGE_TOWERS, "clip_vit_" if source.kind == "clip" else "siglip_vit_", fields, "image_size")


def text_fields(source: Source, tokenizer: Tokenizer) -> dict[str, Any]:
    """The text tower's config, with the rule by which the end of a text is found."""
    fields = {
        "context": _whole(source, "text_config.max_position_embeddings"),
        **_blocks(source, "text_config", "width"),
    }
    rows = _whole(source, "text_config.vocab_size")
    if tokenizer.vocab_size > rows:
        raise refused(source.key("text_config.vocab_size"), f"the tokenizer's {tokenizer.vocab_size} ids or more", rows)
    if source.kind == "siglip":
        return _preset(TEXT_TOWERS, "siglip_text_", {**fields, "head": embed_dim(source)}, "context")
    end = source.config.text_config.eos_token_id
    wanted = f"the tokenizer's end of text, {tokenizer.eot_id}"
    if end == OLD_EOS and tokenizer.eot_id != OLD_EOS:
        if tokenizer.eot_id != tokenizer.vocab_size - 1:
            raise refused(source.key("text_config.eos_token_id"), wanted, f"{end}, which means the largest id")
        return _preset(TEXT_TOWERS, "clip_text_", {**fields, "pool": "argmax"}, "context")
    if end != tokenizer.eot_id:
        raise refused(source.key("text_config.eos_token_id"), wanted, end)
    return _preset(TEXT_TOWERS, "clip_text_", {**fields, "pool": "eot"}, "context")


def embed_dim(source: Source) -> int:
    """Width of the shared space; SigLIP's towers must agree on it, CLIP's are projected into it."""
    if source.kind == "clip":
        return _whole(source, "projection_dim")
    image, text = _whole(source, "vision_config.hidden_size"), _whole(source, "text_config.projection_size")
    if image != text:
        raise refused(source.key("text_config.projection_size"), f"vision_config.hidden_size, {image}", text)
    return image


def _blocks(source: Source, section: str, width_name: str) -> dict[str, Any]:
    """What both towers state of their transformer blocks."""
    config = getattr(source.config, f"{section}")
    act, eps = config.hidden_act, config.layer_norm_eps
    if act not in ACTIVATIONS:
        raise refused(source.key(f"{section}.hidden_act"), " or ".join(ACTIVATIONS), repr(act))
    if not isinstance(eps, float) or not 0 < eps < math.inf:
        raise refused(source.key(f"{section}.layer_norm_eps"), "a positive number", repr(eps))
    depth = _whole(source, f"{section}.num_hidden_layers")
    if depth > MAX_DEPTH:
        raise refused(source.key(f"{section}.num_hidden_layers"), f"at most {MAX_DEPTH}", depth)
    width, heads = _whole(source, f"{section}.hidden_size"), _whole(source, f"{section}.num_attention_heads")
    if width % heads:
        raise refused(source.key(f"{section}.num_attention_heads"), f"a divisor of hidden_size, {width}", heads)
    return {
        width_name: width,
        "heads": heads,
        "depth": depth,
        "mlp_ratio": _whole(source, f"{section}.intermediate_size") / width,
        "act": ACTIVATIONS[act],
        "ln_eps": eps,
    }


def _whole(source: Source, name: str) -> int:
    value: Any = source.config
    for part in name.split("."):
        value = getattr(value, part)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refused(source.key(name), "a positive whole number", repr(value))
    return value


def _square(source: Source, name: str) -> int:
    section, _, field = name.partition(".")
    value = getattr(getattr(source.config, section), field)
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refused(source.key(name), "one positive whole number", repr(value))
    return value


def _preset(registry: Registry[Any], start: str, fields: dict[str, Any], size: str) -> dict[str, Any]:
    """The config of the preset that has these `fields` but for its `size`; else the first one's with them."""
    names = [name for name in registry.entries if name.startswith(start)]
    made = [registry.preset(name, **fields) for name in names]
    same = [one for one in made if one == registry.preset(one.name, **{size: fields[size]})]
    return dataclasses.asdict((same or made)[0])


def wanted_shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor that transformers' model of this config has."""
    import transformers  # noqa: PLC0415  see source.py

    try:
        with quiet_transformers(), torch.device("meta"):
            model = getattr(transformers, KINDS[source.kind])(source.config)
    except Exception as error:  # whatever transformers makes of a stranger's values
        raise refused(source.key("text_config, vision_config"), "a model that transformers can build", error) from None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def convert(source: Source, tensors: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """The tensors of a model folder: those of the two towers, and the loss's temperature (and bias).

    Of the token table the first `vocab_size` rows are kept: no id reaches the others.
    """
    rest, out = dict(tensors), {}
    take = partial(_move, rest, out)
    for side, depth in (("vision", "vision_config"), ("text", "text_config")):
        ours = {"vision": "image", "text": "text"}[side]
        for i in range(getattr(source.config, depth).num_hidden_layers):
            _move_block(take, f"{ours}.blocks.{i}", f"{side}_model.encoder.layers.{i}")
    table = rest.pop("text_model.embeddings.token_embedding.weight")
    out["text.token_embed.weight"] = table[:vocab_size].clone()
    out["text.pos_embed"] = rest.pop("text_model.embeddings.position_embedding.weight")
    out["image.pos_embed"] = rest.pop("vision_model.embeddings.position_embedding.weight")
    take("image.norm", "vision_model.post_layernorm")
    take("text.norm", "text_model.final_layer_norm")
    (_clip if source.kind == "clip" else _siglip)(rest, out)
    out["loss.logit_scale"] = rest.pop("logit_scale").reshape(1)
    assert not rest, rest.keys()
    return out


def _clip(rest: dict[str, Tensor], out: dict[str, Tensor]) -> None:
    out["image.cls_token"] = rest.pop("vision_model.embeddings.class_embedding")
    out["image.patch_embed.weight"] = rest.pop("vision_model.embeddings.patch_embedding.weight")
    _move(rest, out, "image.norm_pre", "vision_model.pre_layrnorm")
    out["image_projection.weight"] = rest.pop("visual_projection.weight")
    out["text_projection.weight"] = rest.pop("text_projection.weight")


def _siglip(rest: dict[str, Tensor], out: dict[str, Tensor]) -> None:
    _move(rest, out, "image.patch_embed", "vision_model.embeddings.patch_embedding")
    _move(rest, out, "text.head", "text_model.head")
    pool, head = "image.attention_pool", "vision_model.head"
    out[f"{pool}.query"] = rest.pop(f"{head}.probe").reshape(-1)
    for end in ("weight", "bias"):
        q, k, v = rest.pop(f"{head}.attention.in_proj_{end}").chunk(3)
        out |= {f"{pool}.q.{end}": q.clone(), f"{pool}.kv.{end}": torch.cat([k, v])}
    names = {"out": "attention.out_proj", "norm": "layernorm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for ours, theirs in names.items():
        _move(rest, out, f"{pool}.{ours}", f"{head}.{theirs}")
    out["loss.bias"] = rest.pop("logit_bias").reshape(1)


def _move_block(take: Callable[..., None], ours: str, theirs: str) -> None:
    take(f"{ours}.attn.qkv", *(f"{theirs}.self_attn.{part}_proj" for part in "qkv"))
    take(f"{ours}.attn.out", f"{theirs}.self_attn.out_proj")
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for own, name in names.items():
        take(f"{ours}.{own}", f"{theirs}.{name}")


def _move(rest: dict[str, Tensor], out: dict[str, Tensor], to: str, *origins: str) -> None:
    """Weight and bias of a module, stacked if it comes from several."""
    for end in ("weight", "bias"):
        parts = [rest.pop(f"{origin}.{end}") for origin in origins]
        out[f"{to}.{end}"] = torch.cat(parts) if len(parts) > 1 else parts[0]
