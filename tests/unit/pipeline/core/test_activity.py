"""Progress and phases on a terminal, in a job's log, and when interrupted."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipwright.pipeline.core import activity, streams
from clipwright.pipeline.core.activity import Progress

# Processes five items and prints a line in the middle; waits at item 3 while a file named gate exists.
WORK = """
import os, sys, time
from clipwright.pipeline.core.activity import Progress
from clipwright.pipeline.core.streams import print_result
with Progress("count", 5, "thing", quiet="--quiet" in sys.argv) as progress:
    for number in range(5):
        progress.add(1, failed=number == 1)
        if number == 2:
            print_result("a line of text")
        if number == 3 and "--blunt" in sys.argv:
            print("not above the bar", flush=True)
        time.sleep(0.05)
        while number == 2 and os.path.exists("gate"):
            time.sleep(0.02)
print("done", flush=True)
"""
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
COLOR = re.compile(r"\x1b\[[\d;]*(3[0-8]|4[0-8]|9[0-7]|10[0-7])[\d;]*m")


class Terminal:
    """A child process whose stderr (and stdout, unless it is redirected) is a pseudo-terminal."""

    def __init__(self, folder: Path, *arguments: str, stdout: int | None = None, **env: str) -> None:
        self.master, inside = os.openpty()
        drop = ("NO_COLOR", "FORCE_COLOR", "TERM", "COLORTERM", "TTY_COMPATIBLE")
        environment = {k: v for k, v in os.environ.items() if k not in drop}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORK, *arguments],
            cwd=folder,
            stderr=inside,
            stdout=inside if stdout is None else stdout,
            env={**environment, "TERM": "xterm-256color", **env},
        )
        os.close(inside)
        self.text = ""

    def read(self, until: str | None = None) -> str:
        """Returns everything that the child prints, or everything until `until` appears."""
        deadline = time.monotonic() + 600
        while until is None or until not in self.text:
            assert time.monotonic() < deadline, self.text
            try:
                data = os.read(self.master, 4096)
            except OSError:  # the child has closed its end
                break
            if not data:
                break
            self.text += data.decode()
        if until is None:
            os.close(self.master)
            self.process.wait(timeout=600)
        return self.text


def test_terminal_bar_is_erased_at_the_end(tmp_path: Path) -> None:
    text = Terminal(tmp_path).read()
    assert HIDE in text and text.rindex(SHOW) > text.rindex(HIDE)
    assert COLOR.search(text) and "count (things)" in text and re.search(r"eta \d+s", text) and "failed 1" in text
    assert re.search(r"[1-5]/5", text)
    last = text[text.rindex(SHOW) :]
    assert "done" in last and "count" not in last
    # The line is printed on its own line: the bar was erased before.
    before = text[: text.index("a line of text")]
    assert before.rindex("\x1b[2K") > before.rindex("count (things)")


def test_no_color_is_honored(tmp_path: Path) -> None:
    text = Terminal(tmp_path, NO_COLOR="1").read()
    assert "count (things)" in text and not COLOR.search(text)


def test_redirected_stdout_stays_out_of_the_terminal(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        text = Terminal(tmp_path, "--blunt", stdout=out.fileno()).read()
    assert (tmp_path / "out").read_text() == "a line of text\nnot above the bar\ndone\n"
    assert "count (things)" in text and "a line of text" not in text and "not above" not in text


def test_quiet_shows_no_progress(tmp_path: Path) -> None:
    assert Terminal(tmp_path, "--quiet").read().replace("\r\n", "\n") == "a line of text\ndone\n"


def test_interrupt_restores_the_cursor(tmp_path: Path) -> None:
    (tmp_path / "gate").touch()
    terminal = Terminal(tmp_path)
    terminal.read("a line of text")
    terminal.read("3/5")
    terminal.process.send_signal(signal.SIGINT)
    text = terminal.read()
    assert text.rindex(SHOW) > text.rindex(HIDE) and "done" not in text
    assert "count (things)" not in text[text.rindex(SHOW) :]


def test_interrupt_during_the_first_draw_restores_the_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    def interrupt(thread: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stderr", screen := Screen())
    monkeypatch.setattr("rich.live._RefreshThread.start", interrupt)
    for name in ("NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    with pytest.raises(KeyboardInterrupt), Progress("count", 5, "thing"):
        pass
    text = screen.getvalue()
    assert HIDE in text and text.rindex(SHOW) > text.rindex(HIDE)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which a test moves; the thread that shows activities sleeps."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(activity, "TICK_SECONDS", 3600)
    return now


def test_without_a_terminal_progress_is_plain_lines_at_intervals(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with Progress("prep", 4000, "row", interval=10) as progress:
        for _ in range(8):
            clock[0] += 4
            progress.add(100, failed=1)
            activity._display.tick()
        streams.print_result("a line of text")
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "prep 300/4,000 rows  25/s  eta 2m28s  failed 3",
        "prep 600/4,000 rows  25/s  eta 2m16s  failed 6",
    ]
    assert printed.out == "a line of text\n"


def test_rate_and_time_left_appear_when_they_are_known(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    """Work that was done earlier does not count toward the rate."""
    with Progress("prep", 100_000, "row", already_done=9000) as progress:
        clock[0] += 10
        activity._display.tick()
        progress.add(10)
        clock[0] += 10
        activity._display.tick()
    with Progress("prep", 1, "query", plural="queries", interval=60) as progress:
        clock[0] += 10
        activity._display.tick()  # nothing is done yet: the first line comes after the usual interval
        progress.add(1)
        clock[0] += 50
        activity._display.tick()
        clock[0] += 20
        activity._display.tick()
    with Progress("prep", 100_000, "row", quiet=True) as progress:
        clock[0] += 20
        progress.add(10)
        activity._display.tick()
    assert capsys.readouterr().err.splitlines() == [
        "prep 9,000/100,000 rows",
        "prep 9,010/100,000 rows  30.0/min  eta 50h33m",
        "prep 0/1 query",
        "prep 1/1 query  45.0/h",
    ]


def test_a_phase_is_shown_until_the_next_message(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with activity.working("train", hidden=False):
        for number in range(3):  # phases shorter than the interval
            activity.phase(f"part {number} of \x1b[31m")
            clock[0] += 6
            activity._display.tick()
        streams.print_note("a message")
        clock[0] += 6
        activity._display.tick()  # the message was a sign
        with Progress("eval", 10, "image") as progress:
            progress.add(4)
            clock[0] += 6
            activity._display.tick()
        clock[0] += 10
        activity._display.tick()
        activity.hide()
        clock[0] += 20
        activity._display.tick()
    clock[0] += 20
    activity._display.tick()
    with activity.working("train", hidden=True):
        clock[0] += 20
        activity._display.tick()
    assert capsys.readouterr().err.splitlines() == [
        "train: part 1 of \\x1b[31m (6s)",
        "a message",
        "eval 4/10 images  40.0/min  eta 9s",
        "train: finishing (10s)",
    ]


def test_an_inner_part_is_shown_in_place_of_the_progress_around_it(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with activity.working("train", hidden=False), Progress("train", 100, "sample", interval=60) as progress:
        progress.add(10)
        with activity.during("validation at step 10"):
            clock[0] += 12
            activity._display.tick()
        clock[0] += 12
        activity._display.tick()
    assert capsys.readouterr().err.splitlines() == ["train: validation at step 10 (12s)"]


def test_a_forked_process_shows_nothing_of_its_parent(clock: list[float]) -> None:
    with activity.working("train", hidden=False):
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            os.write(writer, b"idle" if not activity._display.activities else b"busy")
            os._exit(0)
        os.waitpid(pid, 0)
        assert os.read(reader, 4) == b"idle"
