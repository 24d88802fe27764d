"""The bidirectional text tower: forward pass against a reference, padding, pooling, initialization, SigLIP."""

from __future__ import annotations

import math

import pytest
import torch
from tower_checks import (
    assert_rejected,
    perturb,
    random_captions,
    reference_sinusoids,
    scale_scores_by_token_width,
    swap_key_and_value_weights,
)

from clipwright.pipeline.towers.base import TEXT_TOWERS, parameter_count
from clipwright.pipeline.towers.bidirectional_text import BidirectionalText, BidirectionalTextConfig
from clipwright.pipeline.towers.layers import Activation

EOT = 49
SMALL = {"context": 12, "width": 24, "depth": 2, "heads": 3, "ln_eps": 1e-3}
SIGLIP = {"pool": "last", "hide_padding": False, "pad": "fixed", "head": 20, "act": "gelu_tanh", "mlp_ratio": 3.7}
VARIANTS = {
    "mean": {},
    "eot": {"pool": "eot"},
    "sinusoidal": {"positions": "sinusoidal"},
    "last": {"pool": "last", "pad": "fixed"},
    "siglip": SIGLIP,
}


def build(eot_id: int = EOT, vocab_size: int = 50, **fields) -> BidirectionalText:
    torch.manual_seed(0)
    config = BidirectionalTextConfig(name="x", **{**SMALL, **fields})
    return BidirectionalText(config, vocab_size=vocab_size, eot_id=eot_id).eval()


def reference_outputs(tower: BidirectionalText, form: dict, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes pooled and tokens from the equations, one caption and one query at a time."""
    width, heads = 24, 3
    size = width // heads
    gelu = {
        "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / 2**0.5)),
        "gelu_tanh": lambda z: z * 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3))),
    }[form.get("act", "gelu")]

    def norm(layer: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        return (x - mean) / (var + 1e-3).sqrt() * layer.weight + layer.bias

    pooled, tokens = [], []
    for row in ids.tolist():
        end = row.index(tower.eot_id)
        x = torch.stack([tower.token_embed.weight[i] for i in row])
        if form.get("positions") == "sinusoidal":
            x = x * math.sqrt(width) + reference_sinusoids(len(row), width)
        else:
            x = x + tower.pos_embed[: len(row)]
        keys = range(end + 1) if form.get("hide_padding", True) else range(len(row))
        for block in tower.blocks:
            q, k, v = (
                norm(block.norm1, x) @ w.T + b
                for w, b in zip(block.attn.qkv.weight.split(width), block.attn.qkv.bias.split(width), strict=True)
            )
            y = torch.zeros_like(x)
            for i in range(len(row)):
                for h in range(heads):
                    s = slice(h * size, (h + 1) * size)
                    weights = torch.stack([(q[i, s] @ k[j, s] / size**0.5).exp() for j in keys])
                    total = sum(w * v[j, s] for w, j in zip(weights, keys, strict=True))
                    y[i, s] = total / weights.sum()
            x = x + y @ block.attn.out.weight.T + block.attn.out.bias
            z = norm(block.norm2, x) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
            x = x + gelu(z) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
        x = norm(tower.norm, x)
        one = {"mean": x[: end + 1].mean(dim=0), "eot": x[end], "last": x[-1]}[form.get("pool", "mean")]
        pooled.append(one @ tower.head.weight.T + tower.head.bias if "head" in form else one)
        tokens.append(x)
    return torch.stack(pooled), torch.stack(tokens)


def difference(tower: BidirectionalText, form: dict, ids: torch.Tensor) -> float:
    """Returns the largest difference between the tower and the reference."""
    with torch.no_grad():
        pooled, tokens = reference_outputs(tower, form, ids)
        out = tower(ids)
    return max((out.pooled - pooled).abs().max().item(), (out.tokens - tokens).abs().max().item())


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_matches_reference(name):
    tower, ids = perturb(build(**VARIANTS[name]).double(), 0.2), random_captions([4, 9, 11], 12, eot_id=EOT)
    if name == "sinusoidal":  # the table is float32
        assert difference(tower, VARIANTS[name], ids) < 1e-5
        tower.pos_embed.copy_(reference_sinusoids(12, 24))
    assert difference(tower, VARIANTS[name], ids) < 1e-10
    out = tower(ids)
    assert out.mask is not None and out.mask.sum(dim=1).tolist() == [5, 10, 12] and out.grid is None
    assert out.pooled.shape == (3, tower.feature_dim) and out.tokens.shape == (3, 12, tower.token_dim)


def other_gelu(tower: BidirectionalText) -> None:
    for block in tower.blocks:
        block.mlp.act = Activation("gelu_tanh")


def other_eps(tower: BidirectionalText) -> None:
    tower.norm.eps = 1e-5


def causal(tower: BidirectionalText) -> None:
    for block in tower.blocks:
        block.attn.causal = True
    tower.hide_padding = False


def sines_first(tower: BidirectionalText) -> None:
    """Puts all sines before all cosines."""
    exact = reference_sinusoids(12, 24)
    tower.pos_embed.copy_(torch.cat([exact[:, 0::2], exact[:, 1::2]], dim=1))


MUTATIONS = {
    "keys and values swapped": ("mean", swap_key_and_value_weights),
    "scores scaled by the token width": ("mean", scale_scores_by_token_width),
    "tanh instead of erf": ("mean", other_gelu),
    "another eps": ("mean", other_eps),
    "no mask": ("mean", lambda tower: setattr(tower, "hide_padding", False)),
    "unexpected mask": ("siglip", lambda tower: setattr(tower, "hide_padding", True)),
    "causal": ("mean", causal),
    "eot instead of mean": ("mean", lambda tower: setattr(tower, "pool", "eot")),
    "last instead of eot": ("eot", lambda tower: setattr(tower, "pool", "last")),
    "unscaled embeddings": ("sinusoidal", lambda tower: setattr(tower, "embed_scale", 1.0)),
    "sines first": ("sinusoidal", sines_first),
    "head without bias": ("siglip", lambda tower: tower.head.bias.data.zero_()),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_comparison_detects_mistakes(mutation):
    """Each of these mistakes exceeds the tolerance of the comparison by far."""
    name, mutate = MUTATIONS[mutation]
    tower, ids = perturb(build(**VARIANTS[name]).double(), 0.2), random_captions([4, 9, 10], 12, eot_id=EOT)
    with torch.no_grad():
        pooled, tokens = reference_outputs(tower, VARIANTS[name], ids)
        mutate(tower)
        out = tower(ids)
    wrong = max((out.pooled - pooled).abs().max().item(), (out.tokens - tokens).abs().max().item())
    assert wrong > 1e-5 * (100 if name == "sinusoidal" else 1)


@pytest.mark.parametrize("name", ["mean", "eot", "sinusoidal"])
def test_hidden_padding_has_no_effect(name):
    """Trimmed, longer or different padding gives the same pooled output and the same real tokens."""
    tower, ends = build(**VARIANTS[name]), [4, 6, 2]
    ids = random_captions(ends, 12, eot_id=EOT)
    with torch.no_grad():
        untrimmed = tower(ids)
        for length in (7, 8, 10):
            trimmed = tower(ids[:, :length])
            assert (trimmed.pooled - untrimmed.pooled).abs().max() <= 3e-6
            real = untrimmed.mask[:, :length]
            assert (trimmed.tokens[real] - untrimmed.tokens[:, :length][real]).abs().max() <= 3e-6
        noisy = ids.clone()
        for row, end in enumerate(ends):
            noisy[row, end + 1 :] = torch.randint(0, 50, (11 - end,))
        noisy[0, 5] = EOT  # a second one
        assert (tower(noisy).pooled - untrimmed.pooled).abs().max() <= 1e-6


def test_every_token_attends_to_every_real_token():
    tower, ids = build(), random_captions([11, 6], 12, eot_id=EOT)
    before = tower(ids).tokens
    for t in (0, 3, 5):
        changed = ids.clone()
        changed[:, t] = changed[:, t] % 40 + 1
        assert ((tower(changed).tokens - before)[0].abs().amax(dim=1) > 0).all()


def test_visible_padding_changes_the_result():
    tower, ids = build(**SIGLIP), random_captions([4, 9], 12, eot_id=EOT)
    noisy = ids.clone()
    noisy[0, 7] = 13
    pooled, changed = tower(ids).pooled, tower(noisy).pooled
    assert (changed[0] - pooled[0]).abs().max() > 1e-4 and torch.equal(changed[1], pooled[1])


@pytest.mark.parametrize("fields", [{"hide_padding": False}, {"pool": "last"}])
def test_visible_padding_is_never_trimmed(fields):
    error = assert_rejected(lambda: build(**fields), "text.pad=longest")
    assert error.fix == "set text.pad=fixed"
    tower = build(**fields, pad="fixed")
    tower(random_captions([3], 12, eot_id=EOT))
    with pytest.raises(AssertionError):
        tower(random_captions([3], 8, eot_id=EOT))


def test_eot_need_not_be_the_largest_id():
    tower = build(pool="eot", eot_id=2)
    ids = torch.tensor([[1, 40, 2, 0, 0], [1, 30, 41, 42, 2], [1, 2, 45, 2, 0]])
    out = tower(ids)
    assert torch.equal(out.pooled, out.tokens[torch.arange(3), torch.tensor([2, 4, 1])])
    clip = build(pool="eot", vocab_size=60, eot_id=59)
    ids = random_captions([4, 9, 11], 12, eot_id=59)
    ids[1, 10] = 59
    out = clip(ids)
    assert torch.equal(out.pooled, out.tokens[torch.arange(3), ids.argmax(dim=1)])


def test_mean_ignores_token_order_without_positions():
    tower = build().double()
    with torch.no_grad():
        tower.pos_embed.zero_()
    ids = random_captions([7], 12, eot_id=EOT)
    shuffled = ids.clone()
    shuffled[0, :7] = ids[0, torch.tensor([3, 1, 6, 0, 2, 5, 4])]
    torch.testing.assert_close(tower(shuffled).pooled, tower(ids).pooled, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("v", "n", "w", "depth", "heads", "ratio"), [(77, 9, 20, 3, 5, 4), (300, 33, 36, 1, 2, 2.5)])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("head", [None, 7])
def test_parameter_count_formula(v, n, w, depth, heads, ratio, positions, head):
    sizes = {"context": n, "width": w, "depth": depth, "heads": heads, "mlp_ratio": ratio}
    tower = build(vocab_size=v, positions=positions, head=head, **sizes)
    hidden = round(ratio * w)
    block = 4 * w * w + 4 * w + 2 * w * hidden + hidden + w + 4 * w
    table = n * w if positions == "learned" else 0
    assert parameter_count(tower) == v * w + table + depth * block + 2 * w + (w * head + head if head else 0)


@pytest.mark.parametrize("size", ["b", "l", "so400m"])
def test_siglip_presets_have_the_sizes_of_transformers(size):
    """Compares parameter counts with transformers' SiglipTextModel, for a vocabulary of 32,000."""
    from transformers import SiglipTextConfig, SiglipTextModel

    config = TEXT_TOWERS.preset(f"siglip_text_{size}")
    with torch.device("meta"):
        ours = TEXT_TOWERS.build(config, vocab_size=32000, eot_id=1)
        theirs = SiglipTextModel(
            SiglipTextConfig(
                hidden_size=config.width,
                intermediate_size=round(config.mlp_ratio * config.width),
                num_hidden_layers=config.depth,
                num_attention_heads=config.heads,
            )
        )
    assert parameter_count(ours) == parameter_count(theirs)
    if size == "b":
        assert parameter_count(ours) == 110_271_744
    assert (config.act, config.ln_eps, config.context, config.pad) == ("gelu_tanh", 1e-6, 64, "fixed")


def test_siglip_variant_matches_transformers():
    """Weights of transformers' model give its pooled output."""
    from transformers import SiglipTextConfig, SiglipTextModel

    torch.manual_seed(0)
    config = SiglipTextConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=90,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=12,
        projection_size=20,
        bos_token_id=1,
        eos_token_id=EOT,
    )
    theirs, ours = SiglipTextModel(config).eval(), build(**{**SIGLIP, "mlp_ratio": 90 / 24, "ln_eps": 1e-6})
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    source = {key.removeprefix("text_model."): value for key, value in theirs.state_dict().items()}
    weights = {
        "token_embed.weight": source["embeddings.token_embedding.weight"],
        "pos_embed": source["embeddings.position_embedding.weight"],
    }
    pairs = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.out": "self_attn.out_proj"}
    pairs |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for end in ("weight", "bias"):
        weights |= {f"norm.{end}": source[f"final_layer_norm.{end}"], f"head.{end}": source[f"head.{end}"]}
        for i in range(2):
            block, layer = f"blocks.{i}", f"encoder.layers.{i}"
            weights |= {f"{block}.{a}.{end}": source[f"{layer}.{b}.{end}"] for a, b in pairs.items()}
            qkv = [source[f"{layer}.self_attn.{part}_proj.{end}"] for part in "qkv"]
            weights[f"{block}.attn.qkv.{end}"] = torch.cat(qkv)
    ours.load_state_dict(weights, strict=True)
    ids = random_captions([4, 9, 11], 12, eot_id=EOT)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).pooled, theirs(ids).pooler_output, atol=1e-5, rtol=1e-5)


def test_initialization():
    w, depth = 256, 4
    sizes = {"context": 64, "width": w, "depth": depth, "heads": 4, "vocab_size": 1000}
    tower = build(**sizes, head=128)
    assert tower.token_embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert tower.pos_embed.std().item() == pytest.approx(0.01, rel=0.05)
    assert tower.head.weight.std().item() == pytest.approx(w**-0.5, rel=0.05) and tower.head.bias.abs().max() == 0
    residual = w**-0.5 * (2 * depth) ** -0.5
    for block in tower.blocks:
        matrices = (block.attn.qkv, block.attn.out, block.mlp.fc1, block.mlp.fc2)
        std = [m.weight.std().item() for m in matrices]
        assert std == pytest.approx([w**-0.5, residual, (2 * w) ** -0.5, residual], rel=0.05)
        assert all(m.bias.abs().max() == 0 for m in matrices)
    waves = build(**sizes, positions="sinusoidal")
    scaled = waves.embed_scale * waves.token_embed.weight
    assert scaled.std().item() == pytest.approx(1, rel=0.05)
    assert "pos_embed" not in waves.state_dict() and waves.pos_embed.dtype == torch.float32


def test_drop_path_rises_over_the_blocks_and_acts_in_training_only():
    tower, ids = build(depth=3, drop_path=0.5), random_captions([4] * 16, 12, eot_id=EOT)
    assert [block.drop_path.rate for block in tower.blocks] == pytest.approx([0, 0.25, 0.5])
    assert torch.equal(tower(ids).pooled, tower(ids).pooled)
    tower.train()
    assert not torch.equal(tower(ids).pooled, tower(ids).pooled)


@pytest.mark.parametrize("fields", [{"heads": 5}, {"width": 25, "heads": 5, "positions": "sinusoidal"}])
def test_invalid_widths_are_rejected(fields):
    error = assert_rejected(lambda: build(**fields))
    assert "dim" in error.where
