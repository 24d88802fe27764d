"""What the CLIP and SigLIP image processors of transformers do, as our `preprocessing` section."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from clipwright.pipeline.interop.formats.base import incompatible

RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
PROCESSORS = (
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPFeatureExtractor",
    "SiglipImageProcessor",
    "SiglipImageProcessorFast",
)
# Our fields that two files may state differently, and their key there.
FOREIGN_KEYS = {"mean": "image_mean", "std": "image_std", "interpolation": "resample", "fit": "size"}
_NOTHING = "nothing"


class _ProcessorKeys:
    """The keys of a processor file. Each check raises E_IMPORT, naming the key, if it fails."""

    def __init__(self, file: Path, tree: dict[str, Any]) -> None:
        self.file, self.tree = file, tree

    def require(self, name: str, expected: object, ok: bool, got: str | None = None) -> None:
        """Raises unless `ok`; `got` is shown in place of the key's value."""
        if ok:
            return
        if got is None:
            got = repr(self.tree[name]) if name in self.tree else _NOTHING
        raise incompatible(f"{self.file}: {name}", expected, got)

    def require_true(self, name: str) -> None:
        self.require(name, True, self.tree.get(name) is True)

    def three_numbers(self, name: str, *, above: float = -math.inf) -> tuple[float, float, float]:
        value: Any = self.tree.get(name)
        numbers = isinstance(value, list) and len(value) == 3 and all(isinstance(x, int | float) for x in value)
        self.require(name, "three numbers", numbers and all(above < x < math.inf for x in value))
        return (float(value[0]), float(value[1]), float(value[2]))

    def require_side(self, name: str, value: object, size: int) -> None:
        """Requires that a size, given as a number or as height and width, is that of the image tower."""
        if isinstance(value, dict):
            self.require_side(f"{name}.height", value.get("height"), size)
            self.require_side(f"{name}.width", value.get("width"), size)
            return
        expected = f"{size}, as in vision_config.image_size"
        got = _NOTHING if value is None else repr(value)
        self.require(name, expected, value == size and not isinstance(value, bool), got)


def preprocessing_fields(
    preprocessors: dict[Path, dict[str, Any]], size: int, *, crops_by_default: bool
) -> dict[str, Any]:
    """Returns the section `preprocessing` of a model's config. Raises E_IMPORT for a missing or contradicting key.

    size: image size of the tower. crops_by_default: whether the processor crops if the file does not state it.
    """
    (first, first_tree), *others = preprocessors.items()
    fields = _fields(_ProcessorKeys(first, first_tree), size, crops_by_default)
    for file, tree in others:
        keys = _ProcessorKeys(file, tree)
        stated = _fields(keys, size, crops_by_default)
        for name, key in FOREIGN_KEYS.items():
            keys.require(key, f"{first.name}'s {first_tree[key]!r}", stated[name] == fields[name])
    return fields


def _fields(keys: _ProcessorKeys, size: int, crops_by_default: bool) -> dict[str, Any]:
    tree = keys.tree
    name = tree.get("image_processor_type", tree.get("feature_extractor_type"))
    keys.require("image_processor_type", " or ".join(PROCESSORS), name in (None, *PROCESSORS), repr(name))
    keys.require_true("do_resize")
    keys.require_true("do_normalize")
    # Early CLIP folders do not state do_rescale, but their processor always rescales.
    keys.require("do_rescale", True, tree.get("do_rescale", True) is True)
    factor = tree.get("rescale_factor", 1 / 255)
    is_255th = isinstance(factor, int | float) and math.isclose(factor, 1 / 255, rel_tol=1e-6)
    keys.require("rescale_factor", "1/255", is_255th)
    keys.require("do_pad", "false", not tree.get("do_pad"))
    resample: Any = tree.get("resample")
    known = isinstance(resample, int) and resample in RESAMPLE
    keys.require("resample", " or ".join(f"{number} ({name})" for number, name in RESAMPLE.items()), known)
    return {
        "mean": keys.three_numbers("image_mean"),
        "std": keys.three_numbers("image_std", above=0.0),
        "interpolation": RESAMPLE[resample],
        "fit": _fit(keys, size, crops_by_default),
        "crop_rounding": "down",
    }


def _fit(keys: _ProcessorKeys, size: int, crops_by_default: bool) -> str:
    """Returns `crop` or `squash`."""
    stated = keys.tree.get("size")
    keys.require("size", "shortest_edge, or height and width", isinstance(stated, int | dict))
    crops = keys.tree.get("do_center_crop", crops_by_default)
    if crops:
        keys.require("do_center_crop", "true or false", crops is True)
        keys.require("crop_size", f"{size}", keys.tree.get("crop_size") is not None)
        keys.require_side("crop_size", keys.tree["crop_size"], size)
    if isinstance(stated, dict) and "shortest_edge" not in stated:
        keys.require_side("size", stated, size)
        return "squash"
    if isinstance(stated, dict):
        keys.require("size", "shortest_edge alone", len(stated) == 1)
        keys.require_side("size.shortest_edge", stated["shortest_edge"], size)
    else:
        keys.require_side("size", stated, size)
    keys.require("do_center_crop", "true, since size states only the shorter side", bool(crops))
    return "crop"
