"""Shared fixtures, and the rule that a test may be skipped only for a reason listed in allowed-skips.txt."""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer
from output_checks import SEEN, check_output, never_seen
from shape_checks import install_shape_checks

from clipwright.pipeline.core import activity

# The tests are those of a CPU, also on a machine with a GPU. Set before torch is imported, here and in commands.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
install_shape_checks()
activity.TICK_SECONDS = 3600.0  # as in the fork server
sys.modules.setdefault("conftest_root", sys.modules[__name__])
# A shell starts background jobs with SIGINT ignored, and commands that a test interrupts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ALLOWED = set((Path(__file__).parent / "allowed-skips.txt").read_text(encoding="utf-8").split("\n")) - {""}
ROOT = Path(__file__).resolve().parent.parent


def pytest_testnodedown(node: Any) -> None:
    """Called by pytest-xdist in the main process when a worker process has ended."""
    SEEN.update(getattr(node, "workeroutput", {}).get("seen", ()))


def is_complete(session: pytest.Session) -> bool:
    """Returns whether all tests were run: no files or names were given, and none was left out or stopped."""
    option = session.config.option
    given = session.config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    names = ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf")  # `lf` only with the cache's plugin
    chosen = any(getattr(option, name, None) for name in names)
    return not (given or chosen or option.collectonly or session.shouldstop or session.shouldfail)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        session.config.workeroutput["seen"] = sorted(SEEN)
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    missing = never_seen(SEEN)
    if missing and is_complete(session):
        reporter.write_line(f"no test of a command has provoked or used: {', '.join(missing)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if reason.removeprefix("Skipped: ") not in ALLOWED:
            reporter.write_line(
                f"skipped for a reason that is not in allowed-skips.txt: {report.nodeid}: {reason}", red=True
            )
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="module", autouse=True)
def _memory_is_returned() -> Iterator[None]:
    """Returns what the tests of a file have freed to the system, which keeps the peak of the whole suite low."""
    yield
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(scope="module", autouse=True)
def _no_launcher_variables_left() -> Iterator[None]:
    """Fails a file whose tests leave launcher variables set: commands of the next file would start as ranks."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    yield
    after = {name: os.environ.get(name) for name in names}
    for name in names:
        if after[name] is not None and before[name] is None:
            del os.environ[name]
    assert after == before


@functools.cache
def fork_server() -> ForkServer:
    """Returns the fork server of this session."""
    folder = tempfile.TemporaryDirectory()
    server = ForkServer(Path(folder.name))
    atexit.register(folder.cleanup)
    atexit.register(server.close)
    return server


class Cli:
    """Runs `clipwright` as a user would, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self,
        *arguments: object,
        code: int = 0,
        ranks: int = 0,
        env: dict[str, str] | None = None,
        timeout: float = 1200,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command and checks its exit code.

        ranks: number of ranks, 0 for one process without a launcher. env: variables that must be set before Python
        starts; with them the command (or torchrun) runs in a new interpreter instead of a fork.
        """
        command = [str(argument) for argument in arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        if env is None:
            done = fork_server().run(command, self.folder, environment, timeout, ranks)
        else:
            launcher = ["torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone", "-m"] if ranks else []
            done = subprocess.run(
                [sys.executable, "-m", *launcher, "clipwright", *command],
                cwd=self.folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        check_output(command, code, done.stdout, done.stderr, ranks=ranks)
        return done

    def json(self, *arguments: object, **options: Any) -> Any:
        """Returns the JSON object that a command prints with --json as its only stdout."""
        return json.loads(self(*arguments, "--json", **options).stdout)

    def error(self, *arguments: object, code: int) -> str:
        """Returns the error line of a failing command: its last line on stderr."""
        done = self(*arguments, code=code)
        assert "Traceback" not in done.stderr, done.stderr
        return done.stderr.strip().splitlines()[-1]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Returns the folder of photo sets beside the checkout, for development only."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data")
    return folder


@dataclass
class Look:
    """How a page looked in a browser."""

    errors: list[str]  # of the console and of the page
    requests: list[str]  # all requested addresses except the page's own and data: URLs
    overflow: int  # pixels by which the document is wider than the window
    text: str


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Starts headless Chromium: $CLIPWRIGHT_CHROMIUM, or the one on PATH."""
    names = [os.environ.get("CLIPWRIGHT_CHROMIUM", ""), "chromium", "google-chrome"]
    programs = [path for path in map(shutil.which, filter(None, names)) if path is not None]
    if not programs:
        pytest.skip("no Chromium")
    from playwright.sync_api import sync_playwright

    # Without updates and reports, so that all traffic is the page's.
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=programs[0], args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def look(browser: Any) -> Callable[..., Look]:
    """Returns `look(page, width, screenshot=None)`, which opens a file in a window of that width."""

    def open_page(page: Path, width: int, screenshot: Path | None = None) -> Look:
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
            if screenshot is not None:
                tab.screenshot(path=str(screenshot), full_page=True)
            others = [url for url in requests if url != address and not url.startswith("data:")]
            return Look(errors, others, max(0, overflow), tab.inner_text("body"))
        finally:
            context.close()

    return open_page
