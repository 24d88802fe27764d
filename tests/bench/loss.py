"""Cost of a loss, forward and backward on one core: `python tests/bench/loss.py [CASE …] [--quick]`.

Each measurement runs in its own process: the CPU seconds of one call, and its peak memory beyond what was allocated
before, including gradients, without features. `share_of_limit` compares with the matmuls that the gradient needs, at
the rate of a 2,048 × 2,048 product in the same process. `predicted_…` compares doctor's prediction for a config with
the measurement: a ratio of 1 is best.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipwright.pipeline.losses.base import LOSSES, Features, Matryoshka

DIM = 512
MATMULS = {"softmax": 4, "sigmoid": 3}
# case → loss, batch, batch if quick, pairs of runs; 0 pairs: no reference, because its matrix does not fit
CASES: dict[str, tuple[str, int, int, int]] = {
    "softmax_8192": ("softmax", 8192, 1024, 5),
    "sigmoid_8192": ("sigmoid", 8192, 1024, 5),
    "softmax_32768": ("softmax", 32768, 2048, 1),
    "softmax_65536": ("softmax", 65536, 4096, 0),
    "sigmoid_65536": ("sigmoid", 65536, 4096, 0),
}
# case → config of the loss, variant in `call`, batch, batch if quick, runs
PREDICTED: dict[str, tuple[list[str], str, int, int, int]] = {
    "predicted_plain": ([], "ours", 8192, 2048, 3),
    "predicted_rich": (["data.negatives=wrong", f"loss.matryoshka.dims=[{DIM // 2},{DIM}]"], "rich", 8192, 2048, 3),
}
PLAIN = {
    "softmax": "open_clip's ClipLoss: the matrix and its transpose, cross-entropy of each",
    "sigmoid": "open_clip's SigLipLoss: the whole matrix, its labels, log-sigmoid",
}


def plain(name: str, image: Tensor, text: Tensor, t: Tensor, b: Tensor) -> Tensor:
    if name == "softmax":
        right = torch.arange(len(image))
        rows, columns = t.exp() * image @ text.T, t.exp() * text @ image.T
        return (F.cross_entropy(rows, right) + F.cross_entropy(columns, right)) / 2
    labels = 2 * torch.eye(len(image)) - torch.ones(len(image), len(image))
    return -F.logsigmoid(labels * (t.exp() * image @ text.T + b)).sum() / len(image)


def call(form: str, name: str, batch: int) -> tuple[float, float]:
    """Returns CPU seconds and memory in MB of one forward and backward pass on random features."""
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(batch, DIM, generator=generator), dim=1).requires_grad_() for _ in range(2))
    nested = Matryoshka(dims=(DIM // 2, DIM) if form == "rich" else ())
    loss = LOSSES.build(LOSSES.preset(name, matryoshka=nested), embed_dim=DIM)
    t, b = loss.logit_scale, torch.full((1,), -10.0, requires_grad=True)
    ids = torch.arange(batch)
    features = Features(image, text, ids, ids[:, None])
    if form == "rich":
        features.negative = F.normalize(torch.randn(batch, DIM, generator=generator), dim=1).requires_grad_()
        features.negative_id, features.negative_present = batch + ids, ids >= 0
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    base, before = resident("VmRSS"), time.process_time()
    value = plain(name, image, text, t, b) if form == "plain" else loss(features)
    value.backward()
    return time.process_time() - before, resident("VmHWM") - base


def resident(field: str) -> float:
    """Returns VmRSS or VmHWM (the peak) of this process, in MB of 10⁶ bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def matmul_rate() -> float:
    """Returns the best rate of eight products, in floating-point operations per second."""
    a, b, out = torch.randn(2048, DIM), torch.randn(2048, DIM), torch.empty(2048, 2048)
    seconds = []
    for _ in range(8):
        before = time.process_time()
        torch.mm(a, b.T, out=out)
        seconds.append(time.process_time() - before)
    return 2 * 2048**2 * DIM / min(seconds)


def child(form: str, name: str, batch: int) -> None:
    torch.set_num_threads(1)
    call(form, name, 64)
    rate = matmul_rate()
    seconds, memory = call(form, name, batch)
    limit = MATMULS[name] * 2 * batch**2 * DIM / max(rate, matmul_rate())
    print(json.dumps({"cpu_s": seconds, "memory": memory, "share_of_limit": limit / seconds}))


def measured(form: str, name: str, batch: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", form, name, str(batch)]
    # Freed memory is returned at once, so that a later allocation counts again.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout)


def loss_lines(case: str, quick: bool) -> list[dict[str, Any]]:
    name, size, small, pairs = CASES[case]
    batch, runs = (small, 1) if quick else (size, max(pairs, 1))
    measurements = []
    for _ in range(runs):
        ours = measured("ours", name, batch)
        measurements.append((ours, measured("plain", name, batch) if pairs else None))
    lines = []
    for metric, unit in (("cpu_s", "s"), ("memory", "MB"), ("share_of_limit", "1")):
        line: dict[str, Any] = {"case": case, "metric": metric, "unit": unit, "batch": batch}
        own = [ours[metric] for ours, _ in measurements]
        if metric == "share_of_limit":
            what = f"{MATMULS[name]} products at the rate measured in the same process"
            other = [1.0] * runs
            ratios = own
        elif pairs:
            what, other = PLAIN[name], [reference[metric] for _, reference in measurements if reference is not None]
            ratios = [b / a for a, b in zip(own, other, strict=True)]
        else:
            what, other, ratios = "none: its matrices do not fit", [], []
        line["ours"] = round(statistics.median(own), 3)
        line["reference"] = round(statistics.median(other), 3) if other else None
        line["ratio"] = round(statistics.median(ratios), 2) if ratios else None
        lines.append({**line, "reference_is": what, "runs": runs})
    return lines


def predicted_lines(case: str, quick: bool) -> list[dict[str, Any]]:
    overrides, form, size, small, runs = PREDICTED[case]
    batch, runs = (small, 1) if quick else (size, runs)
    config = [*overrides, f"embed_dim={DIM}", f"schedule.global_batch={batch}", "data.train=none", "runtime.threads=1"]
    command = [sys.executable, "-m", "clipwright", "doctor", *config, "precision=fp32", "check=loss", "--json"]
    results = []
    for _ in range(runs):
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        report = json.loads(done.stdout)
        results.append(((report["loss_seconds"], report["loss_bytes"] / 1e6), measured(form, "softmax", batch)))
    lines = []
    for number, (metric, unit) in enumerate((("cpu_s", "s"), ("memory", "MB"))):
        pairs = [(predictions[number], measurement[metric]) for predictions, measurement in results]
        line: dict[str, Any] = {"case": case, "metric": metric, "unit": unit, "batch": batch}
        line["ours"] = round(statistics.median(predicted for predicted, _ in pairs), 3)
        line["reference"] = round(statistics.median(real for _, real in pairs), 3)
        line["ratio"] = round(statistics.median(predicted / real for predicted, real in pairs), 3)
        lines.append({**line, "reference_is": "the measured loss; a ratio of 1 is a correct prediction", "runs": runs})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="*", metavar="CASE", help=f"of {', '.join((*CASES, *PREDICTED))}; two if none")
    parser.add_argument("--quick", action="store_true", help="every case, small")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        form, name, batch = options.case
        child(form, name, int(batch))
        return
    for case in options.case or ((*CASES, *PREDICTED) if options.quick else ["softmax_8192", "sigmoid_8192"]):
        for line in (predicted_lines if case in PREDICTED else loss_lines)(case, options.quick):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
