"""What launchers' variables say: who this process is, who says so, and where the group meets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.distributed.group import World
from clipwright.pipeline.distributed.launcher_env import Place, detect, first_host

TORCHRUN = {
    **{"RANK": "11", "WORLD_SIZE": "32", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "4"},
    **{"MASTER_ADDR": "node1", "MASTER_PORT": "29512", "TORCHELASTIC_RUN_ID": "none"},
}
DEEPSPEED = {
    **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"},
    **{"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
}
SLURM = {
    **{"SLURM_PROCID": "11", "SLURM_NTASKS": "32", "SLURM_LOCALID": "3", "SLURM_NODEID": "1", "SLURM_NNODES": "4"},
    **{"SLURM_TASKS_PER_NODE": "8(x4)", "SLURM_JOB_NODELIST": "gpu[007-009,12]", "SLURM_JOB_ID": "1234567"},
}
OPENMPI = {
    **{"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
    **{"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "a"},
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "run-0.run"}
UNEVEN = {
    **{"SLURM_PROCID": "19", "SLURM_STEP_NUM_TASKS": "20", "SLURM_NTASKS": "64", "SLURM_LOCALID": "3"},
    **{"SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_TASKS_PER_NODE": "16(x4)"},
    **{"SLURM_STEP_NODELIST": "b2,b[3-4]", "SLURM_JOB_NODELIST": "b[1-4]", "SLURM_JOB_ID": "7", "MASTER_PORT": "4000"},
}
BARE = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}  # all that a single machine needs


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, Place("one process")),
        ({"WORLD_SIZE": "1"}, Place("one process")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "JOB_COMPLETION_INDEX": "3"}, Place("one process")),
        (TORCHRUN, Place("torchrun", 11, 32, 3, 8, 4, "node1", 29512)),
        (DEEPSPEED, Place("DeepSpeed", 3, 4, 1, 2, 2, "10.0.0.1", 29500)),
        (SLURM, Place("SLURM", 11, 32, 3, 8, 4, "gpu007", 20000 + 1234567 % 12000)),
        (SLURM | {"MASTER_ADDR": "fast1"}, Place("SLURM", 11, 32, 3, 8, 4, "fast1", 20000 + 1234567 % 12000)),
        (UNEVEN, Place("SLURM", 19, 20, 3, 4, 3, "b2", 4000)),
        (BARE, Place("SLURM", 1, 2, 1, 2, 1, "127.0.0.1", 29500)),
        (OPENMPI, Place("MPI", 3, 4, 1, 2, 2, "a", 29500)),
        (HYDRA, Place("MPI", 1, 2, 1, 2, 1, "127.0.0.1", 29500)),
        (KUBERNETES, Place("Kubernetes", 2, 3, 0, 1, 3, "run-0.run", 29500)),
        # srun sets PMI's variables too, and starts torchrun or mpirun once on each node.
        (BARE | {"PMI_RANK": "1", "PMI_SIZE": "2"}, Place("SLURM", 1, 2, 1, 2, 1, "127.0.0.1", 29500)),
        (TORCHRUN | {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, Place("torchrun", 11, 32, 3, 8, 4, "node1", 29512)),
        (TORCHRUN | {"JOB_COMPLETION_INDEX": "1"}, Place("torchrun", 11, 32, 3, 8, 4, "node1", 29512)),
    ],
)
def test_a_place_is_read(env: dict[str, str], place: Place) -> None:
    assert detect(env) == place


@pytest.mark.parametrize(
    ("env", "named"),
    [
        (
            TORCHRUN | {"SLURM_PROCID": "3", "SLURM_NTASKS": "16"},
            ["torchrun and SLURM", "11 of 32", "3 of 16"],
        ),
        (TORCHRUN | {"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, ["rank 11 of 32", "SLURM 2 of 4"]),  # another node's
        (SLURM | HYDRA, ["SLURM and MPI", "11 of 32", "1 of 2", "PMI_RANK"]),
        (BARE | KUBERNETES, ["SLURM and Kubernetes", "JOB_COMPLETION_INDEX"]),
        ({"RANK": "3"}, ["RANK=3", "WORLD_SIZE is not set"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "no variable says which rank"]),
        ({"RANK": "x", "WORLD_SIZE": "2"}, ["RANK=x"]),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, ["rank 2 of 2"]),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ["torchrun", "no MASTER_ADDR"]),
        ({name: value for name, value in OPENMPI.items() if name != "MASTER_ADDR"}, ["MPI", "no MASTER_ADDR"]),
        ({"JOB_COMPLETION_INDEX": "2", "WORLD_SIZE": "3"}, ["Kubernetes", "no MASTER_ADDR"]),
    ],
)
def test_what_contradicts_itself_is_refused(env: dict[str, str], named: list[str]) -> None:
    with pytest.raises(ClipwrightError) as refused:
        detect(env)
    assert refused.value.code == "E_WORLD"
    for text in named:
        assert text in str(refused.value)


def test_a_place_in_torchruns_words_is_the_same_place() -> None:
    for env in (SLURM, UNEVEN, OPENMPI, KUBERNETES):
        place = detect(env)
        told = detect(place.variables())
        assert (told.rank, told.size, told.local_rank, told.local_size) == (
            *(place.rank, place.size, place.local_rank, place.local_size),
        )
        assert (told.master, told.port) == (place.master, place.port)
    assert detect({}).variables() == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def test_the_first_host_of_a_list() -> None:
    lists = {"a": "a", "a,b": "a", "n[1,3-4],m2": "n1", "rack2-n[010-012]x,b": "rack2-n010x", "": ""}
    assert {text: first_host(text) for text in lists} == lists


def test_a_world_tells_itself() -> None:
    def told(env: dict[str, str]) -> str:
        place = detect(env)
        numbers = (place.rank, place.size, place.local_rank, place.local_size)
        return str(World(*numbers, torch.device("cpu"), place))

    assert told({}) == "world 1"
    assert told(SLURM | {"MASTER_PORT": "29512"}) == (
        "world 32 = 4 nodes × 8 (from SLURM), master gpu007:29512, backend gloo"
    )
    assert told(HYDRA) == "world 2 = 1 node × 2 (from MPI), master 127.0.0.1:29500, backend gloo"
    assert told(UNEVEN).startswith("world 20 on 3 nodes (from SLURM)")


def test_a_command_refuses_launchers_that_disagree(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, here: Any) -> None:
    for name, value in (TORCHRUN | {"SLURM_PROCID": "3", "SLURM_NTASKS": "16"}).items():
        monkeypatch.setenv(name, value)
    error = here(tmp_path, "train", "scenes", "data.train=nowhere", "-o", "run", code=2).error
    assert error.startswith("error[E_WORLD]: two launchers that disagree — torchrun and SLURM — ")
    assert not (tmp_path / "run").exists()
