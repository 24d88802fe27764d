"""Copies of a run's checkpoints in a bucket, made while it trains.

At `runtime.copy_to` lies what lies in the run folder: `checkpoints/step-…/`, each manifest behind its other files, what
the run needs to go on, and `latest` last. Nothing is removed there, and `clipwright train` reads nothing from there:
copy it back into an empty folder (`aws s3 sync URL RUN`, say), and the same command with `-o RUN` goes on.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.folders import remote
from clipwright.pipeline.folders.output import IDENTITY
from clipwright.pipeline.folders.records import MANIFEST
from clipwright.pipeline.train import run_folder
from clipwright.pipeline.train.checkpoints.checkpoint import FOLDER, LATEST, saved_steps, step_name


class Copies:
    """Copies checkpoints one after another, beside the training; what failed is tried again with the next."""

    def __init__(self, run: Path, address: str) -> None:
        """address: one that `remote.reach` takes."""
        self.run, self.address = run, address.rstrip("/")
        self.busy: set[int] = set()  # steps whose folders must stay
        self._done: set[int] = set()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Copies the checkpoints that are not there yet, unless it is still at those before."""
        if self._thread is not None and self._thread.is_alive():
            return
        self.busy = saved_steps(self.run).keys() - self._done
        self._thread = threading.Thread(target=self._copy, args=(sorted(self.busy),), name="copies", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits until all are there, or one could not be copied."""
        if self._thread is not None:
            self._thread.join()
        self.start()  # what failed; what an earlier start of the run left
        assert self._thread is not None
        self._thread.join()

    def _copy(self, steps: list[int]) -> None:
        for step in steps:
            try:
                self._one(step)
            except (ClipwrightError, OSError) as error:
                found = error.found if isinstance(error, ClipwrightError) else error
                print(
                    f"warning: {step_name(step)} is not copied to {remote.shown(self.address)}: {found}; "
                    "it is tried again with the next checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                break
            self._done.add(step)
        self.busy = set()

    def _one(self, step: int) -> None:
        folder = self.run / FOLDER / step_name(step)
        if remote.holds(f"{self.address}/{FOLDER}/{folder.name}/{MANIFEST}", (folder / MANIFEST).read_bytes()):
            return  # by an earlier start of the run
        learned = (self.run / run_folder.TOKENIZER).glob("*")
        own = (self.run / name for name in (run_folder.CONFIG, run_folder.LOG, run_folder.LEDGER, IDENTITY))
        files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
        for path in [*files, folder / MANIFEST, *learned, *own]:
            remote.upload(path, f"{self.address}/{path.relative_to(self.run)}")
        remote.upload(self.run / LATEST, f"{self.address}/{LATEST}")
