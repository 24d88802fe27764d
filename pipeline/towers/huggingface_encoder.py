"""Reads text encoders of `transformers` from local folders, whose files are untrusted."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import file_sha256
from clipwright.pipeline.core.log import quiet_transformers

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_CONFIG_BYTES = 2**20
# Keys of config.json that are dropped, in addition to keys that start with "_": they do not describe the encoder, or
# they name code to download.
IGNORED_KEYS = (
    "architectures",
    "attn_implementation",
    "auto_map",
    "dtype",
    "id2label",
    "label2id",
    "problem_type",
    "quantization_config",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def read_architecture(folder: Path) -> dict[str, Any]:
    """Returns all fields of the folder's config.json, defaults included, so that later versions cannot change them."""
    path = folder / CONFIG
    try:
        with path.open("rb") as file:
            tree = json.loads(file.read(MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from None
    if not isinstance(tree, dict):
        raise _unreadable(path, f"a JSON {type(tree).__name__} instead of an object")
    config = _parse_config(tree, f"text.folder={folder}")
    return _without_ignored_keys(json.loads(config.to_json_string(use_diff=False)))


def _without_ignored_keys(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if not key.startswith("_") and key not in IGNORED_KEYS}


def build_encoder(architecture: dict[str, Any], where: str) -> Any:
    """Builds the encoder described by `architecture` with random weights; `where` names the folder in errors."""
    config = _parse_config(architecture, where)
    model_class = _model_class(config, where)
    has_decoder = config.is_encoder_decoder  # read first: building the model may change the config
    try:
        with quiet_transformers():
            encoder = _encoder_of(model_class._from_config(config, **_without_pooler(model_class)), has_decoder)
            table = encoder.get_input_embeddings()
    except Exception as error:  # untrusted values can make transformers raise anything
        raise _not_an_encoder(where, f"transformers cannot build it: {error}") from None
    if not isinstance(table, nn.Embedding) or not isinstance(getattr(encoder.config, "hidden_size", None), int):
        raise _not_an_encoder(where, f"{model_class.__name__} does not take token ids")
    return encoder


def load_pretrained_encoder(folder: Path, architecture: dict[str, Any]) -> Any:
    """Loads the folder's encoder; E_MODEL_SHAPE names the first weight that is missing or of another shape."""
    config = _parse_config(architecture, f"text.folder={folder}")
    model_class = _model_class(config, f"text.folder={folder}")
    has_decoder = config.is_encoder_decoder
    try:
        with quiet_transformers():
            model, report = model_class.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **_without_pooler(model_class),
            )
    except Exception as error:  # untrusted files can make transformers raise anything
        raise mismatched_weights(folder, str(error)) from None
    for name, shape, expected in sorted(report["mismatched_keys"]):
        raise mismatched_weights(folder, f"{name} has shape {tuple(shape)}, the config expects {tuple(expected)}")
    for name in sorted(report["missing_keys"]):
        if not has_decoder or name.startswith("encoder."):
            raise mismatched_weights(folder, f"{name} is missing")
    return _encoder_of(model, has_decoder)


def _parse_config(tree: dict[str, Any], where: str) -> Any:
    """Returns the config object of transformers."""
    from transformers import CONFIG_MAPPING  # noqa: PLC0415  takes a second, which only this tower needs

    model_type = str(tree.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise _not_an_encoder(where, f"this version of transformers has no model_type {model_type!r}")
    try:
        with quiet_transformers():
            config = CONFIG_MAPPING[model_type].from_dict(_without_ignored_keys(tree))
    except Exception as error:  # untrusted values can make transformers raise anything
        raise _not_an_encoder(where, f"transformers cannot read its config: {error}") from None
    config.dtype = torch.float32
    config.use_cache = False
    return config


def _model_class(config: Any, where: str) -> Any:
    """Returns the class without a task head, and without a decoder where transformers has such a class."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING  # noqa: PLC0415

    for mapping in (MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise _not_an_encoder(where, f"transformers has no model without a task head for {config.model_type}")


def _without_pooler(model_class: Any) -> dict[str, bool]:
    if "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        return {"add_pooling_layer": False}
    return {}


def _encoder_of(model: Any, has_decoder: bool) -> Any:
    # The encoder of an encoder-decoder such as T5 also owns the shared embedding.
    return model.get_encoder() if has_decoder else model


def position_count(encoder: Any) -> int | None:
    """Returns the number of usable positions, None if unlimited; RoBERTa's positions start after its padding id."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(("position_embeddings", "wpe", "embed_positions")):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - reserved - getattr(module, "offset", 0)
    return None


def weights_sha256(folder: Path) -> str:
    """Returns the SHA-256 of the folder's safetensors file, or of the digests of all files of a sharded model."""
    names = [WEIGHTS]
    try:
        if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        digests = [file_sha256(folder / name) for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = f"only {pickles[0]}, a pickle, which is never opened" if pickles else f"no {WEIGHTS}: {error}"
        raise _unreadable(folder, found) from None
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _unreadable(path: Path, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_INPUT",
        "the text encoder cannot be read",
        where=path,
        found=found,
        fix="save the model again with save_pretrained",
    )


def _not_an_encoder(where: str, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_CONFIG_VALUE",
        "the folder does not contain a text encoder",
        where=where,
        found=found,
        fix="choose another text.folder",
    )


def mismatched_weights(folder: Path, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_MODEL_SHAPE",
        "the weights do not match the text encoder",
        where=folder,
        found=found,
        fix="save the model again with save_pretrained, or set text.pretrained=false",
    )
