"""Every loss against its formula in float64: adversarial embeddings, repeats, hard negatives, Matryoshka, ranks."""

from __future__ import annotations
import __future__

import inspect
import math
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.losses import sigmoid, softmax, tiles
from clipwright.pipeline.losses.base import LOSSES, MAX_LOG_SCALE, Features, LossTerm, Matryoshka, TotalLoss

NAMES = list(LOSSES.entries)


class OperationCounter(TorchDispatchMode):
    """Records the sizes of newly allocated tensors, and the multiplications of matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)]
        input_storages = {x.untyped_storage().data_ptr() for x in inputs}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in input_storages:
                self.sizes.append(tensor.numel())
        if "mm" in func.__name__:
            *_, left, right = (x for x in args if isinstance(x, torch.Tensor))
            self.products += left.numel() * right.shape[1]
        return out


def adversarial(kind: str, images: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image, text = torch.randn(images, dim, generator=generator), torch.randn(images, dim, generator=generator)
    if kind == "identical":
        return image[:1].repeat(images, 1), image[:1].repeat(images, 1)
    if kind == "opposite":
        return image[:1].repeat(images, 1), -image[:1].repeat(images, 1)
    if kind == "close":
        return image[:1] + 0.05 * image, image[:1] + 0.05 * text
    if kind == "matched":
        return image, image + 0.1 * text
    if kind == "mismatched":
        return image, -image
    if kind == "orthogonal":
        basis = torch.linalg.qr(torch.randn(max(images, dim), max(images, dim), generator=generator))[0]
        return basis[:images, :dim].contiguous(), basis[:images, :dim].contiguous()
    if kind == "one-hot":
        one_hot = torch.eye(dim).repeat(-(-images // dim), 1)[:images]
        return one_hot, one_hot.clone()
    if kind == "huge":
        return 1e15 * F.normalize(image, dim=1), 1e15 * F.normalize(text, dim=1)
    if kind == "uneven":
        return image * torch.logspace(0, 15, images)[:, None], text * torch.logspace(15, 0, images)[:, None]
    assert kind == "random"
    return image, text


KINDS = ["random", "identical", "opposite", "close", "matched", "mismatched", "orthogonal", "one-hot", "huge", "uneven"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_equals_the_formula_for_adversarial_embeddings_at_both_clamps(
    kind: str, name: str, plainly: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for images, dim, tile in ((6, 8, (512, 2048)), (60, 64, (16, 24)), (48, 512, (512, 2048))):
        monkeypatch.setattr(tiles, "CPU_TILE", tile)
        for scale, bias in ((1.0, -10.0), (14.0, 0.0), (100.0, -10.0), (100.0, 30.0)):
            batch = plainly.batch(images, 1, dim, name=name, scale=scale, bias=bias)
            batch.image, batch.text = adversarial(kind, images, dim)
            plainly.check(batch)


@pytest.mark.parametrize("name", NAMES)
def test_loss_equals_the_formula_over_several_tiles_of_default_size(name: str, plainly: Any) -> None:
    plainly.check(plainly.batch(520, 4, 24, name=name))


SETTINGS = [
    {},
    {"repeats": "mask"},
    {"matryoshka": Matryoshka(dims=(4, 9, 12), weights=(0.5, 1.0, 2.0))},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.3, "repeats": "mask", "matryoshka": Matryoshka(dims=(5, 12))},
]


def cases(plainly: Any, name: str) -> list[Any]:
    """Returns batches of 12 images with every setting that the loss has."""
    known = {field.name for field in LOSSES.entry(name).config.__dataclass_fields__.values()}
    return [
        plainly.batch(12, per_image, 12, repeats=repeats, negatives=negatives, name=name, settings=settings, seed=seed)
        for seed, settings in enumerate(s for s in SETTINGS if s.keys() <= known)
        for per_image, repeats, negatives in ((1, False, 0), (1, True, 0), (3, True, 0), (1, True, 2), (2, True, 1))
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("small_tiles")
def test_loss_equals_the_formula_with_repeats_negatives_smoothing_and_matryoshka(name: str, plainly: Any) -> None:
    for batch in cases(plainly, name):
        plainly.check(batch, limit=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.usefixtures("small_tiles")
def test_sum_over_ranks_equals_the_loss(name: str, ranks: int, plainly: Any) -> None:
    for number, batch in enumerate(cases(plainly, name)):
        plainly.check(batch, ranks, limit=1e-6, block_by_block=number % 2 == 0)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_features_are_accumulated_in_float32(name: str, plainly: Any) -> None:
    """Equals the loss of the same values in float32: only the returned gradients are rounded to bf16."""
    batch = plainly.batch(300, 1, 64, name=name)
    image, text = (F.normalize(side, dim=1).bfloat16() for side in (batch.image, batch.text))
    loss = batch.loss()
    leaves = [side.clone().requires_grad_() for side in (image, text)]
    value = loss(Features(*leaves, batch.image_id, batch.caption_id))
    value.backward()
    wide = [side.float().requires_grad_() for side in (image, text)]
    same = batch.loss()
    want = same(Features(*wide, batch.image_id, batch.caption_id))
    want.backward()
    assert value.dtype == torch.float32 and torch.equal(value, want)
    for parameter, other in zip(loss.parameters(), same.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)  # pyright: ignore[reportArgumentType]
    for leaf, other in zip(leaves, wide, strict=True):
        assert leaf.grad is not None and other.grad is not None
        assert torch.equal(leaf.grad, other.grad.bfloat16())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_cost_matmuls_only_if_they_are_needed(name: str, plainly: Any) -> None:
    batch = plainly.batch(64, 1, 32, name=name)
    image, text = (F.normalize(side, dim=1).requires_grad_() for side in (batch.image, batch.text))
    loss, features = batch.loss(), Features(image, text, batch.image_id, batch.caption_id)

    def matmuls(backward: bool) -> float:
        with OperationCounter() as counter, torch.set_grad_enabled(backward):
            value = loss(features)
            if backward:
                value.backward()
        return counter.products / (64 * 64 * 32)

    assert matmuls(False) == 1
    assert matmuls(True) == {"softmax": 4, "sigmoid": 3}[name]


@pytest.mark.parametrize("name", NAMES)
def test_no_tile_sized_memory_is_allocated_per_tile(name: str, plainly: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only two buffers, three masks and the gradients of both sides are allocated, for 8 tiles as for 32."""
    monkeypatch.setattr(tiles, "CPU_TILE", (32, 64))
    counts = []
    for size in (128, 256):
        batch = plainly.batch(size, 1, 4, name=name)
        image, text = (F.normalize(side, dim=1).requires_grad_() for side in (batch.image, batch.text))
        loss, features = batch.loss(), Features(image, text, batch.image_id, batch.caption_id)
        with OperationCounter() as counter:
            loss(features).backward()
        assert max(counter.sizes) <= 32 * 64
        counts.append(sum(size >= 32 * 64 // 2 for size in counter.sizes if size != 4 * batch.image.shape[0]))
    assert counts[0] == counts[1] <= 8, counts


@pytest.mark.parametrize("name", NAMES)
def test_backward_consumes_the_gradients_and_has_no_second_derivative(name: str, plainly: Any) -> None:
    batch = plainly.batch(6, 1, 8, name=name)
    image, text = (F.normalize(side, dim=1).requires_grad_() for side in (batch.image, batch.text))
    features = Features(image, text, batch.image_id, batch.caption_id)
    loss = batch.loss()
    (once,) = torch.autograd.grad(loss(features), image)
    (thrice,) = torch.autograd.grad(3 * loss(features), image)
    assert torch.allclose(3 * once, thrice, rtol=1e-6, atol=0)
    value = loss(features)
    value.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="used up"):
        value.backward()
    (first,) = torch.autograd.grad(loss(features) ** 2, image, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_clamp_changes_the_parameter_not_the_value_in_forward(name: str, plainly: Any) -> None:
    """A clamp inside the graph would make the scale's gradient zero where it is needed most."""
    batch = plainly.batch(6, 1, 8, name=name, scale=300.0)
    loss = batch.loss()
    assert all(parameter.shape == (1,) and parameter.dtype == torch.float32 for parameter in loss.parameters())
    assert plainly.run(batch).parameters[0] != 0
    for value, want in ((9.0, MAX_LOG_SCALE), (-1.0, 0.0), (2.0, 2.0)):
        with torch.no_grad():
            loss.logit_scale.fill_(value)
        loss.clamp()
        assert loss.logit_scale.item() == pytest.approx(want)


def test_initial_scale_and_bias_are_those_of_the_papers() -> None:
    softmax_loss, sigmoid_loss = (LOSSES.build(LOSSES.preset(name), embed_dim=8) for name in ("softmax", "sigmoid"))
    assert softmax_loss.report() == {"scale": pytest.approx(1 / 0.07)}
    assert sigmoid_loss.report() == {"scale": pytest.approx(10.0), "bias": -10.0}
    sigmoid_loss.bias.data.fill_(1000.0)
    sigmoid_loss.clamp()
    assert sigmoid_loss.bias.item() == 1000.0


def test_repeats_setting_has_no_effect_without_repeats(plainly: Any) -> None:
    """The softmax loss is then the cross-entropy of the diagonal."""
    batches = [plainly.batch(9, 1, 8, settings={"repeats": repeats}) for repeats in ("positive", "mask")]
    positive, mask = (plainly.run(batch) for batch in batches)
    assert torch.equal(positive.loss, mask.loss) and torch.equal(positive.text, mask.text)
    image, text = (F.normalize(side.double(), dim=1) for side in (batches[0].image, batches[0].text))
    logits, right = 14.0 * image @ text.T, torch.arange(9)
    want = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    assert float((positive.loss - want).abs()) < 1e-6


@pytest.mark.parametrize("nested", [Matryoshka(dims=(4, 9)), Matryoshka(dims=(4, 8), weights=(1.0,))])
def test_matryoshka_lengths_that_do_not_fit_are_refused(nested: Matryoshka) -> None:
    with pytest.raises(ClipwrightError) as caught:
        LOSSES.build(LOSSES.preset("sigmoid", matryoshka=nested), embed_dim=8)
    line = str(caught.value)
    assert line.startswith("error[E_CONFIG_VALUE]") and "loss.matryoshka" in line and "embed_dim is 8" in line


def test_identical_embeddings_give_the_log_of_the_batch_size() -> None:
    loss = LOSSES.build(LOSSES.preset("softmax"), embed_dim=4)
    rows, ids = F.normalize(torch.ones(6, 4), dim=1), torch.arange(6)
    assert abs(loss(Features(rows, rows, ids, ids[:, None])).item() - math.log(6)) < 5e-6


def mutate(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, old: str, new: str) -> None:
    """Replaces part of a function's source."""
    function = inspect.unwrap(getattr(owner, name))  # without the shape checks of the tests
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, old
    namespace: dict[str, Any] = {}
    flags = __future__.annotations.compiler_flag
    exec(compile(source.replace(old, new), name, "exec", flags), function.__globals__, namespace)
    monkeypatch.setattr(owner, name, namespace[name])


PASSES = softmax._TwoPasses
MUTATIONS: list[tuple[Any, str, str, str]] = [
    (tiles, "spans", "min(start + step, length)", "min(start + step, length - 1)"),
    (tiles, "spans", "range(0, length, step)", "range(0, max(length - step, 1), step)"),
    (tiles.EqualIds, "mark", "self.others[None, cols]", "self.others[None, cols].roll(1)"),
    (tiles.EqualIds, "__init__", "present[self.own[rows].flatten()]", "present[self.own[rows, 0]]"),
    (tiles.LogSumExp, "add", "(before - maximum).exp()", "1"),
    (tiles.Grid, "__init__", "self.columns.rank *", "0 *"),
    (PASSES, "loss", "+ self._cross_entropy(lse, stats).sum() / self.grid.texts", "* 2"),
    (PASSES, "gradients", "text_grad[tile.cols].addmm_(grad.T, tile.image)", "pass"),
    (PASSES, "gradients", "image_grad[tile.rows].addmm_(grad, tile.text)", "pass"),
    (softmax, "_gradient", "grad += tile.logits.sub_(column.log_normalizer).exp_()", "pass"),
    (softmax, "_gradient", "target.masked_fill_(tile.excluded, 0.0)", "target"),
    (sigmoid, "_single_pass", "grid.scale / grid.images),)", "grid.scale / len(rows)),)"),
    (sigmoid, "_single_pass", "text_grad[tile.cols].addmm_(grad.T, tile.image)", "pass"),
    (sigmoid, "_single_pass", "grad -= tile.spare.copy_(tile.positive)", "pass"),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m[1]}: {m[2][:30]}")
@pytest.mark.usefixtures("small_tiles")
def test_mutation_is_noticed(
    mutation: tuple[Any, str, str, str], plainly: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch, *mutation)
    name = "sigmoid" if mutation[0] is sigmoid else "softmax"
    with pytest.raises((AssertionError, IndexError)):
        for batch in cases(plainly, name):
            plainly.check(batch, 2)


@pytest.mark.parametrize("op", ["logaddexp", "sum"])
def test_missing_merge_over_ranks_is_noticed(op: str, plainly: Any) -> None:
    """Each rank keeps its own results for its columns: their log-sum-exps, or their gradients."""
    merge = {**plainly.merge, op: lambda parts: parts[0]}
    batch = plainly.batch(12, 1, 12)
    plainly.check(batch, 2)
    with pytest.raises(AssertionError):
        plainly.check(batch, 2, merge=merge)


class Quadratic(LossTerm):
    """A second term with a parameter of its own."""

    weight = 0.25

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([3.0]))

    def forward(self, features: Features) -> torch.Tensor:
        return (self.factor * features.image.square().sum()).squeeze()

    def clamp(self) -> None:
        with torch.no_grad():
            self.factor.clamp_(max=2.0)

    def report(self) -> dict[str, float]:
        return {"factor": float(self.factor.detach())}


@pytest.mark.parametrize("name", NAMES)
def test_total_of_one_term_is_that_term_bit_for_bit(name: str, plainly: Any) -> None:
    batch = plainly.batch(12, 1, 12, name=name)
    results = []
    for loss in (batch.loss(), TotalLoss({"contrastive": batch.loss()})):
        image, text = (F.normalize(side, dim=1).requires_grad_() for side in (batch.image, batch.text))
        value = loss(Features(image, text, batch.image_id, batch.caption_id))
        value.backward()
        results.append([value, image.grad, text.grad, *(p.grad for p in loss.parameters())])
        assert loss.state_dict().keys() == batch.loss().state_dict().keys() and loss.report() == batch.loss().report()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_total_loss_is_the_weighted_sum_of_its_terms(plainly: Any) -> None:
    batch = plainly.batch(12, 1, 12)
    image, text = (F.normalize(side, dim=1).requires_grad_() for side in (batch.image, batch.text))
    features = Features(image, text, batch.image_id, batch.caption_id)
    contrastive, quadratic = batch.loss(), Quadratic()
    total = TotalLoss({"contrastive": contrastive, "quadratic": quadratic})
    assert total(features).item() == pytest.approx((contrastive(features) + 0.25 * quadratic(features)).item())
    assert total.report() == {**contrastive.report(), "factor": 3.0}
    total.clamp()
    assert quadratic.factor.item() == 2.0
    # The first term has its own names in checkpoints and model folders, whatever joins it.
    assert set(total.state_dict()) == {"logit_scale", "quadratic.factor"}
    other = TotalLoss({"contrastive": batch.loss(), "quadratic": Quadratic()})
    other.load_state_dict(total.state_dict())
    assert all(torch.equal(other.state_dict()[key], tensor) for key, tensor in total.state_dict().items())
