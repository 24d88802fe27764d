"""Every config field of every tower family changes the tower: its parameters, their initial values or its output."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from clipwright.pipeline.core.registry import Entry
from clipwright.pipeline.towers.base import IMAGE_TOWERS, TEXT_TOWERS

VOCAB, EOT = 100, 50

# Field → another value, from its value.
DOUBLED = (
    "image_size",
    "patch",
    "dim",
    "dims",
    "width",
    "heads",
    "tokens_dim",
    "channels_dim",
    "stem",
    "out_dim",
    "planes",
)
INCREASED = ("depth", "depths", "layers")
CHANGED: dict[str, Any] = {
    "mlp_ratio": 2.0,
    "ln_eps": 0.5,
    "drop_path": 0.5,
    "alpha": 1.0,
    "content_dim": 8,
    "kernel": 7,
    "window": 2,
    "head": 24,
    "context": 16,
}
# (family, field) → fields under which the field has an effect, and its other value, where the rules do not do.
SPECIAL: dict[tuple[str, str], tuple[dict[str, Any], list[Any]]] = {
    ("BidirectionalTextConfig", "pool"): ({"pad": "fixed"}, ["eot", "last"]),
    ("BidirectionalTextConfig", "hide_padding"): ({"pad": "fixed"}, [False]),
}
# Fields that the tower itself does not read, and where they are tested.
ELSEWHERE = {
    "drop_rest": "tests/unit/pipeline/towers/test_vit.py",  # without it, other image sizes are refused
    "name": "selects the preset",
    "projection": "tests/unit/pipeline/model/test_two_tower.py",
    "pad": "tests/unit/pipeline/data/test_loader.py",
}


def families(registry: Any) -> list[Entry]:
    """Returns the families whose towers need no files."""
    return [family for family in registry.families if not getattr(family.config, "external_fields", ())]


def build(registry: Any, name: str, fields: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"vocab_size": VOCAB, "eot_id": EOT} if registry is TEXT_TOWERS else {}
    return registry.build(registry.preset(name, **fields), **options)


def nano(family: Entry) -> str:
    """Returns the family's preset for tests and small machines."""
    return next(name for name in family.presets if name.endswith("_nano"))


@lru_cache(maxsize=4)
def signature(registry: Any, name: str, items: tuple[tuple[str, Any], ...]) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the initial state of a tower with some fields, and its tokens and pooled output in training."""
    fields = dict(items)
    tower: Any = build(registry, name, fields).train()
    generator = torch.Generator().manual_seed(1)
    if registry is TEXT_TOWERS:
        inputs = torch.randint(EOT + 1, VOCAB, (3, tower.context), generator=generator)
        for row, end in enumerate([3, 11, 7]):
            inputs[row, end] = EOT
            inputs[row, end + 1 :] = 0
    else:
        inputs = torch.randn(2, 3, tower.image_size, tower.image_size, generator=generator)
    state = {key: value.clone() for key, value in tower.state_dict().items()}
    with torch.no_grad():
        for parameter in tower.parameters():  # zeros and ones would hide a difference
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    out = tower(inputs)
    extra = [out.extra[key].flatten() for key in sorted(out.extra)]
    return state, torch.cat([out.pooled.flatten(), out.tokens.flatten(), *extra]).detach()


def differs(a: tuple[dict[str, Tensor], Tensor], b: tuple[dict[str, Tensor], Tensor]) -> bool:
    shapes = [{key: value.shape for key, value in state.items()} for state, _ in (a, b)]
    if shapes[0] != shapes[1] or a[1].shape != b[1].shape:
        return True
    if not torch.allclose(a[1], b[1], atol=1e-6):
        return True
    return any(not torch.equal(a[0][key], b[0][key]) for key in a[0])


def other_values(family: str, field: str, value: Any, hint: Any) -> tuple[dict[str, Any], list[Any]]:
    """Returns the fields under which a field has an effect, and other values of it."""
    if (family, field) in SPECIAL:
        return SPECIAL[family, field]
    if get_origin(hint) is Literal:
        return {}, [choice for choice in get_args(hint) if choice != value]
    if isinstance(value, bool):
        return {}, [not value]
    if field in CHANGED:
        return {}, [CHANGED[field]]
    if field in DOUBLED:
        return {}, [tuple(2 * item for item in value) if isinstance(value, tuple) else 2 * value]
    assert field in INCREASED, f"{family}.{field}: name another value in this file"
    return {}, [(value[0] + 1, *value[1:]) if isinstance(value, tuple) else value + 1]


CASES = [
    pytest.param(registry, family, field.name, id=f"{kind}-{family.config.__name__}-{field.name}")
    for kind, registry in (("image", IMAGE_TOWERS), ("text", TEXT_TOWERS))
    for family in families(registry)
    for field in dataclasses.fields(family.config)
    if field.name not in ELSEWHERE
]


@pytest.mark.parametrize(("registry", "family", "field"), CASES)
def test_every_field_changes_the_tower(registry: Any, family: Entry, field: str) -> None:
    name = nano(family)
    preset = registry.preset(name)
    hint = get_type_hints(family.config)[field]
    base, values = other_values(family.config.__name__, field, getattr(preset, field), hint)
    assert values
    expected = signature(registry, name, tuple(base.items()))
    for value in values:
        changed = signature(registry, name, tuple({**base, field: value}.items()))
        assert differs(changed, expected), f"{field}={value} is ignored"
