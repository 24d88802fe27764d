"""The embedding space of the two towers: extra pooled features and projections."""

from __future__ import annotations

import pytest
import torch

from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.model.two_tower import ModelConfig, TwoTower


def towers(*overrides: str) -> TwoTower:
    torch.manual_seed(0)
    config = resolve(ModelConfig, overrides=["image.image_size=16", "embed_dim=24", *overrides]).value
    return TwoTower(config, vocab_size=50, eot_id=49).eval()


def views() -> torch.Tensor:
    return torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_image_embedding_is_the_renormalized_mean_of_its_unit_embeddings():
    model = towers("image.name=deit_nano")
    images = (views().permute(0, 3, 1, 2) - model.mean) / model.std
    with torch.no_grad():
        out = model.image(images)
        cls = out.pooled @ model.image_projection.weight.T
        dist = out.extra["dist"] @ model.extra_projections["dist"].weight.T
        total = cls / cls.norm(dim=1, keepdim=True) + dist / dist.norm(dim=1, keepdim=True)
        expected = total / total.norm(dim=1, keepdim=True)
        for training in (False, True):
            model.train(training)
            model.image.eval()  # disables drop path
            torch.testing.assert_close(model.encode_image(views()), expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(expected, cls / cls.norm(dim=1, keepdim=True), atol=1e-2)


def test_both_projections_have_gradients_and_weight_decay():
    model = towers("image.name=deit_nano")
    assert not torch.equal(model.image_projection.weight, model.extra_projections["dist"].weight)
    (model.encode_image(views()) * torch.linspace(-1, 1, 24)).sum().backward()
    for name in ("image_projection.weight", "extra_projections.dist.weight", "image.prefix_tokens"):
        grad = model.get_parameter(name).grad
        assert grad is not None and grad.abs().max() > 0, name
    exempt = model.no_weight_decay()
    assert {"image.prefix_tokens", "image.pos_embed"} <= exempt
    assert "extra_projections.dist.weight" not in exempt


@pytest.mark.parametrize("overrides", [("image.name=vit_nano",), ("image.name=deit_nano", "image.distilled=false")])
def test_tower_without_extra_features_has_no_extra_projection(overrides):
    model = towers(*overrides)
    assert not [name for name in model.state_dict() if name.startswith("extra_projections")]
    norms = model.encode_image(views()).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(3), atol=1e-6, rtol=0)


def test_tower_without_projection_gives_the_embedding_itself():
    model = towers("image.name=deit_nano", "image.projection=none", "embed_dim=128")
    images = (views().permute(0, 3, 1, 2) - model.mean) / model.std
    with torch.no_grad():
        out = model.image(images)
        unit = [torch.nn.functional.normalize(v, dim=1) for v in (out.pooled, out.extra["dist"])]
        expected = torch.nn.functional.normalize(sum(unit), dim=1)
        torch.testing.assert_close(model.encode_image(views()), expected, atol=1e-6, rtol=1e-6)
