"""Training samples per CPU second of the loader: `python tests/bench/loader.py [CASE …] [--quick]`.

Cases photos, shards256 and web measure the complete loader (read, verify, decode, crop, resize, tokenize, collate) at
224 px on tars that `clipwright prep` wrote, against the usual implementation written out here or, with --peer, against
open_clip itself. They also compare the loader with its own decode and resize alone, and measure the time to the first
batch. Case order measures planning 10⁹ samples.
"""

from __future__ import annotations

import argparse
import glob
import io
import itertools
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

SIZE, BATCH, SCALE, EPOCHS = 224, 64, (0.9, 1.0), 2
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIDES = {
    "photos": [(500, 375), (375, 500), (500, 333), (333, 500), (500, 400), (500, 500), (640, 480), (480, 360)],
    "web": [(640, 480), (800, 600), (1024, 683), (1024, 768), (1200, 800), (1280, 960), (1600, 1067), (2000, 1333)],
}
# Case → image sizes, overrides of prep, number of images, and the number with --quick.
CASES: dict[str, tuple[str, list[str], int, int]] = {
    "photos": ("photos", ["images.resize=keep"], 640, 128),
    "shards256": ("photos", ["images.resize=shortest", "images.size=256"], 640, 128),
    "web": ("web", ["images.resize=keep"], 192, 128),
}
Clock = tuple[float, float]  # samples per CPU second, seconds to the first batch


def make_pair(number: int, sides: list[tuple[int, int]]) -> tuple[bytes, str]:
    """A JPEG that costs as much to decode as a photo (noise of all scales and a few shapes) and a typical caption."""
    rng = np.random.default_rng([number, len(sides), sides[0][0]])
    width, height = (side + int(rng.integers(-8, 9)) for side in sides[int(rng.integers(len(sides)))])
    pixels = np.full((height, width, 3), 128.0, np.float32) + rng.uniform(-60, 60, 3)
    for level in range(8):
        cells = min(4 << level, width)
        grid = rng.random((max(2, cells * height // width), cells, 1)) * 0.75 + rng.random((1, 1, 3)) * 0.25
        layer = Image.fromarray((grid * 255).clip(0, 255).astype(np.uint8))
        layer = layer.resize((width, height), Image.Resampling.BILINEAR)
        pixels += (np.asarray(layer, np.float32) - 128) * 1.3 * 0.62**level
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw, words = ImageDraw.Draw(image), []
    for _ in range(int(rng.integers(1, 5))):
        x, y, radius = (int(rng.integers(0, side)) for side in (width, height, min(width, height) // 4))
        color = tuple(int(value) for value in rng.integers(0, 256, 3))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        words.append(f"a circle of red {color[0]} and blue {color[2]}")
    noisy = np.asarray(image, np.float32) + rng.normal(0, rng.uniform(3, 8.5), (height, width, 1))
    out = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue(), f"a photo of {' and '.join(words)} in front of an old stone wall"


def prepare(case: str, count: int, folder: Path) -> Path:
    """Writes the images of a case as a dataset folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind, overrides, _, _ = CASES[case]
    images, captions = zip(*(make_pair(number, SIDES[kind]) for number in range(count)), strict=True)
    pq.write_table(pa.table({"image": images, "caption": captions}), folder / f"{case}.parquet")
    arguments = ["prep", "table", f"source.path={folder / case}.parquet", "shards.samples=128", *overrides]
    command = [sys.executable, "-m", "clipwright", *arguments, "--quiet", "-o", str(folder / case)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / case


def clocked(batches: Iterator[int]) -> Clock:
    """Consumes batch sizes and measures from the first to the last batch.

    The number of prefetched batches is the same at both ends.
    """
    started, first = time.perf_counter(), 0.0
    cpu_started, samples = 0.0, 0
    for size in batches:
        if first:
            samples += size
        else:
            first, cpu_started = time.perf_counter() - started, time.process_time()
    return samples / (time.process_time() - cpu_started), first


def ours(data: Path) -> Callable[[int], Clock]:
    from clipwright.pipeline.data.augment import AugmentConfig
    from clipwright.pipeline.data.batch import RankBatch
    from clipwright.pipeline.data.datasets import DataConfig
    from clipwright.pipeline.data.loader import Loader
    from clipwright.pipeline.tokenizers.base import TOKENIZERS
    from clipwright.pipeline.towers.base import TEXT_TOWERS

    def run(run_number: int) -> Clock:
        loader = Loader(
            DataConfig(train=str(data), augment=AugmentConfig(scale=SCALE, flip=0.0)),
            RankBatch(0, 1, BATCH),
            tokenizer=tokenizer,
            text=TEXT_TOWERS.preset("text_nano"),
            image_size=SIZE,
            seed=run_number,
            workers=2,
        )
        batches = loader.batches(0)
        count = EPOCHS * loader.data.samples // BATCH
        result = clocked(len(batch.views) for batch in itertools.islice(batches, count))
        batches.close()
        return result

    tokenizer = TOKENIZERS.build(TOKENIZERS.preset("clip_bpe"))
    return run


def kernel(data: Path) -> Callable[[int], Clock]:
    """Only decoding, cropping and resizing, of bytes in memory, on one thread."""
    from clipwright.pipeline.data.augment import AugmentConfig, View
    from clipwright.pipeline.data.order import SampleRng
    from clipwright.pipeline.folders.dataset import Dataset

    dataset, config = Dataset(data), AugmentConfig(scale=SCALE, flip=0.0)
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    files = [dataset.image(shard, row) for shard, size in enumerate(dataset.sizes) for row in range(size)]

    def run(run_number: int) -> Clock:
        def views() -> Iterator[int]:
            for number, file in enumerate(files):
                View(file, config, SampleRng(run_number, "", 0, str(number), "view")).write(out)
                yield 1

        return clocked(views())

    return run


def plain(data: Path) -> Callable[[int], Clock]:
    """The usual implementation, on one thread without worker processes: sequential tars, Pillow, floats."""
    from clipwright.pipeline.tokenizers.base import TOKENIZERS

    tokenizer = TOKENIZERS.build(TOKENIZERS.preset("clip_bpe"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def samples() -> Iterator[dict[str, bytes]]:
        for path in sorted(data.glob("*.tar")):
            with tarfile.open(path, "r|") as tar:
                members = ((member, tar.extractfile(member)) for member in tar)
                named = ((member.name.split(".", 1), file.read()) for member, file in members if file is not None)
                for _, group in itertools.groupby(named, lambda member: member[0][0]):
                    yield {name[1]: content for name, content in group}

    def shuffled(rng: random.Random, size: int = 100) -> Iterator[dict[str, bytes]]:
        buffer: list[dict[str, bytes]] = []
        for sample in samples():
            buffer.append(sample)
            if len(buffer) > size:
                yield buffer.pop(rng.randrange(len(buffer)))
        yield from buffer

    def transform(file: bytes, rng: random.Random) -> torch.Tensor:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        for _ in range(10):
            area = image.width * image.height * rng.uniform(*SCALE)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if width <= image.width and height <= image.height:
                break
        else:
            width = min(image.width, round(image.height * 4 / 3))
            height = min(image.height, round(image.width * 4 / 3))
        left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
        image = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return pixels.sub_(mean).div_(std)

    def run(run_number: int) -> Clock:
        rng = random.Random(run_number)

        def batches() -> Iterator[int]:
            stream = shuffled(rng)
            while len(group := list(itertools.islice(stream, BATCH))) == BATCH:
                pairs = [
                    (transform(sample["jpg"], rng), tokenizer.encode([sample["txt"].decode()], 77)[0])
                    for sample in group
                ]
                images, tokens = torch.stack([image for image, _ in pairs]), np.stack([ids for _, ids in pairs])
                yield min(len(images), len(tokens))

        return clocked(batches())

    return run


def peer(python: str, data: Path) -> Callable[[int], Clock]:
    """open_clip's own pipeline, in an interpreter that has it."""

    def run(run_number: int) -> Clock:
        command = [python, __file__, "--as-peer", str(data), str(run_number)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rate, first = json.loads(done.stdout.splitlines()[-1])
        return rate, first

    return run


def as_peer(data: Path, run_number: int) -> None:
    """Runs in the peer's interpreter: one worker process."""
    import open_clip  # pyright: ignore[reportMissingImports]
    from open_clip_train.data import get_wds_dataset  # pyright: ignore[reportMissingImports]
    from open_clip_train.params import parse_args  # pyright: ignore[reportMissingImports]

    def cpu_seconds() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    torch.set_num_threads(1)
    tars = sorted(glob.glob(str(data / "*.tar")))  # noqa: PTH207
    count = sum(json.loads((data / "manifest.json").read_text())["shards"][i]["samples"] for i in range(len(tars)))
    arguments = {
        "train-data": "::".join(tars),
        "train-num-samples": count,
        "batch-size": BATCH,
        "workers": 1,
        "model": "ViT-S-32",
        "dataset-type": "webdataset",
    }
    options = parse_args([argument for key, value in arguments.items() for argument in (f"--{key}", str(value))])
    options.distributed, options.rank, options.world_size = False, 0, 1
    preprocess = open_clip.image_transform(SIZE, is_train=True, mean=MEAN, std=STD)
    info = get_wds_dataset(options, preprocess, True, epoch=run_number, tokenizer=open_clip.get_tokenizer("ViT-S-32"))
    started, cpu_started, samples, first = time.perf_counter(), cpu_seconds(), 0, 0.0
    for batch in info.dataloader:
        first = first or time.perf_counter() - started
        samples += len(batch["image"] if isinstance(batch, dict) else batch[0])
    info.dataloader.pipeline[0]._iterator = None  # ends the worker, whose CPU time is included
    print(json.dumps([samples / (cpu_seconds() - cpu_started), first]))


def line(case: str, metric: str, unit: str, pairs: list[tuple[float, float]], reference_is: str) -> dict[str, Any]:
    """One result line from pairs (ours, reference); larger is better, except for seconds and megabytes."""
    smaller_is_better = unit in ("s", "MB")
    ratios = [reference / ours if smaller_is_better else ours / reference for ours, reference in pairs]

    def rounded(value: float) -> float:
        return float(f"{value:.4g}")

    return {
        "case": case,
        "metric": metric,
        "unit": unit,
        "ours": rounded(statistics.median(ours for ours, _ in pairs)),
        "reference": rounded(statistics.median(reference for _, reference in pairs)),
        "ratio": rounded(statistics.median(ratios)),
        "reference_is": reference_is,
        "runs": len(pairs),
    }


def measure(case: str, count: int, runs: int, python: str | None, folder: Path) -> list[dict[str, Any]]:
    data = prepare(case, count, folder)
    run_ours, run_kernel = ours(data), kernel(data)
    run_reference = peer(python, data) if python else plain(data)
    rates, kernel_rates, first_batches = [], [], []
    for run_number in range(runs + 1):
        our_rate, our_first = run_ours(run_number)
        reference_rate, reference_first = run_reference(run_number)
        kernel_rate, _ = run_kernel(run_number)
        if run_number:  # the first run of each fills caches
            rates.append((our_rate, reference_rate))
            kernel_rates.append((our_rate, kernel_rate))
            first_batches.append((our_first, reference_first))
    name = "open_clip's get_wds_dataset, one worker" if python else "Pillow, floats and sequential tars, on one thread"
    return [
        line(case, "samples_per_cpu_s", "1/s", rates, name),
        line(case, "loader_of_kernel", "1/s", kernel_rates, "its own decode and resize alone"),
        line(case, "first_batch_s", "s", first_batches, name),
    ]


def order(runs: int) -> list[dict[str, Any]]:
    """10⁹ samples in 100,000 shards, in a fresh process each; locating large positions against small ones."""
    code = (
        "import json, pathlib, time\nimport numpy as np\n"
        "from clipwright.pipeline.data.order import Order\n"
        "start = time.perf_counter()\n"
        "order = Order(np.full(100_000, 10_000), fingerprint='f', seed=0)\norder.locate(np.arange(4096))\n"
        "planned = time.perf_counter() - start\n"
        # Not getrusage, whose peak includes the parent's memory until the new program is loaded.
        "status = pathlib.Path('/proc/self/status').read_text()\n"
        "memory = int(status.split('VmHWM:')[1].split()[0]) / 1024\n"
        "def seconds(at):\n    order.locate(np.arange(at, at + 4096))\n    start = time.process_time()\n"
        "    for _ in range(20):\n        order.locate(np.arange(at, at + 4096))\n"
        "    return (time.process_time() - start) / 20\n"
        "print(json.dumps([planned, memory, seconds(10**9), seconds(0)]))"
    )
    results = []
    for _ in range(runs):
        done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(done.stdout))
    return [
        line("order", "plan_s", "s", [(seconds, 2.0) for seconds, _, _, _ in results], "the target"),
        line("order", "plan_mb", "MB", [(mb, 200.0) for _, mb, _, _ in results], "the target; the complete process"),
        line(
            "order", "locate_far_s", "s", [(far, near) for *_, far, near in results], "4,096 positions at 0, not at 10⁹"
        ),
    ]


def main() -> None:
    if sys.argv[1:2] == ["--as-peer"]:
        as_peer(Path(sys.argv[2]), int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="*", metavar="CASE", help=f"{', '.join([*CASES, 'order'])}; default: all")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter with open_clip")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = 1 if options.quick else 5
    with tempfile.TemporaryDirectory() as folder:
        for case in options.case or [*CASES, "order"]:
            if case == "order":
                lines = order(runs)
            else:
                count = CASES[case][3 if options.quick else 2]
                lines = measure(case, count, runs, options.peer, Path(folder))
            for result in lines:
                print(json.dumps(result, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
