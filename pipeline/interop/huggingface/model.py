"""What the formats of transformers share: a two-tower model folder with its processor and tokenizer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import digest, file_sha256
from clipwright.pipeline.core.log import quiet_transformers
from clipwright.pipeline.interop.formats.base import (
    ForeignModel,
    Format,
    FormatConfig,
    Reference,
    ReferenceOutput,
    incompatible,
)
from clipwright.pipeline.interop.huggingface.folder import (
    CONFIG,
    PREPROCESSOR,
    PROCESSOR,
    TOKENIZER_FILES,
    find_weight_files,
    read_json,
    read_preprocessors,
    read_weights,
    refuse_auto_map,
)
from clipwright.pipeline.interop.huggingface.preprocessing import preprocessing_fields
from clipwright.pipeline.interop.huggingface.tokenizer import (
    TokenizerTree,
    check_class,
    check_length,
    check_settings,
    open_tokenizer,
)
from clipwright.pipeline.interop.huggingface.towers import CheckedConfig
from clipwright.pipeline.model.two_tower import ModelConfig
from clipwright.pipeline.tokenizers.base import Tokenizer

TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"


class TransformersFormat(Format):
    """A model class of transformers; a subclass states its names and what its towers add to the common fields."""

    model_type: ClassVar[str]
    """`model_type` in config.json."""
    model_class: ClassVar[str]
    config_class: ClassVar[str]
    image_processor_class: ClassVar[str]
    """The image processor without torchvision."""
    loss: ClassVar[str]
    crops_by_default: ClassVar[bool]
    """Whether the image processor crops if its file does not state it."""
    sentencepiece: ClassVar[bool]
    """Whether a `tokenizer.model` is a SentencePiece model."""

    def __init__(self, config: FormatConfig) -> None:
        self.name = config.name

    def mismatch(self, folder: Path) -> ClipwrightError | None:
        try:
            model_type = read_json(folder / CONFIG).get("model_type")
        except ClipwrightError as error:
            return error
        if model_type == self.model_type:
            return None
        where = f"{folder / CONFIG}: model_type"
        return incompatible(where, f"model_type {self.model_type!r}", repr(model_type))

    def open(self, folder: Path) -> TransformersModel:
        refuse_auto_map(folder)
        tree = read_json(folder / CONFIG)
        classes = tree.get("architectures") or [self.model_class]
        if classes != [self.model_class]:
            fix = "import the complete two-tower model"
            raise incompatible(f"{folder / CONFIG}: architectures", [self.model_class], classes, fix)
        for section in ("text_config", "vision_config"):
            if not isinstance(tree.get(section), dict):
                raise incompatible(f"{folder / CONFIG}: {section}", "an object", repr(tree.get(section, "nothing")))
        config = self._parse_config(folder, tree)
        return TransformersModel(self, folder, config, read_preprocessors(folder), find_weight_files(folder))

    def _parse_config(self, folder: Path, tree: dict[str, Any]) -> Any:
        """Parses config.json with transformers, which fills in the defaults of what it leaves out."""
        import transformers  # noqa: PLC0415  takes seconds that only an import needs

        try:
            with quiet_transformers():
                return getattr(transformers, self.config_class).from_dict(tree)
        except Exception as error:  # untrusted values may make transformers raise anything
            raise incompatible(folder / CONFIG, "a config that transformers can read", str(error)) from None

    @abstractmethod
    def embed_dim(self, config: CheckedConfig) -> int:
        """Returns the width of the shared space. Raises E_IMPORT."""

    @abstractmethod
    def image_fields(self, config: CheckedConfig) -> dict[str, Any]:
        """Returns the config of the image tower. Raises E_IMPORT."""

    @abstractmethod
    def text_fields(self, config: CheckedConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        """Returns the config of the text tower, including its pooling. Raises E_IMPORT."""

    @abstractmethod
    def convert_tokenizer(self, folder: Path, theirs: Any) -> tuple[TokenizerTree, Tokenizer]:
        """Returns config and tokenizer of ours with the ids of `theirs`. Raises E_IMPORT and E_INPUT."""


class TransformersModel(ForeignModel):
    """A folder that `save_pretrained` wrote: config, weights, image processor and tokenizer."""

    library = "transformers"

    def __init__(
        self,
        model_format: TransformersFormat,
        folder: Path,
        config: Any,
        preprocessors: dict[Path, dict[str, Any]],
        weight_files: list[Path],
    ) -> None:
        self.format, self.folder = model_format, folder
        self.kind, self.loss = model_format.model_class, model_format.loss
        self.config = CheckedConfig(folder, config)
        self.preprocessors, self.weight_files = preprocessors, weight_files

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        names = (CONFIG, PREPROCESSOR, PROCESSOR, *TOKENIZER_FILES)
        files = [self.folder / name for name in names if (self.folder / name).is_file()]
        return digest({path.name: file_sha256(path) for path in [*files, *self.weight_files]})

    @cached_property
    def their_tokenizer(self) -> Any:
        """The tokenizer as transformers opens it."""
        return open_tokenizer(self.folder, self.config.config, sentencepiece=self.format.sentencepiece)

    def model_config(self) -> tuple[dict[str, Any], Tokenizer]:
        image_fields = self.format.image_fields(self.config)
        embed_dim = self.format.embed_dim(self.config)
        size = self.config.square("vision_config.image_size")
        preprocessing = preprocessing_fields(self.preprocessors, size, crops_by_default=self.format.crops_by_default)
        # The tokenizer last: opening it takes the longest.
        check_class(self.folder)
        check_length(self.folder, self.their_tokenizer, self.config.get("text_config.max_position_embeddings"))
        check_settings(self.folder, self.their_tokenizer)
        tokenizer_tree, tokenizer = self.format.convert_tokenizer(self.folder, self.their_tokenizer)
        tree = {
            "image": image_fields,
            "text": self.format.text_fields(self.config, tokenizer),
            "tokenizer": tokenizer_tree,
            "embed_dim": embed_dim,
            "preprocessing": preprocessing,
        }
        return tree, tokenizer

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        import transformers  # noqa: PLC0415  see TransformersFormat

        try:
            with quiet_transformers(), torch.device("meta"):
                model = getattr(transformers, self.kind)(self.config.config)
        except Exception as error:  # untrusted values may make transformers raise anything
            where = self.config.where("text_config, vision_config")
            raise incompatible(where, "a model that transformers can build", error) from None
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def weights(self, config: ModelConfig, vocab_size: int) -> dict[str, Tensor]:
        tensors = read_weights(self.folder, self.weight_files, self.tensor_shapes())
        # The table may be padded to more rows than the tokenizer has ids; no id reaches the others.
        tensors[TOKEN_TABLE] = tensors[TOKEN_TABLE][:vocab_size].clone()
        return self.format.name_table(config).to_ours(tensors)

    def reference(self) -> Reference:
        return TransformersReference(self)


class TransformersReference:
    """The model in transformers: from safetensors alone, in float32, offline."""

    def __init__(self, foreign: TransformersModel) -> None:
        import transformers  # noqa: PLC0415  see TransformersFormat

        self.foreign = foreign
        preprocessor = next(iter(foreign.preprocessors.values()))
        self._image_processor = getattr(transformers, foreign.format.image_processor_class)(**preprocessor)
        with quiet_transformers():
            model = getattr(transformers, foreign.kind).from_pretrained(
                foreign.folder,
                config=foreign.config.config,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
            )
        self._model = model.eval()

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor:
        with quiet_transformers():
            return self._image_processor([Image.fromarray(image) for image in images], return_tensors="pt")[
                "pixel_values"
            ]

    def tokenize(self, texts: Sequence[str], context: int, pad_id: int) -> np.ndarray:
        tokenizer = self.foreign.their_tokenizer
        pad = pad_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        rows = np.full((len(texts), context), pad, dtype=np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = tokenizer(text, truncation=True, max_length=context, verbose=False)["input_ids"]
            row[: len(ids)] = ids
        name, largest = "text_config.vocab_size", int(rows.max())
        if largest >= self.foreign.config.get(name):
            expected = f"more than the tokenizer's largest id, {largest}"
            raise incompatible(self.foreign.config.where(name), expected, self.foreign.config.get(name))
        return rows

    def run(self, pixel_values: Tensor, token_ids: Tensor) -> ReferenceOutput:
        out = self._model(pixel_values=pixel_values, input_ids=token_ids)
        return ReferenceOutput(out.image_embeds, out.text_embeds, out.logits_per_image)
