"""How a command ended: its exit code, and the `status.json` in its output folder."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import socket
import sys
from pathlib import Path

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import write_json
from clipwright.pipeline.core.lock import LOCK, held_by_other

STATUS = "status.json"
DONE, FAILED, INTERRUPTED, PREEMPTED = 0, 1, 130, 85
# Exit codes of a stop that was asked for → the error that status.json and --json state.
STOPPED = {INTERRUPTED: ("E_INTERRUPTED", "interrupted"), PREEMPTED: ("E_STOPPED", "stopped by a signal")}


def stop_error(code: int, fix: str) -> ClipwrightError:
    """Returns what `status.json` and --json state about a stop that was asked for; code: its exit code."""
    name, what = STOPPED[code]
    return ClipwrightError(name, what, fix=fix)


def stop_line(error: ClipwrightError) -> str:
    """Returns a stop that was asked for in one line; it is no error."""
    return f"{error.what}: {error.fix}"


class StatusFile:
    """The `status.json` of an output folder: which folder, and whether this process writes it.

    It is written if the folder belongs to this command: absent, empty or started by the same verb before the command,
    or claimed by it since. A command that was refused must not leave a status in a folder of another one.
    """

    def __init__(self, folder: Path | None, verb: str, *, enabled: bool = True) -> None:
        self.folder = folder
        self.verb = verb
        self.enabled = enabled
        self._owned = self._is_own()
        self._claimed = False
        self._started = datetime.datetime.now(datetime.UTC)

    def claim(self, folder: Path) -> None:
        """Makes `folder` this command's: its status file is written however the command ends."""
        self.folder = folder
        self._owned = self._claimed = True

    def disable(self) -> None:
        """Leaves the status file to the command or process that does the complete work."""
        self.enabled = False

    def enable(self) -> None:
        """Makes this process write the status file although it is not rank 0, which has died."""
        self.enabled = self._claimed = True

    def write(self, code: int, error: ClipwrightError | None) -> None:
        """Writes the file, unless it is not this process's to write."""
        folder = self.folder
        if folder is None or not self.enabled or not folder.is_dir():
            return
        if (error is not None and error.code == "E_LOCKED") or (not self._claimed and held_by_other(folder / LOCK)):
            return  # another process is writing the folder
        stopped_first = code in STOPPED and not (folder / STATUS).exists()
        if not (self._owned or code == DONE or stopped_first):
            return
        status = {
            "command": shlex.join(["clipwright", *sys.argv[1:]]),
            "verb": self.verb,
            "started": self._started.isoformat(timespec="seconds"),
            "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "folder": str(Path.cwd()),
            "versions": _versions(),
            "exit_code": code,
            "error": None if error is None else error.to_dict(),
        }
        write_json(folder / STATUS, status)

    def _is_own(self) -> bool:
        if self.folder is None or not self.folder.exists():
            return True
        if not self.folder.is_dir():
            return False
        if all(path.name == LOCK for path in self.folder.iterdir()):
            return True
        return status_verb(self.folder) == self.verb


def status_verb(folder: Path) -> str | None:
    """The verb of the command that wrote the status file of a folder; None if there is no valid one."""
    try:
        return json.loads((folder / STATUS).read_text(encoding="utf-8"))["verb"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _versions() -> dict[str, str]:
    """Versions of the libraries that this process has loaded."""
    names = ("torch", "deepspeed", "webdataset", "accelerate", "numpy", "pyarrow", "PIL", "faiss")
    versions = {"python": platform.python_version()}
    for name in names:
        if name in sys.modules:
            versions[name] = str(getattr(sys.modules[name], "__version__", "?"))
    return versions
