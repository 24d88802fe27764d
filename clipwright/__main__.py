"""The command `clipwright`, also as `python -m clipwright` and as what torchrun starts with `-m clipwright`."""

import os
import signal
import sys

INTERRUPTED = 130  # as in pipeline.core.status, which is not imported yet


def main() -> None:
    """Runs the command line; a signal while it is imported stops it in the same way as later."""
    early: list[int] = []
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: early.append(number))
        from clipwright.cli import main as run  # noqa: PLC0415

        run(early)
    except KeyboardInterrupt:
        print("interrupted before the command started: run it again", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
