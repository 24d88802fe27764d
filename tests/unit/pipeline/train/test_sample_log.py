"""The ledger of samples, and what happens to samples that cannot be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from clipwright.pipeline.data.batch_samples import BatchSamples, key_sum
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.train.rank_failure import RankFailure
from clipwright.pipeline.train.run_folder import StepFile, read_steps
from clipwright.pipeline.train.sample_log import Ledger, _from_limbs, line

pytestmark = pytest.mark.xdist_group("ranks")


def corrupt(data: Path, keep: int) -> None:
    """Changes a byte of all samples but the first `keep`."""
    dataset = Dataset(data)
    samples = [(shard, row) for shard, size in enumerate(dataset.sizes) for row in range(size)]
    for shard, row in samples[keep:]:
        record = dataset.record(shard, row)
        with dataset.tar_path(shard).open("r+b") as file:
            file.seek(record["offset"] + record["size"] // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))


def test_run_on_corrupt_shards_stops_and_resumes_once_they_are_restored(
    scenes: Path, tmp_path: Path, small: Any, here: Any
) -> None:
    shutil.copytree(scenes, tmp_path / "data")
    args = ["data.train=data", "data.streams=8", "schedule.samples=320", "runtime.save_every=4", "-o", "run"]
    args += ["runtime.ledger=keys"]
    small(tmp_path, *args, "runtime.stop_at=4")
    corrupt(tmp_path / "data", 2)
    cli = small.cli(tmp_path)
    line = cli.error("train", *small.settings, *args, code=3)
    assert line.startswith("error[E_BAD_SAMPLES]") and "data/scenes-00000" in line, line
    assert "E_DATA_HASH" in line and "data verify" in line and "allowed" in line
    records = list(read_steps(tmp_path / "run" / "ledger.jsonl"))
    last = records[-1]["step"]
    assert last > 4 and len(list((tmp_path / "run" / "checkpoints").iterdir())) >= 1

    step = json.loads(here(tmp_path, "data", "ledger", "run", f"step={last}", "--json").out)
    assert [record["key"] for record in step["samples"]] == records[-1]["keys"]
    text = here(tmp_path, "data", "ledger", "run", f"step={last}").out
    assert text.count("instead of") == len(records[-1]["replaced"]) > 10 and "E_DATA_HASH" in text
    totals = json.loads(here(tmp_path, "data", "ledger", "run", "--json").out)
    assert totals["steps"] == last and totals["replaced"] == sum(len(record.get("replaced", [])) for record in records)
    assert totals["reasons"] == {"E_DATA_HASH": totals["replaced"]}

    shutil.rmtree(tmp_path / "data")
    shutil.copytree(scenes, tmp_path / "data")
    done = small(tmp_path, *args)
    resumed = int(done.stdout.split("resuming at step ")[1].split()[0])
    after = list(read_steps(tmp_path / "run" / "ledger.jsonl"))
    assert after[:resumed] == records[:resumed] and [record["step"] for record in after] == list(range(1, 21))
    assert not any("replaced" in record for record in after[resumed:])
    assert ("  replaced " in done.stdout) == any("replaced" in record for record in after)


def test_samples_of_each_step_are_listed_and_verified(scenes: Path, tmp_path: Path, small: Any, here: Any) -> None:
    shutil.copytree(scenes, tmp_path / "data")
    small(tmp_path, "data.train=data", "schedule.samples=112", "-o", "run")
    text = (tmp_path / "run" / "ledger.jsonl").read_text()
    assert all(len(record) < 96 for record in text.splitlines()) and "replaced" not in text
    (tmp_path / "data").rename(tmp_path / "moved")
    seen = []
    for step in range(1, 7):
        listed = json.loads(here(tmp_path, "data", "ledger", "run", f"step={step}", "train=moved", "--json").out)
        seen += [record["key"] for record in listed["samples"]]
    assert len(set(seen)) == 96  # record epoch
    for args, number, pieces in (
        (["run", "step=8"], "E_INPUT", ["step 8", "see which steps it has"]),
        (["runn"], "E_INPUT", ["the run folder does not exist", "runn", "check the path"]),
        (["run", "step=2"], "E_INPUT", ["data", "check the path"]),
    ):
        error = here(tmp_path, "data", "ledger", *args, code=3).error
        assert error.startswith(f"error[{number}]") and all(piece in error for piece in pieces), error
    manifest = json.loads((tmp_path / "moved" / "manifest.json").read_text())
    manifest["fingerprint"] = "0" * 64  # which changes the order
    (tmp_path / "moved" / "manifest.json").write_text(json.dumps(manifest))
    error = here(tmp_path, "data", "ledger", "run", "step=3", "train=moved", code=3).error
    assert error.startswith("error[E_DATA_HASH]") and "step 3" in error and "train=DATASET" in error


def test_ledger_line_is_short_and_its_sum_is_that_of_the_keys(tmp_path: Path) -> None:
    keys = [f"{i:032x}" for i in range(1000)]
    total = key_sum(keys)
    assert total == (key_sum(keys[::2]) + key_sum(keys[1::2])) % 2**128 == key_sum(reversed(keys))
    assert key_sum(keys[1:]) != total != key_sum([*keys[1:], keys[1]])
    assert key_sum([""]) == int("e3b0c44298fc1c149afbf4c8996fb924", 16)
    limbs = [2**32 - 1] * 4
    assert _from_limbs([4096 * limb for limb in limbs]) == 4096 * (2**128 - 1) % 2**128
    file = StepFile(tmp_path / "f", 0)
    file.write(line(10**7, 10**12, 10**5, BatchSamples(sum=total), keys=False))
    file.close()
    assert (tmp_path / "f").stat().st_size <= 96


def test_step_file_is_cut_back_on_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from clipwright.pipeline.distributed.group import process_group

    path = tmp_path / "ledger.jsonl"
    for tail in (b"", b'{"step":9', b"\0\0\0\0\n", b'{"step":3,"at":9}\n'):
        file = StepFile(path, 0)
        for step in (1, 2, 3):
            file.write({"step": step, "at": step})
        file.close()
        path.write_bytes(path.read_bytes() + tail)
        StepFile(path, 3).close()
        assert [record["step"] for record in read_steps(path)][:3] == [1, 2, 3]
        StepFile(path, 2).close()
        assert [record["step"] for record in read_steps(path)] == [1, 2]
    with process_group() as world:
        Ledger(tmp_path, 2, world, "sums", RankFailure(world, print)).close()
        assert capsys.readouterr().err == ""
        Ledger(tmp_path, 5, world, "sums", RankFailure(world, print)).close()
        assert "has 2 of 5 steps" in capsys.readouterr().err
