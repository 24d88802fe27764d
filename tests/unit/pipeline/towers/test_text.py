"""The causal text tower: forward pass against a reference, causality, pooling, trimming, initialization."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tower_checks import (
    assert_close,
    perturb,
    random_captions,
    reference_sinusoids,
    scale_scores_by_token_width,
    swap_key_and_value_weights,
)

from clipwright.pipeline.towers.base import TEXT_TOWERS, parameter_count
from clipwright.pipeline.towers.layers import Activation
from clipwright.pipeline.towers.text import CausalText, CausalTextConfig

EOT = 49


def build(vocab_size: int = 50, eot_id: int = EOT, **fields) -> CausalText:
    torch.manual_seed(0)
    small = {"context": 16, "width": 24, "depth": 3, "heads": 3}
    return CausalText(CausalTextConfig(name="x", **{**small, **fields}), vocab_size=vocab_size, eot_id=eot_id).eval()


def reference_tokens(tower: CausalText, ids: torch.Tensor, *, sinusoidal: bool = False) -> torch.Tensor:
    """Computes tokens from the equations, with ln_eps 1e-3."""
    (_, n), width, heads = ids.shape, 24, 3
    norm = lambda layer, x: F.layer_norm(x, (width,), layer.weight, layer.bias, 1e-3)  # noqa: E731
    x = torch.stack([torch.stack([tower.token_embed.weight[i] for i in row]) for row in ids])
    x = x * width**0.5 + reference_sinusoids(n, width) if sinusoidal else x + tower.pos_embed[:n]
    forbidden = torch.full((n, n), float("-inf"), dtype=torch.double).triu(1)
    for block in tower.blocks:
        parts = [part.split(width // heads, dim=2) for part in block.attn.qkv(norm(block.norm1, x)).split(width, 2)]
        out = []
        for q, k, v in zip(*parts, strict=True):
            scores = q @ k.transpose(1, 2) / (width / heads) ** 0.5 + forbidden
            out.append(scores.softmax(dim=2) @ v)
        x = x + block.attn.out(torch.cat(out, dim=2))
        z = block.mlp.fc1(norm(block.norm2, x))
        x = x + block.mlp.fc2(z * torch.sigmoid(1.702 * z))
    return norm(tower.norm, x)


def test_forward_matches_reference():
    tower, ids = perturb(build(ln_eps=1e-3, mlp_ratio=2.5).double()), random_captions([4, 9], 10, eot_id=EOT)
    assert tower.blocks[0].mlp.fc1.out_features == 60
    x, out = reference_tokens(tower, ids), tower(ids)
    assert_close(out.tokens, x)
    assert_close(out.pooled, torch.stack([x[0, 4], x[1, 9]]))


def test_forward_with_sinusoidal_positions_matches_reference():
    tower, ids = perturb(build(ln_eps=1e-3, positions="sinusoidal").double()), random_captions([4, 9], 10, eot_id=EOT)
    x = reference_tokens(tower, ids, sinusoidal=True)
    torch.testing.assert_close(tower(ids).tokens, x, atol=1e-5, rtol=1e-5)  # the table is float32
    tower.pos_embed.copy_(reference_sinusoids(16, 24))
    assert_close(tower(ids).tokens, x)
    assert "pos_embed" not in tower.state_dict()
    start = build(positions="sinusoidal", width=240)
    assert (start.embed_scale * start.token_embed.weight).std().item() == pytest.approx(1, rel=0.05)


def attend_to_all(tower: CausalText) -> None:
    for block in tower.blocks:
        block.attn.causal = False


def other_gelu(tower: CausalText) -> None:
    for block in tower.blocks:
        block.mlp.act = Activation("gelu")


def other_eps(tower: CausalText) -> None:
    tower.norm.eps = 1e-5


def pool_last_position(tower: CausalText) -> None:
    tower.mask = torch.ones_like  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "mutate",
    [swap_key_and_value_weights, scale_scores_by_token_width, attend_to_all, other_gelu, other_eps, pool_last_position],
)
def test_comparison_detects_mistakes(mutate):
    """Each of these mistakes exceeds the tolerance of the comparison by far."""
    tower, ids = perturb(build(ln_eps=1e-3).double()), random_captions([4, 9], 16, eot_id=EOT)
    with torch.no_grad():
        x = reference_tokens(tower, ids)
        mutate(tower)
        wrong = (tower(ids).pooled - torch.stack([x[0, 4], x[1, 9]])).abs().max()
    assert wrong > 1e-5


def test_tokens_do_not_affect_earlier_positions():
    tower, ids = build(), random_captions([15, 15], 16, eot_id=EOT)
    before = tower(ids).tokens
    for t in (1, 7, 15):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 5) % EOT
        after = tower(changed).tokens
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


def test_tokens_after_eot_are_ignored():
    tower, ids = build(), random_captions([4, 9, 12], 16, eot_id=EOT)
    pooled, noisy = tower(ids).pooled, ids.clone()
    for row, end in enumerate([4, 9, 12]):
        noisy[row, end + 1 :] = torch.randint(0, 50, (15 - end,))  # may contain EOT
    noisy[0, 5] = EOT
    assert (tower(noisy).pooled - pooled).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ["text_nano", "clip"])
def test_trimmed_batch_gives_the_same_pooled(name):
    if name == "clip":
        torch.manual_seed(0)
        config = TEXT_TOWERS.preset("clip_text_b", depth=4)
        tower = TEXT_TOWERS.build(config, vocab_size=50, eot_id=EOT).eval()
    else:
        tower = build(context=32, width=128, depth=4, heads=4)
    ids = random_captions([4, 9, 12], tower.context, eot_id=EOT)
    with torch.no_grad():
        untrimmed = tower(ids).pooled
        for length in (13, 16, 24):
            assert (tower(ids[:, :length]).pooled - untrimmed).abs().max() <= 3e-6


def test_first_eot_equals_argmax_for_clips_vocabulary():
    tower = build(vocab_size=49408, eot_id=49407)
    ids = random_captions([4, 9, 12], 16, eot_id=49407)
    ids[1, 12] = 49407  # a second EOT
    out = tower(ids)
    assert torch.equal(out.pooled, out.tokens[torch.arange(3), ids.argmax(dim=1)])


def test_eot_need_not_be_the_largest_id():
    tower = build(eot_id=2)
    ids = torch.tensor([[1, 40, 2, 0, 0], [1, 30, 41, 42, 2], [1, 2, 45, 2, 0]])
    out = tower(ids)
    assert torch.equal(out.pooled, out.tokens[torch.arange(3), torch.tensor([2, 4, 1])])
    assert out.mask is not None
    assert out.mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]


def test_argmax_pools_the_largest_id():
    """As OpenAI's code: the first of several, and not EOT where another id is larger."""
    tower = build(eot_id=2, pool="argmax")
    ids = torch.tensor([[1, 40, 2, 0, 0], [1, 30, 41, 42, 2], [1, 45, 3, 45, 2]])
    out = tower(ids)
    assert torch.equal(out.pooled, out.tokens[torch.arange(3), torch.tensor([1, 3, 1])])
    assert out.mask is not None and out.mask[0].tolist() == [True, True, True, False, False]
    ids = random_captions([4, 9, 12], 16, eot_id=EOT)
    ids[1, 11] = EOT
    assert torch.equal(build(pool="argmax")(ids).pooled, build()(ids).pooled)


def test_drop_path_rises_over_the_blocks_and_acts_in_training_only():
    tower, ids = build(drop_path=0.5), random_captions([4] * 16, 16, eot_id=EOT)
    assert [block.drop_path.rate for block in tower.blocks] == pytest.approx([0, 0.25, 0.5])
    assert torch.equal(tower(ids).pooled, tower(ids).pooled)
    tower.train()
    assert not torch.equal(tower(ids).pooled, tower(ids).pooled)


def test_row_without_eot_is_pooled_at_its_end():
    tower, ids = build(), torch.tensor([[1, 2, 3, 4]])
    out = tower(ids)
    assert torch.equal(out.pooled, out.tokens[:, 3]) and out.mask is not None and out.mask.all()


def test_longer_than_context_is_rejected():
    with pytest.raises(AssertionError):
        build()(torch.ones(1, 17, dtype=torch.long))


@pytest.mark.parametrize(("v", "n", "w", "depth", "heads"), [(77, 9, 20, 3, 5), (300, 33, 36, 1, 2)])
def test_parameter_count_formula(v, n, w, depth, heads):
    tower = build(vocab_size=v, context=n, width=w, depth=depth, heads=heads)
    assert parameter_count(tower) == v * w + n * w + depth * (12 * w * w + 13 * w) + 2 * w


def test_parameter_counts_of_clips_text_towers():
    """As in openai/CLIP, without its projection of width²."""
    with torch.device("meta"):
        for name, count, width in (("clip_text_b", 63_428_096, 512), ("clip_text_l", 123_650_304, 768)):
            tower = TEXT_TOWERS.build(TEXT_TOWERS.preset(name), vocab_size=49408, eot_id=49407)
            assert parameter_count(tower) == count - width**2


def test_initialization():
    w, depth = 256, 4
    tower = build(vocab_size=1000, context=64, width=w, depth=depth, heads=4)
    assert tower.token_embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert tower.pos_embed.std().item() == pytest.approx(0.01, rel=0.05)
    residual = w**-0.5 * (2 * depth) ** -0.5
    for block in tower.blocks:
        matrices = (block.attn.qkv, block.attn.out, block.mlp.fc1, block.mlp.fc2)
        std = [m.weight.std().item() for m in matrices]
        assert std == pytest.approx([w**-0.5, residual, (2 * w) ** -0.5, residual], rel=0.05)
        assert all(m.bias.abs().max() == 0 for m in matrices)
