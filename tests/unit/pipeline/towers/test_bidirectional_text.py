"""The bidirectional text tower: a literal forward pass, padding that is seen or not, pooling, count, init, SigLIP."""

from __future__ import annotations

import math

import pytest
import torch

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.towers.base import TEXT_TOWERS, parameter_count
from clipwright.pipeline.towers.bidirectional_text import BidirectionalText, BidirectionalTextConfig
from clipwright.pipeline.towers.layers import Activation

EOT, PAD = 49, 0
SMALL = {"context": 12, "width": 24, "depth": 2, "heads": 3, "ln_eps": 1e-3}
SIGLIP = {"pool": "last", "hide_padding": False, "pad": "fixed", "head": 20, "act": "gelu_tanh", "mlp_ratio": 3.7}
FORMS = {
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


def moved(tower: BidirectionalText) -> BidirectionalText:
    """In double, with parameters away from where they start."""
    tower.double()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in tower.parameters():
            p += 0.2 * torch.randn_like(p)
    return tower


def sentences(ends: list[int], length: int = 12, eot_id: int = EOT) -> torch.Tensor:
    """Random ids below EOT, one EOT a row, padding after it."""
    torch.manual_seed(2)
    ids = torch.randint(1, EOT, (len(ends), length))
    ids[ids == eot_id] += 1
    for row, end in enumerate(ends):
        ids[row, end], ids[row, end + 1 :] = eot_id, PAD
    return ids


def slow(tower: BidirectionalText, form: dict, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled and tokens by the equations, one caption and one query at a time."""
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
            table = [[p / 10000 ** (2 * (d // 2) / width) for d in range(width)] for p in range(len(row))]
            waves = [[math.cos(a) if d % 2 else math.sin(a) for d, a in enumerate(angles)] for angles in table]
            x = x * math.sqrt(width) + torch.tensor(waves, dtype=torch.double)
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
    """Of what the tower and the equations give, the largest."""
    with torch.no_grad():
        pooled, tokens = slow(tower, form, ids)
        out = tower(ids)
    return max((out.pooled - pooled).abs().max().item(), (out.tokens - tokens).abs().max().item())


@pytest.mark.parametrize("name", FORMS)
def test_forward_is_the_literal_one(name):
    tower, ids = moved(build(**FORMS[name])), sentences([4, 9, 11])
    if name == "sinusoidal":  # the table is kept in float32
        assert difference(tower, FORMS[name], ids) < 1e-5
        tower.pos_embed.copy_(exact_positions(12, 24))
    assert difference(tower, FORMS[name], ids) < 1e-10
    out = tower(ids)
    assert out.mask is not None and out.mask.sum(dim=1).tolist() == [5, 10, 12] and out.grid is None
    assert out.pooled.shape == (3, tower.feature_dim) and out.tokens.shape == (3, 12, tower.token_dim)


def exact_positions(count: int, width: int) -> torch.Tensor:
    angle = [[p / 10000 ** (2 * (d // 2) / width) for d in range(width)] for p in range(count)]
    return torch.tensor(
        [[math.cos(a) if d % 2 else math.sin(a) for d, a in enumerate(row)] for row in angle], dtype=torch.double
    )


def swap_keys_and_values(tower: BidirectionalText) -> None:
    for block in tower.blocks:
        q, k, v = block.attn.qkv.weight.detach().split(24)
        block.attn.qkv.weight.data = torch.cat([q, v, k])


def scale_by_width(tower: BidirectionalText) -> None:
    for block in tower.blocks:
        block.attn.qkv.weight.data[:24] *= (8 / 24) ** 0.5
        block.attn.qkv.bias.data[:24] *= (8 / 24) ** 0.5


def other_gelu(tower: BidirectionalText) -> None:
    for block in tower.blocks:
        block.mlp.act = Activation("gelu_tanh")


def other_eps(tower: BidirectionalText) -> None:
    tower.norm.eps = 1e-5


def causal(tower: BidirectionalText) -> None:
    for block in tower.blocks:
        block.attn.causal = True
    tower.hide_padding = False


def halves(tower: BidirectionalText) -> None:
    """All sines, then all cosines."""
    exact = exact_positions(12, 24)
    tower.pos_embed.copy_(torch.cat([exact[:, 0::2], exact[:, 1::2]], dim=1))


MUTATIONS = {
    "keys and values swapped": ("mean", swap_keys_and_values),
    "scores scaled by the full width": ("mean", scale_by_width),
    "tanh for erf": ("mean", other_gelu),
    "another eps": ("mean", other_eps),
    "mask off": ("mean", lambda tower: setattr(tower, "hide_padding", False)),
    "mask on": ("siglip", lambda tower: setattr(tower, "hide_padding", True)),
    "causal": ("mean", causal),
    "eot for mean": ("mean", lambda tower: setattr(tower, "pool", "eot")),
    "last for eot": ("eot", lambda tower: setattr(tower, "pool", "last")),
    "unscaled embeddings": ("sinusoidal", lambda tower: setattr(tower, "embed_scale", 1.0)),
    "sines first": ("sinusoidal", halves),
    "head without bias": ("siglip", lambda tower: tower.head.bias.data.zero_()),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_has_teeth(mutation):
    """Each of these mistakes is far above the tolerance of the comparison."""
    name, spoil = MUTATIONS[mutation]
    tower, ids = moved(build(**FORMS[name])), sentences([4, 9, 10])
    with torch.no_grad():
        pooled, tokens = slow(tower, FORMS[name], ids)
        spoil(tower)
        out = tower(ids)
    wrong = max((out.pooled - pooled).abs().max().item(), (out.tokens - tokens).abs().max().item())
    assert wrong > 1e-5 * (100 if name == "sinusoidal" else 1)


@pytest.mark.parametrize("name", ["mean", "eot", "sinusoidal"])
def test_hidden_padding_is_invisible(name):
    """Trimmed, longer or other padding: the same pooled vector, and the same rows of real tokens."""
    tower, ends = build(**FORMS[name]), [4, 6, 2]
    ids = sentences(ends)
    with torch.no_grad():
        whole = tower(ids)
        for length in (7, 8, 10):
            trimmed = tower(ids[:, :length])
            assert (trimmed.pooled - whole.pooled).abs().max() <= 3e-6
            real = whole.mask[:, :length]
            assert (trimmed.tokens[real] - whole.tokens[:, :length][real]).abs().max() <= 3e-6
        noisy = ids.clone()
        for row, end in enumerate(ends):
            noisy[row, end + 1 :] = torch.randint(0, 50, (11 - end,))
        noisy[0, 5] = EOT  # a second one
        assert (tower(noisy).pooled - whole.pooled).abs().max() <= 1e-6


def test_every_real_token_touches_every_row():
    tower, ids = build(), sentences([11, 6])
    before = tower(ids).tokens
    for t in (0, 3, 5):
        changed = ids.clone()
        changed[:, t] = changed[:, t] % 40 + 1
        assert ((tower(changed).tokens - before)[0].abs().amax(dim=1) > 0).all()


def test_padding_that_is_shown_changes_the_result():
    tower, ids = build(**SIGLIP), sentences([4, 9])
    noisy = ids.clone()
    noisy[0, 7] = 13
    pooled, changed = tower(ids).pooled, tower(noisy).pooled
    assert (changed[0] - pooled[0]).abs().max() > 1e-4 and torch.equal(changed[1], pooled[1])


@pytest.mark.parametrize("fields", [{"hide_padding": False}, {"pool": "last"}])
def test_what_needs_its_padding_is_never_trimmed(fields):
    with pytest.raises(ClipwrightError) as caught:
        build(**fields)
    assert caught.value.code == "E_CONFIG_VALUE" and "text.pad=longest" in str(caught.value)
    assert caught.value.fix == "set text.pad=fixed"
    tower = build(**fields, pad="fixed")
    tower(sentences([3]))
    with pytest.raises(AssertionError):
        tower(sentences([3], length=8))


def test_eot_need_not_be_the_largest_id():
    tower = build(pool="eot", eot_id=2)
    ids = torch.tensor([[1, 40, 2, 0, 0], [1, 30, 41, 42, 2], [1, 2, 45, 2, 0]])
    out = tower(ids)
    assert torch.equal(out.pooled, out.tokens[torch.arange(3), torch.tensor([2, 4, 1])])
    clip = build(pool="eot", vocab_size=60, eot_id=59)
    ids = sentences([4, 9, 11], eot_id=59)
    ids[1, 10] = 59
    out = clip(ids)
    assert torch.equal(out.pooled, out.tokens[torch.arange(3), ids.argmax(dim=1)])


def test_without_positions_the_mean_ignores_the_order_of_words():
    tower = build().double()
    with torch.no_grad():
        tower.pos_embed.zero_()
    ids = sentences([7])
    shuffled = ids.clone()
    shuffled[0, :7] = ids[0, torch.tensor([3, 1, 6, 0, 2, 5, 4])]
    torch.testing.assert_close(tower(shuffled).pooled, tower(ids).pooled, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("v", "n", "w", "depth", "heads", "ratio"), [(77, 9, 20, 3, 5, 4), (300, 33, 36, 1, 2, 2.5)])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("head", [None, 7])
def test_count_formula(v, n, w, depth, heads, ratio, positions, head):
    sizes = {"context": n, "width": w, "depth": depth, "heads": heads, "mlp_ratio": ratio}
    tower = build(vocab_size=v, positions=positions, head=head, **sizes)
    hidden = round(ratio * w)
    block = 4 * w * w + 4 * w + 2 * w * hidden + hidden + w + 4 * w
    table = n * w if positions == "learned" else 0
    assert parameter_count(tower) == v * w + table + depth * block + 2 * w + (w * head + head if head else 0)


@pytest.mark.parametrize("size", ["b", "l", "so400m"])
def test_siglip_text_towers_have_transformers_sizes(size):
    """Parameters as transformers' SiglipTextModel counts them, vocabulary 32,000."""
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


def test_siglip_form_is_transformers():
    """Their weights in our tower give their pooled vector."""
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
    given = {key.removeprefix("text_model."): value for key, value in theirs.state_dict().items()}
    weights = {
        "token_embed.weight": given["embeddings.token_embedding.weight"],
        "pos_embed": given["embeddings.position_embedding.weight"],
    }
    pairs = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.out": "self_attn.out_proj"}
    pairs |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for end in ("weight", "bias"):
        weights |= {f"norm.{end}": given[f"final_layer_norm.{end}"], f"head.{end}": given[f"head.{end}"]}
        for i in range(2):
            block, layer = f"blocks.{i}", f"encoder.layers.{i}"
            weights |= {f"{block}.{a}.{end}": given[f"{layer}.{b}.{end}"] for a, b in pairs.items()}
            qkv = [given[f"{layer}.self_attn.{part}_proj.{end}"] for part in "qkv"]
            weights[f"{block}.attn.qkv.{end}"] = torch.cat(qkv)
    ours.load_state_dict(weights, strict=True)
    ids = sentences([4, 9, 11])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).pooled, theirs(ids).pooler_output, atol=1e-5, rtol=1e-5)


def test_init():
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
    tower, ids = build(depth=3, drop_path=0.5), sentences([4] * 16)
    assert [block.drop_path.rate for block in tower.blocks] == pytest.approx([0, 0.25, 0.5])
    assert torch.equal(tower(ids).pooled, tower(ids).pooled)
    tower.train()
    assert not torch.equal(tower(ids).pooled, tower(ids).pooled)


@pytest.mark.parametrize("fields", [{"heads": 5}, {"width": 25, "heads": 5, "positions": "sinusoidal"}])
def test_impossible_widths_are_refused(fields):
    with pytest.raises(ClipwrightError) as caught:
        build(**fields)
    assert caught.value.code == "E_CONFIG_VALUE" and "dim" in caught.value.where
