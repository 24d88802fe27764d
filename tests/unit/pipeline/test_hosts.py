"""Several machines for real: hosts as network namespaces with addresses of their own, joined by a cable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.xdist_group("ranks")

SGD = ["optim.name=sgd", "optim.lr=0.05", "optim.weight_decay=0", "schedule.warmup=0", "schedule.decay=constant"]
FIRST = "10.77.0.1"
CABLE = "cw0"  # the name of each host's end


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces, each with one address, that reach each other and nothing else."""
    if os.geteuid() != 0:
        pytest.skip("not root")
    if shutil.which("ip") is None:
        pytest.skip("no iproute2")
    names = (f"cw{os.getpid()}a", f"cw{os.getpid()}b")
    try:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
                pytest.skip("no network namespaces")
        cable = ["ip", "link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE]
        subprocess.run([*cable, "netns", names[1]], check=True)
        for number, name in enumerate(names, 1):
            for words in (["addr", "add", f"10.77.0.{number}/24", "dev", CABLE], ["link", "set", CABLE, "up"]):
                subprocess.run(["ip", "-n", name, *words], check=True)
            subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_hosts_train_as_one(hosts: tuple[str, str], scenes: Path, tmp_path: Path, small: Any) -> None:
    """By a hostfile and by Slurm's variables: the losses of one process on one host."""
    words = [*small.settings, f"data.train={scenes}", "schedule.samples=64", *SGD]
    small.cli(tmp_path)("train", *words, "-o", "one")
    words.append("runtime.zero=2")

    (tmp_path / "ssh").write_text('#!/bin/sh\nexec ip netns exec "$3" sh -c "$4"\n')
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    told = ["hostfile=hosts", f"master={FIRST}", f"env.GLOO_SOCKET_IFNAME={CABLE}"]
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = small.cli(tmp_path)("launch", "hostfile", *told, "train", *words, "-o", "by_hostfile", env=env)
    assert f"world 2 = 2 nodes × 1 (from DeepSpeed), master {FIRST}:29500, backend gloo" in done.stdout

    ranks = []
    for rank, host in enumerate(hosts):
        env = {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank), "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
        env |= {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "10.77.0.[1-2]", "SLURM_JOB_ID": "41"}
        env |= {**os.environ, "GLOO_SOCKET_IFNAME": CABLE, "OMP_NUM_THREADS": "1"}
        line = ["ip", "netns", "exec", host, sys.executable, "-m", "clipwright", "train", *words, "-o", "by_slurm"]
        ranks.append(subprocess.Popen(line, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True))
    try:
        said = [rank.communicate(timeout=200)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert f"world 2 = 2 nodes × 1 (from SLURM), master {FIRST}:20041, backend gloo" in said[0]

    one = small.losses(tmp_path / "one")
    assert [line["step"] for line in one] == [1, 2, 3, 4]
    for run in ("by_hostfile", "by_slurm"):
        many = small.losses(tmp_path / run)
        for field in ("loss", "grad_norm"):
            assert [line[field] for line in many] == pytest.approx([line[field] for line in one], rel=1e-5, abs=1e-5)
