"""The one process that doctor's tests are."""

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
        # Or every command that a later test starts would take itself for a rank.
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys()
