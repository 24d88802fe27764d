"""Compares the nano towers on CIFAR-10 (50,000 training images), trained with configs/train/tower_comparison.yaml.

`python tests/bench/cifar_towers.py TABLE [TOWER …] -o DIR`: TABLE is CIFAR-10 as a parquet file with the columns image,
class_name and split. Each tower is trained, exported and evaluated with the public commands; run the same command again
to resume. Prints one JSON object per tower, then a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.measure import cpu_seconds_of
from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTowerConfig, parameter_count
from clipwright.pipeline.towers.count import multiply_adds
from clipwright.pipeline.train.config import RunConfig

TOWERS = sorted(name for name in IMAGE_TOWERS.entries if name.endswith("_nano"))
# Keeps clip_rn_nano, whose preset is larger, within the 0.82 to 0.95 M parameters of the others.
EXTRA_OVERRIDES = {"clip_rn_nano": ["image.planes=[24,48,96,84]", "image.out_dim=192"]}
HEADER = ("tower", "parameters", "GMACs", "images/CPU-s", "zero-shot top-1 (95 %)")
BATCH_SIZE = 64
SPEED_RUNS = 5


def clipwright(*arguments: object) -> Any:
    """Runs one of our commands and returns its result object; progress appears on stderr."""
    command = [sys.executable, "-m", "clipwright", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def train_and_evaluate(tower_name: str, table: Path, out: Path) -> dict[str, Any]:
    """Trains, exports and evaluates one tower, or resumes it, and returns its row."""
    run, model, report = (out / f"{tower_name}-{kind}" for kind in ("run", "model", "report"))
    overrides = [f"image.name={tower_name}", *EXTRA_OVERRIDES.get(tower_name, [])]
    trained = clipwright("train", "tower_comparison", *overrides, f"data.train={out / 'train'}", "-o", run)
    clipwright("export", run, "-o", model)
    scores = clipwright("eval", "cifar10", f"model={model}", f"data={table}", "-o", report)["zeroshot"]
    resolved = resolve(RunConfig, verb="train", config="tower_comparison", overrides=[*overrides, "data.train=x"])
    config = resolved.value.image
    with torch.device("meta"):
        tower = IMAGE_TOWERS.build(config)
    return {
        "name": tower_name,
        "parameters": parameter_count(tower),
        "gmacs": round(multiply_adds(tower) / 1e9, 4),
        "images_per_cpu_s": round(images_per_cpu_second(config), 1),
        "samples": trained["samples"],
        "top1": scores["top1"],
        "top1_low": scores["top1_low"],
        "top1_high": scores["top1_high"],
    }


def images_per_cpu_second(config: ImageTowerConfig) -> float:
    """Returns the median images per CPU second of forward and backward passes, in float32 on one thread."""
    torch.set_num_threads(1)
    tower = IMAGE_TOWERS.build(config)
    images = torch.randn(BATCH_SIZE, 3, config.image_size, config.image_size)
    images = images.contiguous(memory_format=torch.channels_last)

    def forward_backward() -> None:
        tower(images).pooled.sum().backward()
        tower.zero_grad(set_to_none=True)

    seconds = [cpu_seconds_of(forward_backward) for _ in range(SPEED_RUNS + 1)]
    return BATCH_SIZE / statistics.median(seconds[1:])  # the first batch warms up


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table, best tower first."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
    for row in sorted(rows, key=lambda row: -row["top1"]):
        top1 = f"{row['top1']:.1%} ({row['top1_low']:.1%} … {row['top1_high']:.1%})"
        cells = [f"`{row['name']}`", f"{row['parameters']:,}", f"{row['gmacs']:.3f}"]
        cells += [f"{row['images_per_cpu_s']:.0f}", top1]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("-o", dest="out", type=Path, required=True)
    parser.add_argument("towers", nargs="*", default=TOWERS, metavar="TOWER")
    options = parser.parse_args()
    settings = ["source.caption=a photo of a {class_name}", "source.where.split=train"]
    clipwright("prep", "table", f"source.path={options.table}", *settings, "-o", options.out / "train")
    rows = []
    for tower_name in options.towers:
        rows.append(train_and_evaluate(tower_name, options.table, options.out))
        print(json.dumps(rows[-1]), flush=True)
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
