"""Ranks, micro-batches, exchanges and ZeRO stages against a plain loop: same losses, gradients and parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import layout_ranks
import pytest
import torch
from layout_ranks import FAULTS, MUTATIONS, loss_gradient_times_world
from layouts import LAYOUTS, Case, Layout, deviations, plain

from clipwright.pipeline.train.engine import Engine

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, script: Any) -> dict[str, dict[str, Any]]:
    """What rank 0 saw, by the name of the layout, mutation or comparison."""
    out = tmp_path_factory.mktemp("layouts")
    script(layout_ranks, out, 1, 2, 3, 4, timeout=3600)
    results: dict[str, dict[str, Any]] = {}
    for path in sorted(out.glob("*.pt")):
        results.update(torch.load(path))
    return results


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_equals_the_plain_loop(layout: Layout, seen: dict[str, Any]) -> None:
    differences = deviations(seen[str(layout)], plain(layout.case), adamw=layout.case.optim == "adamw")
    assert max(differences.values()) <= 1e-5, differences
    hard_negatives = layout.case.batch * 3 // 4 if layout.case.hard_negatives else 0
    assert seen[str(layout)]["negatives"] == layout.case.batch - 1 + hard_negatives


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_mutation_is_noticed(mutate: Callable[[Engine], None], seen: dict[str, Any]) -> None:
    differences = deviations(seen[mutate.__name__], plain(MUTATIONS[mutate].case), adamw=False)
    assert any(difference > 1e-3 for difference in differences.values()), differences
    if mutate is loss_gradient_times_world:  # AdamW makes the same update of it
        assert differences["loss gradient"] > 1e-3


def test_scale_stays_at_its_lower_clamp(seen: dict[str, Any]) -> None:
    [layout] = [layout for layout in LAYOUTS if layout.case == Case(scale=1.0)]
    assert seen[str(layout)]["weights"]["loss.logit_scale"].tolist() == [0.0]


def test_second_pass_repeats_the_draws_of_drop_path(seen: dict[str, Any]) -> None:
    ours, theirs = seen["drop path"]["ours"], seen["drop path"]["plain"]
    largest = max(float(grad.abs().max()) for grad in theirs.values())
    for name, grad in theirs.items():
        assert (ours[name] - grad).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("world", [1, 2])
def test_batch_norm_moves_once_per_step_by_the_mean_over_micro_batches(world: int, seen: dict[str, Any]) -> None:
    """And by the mean over ranks, when the weights are read: DeepSpeed does not synchronize buffers."""
    results = seen[f"batch norm {world}"]
    assert results["ours"].keys() == results["plain"].keys()
    for name, expected in results["plain"].items():
        assert torch.allclose(results["ours"][name].float(), expected.float(), rtol=0, atol=1e-6), name
        assert not name.endswith("mean") or expected.abs().max() > 1e-3
    assert results["ours_evaluating"].keys() == results["plain_evaluating"].keys()
    largest = max(float(grad.abs().max()) for grad in results["plain_evaluating"].values())
    for name, grad in results["plain_evaluating"].items():
        assert (results["ours_evaluating"][name] - grad).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_non_finite_step_on_one_rank_changes_nothing(fault: Any, zero: int, seen: Any) -> None:
    """Weights, running statistics and both optimizers' states: the next step equals that of a run without it."""
    faulty, clean = seen[f"{fault.__name__} {zero}"], seen[f"left out {zero}"]
    assert faulty["skipped"] == [[False, False], [True, True], [False, False]]
    for ours, theirs in zip(faulty["weights"], clean["weights"], strict=True):
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    first, _, last = clean["weights"]
    assert {name for name in first if torch.equal(first[name], last[name])} <= {"mean", "std"}


def test_ring_uses_less_memory_than_gather(seen: dict[str, Any]) -> None:
    growth = seen["exchange memory"]
    assert 2**24 < growth["ring"] < 0.85 * growth["gather"], growth
