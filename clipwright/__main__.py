"""The command `clipwright`, also as `python -m clipwright` and as what torchrun starts with `-m clipwright`."""

import os
import signal
import sys

INTERRUPTED, PREEMPTED = 130, 85  # as in pipeline.core.status, which is not imported yet


def main() -> None:
    """Runs the command line; a signal while it is imported stops it in the same way as later."""
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, _stop)
        from clipwright.cli import main as run  # noqa: PLC0415

        run()
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED)


def _stop(number: int, frame: object) -> None:
    _end("stopped by a signal", PREEMPTED)


def _end(what: str, code: int) -> None:
    print(f"{what} before the command started: run it again", file=sys.stderr, flush=True)
    os._exit(code)


if __name__ == "__main__":
    main()
