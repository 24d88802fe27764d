"""`report FOLDER`: pages of runs in every state, of evaluation reports, and the folders that it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipwright.eval.report.run_folder import RunFolder
from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.core.files import write_json
from clipwright.pipeline.core.lock import LOCK, Lock
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.folders.records import write_manifest
from clipwright.pipeline.train.config import RunConfig

ENDED = "2999-01-01T10:05:00+00:00"  # later than the log, which the test writes now
HOSTILE = "<script>document.title='owned'</script>"
MakeRun = Callable[..., Path]


def record(step: int, **numbers: Any) -> dict[str, Any]:
    usual = {
        "step": step,
        "samples": 16 * step,
        "loss": 3.0 / step,
        "grad_norm": 2.0,
        "acc_image": 0.5,
        "acc_text": 0.25,
        "negatives": 15,
        "scale": 20.0,
        "lr": 1e-4,
        "replaced": 0,
        "skipped": 0,
        "samples_per_s": 32.0,
        "data_share": 0.01,
        "memory_gb": 0.5,
    }
    return {**usual, **numbers}


def write_log(run: Path, lines: list[dict[str, Any] | str]) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    (run / "log.jsonl").write_text("".join(texts))


def write_status(run: Path, code: int, message: str = "", **fields: Any) -> None:
    name, _, what = message.removeprefix("error[").partition("]: ")
    error = {"code": name, "what": what} if message else None
    body = {"command": "clipwright train -o run", "verb": "train", "started": "2026-01-01T10:00:00+00:00"}
    body |= {"ended": ENDED, "host": "a-host", "versions": {"python": "3.11.7", "torch": "2.13.0"}}
    write_json(run / "status.json", {**body, "exit_code": code, "error": error, **fields})


@pytest.fixture
def make_run(tmp_path: Path, small: Path) -> MakeRun:
    def make(lines: list[dict[str, Any] | str], *overrides: str, data: object = small) -> Path:
        run = tmp_path / "run"
        run.mkdir()
        settings = [f"data.train={data}", "schedule.global_batch=16", "schedule.samples=960", "image.name=vit_nano"]
        (run / "config.yaml").write_text(resolve(RunConfig, overrides=[*settings, *overrides]).yaml())
        write_json(run / "identity.json", {"data": {"train": Dataset(small).fingerprint}})
        write_log(run, lines)
        return run

    return make


def page_of(cli: Any, folder: Path, *arguments: object) -> tuple[dict[str, Any], str]:
    done = cli("report", folder, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    text = Path(result["page"]).read_text(encoding="utf-8")
    assert result["bytes"] == len(text.encode()) <= 3_000_000
    return result, text.replace("\N{NO-BREAK SPACE}", " ")


def curves(text: str) -> dict[str, dict[str, Any]]:
    """The data of each curve by its figure's title."""
    found = re.findall(r'aria-label="(.*?)\. [^"]*" data-curve="([^"]*)"', text)
    return {title: json.loads(data.replace("&#34;", '"')) for title, data in found}


def test_page_of_a_finished_run_has_its_curves_marks_checkpoints_and_config(cli: Any, make_run: MakeRun) -> None:
    lines: list[dict[str, Any] | str] = [record(step, skipped=int(step >= 40)) for step in range(1, 61)]
    lines[30] = record(31, resumed=30, accepted=["optim.lr: 0.001 → 0.0001"])
    for step, i2t, t2i in ((20, 0.5, 0.3), (40, 0.7, 0.5), (60, 0.6, 0.5)):
        scores = {f"val_{way}_r{k}": value for way, value in (("i2t", i2t), ("t2i", t2i)) for k in (1, 5, 10)}
        lines[step - 1] = record(step, skipped=int(step >= 40), **scores)
    run = make_run(lines, "optim.lr=1e-4", "runtime.validation=held-out")
    write_status(run, 0)
    for step, figures in ((30, {}), (60, {"val_i2t_r1": 0.6})):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        files = {"model.safetensors": {"bytes": 2_000_000, "sha256": "0"}, "loss.safetensors": {"bytes": 500_000}}
        body = {"step": step, "samples": 16 * step, "world": 4, "zero": 1, "figures": figures, "files": files}
        write_manifest(folder, "checkpoint", "c" * 64, body)
    (run / "latest").write_text("step-00000060\n")
    result, text = page_of(cli, run)
    assert (result["state"], result["step"], result["steps"]) == ("finished", 60, 60)
    assert (result["best_step"], result["best_recall_at_1"], result["loss"]) == (40, pytest.approx(0.6), 0.05)
    assert "Done: step 60 of 60." in text and "The loss goes from 3 to 0.05." in text
    assert "50 % of the images" in text and "25 % of the captions" in text and "Its ceiling is 100." in text
    assert "1 step skipped" in text and "Dashed vertical lines: the run was resumed." in text
    assert "Ticks at the bottom: steps were skipped." in text and "optim.lr: 0.001 → 0.0001" in text
    assert "Training time</dt><dd>30s" in text  # 960 samples at 32 per second
    assert (
        "Highest mean of both directions 60 % at step 40 (◇)." in text and "On the held-out dataset held-out." in text
    )
    drawn = curves(text)
    assert {"Loss", "Accuracy within the batch", "Learning rate", "Logit scale", "Gradient norm"} <= drawn.keys()
    assert {"Speed", "Wait for data", "Memory", "Recall@1", "Recall@5", "Recall@10"} <= drawn.keys()
    assert drawn["Loss"]["x"] == [16 * step for step in range(1, 61)] and drawn["Loss"]["lines"]["loss"][1] == 1.5
    assert drawn["Recall@1"]["lines"] == {"image → text": [50, 70, 60], "text → image": [30, 50, 50]}
    assert drawn["Recall@1"]["x"] == [320, 640, 960]
    assert f"chance: {math.log(16):.2f}" in text
    # One table per figure, and one more fold with the complete config.
    assert text.count("As a table") == len(drawn) and text.count("<details>") == len(drawn) + 1
    assert ">2.5</td>" in text and text.count(">latest<") == 1
    changed = re.findall(r"<td><code>([\w.]+)</code></td><td><code>", text)
    assert {"optim.lr", "schedule.samples", "schedule.global_batch"} <= set(changed) and "data.streams" not in changed
    assert "optim.betas" not in changed and "preprocessing.mean" not in changed
    assert text.count("data:image/jpeg") == 7 and "a red image, number 0" in text  # all samples of the dataset
    assert "a-host" in text and "torch 2.13.0" in text and text.count("<script") == 1
    for anchor in ("training", "validation", "data", "checkpoints", "config", "environment"):
        assert f'<section id="{anchor}">' in text and f'href="#{anchor}"' in text


@pytest.mark.parametrize(
    ("steps", "status", "word", "pieces"),
    [
        (60, (0, ""), "finished", ["Done: step 60 of 60."]),
        (60, (2, "error[E_RESUME]: another config"), "finished", ["exit code 2: error[E_RESUME]: another config"]),
        (9, (85, ""), "stopped", ["At step 9 of 60, by SIGTERM or SIGUSR1", "same command again"]),
        (9, (130, ""), "stopped", ["by Ctrl-C"]),
        (9, (0, ""), "stopped", ["runtime.stop_at"]),
        (9, (1, "error[E_NONFINITE]: no"), "failed", ["exit code 1: error[E_NONFINITE]: no"]),
        (0, (3, "error[E_INPUT]: nothing"), "failed", ["At step 0 of 60"]),
        (9, None, "unfinished", ["At step 9 of 60", "Its processes were killed"]),
        (60, None, "finished", ["did not write its status"]),
    ],
)
def test_state_of_a_run(
    make_run: MakeRun, steps: int, status: tuple[int, str] | None, word: str, pieces: list[str]
) -> None:
    run = make_run([record(step) for step in range(1, steps + 1)])
    if status is not None:
        write_status(run, *status)
    state = RunFolder(run).state()
    assert state.word == word
    for piece in pieces:
        assert piece in state.text


def test_status_older_than_the_log_is_of_an_earlier_start(make_run: MakeRun) -> None:
    run = make_run([record(1), record(2)])
    write_status(run, 130, ended="2026-01-01T10:05:00+00:00")
    assert RunFolder(run).state().word == "unfinished"


def test_log_with_odd_lines_makes_a_correct_page(cli: Any, make_run: MakeRun) -> None:
    lines: list[dict[str, Any] | str] = [record(1, extra=0.5), "not json\n", record(2, loss=None), "[1]\n"]
    lines += [record(9), record(3, loss=math.nan), record(4, loss=math.inf, scale=None), '{"step": 5, "los']
    run = make_run(lines, data="s3://bucket/shards")
    with Lock(run / LOCK, run):
        assert page_of(cli, run, "-o", run.parent / "page")[0]["state"] == "training"
    result, text = page_of(cli, run, "-o", run.parent / "page")
    assert result["page"] == str(run.parent / "page" / "report.html") and not (run / "report.html").exists()
    # Step 9 was logged before the run was resumed at step 2.
    assert (result["state"], result["step"], result["loss"]) == ("unfinished", 4, 3.0)
    assert "3 lines of the log could not be read" in text and "The loss is 3." in text
    assert curves(text)["Loss"]["lines"]["loss"] == [3.0, None, None, None]
    assert curves(text)["extra"]["lines"]["extra"] == [0.5, None, None, None]
    assert "s3://bucket/shards is remote and was not read." in text
    write_log(run, [record(1, loss=None, grad_norm=math.nan)])
    text = page_of(cli, run)[1]
    assert text.count("No finite value was logged.") == 2 and "Speed" in curves(text)


def test_long_log_is_thinned(cli: Any, make_run: MakeRun) -> None:
    run = make_run([record(step) for step in range(1, 3001)], "schedule.samples=48000")
    _, text = page_of(cli, run)
    for curve in curves(text).values():
        assert len(curve["x"]) == 500 and curve["x"][-1] == 48000
    assert text.count("<tr><td class") < 41 * len(curves(text)) and "thousand training samples" in text


def test_training_data_is_shown_or_its_absence_stated(
    cli: Any, make_run: MakeRun, make_dataset: Any, tmp_path: Path
) -> None:
    data = make_dataset(tmp_path / "elsewhere" / "data", 5, broken=2)
    run = make_run([], data="data")
    text = page_of(cli, run)[1]
    assert "data cannot be read: the dataset folder does not exist, no such folder in " in text
    assert "No step was logged yet." in text and "None was saved yet." in text
    assert "runtime.validation names no held-out dataset" in text
    write_status(run, 130, folder=str(data.parent))
    text = page_of(cli, run)[1]
    assert "data has changed since the run was started" in text and "the image cannot be decoded" in text
    assert text.count("data:image/jpeg") == 4
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        config.replace("train: data\n", f"train: [{{path: {data}, weight: 1}}, {{path: gone, weight: 1}}]\n")
    )
    text = page_of(cli, run)[1]
    assert "Trained on a mixture:" in text and "gone cannot be read" in text and text.count("data:image/jpeg") == 4


def test_captions_and_config_are_escaped_and_plugins_are_not_run(cli: Any, make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    run = make_run([record(1, **{HOSTILE: 1.0})])
    with (run / "config.yaml").open("a") as file:
        file.write(f"plugins: [{tmp_path / 'evil.py'}]\n# {HOSTILE}\n")
    text = page_of(cli, run)[1]
    assert text.count("<script") == 1 and text.count("&lt;script&gt;") >= 2
    assert "is not compared with the defaults" in text and not (tmp_path / "ran").exists()


def test_page_in_a_browser(cli: Any, make_run: MakeRun, look: Any, browser: Any) -> None:
    run = make_run([record(step, val_i2t_r1=0.5, val_t2i_r1=0.4, **{"x" * 60: step}) for step in range(1, 5)])
    write_status(run, 1, f"error[E_NONFINITE]: {'long ' * 30}{'word' * 40}")
    page = Path(page_of(cli, run)[0]["page"])
    for width in (1280, 390):
        seen = look(page, width)
        assert (seen.errors, seen.requests, seen.overflow) == ([], [], 0)
        assert "failed" in seen.text and "Recall@1" in seen.text and "a red image, number 0" in seen.text
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    try:
        tab.goto(page.as_uri())
        figure = tab.locator("svg[data-curve]").first
        figure.scroll_into_view_if_needed()
        box = figure.bounding_box()
        tab.mouse.move(box["x"] + 0.98 * box["width"], box["y"] + 0.5 * box["height"])
        assert tab.inner_text(".values") == "64 samples\nloss 0.75"
        figure.focus()
        tab.keyboard.press("ArrowLeft")
        assert tab.inner_text(".values") == "48 samples\nloss 1"
        figure.click()
        assert tab.locator("dialog[open] svg").bounding_box()["width"] > 1.5 * box["width"]
        tab.keyboard.press("Escape")
        tab.locator("figure img").first.click()
        assert "number" in tab.inner_text("dialog[open]")
    finally:
        tab.close()


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    folder = tmp_path / "scores"
    folder.mkdir()
    scores = [
        {"name": "top1", "value": 0.75, "low": 0.6, "high": 0.85, "n": 40, "higher_is_better": True, "chance": 0.5}
    ]
    per_class = [
        {"name": "cat", "n": 30, "top1": 0.8},
        {"name": HOSTILE, "n": 10, "top1": 0.6},
        {"name": "x", "n": 0, "top1": None},
    ]
    numbers = {
        "per_class": per_class,
        "confusion": [[24, 6, 0], [4, 6, 0], [0, 0, 0]],
        "confused": [{"label": "cat", "predicted": HOSTILE, "n": 6}],
    }
    config = {"benchmark": {"name": "zeroshot"}, "model": {"name": "the-model", "fingerprint": "m" * 64}}
    body = {"format": "report", "version": 1, "benchmark": "zeroshot", "scores": scores, "zeroshot": numbers}
    write_json(folder / "report.json", {**body, "fingerprints": {"model": "m" * 64}, "config": config})
    (folder / "config.yaml").write_text("benchmark: {name: zeroshot}\nmodel: the-model\n")
    return folder


def test_page_of_an_evaluation_report(cli: Any, refused: Any, evaluation: Path, look: Any) -> None:
    result, text = page_of(cli, evaluation)
    assert (result["benchmark"], result["scores"]) == ("zeroshot", {"top1": 0.75})
    assert "0.6 to 0.85" in text and "chance 50 %" in text and "the-model" in text and "m" * 64 in text
    assert "6 × cat predicted as &lt;script&gt;" in text and text.count("<script") == 1
    assert text.index("&lt;script&gt;document.title=&#39;owned&#39;&lt;/script&gt;</td>") < text.index("<td>cat</td>")
    seen = look(Path(result["page"]), 390)
    assert (seen.errors, seen.requests, seen.overflow) == ([], [], 0)
    for content in ('{"format": "report", "scores": [{}]}', "[]", "{"):
        (evaluation / "report.json").write_text(content)
        refused(cli("report", evaluation), "E_INPUT", 3, evaluation / "report.json", "clipwright eval")


def test_folder_without_anything_to_report_is_refused(
    cli: Any, refused: Any, make_run: MakeRun, small: Path, tmp_path: Path
) -> None:
    refused(
        cli("report", tmp_path / "nowhere"), "E_INPUT", 3, tmp_path / "nowhere", "no such folder", "clipwright demo"
    )
    refused(cli("report", small), "E_INPUT", 3, small, "manifest.json", "clipwright train -o")
    run = make_run([record(1)])
    write_status(run, 0)
    before = (run / "status.json").read_bytes()
    refused(cli("report", run, "-o", run), "E_OUTPUT", 2, run, "name a new folder")
    assert (run / "status.json").read_bytes() == before and not (run / "report.html").exists()
    printed = cli("report", run, "--dry-run").stdout
    assert printed == f"would write {run / 'report.html'}\n" and not (run / "report.html").exists()
    shutil.copy(run / "config.yaml", tmp_path / "config.yaml")
    (run / "config.yaml").write_text("schedule: {samples: many}\n")
    refused(cli("report", run), "E_INPUT", 3, run / "config.yaml", "schedule.samples", "restore the file")
