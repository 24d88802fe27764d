"""The command `clipwright`, also as `python -m clipwright` and as what torchrun starts with `-m clipwright`."""

import json
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
        what, fix = "interrupted before the command started", "run it again"
        if "--json" in sys.argv:
            error = {"code": "E_INTERRUPTED", "what": what, "where": "", "found": "", "allowed": "", "fix": fix}
            print(json.dumps({"error": error}, sort_keys=True), flush=True)
        print(f"{what}: {fix}", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
