"""What a run consists of, built and checked before anything is written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clipwright.pipeline.core.activity import phase
from clipwright.pipeline.core.command import Call
from clipwright.pipeline.core.config import Resolved
from clipwright.pipeline.data.datasets import Datasets
from clipwright.pipeline.distributed.group import World
from clipwright.pipeline.folders import remote
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.train import run_folder
from clipwright.pipeline.train.config import Components, RunConfig, RuntimeConfig, build, identity
from clipwright.pipeline.train.validation import Score, Validation
from clipwright.pipeline.train.warm_start import WarmStart, init_source


@dataclass
class Setup:
    """The parts of a run."""

    resolved: Resolved[RunConfig]
    components: Components
    validation: Validation | None
    identity: dict[str, Any]


def set_up(resolved: Resolved[RunConfig], world: World, run: Path, *, fresh: bool, score: Callable[[], Score]) -> Setup:
    """Builds a run's components, validation and identity, and sets this rank's threads.

    run: the run folder; score: returns how to score a model.
    """
    config = resolved.value
    torch.set_num_threads(thread_count(config.runtime, world))
    phase("opening the data, building the towers")
    components = build(config, world, None if fresh else run)
    phase("starting the engine")
    validation = None
    if config.runtime.validation:
        validation = Validation(config, components.tokenizer, world, score())
    dataset, tokenizer = components.loader.data.fingerprint, components.tokenizer.fingerprint
    source = init_source(config.init_from, run, fresh=fresh)
    if source is not None:
        # First: the others' `initialize` finds the weights that the run starts with.
        components.techniques.add_first("init_from", WarmStart(config.init_from, source, tokenizer))
    return Setup(resolved, components, validation, identity(resolved, dataset, tokenizer, source))


def thread_count(runtime: RuntimeConfig, world: World) -> int:
    """Returns the threads of one rank: as configured, or its share of this machine's cores."""
    return runtime.threads or max(1, (os.cpu_count() or 1) // world.local_size)


def check_inputs(call: Call, resolved: Resolved[RunConfig]) -> None:
    """Raises what `train` would raise for its datasets, the weights it starts with and its run folder."""
    config, run = resolved.value, call.out or Path("run")
    if config.runtime.copy_to:
        remote.check_address(config.runtime.copy_to)
    datasets = Datasets(config.data, config.runtime.cache)
    if config.runtime.validation:
        Dataset(config.runtime.validation, cache=config.runtime.cache)
    stored = (None if call.fresh else run_folder.stored_tree(run)) or {}
    fields = config.text.resolved_fields(stored.get("text", {}))
    source = init_source(config.init_from, run, fresh=call.fresh)
    started = None if call.fresh else run_folder.stored_identity(run)
    tokenizer = ((started or {}).get("tokenizer") or {}).get("fingerprint", "")
    tree = {**resolved.tree, "text": {**resolved.tree["text"], **fields}}
    if tree["precision"] == "auto":
        tree["precision"] = stored.get("precision", "auto")
    if not call.fresh:
        mine = identity(dataclasses.replace(resolved, tree=tree), datasets.fingerprint, tokenizer, source)
        run_folder.check(run, mine, config.accept)
