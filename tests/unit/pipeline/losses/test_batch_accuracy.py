"""Batch accuracy: how often a positive is ranked first."""

from __future__ import annotations

import pytest
import torch

from clipwright.pipeline.losses import tiles
from clipwright.pipeline.losses.base import Features
from clipwright.pipeline.losses.tiles import batch_accuracy


def plain_accuracy(features: Features) -> tuple[int, int]:
    """Counts pair by pair, in plain Python."""
    per_image = features.caption_id.shape[1]
    flat = features.caption_id.flatten().tolist()

    def positive(image: int, text: int) -> bool:
        same = features.image_id[image] == features.image_id[text // per_image]
        return bool(same) or flat[text] in features.caption_id[image].tolist()

    images, texts = range(len(features.image)), range(len(flat))
    scores = (features.image @ features.text.T).tolist()
    best_text = {i: max(range(len(flat)), key=lambda t: scores[i][t]) for i in images}
    best_image = {t: max(range(len(scores)), key=lambda i: scores[i][t]) for t in texts}
    return sum(positive(i, t) for i, t in best_text.items()), sum(positive(i, t) for t, i in best_image.items())


@pytest.mark.parametrize("tile", [(512, 2048), (3, 5)])
def test_batch_accuracy_uses_the_positives_of_the_loss(tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Class-name captions repeat in a batch: any image of the class is correct."""
    monkeypatch.setattr(tiles, "CPU_TILE", tile)
    torch.manual_seed(0)
    seen = set()
    for per_image in (1, 3):
        caption_id = torch.randint(0, 4, (8, per_image))
        image_id = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0])
        image, text = torch.randn(8, 5), torch.randn(8 * per_image, 5)
        features = Features(image, text, image_id, caption_id)
        *correct, columns = batch_accuracy(features)
        counts = tuple(int(number) for number in correct)
        assert counts == plain_accuracy(features) and columns == 8 * per_image
        seen.add(counts)
    assert len(seen) == 2
