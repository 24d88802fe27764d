"""Runs `clipwright WORDS` in forks of a process that has the libraries loaded already: seconds saved at each start.

`python fork_server.py` reads a request a line and answers it with an exit code a line.
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

LIBRARIES = ["torch._dynamo", "torch.utils.tensorboard", "deepspeed", "webdataset", "clipwright.pipeline.train.trainer"]
LIBRARIES += [
    "clipwright.cli",
    "clipwright.pipeline.train.export",
    "clipwright.data_prep.build.pack",
    "clipwright.eval.embed",
]


class ForkServer:
    """A server and its requests, one at a time."""

    def __init__(self, folder: Path) -> None:
        """folder: where what the commands print is kept meanwhile."""
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
        self, words: list[str], cwd: Path, env: dict[str, str], timeout: float, ranks: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """What `subprocess.run` makes of `clipwright WORDS`, or of torchrun with so many ranks of it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        out, err = self.folder / "out", self.folder / "err"
        for path in (out, err):
            path.write_bytes(b"")
        request: dict[str, Any] = {"words": words, "cwd": str(cwd), "timeout": timeout}
        request |= {"out": str(out), "err": str(err), "env": [env]}
        if ranks:
            with socket.create_server(("127.0.0.1", 0)) as free:
                group = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": free.getsockname()[1]}
            group |= {"MASTER_ADDR": "127.0.0.1"}
            places = [{**group, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
            request["env"] = [env | {name: str(value) for name, value in place.items()} for place in places]
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, (self.folder / "log").read_text(encoding="utf-8")
        told = [path.read_text(encoding="utf-8") for path in (out, err)]
        return subprocess.CompletedProcess(["clipwright", *words], int(answer), *told)

    def close(self) -> None:
        self.process.communicate(timeout=30)


def serve() -> None:
    """Answers requests until their end; only a fork leaves otherwise."""
    answers = os.fdopen(os.dup(1), "w")
    for name in LIBRARIES:
        __import__(name)
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        pids: list[int] = []
        for env in request["env"]:
            if (pid := os.fork()) == 0:
                answers.close()
                become(request, env)
                return
            pids.append(pid)
        killer = threading.Timer(request["timeout"], lambda pids=pids: [os.kill(pid, signal.SIGKILL) for pid in pids])
        killer.start()
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        killer.cancel()
        print(codes[0] if len(codes) == 1 else int(any(codes)), file=answers, flush=True)


def become(request: dict[str, Any], env: dict[str, str]) -> None:
    """The command itself, from here to the end of the process."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(env)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_APPEND), number)
    sys.argv = ["clipwright", *request["words"]]
    from clipwright.cli import main

    main()


if __name__ == "__main__":
    serve()
