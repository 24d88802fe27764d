"""Ranks, micro-batches, exchanges and ZeRO stages against a plain loop: same losses, gradients and parameters.

Run as a script (`python test_layouts.py OUT WORLD...`) this file forks the ranks of each world, trains all of its
layouts in them and writes what rank 0 saw; the tests compare that with the plain loop.
"""

from __future__ import annotations

import copy
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

from clipwright.pipeline import distributed
from clipwright.pipeline import engine as engine_module
from clipwright.pipeline.data.loader import Batch, DataConfig
from clipwright.pipeline.data.order import key64
from clipwright.pipeline.distributed import World, process_group
from clipwright.pipeline.doctor.model import forget_peak
from clipwright.pipeline.engine import Engine, micro_batches
from clipwright.pipeline.losses.base import LOSSES, ContrastiveLoss
from clipwright.pipeline.metrics import peak_memory
from clipwright.pipeline.model import TwoTower
from clipwright.pipeline.optim import OptimConfig, ScheduleConfig
from clipwright.pipeline.run import RunConfig, RuntimeConfig
from clipwright.pipeline.towers.base import IMAGE_TOWERS, TEXT_TOWERS

pytestmark = pytest.mark.xdist_group("ranks")

STEPS, VOCABULARY, CONTEXT, IMAGE = 5, 40, 8, 8
OPTIM = {
    "sgd": OptimConfig(name="sgd", lr=0.01, weight_decay=0.0, clip=0.0),
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
    wrong: bool = False  # whether most images bring a wrong caption
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
    yield Layout(Case(captions=3, scale=2.0), 1, 8, 2)
    yield Layout(Case(captions=3, scale=2.0), 2, 4, 3)
    yield Layout(Case(captions=3, scale=2.0), 4, 0, 0, "ring")
    yield Layout(Case(scale=1.0), 2, 16, 3)
    for loss in LOSSES.entries:
        yield Layout(Case(loss=loss, wrong=True), 2, 16, 3)
        yield Layout(Case(loss=loss, wrong=True, batch=96), 3, 0, 0, "ring")


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
    captions = torch.randint(0, VOCABULARY - 1, (different + case.batch, CONTEXT), generator=draw)
    captions[:, -1] = VOCABULARY - 1
    mine = torch.arange(case.batch)[rank::world]
    right, wrong = mine % different, torch.empty(0, dtype=torch.int64)
    if case.wrong:  # of every eight images two have none, and one has its neighbour's caption
        wrong = torch.where(mine % 8 == 1, (mine + 1) % different, different + mine)
    present = mine % 4 > 0 if case.wrong else wrong >= 0
    used, rows = torch.cat([right, wrong[present]]).unique(return_inverse=True)
    negative_row = torch.full_like(wrong, -1).masked_scatter(present, rows[len(mine) :])
    return Batch(
        views=views[mine],
        tokens=captions[used],
        text_row=rows[: len(mine)],
        image_id=1000 + mine,
        caption_id=right[:, None],
        negative_row=negative_row,
        negative_id=wrong,
    )


# The plain loop


def formula(name: str, loss: ContrastiveLoss, image: Tensor, texts: Tensor, batch: Batch) -> Tensor:
    """Both losses over the full matrix, as section 5 of the design has them; texts: a row for each caption."""
    present = batch.negative_row >= 0
    text, wrong = texts[batch.text_row], texts[batch.negative_row[present]]
    positive = batch.caption_id == batch.caption_id.T
    excluded = batch.caption_id == batch.negative_id[present]
    scores, wrong_scores = (loss.logit_scale.exp() * image @ side.T for side in (text, wrong))
    if name == "sigmoid":
        sign = positive.float() * 2 - 1
        terms = F.logsigmoid(sign * (scores + loss.bias)).sum()
        wrong_terms = F.logsigmoid(-(wrong_scores + loss.bias)).masked_fill(excluded, 0).sum()
        return -(terms + wrong_terms) / len(image)
    target = positive / positive.sum(1)
    rows = torch.cat([scores, wrong_scores.masked_fill(excluded, -1e9)], 1)
    row_target = torch.cat([target, torch.zeros_like(wrong_scores)], 1)
    return (F.cross_entropy(rows, row_target) + F.cross_entropy(scores.T, target)) / 2


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
        image, text = towers.encode_image(batch.views), towers.encode_text(batch.tokens)
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
        value, _ = engine.backward(batch, step)
        seen["loss"].append(value)
        seen["gradients"].append(engine.gradients())
        seen["norm"].append(engine.update(1.0))
    own = {f"loss.{name}": tensor.detach().clone() for name, tensor in engine.loss.state_dict().items()}
    seen["weights"] = {**{k: v.clone() for k, v in engine.weights().items()}, **own}
    if spoil is None:
        batch = share(layout.case, STEPS, world.rank, world.size)
        seen["negatives"] = engine.step(batch, STEPS, 1.0, measure=True).negatives
    return seen


def wide(engine: Engine) -> None:
    """The loss's own parameters get a gradient too large by the number of ranks."""
    real = engine_module.sum_ranks
    engine_module.sum_ranks = lambda tensor: real(tensor).mul_(engine.world.size if tensor.shape == (1,) else 1)


def alone(engine: Engine) -> None:
    """DeepSpeed's mean over ranks is not made up for."""
    engine.world = dataclasses.replace(engine.world, size=1)


def unsummed(engine: Engine) -> None:
    """Feature gradients stay on the rank that found them."""
    distributed.scatter_sum = lambda tensor: tensor.chunk(engine.world.size)[engine.world.rank].contiguous()


def unmerged(engine: Engine) -> None:
    """The texts' log-sum-exps are those of this rank's images alone."""
    real = distributed._merge_own

    def merge(part: Tensor, op: str) -> Tensor:
        if op == "sum":
            return real(part, op)
        return part.chunk(engine.world.size)[engine.world.rank].contiguous()

    distributed._merge_own = merge


def unmerged_ring(engine: Engine) -> None:
    """What the last rank found of a block takes the place of what the others did."""
    distributed._MERGE["logaddexp"] = lambda first, second, out: out.copy_(second)


def past_deepspeed(engine: Engine) -> None:
    """The replay goes to the towers and not through the engine."""
    through = engine._embed

    def embed(part: Batch, step: int, number: int) -> tuple[Tensor, Tensor]:
        return engine.towers(part.views, part.tokens) if torch.is_grad_enabled() else through(part, step, number)

    engine._embed = embed


def apart(engine: Engine) -> None:
    """Each tower is replayed by a call of its own."""
    towers, deepspeed_engine = engine.towers, engine.engine
    encoders = towers.encode_image, towers.encode_text
    towers.forward = lambda side, inputs: encoders[side](inputs)

    def backward(batch: Batch, step: int) -> tuple[float, Any]:
        with torch.no_grad():
            pair = [deepspeed_engine(side, inputs) for side, inputs in enumerate((batch.views, batch.tokens))]
        leaves = [features.requires_grad_() for features in pair]
        features = engine._features(*leaves, batch)
        loss = engine.loss(features)
        engine.loss.logit_scale.grad, *grads = torch.autograd.grad(loss, [engine.loss.logit_scale, *leaves])
        distributed.sum_ranks(engine.loss.logit_scale.grad)
        for side, inputs in enumerate((batch.views, batch.tokens)):
            deepspeed_engine.set_gradient_accumulation_boundary(side == 1)
            surrogate = (deepspeed_engine(side, inputs) * grads[side]).sum() * engine.world.size
            deepspeed_engine.backward(surrogate, scale_wrt_gas=False)
        return float(distributed.sum_ranks(loss.detach().clone())), features

    engine.backward = backward


# What a mutation does to which layout; all of them must be seen.
MUTATIONS: dict[Callable[[Engine], None], Layout] = {
    wide: Layout(Case(), 2, 16),
    alone: Layout(Case(), 2, 16),
    unsummed: Layout(Case(), 2),
    unmerged: Layout(Case(), 2),
    unmerged_ring: Layout(Case(), 2, exchange="ring"),
    past_deepspeed: Layout(Case(), 2, 16, zero=3),
    apart: Layout(Case(), 2, zero=3),
}


def mutated(spoil: Callable[[Engine], None], layout: Layout, world: World) -> dict[str, Any]:
    kept = [(module, dict(vars(module))) for module in (distributed, engine_module)]
    merge = dict(distributed._MERGE)
    try:
        return trained(layout, world, spoil)
    finally:
        for module, before in kept:
            vars(module).update(before)
        distributed._MERGE.update(merge)


def dropped(world: World) -> dict[str, Any]:
    """Gradients of the first step under drop path, ours and those of the micro-batches in one graph."""
    case, size = Case(), 16
    made = config(case, micro_batch=size)
    made = dataclasses.replace(
        made,
        image=dataclasses.replace(made.image, drop_path=0.5),
        text=dataclasses.replace(made.text, drop_path=0.5),
    )
    towers, loss = model(made)
    plain_towers, plain_loss = copy.deepcopy((towers, loss))
    engine, batch = Engine(towers, loss, made, world), share(case, 0)
    engine.backward(batch, 0)
    pairs = []
    for number, part in enumerate(micro_batches(batch, size)):
        torch.manual_seed(key64("step", made.seed, 0, 0, number) >> 1)
        pairs.append(plain_towers(part.views, part.tokens))
    image, text = (torch.cat(side) for side in zip(*pairs, strict=True))
    formula(case.loss, plain_loss, image, text, batch).backward()
    return {"ours": engine.gradients(), "plain": named(plain_towers, plain_loss, lambda p: p.grad)}


def normed(world: World) -> dict[str, Any]:
    """A tower with batch norm: statistics after a step, and gradients where it stands still."""
    case, size = Case(), 16
    made = config(case, micro_batch=size)
    image = IMAGE_TOWERS.preset("convmixer_nano", image_size=IMAGE, patch=2, dim=16, depth=1, kernel=3)
    made = dataclasses.replace(made, image=image)
    towers, loss = model(made)
    before, plain_loss = copy.deepcopy((towers, loss))
    engine, mine = Engine(towers, loss, made, world), share(case, 0, world.rank, world.size)
    engine.backward(mine, 0)
    engine.update(1.0)
    each = []
    for number in range(world.size):
        for part in micro_batches(share(case, 0, number, world.size), size):
            each.append(copy.deepcopy(before))
            each[-1].encode_image(part.views)
    names = [name for name, _ in before.named_buffers() if name.endswith(("running_mean", "running_var", "tracked"))]
    mean = {name: sum(tower.get_buffer(name) for tower in each) / len(each) for name in names}
    found = {
        "ours": {name: tensor.clone() for name, tensor in engine.weights().items() if name in names},
        "plain": mean,
    }

    still = copy.deepcopy(before)
    still.image.eval()
    engine = Engine(copy.deepcopy(still), copy.deepcopy(plain_loss), made, world)
    engine.backward(mine, 0)
    batch = share(case, 0)
    vectors = still(batch.views, batch.tokens)
    formula(case.loss, plain_loss, *vectors, batch).backward()
    found |= {"ours_still": engine.gradients(), "plain_still": named(still, plain_loss, lambda p: p.grad)}
    return found


class One(nn.Module):
    """A single parameter, whose gradient is `slope`."""

    def __init__(self, start: float, slope: float, shape: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.scale, self.slope = nn.Parameter(torch.full(shape, start)), slope

    def forward(self) -> Tensor:
        return (self.scale * self.slope).sum()


def deepspeed_alone(module: nn.Module, zero: int, **more: Any) -> Any:
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": zero},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        **more,
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    made: Any = engine_module.deepspeed.initialize(
        model=module, optimizer=optimizer, config=settings, dist_init_required=False
    )
    return made[0]


def reasons(world: World) -> dict[str, Any]:
    """What DeepSpeed does, for which the engine is as it is."""
    found: dict[str, Any] = {"clamped": {}, "dtypes": {}, "scalar": {}}
    for zero in (1, 2):
        made = deepspeed_alone(One(4.0, -1.0), zero)
        values = []
        for _ in range(3):
            made.backward(made())
            made.step()
            values.append(made.module.scale.item())
            with torch.no_grad():
                made.module.scale.clamp_(max=4.5)
        found["clamped"][zero] = values
    made = deepspeed_alone(One(4.0, 10.0), 0, gradient_clipping=None)
    made.backward(made())
    found["norm"] = made.get_global_grad_norm()
    made.step()
    found["unsaid clipping"] = made.module.scale.item()
    for name in ("bf16", "torch_autocast"):
        more = {name: {"enabled": True, **({"dtype": "bfloat16"} if name == "torch_autocast" else {})}}
        found["dtypes"][name] = deepspeed_alone(One(4.0, 1.0), 0, **more).module.scale.dtype
    for zero in range(4):
        try:
            deepspeed_alone(One(4.0, 1.0, shape=()), zero)
        except Exception as error:
            found["scalar"][zero] = repr(error)
    return found


def exchanged(world: World) -> dict[str, int]:
    """Bytes by which a rank grows while gradients of its columns, 16 MiB, go through each exchange."""
    found = {}
    for name, kind in distributed.EXCHANGES.items():
        own = torch.zeros(8192, 512)
        forget_peak(world.device)
        before = peak_memory(world.device)
        kind({"text": own}).reduce(lambda block: [block["text"] + 1], ["sum"])
        found[name] = peak_memory(world.device) - before
    return found


def rank(number: int, size: int, port: int, out: Path) -> None:
    os.environ.update(
        {"RANK": str(number), "WORLD_SIZE": str(size), "LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": str(size)},
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    with process_group() as world:
        seen = {str(layout): trained(layout, world) for layout in LAYOUTS if layout.world == size}
        if size == 1:
            seen |= {"dropped": dropped(world), "normed1": normed(world), "reasons": reasons(world)}
        if size == 2:
            seen["normed2"] = normed(world)
            seen |= {spoil.__name__: mutated(spoil, layout, world) for spoil, layout in MUTATIONS.items()}
        if size == 4:
            seen["exchanged"] = exchanged(world)
        if world.first:
            torch.save(seen, out / f"{size}.pt")


def main(out: Path, sizes: list[int]) -> None:
    for size in sizes:
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
        [sys.executable, __file__, str(out), "1", "2", "3", "4"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: found for path in sorted(out.glob("*.pt")) for name, found in torch.load(path).items()}


def deviations(ours: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """Largest difference of each kind.

    Gradients of the towers are of the largest in the model, the loss and its own gradients of themselves where they are
    above 1; weights are absolute.
    """
    losses = zip(ours["loss"], plain["loss"], strict=True)
    worst = {"loss": max(abs(a - b) / max(1.0, abs(b)) for a, b in losses), "gradient": 0.0, "loss gradient": 0.0}
    for mine, theirs in zip(ours["gradients"], plain["gradients"], strict=True):
        assert mine.keys() == theirs.keys()
        sizes = {name: float(grad.abs().max()) for name, grad in theirs.items()}
        largest = max(size for name, size in sizes.items() if not name.startswith("loss."))
        for name, grad in theirs.items():
            own = name.startswith("loss.")
            kind, unit = ("loss gradient", max(1.0, sizes[name])) if own else ("gradient", largest)
            worst[kind] = max(worst[kind], float((mine[name] - grad).abs().max()) / unit)
    worst["weight"] = max(float((ours["weights"][name] - w).abs().max()) for name, w in plain["weights"].items())
    worst["norm"] = max(abs(a / b - 1) for a, b in zip(ours["norm"], plain["norm"], strict=True))
    return worst


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_equals_the_plain_loop(layout: Layout, seen: dict[str, Any]) -> None:
    found = deviations(seen[str(layout)], plain(layout.case))
    assert max(found.values()) <= 1e-5, found
    wrong = layout.case.batch * 3 // 4 if layout.case.wrong else 0
    assert seen[str(layout)]["negatives"] == layout.case.batch - 1 + wrong


@pytest.mark.parametrize("spoil", MUTATIONS, ids=lambda spoil: spoil.__name__)
def test_a_mutation_is_seen(spoil: Callable[[Engine], None], seen: dict[str, Any]) -> None:
    found = deviations(seen[spoil.__name__], plain(MUTATIONS[spoil].case))
    assert any(far > 1e-3 for far in found.values()), found
    if spoil is wide:  # invisible in what AdamW makes of it
        assert found["loss gradient"] > 1e-3


def test_a_clamp_of_the_scale_holds(seen: dict[str, Any]) -> None:
    [layout] = [layout for layout in LAYOUTS if layout.case == Case(scale=1.0)]
    assert seen[str(layout)]["weights"]["loss.logit_scale"].tolist() == [0.0]


def test_a_replay_drops_what_was_dropped_before(seen: dict[str, Any]) -> None:
    ours, theirs = seen["dropped"]["ours"], seen["dropped"]["plain"]
    largest = max(float(grad.abs().max()) for grad in theirs.values())
    for name, grad in theirs.items():
        assert (ours[name] - grad).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("world", [1, 2])
def test_batch_norm_moves_once_a_step_by_the_mean_of_all_micro_batches(world: int, seen: dict[str, Any]) -> None:
    """And over ranks, once weights are asked for: nothing in DeepSpeed synchronises buffers."""
    found = seen[f"normed{world}"]
    assert found["ours"].keys() == found["plain"].keys()
    for name, want in found["plain"].items():
        assert torch.allclose(found["ours"][name].float(), want.float(), rtol=0, atol=1e-6), name
        assert not name.endswith("mean") or want.abs().max() > 1e-3
    assert found["ours_still"].keys() == found["plain_still"].keys()
    largest = max(float(grad.abs().max()) for grad in found["plain_still"].values())
    for name, grad in found["plain_still"].items():
        assert (found["ours_still"][name] - grad).abs().max() <= 1e-5 * largest, name


def test_a_ring_holds_less_than_a_gathering(seen: dict[str, Any]) -> None:
    found = seen["exchanged"]
    assert 2**24 < found["ring"] < 0.85 * found["gather"], found


def test_deepspeed_does_what_the_engine_works_around(seen: dict[str, Any]) -> None:
    """Should one of these change, what stands against it in the engine can go."""
    found = seen["reasons"]
    assert all(values == [5.0, 6.0, 7.0] for values in found["clamped"].values()), found["clamped"]  # not 5.5 twice
    assert found["norm"] is None and found["unsaid clipping"] == pytest.approx(3.0)
    assert found["dtypes"] == {"bf16": torch.bfloat16, "torch_autocast": torch.float32}
    assert found["scalar"].keys() == {0, 1, 2, 3}, found["scalar"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(word) for word in sys.argv[2:]])
