"""How many training samples a processor-second prepares: `python tests/bench/loader.py [CASE …] [--quick]`.

Cases photos, shards256 and web: the whole loader (read, check, decode, crop, resize, tokenise, collate) at 224 px over
tars that `clipwright prep` wrote, against the incumbent's way or, with --peer, against open_clip itself; the loader
against its own decode and resize alone; the time to the first batch. Case order: planning 10⁹ samples.
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
TURNS = 4  # of the peer, so that starting its worker, whose time counts, is a small part of it
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIDES = {
    "photos": [(500, 375), (375, 500), (500, 333), (333, 500), (500, 400), (500, 500), (640, 480), (480, 360)],
    "web": [(640, 480), (800, 600), (1024, 683), (1024, 768), (1200, 800), (1280, 960), (1600, 1067), (2000, 1333)],
}
# Case → pictures, prep's overrides, how many pictures, and with --quick.
CASES: dict[str, tuple[str, list[str], int, int]] = {
    "photos": ("photos", ["images.resize=keep"], 640, 128),
    "shards256": ("photos", ["images.resize=shortest", "images.size=256"], 640, 128),
    "web": ("web", ["images.resize=keep"], 192, 128),
}
Clock = tuple[float, float]  # samples a processor-second, seconds to the first batch


def picture(number: int, sides: list[tuple[int, int]]) -> tuple[bytes, str]:
    """A JPEG that costs what a photo costs, noise of every scale under a few shapes, and a caption of usual length."""
    chance = np.random.default_rng([number, len(sides), sides[0][0]])
    width, height = (side + int(chance.integers(-8, 9)) for side in sides[int(chance.integers(len(sides)))])
    pixels = np.full((height, width, 3), 128.0, np.float32) + chance.uniform(-60, 60, 3)
    for level in range(8):
        cells = min(4 << level, width)
        grid = chance.random((max(2, cells * height // width), cells, 1)) * 0.75 + chance.random((1, 1, 3)) * 0.25
        layer = Image.fromarray((grid * 255).clip(0, 255).astype(np.uint8))
        layer = layer.resize((width, height), Image.Resampling.BILINEAR)
        pixels += (np.asarray(layer, np.float32) - 128) * 1.3 * 0.62**level
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw, words = ImageDraw.Draw(image), []
    for _ in range(int(chance.integers(1, 5))):
        x, y, radius = (int(chance.integers(0, side)) for side in (width, height, min(width, height) // 4))
        colour = tuple(int(value) for value in chance.integers(0, 256, 3))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        words.append(f"a circle of red {colour[0]} and blue {colour[2]}")
    noisy = np.asarray(image, np.float32) + chance.normal(0, chance.uniform(3, 8.5), (height, width, 1))
    out = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue(), f"a photo of {' and '.join(words)} in front of an old stone wall"


def prepare(case: str, count: int, folder: Path) -> Path:
    """The pictures of a case as a dataset folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind, overrides, _, _ = CASES[case]
    images, captions = zip(*(picture(number, SIDES[kind]) for number in range(count)), strict=True)
    pq.write_table(pa.table({"image": images, "caption": captions}), folder / f"{case}.parquet")
    words = ["prep", "table", f"source.path={folder / case}.parquet", "shards.samples=128", *overrides]
    command = [sys.executable, "-m", "clipwright", *words, "--quiet", "-o", str(folder / case)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / case


def clocked(batches: Iterator[int]) -> Clock:
    """Runs through batches, which yield their sizes, and clocks them from the first to the last.

    What is decoded ahead is equally much at both ends.
    """
    started, first = time.perf_counter(), 0.0
    processor, samples = 0.0, 0
    for size in batches:
        if first:
            samples += size
        else:
            first, processor = time.perf_counter() - started, time.process_time()
    return samples / (time.process_time() - processor), first


def ours(data: Path) -> Callable[[int], Clock]:
    from clipwright.pipeline.data.augment import AugmentConfig
    from clipwright.pipeline.data.batch import Share
    from clipwright.pipeline.data.datasets import DataConfig
    from clipwright.pipeline.data.loader import Loader
    from clipwright.pipeline.tokenizers.base import TOKENIZERS
    from clipwright.pipeline.towers.base import TEXT_TOWERS

    def run(turn: int) -> Clock:
        loader = Loader(
            DataConfig(train=str(data), augment=AugmentConfig(scale=SCALE, flip=0.0)),
            Share(0, 1, BATCH),
            tokenizer=tokenizer,
            text=TEXT_TOWERS.preset("text_nano"),
            image_size=SIZE,
            seed=turn,
            workers=2,
        )
        batches = loader.batches(0)
        count = EPOCHS * loader.dataset.samples // BATCH
        result = clocked(len(batch.views) for batch in itertools.islice(batches, count))
        batches.close()
        return result

    tokenizer = TOKENIZERS.build(TOKENIZERS.preset("clip_bpe"))
    return run


def kernel(data: Path) -> Callable[[int], Clock]:
    """Decode, crop and resize alone, of bytes in memory, on one thread."""
    from clipwright.pipeline.data.augment import AugmentConfig, View
    from clipwright.pipeline.data.order import Draw
    from clipwright.pipeline.folders.dataset import Dataset

    dataset, config = Dataset(data), AugmentConfig(scale=SCALE, flip=0.0)
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    files = [dataset.image(shard, row) for shard, size in enumerate(dataset.sizes) for row in range(size)]

    def run(turn: int) -> Clock:
        def views() -> Iterator[int]:
            for number, file in enumerate(files):
                View(file, config, Draw(turn, "", 0, str(number), "view")).write(out)
                yield 1

        return clocked(views())

    return run


def plain(data: Path) -> Callable[[int], Clock]:
    """The incumbent's way on one thread and without its worker processes: tars in a row, Pillow, floats."""
    from clipwright.pipeline.tokenizers.base import TOKENIZERS

    tokenizer = TOKENIZERS.build(TOKENIZERS.preset("clip_bpe"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def samples() -> Iterator[dict[str, bytes]]:
        for path in sorted(data.glob("*.tar")):
            with tarfile.open(path, "r|") as tar:
                members = ((member, tar.extractfile(member)) for member in tar)
                named = ((member.name.split(".", 1), file.read()) for member, file in members if file is not None)
                for _, group in itertools.groupby(named, lambda found: found[0][0]):
                    yield {name[1]: content for name, content in group}

    def shuffled(chance: random.Random, size: int = 100) -> Iterator[dict[str, bytes]]:
        held: list[dict[str, bytes]] = []
        for sample in samples():
            held.append(sample)
            if len(held) > size:
                yield held.pop(chance.randrange(len(held)))
        yield from held

    def transform(file: bytes, chance: random.Random) -> torch.Tensor:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        for _ in range(10):
            area = image.width * image.height * chance.uniform(*SCALE)
            ratio = math.exp(chance.uniform(math.log(3 / 4), math.log(4 / 3)))
            wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if wide <= image.width and high <= image.height:
                break
        else:
            wide, high = min(image.width, round(image.height * 4 / 3)), min(image.height, round(image.width * 4 / 3))
        left, top = chance.randint(0, image.width - wide), chance.randint(0, image.height - high)
        image = image.crop((left, top, left + wide, top + high)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return pixels.sub_(mean).div_(std)

    def run(turn: int) -> Clock:
        chance = random.Random(turn)

        def batches() -> Iterator[int]:
            stream = shuffled(chance)
            while len(group := list(itertools.islice(stream, BATCH))) == BATCH:
                pairs = [
                    (transform(sample["jpg"], chance), tokenizer.encode([sample["txt"].decode()], 77)[0])
                    for sample in group
                ]
                images, tokens = torch.stack([image for image, _ in pairs]), np.stack([ids for _, ids in pairs])
                yield min(len(images), len(tokens))

        return clocked(batches())

    return run


def peer(python: str, data: Path) -> Callable[[int], Clock]:
    """open_clip's own pipeline, in an interpreter that has it."""

    def run(turn: int) -> Clock:
        command = [python, __file__, "--as-peer", str(data), str(turn)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rate, first = json.loads(done.stdout.splitlines()[-1])
        return rate, first

    return run


def as_peer(data: Path, turn: int) -> None:
    """What the peer's interpreter runs: one worker process."""
    import open_clip  # pyright: ignore[reportMissingImports]
    from open_clip_train.data import get_wds_dataset  # pyright: ignore[reportMissingImports]
    from open_clip_train.params import parse_args  # pyright: ignore[reportMissingImports]

    def spent() -> float:
        uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(use.ru_utime + use.ru_stime for use in uses)

    torch.set_num_threads(1)
    tars = sorted(glob.glob(str(data / "*.tar")))  # noqa: PTH207
    count = sum(json.loads((data / "manifest.json").read_text())["shards"][i]["samples"] for i in range(len(tars)))
    words = {"train-data": "::".join(tars), "train-num-samples": count, "batch-size": BATCH, "workers": 1}
    words |= {"model": "ViT-S-32", "dataset-type": "webdataset"}
    options = parse_args([word for key, value in words.items() for word in (f"--{key}", str(value))])
    options.distributed, options.rank, options.world_size = False, 0, 1
    look = open_clip.image_transform(SIZE, is_train=True, mean=MEAN, std=STD)
    info = get_wds_dataset(options, look, True, epoch=turn, tokenizer=open_clip.get_tokenizer("ViT-S-32"))
    started, processor, samples, first = time.perf_counter(), spent(), 0, 0.0
    for batch in info.dataloader:
        first = first or time.perf_counter() - started
        samples += len(batch["image"] if isinstance(batch, dict) else batch[0])
    info.dataloader.pipeline[0]._iterator = None  # ends the worker, whose time counts
    print(json.dumps([samples / (spent() - processor), first]))


def line(case: str, metric: str, unit: str, pairs: list[tuple[float, float]], reference_is: str) -> dict[str, Any]:
    """One result; every pair is (ours, reference), both of the better-is-larger kind but for seconds."""
    ratios = [other / mine if unit in ("s", "MB") else mine / other for mine, other in pairs]
    made = {"case": case, "metric": metric, "unit": unit, "ours": statistics.median(mine for mine, _ in pairs)}
    made |= {"reference": statistics.median(other for _, other in pairs), "ratio": statistics.median(ratios)}
    return {
        **{key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in made.items()},
        "reference_is": reference_is,
        "runs": len(pairs),
    }


def measure(case: str, count: int, runs: int, python: str | None, folder: Path) -> list[dict[str, Any]]:
    data = prepare(case, count, folder)
    mine, alone = ours(data), kernel(data)
    other = peer(python, data) if python else plain(data)
    whole, share, first = [], [], []
    for turn in range(runs + 1):
        rate, begun = mine(turn)
        theirs, their_begun = other(turn)
        bare, _ = alone(turn)
        if turn:  # the first run of each fills caches
            whole.append((rate, theirs))
            share.append((rate, bare))
            first.append((begun, their_begun))
    name = "open_clip's get_wds_dataset, one worker" if python else "Pillow, floats and tars in a row, on one thread"
    return [
        line(case, "samples_per_cpu_s", "1/s", whole, name),
        line(case, "loader_of_kernel", "1/s", share, "its own decode and resize alone"),
        line(case, "first_batch_s", "s", first, name),
    ]


def order(runs: int) -> list[dict[str, Any]]:
    """10⁹ samples in 100,000 shards, by a fresh process each, and places far out against places at the start."""
    code = (
        "import json, pathlib, time\nimport numpy as np\n"
        "from clipwright.pipeline.data.order import Order\n"
        "start = time.perf_counter()\n"
        "order = Order(np.full(100_000, 10_000), fingerprint='f', seed=0)\norder.locate(np.arange(4096))\n"
        "planned = time.perf_counter() - start\n"
        # Not getrusage, whose peak is the parent's until the new program is loaded.
        "status = pathlib.Path('/proc/self/status').read_text()\n"
        "memory = int(status.split('VmHWM:')[1].split()[0]) / 1024\n"
        "def took(at):\n    order.locate(np.arange(at, at + 4096))\n    start = time.process_time()\n"
        "    for _ in range(20):\n        order.locate(np.arange(at, at + 4096))\n"
        "    return (time.process_time() - start) / 20\n"
        "print(json.dumps([planned, memory, took(10**9), took(0)]))"
    )
    found = []
    for _ in range(runs):
        done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout))
    return [
        line("order", "plan_s", "s", [(one[0], 2.0) for one in found], "the bound that was set"),
        line("order", "plan_mb", "MB", [(one[1], 200.0) for one in found], "the bound that was set; the whole process"),
        line("order", "locate_far_s", "s", [(one[2], one[3]) for one in found], "4,096 places at 0 instead of at 10⁹"),
    ]


def main() -> None:
    if sys.argv[1:2] == ["--as-peer"]:
        as_peer(Path(sys.argv[2]), int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="*", metavar="CASE", help=f"of {', '.join([*CASES, 'order'])}; all if none")
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
            for made in lines:
                print(json.dumps(made, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
