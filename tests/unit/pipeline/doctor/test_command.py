"""The command that runs doctor's checks, and how they are run and told."""

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
from clipwright.pipeline.doctor.base import GROUPS, Context, Found, asked_for, check, checks, chosen, failure, table

pytestmark = pytest.mark.xdist_group("ranks")


def test_without_a_config_the_environment_alone_is_checked(cli: Any) -> None:
    done = cli("doctor", env={"NO_COLOR": "1"})
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["check", "found", "need", "fix"] and "\x1b" not in done.stdout
    assert [line.split()[0] for line in lines[1:11]] == ["ok"] * 10 and "faiss-cpu" in done.stdout
    assert "dataset" not in done.stdout and list(cli.folder.iterdir()) == []


def test_a_config_is_checked_and_its_run_predicted(scenes: Path, tmp_path: Path, small: Any) -> None:
    cli = small.cli(tmp_path)
    (tmp_path / "run").mkdir()
    words = [*small.settings, f"data.train={scenes}", "schedule.samples=320"]
    found = cli.json("doctor", *words, "-o", "run")
    names = [one["name"] for one in found["checks"]]
    assert names == [one.name for group in GROUPS for one in checks(group)]
    assert {one["status"] for one in found["checks"]} <= {"ok", "warn"}
    assert set(found["checks"][0]) == {"name", "status", "found", "need", "fix"}
    assert found["samples_per_s"] > 1 and found["seconds"] == pytest.approx(320 / found["samples_per_s"])
    assert 0 <= found["data_share"] < 1 and found["bottleneck"] in found["shares"]
    assert all(share >= 0 for share in found["shares"].values()) and sum(found["shares"].values()) > 0
    assert 0.2 < found["memory_gb"] < 4
    assert list(tmp_path.iterdir()) == [tmp_path / "run"] and not list((tmp_path / "run").iterdir())
    # What it predicts of disk and memory is what a run writes and logs.
    small(tmp_path, *words, "runtime.stop_at=12", "-o", "run")
    [saved] = (tmp_path / "run" / "checkpoints").iterdir()
    written = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    assert found["checkpoint_bytes"] == pytest.approx(written, rel=0.25)
    logged = max(line["memory_gb"] for line in small.losses(tmp_path / "run"))
    assert found["memory_gb"] == pytest.approx(logged, rel=0.25)


def test_failed_checks_are_named_by_one_error(scenes: Path, tmp_path: Path, small: Any) -> None:
    cli = small.cli(tmp_path)
    done = cli("doctor", *small.settings, f"data.train={scenes}", "image.image_size=33", "--json", code=1)
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error[E_DOCTOR]") and "towers" in line and "image_size" in line and "Traceback" not in line
    rows = {one["name"]: one for one in json.loads(done.stdout)["checks"]}
    assert rows["towers"]["status"] == "FAIL" and "33" in rows["towers"]["found"]
    assert rows["step"]["status"] == rows["speed"]["status"] == "skip" and rows["images"]["status"] == "ok"


def test_both_faiss_are_found_by_their_metadata(cli: Any) -> None:
    fake = cli.folder / "site" / "faiss_gpu-1.15.0.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: faiss-gpu\nVersion: 1.15.0\n")
    done = cli("doctor", "--json", code=1, env={"PYTHONPATH": str(cli.folder / "site")})
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error[E_DOCTOR]") and "faiss" in line and "pip uninstall -y faiss-cpu faiss-gpu" in line


def test_two_ranks_speak_with_one_voice(scenes: Path, tmp_path: Path, small: Any) -> None:
    words = [*small.settings, f"data.train={scenes}", "schedule.samples=160"]
    done = small.cli(tmp_path)("doctor", *words, "--json", ranks=2)
    found = json.loads(done.stdout)
    assert found["samples_per_s"] > 1 and {one["status"] for one in found["checks"]} <= {"ok", "warn"}
    [ping] = [one["found"] for one in found["checks"] if one["name"] == "ping"]
    assert "(rank 1)" in ping and "GB/s by gloo" in ping and 0 < found["ping"]["seconds"][0] < 1
    done = small.cli(tmp_path)("doctor", *small.settings, "data.train=nowhere", ranks=2, code=1)
    assert done.stderr.count("error[E_DOCTOR]") == 1 and done.stdout.count("E_INPUT") == 1
    assert "Preempted" not in done.stderr


def test_ranks_check_their_gradients_without_data(small: Any, tmp_path: Path) -> None:
    words = ["check=gradients", "runtime.zero=3", "runtime.micro_batch=8", "runtime.exchange=ring", "precision=fp32"]
    done = small.cli(tmp_path)("doctor", *words, "loss.name=sigmoid", "--json", ranks=2)
    found = json.loads(done.stdout)
    assert [(one["name"], one["status"]) for one in found["checks"]] == [("config", "ok"), ("gradients", "ok")]
    assert found["gradient_check"]["steps"] == 3 and 0 < found["gradient_check"]["gradient"] <= gradients.LIMIT


# How checks are run and told


def test_one_check_brings_what_it_needs() -> None:
    assert [one.name for one in chosen("step")][:3] == ["config", "dataset", "samples"]
    assert [one.name for one in chosen("gradients")] == ["config", "gradients"]
    with pytest.raises(ClipwrightError) as caught:
        chosen("gradient")
    error = caught.value
    assert error.code == "E_CONFIG_CHOICE" and error.where == "check=gradient" and "'gradients'" in error.fix
    made = call("check=gradients", "seed=1")
    assert asked_for(made) == "gradients" and made.overrides == ["seed=1"]


def test_an_error_is_a_row_and_what_needs_it_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    from clipwright.pipeline.doctor import base

    monkeypatch.setattr(base, "_CHECKS", {})

    @check("first")
    def first(made: Context) -> Found:
        raise ValueError("a\nb")

    @check("second", "first")
    def second(made: Context) -> Found:
        raise AssertionError

    made = Context(call())

    @check("third", "second")
    def third(made: Context) -> Found:
        raise AssertionError

    [group] = base._CHECKS.values()
    for one in group.values():
        made.rows[one.name] = one.outcome(made)
    assert made.rows["first"].status == "FAIL" and made.rows["first"].found == "ValueError: a\nb"
    assert made.rows["second"] == made.rows["third"] == Found("skip", "not tried: `first` failed")
    error = failure(made)
    assert error is not None and error.code == "E_DOCTOR" and error.where == "first" and error.exit_code == 1
    assert failure(Context(call())) is None


def test_the_table_says_status_in_words_and_takes_cells_as_they_are() -> None:
    rows = {"a": Found("ok", "[red]x[/red]"), "b": Found("FAIL", "two\nlines", "need", "f" * 300)}
    with contextlib.redirect_stdout(io.StringIO()):
        lines = table(rows).splitlines()
    assert lines[1].split() == ["ok", "a", "[red]x[/red]"] and len(lines) == 3
    assert lines[2].split() == ["FAIL", "b", "two", "lines", "need", "f" * 300]
