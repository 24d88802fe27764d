"""`clipwright report FOLDER`: finds out what a folder holds and writes its page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipwright.pipeline.core.command import Call, Outcome
from clipwright.pipeline.core.config_files import read_yaml
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import atomic_write
from clipwright.pipeline.core.messages import command_line
from clipwright.pipeline.folders import output
from clipwright.pipeline.folders.output import CONFIG, REPORT_PAGE
from clipwright.pipeline.train.run_folder import LOG

# A folder's page: numbers for --json, a line of text, the command that usually follows, and a function that makes it.
Page = tuple[dict[str, Any], str, str, Callable[[], str]]


def report(call: Call) -> Outcome:
    """Runs the command. Raises E_INPUT for a folder without anything to report; an older page is then kept."""
    folder = Path(call.config or "demo")
    if call.out is not None:
        output.check(call.out, output.INSPECTION)
    out = call.out or folder
    numbers, text, next_command, make = _page(folder)
    if call.dry_run:
        return Outcome(numbers, f"would write {out / REPORT_PAGE}")
    page = make()
    if call.out is None:
        atomic_write(out / REPORT_PAGE, page)
    else:
        with output.claim(out, output.INSPECTION):
            atomic_write(out / REPORT_PAGE, page)
    size = len(page.encode())
    result = {"page": str(out / REPORT_PAGE), "bytes": size, **numbers}
    return Outcome(result, f"{result['page']}, {size / 1e6:.1f} MB{text}", next=next_command)


def _page(folder: Path) -> Page:
    if not folder.is_dir():
        raise ClipwrightError(
            "E_INPUT",
            "the folder does not exist",
            where=folder,
            found="it is a file" if folder.exists() else "no such folder",
            fix="name a run folder, the folder of an evaluation report, or a demo folder (`clipwright demo -o DIR`)",
        )
    if (folder / LOG).is_file() or _has_section(folder, "schedule"):
        return _run(folder)
    if _has_section(folder, "benchmark"):
        return _evaluation(folder)
    if _has_section(folder, "steps") or (folder / "run").is_dir():
        return _demo(folder)
    holds = ", ".join(sorted(path.name for path in folder.iterdir())[:3]) or "nothing"
    raise ClipwrightError(
        "E_INPUT",
        "the folder holds nothing to report",
        where=folder,
        found=f"it holds {holds}",
        fix="name the folder of `clipwright train -o`, of `clipwright eval -o`, or of `clipwright demo -o`",
    )


def _has_section(folder: Path, key: str) -> bool:
    """Whether the folder's config has `key`, by which the command that wrote it is known."""
    try:
        return key in read_yaml(folder / CONFIG)
    except ClipwrightError:  # there is no config, or it cannot be read
        return False


def _run(folder: Path) -> Page:
    from clipwright.eval.report import run_page  # noqa: PLC0415  imports torch, which the other pages do not need
    from clipwright.eval.report.run_folder import RunFolder  # noqa: PLC0415

    run = RunFolder(folder)
    numbers = run_page.headline(run)
    text = f": {numbers['state']}, step {numbers['step']:,} of {numbers['steps']:,}"
    finished = numbers["state"] == "finished"
    follows = command_line("export", folder, "-o", "MODEL") if finished else ""
    return numbers, text, follows, lambda: run_page.make_page(run)


def _evaluation(folder: Path) -> Page:
    from clipwright.eval.report import evaluation_page  # noqa: PLC0415

    body = evaluation_page.read_report(folder)
    return evaluation_page.headline(body), "", "", lambda: evaluation_page.make_page(folder, body)


def _demo(folder: Path) -> Page:
    from clipwright.eval.demo.page import make_page  # noqa: PLC0415
    from clipwright.eval.demo.results import Demo  # noqa: PLC0415

    demo = Demo(folder)
    return demo.headline(), "", command_line("search", folder / "index", "text=a red circle"), lambda: make_page(demo)
