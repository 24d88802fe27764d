"""Ranks of `clipwright train` that are signalled, stopped or spoiled, one group after another in one session.

`python group_ranks.py SCENARIOS.json` forks them from a process that has loaded all libraries, plays the launcher,
which tells the others to stop when one has failed, and writes what came of each into results.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GRACE = 20.0  # seconds from the launcher's SIGTERM to its SIGKILL

# A plugin: the file `fault` holds a Python expression of (rank, step), the name of what goes wrong there.
FAULT = """
import os, time
from pathlib import Path
import torch
from clipwright.pipeline.train import trainer
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.data.loader import Loader
from clipwright.pipeline.train.engine import Engine

rank, rule = int(os.environ.get("RANK", "0")), Path("fault").read_text()
embed, wait, save = Engine._embed, Loader._wait, trainer.Trainer._save

def fault(step, *kinds):
    found = eval(rule, {"rank": rank, "step": step})
    if found in kinds:
        Path(f"at-{rank}").touch()
        return found

def embedded(self, part, step, number):
    kind = fault(step, "nan", "hang", "refuse", "crash", "slow")
    if kind == "hang":
        time.sleep(1000)
    if kind == "refuse":
        raise ClipwrightError("E_DATA_HASH", "a fault of one rank", where=f"rank {rank}", found="x", fix="y")
    if kind == "crash":
        raise ValueError("a bug on one rank")
    begun = time.perf_counter()
    made = embed(self, part, step, number)
    if kind == "slow":
        time.sleep(time.perf_counter() - begun)
    return tuple(side * torch.nan for side in made) if kind == "nan" else made

def waited(self, workers, pending, stop):
    while fault(pending.positions[0] // self.rank_batch.global_batch, "starve") and not stop():
        time.sleep(0.05)
    return wait(self, workers, pending, stop)

def saved(self, **words):
    kind = fault(self.step, "save", "stuck save")
    if kind:
        time.sleep(2 if kind == "save" else 1000)
    save(self, **words)

Engine._embed, Loader._wait, trainer.Trainer._save = embedded, waited, saved
if fault(-2, "load"):
    time.sleep(1000)
build = trainer.build
def built(*words):
    if fault(-1, "build"):
        time.sleep(1000)
    return build(*words)
trainer.build = built
"""


@dataclass
class Scenario:
    """`ranks` of a command in `folder`. Once `when` holds, the ranks of `to` (none: all) get the signal `send`.

    fault: see FAULT. when: `steps N`, or `at R`: rank R has come to its fault.
    """

    folder: str
    words: list[str]
    ranks: int = 2
    fault: str = "None"
    when: str = ""
    send: str = ""
    to: list[int] = field(default_factory=list)
    pause: float = 0.0  # seconds from when to the signal
    env: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return Path(self.folder)


class Group:
    """The ranks of a scenario."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario, folder = scenario, scenario.path
        (folder / "fault.py").write_text(FAULT)
        (folder / "fault").write_text(scenario.fault)
        for path in (*folder.glob("at-*"), *folder.glob("err-*")):
            path.unlink()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pids = {rank: self._start(rank, port) for rank in range(scenario.ranks)}
        self.codes: dict[int, int] = {}

    def _start(self, rank: int, port: int) -> int:
        if (pid := os.fork()) != 0:
            return pid
        scenario, code = self.scenario, 1
        try:
            os.chdir(scenario.folder)
            place = {"RANK": rank, "WORLD_SIZE": scenario.ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": scenario.ranks}
            os.environ |= {name: str(value) for name, value in place.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **scenario.env}
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
            sys.argv = ["clipwright", *scenario.words, "plugins=fault.py"]
            from clipwright.cli import main

            main()
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> None:
        for rank in self.pids.keys() - self.codes.keys():
            pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if pid:
                self.codes[rank] = os.waitstatus_to_exitcode(status)

    def kill(self, number: int, ranks: list[int]) -> list[int]:
        left = [rank for rank in ranks or self.pids if rank not in self.codes]
        for rank in left:
            os.kill(self.pids[rank], number)
        return left

    def steps(self) -> int:
        path = self.scenario.path / "run" / "ledger.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def ready(self) -> bool:
        kind, _, number = self.scenario.when.partition(" ")
        if kind == "steps":
            return self.steps() >= int(number)
        return kind == "at" and (self.scenario.path / f"at-{number}").exists()

    def lines(self) -> Iterator[tuple[int, str]]:
        for path in self.scenario.path.glob("err-*"):
            for line in path.read_text(errors="replace").splitlines():
                yield int(path.name[4:]), line

    def errors(self) -> list[tuple[int, str]]:
        return [(rank, line) for rank, line in self.lines() if line.startswith("error[")]


LONG = "CLIPWRIGHT_SOAK" in os.environ  # see tests/soak.py


def played(scenario: Scenario, seconds: float = 600.0 if LONG else 240.0) -> dict[str, Any]:
    """What came of it: exit codes, error lines, seconds from the signal or fault until they stood and all had left."""
    group = Group(scenario)
    begun = time.monotonic()
    ready = done = told = left = 0.0
    steps, killed = 0, []
    while len(group.codes) < scenario.ranks:
        time.sleep(0.01)
        group.poll()
        now = time.monotonic()
        if scenario.when and not ready and group.ready():
            ready = now
        if ready and not done and now >= ready + scenario.pause:
            done, steps = now, group.steps()
            if scenario.send:
                group.kill(signal.Signals[scenario.send], scenario.to)
        if done and not told and group.errors():
            told = now
        if any(group.codes.values()) and not left:
            left = now
            group.kill(signal.SIGTERM, [])
        stopped = scenario.send == "SIGSTOP" and group.pids.keys() - group.codes.keys() <= set(scenario.to)
        if (left and (now > left + GRACE or stopped)) or now > begun + seconds:
            killed += group.kill(signal.SIGKILL, [])
            left = now
    status = scenario.path / "run" / "status.json"
    log = scenario.path / "run" / "log.jsonl"
    return {
        "folder": scenario.folder,
        "codes": [group.codes[rank] for rank in range(scenario.ranks)],
        "killed": killed,
        "told": (told or left) - done,
        "left": left - done,
        "all": time.monotonic() - begun,
        "before": steps,
        "steps": group.steps(),
        "errors": group.errors(),
        "stderr": [line for _, line in group.lines()],
        "status": json.loads(status.read_text()) if status.exists() else None,
        "log": [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else [],
        "said": (scenario.path / "out-0").read_text(),
        "checkpoints": sorted(path.name for path in (scenario.path / "run" / "checkpoints").glob("*")),
    }


def main(path: Path) -> None:
    import clipwright.cli
    import clipwright.pipeline.train.trainer  # noqa: F401

    scenarios = json.loads(path.read_text())
    results = {name: played(Scenario(**scenario)) for name, scenario in scenarios.items()}
    path.with_name("results.json").write_text(json.dumps(results))


def write(path: Path, scenarios: dict[str, Scenario]) -> None:
    path.write_text(json.dumps({name: dataclasses.asdict(scenario) for name, scenario in scenarios.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
