"""Retrieval scores on a held-out dataset during training."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from clipwright.eval.benchmarks.retrieval import score
from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.distributed.group import process_group
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.model.folder import Model
from clipwright.pipeline.model.two_tower import build_model
from clipwright.pipeline.tokenizers.base import TOKENIZERS
from clipwright.pipeline.train.config import RunConfig
from clipwright.pipeline.train.supervision.failures import Peer, find_failure
from clipwright.pipeline.train.techniques.base import Technique
from clipwright.pipeline.train.validation import Validation

pytestmark = pytest.mark.xdist_group("ranks")


def test_scores_are_logged_and_equal_those_of_the_saved_weights(scenes: Path, tmp_path: Path, small: Any) -> None:
    args = [f"data.train={scenes}", f"runtime.validation={scenes}", "runtime.validate_every=2", "runtime.log_every=3"]
    args += ["schedule.samples=96", "runtime.zero=3", "runtime.save_every=2", "runtime.keep=1"]
    cli = small.cli(tmp_path)
    cli(
        "launch",
        "torchrun",
        "processes=2",
        "train",
        *small.settings,
        *args,
        "runtime.keep_best=val_i2t_r10",
        "-o",
        "run",
    )
    log = small.losses(tmp_path / "run")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 6]
    scored = {line["step"]: line for line in log if "val_i2t_r1" in line}
    assert list(scored) == [2, 4, 6]
    best = max(scored, key=lambda step: (scored[step]["val_i2t_r10"], -step))
    kept = {int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").glob("step-*")}
    assert kept == {best, 6}
    # Evaluation of the saved weights.
    tree = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config = resolve(RunConfig, base=tree).value
    tokenizer = TOKENIZERS.build(config.tokenizer)
    towers = build_model(config, tokenizer)
    towers.load_state_dict(load_file(tmp_path / "run" / "checkpoints" / "step-00000006" / "model.safetensors"))
    expected = score(Model(config, towers, tokenizer, ""), Dataset(scenes), batch=7, workers=1, quiet=True)
    for direction in ("i2t", "t2i"):
        for k in (1, 5, 10):
            assert scored[6][f"val_{direction}_r{k}"] == pytest.approx(expected[direction][f"r{k}"])


def test_missing_validation_dataset_is_refused(scenes: Path, tmp_path: Path, here: Any, small: Any) -> None:
    args = [*small.settings, f"data.train={scenes}", "runtime.validation=nowhere", "-o", "run"]
    error = here(tmp_path, "train", *args, code=3).error
    assert error.startswith("error[E_INPUT]") and "nowhere" in error and error.endswith("check the path")
    assert not (tmp_path / "run" / "identity.json").exists()


def test_run_that_should_stop_has_no_scores(scenes: Path, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    args = [*small.settings, f"data.train={scenes}", f"runtime.validation={scenes}", "loss.name=softmax"]
    config = resolve(RunConfig, overrides=args).value
    tokenizer = TOKENIZERS.build(config.tokenizer)
    engine: Any = SimpleNamespace(weights=build_model(config, tokenizer).state_dict)
    calls: list[bool] = []

    def should_stop() -> bool:
        calls.append(True)
        return len(calls) > 2

    with process_group() as world:
        validation = Validation(config, tokenizer, world, score)
        assert validation.run(engine, Technique(), lambda: False, 1).keys() == {
            f"val_{w}_r{k}" for w in ("i2t", "t2i") for k in (1, 5, 10)
        }
        assert validation.run(engine, Technique(), should_stop, 1) == {} and len(calls) == 3


@pytest.mark.parametrize("signs", [True, False])
def test_rank_that_sends_heartbeats_does_not_hang(signs: bool) -> None:
    now = time.monotonic()
    peers = [Peer(rank, f"host{rank}", last_heard=now, last_progress=now - 100) for rank in range(2)]
    for number in (0, 1):
        for peer in peers:
            busy = peer.rank == 0
            report = {"step_and_phase": (5, 1), "phase": "validate", "in_collective": not busy, "code_line": "x"}
            peer.update({**report, "heartbeats": number if busy and signs else 0})
            if number == 0:
                peer.last_progress = now - 100
    error = find_failure(peers, now, 10)
    assert error is None if signs else error is not None and error.code == "E_HANG" and "rank 0" in error.what
