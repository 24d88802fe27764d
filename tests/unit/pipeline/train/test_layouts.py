"""Ranks, micro-batches, exchanges and ZeRO stages against a plain loop: same losses, gradients and parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import layout_ranks
import pytest
import torch
from layout_ranks import ILL, MUTATIONS, wide
from layouts import LAYOUTS, Case, Layout, deviations, plain

from clipwright.pipeline.train.engine import Engine

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, script: Any) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("layouts")
    script(layout_ranks, out, 1, 2, 3, 4, timeout=600)
    return {name: found for path in sorted(out.glob("*.pt")) for name, found in torch.load(path).items()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_equals_the_plain_loop(layout: Layout, seen: dict[str, Any]) -> None:
    found = deviations(seen[str(layout)], plain(layout.case), adamw=layout.case.optim == "adamw")
    assert max(found.values()) <= 1e-5, found
    wrong = layout.case.batch * 3 // 4 if layout.case.wrong else 0
    assert seen[str(layout)]["negatives"] == layout.case.batch - 1 + wrong


@pytest.mark.parametrize("spoil", MUTATIONS, ids=lambda spoil: spoil.__name__)
def test_a_mutation_is_seen(spoil: Callable[[Engine], None], seen: dict[str, Any]) -> None:
    found = deviations(seen[spoil.__name__], plain(MUTATIONS[spoil].case), adamw=False)
    assert any(far > 1e-3 for far in found.values()), found
    if spoil is wide:  # invisible in what AdamW makes of it
        assert found["loss gradient"] > 1e-3


def test_a_clamp_of_the_scale_holds(seen: dict[str, Any]) -> None:
    [layout] = [layout for layout in LAYOUTS if layout.case == Case(scale=1.0)]
    assert seen[str(layout)]["weights"]["loss.logit_scale"].tolist() == [0.0]


def test_a_replay_drops_what_was_dropped_before(seen: dict[str, Any]) -> None:
    ours, theirs = seen["dropped"]["ours"], seen["dropped"]["plain"]
    largest = max(float(grad.abs().max()) for grad in theirs.values())
    for name, grad in theirs.items():
        assert (ours[name] - grad).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("world", [1, 2])
def test_batch_norm_moves_once_a_step_by_the_mean_of_all_micro_batches(world: int, seen: dict[str, Any]) -> None:
    """And over ranks, once weights are asked for: nothing in DeepSpeed synchronises buffers."""
    found = seen[f"normed{world}"]
    assert found["ours"].keys() == found["plain"].keys()
    for name, want in found["plain"].items():
        assert torch.allclose(found["ours"][name].float(), want.float(), rtol=0, atol=1e-6), name
        assert not name.endswith("mean") or want.abs().max() > 1e-3
    assert found["ours_still"].keys() == found["plain_still"].keys()
    largest = max(float(grad.abs().max()) for grad in found["plain_still"].values())
    for name, grad in found["plain_still"].items():
        assert (found["ours_still"][name] - grad).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("ill", ILL, ids=lambda ill: ill.__name__)
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing(ill: Any, zero: int, seen: Any) -> None:
    """Weights, running statistics and both optimisers' states: the step behind it is that of a run without it."""
    found, whole = seen[f"{ill.__name__} {zero}"], seen[f"None {zero}"]
    assert found["told"] == [[False, False], [True, True], [False, False]]
    for mine, theirs in zip(found["weights"], whole["weights"], strict=True):
        assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []
    first, _, last = whole["weights"]
    assert {name for name in first if torch.equal(first[name], last[name])} <= {"mean", "std"}


def test_a_ring_holds_less_than_a_gathering(seen: dict[str, Any]) -> None:
    found = seen["exchanged"]
    assert 2**24 < found["ring"] < 0.85 * found["gather"], found
