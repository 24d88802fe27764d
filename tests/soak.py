"""Long versions of the resilience tests, by class; results go to soak.json, and passed classes are not run again.

`make soak`, or `python tests/soak.py [CLASS …]`. A class is a test and its number of rounds. A class that has passed at
the current commit is skipped.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "soak.json"
STREAM = "tests/unit/pipeline/data/test_stream.py"
REMOTE = "tests/unit/pipeline/folders/test_remote.py"
RESUME = "tests/unit/pipeline/train/test_resume.py"
SUPERVISION = "tests/unit/pipeline/train/test_supervision.py"
CHECKPOINT = "tests/unit/pipeline/train/test_checkpoint.py"
HOSTS = "tests/unit/pipeline/launch/test_hosts.py"
# Class → (test, rounds); a test of one round has a long form of its own.
CLASSES = {
    "stream": (f"{STREAM}::test_runs_killed_at_random_steps_lose_and_repeat_no_sample", 200),
    "layouts": (f"{STREAM}::test_no_layout_hangs", 1),
    "pairs": (f"{STREAM}::test_captions_stay_with_their_image", 1),
    "memory": (f"{STREAM}::test_memory_does_not_grow", 1),
    "many-shards": (f"{STREAM}::test_a_hundred_thousand_shards_are_checked_in_seconds", 1),
    "remote": (f"{REMOTE}::test_killed_run_with_failing_requests_writes_the_same_ledger_as_a_local_run", 1),
    "world-size": (f"{STREAM}::test_run_resumes_with_other_ranks_and_workers_within_an_epoch", 1),
    "preempt": (f"{SUPERVISION}::test_preemption_in_any_phase_loses_no_step", 20),
    "failed-rank": (f"{SUPERVISION}::test_any_failed_rank_is_named_and_the_same_command_resumes", 20),
    "nonfinite": (f"{SUPERVISION}::test_three_nonfinite_steps_end_the_run_with_a_finite_checkpoint", 20),
    "slow-rank": (f"{SUPERVISION}::test_rank_of_half_the_pace_is_reported_within_fifty_steps", 1),
    "goodput": (f"{RESUME}::test_repeated_kills_cost_few_repeated_steps", 1),
    "hosts": (HOSTS, 1),
    "kill": (f"{RESUME}::test_resume_after_sigkill_at_random_steps_is_bit_identical", 20),
    "kill-in-save": (f"{CHECKPOINT}::test_run_killed_inside_a_save_resumes_bit_identically", 160),
    "disk-full": (f"{CHECKPOINT}::test_full_disk_fails_all_ranks_and_keeps_the_older_checkpoint", 1),
}


def main(names: list[str]) -> int:
    """Runs the named classes, or all; returns 1 if one of them failed."""
    report: dict[str, Any] = json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.exists() else {}
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    for name in names or CLASSES:
        before = report.get(name, {})
        if before.get("commit") == commit and before["passes"] == before["count"] and not commit.endswith("-dirty"):
            print(f"{name}: passed at this commit", flush=True)
            continue
        test, rounds = CLASSES[name]
        print(f"{name}: {rounds} × {test}", flush=True)
        report[name] = {**run_class(test, rounds), "commit": commit}
        staged = REPORT.with_name(".soak.json.partial")
        staged.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        staged.replace(REPORT)
        print(f"{name}: {report[name]['passes']} of {report[name]['count']} passed", flush=True)
    return int(any(report[name]["passes"] < report[name]["count"] for name in names or CLASSES))


def run_class(test: str, rounds: int) -> dict[str, Any]:
    """Runs a test for `rounds` rounds; returns the numbers of cases and passes, the duration and the date."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "junit.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", "0", f"--junitxml={log}", test],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CLIPWRIGHT_SOAK": str(rounds)},
            check=False,
        )
        cases = list(ET.parse(log).getroot().iter("testcase")) if log.exists() else []
    passes = sum(not list(case.iter("failure")) and not list(case.iter("error")) for case in cases)
    return {
        "count": max(rounds, len(cases)),
        "passes": passes,
        "seconds": round(time.monotonic() - started, 1),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
