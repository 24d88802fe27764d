"""What every command does alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def test_a_reader_that_left_gets_no_error() -> None:
    """`clipwright config schema train | head -1`: neither a traceback nor a coded line."""
    command = [sys.executable, "-m", "clipwright", "config", "schema", "demo"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    said = child.stderr.read()
    child.stderr.close()
    assert child.wait() == 1
    assert said == ""


def test_a_name_that_is_not_utf8_is_refused_in_words(tmp_path: Path, cli: Any) -> None:
    line = cli.error("prep", "scenes", "-o", os.fsdecode(b"out\xff"), code=2)
    assert line.startswith("error[E_USAGE]") and "out\\udcff" in line and "rename" in line
    assert not any(tmp_path.iterdir())


def test_what_the_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "빨간").mkdir()
    words = ["data", "view", "빨간", "-o", "쪽", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-m", "clipwright", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == "would write \\ucabd/view.html about \\ube68\\uac04\n"
