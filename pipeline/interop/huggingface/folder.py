"""A model folder of transformers, read without trusting it: JSON and safetensors only, and none of its code is run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.interop.formats.base import incompatible
from clipwright.pipeline.interop.weights import check_tensors, weights_mismatch
from clipwright.pipeline.tokenizers.base import read_bounded

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
)
MAX_JSON_BYTES = 128 * 2**20
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
# Tables of 0, 1, 2, … that old versions saved and no version reads.
IGNORED_TENSORS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file. Raises E_INPUT."""
    data = read_bounded(path, MAX_JSON_BYTES, unreadable)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise unreadable(path, str(error)) from None
    if not isinstance(tree, dict):
        raise unreadable(path, f"the top level is a {type(tree).__name__}, not an object")
    return tree


def unreadable(path: Path, found: str) -> ClipwrightError:
    """Returns E_INPUT for a file of a model folder."""
    return ClipwrightError(
        "E_INPUT",
        "a file of the model folder cannot be read",
        where=path,
        found=found,
        fix="restore the file, or save the model and its processor again with save_pretrained",
    )


def refuse_auto_map(folder: Path) -> None:
    """Raises E_IMPORT if any JSON file of the folder contains `auto_map`, which names Python code to run."""
    for name in (PREPROCESSOR, PROCESSOR, "tokenizer_config.json", CONFIG):
        if (folder / name).is_file():
            _refuse_auto_map(folder / name, read_json(folder / name))


def _refuse_auto_map(path: Path, tree: Any, prefix: str = "") -> None:
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        if key == "auto_map":
            fix = "clipwright runs no code of a model folder: import a model of a class that transformers itself has"
            raise incompatible(f"{path}: {prefix}auto_map", "no code", value, fix)
        _refuse_auto_map(path, value, f"{prefix}{key}.")


def read_preprocessors(folder: Path) -> dict[Path, dict[str, Any]]:
    """Returns file → content of every file that states the preprocessing; transformers reads the first one.

    That is `image_processor` in processor_config.json, which newer versions write, and preprocessor_config.json.
    """
    preprocessors: dict[Path, dict[str, Any]] = {}
    if (folder / PROCESSOR).is_file():
        tree = read_json(folder / PROCESSOR).get("image_processor")
        if isinstance(tree, dict):
            preprocessors[folder / PROCESSOR] = tree
    if not preprocessors or (folder / PREPROCESSOR).is_file():
        preprocessors[folder / PREPROCESSOR] = read_json(folder / PREPROCESSOR)
    return preprocessors


def find_weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of the model. A pickle is never opened: E_IMPORT if there is nothing else."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
        if not names or not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
            got = f"files {names}" if names else "no files"
            raise incompatible(f"{folder / INDEX}: weight_map", "names of safetensors files in the folder", got)
        for name in names:
            if not (folder / name).is_file():
                raise unreadable(folder / name, f"{INDEX} names it, but it is missing")
        return [folder / name for name in names]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        fix = "convert it on a machine where you trust it: save_pretrained writes safetensors"
        raise incompatible(folder / pickles[0], WEIGHTS, "only a format whose reading may run code", fix)
    raise unreadable(folder / WEIGHTS, f"the folder has neither {WEIGHTS} nor {INDEX}")


def read_weights(folder: Path, files: list[Path], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Reads all weights as float32; names and shapes must be `shapes` and every number finite (E_MODEL_SHAPE)."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            loaded = load_file(path)
        except (SafetensorError, OSError) as error:
            raise unreadable(path, str(error)) from None
        repeated = loaded.keys() & tensors.keys()
        if repeated:
            raise weights_mismatch(folder, min(repeated), "one tensor", "the same name in two files")
        tensors.update(loaded)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in IGNORED_TENSORS}
    check_tensors(tensors, shapes, folder)
    return {name: tensor.float() for name, tensor in tensors.items()}
