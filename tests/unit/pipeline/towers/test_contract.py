"""Properties of every registered tower, whatever its family."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from tower_checks import perturb

from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.model.two_tower import ModelConfig, TwoTower
from clipwright.pipeline.towers.base import IMAGE_TOWERS, TEXT_TOWERS, ImageTower, TextTower, parameter_count

VOCAB, EOT = 100, 99

# Parameters that `pooled` does not depend on: CvT's last block convolves queries for patch tokens, while `pooled` is
# the class token (test_cvt.py tests that their gradient comes from `tokens`).
TOKENS_ONLY = {
    "cvt_nano": [f"stages.2.blocks.2.attn.q.{key}" for key in ("conv.weight", "norm.weight", "norm.bias")],
}


def image_tower(name: str, **fields) -> ImageTower:
    torch.manual_seed(0)
    return IMAGE_TOWERS.build(IMAGE_TOWERS.preset(name, **fields))


def text_tower(name: str, vocab_size: int = VOCAB, eot_id: int = EOT, **fields) -> TextTower:
    torch.manual_seed(0)
    return TEXT_TOWERS.build(TEXT_TOWERS.preset(name, **fields), vocab_size=vocab_size, eot_id=eot_id)


def smallest(registry, build) -> list[str]:
    """Returns the smallest preset of each family, except those that need files from outside."""
    families = [family for family in registry.families if not getattr(family.config, "external_fields", ())]
    with torch.device("meta"):
        return [min(family.presets, key=lambda name: parameter_count(build(name))) for family in families]


IMAGES, TEXTS = smallest(IMAGE_TOWERS, image_tower), smallest(TEXT_TOWERS, text_tower)


@lru_cache
def other_size(name: str) -> int:
    """Returns the next larger image size that the tower supports."""
    start = IMAGE_TOWERS.preset(name).image_size
    with torch.device("meta"):
        for size in range(start + 1, 4 * start):
            try:
                image_tower(name, image_size=size)
            except ClipwrightError:
                continue
            return size
    raise AssertionError(name)


def random_images(tower: ImageTower) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, tower.image_size, tower.image_size, generator=generator)


def captions(tower: TextTower) -> torch.Tensor:
    ids = torch.randint(1, EOT, (3, tower.context), generator=torch.Generator().manual_seed(2))
    for row, end in enumerate([3, 11, 7]):
        ids[row, end] = EOT
    return ids


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("name", list(IMAGE_TOWERS.entries))
def test_image_preset_has_its_shapes(name):
    with torch.device("meta"):
        tower = image_tower(name).eval()
        out = tower(torch.empty(2, 3, tower.image_size, tower.image_size))
    assert out.pooled.shape == (2, tower.feature_dim)
    assert out.grid is not None
    assert out.tokens.shape == (2, out.grid[0] * out.grid[1], tower.token_dim)
    assert out.mask is None
    assert set(out.extra) == set(tower.extra_names)
    assert all(pooled.shape == out.pooled.shape for pooled in out.extra.values())


@pytest.mark.parametrize(
    "name", [name for name, entry in TEXT_TOWERS.entries.items() if not entry.config.external_fields]
)
def test_text_preset_has_its_shapes(name):
    with torch.device("meta"):
        tower = text_tower(name, 49408, 49407).eval()
        out = tower(torch.zeros(2, tower.context, dtype=torch.long))
    assert out.pooled.shape == (2, tower.feature_dim)
    assert out.tokens.shape == (2, tower.context, tower.feature_dim)
    assert out.mask is not None and out.mask.shape == (2, tower.context)
    assert out.grid is None


@pytest.mark.parametrize("name", IMAGES)
def test_image_shapes_at_two_sizes(name):
    for size in (IMAGE_TOWERS.preset(name).image_size, other_size(name)):
        tower = image_tower(name, image_size=size).eval()
        out = tower(random_images(tower))
        assert tower.image_size == size
        assert out.grid is not None
        assert out.tokens.shape == (3, out.grid[0] * out.grid[1], tower.token_dim)
        assert out.pooled.isfinite().all() and out.tokens.isfinite().all()


@pytest.mark.parametrize("name", IMAGES)
def test_any_image_size_is_supported_or_rejected(name):
    start = IMAGE_TOWERS.preset(name).image_size
    for size in (0, -32, start + 1, start + 8):
        try:
            tower = image_tower(name, image_size=size)
        except ClipwrightError as error:
            assert error.code == "E_CONFIG_VALUE"
            assert "image_size" in error.where and str(size) in error.where and error.fix
        else:
            assert size > 0 and tower.eval()(random_images(tower)).pooled.isfinite().all()


@pytest.mark.parametrize("name", IMAGES)
def test_images_of_another_size_are_rejected(name):
    tower = image_tower(name).eval()
    with pytest.raises(AssertionError):
        tower(torch.zeros(1, 3, tower.image_size + 1, tower.image_size + 1))


@pytest.mark.parametrize("name", IMAGES)
def test_image_outputs_are_deterministic_and_independent_of_the_batch(name):
    tower = image_tower(name).eval()
    perturb(tower, 0.05)
    x = random_images(tower)
    with torch.no_grad():
        out, again, alone = tower(x), tower(x), tower(x[1:2])
    assert torch.equal(out.pooled, again.pooled) and torch.equal(out.tokens, again.tokens)
    torch.testing.assert_close(alone.pooled[0], out.pooled[1], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(alone.tokens[0], out.tokens[1], atol=2e-5, rtol=1e-5)
    assert relative_error(out.pooled[0], out.pooled[1]) > 1e-4, "pooled does not depend on the image"


@pytest.mark.parametrize("name", TEXTS)
def test_text_outputs_are_deterministic_and_independent_of_the_batch(name):
    tower = text_tower(name).eval()
    ids = captions(tower)
    with torch.no_grad():
        out, again, alone = tower(ids), tower(ids), tower(ids[1:2])
    assert torch.equal(out.pooled, again.pooled)
    torch.testing.assert_close(alone.pooled[0], out.pooled[1], atol=2e-5, rtol=1e-5)
    assert out.pooled.isfinite().all() and out.tokens.isfinite().all()


@pytest.mark.parametrize("name", [*IMAGES, *TEXTS])
def test_gradient_reaches_every_parameter(name):
    tower = image_tower(name) if name in IMAGES else text_tower(name)
    perturb(tower, 0.05)
    out = tower(random_images(tower) if isinstance(tower, ImageTower) else captions(tower))
    sum((v * torch.linspace(-1, 1, v.shape[1])).sum() for v in [out.pooled, *out.extra.values()]).backward()
    for key, p in tower.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
        assert p.grad.abs().max() > 0 or key in TOKENS_ONLY.get(name, ()), key


@pytest.mark.parametrize("name", [*IMAGES, *TEXTS])
def test_state_dict_round_trip(name):
    build = image_tower if name in IMAGES else text_tower
    original, restored = build(name).eval(), build(name).eval()
    perturb(original, 0.05)
    restored.load_state_dict(original.state_dict(), strict=True)
    x = random_images(original) if isinstance(original, ImageTower) else captions(original)
    assert torch.equal(original(x).pooled, restored(x).pooled)


@pytest.mark.parametrize("name", IMAGES)
def test_weights_can_be_resized(name):
    small = image_tower(name).eval()
    large = image_tower(name, image_size=other_size(name)).eval()
    perturb(small, 0.05)
    same = small.resized(small.state_dict())
    assert all(torch.equal(value, same[key]) for key, value in small.state_dict().items())
    try:
        state = large.resized(small.state_dict())
    except ClipwrightError as error:  # the family's weights fix the number of tokens
        assert error.code == "E_CONFIG_VALUE" and "image_size" in error.where and error.fix
        return
    large.load_state_dict(state, strict=True)
    assert large(random_images(large)).pooled.isfinite().all()


@pytest.mark.parametrize("name", [*IMAGES, *TEXTS])
def test_bfloat16_stays_near_float32(name):
    tower = (image_tower if name in IMAGES else text_tower)(name).eval()
    x = random_images(tower) if isinstance(tower, ImageTower) else captions(tower)
    with torch.no_grad():
        full = tower(x).pooled
        with torch.autocast("cpu", torch.bfloat16):
            half = tower(x).pooled
    assert relative_error(half, full) < 2e-2


@pytest.mark.parametrize("name", IMAGES)
def test_maps_stay_channels_last(name):
    """Convolutions keep the layout of the images, and the other layout gives the same results."""
    tower = image_tower(name).eval()
    perturb(tower, 0.05)
    images, layouts = random_images(tower), []
    for module in tower.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *call: layouts.append(call[2]))
    last = torch.channels_last
    out, other = tower(images.contiguous(memory_format=last)), tower(images)
    assert layouts and all(maps.is_contiguous(memory_format=last) for maps in layouts[: len(layouts) // 2])
    torch.testing.assert_close(out.pooled, other.pooled, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.tokens, other.tokens, atol=1e-4, rtol=1e-4)


def test_model_passes_channels_last_images_to_its_tower():
    model = TwoTower(resolve(ModelConfig).value, vocab_size=VOCAB, eot_id=EOT)
    layouts = []
    model.image.register_forward_pre_hook(
        lambda _, given: layouts.append(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    views = torch.zeros(2, model.image.image_size, model.image.image_size, 3, dtype=torch.uint8)
    model.encode_image(views)
    assert layouts == [True]


@pytest.mark.parametrize("name", [*IMAGES, *TEXTS])
def test_tower_compiles_without_graph_breaks(name, unchecked):
    """Compiles the forward pass; test_checkpointing.py compiles a backward pass too."""
    tower = (image_tower if name in IMAGES else text_tower)(name)
    x = random_images(tower) if isinstance(tower, ImageTower) else captions(tower)
    torch.manual_seed(4)
    plain = tower(x)
    tower.compile(fullgraph=True, backend="eager")
    torch.manual_seed(4)
    compiled = tower(x)
    assert torch.equal(compiled.pooled, plain.pooled) and torch.equal(compiled.tokens, plain.tokens)
    torch.compiler.reset()


@pytest.mark.parametrize("name", [*IMAGES, *TEXTS])
def test_drop_path_acts_in_training_only(name):
    registry, build = (IMAGE_TOWERS, image_tower) if name in IMAGES else (TEXT_TOWERS, text_tower)
    if not hasattr(registry.preset(name), "drop_path"):
        assert name == "clip_rn_nano"
        return
    never, often = (build(name, drop_path=rate) for rate in (0.0, 0.9))
    for tower in (never, often):
        perturb(tower, 0.05)
    x = random_images(never) if isinstance(never, ImageTower) else captions(never)
    assert torch.equal(never.eval()(x).pooled, often.eval()(x).pooled)
    assert not torch.equal(never.train()(x).pooled, often.train()(x).pooled)


@pytest.mark.parametrize("name", [*IMAGES, *TEXTS])
def test_position_tables_have_no_weight_decay(name):
    tower = (image_tower if name in IMAGES else text_tower)(name)
    tables = [key for key, p in tower.named_parameters() if p.ndim == 2 and ("pos" in key or "table" in key)]
    assert all(key.endswith(tower.no_weight_decay) for key in tables)
