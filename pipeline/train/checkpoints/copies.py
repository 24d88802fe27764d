"""Copies of a run's checkpoints in a bucket, made during training.

The address `runtime.copy_to` then holds what the run folder holds: `checkpoints/step-…/`, each with its manifest as the
last file, the files that the run needs to resume, and `latest` as the last file of all. Nothing is removed there, and
`clipwright train` reads nothing from there: copy it into an empty folder (`aws s3 sync URL RUN`, for example), and the
same command with `-o RUN` resumes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.streams import print_warning
from clipwright.pipeline.folders import remote
from clipwright.pipeline.folders.output import IDENTITY
from clipwright.pipeline.folders.records import MANIFEST
from clipwright.pipeline.train import run_folder
from clipwright.pipeline.train.checkpoints.checkpoint import FOLDER, LATEST, saved_steps, step_name


class Copies:
    """Copies checkpoints in a thread, one after another; a failed copy is tried again with the next checkpoint."""

    def __init__(self, run: Path, address: str) -> None:
        """address: one that `remote.check_address` accepts."""
        self.run, self.address = run, address.rstrip("/")
        self.in_progress: set[int] = set()  # steps whose folders must not be removed
        self._done: set[int] = set()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts to copy the checkpoints that have not been copied, unless an earlier copy is still running."""
        if self._thread is not None and self._thread.is_alive():
            return
        self.in_progress = saved_steps(self.run).keys() - self._done
        steps = sorted(self.in_progress)
        self._thread = threading.Thread(target=self._copy_all, args=(steps,), name="copies", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits until all checkpoints are copied, or one has failed again."""
        if self._thread is not None:
            self._thread.join()
        self.start()  # those that failed, and those of an earlier start of the run
        assert self._thread is not None
        self._thread.join()
        if not saved_steps(self.run).keys() - self._done:
            with self._warned("the end of the log"):
                self._upload(self._run_files())  # what was logged since the last checkpoint

    def _copy_all(self, steps: list[int]) -> None:
        for step in steps:
            with self._warned(step_name(step)):
                self._copy(step)
                self._done.add(step)
            if step not in self._done:
                break
        self.in_progress = set()

    @contextmanager
    def _warned(self, what: str) -> Iterator[None]:
        """Turns a failed copy into a warning."""
        try:
            yield
        except (ClipwrightError, OSError) as error:
            reason = error.found if isinstance(error, ClipwrightError) else error
            print_warning(
                f"{what} was not copied to {remote.redacted(self.address)}: {reason}; "
                "it will be tried again with the next checkpoint"
            )

    def _copy(self, step: int) -> None:
        folder = self.run / FOLDER / step_name(step)
        if remote.has_content(f"{self.address}/{FOLDER}/{folder.name}/{MANIFEST}", (folder / MANIFEST).read_bytes()):
            return  # an earlier start of the run copied it
        files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
        tokenizer = sorted((self.run / run_folder.TOKENIZER).glob("*"))
        self._upload([*files, folder / MANIFEST, *tokenizer, *self._run_files(), self.run / LATEST])

    def _run_files(self) -> list[Path]:
        return [self.run / name for name in (run_folder.CONFIG, run_folder.LOG, run_folder.LEDGER, IDENTITY)]

    def _upload(self, paths: Sequence[Path]) -> None:
        for path in paths:
            remote.upload(path, f"{self.address}/{path.relative_to(self.run)}")
