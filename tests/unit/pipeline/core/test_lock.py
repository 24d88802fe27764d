"""Locks: who holds one, when it is taken over, and what happens to a holder that lost it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipwright.pipeline.core import lock
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.lock import Holder, Lock
from clipwright.pipeline.core.status import StatusFile


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.2)


def write(path: Path, **changed: Any) -> Holder:
    """Writes a lock file of this process with changed fields."""
    holder = dataclasses.replace(Holder.this_process(), **changed)
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def refusal(action: Callable[[], object]) -> ClipwrightError:
    with pytest.raises(ClipwrightError) as caught:
        action()
    assert caught.value.code == "E_LOCKED"
    return caught.value


def test_second_holder_is_refused_with_the_first_ones_name(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with Lock(path, tmp_path) as first:
        stored = json.loads(path.read_text())
        assert stored == dataclasses.asdict(first.holder) and stored["pid"] == os.getpid()
        assert list(tmp_path.iterdir()) == [path]
        error = refusal(lambda: Lock(path, tmp_path))
        assert error.where == str(tmp_path) and error.found == str(first.holder)
        assert error.found.startswith(f"process {os.getpid()} on {os.uname().nodename}, started {stored['started']}: ")
        assert error.fix.startswith(f"wait until it ends, or stop it with `kill {os.getpid()}` on ")
    assert not list(tmp_path.iterdir())
    Lock(path, tmp_path).release()


def test_lock_of_a_dead_process_is_taken_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".lock"
    monkeypatch.setattr(lock, "STALE_SECONDS", 600.0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        running = write(path, pid=child.pid, process_start=lock.process_start(child.pid))
        assert running.is_alive() and str(child.pid) in refusal(lambda: Lock(path, tmp_path)).found
        write(path, pid=child.pid, process_start="1")  # another process had this id
        Lock(path, tmp_path).release()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended; its exit code is not read
        path.write_text(json.dumps(dataclasses.asdict(running)))
        assert running.is_alive() is False
        Lock(path, tmp_path).release()


def test_lock_of_another_machine_is_taken_over_without_heartbeats(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / ".lock"
    write(path, machine="another", host="node7", pid=1)
    os.utime(path, (4e9, 4e9))  # the clock of that machine is wrong
    Lock(path, tmp_path).release()
    assert "waiting up to 0 s for a heartbeat of process 1 on node7" in capsys.readouterr().err
    path.write_text("{")  # a crash left it incomplete
    Lock(path, tmp_path).release()


def test_lock_of_another_machine_is_kept_by_its_heartbeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, times = tmp_path / ".lock", iter(range(100))
    write(path, machine="another", host="node7", pid=1)
    monkeypatch.setattr(lock, "STALE_SECONDS", 600.0)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: os.utime(path, (next(times), 5)))
    assert "process 1 on node7" in refusal(lambda: Lock(path, tmp_path)).found
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: path.unlink())  # released
    Lock(path, tmp_path).release()


def test_heartbeats_change_the_time_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    path, beaten = tmp_path / ".lock", threading.Event()
    with Lock(path, tmp_path):
        os.utime(path, (0, 0))
        monkeypatch.setattr(lock.os, "utime", lambda changed: beaten.set() if changed == path else None)
        assert beaten.wait(60)


@pytest.mark.parametrize("hard_links", [True, False])
@pytest.mark.parametrize("stale", [True, False])
def test_of_several_starts_at_once_one_holds_the_lock(
    tmp_path: Path, stale: bool, hard_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hard_links:

        def refuse_link(source: Path, target: Path) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(lock.os, "link", refuse_link)
    path, barrier, held, refused = tmp_path / ".lock", threading.Barrier(8), [], []
    if stale:
        write(path, process_start="1")

    def start() -> None:
        barrier.wait()
        try:
            held.append(Lock(path, tmp_path))
        except ClipwrightError:
            refused.append(1)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 7)
    assert json.loads(path.read_text())["token"] == held[0].holder.token
    held[0].release()
    assert not list(tmp_path.iterdir())


def test_holder_whose_lock_was_taken_over_ends_before_it_writes(tmp_path: Path) -> None:
    """As after a long pause: it publishes nothing, and leaves the lock and the other process's files alone."""
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other" / ".lock", pid=1, host="node7")
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom clipwright.pipeline.folders import output\n"
        "out = Path('out')\n"
        "with output.claim(out, output.EMBEDDING), output.staging(out / 'part-0.npy') as staged:\n"
        "    os.replace('other/.lock', out / '.lock')\n"
        "print('published')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1 and done.stdout == "", done
    assert (
        done.stderr.startswith("error[E_LOCKED]: another process has taken over this folder") and "node7" in done.stderr
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", ".part-0.npy.partial"]
    assert json.loads((tmp_path / "out" / ".lock").read_text())["token"] == other.token


def test_removed_lock_file_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with Lock(path, tmp_path) as held:
        path.unlink()
        held.verify()
        assert json.loads(path.read_text())["token"] == held.holder.token


def test_status_of_a_folder_is_its_writers(tmp_path: Path) -> None:
    """A second command that fails for another reason leaves the status alone, too."""
    (tmp_path / "status.json").write_text('{"verb": "train"}')
    write(tmp_path / ".lock")  # of this process, which runs, but not of a lock that it holds
    failed = StatusFile(tmp_path, "train")
    failed.write(2, None)
    assert (tmp_path / "status.json").read_text() == '{"verb": "train"}'
    failed.claim(tmp_path)
    failed.write(1, ClipwrightError("E_LOCKED", "lost", fix="wait"))
    assert (tmp_path / "status.json").read_text() == '{"verb": "train"}'
    failed.write(2, None)
    assert json.loads((tmp_path / "status.json").read_text())["exit_code"] == 2
    write(tmp_path / ".lock", process_start="1")  # its process has ended
    StatusFile(tmp_path, "train").write(3, None)
    assert json.loads((tmp_path / "status.json").read_text())["exit_code"] == 3


def test_lock_that_a_faster_process_took_over_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, faster, real = tmp_path / ".lock", list[Holder](), lock._exclusive

    def enter_late(locked: Path) -> Any:
        faster.append(write(locked))
        return real(locked)

    write(path, process_start="1")
    monkeypatch.setattr(lock, "_exclusive", enter_late)
    refusal(lambda: Lock(path, tmp_path))
    assert len(faster) == 1 and json.loads(path.read_text())["token"] == faster[0].token


def test_release_leaves_the_lock_of_another_process(tmp_path: Path) -> None:
    lost: list[ClipwrightError] = []
    with Lock(tmp_path / ".lock", tmp_path) as held:
        held.on_lost = lost.append
        other = write(tmp_path / ".lock", host="node7")
        held.verify(max_age_seconds=600.0)  # it was read a moment ago
        assert not lost
        held.verify()
        assert [error.code for error in lost] == ["E_LOCKED"] and "node7" in lost[0].found
    assert json.loads((tmp_path / ".lock").read_text())["token"] == other.token
