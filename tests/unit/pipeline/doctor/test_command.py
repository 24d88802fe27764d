"""`clipwright doctor`: running checks, combining results over ranks, and reporting."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from doctor_checks import call

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.doctor import gradients
from clipwright.pipeline.doctor.base import (
    GROUPS,
    CheckResult,
    DoctorContext,
    check,
    checks,
    failure,
    requested_check,
    table,
    with_prerequisites,
)

pytestmark = pytest.mark.xdist_group("ranks")


def test_without_a_config_only_the_machine_is_checked(cli: Any) -> None:
    done = cli("doctor", env={"NO_COLOR": "1"})
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["check", "found", "need"] and "\x1b" not in done.stdout
    assert [line.split()[0] for line in lines if line[:1].strip()] == [*["ok"] * 10, "next:"]
    assert "faiss-cpu" in done.stdout
    assert "dataset" not in done.stdout and list(cli.folder.iterdir()) == []


def test_predictions_match_the_run(scenes: Path, tmp_path: Path, small: Any) -> None:
    cli = small.cli(tmp_path)
    (tmp_path / "run").mkdir()
    overrides = [*small.settings, f"data.train={scenes}", "schedule.samples=320"]
    found = cli.json("doctor", *overrides, "-o", "run")
    names = [item["name"] for item in found["checks"]]
    assert names == [item.name for group in GROUPS for item in checks(group)]
    assert {item["status"] for item in found["checks"]} <= {"ok", "warn"}
    assert set(found["checks"][0]) == {"name", "status", "found", "need", "fix"}
    assert found["samples_per_s"] > 1 and found["seconds"] == pytest.approx(320 / found["samples_per_s"])
    assert 0 <= found["data_share"] < 1 and found["bottleneck"] in found["shares"]
    assert all(share >= 0 for share in found["shares"].values()) and sum(found["shares"].values()) > 0
    assert 0.2 < found["memory_gb"] < 4
    assert list(tmp_path.iterdir()) == [tmp_path / "run"] and not list((tmp_path / "run").iterdir())
    # The predicted disk and memory are those of a real run.
    small(tmp_path, *overrides, "runtime.stop_at=12", "-o", "run")
    [saved] = (tmp_path / "run" / "checkpoints").iterdir()
    written = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    assert found["checkpoint_bytes"] == pytest.approx(written, rel=0.25)
    logged = max(line["memory_gb"] for line in small.losses(tmp_path / "run"))
    assert found["memory_gb"] == pytest.approx(logged, rel=0.25)


def test_failed_checks_end_with_one_error(scenes: Path, tmp_path: Path, small: Any) -> None:
    cli = small.cli(tmp_path)
    done = cli("doctor", *small.settings, f"data.train={scenes}", "image.image_size=33", "--json", code=1)
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error[E_DOCTOR]") and "towers" in line and "image_size" in line and "Traceback" not in line
    rows = {item["name"]: item for item in json.loads(done.stdout)["checks"]}
    assert rows["towers"]["status"] == "FAIL" and "33" in rows["towers"]["found"]
    assert rows["step"]["status"] == rows["speed"]["status"] == "skip" and rows["images"]["status"] == "ok"


def test_two_faiss_packages_fail(cli: Any) -> None:
    fake = cli.folder / "site" / "faiss_gpu-1.15.0.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: faiss-gpu\nVersion: 1.15.0\n")
    done = cli("doctor", "--json", code=1, env={"PYTHONPATH": str(cli.folder / "site")})
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error[E_DOCTOR]") and "faiss" in line and "pip uninstall -y faiss-cpu faiss-gpu" in line


def test_two_ranks_print_one_report(scenes: Path, tmp_path: Path, small: Any) -> None:
    overrides = [*small.settings, f"data.train={scenes}", "schedule.samples=160"]
    done = small.cli(tmp_path)("doctor", *overrides, "--json", ranks=2)
    found = json.loads(done.stdout)
    assert found["samples_per_s"] > 1 and {item["status"] for item in found["checks"]} <= {"ok", "warn"}
    [ping] = [row["found"] for row in found["checks"] if row["name"] == "ping"]
    assert "(rank 1)" in ping and "GB/s by gloo" in ping and 0 < found["ping"]["seconds"][0] < 1
    done = small.cli(tmp_path)("doctor", *small.settings, "data.train=nowhere", ranks=2, code=1)
    assert done.stderr.count("error[E_DOCTOR]") == 1 and done.stdout.count("E_INPUT") == 1
    assert "Preempted" not in done.stderr


def test_gradient_check_on_two_ranks_needs_no_data(small: Any, tmp_path: Path) -> None:
    overrides = [
        "check=gradients",
        "runtime.zero=3",
        "runtime.micro_batch=8",
        "runtime.exchange=ring",
        "precision=fp32",
    ]
    done = small.cli(tmp_path)("doctor", *overrides, "loss.name=sigmoid", "--json", ranks=2)
    found = json.loads(done.stdout)
    assert [(item["name"], item["status"]) for item in found["checks"]] == [("config", "ok"), ("gradients", "ok")]
    assert found["gradient_check"]["steps"] == 3 and 0 < found["gradient_check"]["gradient"] <= gradients.LIMIT


# Running and reporting checks


def test_requested_check_includes_its_prerequisites() -> None:
    assert [item.name for item in with_prerequisites("step")][:3] == ["config", "dataset", "samples"]
    assert [item.name for item in with_prerequisites("gradients")] == ["config", "gradients"]
    with pytest.raises(ClipwrightError) as caught:
        with_prerequisites("gradient")
    error = caught.value
    assert error.code == "E_CONFIG_CHOICE" and error.where == "check=gradient" and "'gradients'" in error.fix
    assert requested_check(["check=gradients", "seed=1"]) == ("gradients", ["seed=1"])


def test_exception_becomes_a_result_and_dependents_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    from clipwright.pipeline.doctor import base

    monkeypatch.setattr(base, "_CHECKS", {})

    @check("first")
    def first(state: DoctorContext) -> CheckResult:
        raise ValueError("a\nb")

    @check("second", "first")
    def second(state: DoctorContext) -> CheckResult:
        raise AssertionError

    state = DoctorContext(call())

    @check("third", "second")
    def third(state: DoctorContext) -> CheckResult:
        raise AssertionError

    [group] = base._CHECKS.values()
    for item in group.values():
        state.results[item.name] = item.evaluate(state)
    assert state.results["first"].status == "FAIL" and state.results["first"].found == "ValueError: a\nb"
    assert state.results["second"] == state.results["third"] == CheckResult("skip", "not run: check `first` failed")
    error = failure(state)
    assert error is not None and error.code == "E_DOCTOR" and error.where == "first" and error.exit_code == 1
    assert failure(DoctorContext(call())) is None


def test_table_shows_status_words_and_literal_cells() -> None:
    rows = {"a": CheckResult("ok", "[red]x[/red]"), "b": CheckResult("FAIL", "two\nlines", "need", "f" * 300)}
    with contextlib.redirect_stdout(io.StringIO()):
        lines = table(rows).splitlines()
    assert lines[1].split() == ["ok", "a", "[red]x[/red]"] and lines[2].split() == ["FAIL", "b", "two", "lines", "need"]
    assert lines[3].strip() == "fix:" and "".join(lines[4:]).replace(" ", "") == "f" * 300
    assert max(map(len, lines)) <= 80
