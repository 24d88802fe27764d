"""A refused config ends every rank at once, before any of them waits for the others."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from clipwright.pipeline.distributed import rendezvous
from clipwright.pipeline.doctor import run

VERBS = {
    "train": ["train", "photos", "data.train=nowhere", "-o", "run"],
    "doctor": ["doctor", "photos", "data.train=nowhere"],
    "embed": ["embed", "model=nowhere", "data=nowhere", "-o", "run"],
}


def set_launcher_variables(monkeypatch: pytest.MonkeyPatch, rank: int, address: str, port: int) -> None:
    """Makes this process rank `rank` of two."""
    variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    variables.update({"MASTER_ADDR": address, "MASTER_PORT": port})
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("verb", "override", "code", "pieces"),
    [
        ("train", "optim.learnin_rate=1", "E_CONFIG_KEY", ["optim.learnin_rate", "optim has the keys"]),
        ("train", "runtime.zer=2", "E_CONFIG_KEY", ["runtime.zer", "did you mean 'runtime.zero'?"]),
        ("train", "image.name=vit_nanno", "E_CONFIG_CHOICE", ["vit_nanno", "did you mean 'vit_nano'?"]),
        ("train", "schedule.global_batch=0", "E_CONFIG_VALUE", ["schedule.global_batch", "greater than"]),
        ("train", "runtime.zero=4", "E_CONFIG_VALUE", ["runtime.zero", "0, 1, 2 or 3"]),
        ("train", "runtime.offload=optimizer", "E_CONFIG_VALUE", ["runtime.offload", "runtime.zero=0", "zero=1"]),
        ("doctor", "loss.name=softmx", "E_CONFIG_CHOICE", ["softmx", "did you mean 'softmax'?"]),
        ("embed", "runtime.bach=8", "E_CONFIG_KEY", ["runtime.bach", "did you mean 'runtime.batch'?"]),
        ("embed", "runtime.batch=0", "E_CONFIG_VALUE", ["runtime.batch", "greater than"]),
    ],
)
def test_refused_config_ends_a_rank_before_the_rendezvous(
    rank: int,
    verb: str,
    override: str,
    code: str,
    pieces: list[str],
    tmp_path: Path,
    here: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start_rendezvous(*args: object, **kwargs: object) -> None:
        raise AssertionError("the rendezvous was started")

    monkeypatch.setattr(rendezvous, "TCPStore", start_rendezvous)
    set_launcher_variables(monkeypatch, rank, "192.0.2.1", 9)  # an address that does not answer
    error = here(tmp_path, *VERBS[verb], override, code=2).error
    assert error.startswith(f"error[{code}]: "), error
    assert [piece for piece in pieces if piece not in error] == [], error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_missing_ranks_are_an_error(rank: int, tmp_path: Path, here: Any, monkeypatch: Any) -> None:
    """Rank 0 waits for the other ranks, and they wait for it."""
    monkeypatch.setattr(run, "RENDEZVOUS_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    set_launcher_variables(monkeypatch, rank, "127.0.0.1", port)
    error = here(tmp_path, "doctor", code=1).error
    where = f"rank {rank} of 2 (from torchrun) at 127.0.0.1:{port}"
    assert error.startswith(f"error[E_RANK]: the rendezvous failed: rank {1 - rank} did not join — {where} — "), error
    assert "(limit 1 s)" in error and "start all ranks" in error


@pytest.mark.parametrize("verb", VERBS)
def test_valid_config_starts_the_rendezvous(
    verb: str, tmp_path: Path, here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the test above would prove nothing."""

    class RendezvousStarted(BaseException):  # not an error of the command
        pass

    def start_rendezvous(*args: object, **kwargs: object) -> None:
        raise RendezvousStarted

    monkeypatch.setattr(rendezvous, "TCPStore", start_rendezvous)
    set_launcher_variables(monkeypatch, 0, "192.0.2.1", 9)
    with pytest.raises(RendezvousStarted):
        here(tmp_path, *VERBS[verb])
