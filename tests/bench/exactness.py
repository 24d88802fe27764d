"""How exact other layouts are: `python tests/bench/exactness.py [CASE …] [--quick]`, by complete training runs.

ranks: 20 steps on two ranks, with each ZeRO stage and SGD or AdamW, against the same run on one rank.
resume: 20 steps on 2, 1, 3 and 2 ranks in turn under ZeRO 1, 2, 3 and 0, five steps each, against one rank.
Each line has the largest difference to the run of one process: of losses and gradient norms (relative) or of
parameters (absolute). `ratio` is not given, since the reference is exact.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

SGD = ["optim.name=sgd", "optim.lr=0.05"]
ADAMW = ["optim.name=adamw"]
SMALL = [
    "image.name=vit_nano",
    "image.image_size=32",
    "image.depth=2",
    "text.depth=2",
    "embed_dim=64",
    "optim.weight_decay=0",
    "schedule.name=constant",
    "schedule.global_batch=12",
    "schedule.samples=240",
    "schedule.warmup=0",
    "precision=fp32",
    "runtime.threads=1",
    "runtime.workers=1",
    "runtime.log_every=1",
]
LAYOUTS = [(2, 1), (1, 2), (3, 3), (2, 0)]  # (ranks, ZeRO stage) of five steps each


def clipwright(*arguments: str, ranks: int = 1) -> None:
    """Runs a command; one that starts several ranks is launched by torchrun."""
    launcher = ["launch", "torchrun", f"processes={ranks}"] if ranks > 1 else []
    command = [sys.executable, "-m", "clipwright", *launcher, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 85), done.stderr


def train(run: Path, data: Path, *overrides: str, ranks: int = 1) -> Path:
    clipwright("train", *SMALL, f"data.train={data}", *overrides, "-o", str(run), ranks=ranks)
    return run


def differences(run: Path, reference: Path) -> dict[str, float]:
    """Returns the largest relative difference of losses and norms, and the largest absolute one of parameters."""
    ours, theirs = (
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (run, reference)
    )
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    found = {
        name: max(abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(ours, theirs, strict=True))
        for name in ("loss", "grad_norm")
    }
    last = "checkpoints/step-00000020/model.safetensors"
    weights, expected = load_file(run / last), load_file(reference / last)
    assert weights.keys() == expected.keys()
    found["parameters"] = max(float((weights[name] - expected[name]).abs().max()) for name in expected)
    return found


def report(case: str, found: dict[str, float]) -> None:
    for metric, value in found.items():
        line: dict[str, Any] = {
            "case": case,
            "metric": metric,
            "unit": "absolute" if metric == "parameters" else "relative",
            "ours": float(f"{value:.1e}"),
            "reference": 0.0,
            "ratio": None,
            "reference_is": "the same run in one process, ZeRO 0",
            "runs": 1,
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", default=["ranks", "resume"])
    parser.add_argument("--quick", action="store_true", help="ranks: ZeRO 3 with SGD only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data"
        clipwright("prep", "scenes", "source.count=96", "source.image_size=32", "-o", str(data))
        references: dict[str, Path] = {}
        for label, optimizer in (("sgd", SGD), ("adamw", ADAMW)):
            if label == "adamw" and options.quick:
                continue
            references[label] = train(folder / f"{label}-1", data, *optimizer)
            if "ranks" in options.cases:
                for stage in (3,) if options.quick else (0, 1, 2, 3):
                    run = train(folder / f"{label}-2-{stage}", data, *optimizer, f"runtime.zero={stage}", ranks=2)
                    report(f"2 ranks, ZeRO {stage}, {label}", differences(run, references[label]))
        if "resume" in options.cases and not options.quick:
            for part, (ranks, stage) in enumerate(LAYOUTS, 1):
                layout = [f"runtime.zero={stage}", f"runtime.stop_at={5 * part}"]
                train(folder / "resumed", data, *ADAMW, *layout, ranks=ranks)
            report("resume on 2, 1, 3, 2 ranks, adamw", differences(folder / "resumed", references["adamw"]))


if __name__ == "__main__":
    main()
