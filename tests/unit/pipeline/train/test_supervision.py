"""Ranks that are stopped, killed, blocked or slow, or whose loss is not finite, and how their group reacts."""

from __future__ import annotations

import json
import os
import random
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import group_ranks
import pytest
from group_ranks import Scenario
from output_checks import check_error
from safetensors.torch import load_file

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.train.step_checks import slow_ranks
from clipwright.pipeline.train.supervision.failures import Peer, find_failure
from clipwright.pipeline.train.supervision.heartbeat import Connection, Heartbeat

pytestmark = pytest.mark.xdist_group("ranks")
ROUNDS = int(os.environ.get("CLIPWRIGHT_SOAK", "0"))  # see tests/soak.py
TIMEOUT_SECONDS = 8.0
# In `make test` the machine may be busy: there the limits of exit times only tell a slow exit from a hang.
SLACK = 1 if ROUNDS else 20
SHORT_TIMEOUT = [f"runtime.timeout_minutes={TIMEOUT_SECONDS / 60}"]


def arguments(small: Any, scenes: Path) -> list[str]:
    tiny = ["image.depth=1", "text.depth=1", "embed_dim=32", "schedule.global_batch=12", "schedule.warmup=0"]
    runtime = ["runtime.timeout_minutes=2", "runtime.save_every=10", "schedule.samples=48000"]
    return ["train", *small.settings, *tiny, *runtime, f"data.train={scenes}", "-o", "run"]


def run_scenarios(script: Callable[..., None], folder: Path, scenarios: dict[str, Scenario]) -> dict[str, Any]:
    """Runs scenarios one after another in one session; returns their results by name."""
    group_ranks.write(folder / "scenarios.json", scenarios)
    for scenario in scenarios.values():
        scenario.path.mkdir(exist_ok=True)
    script(group_ranks, folder / "scenarios.json", timeout=1800)
    return json.loads((folder / "results.json").read_text())


CASES: dict[str, dict[str, Any]] = {
    "rank 0 killed": {"when": "steps 3", "send": "SIGKILL", "to": [0]},
    "rank suspended": {"ranks": 3, "when": "steps 3", "send": "SIGSTOP", "to": [2]},
    "rank hangs": {"ranks": 3, "fault": "'hang' if rank == 1 and step == 3 else None", "when": "at 1"},
    "rank fails": {"fault": "'refuse' if rank == 1 and step == 2 else None", "when": "at 1"},
    "signal without data": {
        "fault": "'starve' if rank == 0 and step == 3 else None",
        "when": "at 0",
        "send": "SIGTERM",
        "to": [1],
    },
    "signal while building": {
        "fault": "'build' if rank == 0 and step == -1 else None",
        "when": "at 0",
        "send": "SIGUSR1",
        "to": [1],
        "launcher": "none",
    },
    "signal to rank 0 while it loads": {
        "fault": "'load' if rank == 0 and step == -2 else None",
        "when": "at 0",
        "send": "SIGTERM",
        "to": [0],
        "launcher": "none",
    },
    "signal to rank 1 while it loads": {
        "fault": "'load' if rank == 1 and step == -2 else None",
        "when": "at 1",
        "send": "SIGTERM",
        "to": [1],
        "launcher": "none",
    },
    "launcher killed": {"when": "steps 3", "launcher": "killed"},
    "launcher killed early": {
        "fault": "'load' if rank == 1 and step == -2 else None",
        "when": "at 1",
        "launcher": "killed",
    },
    # Rank 0 learns of the signal from rank 1 alone, when they agree on the next step.
    "signal known to one rank": {
        "fault": "'deaf' if rank == 0 else None",
        "when": "steps 3",
        "send": "SIGUSR1",
        "to": [1],
        "launcher": "none",
    },
    "one rank": {"ranks": 1, "when": "steps 3", "send": "SIGUSR1"},
    "signal while a rank hangs": {
        "fault": "'hang' if rank == 0 and step == 3 else None",
        "when": "at 0",
        "send": "SIGTERM",
        "to": [1],
    },
}
# Kinds of random scenarios: R stands for a random rank, S for a random step. Kinds of PREEMPTED name no signal: one
# that stops a run is sent to that rank or to all ranks.
PREEMPTED = {
    "train": {"when": "steps S"},
    "save": {"fault": "'save' if rank == R and step == 10 else None", "when": "at R"},
    "data": {"fault": "'starve' if rank == R and step == S else None", "when": "at R"},
    "build": {"fault": "'build' if rank == R and step == -1 else None", "when": "at R", "pause": 1.0},
    "load": {"fault": "'load' if rank == R and step == -2 else None", "when": "at R", "pause": 1.0},
}
FAILED_RANK = {
    "killed": {"when": "steps S", "send": "SIGKILL"},
    "suspended": {"when": "steps S", "send": "SIGSTOP"},
    "hangs": {"fault": "'hang' if rank == R and step == S else None", "when": "at R", "send": ""},
    "starves": {"fault": "'starve' if rank == R and step == S else None", "when": "at R", "send": ""},
    "save blocks": {"fault": "'blocked save' if rank == R and step == 10 else None", "when": "at R", "send": ""},
}
NONFINITE = {
    "nan": {"fault": "'nan' if rank == R and (step == 1 or step >= S) else None", "when": "at R", "send": ""},
}
# By class of tests/soak.py: the kinds, and the number of ranks.
RANDOM_CLASSES = {
    "preempt": (PREEMPTED, 2),
    "failed-rank": (FAILED_RANK, 4 if ROUNDS else 2),
    "nonfinite": (NONFINITE, 2),
}


def random_scenario(seed: int, kinds: dict[str, dict[str, Any]], ranks: int) -> dict[str, Any]:
    draw = random.Random(seed)
    kind, rank, step = kinds[list(kinds)[seed % len(kinds)]], draw.randrange(ranks), draw.randint(4, 25)
    values = {"R": str(rank), "S": str(step)}
    stop_signal, to = draw.choice(["SIGTERM", "SIGUSR1"]), draw.choice([[], [rank]])
    scenario = {"ranks": ranks, "send": stop_signal, "to": to, **kind}
    if "send" in kind:
        scenario["to"] = [rank]
    for key in ("fault", "when"):
        if key in kind:
            scenario[key] = re.sub("[RS]", lambda found: values[found[0]], kind[key])
    return scenario


def scenarios_of(name: str, folder: Path, command: list[str]) -> dict[str, Scenario]:
    """The scenarios of a class; each random one is followed by the same command without the fault."""
    if name == "cases":
        made = dict[str, Scenario]()
        for case, fields in CASES.items():
            more = SHORT_TIMEOUT if case in ("rank suspended", "rank hangs") else []
            made[case] = Scenario(str(folder / case.replace(" ", "_")), [*command, *more], **fields)
        return made
    if name == "slow-rank":
        ranks, command = 4 if ROUNDS else 2, [*command, "runtime.log_every=16", "runtime.stop_at=96"]
        fault = "'slow' if rank == 1 and step >= 40 else None"
        made = {"slow": Scenario(str(folder / "slow"), command, ranks, fault)}
        if ROUNDS:
            made["clean"] = Scenario(str(folder / "clean"), [*command, "runtime.stop_at=1000"], ranks)
        return made
    made = dict[str, Scenario]()
    kinds, ranks = RANDOM_CLASSES[name]
    more = SHORT_TIMEOUT if name == "failed-rank" else []
    for seed in range(ROUNDS or 1):
        at = str(folder / f"{name}_{seed}")
        made[f"{name} {seed}"] = Scenario(at, [*command, *more], **random_scenario(seed, kinds, ranks))
        made[f"{name} {seed} again"] = Scenario(at, [*command, "runtime.stop_at=36"], ranks)
    return made


@pytest.fixture(scope="module")
def results(
    small: Any, scenes: Path, tmp_path_factory: pytest.TempPathFactory, script: Callable[..., None]
) -> Callable[..., dict[str, Any]]:
    """`results(name)`: those of a class by scenario. All classes run in one session, except in long runs."""
    known: dict[str, dict[str, Any]] = {}

    def find(name: str) -> dict[str, Any]:
        if name not in known:
            folder = tmp_path_factory.mktemp("groups")
            wanted = [name] if ROUNDS else ["cases", "slow-rank", *RANDOM_CLASSES]
            by_class = {one: scenarios_of(one, folder, arguments(small, scenes)) for one in wanted}
            together = {key: scenario for made in by_class.values() for key, scenario in made.items()}
            all_results = run_scenarios(script, folder, together)
            known.update({one: {key: all_results[key] for key in made} for one, made in by_class.items()})
        return known[name]

    return find


@pytest.mark.parametrize(
    ("name", "failed"), [("rank 0 killed", 0), ("rank suspended", 2), ("rank hangs", 1)], ids=lambda value: str(value)
)
def test_failed_rank_is_named_and_all_ranks_exit(name: str, failed: int, results: Any) -> None:
    result = results("cases")[name]
    [[_, line]] = result["errors"]  # one rank reports for all
    named = f"rank {failed} on {os.uname().nodename} "
    assert line.startswith(f"error[{'E_HANG' if name == 'rank hangs' else 'E_RANK'}]: {named}"), line
    assert "run the same command again" in line
    check_error([], 1, line)
    # A rank sends its step once per second: one that is killed soon after its first step may not have sent it.
    starting = name == "rank 0 killed" and "before step 1" in line
    assert starting or f"step {4 if name == 'rank hangs' else ''}" in line
    assert result["seconds_to_error"] <= SLACK * (3 if name == "rank 0 killed" else TIMEOUT_SECONDS + 10), result
    assert {code for rank, code in enumerate(result["codes"]) if rank != failed} == {1}, result
    assert [rank for rank in result["killed"] if rank != failed] == []
    assert result["status"]["exit_code"] == 1 and str(ClipwrightError.from_dict(result["status"]["error"])) == line
    if name == "rank hangs":
        assert "made no progress for" in line and f"(limit {TIMEOUT_SECONDS:.0f} s)" in line
        assert "embed" in line and "fault.py" in line


def test_error_of_one_rank_is_reported_once_with_its_exit_code(results: Any) -> None:
    result = results("cases")["rank fails"]
    assert [(rank, line[:20]) for rank, line in result["errors"]] == [(1, "error[E_DATA_HASH]: ")]
    assert result["codes"] == [3, 3] and result["status"]["exit_code"] == 3 and result["seconds_to_exit"] < SLACK * 10
    assert not any("Traceback" in line for line in result["stderr"])


def test_signal_to_one_rank_saves_while_another_waits_for_data(results: Any) -> None:
    result = results("cases")["signal without data"]
    assert result["codes"] == [85, 85] and result["errors"] == [] and result["status"]["exit_code"] == 85
    assert result["checkpoints"] == [f"step-{result['steps']:08d}"] and result["steps"] >= 3  # no step is lost
    assert result["seconds_to_exit"] < SLACK * 25


@pytest.mark.parametrize(
    "name", ["signal while building", "signal to rank 0 while it loads", "signal to rank 1 while it loads"]
)
def test_signal_to_one_rank_before_the_first_step_ends_all_without_a_launcher(name: str, results: Any) -> None:
    result = results("cases")[name]
    assert result["codes"] == [85, 85] and result["errors"] == [] and result["killed"] == [], result
    assert result["seconds_to_last_exit"] < SLACK * 25 and not any("Traceback" in line for line in result["stderr"])
    assert result["stderr"][-1].startswith("stopped by a signal: ")


def test_ranks_whose_launcher_was_killed_save_and_leave(results: Any) -> None:
    for name in ("launcher killed", "launcher killed early"):
        result = results("cases")[name]
        assert result["codes"] == [85, 85] and result["errors"] == [] and result["killed"] == [], result
        assert result["seconds_to_last_exit"] < SLACK * 30
        assert result["checkpoints"] == ([f"step-{result['steps']:08d}"] if name == "launcher killed" else [])
        assert any(line.startswith("the launcher of this rank (process ") for line in result["stderr"])


@pytest.mark.parametrize(("name", "ranks"), [("signal known to one rank", 2), ("one rank", 1)])
def test_ranks_decide_together_to_stop_and_save(name: str, ranks: int, results: Any) -> None:
    result = results("cases")[name]
    assert result["codes"] == [85] * ranks and result["errors"] == [] and result["killed"] == [], result
    assert result["checkpoints"] == [f"step-{result['steps']:08d}"] and result["steps"] >= 3


def test_save_is_abandoned_if_the_ranks_do_not_agree_to_stop(results: Any) -> None:
    result = results("cases")["signal while a rank hangs"]
    [[_, line]] = result["errors"]
    check_error([], 1, line)
    assert line.startswith("error[E_UNSAVED]: ") and "did not agree" in line and "run the same command" in line
    assert result["codes"] == [1, 1] and result["seconds_to_exit"] < SLACK * 25 and result["status"]["exit_code"] == 1


def test_rank_signs_off_although_rank0_has_left_before() -> None:
    """The heartbeat thread may find rank 0 gone before it handles the main thread's sign-off."""
    rank0_end, own_end = socket.socketpair()
    heartbeat = Heartbeat(1, 2, 60.0, lambda number: None, lambda group_exit: None)
    heartbeat.peers = {0: Peer(0, state="finished")}
    heartbeat._connections[0] = Connection(own_end)
    heartbeat.sign_off(0.0)
    heartbeat.run()
    assert heartbeat.finished.is_set() and b'{"sign_off": true}' in rank0_end.recv(4096)


def pair(results: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """The results of a random scenario and of the same command again."""
    return [result for key, result in results.items() if key.split()[1] == str(seed)]


@pytest.mark.parametrize("seed", range(ROUNDS or 1))
def test_preemption_in_any_phase_loses_no_step(seed: int, results: Any) -> None:
    stopped, again = pair(results("preempt"), seed)
    assert set(stopped["codes"]) == {85} and stopped["errors"] == [] and stopped["killed"] == [], stopped
    assert stopped["seconds_to_exit"] <= SLACK * 25
    assert stopped["status"] is None or stopped["status"]["exit_code"] == 85
    assert stopped["checkpoints"][-1:] == ([f"step-{stopped['steps']:08d}"] if stopped["steps"] else [])
    assert set(again["codes"]) == {0} and again["steps"] == 36
    assert (f"resuming at step {stopped['steps']}\n" in again["stdout"]) == (stopped["steps"] > 0)


@pytest.mark.parametrize("seed", range(ROUNDS or 1))
def test_any_failed_rank_is_named_and_the_same_command_resumes(seed: int, results: Any) -> None:
    ranks = 4 if ROUNDS else 2
    failed, again = pair(results("failed-rank"), seed)
    rank = random.Random(seed).randrange(ranks)
    [[_, line]] = failed["errors"]
    assert re.match(rf"error\[E_(RANK|HANG)\]: rank {rank} on ", line), line
    assert failed["seconds_to_error"] <= SLACK * (TIMEOUT_SECONDS + 10)
    assert [killed for killed in failed["killed"] if killed != rank] == []
    assert set(again["codes"]) == {0} and again["steps"] == 36 and not again["errors"]


@pytest.mark.parametrize("seed", range(ROUNDS or 1))
def test_three_nonfinite_steps_end_the_run_with_a_finite_checkpoint(seed: int, results: Any) -> None:
    ended, again = pair(results("nonfinite"), seed)
    step = ended["steps"]
    [[_, line]] = ended["errors"]
    assert line.startswith("error[E_NONFINITE]: ") and f"run step {step}:" in line and ended["codes"] == [1, 1]
    assert [record["loss"] is None for record in ended["log"][-4:]] == [False, True, True, True]
    assert [record["skipped"] for record in ended["log"][:3]] == [0, 1, 1] and ended["log"][-1]["skipped"] == 4
    assert ended["log"][1]["loss"] is None and ended["log"][2]["loss"] > 0 and "skipped 1" in ended["stdout"]
    assert "accept=[optim.lr]" in line and f"data ledger run step={step}" in line
    saved = (step - 1) // 10 * 10  # also a checkpoint that was being written when the run ended
    newest = f"step-{saved:08d}" if saved else "none"
    assert ended["checkpoints"][-1:] == ([newest] if saved else []) and f"; newest checkpoint: {newest} —" in line
    if saved:
        assert f"resuming at step {int(newest[5:])}\n" in again["stdout"]
        for path in (Path(again["folder"]) / "run" / "checkpoints" / newest).glob("*.safetensors"):
            assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values()), path
    assert set(again["codes"]) == {0} and again["steps"] == 36  # the same command without the fault


def test_rank_of_half_the_pace_is_reported_within_fifty_steps(results: Any) -> None:
    slow, clean = results("slow-rank")["slow"], results("slow-rank").get("clean")
    assert set(slow["codes"]) == {0}, slow["stderr"]
    steps = [record["step"] for record in slow["log"] if record.get("slow") == [1]]
    assert steps[0] <= 90 and min(steps) > 40, steps
    [line] = [line for line in slow["stdout"].splitlines() if line.startswith("slow: ")]
    assert line.startswith(f"slow: rank 1 on {os.uname().nodename} takes ") and "waiting for data" in line
    if clean is not None:
        assert set(clean["codes"]) == {0} and len(clean["log"]) == 64
        assert "slow: " not in clean["stdout"] and not any("slow" in record for record in clean["log"])


def test_slow_ranks_are_found_by_the_median_of_the_other_ranks() -> None:
    assert slow_ranks([1, 1.2, 2.1, 0.9], 20) == {2}
    assert slow_ranks([1, 1.2, 1.5, 0.9], 20) == set()
    assert slow_ranks([1, 2.1], 20) == {1}
    assert slow_ranks([0.01, 0.03], 20) == set()  # too little of the total time to matter
    assert slow_ranks([3, 3, 1, 1], 20) == {0, 1}


def make_peers(*steps_and_phases: tuple[int, int]) -> list[Peer]:
    peers = [Peer(rank, f"node{rank}", 0.0, 0.0) for rank in range(len(steps_and_phases))]
    for peer, step_and_phase in zip(peers, steps_and_phases, strict=True):
        peer.report = {
            "step_and_phase": step_and_phase,
            "phase": "data",
            "in_collective": False,
            "code_line": "a.py:1 in b",
        }
    return peers


def test_failed_rank_is_found_by_the_heartbeats_of_all() -> None:
    at = (7, 2)
    assert find_failure(make_peers(at, at), 10.0, 10.0) is None
    error = find_failure(make_peers((-1, 0), at), 10.0, 5.0)
    assert error is not None and error.code == "E_RANK" and "sent no heartbeat for 10 s (limit 5 s)" in error.what
    peers = make_peers(at, (7, 1), at)
    for peer in peers:
        peer.last_heard = 20.0
    error = find_failure(peers, 20.0, 5.0)
    assert error is not None and error.code == "E_HANG"
    assert error.what == "rank 1 on node1 made no progress for 20 s (limit 5 s)"
    assert error.where == "step 8, phase data, at a.py:1 in b"
    peers[1].report["step_and_phase"] = (-1, 0)  # trains a tokenizer, while the other ranks wait for it
    assert find_failure(peers, 20.0, 5.0) is None
    peers[1].report |= {"step_and_phase": at, "in_collective": True}
    peers[2].report |= {"in_collective": True}  # equally far: the rank outside the collective hangs
    error = find_failure(peers, 20.0, 5.0)
    assert error is not None and error.what.startswith("rank 0 on node0 made no progress")
    peers[0].report |= {"in_collective": True}
    error = find_failure(peers, 20.0, 5.0)
    assert error is not None and error.found == "no other rank is ahead"
    peers[2].state = "disconnected"
    error = find_failure(peers, 6.0, 5.0)
    assert error is not None and error.what == "rank 2 on node2 exited without an error message"
    for peer in peers:
        peer.state = "connected"
        peer.discount_pause(16.0)  # of this process, which received nothing meanwhile
    assert find_failure(peers, 20.0, 5.0) is None and find_failure(peers, 22.0, 5.0) is not None
    for peer in peers[1:]:
        peer.state = "finished"
    peers[0].last_progress = 20.0
    assert find_failure(peers, 20.0, 5.0) is None
