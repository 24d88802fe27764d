"""Reading launchers' environment variables: rank, world size, launcher, and the address of the rendezvous."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.distributed.group import World
from clipwright.pipeline.distributed.launcher_env import LauncherEnv, first_host, read_launcher_env

TORCHRUN = {
    "RANK": "11",
    "WORLD_SIZE": "32",
    "LOCAL_RANK": "3",
    "LOCAL_WORLD_SIZE": "8",
    "GROUP_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29512",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "11",
    "SLURM_NTASKS": "32",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "4",
    "SLURM_TASKS_PER_NODE": "8(x4)",
    "SLURM_JOB_NODELIST": "gpu[007-009,12]",
    "SLURM_JOB_ID": "1234567",
}
SLURM_PORT = 20000 + 1234567 % 12000
UNEVEN_SLURM_STEP = {
    "SLURM_PROCID": "19",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_NTASKS": "64",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_TASKS_PER_NODE": "16(x4)",
    "SLURM_STEP_NODELIST": "b2,b[3-4]",
    "SLURM_JOB_NODELIST": "b[1-4]",
    "SLURM_JOB_ID": "7",
    "MASTER_PORT": "4000",
}
SLURM_ON_ONE_NODE = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "MASTER_ADDR": "a",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "run-0.run"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, LauncherEnv("one process")),
        ({"WORLD_SIZE": "1"}, LauncherEnv("one process")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "JOB_COMPLETION_INDEX": "3"}, LauncherEnv("one process")),
        (TORCHRUN, LauncherEnv("torchrun", 11, 32, 3, 8, 4, "node1", 29512)),
        (DEEPSPEED, LauncherEnv("DeepSpeed", 3, 4, 1, 2, 2, "10.0.0.1", 29500)),
        (SLURM, LauncherEnv("Slurm", 11, 32, 3, 8, 4, "gpu007", SLURM_PORT)),
        (SLURM | {"MASTER_ADDR": "fast1"}, LauncherEnv("Slurm", 11, 32, 3, 8, 4, "fast1", SLURM_PORT)),
        (UNEVEN_SLURM_STEP, LauncherEnv("Slurm", 19, 20, 3, 4, 3, "b2", 4000)),
        (SLURM_ON_ONE_NODE, LauncherEnv("Slurm", 1, 2, 1, 2, 1, "127.0.0.1", 29500)),
        (OPEN_MPI, LauncherEnv("MPI", 3, 4, 1, 2, 2, "a", 29500)),
        (HYDRA, LauncherEnv("MPI", 1, 2, 1, 2, 1, "127.0.0.1", 29500)),
        (KUBERNETES, LauncherEnv("Kubernetes", 2, 3, 0, 1, 3, "run-0.run", 29500)),
        # srun sets PMI's variables too, and starts torchrun or mpirun once per node.
        (
            SLURM_ON_ONE_NODE | {"PMI_RANK": "1", "PMI_SIZE": "2"},
            LauncherEnv("Slurm", 1, 2, 1, 2, 1, "127.0.0.1", 29500),
        ),
        (
            TORCHRUN | {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"},
            LauncherEnv("torchrun", 11, 32, 3, 8, 4, "node1", 29512),
        ),
        (TORCHRUN | {"JOB_COMPLETION_INDEX": "1"}, LauncherEnv("torchrun", 11, 32, 3, 8, 4, "node1", 29512)),
    ],
)
def test_launcher_variables_are_read(env: dict[str, str], expected: LauncherEnv) -> None:
    assert read_launcher_env(env) == expected


@pytest.mark.parametrize(
    ("env", "texts"),
    [
        (
            TORCHRUN | {"SLURM_PROCID": "3", "SLURM_NTASKS": "16"},
            ["torchrun and Slurm", "11 of 32", "3 of 16"],
        ),
        # Another node's rank.
        (TORCHRUN | {"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, ["rank 11 of 32", "2 of 4 according to Slurm"]),
        (SLURM | HYDRA, ["Slurm and MPI", "11 of 32", "1 of 2", "PMI_RANK"]),
        (SLURM_ON_ONE_NODE | KUBERNETES, ["Slurm and Kubernetes", "JOB_COMPLETION_INDEX"]),
        ({"RANK": "3"}, ["RANK=3", "WORLD_SIZE is not set"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "no variable states the rank"]),
        ({"RANK": "x", "WORLD_SIZE": "2"}, ["RANK=x"]),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, ["rank 2 of 2"]),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ["torchrun", "MASTER_ADDR is not set"]),
        (
            {name: value for name, value in OPEN_MPI.items() if name != "MASTER_ADDR"},
            ["MPI", "MASTER_ADDR is not set"],
        ),
        ({"JOB_COMPLETION_INDEX": "2", "WORLD_SIZE": "3"}, ["Kubernetes", "MASTER_ADDR is not set"]),
    ],
)
def test_contradictory_or_incomplete_variables_are_refused(env: dict[str, str], texts: list[str]) -> None:
    with pytest.raises(ClipwrightError) as refused:
        read_launcher_env(env)
    assert refused.value.code == "E_WORLD"
    for text in texts:
        assert text in str(refused.value)


def test_torchrun_variables_of_any_launcher_are_read_back_equal() -> None:
    for env in (SLURM, UNEVEN_SLURM_STEP, OPEN_MPI, KUBERNETES):
        launcher = read_launcher_env(env)
        read_back = read_launcher_env(launcher.variables())
        for field in ("rank", "world_size", "local_rank", "local_world_size", "master_addr", "master_port"):
            assert getattr(read_back, field) == getattr(launcher, field), field
    assert read_launcher_env({}).variables() == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def test_first_host_of_a_slurm_node_list() -> None:
    hosts = {"a": "a", "a,b": "a", "n[1,3-4],m2": "n1", "rack2-n[010-012]x,b": "rack2-n010x", "": ""}
    assert {nodelist: first_host(nodelist) for nodelist in hosts} == hosts


def test_world_as_text() -> None:
    def text(env: dict[str, str]) -> str:
        launcher = read_launcher_env(env)
        return str(
            World(
                launcher.rank,
                launcher.world_size,
                launcher.local_rank,
                launcher.local_world_size,
                torch.device("cpu"),
                launcher,
            )
        )

    assert text({}) == "world size 1"
    assert text(SLURM | {"MASTER_PORT": "29512"}) == (
        "world size 32 = 4 nodes × 8 (from Slurm), master gpu007:29512, backend gloo"
    )
    assert text(HYDRA) == "world size 2 = 1 node × 2 (from MPI), master 127.0.0.1:29500, backend gloo"
    assert text(UNEVEN_SLURM_STEP).startswith("world size 20 on 3 nodes (from Slurm)")


def test_a_command_refuses_contradictory_launchers(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, here: Any) -> None:
    for name, value in (TORCHRUN | {"SLURM_PROCID": "3", "SLURM_NTASKS": "16"}).items():
        monkeypatch.setenv(name, value)
    error = here(tmp_path, "train", "scenes", "data.train=nowhere", "-o", "run", code=2).error
    what = "the variables of two launchers contradict each other"
    assert error.startswith(f"error[E_WORLD]: {what} — torchrun and Slurm — ")
    assert not (tmp_path / "run").exists()
