"""Shared fixtures, and the rule that a test may be skipped only for a reason in allowed-skips.txt."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer
from shape_checks import install_shape_checks

install_shape_checks()
sys.modules.setdefault("conftest_root", sys.modules[__name__])
# A shell starts background jobs deaf to Ctrl-C, and so would be every command that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ALLOWED = set((Path(__file__).parent / "allowed-skips.txt").read_text(encoding="utf-8").split("\n")) - {""}
ROOT = Path(__file__).resolve().parent.parent


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):
        return
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if reason.removeprefix("Skipped: ") not in ALLOWED:
            reporter.write_line(f"not an allowed reason to skip: {report.nodeid}: {reason}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="module", autouse=True)
def _no_rank_left() -> Iterator[None]:
    """A file whose tests leave a rank's variables behind would make ranks of the commands of the next file."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    yield
    left = {name: os.environ.get(name) for name in names}
    for name in names:
        if left[name] is not None and before[name] is None:
            del os.environ[name]
    assert left == before


@functools.cache
def fork_server() -> ForkServer:
    """The one of this session."""
    folder = tempfile.TemporaryDirectory()
    server = ForkServer(Path(folder.name))
    atexit.register(folder.cleanup)
    atexit.register(server.close)
    return server


class Cli:
    """Runs `clipwright` as a user would, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self, *words: object, code: int = 0, ranks: int = 0, env: dict[str, str] | None = None, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """ranks: as by torchrun; env: what a process of its own, or torchrun itself, sees from its first import on."""
        told, around = list(map(str, words)), {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        if env is None:
            done = fork_server().run(told, self.folder, around, timeout, ranks)
        else:
            launcher = ["torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone", "-m"] if ranks else []
            done = subprocess.run(
                [sys.executable, "-m", *launcher, "clipwright", *told],
                cwd=self.folder,
                env=around,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *words: object, **options: Any) -> Any:
        """The one JSON object a command prints with --json as its only stdout."""
        return json.loads(self(*words, "--json", **options).stdout)

    def error(self, *words: object, code: int) -> str:
        """The error line of a failing command: its last line on stderr."""
        done = self(*words, code=code)
        assert "Traceback" not in done.stderr, done.stderr
        return done.stderr.strip().splitlines()[-1]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The development-only photo sets beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data")
    return folder


@dataclass
class Look:
    """What a browser made of a page."""

    errors: list[str]  # of its console and of the page
    requests: list[str]  # every address asked for but the page's own and data:
    overflow: int  # pixels by which the document is wider than the window
    text: str


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium: $CLIPWRIGHT_CHROMIUM, or the one on PATH."""
    names = (os.environ.get("CLIPWRIGHT_CHROMIUM"), "chromium", "google-chrome")
    program = next((found for name in names if name and (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium")
    from playwright.sync_api import sync_playwright

    # It neither updates nor reports: the only traffic is the page's.
    words = ("no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "disable-component-update")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=[f"--{word}" for word in words])
        yield chromium
        chromium.close()


@pytest.fixture
def look(browser: Any) -> Callable[..., Look]:
    """`look(page, width, shot=None)` opens a file in a window of that width; `shot`: where its picture goes."""

    def open_page(page: Path, width: int, shot: Path | None = None) -> Look:
        context = browser.new_context(viewport={"width": width, "height": 900})
        try:
            tab = context.new_page()
            errors: list[str] = []
            requests: list[str] = []
            tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            tab.on("pageerror", lambda error: errors.append(str(error)))
            tab.on("request", lambda request: requests.append(request.url))
            address = page.resolve().as_uri()
            tab.goto(address, wait_until="networkidle")
            overflow = tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            if shot is not None:
                tab.screenshot(path=str(shot), full_page=True)
            asked = [url for url in requests if url != address and not url.startswith("data:")]
            return Look(errors, asked, max(0, overflow), tab.inner_text("body"))
        finally:
            context.close()

    return open_page
