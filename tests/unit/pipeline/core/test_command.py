"""What every command does alike."""

from __future__ import annotations

import subprocess
import sys


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
