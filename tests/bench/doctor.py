"""Doctor's predictions against what the run then logs: `python tests/bench/doctor.py [CASE …] [--quick]`.

Doctor and short runs of the same config alternate, so that other load slows both. `photos` and `cifar10` need the
development data in ../shared/data beside the checkout.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
CASES: dict[str, tuple[list[str], list[str]]] = {
    # case → arguments of `prep`, and of `train`
    "scenes": (["scenes", "source.count=2000", "source.combinations=train"], ["scenes"]),
    "photos": (
        [
            "table",
            f"source.path={SHARED}/pairs/flickr8k-train-00000-of-00006.parquet",
            "source.caption=captions",
            "images.resize=shortest",
            "images.size=144",
        ],
        ["photos"],
    ),
    "cifar10": (
        [
            "table",
            f"source.path={SHARED}/classification/cifar10-subset.parquet",
            "source.caption=a photo of a {class_name}",
            "source.where.split=train",
        ],
        ["cifar10"],
    ),
}
WARMUP_STEPS = 4  # excluded from the figures


def clipwright(*arguments: str) -> tuple[str, float]:
    """Runs a command; returns its stdout and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "clipwright", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def logged(config: list[str], run: Path, steps: int) -> tuple[float, float, float]:
    """Returns samples per second, CPU seconds per sample (both after the warmup) and peak memory in GiB of a run."""
    arguments = ["train", *config, "runtime.log_every=1", "--quiet", "-o", str(run)]
    _, start = clipwright(*arguments, f"runtime.stop_at={WARMUP_STEPS}")
    _, whole = clipwright(*arguments, f"runtime.stop_at={WARMUP_STEPS + steps}", "--fresh")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    rate = statistics.median(line["samples_per_s"] for line in lines[WARMUP_STEPS:])
    return rate, (whole - start) / (lines[-1]["samples"] - lines[WARMUP_STEPS - 1]["samples"]), lines[-1]["memory_gb"]


def measure(case: str, runs: int, steps: int, folder: Path) -> list[dict[str, Any]]:
    prepare, config = CASES[case]
    data = folder / f"{case}-data"
    clipwright("prep", *prepare, "--quiet", "-o", str(data))
    config = [*config, f"data.train={data}"]
    pairs = []
    for turn in range(runs):
        predicted = json.loads(clipwright("doctor", *config, "--json", "--quiet")[0])
        names = ("samples_per_s", "cpu_s_per_sample", "memory_gb")
        pairs.append(([predicted[name] for name in names], logged(config, folder / f"{case}-{turn}", steps)))
    lines = []
    for number, (metric, unit) in enumerate(
        [("samples_per_s", "1/s"), ("cpu_s_per_sample", "s"), ("peak_memory", "GiB")]
    ):
        ours = [predicted[number] for predicted, _ in pairs]
        theirs = [found[number] for _, found in pairs]
        ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
        line = {"case": case, "metric": metric, "unit": unit, "ours": round(statistics.median(ours), 4)}
        line |= {"reference": round(statistics.median(theirs), 4), "ratio": round(ratio, 3)}
        line["reference_is"] = (
            f"the run itself, {steps} steps after the first {WARMUP_STEPS}; a ratio of 1 is an exact prediction"
        )
        lines.append({**line, "runs": runs})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; scenes if none")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    runs, steps = (1, 8) if options.quick else (3, 24)
    with tempfile.TemporaryDirectory() as folder:
        for case in options.case or ["scenes"]:
            for line in measure(case, runs, steps, Path(folder)):
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
