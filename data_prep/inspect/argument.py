"""The config of the commands that inspect a dataset folder."""

from __future__ import annotations

from clipwright.pipeline.core.registry import configclass


@configclass
class DatasetArgument:
    """The dataset that a command inspects."""

    data: str
    """Dataset folder."""
