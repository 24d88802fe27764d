"""A model folder of transformers, read without trusting it: JSON and safetensors only, and nothing in it is run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import digest, file_sha256
from clipwright.pipeline.core.log import quiet_transformers
from clipwright.pipeline.core.nearest import nearest
from clipwright.pipeline.tokenizers.base import read_bounded

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "spiece.model", "tokenizer.model"),
)
MAX_JSON = 128 * 2**20
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
KINDS = {"clip": "CLIPModel", "siglip": "SiglipModel"}
# Tables of 0, 1, 2, … that old versions saved; no version reads them.
UNREAD = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


@dataclass(frozen=True)
class Source:
    """A folder of kind `clip` or `siglip`: `config` as transformers' object.

    `preprocessors`: file → plain tree of what states the preprocessing, first the one that transformers reads.
    """

    folder: Path
    kind: str
    config: Any
    preprocessors: dict[Path, dict[str, Any]]
    weight_files: list[Path]

    def key(self, name: str) -> str:
        """How errors name a key of config.json."""
        return f"{self.folder / CONFIG}: {name}"

    @property
    def preprocessor(self) -> dict[str, Any]:
        return next(iter(self.preprocessors.values()))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names and hashes of all files that were read."""
        names = (CONFIG, PREPROCESSOR, PROCESSOR, *TOKENIZER_FILES)
        files = [*(path for name in names if (path := self.folder / name).is_file()), *self.weight_files]
        return digest({path.name: file_sha256(path) for path in files})


def refused(where: object, wanted: object, got: object, fix: str = "") -> ClipwrightError:
    """E_IMPORT: a key of the folder that is missing, contradicts another, or is beyond what can be taken over."""
    return ClipwrightError(
        "E_IMPORT",
        "a model that cannot be taken over",
        where=where,
        found=f"wanted {wanted}, got {got}",
        fix=fix or "mend the folder, or save the model and its processor anew with save_pretrained",
    )


def open_source(folder: Path) -> Source:
    """Reads and checks a folder's JSON; E_INPUT, E_IMPORT say what is wrong with it."""
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "there is no such folder"
        raise ClipwrightError("E_INPUT", "no model folder", where=folder, found=found, fix="check the path")
    tree = read_json(folder / CONFIG)
    for name in (PREPROCESSOR, PROCESSOR, "tokenizer_config.json"):
        if (folder / name).is_file():
            _refuse_code(folder / name, read_json(folder / name))
    _refuse_code(folder / CONFIG, tree)
    kind = tree.get("model_type")
    if kind not in KINDS:
        raise refused(f"{folder / CONFIG}: model_type", " or ".join(KINDS), repr(kind), "import a CLIP or SigLIP model")
    if (classes := tree.get("architectures") or [KINDS[kind]]) != [KINDS[kind]]:
        raise refused(f"{folder / CONFIG}: architectures", [KINDS[kind]], classes, "import the whole model")
    for section in ("text_config", "vision_config"):
        if not isinstance(tree.get(section), dict):
            raise refused(f"{folder / CONFIG}: {section}", "an object", repr(tree.get(section, "nothing")))
    return Source(folder, kind, _parsed(folder, kind, tree), _preprocessors(folder), _weight_files(folder))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; E_INPUT if there is none."""
    data = read_bounded(path, MAX_JSON, _unreadable)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from None
    if not isinstance(tree, dict):
        raise _unreadable(path, f"a {type(tree).__name__}, no object")
    return tree


def _unreadable(path: Path, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_INPUT",
        "a file of a model folder that cannot be read",
        where=path,
        found=found,
        fix="restore the file, or save the model and its processor anew with save_pretrained",
    )


def _refuse_code(path: Path, tree: Any, place: str = "") -> None:
    """E_IMPORT if `auto_map` stands anywhere in `tree`: it names Python code that whoever opens the model is to run."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if key == "auto_map":
            fix = "nothing in a model folder is ever run: import a model of transformers' own classes"
            raise refused(f"{path}: {place}auto_map", "no code", value, fix)
        _refuse_code(path, value, f"{place}{key}.")


def _preprocessors(folder: Path) -> dict[Path, dict[str, Any]]:
    """The part of processor_config.json that newer versions write, and preprocessor_config.json."""
    found: dict[Path, dict[str, Any]] = {}
    if (folder / PROCESSOR).is_file():
        tree = read_json(folder / PROCESSOR).get("image_processor")
        if isinstance(tree, dict):
            found[folder / PROCESSOR] = tree
    if not found or (folder / PREPROCESSOR).is_file():
        found[folder / PREPROCESSOR] = read_json(folder / PREPROCESSOR)
    return found


def _parsed(folder: Path, kind: str, tree: dict[str, Any]) -> Any:
    """The config as transformers understands it: what a folder leaves out has that format's default."""
    from transformers import CLIPConfig, SiglipConfig  # noqa: PLC0415  seconds, which only reading a folder costs

    try:
        with quiet_transformers():
            return {"clip": CLIPConfig, "siglip": SiglipConfig}[kind].from_dict(tree)
    except Exception as error:  # whatever transformers makes of a stranger's values
        raise refused(folder / CONFIG, "a config that transformers can read", str(error)) from None


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model; a pickle is never opened."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        places = read_json(folder / INDEX).get("weight_map")
        names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
        if not names or not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
            found = f"files {names}" if names else "no files"
            raise refused(f"{folder / INDEX}: weight_map", "names of safetensors files in the folder", found)
        for name in names:
            if not (folder / name).is_file():
                raise _unreadable(folder / name, f"{INDEX} names it, but it is missing")
        return [folder / name for name in names]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        fix = "convert it where you trust it: save_pretrained writes safetensors"
        raise refused(folder / pickles[0], WEIGHTS, "only a format whose reading may run code", fix)
    raise _unreadable(folder / WEIGHTS, f"the folder has neither {WEIGHTS} nor {INDEX}")


def read_tensors(source: Source, wanted: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The folder's weights as float32; names and shapes must be those `wanted` and every number finite."""
    tensors: dict[str, Tensor] = {}
    for path in source.weight_files:
        try:
            part = load_file(path)
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, str(error)) from None
        if twice := part.keys() & tensors.keys():
            raise _unfit(source, min(twice), "one tensor", "the same name in two files")
        tensors |= part
    tensors = {name: tensor for name, tensor in tensors.items() if name not in UNREAD}
    spare = tensors.keys() - wanted.keys()
    for name, shape in wanted.items():
        if name not in tensors:
            near = nearest(name, sorted(spare)) if spare else ""
            named = f"no such tensor, but {', '.join(sorted(spare)[:3])}; {near}" if spare else "no such tensor"
            raise _unfit(source, name, f"a tensor of shape {shape}", named)
        if tuple(tensors[name].shape) != shape:
            raise _unfit(source, name, f"shape {shape}", f"shape {tuple(tensors[name].shape)}")
    if spare:
        name = min(spare)
        raise _unfit(source, name, "no such tensor", f"shape {tuple(tensors[name].shape)}")
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise _unfit(source, name, "float32, float16 or bfloat16", str(tensor.dtype))
        if not bool(torch.isfinite(tensor).all()):
            raise _unfit(source, name, "finite numbers", f"{int((~torch.isfinite(tensor)).sum())} that are not finite")
    return {name: tensor.float() for name, tensor in tensors.items()}


def _unfit(source: Source, name: str, wanted: str, got: str) -> ClipwrightError:
    return ClipwrightError(
        "E_MODEL_SHAPE",
        "weights that do not fit the config",
        where=f"{source.folder}: {name}",
        found=f"wanted {wanted}, got {got}",
        fix="save the model anew with save_pretrained",
    )
