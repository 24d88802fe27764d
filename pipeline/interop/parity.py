"""The parity receipt of an import: the model folder and its source, run on the same images and texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipwright.pipeline import pixels
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.interop.formats.base import ForeignModel, Reference
from clipwright.pipeline.model.folder import Model

MAX_DIFFERENCE = 1e-4  # of an element of a unit embedding, and of a logit; float32
MAX_PIXEL_LEVELS = 1  # of 255
TEXTS = (
    "a photo of a dog",
    "Two CATS, running; in the snow!",
    "",
    "  white \t space\n",
    "it's 3.5% — “quoted” l'été",
    "&amp; &#233; &lt;b&gt;",
    "ﬁne ｆｕｌｌ　ｗｉｄｔｈ",
    "schÃ¶n naïve e\u0301",
    "\U0001f600 \U0001f468\u200d\U0001f467",
    "猫と犬 日本語",
    "한국어 문장",
    "\u1112\u1161\u11ab",
    "a </s> b <unk> c",
    "▁under ▁score",
    "<|endoftext|> after",
    "word " * 200,
    "x" * 300,
    "\u0000\ufeff\u200b control",
    "don't we'll THEY'RE i'd",
)


def compare(foreign: ForeignModel, model: Model, loss: dict[str, float]) -> dict[str, Any]:
    """Runs both models and returns the receipt. Raises E_PARITY if they differ.

    loss: the loss's `scale` and, for a sigmoid loss, `bias`.
    """
    reference = foreign.reference()
    views, pixel_values, levels = _compare_pixels(reference, model)
    ids, differing_text = _compare_tokens(reference, model)
    with torch.inference_mode():
        image, text = model.embed_images(views), model.embed_texts(list(TEXTS))
        expected = reference.run(pixel_values, ids)
    logits = loss["scale"] * image @ text.T + loss.get("bias", 0.0)
    differences = {
        "images": _difference(image, F.normalize(expected.image_embeddings, dim=-1)),
        "texts": _difference(text, F.normalize(expected.text_embeddings, dim=-1)),
        "logits": _difference(logits, expected.logits),
    }
    failures = [
        f"{name} differ by {value['max_abs']:.1e} (limit {value['limit']:.0e})"
        for name, value in differences.items()
        if not value["max_abs"] <= value["limit"]  # NaN fails too
    ]
    if levels > MAX_PIXEL_LEVELS:
        failures.append(f"pixels differ by {levels:g} of 255 (limit {MAX_PIXEL_LEVELS})")
    if differing_text is not None:
        failures.append(f"token ids differ for the text {differing_text!r}")
    if failures:
        raise ClipwrightError(
            "E_PARITY",
            "the imported model does not compute the same as its source",
            where=foreign.folder,
            found="; ".join(failures),
            fix="save the model and its processor again with save_pretrained; if they work there, report this as a bug",
        )
    return {
        "source": {"kind": foreign.kind, "fingerprint": foreign.fingerprint},
        "model": {"fingerprint": model.fingerprint},
        "inputs": {"images": len(views), "texts": len(TEXTS)},
        "pixels": {"max_levels": levels, "limit": MAX_PIXEL_LEVELS},
        **differences,
    }


def _compare_pixels(reference: Reference, model: Model) -> tuple[np.ndarray, Tensor, float]:
    """Returns our views of the test images, the reference's pixel values, and the largest difference in levels."""
    side = model.image_size
    # Square, tall and wide images, smaller and larger than the tower's, with odd and even margins around a crop.
    shapes = [(side, side), (side + 3, side), (side, side + 1), (2 * side + 7, side + 5), (side // 2 + 1, side)]
    images = [_test_image(number, height, width) for number, (height, width) in enumerate(shapes)]
    views = np.stack([model.view(pixels.encode(image, "png")) for image in images])
    values = reference.preprocess(images)
    preprocessing = model.config.preprocessing
    mean = torch.tensor(preprocessing.mean).view(3, 1, 1)
    std = torch.tensor(preprocessing.std).view(3, 1, 1)
    levels = (values * std + mean) * 255 - torch.from_numpy(views).permute(0, 3, 1, 2)
    return views, values, round(levels.abs().max().item(), 2)


def _test_image(seed: int, height: int, width: int) -> np.ndarray:
    """Smooth shapes with noise, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    smooth = pixels.resize(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8), width, height)
    return np.clip(smooth + rng.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)


def _compare_tokens(reference: Reference, model: Model) -> tuple[Tensor, str | None]:
    """Returns the reference's ids of TEXTS, and the first text whose ids differ where the text tower reads them."""
    context, fixed_length = model.config.text.context, model.config.text.pad == "fixed"
    ours = model.tokenizer.encode(list(TEXTS), context)
    theirs = reference.tokenize(TEXTS, context, model.tokenizer.pad_id)
    differing = None
    for text, our_ids, their_ids in zip(TEXTS, ours, theirs, strict=True):
        used = context if fixed_length else int((our_ids == model.tokenizer.eot_id).argmax()) + 1
        if differing is None and not np.array_equal(our_ids[:used], their_ids[:used]):
            differing = text
    return torch.from_numpy(theirs).long(), differing


def _difference(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    return {"max_abs": (ours - theirs).abs().max().item(), "limit": MAX_DIFFERENCE}
