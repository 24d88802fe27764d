"""The receipt of an import: the model folder and its source, run on the same pictures and texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipwright.pipeline import pixels
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.log import quiet_transformers
from clipwright.pipeline.interop.source import KINDS, Source, refused
from clipwright.pipeline.model.folder import Model

LIMIT = 1e-4  # of a number of a unit vector, and of a logit; float32
TEXTS = (
    *("a photo of a dog", "Two CATS, running; in the snow!", "", "  white \t space\n", "it's 3.5% — “quoted” l'été"),
    *(
        "&amp; &#233; &lt;b&gt;",
        "ﬁne ｆｕｌｌ　ｗｉｄｔｈ",
        "schÃ¶n naïve e\u0301",
        "\U0001f600 \U0001f468\u200d\U0001f467",
    ),
    *("猫と犬 日本語", "한국어 문장", "\u1112\u1161\u11ab", "a </s> b <unk> c", "▁under ▁score"),
    *("<|endoftext|> after", "word " * 200, "x" * 300, "\u0000\ufeff\u200b control", "don't we'll THEY'RE i'd"),
)


def compare(source: Source, theirs: Any, model: Model, logit: dict[str, float]) -> dict[str, Any]:
    """Runs both sides and returns the receipt; E_PARITY if they differ. `logit`: the loss's `scale` and `bias`."""
    reference = _reference(source)
    views, values, levels = _pictures(source, model)
    ids, wrong = _texts(theirs, model)
    rows, largest = source.config.text_config.vocab_size, int(ids.max())
    if largest >= rows:
        raise refused(source.key("text_config.vocab_size"), f"more than the tokenizer's largest id, {largest}", rows)
    scale, bias = logit["scale"], logit.get("bias", 0.0)
    with torch.inference_mode():
        image, text = model.embed_images(views), model.embed_texts(list(TEXTS))
        out = reference(pixel_values=values, input_ids=ids)
    apart = {
        "images": _apart(image, F.normalize(out.image_embeds, dim=-1)),
        "texts": _apart(text, F.normalize(out.text_embeds, dim=-1)),
        "logits": _apart(scale * image @ text.T + bias, out.logits_per_image),
    }
    receipt = {
        "source": {"kind": KINDS[source.kind], "fingerprint": source.fingerprint},
        "model": {"fingerprint": model.fingerprint},
        "inputs": {"images": len(views), "texts": len(TEXTS)},
        "pixels": {"max_levels": levels, "limit": 1},
        **apart,
    }
    bad = [
        f"{name} {part['max_abs']:.1e} apart, {part['limit']:.0e} allowed"
        for name, part in apart.items()
        if not part["max_abs"] <= part["limit"]  # not a number fails too
    ]
    bad += [f"pixels {levels} grey levels apart, 1 allowed"] if levels > 1 else []
    bad += [f"other ids for the text {wrong!r}"] if wrong is not None else []
    if bad:
        raise ClipwrightError(
            "E_PARITY",
            "an imported model that does not compute what its source does",
            where=source.folder,
            found="; ".join(bad),
            fix="save the model and its processor anew with save_pretrained; if they work there, report it",
        )
    return receipt


def _reference(source: Source) -> Any:
    """The source model in transformers: from safetensors alone, in float32, offline."""
    import transformers  # noqa: PLC0415  see source.py

    with quiet_transformers():
        made = getattr(transformers, KINDS[source.kind]).from_pretrained(
            source.folder, config=source.config, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    return made.eval()


def _pictures(source: Source, model: Model) -> tuple[np.ndarray, Tensor, float]:
    """Our views of some pictures, their processor's values, and how many grey levels these lie apart at most."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil  # noqa: PLC0415

    made = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}[source.kind](**source.preprocessor)
    side = model.image_size
    # Squares, tall and wide ones, smaller and larger than the tower's, with odd and even surpluses beside a crop.
    shapes = [(side, side), (side + 3, side), (side, side + 1), (2 * side + 7, side + 5), (side // 2 + 1, side)]
    pictures = [_picture(number, height, width) for number, (height, width) in enumerate(shapes)]
    views = np.stack([model.view(pixels.encode(picture, "png")) for picture in pictures])
    with quiet_transformers():
        values = made([Image.fromarray(picture) for picture in pictures], return_tensors="pt")["pixel_values"]
    form = model.config.preprocessing
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (form.mean, form.std))
    levels = (values * std + mean) * 255 - torch.from_numpy(views).permute(0, 3, 1, 2)
    return views, values, round(levels.abs().max().item(), 2)


def _picture(seed: int, height: int, width: int) -> np.ndarray:
    """Soft shapes with noise over them, uint8 (height, width, 3)."""
    random = np.random.default_rng(seed)
    soft = pixels.resize(random.integers(0, 256, (4, 5, 3), dtype=np.uint8), width, height)
    return np.clip(soft + random.normal(0, 20, soft.shape), 0, 255).astype(np.uint8)


def _texts(theirs: Any, model: Model) -> tuple[Tensor, str | None]:
    """Their ids of the texts, and the first text of which ours differ where the model looks."""
    context, fixed = model.config.text.context, model.config.text.pad == "fixed"
    ours = model.tokenizer.encode(list(TEXTS), context)
    pad = model.tokenizer.pad_id if theirs.pad_token_id is None else theirs.pad_token_id
    rows = np.full_like(ours, pad)
    for row, text in zip(rows, TEXTS, strict=True):
        ids = theirs(text, truncation=True, max_length=context, verbose=False)["input_ids"]
        row[: len(ids)] = ids
    wrong = None
    for text, own, other in zip(TEXTS, ours, rows, strict=True):
        seen = context if fixed else int((own == model.tokenizer.eot_id).argmax()) + 1
        if wrong is None and not np.array_equal(own[:seen], other[:seen]):
            wrong = text
    return torch.from_numpy(rows).long(), wrong


def _apart(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    return {"max_abs": (ours - theirs).abs().max().item(), "limit": LIMIT}
