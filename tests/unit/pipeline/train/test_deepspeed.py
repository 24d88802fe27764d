"""Behavior of DeepSpeed that the engine relies on or works around.

If a release changes one of these, the corresponding code in the engine, the launcher or `log.py` can go or must change.
The layout of optimizer state is tested in test_checkpoint.py, gradient accumulation with our towers in test_layouts.py.
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

pytestmark = pytest.mark.xdist_group("ranks")

SAME = pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, script: Any) -> dict[str, Any]:
    """What rank 0 of two measured for each fact."""
    out = tmp_path_factory.mktemp("deepspeed") / "facts.json"
    script(deepspeed_facts, out, timeout=3600)
    return json.loads(out.read_text())


def by_stage(of_0: Any, of_1: Any, of_2: Any, of_3: Any) -> dict[str, Any]:
    return {"0": of_0, "1": of_1, "2": of_2, "3": of_3}


# Fact → what the engine expects.
EXPECTED: dict[str, Any] = {
    # Starting
    "no_cpp_is_compiled_with_the_op_switched_off": {"off": True, "would be built": ["deepspeed_shm_comm"]},
    "accelerator_is_the_cpu": "cpu",
    # Parameters and config
    "zero_dimensional_parameter_crashes": by_stage(True, True, True, True),
    "parameter_is_empty_outside_forward_under_stage_3": [0, 12],
    "norm_is_from_before_clipping_and_missing_at_stage_0": by_stage(None, *[pytest.approx(1, rel=1e-5)] * 3),
    "gradients_are_averaged_over_ranks": by_stage(SAME, SAME, SAME, SAME),
    "learning_rate_set_in_the_wrapper_is_used": by_stage(SAME, SAME, SAME, SAME),
    "bf16_casts_every_parameter_and_autocast_none": [["torch.bfloat16"], ["torch.float32"], "torch.bfloat16"],
    "samples_are_undercounted_if_the_boundary_is_set_by_hand": [48, 96],
    "without_managed_accumulation_stage_0_reduces_gradients_in_the_step_only": [pytest.approx(0.334, abs=1e-2), SAME],
    "optimizer_state_cannot_be_set_before_the_first_step": {"1": True, "2": True, "3": True},
    # Gradient accumulation with cached features
    "one_call_for_both_towers_is_exact": by_stage(SAME, SAME, SAME, SAME),
    # Offload
    "offloaded_optimizer_is_exact_and_its_state_is_read_by_name": {
        stage: [pytest.approx(0, abs=2e-6)] * 4 for stage in ("1", "2", "3")
    },
    # Compile
    "module_compiled_in_place_trains_and_keeps_its_names": {s: [SAME, True] for s in ("0", "2", "3")},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_deepspeed_behaves_as_the_engine_expects(name: str, seen: dict[str, Any]) -> None:
    assert seen[name] == EXPECTED[name]


def test_every_fact_is_tested(seen: dict[str, Any]) -> None:
    text = Path(__file__).read_text()
    assert [name for name in seen if f'"{name}"' not in text] == []
    assert seen.keys() == {work.__name__ for work in deepspeed_facts.FACTS}


def test_without_launcher_variables_deepspeed_requires_mpi(seen: dict[str, Any]) -> None:
    """So `process_group` creates the group and sets them, and the engine states that it exists."""
    group, engine = seen["without_launcher_variables_it_requires_mpi"]
    assert group.startswith("ModuleNotFoundError") and "mpi4py" in group
    assert engine.startswith("AssertionError") and "LOCAL_RANK" in engine


def test_clamp_after_the_step_is_lost(seen: dict[str, Any]) -> None:
    """So the log-scale is not a parameter of the module that DeepSpeed manages."""
    result = seen["clamp_after_the_step_is_lost_under_zero"]
    assert result["0"] < 0.5 * min(result["1"], result["2"]), result


def test_missing_clipping_is_clipping_at_one(seen: dict[str, Any]) -> None:
    """So the config always states it."""
    result = seen["missing_clipping_means_one_and_zero_means_none"]
    assert [result[f"left out, {zero}"] for zero in (0, 2)] == [pytest.approx(1, rel=1e-4)] * 2
    assert result["zero, 0"] == pytest.approx(result["zero, 2"], rel=1e-5) and result["zero, 0"] > 50


def test_sgd_must_be_allowed_explicitly(seen: dict[str, Any]) -> None:
    result = seen["sgd_must_be_allowed_explicitly"]
    assert result["refused"] and "zero_allow_untested_optimizer" in result["message"], result


def test_running_statistics_are_not_synchronized(seen: dict[str, Any]) -> None:
    assert seen["running_statistics_differ_between_ranks"] > 1e-3


def test_stage_3_is_silently_wrong_without_one_engine_call_for_both_towers(seen: dict[str, Any]) -> None:
    """So both towers go through one call of the engine; a single step does not show the error."""
    result = seen["bypassing_the_engine_is_wrong_under_stage_3_only"]
    assert [result[stage] for stage in ("0", "1", "2")] == [SAME] * 3 and result["3"] > 1e-2, result
    result = seen["separate_calls_are_wrong_under_stage_3_from_the_second_step"]
    assert result["0"] == result["2"] == [SAME, SAME], result
    assert result["3"][0] == SAME and result["3"][1] > 1e-2, result


def test_module_wrapped_by_compile_has_other_names_and_fails(seen: dict[str, Any]) -> None:
    """So towers are compiled in place."""
    result = seen["module_wrapped_by_compile_has_other_names_and_fails"]
    assert "image._orig_mod.weight" in result["names"] and "_in_forward" in result["error"], result


def test_deepspeed_launcher_inserts_a_local_rank_unless_disabled(tmp_path: Path) -> None:
    """So `launch` disables it, and the front door ignores it."""
    (tmp_path / "arguments.py").write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    info = base64.urlsafe_b64encode(b'{"localhost": [0]}').decode()
    line = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={info}", "--log_level=error"]
    started = [
        subprocess.Popen([*line, *more, "arguments.py", "train"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for more in ([], ["--no_local_rank"])
    ]
    received = [json.loads(process.communicate(timeout=1200)[0].splitlines()[-1]) for process in started]
    assert received == [["--local_rank=0", "train"], ["train"]]
