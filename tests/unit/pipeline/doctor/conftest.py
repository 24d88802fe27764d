"""A process group of one rank for doctor's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from clipwright.pipeline.distributed.group import World, process_group


@pytest.fixture
def world() -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        with process_group() as made:
            yield made
        # Otherwise every command of a later test would start as a rank.
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys()
