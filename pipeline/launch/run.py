"""Starts the ranks of all nodes, waits for them, and exits with the error and exit code of the first that fails."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import psutil

from clipwright.pipeline.core import activity
from clipwright.pipeline.core.command import Call, Outcome, Preempted
from clipwright.pipeline.core.errors import CODES, ClipwrightError
from clipwright.pipeline.core.status import DONE, INTERRUPTED, PREEMPTED, STATUS
from clipwright.pipeline.core.streams import print_note, result_stream
from clipwright.pipeline.launch.command import check_command
from clipwright.pipeline.launch.config import LaunchConfig
from clipwright.pipeline.launch.files import kubernetes_manifest, run_again, slurm_array_script, slurm_script
from clipwright.pipeline.launch.plan import NodeCommand, check, node_commands, split, world_size

GRACE_SECONDS = 60.0  # for the ranks to save and exit; launchers give them 30
STATUS_SECONDS = 5.0  # until a status file that another node wrote is visible here
SAVED_CODES = (PREEMPTED, INTERRUPTED)


def launch(call: Call) -> Outcome:
    """Runs `clipwright launch`: starts the ranks, or prints the job file of a cluster that does."""
    overrides, inner = split(call)
    config: LaunchConfig = call.load(overrides=overrides).value
    check(config, call, inner)
    if config.by in ("slurm", "kubernetes"):
        text = _job_file(config, inner)
        check_command(config, call, inner, world_size(config))
        if not call.quiet:  # stdout may be a pipe to sbatch, bash or kubectl
            print_note(run_again(config))
        return Outcome({"by": config.by, "file": text}, text)
    description, commands = node_commands(config, inner)
    check_command(config, call, inner, world_size(config))
    if call.dry_run:
        lines = [str(command) for command in commands]
        return Outcome({"world": description, "lines": lines}, "\n".join([description, *lines]))
    call.say(description)
    call.say("to run it again: the same command; it resumes" + (" without --fresh" if call.fresh else ""))
    activity.hide()
    group = NodeGroup(commands, call.out, call.debug, captures_results=call.json)
    exit_code = group.run()
    return Outcome(group.result(), exit_code=exit_code)


def _job_file(config: LaunchConfig, inner: list[str]) -> str:
    if config.by == "kubernetes":
        return kubernetes_manifest(config, inner)
    if config.parts is not None:
        return slurm_array_script(config, inner)
    return slurm_script(config, inner)


class NodeGroup:
    """The launchers of all nodes; if one fails, all are stopped."""

    def __init__(
        self, commands: list[NodeCommand], out: Path | None, debug: bool, *, captures_results: bool = False
    ) -> None:
        """out: the output folder of the launched command. captures_results: of what ranks print with --json."""
        self.commands, self.debug, self.captures_results = commands, debug, captures_results
        self.printed: list[str] = []  # lines on stdout of the ranks, if captured
        self.status_path = None if out is None else out / STATUS
        self.old_status = self._read_status()
        self.error_line = ""  # the first of any rank
        self.last_lines: dict[str, str] = {}  # by host, on stderr
        self.first_failed_code: int | None = None  # of the rank that failed first, according to torchrun's report
        self.is_stopping = False  # by a signal; launchers then report their ranks as failed
        self.processes: list[subprocess.Popen[bytes]] = []
        self.readers: list[threading.Thread] = []
        self._lock = threading.Lock()

    def run(self) -> int:
        """Waits for all ranks; returns the exit code, or raises if they were stopped or failed without an error."""
        failed: int | None = None
        stop: BaseException | None = None
        try:
            for command in self.commands:
                self._start(command)
            failed = self._wait_for_failure()
            if failed is None:
                return DONE
        except (Preempted, KeyboardInterrupt) as caught:
            stop = caught
            self.is_stopping = True
        finally:
            try:
                self._terminate()
            finally:
                self._kill()
            for reader in self.readers:
                reader.join(timeout=5)
        return self._finish(failed, stop)

    def _start(self, command: NodeCommand) -> None:
        # In its own session: Ctrl-C then reaches the ranks once, through us. Standard input: see plan._remote_shell.
        process = subprocess.Popen(
            command.arguments,
            env={**os.environ, **command.env},
            stdin=subprocess.PIPE if command.host else subprocess.DEVNULL,
            stdout=subprocess.PIPE if self.captures_results else result_stream(),
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.processes.append(process)
        self._read(self._relay, command.host, process.stderr)
        if self.captures_results:
            self._read(self._capture, process.stdout)

    def _read(self, target: Callable[..., None], *arguments: Any) -> None:
        reader = threading.Thread(target=target, args=arguments, daemon=True)
        self.readers.append(reader)
        reader.start()

    def _capture(self, stream: IO[bytes]) -> None:
        for raw in stream:
            self.printed.append(raw.decode(errors="backslashreplace"))

    def result(self) -> dict[str, Any]:
        """Returns the JSON object that a rank has printed; if ranks only printed an error line, that as an object."""
        for line in reversed(self.printed):
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    return value
        if not self.error_line:
            return {}
        code, _, what = self.error_line.removeprefix("error[").partition("]: ")
        return {"error": {"code": code, "what": what, "where": "", "found": "", "allowed": "", "fix": ""}}

    def _relay(self, host: str, stream: IO[bytes]) -> None:
        """Prints what a node's launcher writes to stderr, up to the first error line of any rank.

        That line is printed at once: a launcher may take half a minute to stop a blocked rank.
        """
        for raw in stream:
            line = raw.decode(errors="backslashreplace").rstrip("\n")
            with self._lock:
                if re.search(r"\w", line):
                    self.last_lines[host] = line.strip()
                report = re.match(r"\s+exitcode\s*: (-?\d+)", line)
                if report:
                    self.first_failed_code = int(report[1])  # the last in torchrun's report is the first failure
                if not self.error_line and re.match(r"error\[E_\w+\]: ", line):
                    self.error_line = line
                    print_note(line)
                elif self.debug or not (self.error_line or self.is_stopping):
                    print_note(line)

    def _wait_for_failure(self) -> int | None:
        """Returns the number of the first node whose launcher fails, or None once all have succeeded."""
        while True:
            codes = [process.poll() for process in self.processes]
            for number, code in enumerate(codes):
                if code not in (None, DONE):
                    return number
            if all(code == DONE for code in codes):
                return None
            time.sleep(0.1)

    def _terminate(self) -> None:
        """Stops the launchers of all nodes and waits until they have exited, at most GRACE_SECONDS."""
        for process in self.processes:
            if process.stdin is not None:
                process.stdin.close()
            elif process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and any(process.poll() is None for process in self.processes):
            time.sleep(0.1)

    def _kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
                process.wait()

    def _finish(self, failed: int | None, stop: BaseException | None) -> int:
        codes = [process.returncode for process in self.processes]
        if all(code == DONE for code in codes):
            return DONE  # they finished while the signal arrived
        if self.error_line:
            if self.debug:  # other lines were printed after it
                print_note(self.error_line)
            error_code = self.error_line[len("error[") :].partition("]")[0]
            return CODES[error_code][0] if error_code in CODES else 1
        code = self._exit_code(codes if failed is None else [codes[failed]])
        if isinstance(stop, KeyboardInterrupt) or code in SAVED_CODES:
            if stop is not None:
                raise stop
            raise Preempted if code == PREEMPTED else KeyboardInterrupt
        if failed is None:
            failed = next(number for number, code in enumerate(codes) if code != DONE)
        raise self._unexplained(self.commands[failed].host, codes[failed])

    def _unexplained(self, host: str, code: int) -> ClipwrightError:
        """E_LAUNCH: a node failed and no rank printed an error line."""
        fix = "check the lines above"
        if host and code == 255:  # of ssh itself
            fix += f"; try ssh -o BatchMode=yes {host} true"
        exit_code = code if self.first_failed_code is None else self.first_failed_code
        return ClipwrightError(
            "E_LAUNCH",
            f"ranks exited with code {exit_code} and without an error message",
            where=host or "this machine",
            found=f"last line: {self.last_lines.get(host, 'none')}",
            fix=fix,
        )

    def _exit_code(self, codes: list[int]) -> int | None:
        """The command's exit code: the launchers' own, or, if they turn every failure into 1, that of `status.json`.

        A status does not count if a rank died: it is then about the signal by which a launcher stopped the others.
        """
        saved = next((code for code in codes if code in SAVED_CODES), None)
        if saved is not None or self.first_failed_code not in (None, *SAVED_CODES):
            return saved
        deadline = time.monotonic() + STATUS_SECONDS
        while self.status_path is not None and time.monotonic() < deadline:
            status = self._read_status()
            if status is not None and status != self.old_status:
                return status.get("exit_code")
            time.sleep(0.1)
        return None

    def _read_status(self) -> dict[str, Any] | None:
        if self.status_path is None:
            return None
        try:
            return json.loads(self.status_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
