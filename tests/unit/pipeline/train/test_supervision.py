"""A rank that is told to stop, dies, hangs, is slow or computes nonsense, and what its group makes of it."""

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
from safetensors.torch import load_file

from clipwright.pipeline.train.step_checks import slow_ranks
from clipwright.pipeline.train.supervision.failures import Peer, judge
from clipwright.pipeline.train.supervision.heartbeat import Heartbeat, Link

pytestmark = pytest.mark.xdist_group("ranks")
ROUNDS = int(os.environ.get("CLIPWRIGHT_SOAK", "0"))  # see tests/soak.py
PATIENCE = 8.0
SHORT = [f"runtime.timeout_minutes={PATIENCE / 60}"]


def words(small: Any, scenes: Path, *more: str) -> list[str]:
    tiny = ["image.depth=1", "text.depth=1", "embed_dim=32", "schedule.global_batch=12", "schedule.warmup=0"]
    runtime = ["runtime.timeout_minutes=2", "runtime.save_every=10", "schedule.samples=48000"]
    return ["train", *small.settings, *tiny, *runtime, f"data.train={scenes}", *more, "-o", "run"]


def play(script: Callable[..., None], folder: Path, scenarios: dict[str, Scenario]) -> dict[str, Any]:
    """Runs scenarios one after another, in one session."""
    group_ranks.write(folder / "scenarios.json", scenarios)
    for scenario in scenarios.values():
        scenario.path.mkdir(exist_ok=True)
    script(group_ranks, folder / "scenarios.json", timeout=1800)
    return json.loads((folder / "results.json").read_text())


CASES: dict[str, dict[str, Any]] = {
    "first killed": {"when": "steps 3", "send": "SIGKILL", "to": [0]},
    "stopped": {"ranks": 3, "when": "steps 3", "send": "SIGSTOP", "to": [2]},
    "hangs": {"ranks": 3, "fault": "'hang' if rank == 1 and step == 3 else None", "when": "at 1"},
    "refuses": {"fault": "'refuse' if rank == 1 and step == 2 else None", "when": "at 1"},
    "told without data": {"fault": "'starve' if rank == 0 and step == 3 else None", "when": "at 0", "to": [1]},
    "told while building": {"fault": "'build' if rank == 0 and step == -1 else None", "when": "at 0", "to": [1]},
    "told in vain": {"fault": "'hang' if rank == 0 and step == 3 else None", "when": "at 0", "to": [1]},
}
# What is drawn: R is a rank, S a step. Where no signal is named, one that tells to stop goes to that rank or to all.
TOLD = {
    "train": {"when": "steps S"},
    "save": {"fault": "'save' if rank == R and step == 10 else None", "when": "at R"},
    "data": {"fault": "'starve' if rank == R and step == S else None", "when": "at R"},
    "build": {"fault": "'build' if rank == R and step == -1 else None", "when": "at R", "pause": 1.0},
    "load": {"fault": "'load' if rank == R and step == -2 else None", "when": "at R", "pause": 1.0},
}
ILL = {
    "killed": {"when": "steps S", "send": "SIGKILL"},
    "stopped": {"when": "steps S", "send": "SIGSTOP"},
    "hangs": {"fault": "'hang' if rank == R and step == S else None", "when": "at R", "send": ""},
    "starves": {"fault": "'starve' if rank == R and step == S else None", "when": "at R", "send": ""},
    "stuck in a save": {"fault": "'stuck save' if rank == R and step == 10 else None", "when": "at R", "send": ""},
}
NAN = {"nan": {"fault": "'nan' if rank == R and (step == 1 or step >= S) else None", "when": "at R", "send": ""}}
DRAWN = {"told": (TOLD, 2), "ill": (ILL, 4 if ROUNDS else 2), "nan": (NAN, 2)}


def drawn(seed: int, kinds: dict[str, dict[str, Any]], ranks: int) -> dict[str, Any]:
    draw = random.Random(seed)
    kind, rank, step = kinds[list(kinds)[seed % len(kinds)]], draw.randrange(ranks), draw.randint(4, 25)
    fill = {"R": str(rank), "S": str(step)}
    said = {key: kind[key] for key in ("fault", "when") if key in kind}
    named = {key: re.sub("[RS]", lambda found: fill[found[0]], text) for key, text in said.items()}
    told = {"send": draw.choice(["SIGTERM", "SIGUSR1"]), "to": draw.choice([[], [rank]])}
    return {"ranks": ranks, **(told if "send" not in kind else {"to": [rank]}), **kind, **named}


def scenarios(name: str, folder: Path, line: list[str]) -> dict[str, Scenario]:
    """Those of one class; what is drawn is followed by the same command once more, without what was wrong."""
    if name == "cases":
        more = {"stopped": SHORT, "hangs": SHORT}
        told = {case: {"send": "SIGTERM"} if "told" in case else {} for case in CASES}
        return {
            case: Scenario(str(folder / case.replace(" ", "_")), [*line, *more.get(case, [])], **told[case], **rest)
            for case, rest in CASES.items()
        }
    if name == "paces":
        ranks, line = 4 if ROUNDS else 2, [*line, "runtime.log_every=16", "runtime.stop_at=96"]
        slow = "'slow' if rank == 1 and step >= 40 else None"
        clean = {"clean": Scenario(str(folder / "clean"), [*line, "runtime.stop_at=1000"], ranks)} if ROUNDS else {}
        return {"slow": Scenario(str(folder / "slow"), line, ranks, slow), **clean}
    made: dict[str, Scenario] = {}
    for seed in range(ROUNDS or 1):
        at, (kinds, ranks) = str(folder / f"{name}_{seed}"), DRAWN[name]
        made[f"{name} {seed}"] = Scenario(at, line + (SHORT if name == "ill" else []), **drawn(seed, kinds, ranks))
        made[f"{name} {seed} again"] = Scenario(at, [*line, "runtime.stop_at=36"], ranks)
    return made


@pytest.fixture(scope="module")
def seen(
    small: Any, scenes: Path, tmp_path_factory: pytest.TempPathFactory, script: Callable[..., None]
) -> Callable[..., dict[str, Any]]:
    """`seen(name)`: what came of a class; all of them are played in one session but in long runs."""
    known: dict[str, dict[str, Any]] = {}

    def look(name: str) -> dict[str, Any]:
        if name not in known:
            folder = tmp_path_factory.mktemp("groups")
            wanted = [name] if ROUNDS else ["cases", "paces", *DRAWN]
            made = {one: scenarios(one, folder, words(small, scenes)) for one in wanted}
            found = play(script, folder, {key: value for those in made.values() for key, value in those.items()})
            known.update({one: {key: found[key] for key in those} for one, those in made.items()})
        return known[name]

    return look


@pytest.mark.parametrize("name", ["first killed", "stopped", "hangs"])
def test_a_rank_that_is_ill_is_named_and_all_leave(name: str, seen: Any) -> None:
    found, ill = seen("cases")[name], {"first killed": 0, "stopped": 2, "hangs": 1}[name]
    [[_, line]] = found["errors"]  # one rank speaks for all
    assert line.startswith("error[E_HANG]: " if name == "hangs" else "error[E_RANK]: ")
    assert f" — rank {ill} on {os.uname().nodename} — " in line and "run the same command again" in line
    # A rank says where it is once a second: killed soon after its first step, it may not have told of it.
    assert f"step {4 if name == 'hangs' else ''}" in line or (name == "first killed" and "it was starting" in line)
    assert found["told"] <= (("killed" in name and 3) or PATIENCE + 10), found
    assert {code for rank, code in enumerate(found["codes"]) if rank != ill} == {1}, found
    assert [rank for rank in found["killed"] if rank != ill] == []
    assert found["status"]["exit_code"] == 1 and found["status"]["error"]["message"] == line
    if name == "hangs":
        assert "embed" in line and "fault.py" in line


def test_what_one_rank_refuses_is_said_once_and_all_leave_with_its_code(seen: Any) -> None:
    found = seen("cases")["refuses"]
    assert [(rank, line[:20]) for rank, line in found["errors"]] == [(1, "error[E_DATA_HASH]: ")]
    assert found["codes"] == [3, 3] and found["status"]["exit_code"] == 3 and found["left"] < 10
    assert not any("Traceback" in line for line in found["stderr"])


def test_a_run_of_which_one_rank_is_told_to_stop_while_another_has_no_data_saves(seen: Any) -> None:
    found = seen("cases")["told without data"]
    assert found["codes"] == [85, 85] and found["errors"] == [] and found["status"]["exit_code"] == 85
    assert found["checkpoints"] == [f"step-{found['steps']:08d}"] and found["steps"] >= 3  # no step is lost
    assert found["left"] < 25


def test_what_has_nothing_to_save_leaves_at_once(seen: Any) -> None:
    found = seen("cases")["told while building"]
    assert found["codes"] == [85, 85] and found["errors"] == [] and found["left"] < 10


def test_a_save_that_the_ranks_do_not_come_to_is_given_up(seen: Any) -> None:
    found = seen("cases")["told in vain"]
    [[_, line]] = found["errors"]
    assert line.startswith("error[E_UNSAVED]: ") and "did not come to agree" in line and "run the same command" in line
    assert found["codes"] == [1, 1] and found["left"] < 25 and found["status"]["exit_code"] == 1


def test_a_rank_that_is_done_says_so_though_the_first_has_left_before() -> None:
    """Its thread may look around between the main thread's last word and the news of it."""
    first, mine = socket.socketpair()
    heart = Heartbeat(1, 2, 60.0, lambda number: None, lambda end: None)
    heart.peers, heart._links[0] = {0: Peer(0, state="left")}, Link(mine)
    heart.sign_off(0.0)
    heart.run()
    assert heart.over.is_set() and b'{"sign_off": true}' in first.recv(4096)


def pair(found: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    return [what for key, what in found.items() if key.split()[1] == str(seed)]


@pytest.mark.parametrize("seed", range(ROUNDS or 1))
def test_told_to_stop_in_any_phase_nothing_is_lost(seed: int, seen: Any) -> None:
    found, again = pair(seen("told"), seed)
    assert set(found["codes"]) == {85} and found["errors"] == [] and found["killed"] == [], found
    assert found["left"] <= 25
    assert found["status"] is None or found["status"]["exit_code"] == 85
    assert found["checkpoints"][-1:] == ([f"step-{found['steps']:08d}"] if found["steps"] else [])
    assert set(again["codes"]) == {0} and again["steps"] == 36
    assert (f"resuming at step {found['steps']}\n" in again["said"]) == (found["steps"] > 0)


@pytest.mark.parametrize("seed", range(ROUNDS or 1))
def test_any_illness_is_named_and_the_same_command_resumes(seed: int, seen: Any) -> None:
    ranks = 4 if ROUNDS else 2
    found, again = pair(seen("ill"), seed)
    rank = random.Random(seed).randrange(ranks)
    [[_, line]] = found["errors"]
    assert line.startswith(("error[E_RANK]: ", "error[E_HANG]: ")) and f" — rank {rank} on " in line, line
    assert found["told"] <= PATIENCE + 10 and [one for one in found["killed"] if one != rank] == []
    assert set(again["codes"]) == {0} and again["steps"] == 36 and not again["errors"]


@pytest.mark.parametrize("seed", range(ROUNDS or 1))
def test_a_run_of_three_bad_steps_keeps_a_finite_checkpoint(seed: int, seen: Any) -> None:
    found, again = pair(seen("nan"), seed)
    step = found["steps"]
    [[_, line]] = found["errors"]
    assert line.startswith("error[E_NONFINITE]: ") and f"run step {step}:" in line and found["codes"] == [1, 1]
    assert [record["loss"] is None for record in found["log"][-4:]] == [False, True, True, True]
    assert [record["skipped"] for record in found["log"][:3]] == [0, 1, 1] and found["log"][-1]["skipped"] == 4
    assert found["log"][1]["loss"] is None and found["log"][2]["loss"] > 0 and "skipped 1" in found["said"]
    assert "lower optim.lr" in line and f"data ledger run step={step}" in line
    saved = (step - 1) // 10 * 10  # one that was being written when the run ended, too
    newest = f"step-{saved:08d}" if saved else "no checkpoint"
    assert found["checkpoints"][-1:] == ([newest] if saved else []) and f"; {newest} stands" in line
    if saved:
        assert f"resuming at step {int(newest[5:])}\n" in again["said"]
        for path in (Path(again["folder"]) / "run" / "checkpoints" / newest).glob("*.safetensors"):
            assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values()), path
    assert set(again["codes"]) == {0} and again["steps"] == 36  # the same command without what made it ill


def test_a_rank_of_half_the_pace_is_flagged_within_fifty_steps(seen: Any) -> None:
    found, clean = (seen("paces").get(name) for name in ("slow", "clean"))
    assert set(found["codes"]) == {0}, found["stderr"]
    flagged = [record["step"] for record in found["log"] if record.get("slow") == [1]]
    assert flagged[0] <= 90 and min(flagged) > 40, flagged
    [line] = [line for line in found["said"].splitlines() if line.startswith("slow: ")]
    assert line.startswith(f"slow: rank 1 on {os.uname().nodename} takes ") and "waiting for data" in line
    if clean is not None:
        assert set(clean["codes"]) == {0} and len(clean["log"]) == 64
        assert "slow: " not in clean["said"] and not any("slow" in record for record in clean["log"])


def test_ranks_are_compared_with_the_median_of_the_others() -> None:
    assert slow_ranks([1, 1.2, 2.1, 0.9], 20) == {2}
    assert slow_ranks([1, 1.2, 1.5, 0.9], 20) == set()
    assert slow_ranks([1, 2.1], 20) == {1}
    assert slow_ranks([0.01, 0.03], 20) == set()  # nobody waits for that
    assert slow_ranks([3, 3, 1, 1], 20) == {0, 1}


def test_who_is_ill_by_what_each_said() -> None:
    def peers(*marks: tuple[int, int], **fields: Any) -> list[Peer]:
        made = [Peer(rank, f"node{rank}", 0.0, 0.0) for rank in range(len(marks))]
        for peer, mark in zip(made, marks, strict=True):
            peer.beat = {"mark": mark, "phase": "data", "waits": False, "at": "a.py:1 in b"} | fields.get("beat", {})
        return made

    at = (7, 2)
    assert judge(peers(at, at), 10.0, 10.0) is None
    assert judge(peers((-1, 0), at), 10.0, 5.0) is not None  # silent
    waiting = peers(at, (7, 1), at)
    for peer in waiting:
        peer.heard = 20.0
    assert (
        (error := judge(waiting, 20.0, 5.0)) is not None and error.code == "E_HANG" and "rank 1 on node1" in str(error)
    )
    waiting[1].beat["mark"] = (-1, 0)  # learns a tokenizer, while the others wait for it
    assert judge(waiting, 20.0, 5.0) is None
    waiting[1].beat |= {"mark": at, "waits": True}
    waiting[2].beat |= {"waits": True}  # equally far: the one that does not wait
    assert (error := judge(waiting, 20.0, 5.0)) is not None and error.where == "rank 0 on node0"
    waiting[0].beat |= {"waits": True}
    assert (error := judge(waiting, 20.0, 5.0)) is not None and "no rank is behind" in error.found
    waiting[2].state = "gone"
    assert (error := judge(waiting, 6.0, 5.0)) is not None and error.where == "rank 2 on node2"
    for peer in waiting:
        peer.state = "here"
        peer.discount_pause(16.0)  # as long as nobody listened
    assert judge(waiting, 20.0, 5.0) is None and judge(waiting, 22.0, 5.0) is not None
    for peer in waiting[1:]:
        peer.state = "left"
    waiting[0].moved = 20.0
    assert judge(waiting, 20.0, 5.0) is None
