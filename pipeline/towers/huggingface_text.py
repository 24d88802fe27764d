"""Any `transformers` text encoder in a local folder as a text tower."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import file_sha256
from clipwright.pipeline.core.log import quiet_transformers
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.towers.base import TEXT_TOWERS, TextTower, TextTowerConfig, TowerOutput

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_BYTES = 2**20  # of a config.json or an index
# Of a config.json, beside what begins with "_": what says nothing about the encoder itself, or names code to fetch.
FOREIGN = ("architectures", "attn_implementation", "auto_map", "dtype", "id2label", "label2id", "problem_type")
FOREIGN += ("quantization_config", "task_specific_params", "torch_dtype", "transformers_version", "use_cache")


@configclass
class HuggingFaceTextConfig(TextTowerConfig):
    """The encoder whose config.json lies in `folder`, with random weights, or with the folder's if `pretrained`.

    pool: `mean` of the real tokens, `cls`, the first position, or `eot`, the first EOT. A run's first start writes down
    `architecture`, the content of config.json, and `weights`, the SHA-256 of pretrained ones: a model folder needs no
    other. With `pretrained` the folder must stay until the run is done.
    """

    external_fields: ClassVar[tuple[str, ...]] = ("folder", "pretrained")

    folder: str | None = None
    pretrained: bool = False
    pool: Literal["mean", "cls", "eot"] = "mean"
    architecture: dict[str, Any] | None = None
    weights: str | None = None

    def resolved_fields(self, stored: dict[str, Any]) -> dict[str, Any]:
        gone = self.folder is not None and not (Path(self.folder) / CONFIG).is_file()
        if gone and not self.pretrained and stored.get("architecture"):
            return {"architecture": stored["architecture"], "weights": None}
        return {
            "architecture": self.architecture or read_architecture(_source(self)),
            "weights": _weights_sha256(_source(self)) if self.pretrained else None,
        }


class HuggingFaceText(TextTower):
    """Token ids (B, N), N ≤ context → pooled (B, D), tokens (B, N, D), mask (B, N) up to and with EOT.

    D is the encoder's hidden size; its key mask hides what follows EOT. Of an encoder-decoder (T5) the encoder is
    taken; what the embedding does not need, such as BERT's pooler, is not built. Dropout is as in config.json.
    E_CONFIG_VALUE for an encoder that cannot serve, or has no room for the context or the tokenizer's ids; E_INPUT and
    E_MODEL_SHAPE for a folder or weights that cannot be read or do not fit; pickles are never opened.
    """

    no_weight_decay = ("position_embeddings.weight", "wpe.weight", "relative_attention_bias.weight")

    def __init__(self, config: HuggingFaceTextConfig, *, vocab_size: int, eot_id: int) -> None:
        super().__init__()
        self.context, self.eot_id, self.pool = config.context, eot_id, config.pool
        architecture = config.architecture or read_architecture(_source(config))
        where = f"text.folder={config.folder}" if config.folder else f"text.name={config.name}"
        self.encoder = build_encoder(architecture, where)
        self.feature_dim: int = self.encoder.config.hidden_size
        self._check_sizes(vocab_size, where)
        if config.pretrained:
            self._load(_source(config), architecture, config.weights)

    def forward(self, tokens: Int[Tensor, "b n"]) -> TowerOutput:
        assert tokens.shape[1] <= self.context, (tokens.shape, self.context)
        mask = self.mask(tokens)
        x = self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        if self.pool == "mean":
            real = mask[..., None].to(x.dtype)
            return TowerOutput((x * real).sum(dim=1) / real.sum(dim=1), x, mask=mask)
        place = mask.sum(dim=1) - 1 if self.pool == "eot" else torch.zeros_like(tokens[:, 0])
        return TowerOutput(x[torch.arange(len(x), device=x.device), place], x, mask=mask)

    def block_list(self) -> list[nn.Module]:
        from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: PLC0415

        return [module for module in self.encoder.modules() if isinstance(module, GradientCheckpointingLayer)]

    def _check_sizes(self, vocab_size: int, where: str) -> None:
        room = self.encoder.get_input_embeddings().num_embeddings
        if vocab_size > room:
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "a tokenizer with more ids than the text tower has embeddings for",
                where=where,
                found=f"the tokenizer has {vocab_size:,} ids, the text tower room for {room:,}",
                fix="use the encoder's own: tokenizer.name=huggingface tokenizer.folder=DIR",
            )
        places = _places(self.encoder)
        if places is not None and self.context > places:
            raise ClipwrightError(
                "E_CONFIG_VALUE",
                "a context longer than the text tower has positions for",
                where=f"text.context={self.context}",
                found=f"{where} has {places} positions",
                fix=f"set text.context={places} or less",
            )

    def _load(self, folder: Path, architecture: dict[str, Any], known: str | None) -> None:
        """Copies the folder's weights in: each of ours must be there, of its shape and finite."""
        if known is not None and (found := _weights_sha256(folder)) != known:
            raise ClipwrightError(
                "E_INPUT",
                "weights that are not those the run was begun with",
                where=folder,
                found=f"SHA-256 {found[:16]}…, the run has {known[:16]}…",
                fix="restore the files, or start over with --fresh",
            )
        _weights_sha256(folder)  # says what is missing
        encoder = _pretrained(folder, architecture)
        bad = next((name for name, t in encoder.state_dict().items() if not bool(torch.isfinite(t).all())), None)
        if bad is not None:
            raise _unfit(folder, f"{bad} holds numbers that are not finite")
        self.encoder.load_state_dict(encoder.state_dict(), strict=True)


def read_architecture(folder: Path) -> dict[str, Any]:
    """All fields of the folder's config.json, defaults included: another version's defaults then change nothing."""
    path = folder / CONFIG
    try:
        with path.open("rb") as file:
            tree = json.loads(file.read(MAX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from None
    if not isinstance(tree, dict):
        raise _unreadable(path, f"a {type(tree).__name__}, no object")
    config = _parsed(tree, f"text.folder={folder}")
    full = json.loads(config.to_json_string(use_diff=False))
    return _own(full)


def _own(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if not key.startswith("_") and key not in FOREIGN}


def build_encoder(architecture: dict[str, Any], where: str) -> Any:
    """The encoder that `architecture` describes, with random weights; `where` is for errors."""
    config = _parsed(architecture, where)
    kind, nested = _model_class(config, where), config.is_encoder_decoder  # which building may change
    try:
        with quiet_transformers():
            encoder = _encoder_of(kind._from_config(config, **_without_pooler(kind)), nested)
            table = encoder.get_input_embeddings()
    except Exception as error:  # whatever transformers makes of a stranger's numbers
        raise _unusable(where, f"transformers cannot build it: {error}") from None
    if not isinstance(table, nn.Embedding) or not isinstance(getattr(encoder.config, "hidden_size", None), int):
        raise _unusable(where, f"a {kind.__name__} takes no token ids")
    return encoder


def _pretrained(folder: Path, architecture: dict[str, Any]) -> Any:
    """The folder's encoder; E_MODEL_SHAPE names the first weight that is missing or of another shape."""
    config = _parsed(architecture, f"text.folder={folder}")
    kind, nested = _model_class(config, f"text.folder={folder}"), config.is_encoder_decoder
    settings = {"config": config, "dtype": torch.float32, "local_files_only": True, "use_safetensors": True}
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True, **_without_pooler(kind)}
    try:
        with quiet_transformers():
            whole, report = kind.from_pretrained(folder, **settings)
    except Exception as error:  # whatever transformers makes of a stranger's file
        raise _unfit(folder, str(error)) from None
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise _unfit(folder, f"{name} is {tuple(found)}, the config wants {tuple(wanted)}")
    for name in sorted(report["missing_keys"]):
        if not nested or name.startswith("encoder."):
            raise _unfit(folder, f"{name} is missing")
    return _encoder_of(whole, nested)


def _parsed(tree: dict[str, Any], where: str) -> Any:
    """The config object of transformers."""
    from transformers import CONFIG_MAPPING  # noqa: PLC0415  a second, which only this tower costs

    kind = str(tree.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise _unusable(where, f"model_type {kind!r} is none that this version of transformers has")
    try:
        with quiet_transformers():
            config = CONFIG_MAPPING[kind].from_dict(_own(tree))
    except Exception as error:  # whatever transformers makes of a stranger's values
        raise _unusable(where, f"transformers cannot read its config: {error}") from None
    config.dtype, config.use_cache = torch.float32, False
    return config


def _model_class(config: Any, where: str) -> Any:
    """The class without heads; encoders alone where transformers has such a class."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING  # noqa: PLC0415

    for mapping in (MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise _unusable(where, f"transformers has no model without head for {config.model_type}")


def _without_pooler(kind: Any) -> dict[str, bool]:
    has = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return {"add_pooling_layer": False} if has else {}


def _encoder_of(model: Any, nested: bool) -> Any:
    # The encoder of T5 and its like holds the embedding too, and holds it once.
    return model.get_encoder() if nested else model


def _places(encoder: Any) -> int | None:
    """How many positions the encoder's table has; RoBERTa's begins after its padding id."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(("position_embeddings", "wpe", "embed_positions")):
            taken = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - taken - getattr(module, "offset", 0)
    return None


def _source(config: HuggingFaceTextConfig) -> Path:
    if config.folder is None:
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            "no folder of a text encoder",
            where="text.folder",
            found="nothing",
            fix="set text.folder=DIR, a folder with config.json",
        )
    return Path(config.folder)


def _weights_sha256(folder: Path) -> str:
    """SHA-256 over the safetensors files that a folder's weights are in."""
    names = [WEIGHTS]
    try:
        if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        parts = [file_sha256(folder / name) for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        others = sorted(path.name for path in folder.glob("*.bin"))
        found = f"only {others[0]}, a pickle, which is never opened" if others else f"no {WEIGHTS}: {error}"
        raise _unreadable(folder, found) from None
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def _unreadable(path: Path, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_INPUT",
        "a text encoder's folder that cannot be read",
        where=path,
        found=found,
        fix="save the model anew with save_pretrained",
    )


def _unusable(where: str, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_CONFIG_VALUE", "a folder that is no text encoder", where=where, found=found, fix="choose another text.folder"
    )


def _unfit(folder: Path, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_MODEL_SHAPE",
        "weights that do not fit the text encoder",
        where=folder,
        found=found,
        fix="save the model anew with save_pretrained, or set text.pretrained=false",
    )


TEXT_TOWERS.add(
    HuggingFaceTextConfig,
    HuggingFaceText,
    {"huggingface": {}},
    source="any local folder of a transformers text encoder",
)
