"""Ranks, micro-batches, exchanges and ZeRO stages against a plain loop: same losses, gradients and parameters.

Run as a script (`python test_layouts.py OUT`) this file forks the ranks of each world in turn, trains all of its
layouts in them and writes what rank 0 saw; the tests compare that with the plain loop.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipwright.pipeline import engine as engine_module
from clipwright.pipeline.data.loader import Batch, DataConfig
from clipwright.pipeline.distributed import World, process_group
from clipwright.pipeline.engine import Engine
from clipwright.pipeline.losses.base import LOSSES, ContrastiveLoss
from clipwright.pipeline.model import TwoTower
from clipwright.pipeline.optim import OptimConfig, ScheduleConfig
from clipwright.pipeline.run import RunConfig, RuntimeConfig
from clipwright.pipeline.towers.base import IMAGE_TOWERS, TEXT_TOWERS

pytestmark = pytest.mark.xdist_group("ranks")

STEPS, VOCABULARY, CONTEXT, IMAGE = 5, 40, 8, 8
OPTIM = {
    "sgd": OptimConfig(name="sgd", lr=0.1, weight_decay=0.0, clip=0.0),
    "adamw": OptimConfig(name="adamw", lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, clip=0.0),
}


@dataclass(frozen=True)
class Case:
    """What decides the result."""

    batch: int = 64
    loss: str = "softmax"
    optim: str = "sgd"
    clip: float = 0.0
    captions: int = 0  # different ones in a batch, class names say; 0: each its own
    scale: float = 0.0  # of the logits at the start; 0: the loss's own


@dataclass(frozen=True)
class Layout:
    """What must not."""

    case: Case
    world: int
    micro: int = 0
    zero: int = 0
    exchange: str = "gather"

    def __str__(self) -> str:
        case = [
            f"{field.name}{value}" for field in dataclasses.fields(Case) if (value := getattr(self.case, field.name))
        ]
        return "-".join([f"{self.world}ranks", f"micro{self.micro}", f"zero{self.zero}", self.exchange, *case])


def layouts() -> Iterator[Layout]:
    # AdamW at CLIP's first scale of 14 makes 3e-5 of float32's noise in the key biases, whose true gradient is zero: so
    # far is one process from the plain loop in float64.
    scale = {"sgd": 0.0, "adamw": 1.5}
    for case in (Case(loss=loss, optim=optim, scale=scale[optim]) for loss in LOSSES.entries for optim in OPTIM):
        for world, micro in ((1, 0), (1, 16), (2, 16), (4, 0)):
            yield Layout(case, world, micro)
        yield Layout(dataclasses.replace(case, batch=96), 3, 8)
        for world, micro in ((3, 8), (4, 0)):
            yield Layout(dataclasses.replace(case, batch=96 if world == 3 else 64), world, micro, exchange="ring")
    clipped = Case(clip=0.05)
    for zero in range(4):
        for micro in (0, 16):
            yield Layout(clipped, 1, micro, zero)
            yield Layout(clipped, 2, micro, zero)
            yield Layout(dataclasses.replace(clipped, batch=96), 3, micro, zero, "ring")
        yield Layout(clipped, 4, 4, zero, "ring")
    for zero in (1, 3):
        yield Layout(Case(optim="adamw", scale=1.5, clip=0.5), 2, 16, zero)
    # Micro-batches that do not divide the batch, fewer captions than micro-batches, a scale at its lower clamp.
    yield Layout(Case(), 2, 9, 3)
    yield Layout(Case(captions=3), 1, 8, 2)
    yield Layout(Case(captions=3), 2, 4, 3)
    yield Layout(Case(captions=3), 4, 0, 0, "ring")
    yield Layout(Case(scale=1.0), 2, 16, 3)


LAYOUTS = list(layouts())


# The model and its data, the same for all


def config(case: Case, **runtime: Any) -> RunConfig:
    return RunConfig(
        image=IMAGE_TOWERS.preset("vit_nano", image_size=IMAGE, patch=4, dim=16, depth=1, heads=2),
        text=TEXT_TOWERS.preset("text_nano", width=16, depth=1, heads=2, context=CONTEXT),
        tokenizer=None,  # pyright: ignore[reportArgumentType]  tokens are made here
        embed_dim=16,
        data=DataConfig(train="none"),
        loss=LOSSES.preset(case.loss, **({"init_scale": case.scale} if case.scale else {})),
        optim=dataclasses.replace(OPTIM[case.optim], clip=case.clip),
        schedule=ScheduleConfig(global_batch=case.batch),
        precision="fp32",
        runtime=RuntimeConfig(**runtime),
    )


def model(made: RunConfig) -> tuple[TwoTower, ContrastiveLoss]:
    torch.manual_seed(0)
    towers = TwoTower(made, vocab_size=VOCABULARY, eot_id=VOCABULARY - 1)
    return towers, LOSSES.build(made.loss, embed_dim=made.embed_dim)


def share(case: Case, step: int, rank: int = 0, world: int = 1) -> Batch:
    """A rank's part of batch `step`, each of its captions once, as the loader gives it."""
    draw = torch.Generator().manual_seed(step)
    views = torch.randint(0, 256, (case.batch, IMAGE, IMAGE, 3), dtype=torch.uint8, generator=draw)
    different = case.captions or case.batch
    captions = torch.randint(0, VOCABULARY - 1, (different, CONTEXT), generator=draw)
    captions[:, -1] = VOCABULARY - 1
    mine = torch.arange(case.batch)[rank::world]
    caption_id, text_row = (mine % different).unique(return_inverse=True)
    return Batch(views[mine], captions[caption_id], text_row, 1000 + mine, (mine % different)[:, None])


# The plain loop


def formula(name: str, loss: ContrastiveLoss, image: Tensor, text: Tensor, batch: Batch) -> Tensor:
    """Both losses over the full matrix, as section 5 of the design has them."""
    scores = loss.logit_scale.exp() * image @ text.T  # pyright: ignore[reportCallIssue]
    positive = batch.caption_id == batch.caption_id.T
    if name == "sigmoid":
        sign = positive.float() * 2 - 1
        return -F.logsigmoid(sign * (scores + loss.bias)).sum() / len(image)
    target = positive / positive.sum(1)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


@functools.cache
def plain(case: Case) -> dict[str, Any]:
    """One process, one batch at a time, torch's own optimisers and clipping."""
    towers, loss = model(made := config(case))
    free = towers.no_weight_decay()
    groups = [
        {"params": [p for name, p in towers.named_parameters() if (name in free) is is_free], "weight_decay": decay}
        for is_free, decay in ((True, 0.0), (False, made.optim.weight_decay))
    ]
    sgd = torch.optim.SGD(groups, lr=made.optim.lr)
    adamw = torch.optim.AdamW(groups, lr=made.optim.lr, betas=(0.9, 0.98), eps=1e-6)
    optimizers = [
        {"sgd": sgd, "adamw": adamw}[case.optim],
        torch.optim.AdamW(loss.parameters(), lr=made.optim.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0),
    ]
    seen: dict[str, Any] = {"loss": [], "gradients": [], "norm": []}
    for step in range(STEPS):
        batch = share(case, step)
        image, text = towers.encode_image(batch.views), towers.encode_text(batch.tokens)[batch.text_row]
        value = formula(case.loss, loss, image, text, batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        value.backward()
        seen["loss"].append(value.item())
        seen["gradients"].append(named(towers, loss, lambda p: p.grad))
        norm = nn.utils.clip_grad_norm_(towers.parameters(), case.clip or math.inf)
        seen["norm"].append(norm.item())
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            loss.logit_scale.clamp_(0.0, math.log(100.0))  # pyright: ignore[reportCallIssue]
    return {**seen, "weights": named(towers, loss, lambda p: p)}


def named(towers: nn.Module, loss: nn.Module, what: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    pairs = [*towers.named_parameters(), *((f"loss.{name}", p) for name, p in loss.named_parameters())]
    return {name: found.detach().clone() for name, p in pairs if (found := what(p)) is not None}


# What a rank does


def trained(layout: Layout, world: World, spoil: Callable[[Engine], Any] | None = None) -> dict[str, Any]:
    made = config(layout.case, micro_batch=layout.micro, zero=layout.zero, exchange=layout.exchange)
    towers, loss = model(made)
    engine = Engine(towers, loss, made, world)
    if spoil is not None:
        spoil(engine)
    seen: dict[str, Any] = {"loss": [], "gradients": [], "norm": []}
    for step in range(STEPS):
        batch = share(layout.case, step, world.rank, world.size)
        value, features = engine.backward(batch, step)
        seen["loss"].append(value)
        seen["gradients"].append(engine.gradients())
        seen["norm"].append(engine.update(1.0))
    seen["negatives"] = engine_module.compared(features)[2] - 1
    own = {f"loss.{name}": tensor.detach().clone() for name, tensor in engine.loss.state_dict().items()}
    return {**seen, "weights": {**{k: v.clone() for k, v in engine.weights().items()}, **own}}


def rank(number: int, size: int, port: int, out: Path) -> None:
    os.environ.update(
        {"RANK": str(number), "WORLD_SIZE": str(size), "LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": str(size)},
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    with process_group() as world:
        seen = {str(layout): trained(layout, world) for layout in LAYOUTS if layout.world == size}
        if world.first:
            torch.save(seen, out / f"{size}.pt")


def main(out: Path) -> None:
    for size in (1, 2, 3, 4):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = []
        for number in range(size):
            if (pid := os.fork()) == 0:
                code = 1
                try:
                    rank(number, size, port, out)
                    code = 0
                finally:
                    if code:
                        sys.excepthook(*sys.exc_info())
                    os._exit(code)
            ranks.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
        if any(codes):
            sys.exit(f"world {size}: ranks ended with {codes}")


# The tests


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("layouts")
    done = subprocess.run(
        [sys.executable, __file__, str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: found for path in sorted(out.glob("*.pt")) for name, found in torch.load(path).items()}


def deviations(ours: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """Largest difference of each kind; gradients of the towers against the largest of the model."""
    worst = {"loss": max(abs(a - b) for a, b in zip(ours["loss"], plain["loss"], strict=True)), "gradient": 0.0}
    worst["loss gradient"] = 0.0
    for mine, theirs in zip(ours["gradients"], plain["gradients"], strict=True):
        assert mine.keys() == theirs.keys()
        largest = max(float(grad.abs().max()) for name, grad in theirs.items() if not name.startswith("loss."))
        for name, grad in theirs.items():
            kind, unit = ("loss gradient", 1.0) if name.startswith("loss.") else ("gradient", largest)
            worst[kind] = max(worst[kind], float((mine[name] - grad).abs().max()) / unit)
    worst["weight"] = max(float((ours["weights"][name] - w).abs().max()) for name, w in plain["weights"].items())
    worst["norm"] = max(abs(a / b - 1) for a, b in zip(ours["norm"], plain["norm"], strict=True))
    return worst


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_equals_the_plain_loop(layout: Layout, seen: dict[str, Any]) -> None:
    found = deviations(seen[str(layout)], plain(layout.case))
    assert max(found.values()) <= 1e-5, found
    assert seen[str(layout)]["negatives"] == layout.case.batch - 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
