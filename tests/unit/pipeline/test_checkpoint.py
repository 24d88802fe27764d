"""Checkpoints: read by any layout, never half, never unverified."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import checkpoint_ranks
import pytest
import torch
from checkpoint_ranks import CHAINS, LEG, WORLDS
from safetensors.torch import load_file
from torch import Tensor

from clipwright.pipeline.checkpoint import step_name

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chains")
    done = subprocess.run(
        [sys.executable, checkpoint_ranks.__file__, str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def state(folder: Path) -> dict[str, Tensor]:
    """An optimiser's whole state, put together from the files of all ranks."""
    parts: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    for path in folder.glob("optimizer-*.safetensors"):
        for name, tensor in load_file(path).items():
            place, start = name.split("@")
            parts[place].append((int(start), tensor))
    whole = {}
    for place, found in parts.items():
        found.sort(key=lambda part: part[0])
        ends = [0, *(start + len(tensor) for start, tensor in found)]
        assert [start for start, _ in found] == ends[:-1], place  # neither gaps nor overlaps
        whole[place] = torch.cat([tensor for _, tensor in found])
    return whole


@pytest.mark.parametrize("name", CHAINS)
def test_any_ranks_and_any_stage_go_on_with_any_checkpoint(name: str, chains: Path) -> None:
    whole = torch.load(chains / f"{name}-whole.pt")
    for leg in range(len(WORLDS)):
        seen = torch.load(chains / f"{name}-{leg}.pt")
        assert seen["start"] == LEG * leg and list(seen["losses"]) == list(range(LEG * leg, LEG * (leg + 1)))
        for step, loss in seen["losses"].items():
            assert loss == pytest.approx(whole["losses"][step], rel=1e-5)
    last = step_name(LEG * len(WORLDS))
    ours, theirs = (state(chains / run / "checkpoints" / last) for run in (name, f"{name}-whole"))
    assert ours.keys() == theirs.keys() and {key.partition("/")[0] for key in ours} == (
        {"momentum_buffer"} if name == "0123" else {"exp_avg", "exp_avg_sq"}
    )
    largest = max(float(tensor.abs().max()) for tensor in theirs.values())
    for key, tensor in theirs.items():
        assert (ours[key] - tensor).abs().max() <= 1e-5 * largest, key
        assert tensor.abs().max() > 0 or key.endswith("bias"), key
