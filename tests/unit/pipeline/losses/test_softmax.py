"""The softmax loss against the formula written out with loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipwright.pipeline.losses import tiles
from clipwright.pipeline.losses.base import LOSSES, Features
from clipwright.pipeline.losses.softmax import MAX_LOG_SCALE, SoftmaxLoss


def slow_loss(image: Tensor, text: Tensor, t: Tensor, image_id: list[int], caption_id: list[list[int]]) -> Tensor:
    """½ (mean over images + mean over texts) of cross-entropy against uniform positives, pair by pair."""
    per_image = len(caption_id[0])
    scores = t.exp() * image @ text.T

    def positive(i: int, j: int) -> bool:
        own, k = divmod(j, per_image)
        return image_id[i] == image_id[own] or caption_id[own][k] in caption_id[i]

    def entropy(logits: Tensor, right: list[int]) -> Tensor:
        log_probabilities = logits - logits.exp().sum().log()
        return -sum(log_probabilities[j] for j in right) / len(right)  # pyright: ignore[reportReturnType]

    images, texts = range(len(image)), range(len(text))
    rows = [entropy(scores[i], [j for j in texts if positive(i, j)]) for i in images]
    columns = [entropy(scores[:, j], [i for i in images if positive(i, j)]) for j in texts]
    return (sum(rows) / len(image) + sum(columns) / len(text)) / 2  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("per_image", [1, 3])
@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("tile", [(512, 2048), (3, 5), (1, 7)])
def test_loss_and_gradients_equal_the_formula(
    per_image: int, repeats: bool, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "CPU_TILE", tile)
    torch.manual_seed(0)
    size, dim = 8, 16
    image64 = F.normalize(torch.randn(size, dim, dtype=torch.float64), dim=1).requires_grad_()
    text64 = F.normalize(torch.randn(size * per_image, dim, dtype=torch.float64), dim=1).requires_grad_()
    image_id = [0, 1, 2, 2, 4, 5, 6, 7] if repeats else list(range(size))
    caption_id = [[10 * i + k for k in range(per_image)] for i in range(size)]
    if repeats:
        caption_id[5][0] = caption_id[0][0]
    loss: SoftmaxLoss = LOSSES.build(LOSSES.preset("softmax"))  # pyright: ignore[reportAssignmentType]
    t64 = loss.logit_scale.detach().double().requires_grad_()
    want = slow_loss(image64, text64, t64, image_id, caption_id)
    want.backward()

    image, text = (x.detach().float().requires_grad_() for x in (image64, text64))
    total = loss(Features(image, text, torch.tensor(image_id), torch.tensor(caption_id)))
    total.backward()
    assert abs(total.item() - want.item()) < 1e-5
    pairs = ((image, image64), (text, text64), (loss.logit_scale, t64))
    for ours, reference in pairs:
        assert ours.grad is not None and reference.grad is not None
        assert (ours.grad - reference.grad).abs().max() < 1e-5


def test_identical_rows_give_ln_b() -> None:
    loss = LOSSES.build(LOSSES.preset("softmax"))
    rows = F.normalize(torch.ones(6, 4), dim=1)
    ids = torch.arange(6)
    assert abs(loss(Features(rows, rows, ids, ids[:, None])).item() - math.log(6)) < 5e-6


def test_the_parameter_is_clamped_not_the_used_value() -> None:
    loss: SoftmaxLoss = LOSSES.build(LOSSES.preset("softmax"))  # pyright: ignore[reportAssignmentType]
    assert loss.logit_scale.shape == (1,)
    for value, want in ((9.0, MAX_LOG_SCALE), (-1.0, 0.0), (2.0, 2.0)):
        with torch.no_grad():
            loss.logit_scale.fill_(value)
        loss.constrain()
        assert loss.logit_scale.item() == pytest.approx(want)
