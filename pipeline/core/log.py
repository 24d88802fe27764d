"""What a person reads while a command runs: words, plain progress lines, and no noise from libraries."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings


def quiet_libraries() -> None:
    """Silences notices that ask nothing of the user; a warning that is shown means: act."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("deepspeed", "DeepSpeed", "accelerate", "transformers", "torch.distributed", "webdataset"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)(\.|$)")
    warnings.filterwarnings("ignore", message=r".*untested.*optimizer.*")


class Progress:
    """One plain line per interval on stderr: done/total, rate, ETA, and what failed."""

    def __init__(self, what: str, total: int | None, unit: str, *, quiet: bool = False, interval: float = 10.0) -> None:
        self.what, self.total, self.unit, self.quiet, self.interval = what, total, unit, quiet, interval
        self.started = self.last = time.monotonic()
        self.done = self.failed = 0

    def add(self, done: int, failed: int = 0) -> None:
        self.done += done
        self.failed += failed
        now = time.monotonic()
        if now - self.last >= self.interval:
            self.last = now
            self.line(now)

    def line(self, now: float) -> None:
        if self.quiet:
            return
        rate = self.done / max(now - self.started, 1e-9)
        of = f"/{self.total}" if self.total is not None else ""
        left = f"  eta {(self.total - self.done) / rate:.0f} s" if self.total is not None and rate > 0 else ""
        bad = f"  failed {self.failed}" if self.failed else ""
        print(f"{self.what} {self.done}{of} {self.unit}  {rate:.0f}/s{left}{bad}", file=sys.stderr, flush=True)
