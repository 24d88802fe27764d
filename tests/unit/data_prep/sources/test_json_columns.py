"""JSON objects as typed columns: every value is kept unchanged."""

from __future__ import annotations

import json
import random
from typing import Any

import pyarrow as pa

from clipwright.data_prep.sources import json_columns
from clipwright.data_prep.sources.caption_files import parse_json
from clipwright.data_prep.sources.tables.json_kinds import kinds_of_lines

EDGES = [0, 1, -1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 0.5, 1e300, -0.0, 3.0]
TEXTS = ["", "x", "é", "\0", "1", "null", "[1]"]
NAMES = ["a", "b", "key", "row", "input_key", "", "x.y", "json"]


def value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(4 if depth == 3 else 6)
    if kind == 4:
        return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 5:
        return {draw.choice(NAMES): value(draw, depth + 1) for _ in range(draw.randrange(3))}
    return draw.choice([[None], [True, False], EDGES, TEXTS][kind])


def is_equal(cell: Any, value: Any, kind: str) -> bool:
    """Whether a cell of a column equals the value in the JSON."""
    if value is None:
        return cell is None
    if kind.startswith("list:"):
        return len(cell) == len(value) and all(map(is_equal, cell, value, [kind[5:]] * len(cell)))
    if kind == "text":
        return cell == value if isinstance(value, str) else json.loads(cell) == value
    return cell == value and isinstance(cell, bool) == isinstance(value, bool)


def test_columns_hold_every_json_value() -> None:
    seen_kinds: set[str] = set()
    for seed in range(1500):
        draw = random.Random(seed)
        parts = [
            [{draw.choice(NAMES): value(draw) for _ in range(draw.randrange(5))} for _ in range(draw.randrange(4))]
            for _ in range(draw.randint(1, 3))
        ]
        texts = [[json_columns.metadata_text(scalar_kinds) for scalar_kinds in part] for part in parts]
        kinds, flat = json_columns.combine(map(json_columns.kinds_of, texts)), sum(texts, [])  # noqa: RUF017
        assert kinds is not None and kinds == json_columns.kinds_of(flat)
        seen_kinds |= set(kinds.values())
        schema, rows = json_columns.schema_of(kinds), [json_columns.row_of(text, kinds) for text in flat]
        cells = pa.Table.from_pylist(rows, schema=schema).to_pylist() if len(schema) else rows
        for text, row in zip(flat, cells, strict=True):
            for name, value_in_json in (json.loads(text) if text else {}).items():
                assert is_equal(row[name], value_in_json, kinds[name]), (seed, name, value_in_json, row[name])
    scalar_kinds = {"", "bool", "int", "big", "float", "text"}
    assert seen_kinds == scalar_kinds | {f"list:{kind}" for kind in scalar_kinds}


def test_non_finite_numbers_become_null() -> None:
    metadata = parse_json('{"a": NaN, "b": -Infinity, "c": 1e999, "d": [1.5, Infinity]}')
    assert json_columns.metadata_text(metadata) == '{"a":null,"b":null,"c":null,"d":[1.5,null]}'
    assert json_columns.metadata_text({}) == ""


def test_kinds_of_many_lines_equal_those_of_parsed_objects() -> None:
    known = 0
    for seed in range(300):
        draw = random.Random(seed)
        names = draw.sample(NAMES, 2)
        pool = [draw.choice(POOLS) for _ in names]  # of one type mostly, or no kind could be determined
        rows = [
            {name: draw.choice(values) for name, values in zip(names, pool, strict=True)}
            for _ in range(draw.randrange(1, 6))
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        kinds = kinds_of_lines(lines, len(rows))
        if kinds is not None:
            known += 1
            assert kinds == json_columns.kinds_of(map(json_columns.metadata_text, rows)), rows
    assert 150 < known < 300
    assert kinds_of_lines(b'{"a": 1}\n{"a": "x"}\n', 2) is None and kinds_of_lines(b'{"a": \n', 1) is None


POOLS: list[list[Any]] = [
    [None],
    [True, False, None],
    [0, 1, -(2**53), 2**53, None],
    [2**53 + 1, 1],
    [0.5, 1e300, 3.0, None],
    [0.5, 2, None],
    ["", "x", "2024-01-01", "2024-01-01 00:00:00", "1"],
    ["x", None],
    [[], [1, 2], None],
    [["a"], []],
    [[1], [0.5]],
    [[[1]], [[]]],
    [{"a": 1}, {"a": 2, "b": None}, None],
    [[{"a": 1}], []],
    [1, "x"],
]
