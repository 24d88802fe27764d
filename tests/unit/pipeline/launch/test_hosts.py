"""Several hosts: network namespaces with an address each, joined by a switch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

pytestmark = pytest.mark.xdist_group("ranks")

SGD = ["optim.name=sgd", "optim.lr=0.05", "optim.weight_decay=0", "schedule.warmup=0", "schedule.name=constant"]
BATCH = ["schedule.global_batch=12", "schedule.samples=48"]
RANK0_ADDRESS = "10.77.0.1"
INTERFACE = "cw0"  # of each host
TIMEOUT_SECONDS = 9.0
SOAK = "CLIPWRIGHT_SOAK" in os.environ  # see tests/soak.py


def env_without_launcher() -> dict[str, str]:
    """The environment without launchers' variables."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "SLURM_"))}


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """Three namespaces with one address each, which reach each other and nothing else."""
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
        for command in ("link add switch type bridge", "link set switch up"):
            if subprocess.run(["ip", "-n", switch, *command.split()], capture_output=True).returncode:
                pytest.skip("no network namespaces")
        for number, name in enumerate(names, 1):
            add_link = f"ip link add {INTERFACE} netns {name} type veth peer name port{number} netns {switch}"
            subprocess.run(add_link.split(), check=True)
            ip(switch, f"link set port{number} master switch up")
            ip(name, f"addr add 10.77.0.{number}/24 dev {INTERFACE}")
            ip(name, f"link set {INTERFACE} up")
            ip(name, "link set lo up")
        yield names
    finally:
        for name in (*names, switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ip(host: str, command: str) -> None:
    subprocess.run(["ip", "-n", host, *command.split()], check=True)


def hostfile_launch(folder: Path, hosts: list[str]) -> tuple[list[str], dict[str, str]]:
    """The arguments of `launch hostfile` for these hosts, and an environment with an `ssh` that enters them."""
    (folder / "ssh").write_text('#!/bin/sh\nexec ip netns exec "$3" sh -c "$4"\n')
    (folder / "ssh").chmod(0o755)
    (folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    launch = ["launch", "hostfile", "hostfile=hosts", f"master={RANK0_ADDRESS}", f"env.GLOO_SOCKET_IFNAME={INTERFACE}"]
    return launch, {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def expected(scenes: Path, small: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The logged steps of one process on one host."""
    folder = tmp_path_factory.mktemp("one")
    small(folder, f"data.train={scenes}", *BATCH, *SGD, "-o", "run")
    return small.losses(folder / "run")


def assert_equal_steps(run: Path, expected: list[dict[str, Any]], small: Any) -> None:
    steps = small.losses(run)
    assert [record["step"] for record in expected] == [record["step"] for record in steps] == [1, 2, 3, 4]
    for field in ("loss", "grad_norm"):
        values = [record[field] for record in expected]
        assert [record[field] for record in steps] == pytest.approx(values, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("count", [2, 3] if SOAK else [3])
def test_hosts_of_a_hostfile_train_like_one_process(
    count: int, hosts: list[str], expected: list[dict[str, Any]], scenes: Path, tmp_path: Path, small: Any
) -> None:
    launch, env = hostfile_launch(tmp_path, hosts[:count])
    settings = [*small.settings, f"data.train={scenes}", *BATCH, *SGD, "runtime.zero=2"]
    done = small.cli(tmp_path)(*launch, "train", *settings, "-o", "run", env=env)
    world = f"world size {count} = {count} nodes × 1 (from DeepSpeed), master {RANK0_ADDRESS}:29500, backend gloo"
    assert world in done.stdout
    assert_equal_steps(tmp_path / "run", expected, small)


@pytest.mark.parametrize("count", [2, 3] if SOAK else [2])
def test_hosts_with_slurm_variables_train_like_one_process(
    count: int, hosts: list[str], expected: list[dict[str, Any]], scenes: Path, tmp_path: Path, small: Any
) -> None:
    settings = [*small.settings, f"data.train={scenes}", *BATCH, *SGD, "runtime.zero=2"]
    ranks = []
    for rank, host in enumerate(hosts[:count]):
        env = {
            **env_without_launcher(),
            "SLURM_PROCID": str(rank),
            "SLURM_NODEID": str(rank),
            "SLURM_LOCALID": "0",
            "SLURM_NTASKS": str(count),
            "SLURM_NNODES": str(count),
            "SLURM_JOB_NODELIST": f"10.77.0.[1-{count}]",
            "SLURM_JOB_ID": "41",
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": "1",
        }
        command = ["ip", "netns", "exec", host, sys.executable, "-m", "clipwright", "train", *settings, "-o", "run"]
        ranks.append(subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True))
    try:
        outputs = [rank.communicate(timeout=1200)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * count
    assert (
        f"world size {count} = {count} nodes × 1 (from Slurm), master {RANK0_ADDRESS}:20041, backend gloo" in outputs[0]
    )
    assert_equal_steps(tmp_path / "run", expected, small)


def test_disconnected_host_is_named_and_the_other_hosts_resume(
    hosts: list[str], scenes: Path, tmp_path: Path, small: Any
) -> None:
    """Its interface goes down: no connection is closed, nothing arrives. The other ranks exit and resume without it."""
    launch, env = hostfile_launch(tmp_path, hosts)
    runtime = [f"runtime.timeout_minutes={TIMEOUT_SECONDS / 60}", "runtime.save_every=5", "schedule.global_batch=12"]
    train = ["train", *small.settings, f"data.train={scenes}", *SGD, *runtime, "schedule.samples=120000", "-o", "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "clipwright", *launch, *train],
        cwd=tmp_path,
        env={**env_without_launcher(), "OMP_NUM_THREADS": "1", **env},
        stderr=(tmp_path / "err").open("w"),
        stdout=subprocess.DEVNULL,
    )
    latest = tmp_path / "run" / "latest"
    wait_until(latest.exists, process)
    try:
        ip(hosts[2], f"link set {INTERFACE} down")
        assert process.wait() == 1
    finally:
        process.kill()
        ip(hosts[2], f"link set {INTERFACE} up")
    line = (tmp_path / "err").read_text().splitlines()[-1]
    assert re.match(r"error\[E_RANK\]: rank 2 on \S+ sent no heartbeat for \d+ s \(limit 9 s\) — ", line), line
    launch, env = hostfile_launch(tmp_path, hosts[:2])
    steps = int(latest.read_text().strip().removeprefix("step-")) + 2
    done = small.cli(tmp_path)(*launch, *train, f"runtime.stop_at={steps}", env=env)
    assert f"resuming at step {steps - 2}" in done.stdout and "world size 2 = 2 nodes" in done.stdout
