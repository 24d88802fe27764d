"""What a training pass of a tower costs: `python tests/bench/towers.py [CASE …] [--quick]`.

`fwd_bwd_NAME`: forward and backward against `transformers`' model of the same sizes, where it has one.
`channels_last_NAME`: against images in the other memory layout. `text_trimmed`: captions cut to the batch's longest,
against 77 columns; captions are those of ../shared/data beside the checkout, else of made-up lengths.
One thread, float32, processor seconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import Tensor, nn

from clipwright.pipeline.tokenizers.base import TOKENIZERS, trim
from clipwright.pipeline.towers.base import IMAGE_TOWERS, TEXT_TOWERS

PAIRS = Path(__file__).resolve().parents[3] / "shared" / "data" / "pairs" / "flickr8k-val.parquet"
NANO = [name for name in IMAGE_TOWERS.entries if name.endswith("_nano")]
BASE = ["vit_base_patch32", "deit_small_patch16", "swin_tiny_window7", "cvt_13", "coatnet_0", "vit_rel_s"]
BASE += ["convnext_tiny", "convmixer_768_32_k7_p7", "mixer_b32", "clip_rn50"]
SIZES = {"swin_nano": 128}  # at its own 64 a stage's map is smaller than the window, which transformers cannot run
CONVOLUTIONAL = ["clip_rn_nano", "coatnet_nano", "convmixer_nano", "convnext_nano", "cvt_nano", "clip_rn50"]
COLUMNS, VOCABULARY = 77, 49_408


def seconds(work: Callable[[], Any]) -> float:
    """Processor seconds of this process."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def training_pass(tower: nn.Module, given: Tensor) -> None:
    out = tower(given)
    pooled = out.pooled if hasattr(out, "pooled") else out.last_hidden_state
    pooled.sum().backward()
    tower.zero_grad(set_to_none=True)


def alternating(ours: Callable[[], Any], reference: Callable[[], Any] | None, runs: int) -> list[tuple[float, float]]:
    """Seconds of both, in turn; the first turn warms up."""
    both = [(seconds(ours), seconds(reference) if reference else 0.0) for _ in range(runs + 1)]
    return both[1:]


def line(case: str, count: int, times: list[tuple[float, float]], reference_is: str, **more: Any) -> dict[str, Any]:
    compared = times[0][1] > 0
    ratio = statistics.median(theirs / ours for ours, theirs in times)
    return {
        "case": case,
        "metric": "per_cpu_second",
        "unit": "1/s",
        "ours": round(count / statistics.median(ours for ours, _ in times), 2),
        "reference": round(count / statistics.median(theirs for _, theirs in times), 2) if compared else None,
        "ratio": round(ratio, 3) if compared else None,
        "reference_is": reference_is if compared else None,
        "runs": len(times),
        "batch": count,
        **more,
    }


def preset(name: str) -> Any:
    config = IMAGE_TOWERS.preset(name)
    fields = {"drop_path": 0.0} if hasattr(config, "drop_path") else {}
    return IMAGE_TOWERS.preset(name, **fields, image_size=SIZES.get(name, config.image_size))


def reference_model(name: str) -> nn.Module | None:
    """transformers' model of the same sizes, without the head."""
    c: Any = preset(name)
    if name.startswith(("vit_rel", "clip")):
        return None
    if name.startswith(("vit", "deit")):
        sizes = {"image_size": c.image_size, "patch_size": c.patch, "hidden_size": c.dim, "num_hidden_layers": c.depth}
        sizes |= {"num_attention_heads": c.heads, "intermediate_size": 4 * c.dim}
        if name.startswith("vit"):
            return hf.ViTModel(hf.ViTConfig(**sizes), add_pooling_layer=False)
        return hf.DeiTModel(hf.DeiTConfig(**sizes), add_pooling_layer=False)
    if name.startswith("swin"):
        sizes = {"image_size": c.image_size, "embed_dim": c.dim, "depths": list(c.depths), "num_heads": list(c.heads)}
        return hf.SwinModel(hf.SwinConfig(**sizes, window_size=c.window, drop_path_rate=0.0), add_pooling_layer=False)
    if name.startswith("cvt"):
        sizes = {"embed_dim": list(c.dims), "depth": list(c.depths), "num_heads": list(c.heads)}
        return hf.CvtModel(hf.CvtConfig(**sizes, drop_path_rate=[0.0, 0.0, 0.0]), add_pooling_layer=False)
    if name.startswith("convnext"):
        return hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=list(c.dims), depths=list(c.depths)))
    return None


def image_tower(name: str) -> nn.Module:
    torch.manual_seed(0)
    return IMAGE_TOWERS.build(preset(name)).train()


def images(name: str, batch: int) -> Tensor:
    size = preset(name).image_size
    return torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)


def forward_backward(name: str, quick: bool) -> list[dict[str, Any]]:
    batch = (8 if quick else 32) if name in NANO else 4
    tower, reference, x = image_tower(name), reference_model(name), images(name, batch)
    theirs = None if reference is None else functools.partial(training_pass, reference.train(), x.contiguous())
    times = alternating(lambda: training_pass(tower, x), theirs, 3 if quick or name in BASE else 7)
    kind = type(reference).__name__
    return [line(f"fwd_bwd_{name}", batch, times, f"transformers {hf.__version__} {kind} of the same sizes")]


def channels_last(name: str, quick: bool) -> list[dict[str, Any]]:
    batch = (8 if quick else 32) if name in NANO else 4
    tower, x = image_tower(name), images(name, batch)
    other = x.contiguous()
    work = (lambda: training_pass(tower, x), lambda: training_pass(tower, other))
    times = alternating(*work, runs=3 if quick else 7)
    return [line(f"channels_last_{name}", batch, times, "the same tower, images of one channel after the other")]


@functools.cache
def captions() -> np.ndarray:
    """Token ids (captions, 77), zeros behind EOT."""
    if PAIRS.exists():
        import pyarrow.parquet as pq

        texts = [text for row in pq.read_table(PAIRS, columns=["captions"])["captions"].to_pylist() for text in row]
        return TOKENIZERS.build(TOKENIZERS.preset("clip_bpe")).encode(texts, COLUMNS)
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(2.6, 0.35, 4096).astype(int), 5, COLUMNS)
    ids = rng.integers(1, VOCABULARY - 2, (4096, COLUMNS))
    ids[np.arange(COLUMNS) >= lengths[:, None]] = 0
    ids[np.arange(4096), lengths - 1] = VOCABULARY - 1
    return ids


def batches(size: int, grouped: bool) -> list[np.ndarray]:
    """Three of sixteen batches of random captions; grouped: each of neighbours in length among all sixteen's."""
    rng = np.random.default_rng(1)
    all_ids = captions()
    chosen = rng.choice(len(all_ids), size * 16)
    if grouped:
        chosen = chosen[np.argsort((all_ids[chosen] == VOCABULARY - 1).argmax(1), kind="stable")]
    return [all_ids[part] for part in chosen.reshape(16, size)[2::5]]


def text_trimmed(quick: bool) -> list[dict[str, Any]]:
    fields = {"depth": 4} if quick else {"width": 512, "heads": 8, "depth": 3}  # a quarter of CLIP's
    torch.manual_seed(0)
    config = TEXT_TOWERS.preset("text_nano", context=COLUMNS, **fields)
    tower = TEXT_TOWERS.build(config, vocab_size=VOCABULARY, eot_id=VOCABULARY - 1).train()
    what = f"{COLUMNS} columns; width {config.width}, {config.depth} blocks, vocabulary {VOCABULARY:,}"
    lines = []
    for size, grouped in ((64, False), (256, False), (256, True)):
        if quick and (size, grouped) == (256, False):
            continue
        times, columns = [], []
        for number, ids in enumerate(batches(64 if quick else size, grouped)):
            cut = trim(ids, VOCABULARY - 1, "longest")
            work = [functools.partial(training_pass, tower, torch.from_numpy(part).long()) for part in (cut, ids)]
            if not lines and not number:
                work[0]()  # warms up
            times.append((seconds(work[0]), seconds(work[1])))
            columns.append(cut.shape[1])
        # Batches differ in length: what counts is the time of all.
        total = [(statistics.mean(ours for ours, _ in times), statistics.mean(theirs for _, theirs in times))]
        more = {"columns_ratio": round(COLUMNS / statistics.mean(columns), 3), "grouped": grouped}
        more |= {"captions_are": "flickr8k" if PAIRS.exists() else "of made-up lengths"}
        lines.append({**line("text_trimmed", 64 if quick else size, total, what, **more), "runs": len(times)})
    return lines


CASES: dict[str, Callable[[bool], list[dict[str, Any]]]] = {
    **{f"fwd_bwd_{name}": functools.partial(forward_backward, name) for name in [*NANO, *BASE]},
    **{f"channels_last_{name}": functools.partial(channels_last, name) for name in CONVOLUTIONAL},
    "text_trimmed": text_trimmed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all if none")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    small = [name for name in CASES if not name.endswith(tuple(BASE))]
    for case in options.case or (small if options.quick else CASES):
        for result in CASES[case](options.quick):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
