"""Lock files: one process at a time writes a folder.

A lock file names its holder as JSON: host, process, start time, command. The holder changes the file's time every
HEARTBEAT_SECONDS. A holder on this machine is judged by its process: a lock whose process has ended is taken over at
once. The lock of another machine is taken over if its time does not change for STALE_SECONDS, measured by the clock of
the process that waits; clocks of two machines are never compared. A holder whose lock was taken over stops before it
writes more.
"""

from __future__ import annotations

import dataclasses
import datetime
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import PARTIAL
from clipwright.pipeline.core.streams import print_note

LOCK = ".lock"
HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0  # without a heartbeat, after which a process on another machine counts as dead
POLL_SECONDS = 0.5
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    token: str  # of this acquisition
    host: str
    machine: str  # processes of the same value see each other's ids
    pid: int
    process_start: str  # distinguishes the process from a later one of the same id
    started: str  # UTC
    command: str

    @classmethod
    def this_process(cls) -> Holder:
        import psutil  # noqa: PLC0415  30 ms that only commands which write a folder pay

        pid = os.getpid()
        started = datetime.datetime.fromtimestamp(psutil.Process(pid).create_time(), datetime.UTC)
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_machine(),
            pid=pid,
            process_start=process_start(pid) or "",
            started=started.isoformat(timespec="seconds"),
            command=shlex.join(["clipwright", *sys.argv[1:]]),
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}: {self.command}"

    def is_alive(self) -> bool | None:
        """Whether the process runs; None if it is on another machine."""
        if self.machine != _machine():
            return None
        return process_start(self.pid) == self.process_start


@dataclass(frozen=True)
class LockState:
    """A lock file as read. `holder` is None while it is incomplete: on a file system without hard links."""

    holder: Holder | None
    changed: int  # modification time, compared for equality only


def process_start(pid: int) -> str | None:
    """Returns the start time of a running process in the unit of the system, or None if there is no such process.

    A process that has ended counts as gone, although its parent has not read its exit code.
    """
    try:
        # In clock ticks since boot: psutil's time of day changes when the clock is set.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    import psutil  # noqa: PLC0415

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.NoSuchProcess:
        return None


def _machine() -> str:
    """Identifies the boot of this machine and, of its containers, the one that this process runs in."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return socket.gethostname()


class Lock:
    """A lock file that this process holds until `release` or the end of a `with` block.

    Raises E_LOCKED if another process holds it. folder: the folder that it protects, for messages. on_lost: called
    with E_LOCKED, by any thread, once another process has taken it over; it must end the process.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        self.holder = Holder.this_process()
        self.on_lost: Callable[[ClipwrightError], None] = end_process
        self._guard = threading.RLock()
        self._acquire()
        _held[self.holder.token] = self
        self._checked = time.monotonic()
        self._released = threading.Event()
        threading.Thread(target=self._send_heartbeats, name="lock", daemon=True).start()

    def release(self) -> None:
        with self._guard:
            self._released.set()
            _held.pop(self.holder.token, None)
            with suppress(OSError), _exclusive(self.path):
                state = _read(self.path)
                if state is not None and state.holder == self.holder:
                    self.path.unlink()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _acquire(self) -> None:
        while not _create(self.path, self.holder):
            stale = refuse_if_held([self.path], self.folder)
            if self.path not in stale:  # released meanwhile
                continue
            with suppress(FileNotFoundError), _exclusive(self.path):
                if _read(self.path) == stale[self.path]:  # no other process was faster
                    _staged(self.path, self.holder).replace(self.path)
                    return

    def _send_heartbeats(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            self.verify()
            with suppress(OSError):
                os.utime(self.path)

    def verify(self, max_age_seconds: float = 0.0) -> None:
        """Calls `on_lost` if another process has taken over the lock."""
        with self._guard:
            if self._released.is_set() or time.monotonic() - self._checked < max_age_seconds:
                return
            self._checked = time.monotonic()
            try:
                state = _read(self.path)
                if state is None:  # somebody has removed the file
                    _create(self.path, self.holder)
                    return
            except OSError:  # of the file system; tried again at the next heartbeat
                return
            if state.holder in (None, self.holder):
                return
        error = ClipwrightError(
            "E_LOCKED",
            "another process has taken over this folder, so this one stops",
            where=self.folder,
            found=f"{state.holder}; this process was paused or had no access for {STALE_SECONDS:.0f} s",
            fix="let the other process continue",
        )
        self.on_lost(error)  # without the guard: another thread may end the process


_held: dict[str, Lock] = {}


def verify_held(max_age_seconds: float = 0.0) -> None:
    """Ends the process if another one has taken over a folder that it is writing.

    max_age_seconds: a lock file that was read this short a time ago is not read again.
    """
    for lock in list(_held.values()):
        lock.verify(max_age_seconds)


def release_held() -> None:
    """Releases all locks of this process, which is about to end without leaving its `with` blocks."""
    for lock in list(_held.values()):
        lock.release()


def _print_error(error: ClipwrightError) -> None:
    print_note(error)


# Prints the error of a lost lock; a command sets its own.
report_lost: Callable[[ClipwrightError], None] = _print_error


def end_process(error: ClipwrightError) -> None:
    """Ends this process at once, without any cleanup: the folder belongs to another process now."""
    try:
        report_lost(error)
    finally:
        os._exit(error.exit_code)


def held_by_other(path: Path) -> bool:
    """Whether another process that may be running holds a lock."""
    state = _read(path)
    if state is None or state.holder is None or state.holder.token in _held:
        return False
    return state.holder.is_alive() is not False


def refuse_if_held(paths: Iterable[Path], folder: Path) -> dict[Path, LockState]:
    """Raises E_LOCKED if a running process holds one of the locks; returns the states of those that may be taken over.

    Waits up to STALE_SECONDS for heartbeats of other machines.
    """
    states = {path: state for path in paths if (state := _read(path)) is not None}
    watched: list[Path] = []
    for path, state in states.items():
        alive = None if state.holder is None else state.holder.is_alive()
        if alive:
            raise _locked(folder, state)
        if alive is None:
            watched.append(path)
    deadline = time.monotonic() + STALE_SECONDS
    if watched:
        holder = states[watched[0]].holder or "the process that holds the lock"
        print_note(f"waiting up to {STALE_SECONDS:.0f} s for a heartbeat of {holder}")
    while watched and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        for path in list(watched):
            state = _read(path)
            if state is None:  # released
                watched.remove(path)
                del states[path]
            elif state != states[path]:
                raise _locked(folder, state)
    return states


def _locked(folder: Path, state: LockState) -> ClipwrightError:
    holder = state.holder
    if holder is None:
        found, stop = "its lock file is incomplete", "wait until it ends"
    else:
        found, stop = str(holder), f"wait until it ends, or stop it with `kill {holder.pid}` on {holder.host}"
    return ClipwrightError(
        "E_LOCKED",
        "another process is writing this folder",
        where=folder,
        found=found,
        fix=f"{stop}; or name another folder",
    )


def _read(path: Path) -> LockState | None:
    """Returns the state of a lock file, or None if there is none."""
    try:
        # Opened, not only stat'ed: NFS then asks the server.
        with path.open("rb") as file:
            changed, text = os.fstat(file.fileno()).st_mtime_ns, file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return LockState(Holder(**json.loads(text)), changed)
    except (ValueError, TypeError):
        return LockState(None, changed)


def _create(path: Path, holder: Holder) -> bool:
    """Makes the lock file if there is none; returns whether it did. Of processes that try at once, one succeeds."""
    staged = _staged(path, holder)
    try:
        os.link(staged, path)
    except FileExistsError:
        return False
    except FileNotFoundError:  # another process has removed staged files
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        try:
            with path.open("xb") as file:
                file.write(staged.read_bytes())
        except FileExistsError:
            return False
    finally:
        staged.unlink(missing_ok=True)
    return True


def _staged(path: Path, holder: Holder) -> Path:
    """Writes a holder into a file beside the lock file."""
    staged = path.with_name(f".{path.name}.{holder.token[:8]}{PARTIAL}")
    staged.write_text(json.dumps(dataclasses.asdict(holder)) + "\n", encoding="utf-8")
    return staged


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Lets one process at a time replace or remove a lock file, on file systems that have `flock`.

    Elsewhere two processes may replace the lock of a dead one at the same instant; the slower one stops at its next
    heartbeat.
    """
    with path.open("rb+") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
