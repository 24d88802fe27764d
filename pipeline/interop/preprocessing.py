"""What transformers' image processors of CLIP and SigLIP do to a picture, in our terms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from clipwright.pipeline.interop.source import Source, refused

RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor")
PROCESSORS += ("SiglipImageProcessor", "SiglipImageProcessorFast")
# Of our fields, those that two files may state differently.
THEIR_KEYS = {"mean": "image_mean", "std": "image_std", "interpolation": "resample", "fit": "size"}
_NOTHING = "nothing"


class _Keys:
    """A processor's keys; an error names the one that is missing or not as wanted."""

    def __init__(self, file: Path, tree: dict[str, Any]) -> None:
        self.file, self.tree = file, tree

    def want(self, name: str, wanted: object, good: bool, got: object = None) -> None:
        if not good:
            shown = repr(self.tree[name]) if got is None and name in self.tree else got or _NOTHING
            raise refused(f"{self.file}: {name}", wanted, shown)

    def true(self, name: str) -> None:
        self.want(name, True, self.tree.get(name) is True)

    def three(self, name: str, *, above: float = -math.inf) -> tuple[float, float, float]:
        value: Any = self.tree.get(name)
        numbers = isinstance(value, list) and len(value) == 3 and all(isinstance(x, int | float) for x in value)
        self.want(name, "three numbers", numbers and all(above < x < math.inf for x in value))
        return (float(value[0]), float(value[1]), float(value[2]))

    def side(self, name: str, value: object, size: int) -> None:
        """A size given as a number, or as equal height and width, must be the image tower's."""
        if isinstance(value, dict):
            self.side(f"{name}.height", value.get("height"), size)
            self.side(f"{name}.width", value.get("width"), size)
            return
        wanted = f"{size}, as in vision_config.image_size"
        self.want(
            name, wanted, value == size and not isinstance(value, bool), _NOTHING if value is None else repr(value)
        )


def preprocessing_fields(source: Source, size: int) -> dict[str, Any]:
    """The section `preprocessing` of a model's config; E_IMPORT names the key that is missing or contradicts."""
    first, *others = source.preprocessors
    fields = _fields(_Keys(first, source.preprocessor), source, size)
    for file in others:
        keys = _Keys(file, source.preprocessors[file])
        again = _fields(keys, source, size)
        for name, key in THEIR_KEYS.items():
            stated = f"{first.name}'s {source.preprocessor[key]!r}"
            keys.want(key, stated, again[name] == fields[name])
    return fields


def _fields(keys: _Keys, source: Source, size: int) -> dict[str, Any]:
    tree = keys.tree
    name = tree.get("image_processor_type", tree.get("feature_extractor_type"))
    keys.want("image_processor_type", " or ".join(PROCESSORS), name in (None, *PROCESSORS), repr(name))
    keys.true("do_resize")
    keys.true("do_normalize")
    # Early CLIP folders say nothing of rescaling, which their processor always did.
    keys.want("do_rescale", True, tree.get("do_rescale", True) is True)
    factor = tree.get("rescale_factor", 1 / 255)
    is_255th = isinstance(factor, int | float) and math.isclose(factor, 1 / 255, rel_tol=1e-6)
    keys.want("rescale_factor", "1/255", is_255th)
    keys.want("do_pad", "false", not tree.get("do_pad"))
    resample = tree.get("resample")
    known = isinstance(resample, int) and resample in RESAMPLE
    keys.want("resample", " or ".join(f"{n} ({name})" for n, name in RESAMPLE.items()), known)
    return {
        "mean": keys.three("image_mean"),
        "std": keys.three("image_std", above=0.0),
        "interpolation": RESAMPLE[resample],  # pyright: ignore[reportArgumentType]
        "fit": _fit(keys, size, crops=source.kind == "clip"),
        "crop_rounding": "down",
    }


def _fit(keys: _Keys, size: int, *, crops: bool) -> str:
    """`crop` or `squash`; `crops`: whether the processor does where the folder says nothing of it."""
    given = keys.tree.get("size")
    keys.want("size", "shortest_edge, or height and width", isinstance(given, int | dict))
    crop = keys.tree.get("do_center_crop", crops)
    if crop:
        keys.want("do_center_crop", "true or false", crop is True)
        keys.want("crop_size", f"{size}", keys.tree.get("crop_size") is not None)
        keys.side("crop_size", keys.tree["crop_size"], size)
    if isinstance(given, dict) and "shortest_edge" not in given:
        keys.side("size", given, size)
        return "squash"
    place, edge = ("size.shortest_edge", given["shortest_edge"]) if isinstance(given, dict) else ("size", given)
    if isinstance(given, dict):
        keys.want("size", "shortest_edge alone", len(given) == 1)
    keys.side(place, edge, size)
    keys.want("do_center_crop", "true, since size states the shorter side only", bool(crop))
    return "crop"
