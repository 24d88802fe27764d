"""Runs `clipwright` in forks of a process that has already loaded the libraries, which saves seconds per command.

`python fork_server.py` reads one request per line and answers each with an exit code.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

LIBRARIES = [
    "torch._dynamo",
    "torch.utils.tensorboard",
    "deepspeed",
    "webdataset",
    "clipwright.pipeline.train.trainer",
    "clipwright.cli",
    "clipwright.pipeline.train.export",
    "clipwright.data_prep.build.pack",
    "clipwright.eval.embed",
    "clipwright.eval.report.run_page",
]


class ForkServer:
    """The server process, which runs one command at a time."""

    def __init__(self, folder: Path) -> None:
        """folder: for the output of the running command."""
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "log").open("w"),
            text=True,
        )

    def run(
        self, arguments: list[str], cwd: Path, env: dict[str, str], timeout: float, ranks: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """Runs `clipwright ARGUMENTS`, as `ranks` ranks if that is not 0, and returns what `subprocess.run` would."""
        assert self.process.stdin is not None and self.process.stdout is not None
        out, err = self.folder / "out", self.folder / "err"
        for path in (out, err):
            path.write_bytes(b"")
        request: dict[str, Any] = {"arguments": arguments, "cwd": str(cwd), "timeout": timeout}
        request |= {"out": str(out), "err": str(err), "env": [env]}
        if ranks:
            with socket.create_server(("127.0.0.1", 0)) as free:
                group = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": free.getsockname()[1]}
            group |= {"MASTER_ADDR": "127.0.0.1"}
            request["env"] = []
            for rank in range(ranks):
                launcher = {**group, "RANK": rank, "LOCAL_RANK": rank}
                request["env"].append({**env, **{name: str(value) for name, value in launcher.items()}})
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, (self.folder / "log").read_text(encoding="utf-8")
        printed = [path.read_text(encoding="utf-8") for path in (out, err)]
        return subprocess.CompletedProcess(["clipwright", *arguments], int(answer), *printed)

    def close(self) -> None:
        self.process.communicate(timeout=30)


def serve() -> None:
    """Answers requests until standard input ends; a forked child returns after its command."""
    answers = os.fdopen(os.dup(1), "w")
    for name in LIBRARIES:
        __import__(name)
    # On a busy machine, lines about what a command is doing would appear anywhere: test_activity.py tests them.
    sys.modules["clipwright.pipeline.core.activity"].TICK_SECONDS = 3600.0
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        pids: list[int] = []
        for env in request["env"]:
            if (pid := os.fork()) == 0:
                answers.close()
                run_command(request, env)
                return
            pids.append(pid)
        killer = threading.Timer(request["timeout"], lambda pids=pids: [os.kill(pid, signal.SIGKILL) for pid in pids])
        killer.start()
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        killer.cancel()
        print(codes[0] if len(codes) == 1 else int(any(codes)), file=answers, flush=True)


def run_command(request: dict[str, Any], env: dict[str, str]) -> None:
    """Runs the command in this forked process, which ends with it."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(env)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_APPEND), number)
    sys.argv = ["clipwright", *request["arguments"]]
    from clipwright.cli import main

    main()


if __name__ == "__main__":
    serve()
