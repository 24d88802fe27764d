"""What DeepSpeed does, as far as the engine relies on it or works around it.

Should a release change one of these, what stands for it in the engine, the launcher or `log.py` can go, or must change.
The layout of the optimiser's state is tested in test_checkpoint.py, cached accumulation with our towers in
test_layouts.py.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed_facts
import pytest
import torch

pytestmark = pytest.mark.xdist_group("ranks")

SAME = pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, script: Any) -> dict[str, Any]:
    """What rank 0 of two saw of each fact."""
    if torch.cuda.is_available():
        pytest.skip("facts of DeepSpeed on a CPU")
    out = tmp_path_factory.mktemp("deepspeed") / "facts.json"
    script(deepspeed_facts, out, timeout=600)
    return json.loads(out.read_text())


def by_stage(of_0: Any, of_1: Any, of_2: Any, of_3: Any) -> dict[str, Any]:
    return {"0": of_0, "1": of_1, "2": of_2, "3": of_3}


# Fact → what is relied on, or worked around.
EXPECTED: dict[str, Any] = {
    # Starting
    "no_cpp_is_built_once_the_op_is_switched_off": {"off": True, "would be built": ["deepspeed_shm_comm"]},
    "the_accelerator_is_the_cpu": "cpu",
    # Parameters and config
    "a_parameter_without_dimensions_crashes": by_stage(True, True, True, True),
    "a_parameter_is_empty_outside_forward_under_stage_3": [0, 12],
    "the_norm_is_that_before_clipping_and_none_at_stage_0": by_stage(None, *[pytest.approx(1, rel=1e-5)] * 3),
    "gradients_are_averaged_over_ranks": by_stage(SAME, SAME, SAME, SAME),
    "a_rate_set_in_the_wrapper_is_the_rate": by_stage(SAME, SAME, SAME, SAME),
    "bf16_casts_every_parameter_and_autocast_none": [["torch.bfloat16"], ["torch.float32"], "torch.bfloat16"],
    "samples_are_undercounted_where_the_boundary_is_set_by_hand": [48, 96],
    # Cached accumulation
    "one_call_for_both_towers_is_exact": by_stage(SAME, SAME, SAME, SAME),
    # Offload
    "an_offloaded_optimizer_is_exact_and_its_state_is_found_by_name": {
        stage: [pytest.approx(0, abs=2e-6)] * 4 for stage in ("1", "2", "3")
    },
    # Compile
    "compiled_in_place_it_trains_under_every_stage_and_keeps_its_names": {s: [SAME, True] for s in ("0", "2", "3")},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_deepspeed_does_as_the_engine_expects(name: str, seen: dict[str, Any]) -> None:
    assert seen[name] == EXPECTED[name]


def test_every_fact_is_looked_at(seen: dict[str, Any]) -> None:
    text = Path(__file__).read_text()
    assert [name for name in seen if f'"{name}"' not in text] == []
    assert seen.keys() == {work.__name__ for work in deepspeed_facts.FACTS}


def test_without_a_launchers_variables_it_wants_mpi(seen: dict[str, Any]) -> None:
    """So `distributed.py` makes the group and sets them, and the engine says that there is one."""
    group, engine = seen["without_a_launchers_variables_it_asks_for_mpi"]
    assert group.startswith("ModuleNotFoundError") and "mpi4py" in group
    assert engine.startswith("AssertionError") and "LOCAL_RANK" in engine


def test_a_clamp_behind_the_step_is_lost(seen: dict[str, Any]) -> None:
    """So the log-scale is no parameter of what DeepSpeed has."""
    found = seen["a_clamp_behind_the_step_is_lost_under_zero"]
    assert found["0"] < 0.5 * min(found["1"], found["2"]), found


def test_clipping_left_out_is_clipping_at_one(seen: dict[str, Any]) -> None:
    """So the config always states it."""
    found = seen["clipping_left_out_means_one_and_zero_means_none"]
    assert [found[f"left out, {zero}"] for zero in (0, 2)] == [pytest.approx(1, rel=1e-4)] * 2
    assert found["zero, 0"] == pytest.approx(found["zero, 2"], rel=1e-5) and found["zero, 0"] > 50


def test_sgd_wants_leave(seen: dict[str, Any]) -> None:
    found = seen["sgd_wants_leave"]
    assert found["refused"] and "zero_allow_untested_optimizer" in found["words"], found


def test_nothing_synchronises_running_statistics(seen: dict[str, Any]) -> None:
    assert seen["running_statistics_differ_between_ranks"] > 1e-3


def test_stage_3_is_silently_wrong_where_a_replay_goes_another_way(seen: dict[str, Any]) -> None:
    """So both towers go through one call of the engine, never past it; one step does not show it."""
    found = seen["past_the_engine_only_stage_3_is_wrong"]
    assert [found[stage] for stage in ("0", "1", "2")] == [SAME] * 3 and found["3"] > 1e-2, found
    found = seen["towers_called_apart_are_wrong_under_stage_3_from_the_second_step"]
    assert found["0"] == found["2"] == [SAME, SAME], found
    assert found["3"][0] == SAME and found["3"][1] > 1e-2, found


def test_a_module_wrapped_by_compile_has_other_names_and_fails(seen: dict[str, Any]) -> None:
    """So towers are compiled in place."""
    found = seen["wrapped_by_compile_it_has_other_names_and_fails_under_stage_3"]
    assert "image._orig_mod.weight" in found["names"] and "_in_forward" in found["error"], found


def test_its_launcher_puts_a_local_rank_before_the_words_unless_told_not_to(tmp_path: Path) -> None:
    """So `launch` tells it not to, and the front door passes over one."""
    (tmp_path / "words.py").write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    info = base64.urlsafe_b64encode(b'{"localhost": [0]}').decode()
    line = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={info}", "--log_level=error"]
    started = [
        subprocess.Popen([*line, *more, "words.py", "train"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for more in ([], ["--no_local_rank"])
    ]
    said = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in started]
    assert said == [["--local_rank=0", "train"], ["train"]]
