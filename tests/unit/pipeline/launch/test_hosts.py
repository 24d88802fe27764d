"""Several machines for real: hosts as network namespaces with addresses of their own, joined by a switch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.xdist_group("ranks")

SGD = ["optim.name=sgd", "optim.lr=0.05", "optim.weight_decay=0", "schedule.warmup=0", "schedule.decay=constant"]
BATCH = ["schedule.global_batch=12", "schedule.samples=48"]
FIRST = "10.77.0.1"
CABLE = "cw0"  # the name of each host's end
PATIENCE = 9.0
LONG = "CLIPWRIGHT_SOAK" in os.environ  # see tests/soak.py


def unplaced() -> dict[str, str]:
    """The environment without a place among ranks, which accelerate leaves in that of whoever asks it."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "SLURM_"))}


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """Three namespaces, each with one address, that reach each other and nothing else."""
    if os.geteuid() != 0:
        pytest.skip("not root")
    if shutil.which("ip") is None:
        pytest.skip("no iproute2")
    names = [f"cw{os.getpid()}{letter}" for letter in "abc"]
    switch = f"cw{os.getpid()}s"
    try:
        for name in (*names, switch):
            if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
                pytest.skip("no network namespaces")
        for words in ("link add switch type bridge", "link set switch up"):
            if subprocess.run(["ip", "-n", switch, *words.split()], capture_output=True).returncode:
                pytest.skip("no network namespaces")
        for number, name in enumerate(names, 1):
            cable = f"ip link add {CABLE} netns {name} type veth peer name port{number} netns {switch}"
            subprocess.run(cable.split(), check=True)
            ip(switch, f"link set port{number} master switch up")
            ip(name, f"addr add 10.77.0.{number}/24 dev {CABLE}")
            ip(name, f"link set {CABLE} up")
            ip(name, "link set lo up")
        yield names
    finally:
        for name in (*names, switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ip(host: str, words: str) -> None:
    subprocess.run(["ip", "-n", host, *words.split()], check=True)


def launching(folder: Path, hosts: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words of `launch` by a hostfile of these hosts, and the environment with an ssh that enters them."""
    (folder / "ssh").write_text('#!/bin/sh\nexec ip netns exec "$3" sh -c "$4"\n')
    (folder / "ssh").chmod(0o755)
    (folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    words = ["launch", "hostfile", "hostfile=hosts", f"master={FIRST}", f"env.GLOO_SOCKET_IFNAME={CABLE}"]
    return words, {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def one(scenes: Path, small: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The losses of one process on one host."""
    folder = tmp_path_factory.mktemp("one")
    small(folder, f"data.train={scenes}", *BATCH, *SGD, "-o", "run")
    return small.losses(folder / "run")


def same(run: Path, one: list[dict[str, Any]], small: Any) -> None:
    many = small.losses(run)
    assert [line["step"] for line in one] == [line["step"] for line in many] == [1, 2, 3, 4]
    for field in ("loss", "grad_norm"):
        assert [line[field] for line in many] == pytest.approx([line[field] for line in one], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("count", [2, 3] if LONG else [3])
def test_hosts_of_a_hostfile_train_as_one(
    count: int, hosts: list[str], one: list[dict[str, Any]], scenes: Path, tmp_path: Path, small: Any
) -> None:
    told, env = launching(tmp_path, hosts[:count])
    words = [*small.settings, f"data.train={scenes}", *BATCH, *SGD, "runtime.zero=2"]
    done = small.cli(tmp_path)(*told, "train", *words, "-o", "run", env=env)
    world = f"world size {count} = {count} nodes × 1 (from DeepSpeed), master {FIRST}:29500, backend gloo"
    assert world in done.stdout
    same(tmp_path / "run", one, small)


@pytest.mark.parametrize("count", [2, 3] if LONG else [2])
def test_hosts_by_slurms_variables_train_as_one(
    count: int, hosts: list[str], one: list[dict[str, Any]], scenes: Path, tmp_path: Path, small: Any
) -> None:
    words = [*small.settings, f"data.train={scenes}", *BATCH, *SGD, "runtime.zero=2"]
    ranks = []
    for rank, host in enumerate(hosts[:count]):
        env = {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank), "SLURM_LOCALID": "0", "SLURM_NTASKS": str(count)}
        env |= {"SLURM_NNODES": str(count), "SLURM_JOB_NODELIST": f"10.77.0.[1-{count}]", "SLURM_JOB_ID": "41"}
        env |= {**unplaced(), "GLOO_SOCKET_IFNAME": CABLE, "OMP_NUM_THREADS": "1"}
        line = ["ip", "netns", "exec", host, sys.executable, "-m", "clipwright", "train", *words, "-o", "run"]
        ranks.append(subprocess.Popen(line, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True))
    try:
        said = [rank.communicate(timeout=200)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * count
    assert f"world size {count} = {count} nodes × 1 (from Slurm), master {FIRST}:20041, backend gloo" in said[0]
    same(tmp_path / "run", one, small)


def test_a_host_that_is_cut_off_is_named_and_the_rest_goes_on(
    hosts: list[str], scenes: Path, tmp_path: Path, small: Any
) -> None:
    """Its cable is pulled: no connection is closed, nothing comes any more. The others leave, and resume without it."""
    told, env = launching(tmp_path, hosts)
    runtime = [f"runtime.timeout_minutes={PATIENCE / 60}", "runtime.save_every=5", "schedule.global_batch=12"]
    words = ["train", *small.settings, f"data.train={scenes}", *SGD, *runtime, "schedule.samples=120000", "-o", "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "clipwright", *told, *words],
        cwd=tmp_path,
        env={**unplaced(), "OMP_NUM_THREADS": "1", **env},
        stderr=(tmp_path / "err").open("w"),
        stdout=subprocess.DEVNULL,
    )
    latest, deadline = tmp_path / "run" / "latest", time.monotonic() + 150
    while not latest.exists():
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "err").read_text()
        time.sleep(0.05)
    try:
        ip(hosts[2], f"link set {CABLE} down")
        cut = time.monotonic()
        status = tmp_path / "run" / "status.json"
        while not status.exists():
            assert time.monotonic() < cut + PATIENCE + 10, (tmp_path / "err").read_text()
            time.sleep(0.05)
        assert process.wait(timeout=60) == 1
    finally:
        process.kill()
        ip(hosts[2], f"link set {CABLE} up")
    line = (tmp_path / "err").read_text().splitlines()[-1]
    assert line.startswith("error[E_RANK]: rank 2 on ") and "sent no heartbeat for" in line
    told, env = launching(tmp_path, hosts[:2])
    steps = int(latest.read_text().strip().removeprefix("step-")) + 2
    done = small.cli(tmp_path)(*told, *words, f"runtime.stop_at={steps}", env=env)
    assert f"resuming at step {steps - 2}" in done.stdout and "world size 2 = 2 nodes" in done.stdout
