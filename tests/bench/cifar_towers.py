"""Which tower learns most from 50,000 samples: the README's table, from one picture table with class names.

`python tests/bench/cifar_towers.py TABLE [NAME …] -o DIR`: TABLE is CIFAR-10 as a parquet file with the columns image,
class_name and split. Every configs/train/towers/NAME.yaml is trained, exported and scored by the commands a user would
type; the same command goes on where it was stopped. Prints one JSON object a tower, then the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.towers.base import IMAGE_TOWERS, ImageTowerConfig, parameter_count
from clipwright.pipeline.towers.count import multiply_adds
from clipwright.pipeline.train.config import RunConfig

CONFIGS = Path(__file__).parents[2] / "configs/train/towers"
HEAD = ("config", "image tower, parameters", "GMACs", "images/CPU-s", "zero-shot top-1 (95 %)")
BATCH, RUNS = 64, 5


def clipwright(*words: object) -> Any:
    """The result object of one of our commands, whose progress shows on stderr."""
    command = [sys.executable, "-m", "clipwright", *map(str, words), "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def row(name: str, table: Path, out: Path) -> dict[str, Any]:
    """Trains, exports and scores one tower, or goes on with it."""
    run, model, report = (out / f"{name}-{what}" for what in ("run", "model", "report"))
    trained = clipwright("train", name, f"data.train={out / 'train'}", "-o", run)
    clipwright("export", run, "-o", model)
    scored = clipwright("eval", "cifar10", f"model={model}", f"data={table}", "-o", report)
    config = resolve(RunConfig, verb="train", config=name, overrides=["data.train=x"]).value.image
    with torch.device("meta"):
        tower = IMAGE_TOWERS.build(config)
    return {
        "name": name,
        "parameters": parameter_count(tower),
        "gmacs": round(multiply_adds(tower) / 1e9, 4),
        "images_per_cpu_s": round(speed(config), 1),
        "samples": trained["samples"],
        **{key: scored["zeroshot"][key] for key in ("top1", "top1_low", "top1_high")},
    }


def speed(config: ImageTowerConfig) -> float:
    """Images a processor second, forward and backward, float32, one thread: the median of some batches."""
    torch.set_num_threads(1)
    tower, images = IMAGE_TOWERS.build(config), torch.randn(BATCH, 3, config.image_size, config.image_size)
    seconds: list[float] = []
    for _ in range(RUNS + 1):
        started = time.process_time()
        tower(images.contiguous(memory_format=torch.channels_last)).pooled.sum().backward()
        tower.zero_grad(set_to_none=True)
        seconds.append(time.process_time() - started)
    return BATCH / statistics.median(seconds[1:])  # the first warms up


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, the best first."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" + "|---:" * (len(HEAD) - 1) + "|"]
    for r in sorted(rows, key=lambda r: -r["top1"]):
        top1 = f"{r['top1']:.1%} ({r['top1_low']:.1%} … {r['top1_high']:.1%})"
        lines.append(
            f"| `{r['name']}` | {r['parameters']:,} | {r['gmacs']:.3f} | {r['images_per_cpu_s']:.0f} | {top1} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("-o", dest="out", type=Path, required=True)
    parser.add_argument("names", nargs="*", default=[path.stem for path in sorted(CONFIGS.glob("*.yaml"))])
    options = parser.parse_args()
    where = ["source.caption=a photo of a {class_name}", "source.where.split=train"]
    clipwright("prep", "table", f"source.path={options.table}", *where, "-o", options.out / "train")
    rows = []
    for name in options.names:
        rows.append(row(name, options.table, options.out))
        print(json.dumps(rows[-1]), flush=True)
    print(table_of(rows))


if __name__ == "__main__":
    main()
