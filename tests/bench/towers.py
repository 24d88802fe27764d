"""Measures the cost of a training pass of a tower: `python tests/bench/towers.py [CASE …] [--quick]`.

`fwd_bwd_NAME`: forward and backward, against the model of equal size in `transformers` where it has one.
`channels_last_NAME`: against images in the other memory layout. `text_trimmed`: captions trimmed to the batch's
longest, against 77 columns; captions come from ../shared/data beside the checkout, else their lengths are synthetic.
One thread, float32, CPU seconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import Tensor, nn

from clipwright.pipeline.measure import cpu_seconds_of
from clipwright.pipeline.tokenizers.base import TOKENIZERS, trim
from clipwright.pipeline.towers.base import IMAGE_TOWERS, TEXT_TOWERS

PAIRS = Path(__file__).resolve().parents[3] / "shared" / "data" / "pairs" / "flickr8k-val.parquet"
NANO = [name for name in IMAGE_TOWERS.entries if name.endswith("_nano")]
FULL_SIZE = [
    "vit_base_patch32",
    "deit_small_patch16",
    "swin_tiny_window7",
    "cvt_13",
    "coatnet_0",
    "vit_rel_s",
    "convnext_tiny",
    "convmixer_768_32_k7_p7",
    "mixer_b32",
    "clip_rn50",
]
# At its default size of 64 a stage's map is smaller than the window, which transformers does not support.
IMAGE_SIZES = {"swin_nano": 128}
CONVOLUTIONAL = ["clip_rn_nano", "coatnet_nano", "convmixer_nano", "convnext_nano", "cvt_nano", "clip_rn50"]
COLUMNS = 77
VOCABULARY = 49_408
EOT = VOCABULARY - 1


def training_pass(tower: nn.Module, batch: Tensor) -> None:
    out = tower(batch)
    pooled = out.pooled if hasattr(out, "pooled") else out.last_hidden_state
    pooled.sum().backward()
    tower.zero_grad(set_to_none=True)


def alternating_seconds(
    ours: Callable[[], Any], reference: Callable[[], Any] | None, runs: int
) -> list[tuple[float, float]]:
    """Returns (ours, reference) seconds of alternating runs, after one warm-up run of both."""
    pairs = [(cpu_seconds_of(ours), cpu_seconds_of(reference) if reference else 0.0) for _ in range(runs + 1)]
    return pairs[1:]


def result(
    case: str, batch: int, seconds: list[tuple[float, float]], reference_is: str, **extra: Any
) -> dict[str, Any]:
    has_reference = seconds[0][1] > 0
    ratio = statistics.median(reference / ours for ours, reference in seconds)
    return {
        "case": case,
        "metric": "per_cpu_second",
        "unit": "1/s",
        "ours": round(batch / statistics.median(ours for ours, _ in seconds), 2),
        "reference": round(batch / statistics.median(theirs for _, theirs in seconds), 2) if has_reference else None,
        "ratio": round(ratio, 3) if has_reference else None,
        "reference_is": reference_is if has_reference else None,
        "runs": len(seconds),
        "batch": batch,
        **extra,
    }


def preset(name: str) -> Any:
    config = IMAGE_TOWERS.preset(name)
    fields: dict[str, Any] = {"image_size": IMAGE_SIZES.get(name, config.image_size)}
    if hasattr(config, "drop_path"):
        fields["drop_path"] = 0.0
    return IMAGE_TOWERS.preset(name, **fields)


def reference_model(name: str) -> nn.Module | None:
    """Returns the model of equal size in transformers, without a head; None if it has none."""
    config: Any = preset(name)
    if name.startswith(("vit_rel", "clip")):
        return None
    if name.startswith(("vit", "deit")):
        sizes = {
            "image_size": config.image_size,
            "patch_size": config.patch,
            "hidden_size": config.dim,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.heads,
            "intermediate_size": 4 * config.dim,
        }
        if name.startswith("vit"):
            return hf.ViTModel(hf.ViTConfig(**sizes), add_pooling_layer=False)
        return hf.DeiTModel(hf.DeiTConfig(**sizes), add_pooling_layer=False)
    if name.startswith("swin"):
        swin = hf.SwinConfig(
            image_size=config.image_size,
            embed_dim=config.dim,
            depths=list(config.depths),
            num_heads=list(config.heads),
            window_size=config.window,
            drop_path_rate=0.0,
        )
        return hf.SwinModel(swin, add_pooling_layer=False)
    if name.startswith("cvt"):
        cvt = hf.CvtConfig(
            embed_dim=list(config.dims),
            depth=list(config.depths),
            num_heads=list(config.heads),
            drop_path_rate=[0.0, 0.0, 0.0],
        )
        return hf.CvtModel(cvt, add_pooling_layer=False)
    if name.startswith("convnext"):
        return hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=list(config.dims), depths=list(config.depths)))
    return None


def image_tower(name: str) -> nn.Module:
    torch.manual_seed(0)
    return IMAGE_TOWERS.build(preset(name)).train()


def random_images(name: str, batch: int) -> Tensor:
    size = preset(name).image_size
    return torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)


def batch_size(name: str, quick: bool) -> int:
    if name not in NANO:
        return 4
    return 8 if quick else 32


def forward_backward(name: str, quick: bool) -> list[dict[str, Any]]:
    batch = batch_size(name, quick)
    tower = image_tower(name)
    model = reference_model(name)
    images = random_images(name, batch)
    reference = None if model is None else functools.partial(training_pass, model.train(), images.contiguous())
    runs = 3 if quick or name in FULL_SIZE else 7
    seconds = alternating_seconds(lambda: training_pass(tower, images), reference, runs)
    reference_is = f"transformers {hf.__version__} {type(model).__name__} of equal size"
    return [result(f"fwd_bwd_{name}", batch, seconds, reference_is)]


def channels_last(name: str, quick: bool) -> list[dict[str, Any]]:
    batch = batch_size(name, quick)
    tower = image_tower(name)
    images = random_images(name, batch)
    channels_first = images.contiguous()
    seconds = alternating_seconds(
        lambda: training_pass(tower, images), lambda: training_pass(tower, channels_first), runs=3 if quick else 7
    )
    return [result(f"channels_last_{name}", batch, seconds, "the same tower on channels-first images")]


@functools.cache
def captions() -> np.ndarray:
    """Returns token ids (captions, 77), zeros after EOT."""
    if PAIRS.exists():
        import pyarrow.parquet as pq

        texts = [text for row in pq.read_table(PAIRS, columns=["captions"])["captions"].to_pylist() for text in row]
        return TOKENIZERS.build(TOKENIZERS.preset("clip_bpe")).encode(texts, COLUMNS)
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(2.6, 0.35, 4096).astype(int), 5, COLUMNS)
    ids = rng.integers(1, EOT - 1, (4096, COLUMNS))
    ids[np.arange(COLUMNS) >= lengths[:, None]] = 0
    ids[np.arange(4096), lengths - 1] = EOT
    return ids


def caption_batches(size: int, grouped: bool) -> list[np.ndarray]:
    """Returns three of sixteen batches of random captions; `grouped` sorts the captions of all sixteen by length."""
    rng = np.random.default_rng(1)
    all_ids = captions()
    selected = rng.choice(len(all_ids), size * 16)
    if grouped:
        selected = selected[np.argsort((all_ids[selected] == EOT).argmax(1), kind="stable")]
    return [all_ids[batch] for batch in selected.reshape(16, size)[2::5]]


def text_trimmed(quick: bool) -> list[dict[str, Any]]:
    fields = {"depth": 4} if quick else {"width": 512, "heads": 8, "depth": 3}  # a quarter of CLIP's depth
    torch.manual_seed(0)
    config = TEXT_TOWERS.preset("text_nano", context=COLUMNS, **fields)
    tower = TEXT_TOWERS.build(config, vocab_size=VOCABULARY, eot_id=EOT).train()
    reference_is = f"{COLUMNS} columns; width {config.width}, {config.depth} blocks, vocabulary {VOCABULARY:,}"
    cases = [(64, False), (64, True)] if quick else [(64, False), (256, False), (256, True)]
    results = []
    for size, grouped in cases:
        seconds, columns = [], []
        for number, ids in enumerate(caption_batches(size, grouped)):
            trimmed = trim(ids, EOT, "longest")
            ours = functools.partial(training_pass, tower, torch.from_numpy(trimmed).long())
            reference = functools.partial(training_pass, tower, torch.from_numpy(ids).long())
            if not results and not number:
                ours()  # warms up
            seconds.append((cpu_seconds_of(ours), cpu_seconds_of(reference)))
            columns.append(trimmed.shape[1])
        # Batches differ in length, so the total time is compared.
        total = [(statistics.mean(ours for ours, _ in seconds), statistics.mean(theirs for _, theirs in seconds))]
        row = result(
            "text_trimmed",
            size,
            total,
            reference_is,
            columns_ratio=round(COLUMNS / statistics.mean(columns), 3),
            grouped=grouped,
            captions_are="flickr8k" if PAIRS.exists() else "of synthetic lengths",
        )
        row["runs"] = len(seconds)
        results.append(row)
    return results


CASES: dict[str, Callable[[bool], list[dict[str, Any]]]] = {
    **{f"fwd_bwd_{name}": functools.partial(forward_backward, name) for name in [*NANO, *FULL_SIZE]},
    **{f"channels_last_{name}": functools.partial(channels_last, name) for name in CONVOLUTIONAL},
    "text_trimmed": text_trimmed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="small cases only, with fewer runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    default = [name for name in CASES if not (options.quick and name.endswith(tuple(FULL_SIZE)))]
    for case in options.case or default:
        for row in CASES[case](options.quick):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
