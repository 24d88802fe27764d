"""Every config key of `launch` changes what is printed or started. A new key needs an entry here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_keys import config_keys

TRAIN = ["train", "photos", "data.train=photos", "-o", "run"]
TORCHRUN = ["torchrun", "check=none", "processes=2"]
NODES = ["torchrun", "check=none", "processes=2", "nodes=4", "node_rank=1", "master=node1"]
SLURM = ["slurm", "check=none", "processes=2"]
KUBERNETES = ["kubernetes", "check=none", "processes=2"]
SLURM_VALUES = {
    "name": "other",
    "time": "1:00:00",
    "partition": "big",
    "account": "team",
    "cpus_per_task": "3",
    "warning": "77",
    "setup": "[module load cuda]",
}
KUBERNETES_VALUES = {
    "name": "other",
    "image": "other",
    "claim": "other",
    "mount": "/other",
    "shared_memory": "3Gi",
    "retries": "9",
    "grace": "77",
    "namespace": "team",
    "node_selector": "{gpu: h100}",
    "tolerations": "[{key: gpu, operator: Exists}]",
    "secrets": "[bucket]",
    "pull_secrets": "[registry]",
    "pull_policy": "Never",
    "service_account": "trainer",
    "priority_class": "high",
    "gpu_resource": "amd.com/gpu",
    "cpus": "5",
    "memory": "7Gi",
    "volumes": "{photos: /photos}",
}
# Key → (arguments of launch, arguments that change it): the printed commands or jobs differ.
KEYS: dict[str, tuple[list[str], list[str]]] = {
    "by": (TORCHRUN, ["by=slurm", "nodes=1"]),
    "hostfile": (["hostfile", "check=none", "hostfile=hosts"], ["hostfile=other_hosts"]),
    "nodes": (NODES, ["nodes=5"]),
    "processes": (TORCHRUN, ["processes=3"]),
    "gpus": (SLURM, ["gpus=false"]),
    "node_rank": (NODES, ["node_rank=2"]),
    "master": (NODES, ["master=node9"]),
    "port": (NODES, ["port=4000"]),
    "env": (SLURM, ["env.A=b"]),
    **{f"slurm.{name}": (SLURM, [f"slurm.{name}={value}"]) for name, value in SLURM_VALUES.items()},
    **{f"kubernetes.{name}": (KUBERNETES, [f"kubernetes.{name}={value}"]) for name, value in KUBERNETES_VALUES.items()},
}


def test_every_key_has_a_test() -> None:
    assert config_keys("launch") == {*KEYS, "parts", "check"}


def printed(arguments: list[str], folder: Path, here: Any, command: list[str] = TRAIN) -> str:
    return here(folder, "launch", *arguments, *command, "--dry-run").out


@pytest.mark.parametrize("key", KEYS)
def test_key_changes_what_is_printed(key: str, tmp_path: Path, here: Any) -> None:
    (tmp_path / "hosts").write_text("node1 slots=1\n")
    (tmp_path / "other_hosts").write_text("node2 slots=1\n")
    base, changed = KEYS[key]
    assert printed([*base, *changed], tmp_path, here) != printed(base, tmp_path, here), f"{key} is ignored"


def test_parts_and_check_are_used(tmp_path: Path, here: Any) -> None:
    prep = ["prep", "scenes", "-o", "out"]
    array = ["slurm_array", "check=none", "parts=2"]
    assert printed([*array[:2], "parts=3"], tmp_path, here, prep) != printed(array, tmp_path, here, prep)
    error = here(tmp_path, "launch", *TORCHRUN[:1], "check=all", *TORCHRUN[2:], *TRAIN, "--dry-run", code=3).error
    assert "photos" in error
