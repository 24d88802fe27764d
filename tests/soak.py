"""Long versions of the tests of survival, class by class; what was done stands in soak.json, and is not done again.

`make soak`, or `python tests/soak.py [CLASS …]`. A class is a test and how often it is tried. One that passed at this
commit is passed over.
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
STREAM, RESUME = "tests/unit/pipeline/data/test_stream.py", "tests/unit/pipeline/train/test_resume.py"
HEALTH = "tests/unit/pipeline/train/test_supervision.py"
CHECKPOINT = "tests/unit/pipeline/train/test_checkpoint.py"
REMOTE = "tests/unit/pipeline/folders/test_remote.py"
# What is tried, and how often: a test of one round takes its long form.
CLASSES = {
    "stream": (f"{STREAM}::test_killed_at_random_steps_nothing_is_lost_or_repeated", 200),
    "layouts": (f"{STREAM}::test_no_layout_hangs", 1),
    "pairs": (f"{STREAM}::test_captions_stay_with_their_picture", 1),
    "memory": (f"{STREAM}::test_memory_does_not_grow", 1),
    "shards": (f"{STREAM}::test_a_hundred_thousand_shards_are_checked_in_seconds", 1),
    "remote": (f"{REMOTE}::test_a_killed_run_on_a_bad_line_leaves_the_local_runs_ledger", 1),
    "worlds": (f"{STREAM}::test_runs_go_on_with_other_ranks_and_workers_inside_an_epoch", 1),
    "preempt": (f"{HEALTH}::test_told_to_stop_in_any_phase_nothing_is_lost", 20),
    "ill": (f"{HEALTH}::test_any_illness_is_named_and_the_same_command_resumes", 20),
    "nonfinite": (f"{HEALTH}::test_a_run_of_three_bad_steps_keeps_a_finite_checkpoint", 20),
    "slow": (f"{HEALTH}::test_a_rank_of_half_the_pace_is_flagged_within_fifty_steps", 1),
    "goodput": (f"{RESUME}::test_killed_again_and_again_little_is_done_twice", 1),
    "hosts": ("tests/unit/pipeline/launch/test_hosts.py", 1),
    "kill": (f"{RESUME}::test_killed_at_a_random_step", 20),
    "save-kill": (f"{CHECKPOINT}::test_killed_inside_a_save", 160),
    "disk-full": (f"{CHECKPOINT}::test_a_full_disk_ends_all_ranks_and_the_older_checkpoint_stands", 1),
}


def main(names: list[str]) -> int:
    """Runs the classes that are asked for, or all; 1 if one of them failed."""
    report: dict[str, Any] = json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.exists() else {}
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    for name in names or CLASSES:
        before = report.get(name, {})
        if before.get("commit") == commit and before["passes"] == before["count"] and not commit.endswith("-dirty"):
            print(f"{name}: passed at this commit", flush=True)
            continue
        test, count = CLASSES[name]
        print(f"{name}: {count} × {test}", flush=True)
        report[name] = {**tried(test, count), "commit": commit}
        staged = REPORT.with_name(".soak.json.partial")
        staged.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        staged.replace(REPORT)
        print(f"{name}: {report[name]['passes']} of {report[name]['count']} passed", flush=True)
    return int(any(report[name]["passes"] < report[name]["count"] for name in names or CLASSES))


def tried(test: str, count: int) -> dict[str, Any]:
    """A class's count, passes, date and duration."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "junit.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", "0", f"--junitxml={log}", test],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CLIPWRIGHT_SOAK": str(count)},
            check=False,
        )
        cases = list(ET.parse(log).getroot().iter("testcase")) if log.exists() else []
    passes = sum(not list(case.iter("failure")) and not list(case.iter("error")) for case in cases)
    return {
        "count": max(count, len(cases)),
        "passes": passes,
        "seconds": round(time.monotonic() - started, 1),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
