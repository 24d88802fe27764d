"""CPU time of `clipwright --help`: `python tests/bench/cli.py [--quick]`."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys


def cpu_seconds(*command: str) -> float:
    """Returns user and system seconds of a child process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="?", default="help", choices=["help"])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    runs = 3 if options.quick else 9
    pairs = [
        (cpu_seconds("-m", "clipwright", "--help"), cpu_seconds("-c", "import torch, transformers"))
        for _ in range(runs + 1)
    ][1:]  # the first run loads the files into the page cache
    line = {
        "case": "help",
        "metric": "cpu_seconds",
        "unit": "s",
        "ours": round(statistics.median(ours for ours, _ in pairs), 3),
        "reference": round(statistics.median(reference for _, reference in pairs), 3),
        "ratio": round(statistics.median(reference / ours for ours, reference in pairs), 2),
        "reference_is": "importing torch and transformers, as a command line with top-level imports does",
        "runs": runs,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
