"""The shapes in the annotations of towers, tokenizers, losses and model are checked in the tests' own process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from shape_checks import no_shape_checks

from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.losses.base import Features
from clipwright.pipeline.model.two_tower import ModelConfig, TwoTower
from clipwright.pipeline.tokenizers.base import trim
from clipwright.pipeline.towers.base import IMAGE_TOWERS, TEXT_TOWERS
from clipwright.pipeline.towers.layers import Attention


def test_tower_rejects_wrong_input_shape():
    tower = IMAGE_TOWERS.build(IMAGE_TOWERS.preset("vit_nano"))
    tower(torch.zeros(2, 3, 64, 64))
    with pytest.raises(TypeCheckError):
        tower(torch.zeros(2, 4, 64, 64))
    with pytest.raises(TypeCheckError):
        tower(torch.zeros(3, 64, 64))
    text = TEXT_TOWERS.build(TEXT_TOWERS.preset("text_nano"), vocab_size=10, eot_id=9)
    with pytest.raises(TypeCheckError):
        text(torch.zeros(2, 8))


def test_axes_of_one_call_must_agree():
    with pytest.raises(TypeCheckError):
        Attention(8, 2)(torch.zeros(2, 5, 8), torch.ones(2, 4, dtype=torch.bool))


def test_result_shape_is_checked(monkeypatch):
    attention = Attention(8, 2)
    monkeypatch.setattr(attention, "out", torch.nn.Linear(8, 6))
    with pytest.raises(TypeCheckError, match="return value"):
        attention(torch.zeros(2, 5, 8))
    with no_shape_checks():
        assert attention(torch.zeros(2, 5, 8)).shape == (2, 5, 6)


def test_model_rejects_float_views():
    model = TwoTower(resolve(ModelConfig).value, vocab_size=10, eot_id=9)
    size = model.image.image_size
    with pytest.raises(TypeCheckError):
        model.encode_image(torch.zeros(1, size, size, 3))


def test_loss_rejects_images_and_ids_of_different_length():
    with pytest.raises(TypeCheckError):
        Features(
            image=torch.zeros(4, 8),
            text=torch.zeros(4, 8),
            image_id=torch.zeros(3, dtype=torch.long),
            caption_id=torch.zeros(4, 1, dtype=torch.long),
        )


def test_trim_rejects_a_single_caption():
    with pytest.raises(TypeCheckError):
        trim(np.zeros(8, dtype=np.int32), 9, "longest")
