"""Errors of the operating system on one of many ranks: which file, which error, which rank on which host."""

from __future__ import annotations

import errno
import os

from clipwright.pipeline.core.errors import ClipwrightError


def system_error(error: OSError, rank: int, what: str = "a rank cannot read or write a file") -> ClipwrightError:
    """Returns E_SYSTEM for an error of the operating system on a rank."""
    return ClipwrightError(
        "E_SYSTEM",
        what,
        where=error.filename or f"rank {rank}",
        found=f"{error_name(error)} on {rank_name(rank)}",
        fix="check the disk or mount of this path on that host, then run the same command again to resume",
    )


def error_name(error: OSError) -> str:
    """Returns `EIO (Input/output error)`."""
    text = error.strerror or str(error) or type(error).__name__
    return f"{errno.errorcode.get(error.errno, error.errno)} ({text})" if error.errno else text


def rank_name(rank: int) -> str:
    """Returns `rank 3, host node1` for a rank of this process."""
    return f"rank {rank}, host {os.uname().nodename}"
