"""Starts the ranks of all machines, waits for them, and ends with the first failing rank's own words and exit code."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import psutil

from clipwright.pipeline.core.command import DONE, INTERRUPTED, PREEMPTED, Call, Outcome, Preempted
from clipwright.pipeline.core.errors import CODES, ClipwrightError
from clipwright.pipeline.core.files import STATUS
from clipwright.pipeline.launch import files
from clipwright.pipeline.launch.plan import LaunchConfig, Part, check, parts, split

GRACE = 60.0  # seconds that ranks have to save and leave; launchers give theirs 30
_SAVED = (PREEMPTED, INTERRUPTED)
STATUS_WAIT = 5.0  # seconds for a status file of another machine to be seen here


def launch(call: Call) -> Outcome:
    """Runs `clipwright launch`: starts the ranks, or prints the file of a cluster that does."""
    overrides, inner = split(call)
    config: LaunchConfig = call.load(overrides=overrides).value
    check(config, call, inner)
    if config.by in ("slurm", "kubernetes"):
        write = files.kubernetes if config.by == "kubernetes" else files.slurm if config.parts is None else files.array
        text = write(config, inner)
        return Outcome({"by": config.by, "file": text}, text)
    told, made = parts(config, inner)
    if call.dry_run:
        return Outcome({"world": told, "lines": [str(part) for part in made]}, "\n".join([told, *map(str, made)]))
    call.say(told)
    return Outcome(exit_code=Group(made, call.out, call.debug).run())


class Group:
    """The machines' launchers as one: all of them end when one fails."""

    def __init__(self, made: list[Part], out: Path | None, debug: bool) -> None:
        self.parts, self.status, self.debug = made, None if out is None else out / STATUS, debug
        self.before = self._read_status()
        self.error = ""  # the first error line of any rank
        self.last: dict[str, str] = {}  # of each host, its last word
        self.stopping = False  # told to stop, launchers report that they were
        self.root: int | None = None  # what its first failing rank ended with, where the launcher says so
        self.processes: list[subprocess.Popen[bytes]] = []
        self.readers: list[threading.Thread] = []
        self._lock = threading.Lock()

    def run(self) -> int:
        """Waits for all ranks; returns the exit code, or raises if the ranks were stopped or ended without an error."""
        failed: int | None = None
        stop: BaseException | None = None
        try:
            for part in self.parts:
                self._start(part)
            if (failed := self._first_failure()) is None:
                return DONE
        except (Preempted, KeyboardInterrupt) as caught:
            stop, self.stopping = caught, True
        finally:
            try:
                self._leave()
            finally:
                self._kill()
            for reader in self.readers:
                reader.join(timeout=5)
        return self._end(failed, stop)

    def _start(self, part: Part) -> None:
        # Of its own session: Ctrl-C reaches the ranks once, through us. Standard input: see plan._remote.
        process = subprocess.Popen(
            part.line,
            env={**os.environ, **part.env},
            stdin=subprocess.PIPE if part.host else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.processes.append(process)
        self.readers.append(threading.Thread(target=self._relay, args=(part, process.stderr), daemon=True))
        self.readers[-1].start()

    def _relay(self, part: Part, stream: IO[bytes]) -> None:
        """Hands on what a machine says, up to the first error line, which is the last word of all.

        It is said at once: a launcher may need half a minute to be rid of a rank that is stopped.
        """
        for raw in stream:
            line = raw.decode(errors="backslashreplace").rstrip("\n")
            with self._lock:
                if re.search(r"\w", line):
                    self.last[part.host] = line.strip()
                if report := re.match(r"\s+exitcode\s*: (-?\d+)", line):
                    self.root = int(report[1])  # torchrun's report ends with the rank that failed first
                if not self.error and re.match(r"error\[E_\w+\]: ", line):
                    self.error = line
                    print(line, file=sys.stderr, flush=True)
                elif self.debug or not (self.error or self.stopping):
                    print(line, file=sys.stderr, flush=True)

    def _first_failure(self) -> int | None:
        """The number of the first part that fails, or None when all are done."""
        while True:
            codes = [process.poll() for process in self.processes]
            for number, code in enumerate(codes):
                if code not in (None, DONE):
                    return number
            if all(code == DONE for code in codes):
                return None
            time.sleep(0.1)

    def _leave(self) -> None:
        """Tells all machines to stop and waits until they have."""
        for process in self.processes:
            if process.stdin is not None:
                process.stdin.close()
            elif process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and any(process.poll() is None for process in self.processes):
            time.sleep(0.1)

    def _kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
                process.wait()

    def _end(self, failed: int | None, stop: BaseException | None) -> int:
        codes = [process.returncode for process in self.processes]
        if all(code == DONE for code in codes):
            return DONE  # they finished as the signal came
        if self.error:
            if self.debug:  # much was said behind it
                print(self.error, file=sys.stderr, flush=True)
            name = self.error[len("error[") :].partition("]")[0]
            return CODES[name][0] if name in CODES else 1
        code = self._exit_code(codes if failed is None else [codes[failed]])
        if code in _SAVED or isinstance(stop, KeyboardInterrupt):
            raise stop or (Preempted() if code == PREEMPTED else KeyboardInterrupt())
        number = next(i for i, code in enumerate(codes) if code != DONE) if failed is None else failed
        host, ended = self.parts[number].host, codes[number] if self.root is None else self.root
        raise ClipwrightError(
            "E_LAUNCH",
            "ranks that ended without saying why",
            where=host or "this machine",
            found=f"exit code {ended}, last word: {self.last.get(host, 'none')}",
            fix="see the lines above"
            + (f"; try ssh -o BatchMode=yes {host} true" if host and codes[number] == 255 else ""),
        )

    def _exit_code(self, codes: list[int]) -> int | None:
        """What the command ended with: as a launcher hands it on, or, where it says 1 for all, by `status.json`.

        A rank that died makes launchers stop the others, whose status then speaks of a signal: it does not count.
        """
        saved = next((code for code in codes if code in _SAVED), None)
        if saved is not None or self.root not in (None, *_SAVED):
            return saved
        deadline = time.monotonic() + STATUS_WAIT
        while self.status is not None and time.monotonic() < deadline:
            if (now := self._read_status()) is not None and now != self.before:
                return now.get("exit_code")
            time.sleep(0.1)
        return None

    def _read_status(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.status.read_text(encoding="utf-8")) if self.status is not None else None
        except (OSError, ValueError):
            return None
