"""Ranks of `clipwright train` that get signals or faults, one group after another in one session.

`python group_ranks.py SCENARIOS.json` forks them from a process that has loaded all libraries, acts as the launcher,
which stops the other ranks once one has failed, and writes the result of each scenario into results.json.
"""

from __future__ import annotations

import ctypes
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

import psutil

from clipwright.pipeline.distributed import rank_process

SOAK = "CLIPWRIGHT_SOAK" in os.environ  # see tests/soak.py
# From the launcher's SIGTERM to its SIGKILL. In `make test` the machine may be busy.
GRACE_SECONDS = 20.0 if SOAK else 200.0
SCENARIO_SECONDS = 1200.0

# A plugin: the file `fault` holds a Python expression of (rank, step) whose value names a fault, or None. Step -2 is
# the import of the plugin, step -1 the construction of the run.
FAULT_PLUGIN = """
import os, time
from pathlib import Path
import torch
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.data.loader import Loader
from clipwright.pipeline.train.checkpoints.saver import Saver
from clipwright.pipeline.train.engine import Engine
from clipwright.pipeline.train.supervision.progress import PROGRESS
from clipwright.pipeline.train.trainer import Trainer

FOREVER = 1000
rank, rule = int(os.environ.get("RANK", "0")), Path("fault").read_text()
init, batches, embed, save = Loader.__init__, Loader.batches, Engine._embed, Saver.save
should_stop = Trainer.should_stop

def fault(step, *kinds):
    kind = eval(rule, {"rank": rank, "step": step})
    if kind in kinds:
        Path(f"at-{rank}").touch()
        return kind

def faulty_init(self, *arguments, **named):
    if fault(-1, "build"):
        time.sleep(FOREVER)
    init(self, *arguments, **named)

def faulty_batches(self, position, should_stop):
    real = batches(self, position, should_stop)
    try:
        while True:
            while fault(PROGRESS.step, "starve"):
                if should_stop():
                    return
                time.sleep(0.05)
            batch = next(real, None)
            if batch is None:
                return
            yield batch
    finally:
        real.close()

def faulty_embed(self, *arguments):
    kind = fault(PROGRESS.step, "nan", "hang", "refuse", "slow")
    if kind == "hang":
        time.sleep(FOREVER)
    if kind == "refuse":
        raise ClipwrightError("E_DATA_HASH", "a fault of one rank", where=f"rank {rank}", found="x", fix="y")
    started = time.perf_counter()
    features = embed(self, *arguments)
    if kind == "slow":
        time.sleep(time.perf_counter() - started)
    if kind == "nan":
        return tuple(side * torch.nan for side in features)
    return features

def faulty_save(self, engine, step, **named):
    kind = fault(step, "save", "blocked save")
    if kind:
        time.sleep(2 if kind == "save" else FOREVER)
    save(self, engine, step, **named)

def deaf_should_stop(self):
    return not fault(PROGRESS.step, "deaf") and should_stop(self)

Loader.__init__, Loader.batches, Engine._embed, Saver.save = faulty_init, faulty_batches, faulty_embed, faulty_save
Trainer.should_stop = deaf_should_stop
if fault(-2, "load"):
    time.sleep(FOREVER)
"""


@dataclass
class Scenario:
    """`ranks` ranks of a command in `folder`; once `when` holds, the ranks in `to` (all if empty) get a signal.

    fault: see FAULT_PLUGIN. when: `steps N`, or `at R`: rank R has reached its fault. send: the signal's name. If the
    launcher is to be killed, it is killed then, and no rank gets a signal.
    """

    folder: str
    arguments: list[str]
    ranks: int = 2
    fault: str = "None"
    when: str = ""
    send: str = ""
    to: list[int] = field(default_factory=list)
    pause: float = 0.0  # seconds from `when` to the signal
    env: dict[str, str] = field(default_factory=dict)
    launcher: str = "stops"  # what it does once a rank has ended: `stops` the others, or `none`; or it is `killed`

    @property
    def path(self) -> Path:
        return Path(self.folder)


class Group:
    """The ranks of a scenario."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        folder = scenario.path
        (folder / "fault.py").write_text(FAULT_PLUGIN)
        (folder / "fault").write_text(scenario.fault)
        for path in (*folder.glob("at-*"), *folder.glob("err-*")):
            path.unlink()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.codes: dict[int, int] = {}
        self.launcher = 0
        if scenario.launcher == "killed":
            self.pids = self._start_launcher(port)
        else:
            self.pids = {rank: self._start(rank, port) for rank in range(scenario.ranks)}

    def _start_launcher(self, port: int) -> dict[int, int]:
        """Forks a process that starts the ranks; once it is killed, they are children of this process."""
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
        reader, writer = os.pipe()
        self.launcher = os.fork()
        if self.launcher == 0:
            pids = {rank: self._start(rank, port) for rank in range(self.scenario.ranks)}
            os.write(writer, json.dumps(pids).encode())
            while True:
                signal.pause()
        os.close(writer)
        with os.fdopen(reader) as pipe:
            return {int(rank): pid for rank, pid in json.loads(os.read(pipe.fileno(), 4096)).items()}

    def _start(self, rank: int, port: int) -> int:
        pid = os.fork()
        if pid != 0:
            return pid
        scenario, code = self.scenario, 1
        try:
            os.chdir(scenario.folder)
            variables = {
                "RANK": rank,
                "WORLD_SIZE": scenario.ranks,
                "LOCAL_RANK": rank,
                "LOCAL_WORLD_SIZE": scenario.ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os.environ.update({name: str(value) for name, value in variables.items()})
            os.environ.update(scenario.env)
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
            sys.argv = ["clipwright", *scenario.arguments, "plugins=fault.py"]
            if scenario.launcher == "killed":
                parent = psutil.Process(os.getppid())
                rank_process.find_launchers = lambda: [parent]
            from clipwright.cli import main

            main()
            code = 0
        except SystemExit as exited:
            code = exited.code if isinstance(exited.code, int) else 1
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> None:
        for rank in self.pids.keys() - self.codes.keys():
            try:
                pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
            except ChildProcessError:  # still a child of the launcher
                continue
            if pid:
                self.codes[rank] = os.waitstatus_to_exitcode(status)

    def kill_launcher(self) -> None:
        os.kill(self.launcher, signal.SIGKILL)
        os.waitpid(self.launcher, 0)

    def kill(self, number: int, ranks: list[int]) -> list[int]:
        """Sends a signal to those of `ranks` (all if empty) that still run, and returns them."""
        running = [rank for rank in ranks or self.pids if rank not in self.codes]
        for rank in running:
            os.kill(self.pids[rank], number)
        return running

    def steps(self) -> int:
        path = self.scenario.path / "run" / "ledger.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def ready(self) -> bool:
        """Whether the scenario's `when` holds."""
        kind, _, number = self.scenario.when.partition(" ")
        if kind == "steps":
            return self.steps() >= int(number)
        return kind == "at" and (self.scenario.path / f"at-{number}").exists()

    def stderr_lines(self) -> Iterator[tuple[int, str]]:
        for path in self.scenario.path.glob("err-*"):
            for line in path.read_text(errors="replace").splitlines():
                yield int(path.name[4:]), line

    def errors(self) -> list[tuple[int, str]]:
        return [(rank, line) for rank, line in self.stderr_lines() if line.startswith("error[")]


def run_scenario(scenario: Scenario) -> dict[str, Any]:
    """The result: exit codes, output, run folder, and seconds from the signal or fault to the error and the exit."""
    group = Group(scenario)
    started = time.monotonic()
    ready_at = signal_at = error_at = first_exit_at = 0.0
    killed: list[int] = []
    while len(group.codes) < scenario.ranks:
        time.sleep(0.01)
        group.poll()
        now = time.monotonic()
        if scenario.when and not ready_at and group.ready():
            ready_at = now
        if ready_at and not signal_at and now >= ready_at + scenario.pause:
            signal_at = now
            if group.launcher:
                group.kill_launcher()
            elif scenario.send:
                group.kill(signal.Signals[scenario.send], scenario.to)
        if signal_at and not error_at and group.errors():
            error_at = now
        if any(group.codes.values()) and not first_exit_at:
            first_exit_at = now
            if scenario.launcher == "stops":
                group.kill(signal.SIGTERM, [])
        only_suspended = scenario.send == "SIGSTOP" and group.pids.keys() - group.codes.keys() <= set(scenario.to)
        grace_over = first_exit_at and (now > first_exit_at + GRACE_SECONDS or only_suspended)
        if grace_over or now > started + SCENARIO_SECONDS:
            killed += group.kill(signal.SIGKILL, [])
            first_exit_at = now
    run = scenario.path / "run"
    status, log = run / "status.json", run / "log.jsonl"
    return {
        "folder": scenario.folder,
        "codes": [group.codes[rank] for rank in range(scenario.ranks)],
        "killed": killed,
        "seconds_to_error": (error_at or first_exit_at) - signal_at,
        "seconds_to_exit": first_exit_at - signal_at,
        "seconds_to_last_exit": time.monotonic() - signal_at,
        "steps": group.steps(),
        "errors": group.errors(),
        "stderr": [line for _, line in group.stderr_lines()],
        "stdout": (scenario.path / "out-0").read_text(),
        "status": json.loads(status.read_text()) if status.exists() else None,
        "log": [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else [],
        "checkpoints": sorted(path.name for path in (run / "checkpoints").glob("*")),
    }


def main(path: Path) -> None:
    import clipwright.cli
    import clipwright.pipeline.train.trainer  # noqa: F401

    scenarios = json.loads(path.read_text())
    results = {name: run_scenario(Scenario(**scenario)) for name, scenario in scenarios.items()}
    path.with_name("results.json").write_text(json.dumps(results))


def write(path: Path, scenarios: dict[str, Scenario]) -> None:
    path.write_text(json.dumps({name: dataclasses.asdict(scenario) for name, scenario in scenarios.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
