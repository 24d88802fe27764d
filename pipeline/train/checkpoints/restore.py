"""Where a run starts: from its newest checkpoint that is valid and fits its config, or from the beginning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.streams import print_warning
from clipwright.pipeline.distributed.group import World
from clipwright.pipeline.train import run_folder
from clipwright.pipeline.train.checkpoints import checkpoint
from clipwright.pipeline.train.checkpoints.checkpoint import Checkpoint
from clipwright.pipeline.train.config import Components, RunConfig
from clipwright.pipeline.train.engine import Engine


@dataclass(frozen=True)
class Start:
    """What a run starts with.

    changed: `key: old → new` per accepted change of the config. skipped: steps without an update so far. hook_pending:
    the techniques' hook of the newest step must run again.
    """

    checkpoint: Checkpoint | None = None
    step: int = 0
    skipped: int = 0
    hook_pending: bool = False
    changed: tuple[str, ...] = ()
    accepted: tuple[dict[str, Any], ...] = ()

    def restore_optimizers(self, engine: Engine) -> None:
        """Loads the state of the optimizers, if there is a checkpoint."""
        if self.checkpoint is not None:
            self.checkpoint.restore_optimizers(engine)


def load_start(run: Path, world: World, identity: dict[str, Any], config: RunConfig, components: Components) -> Start:
    """Loads the newest valid checkpoint that fits `components`; without one, the techniques initialize their weights.

    Every rank must call it, before DeepSpeed partitions the parameters. Raises the errors of `checkpoint.newest` and
    `Checkpoint.changes`.
    """
    towers, loss, techniques = components.towers, components.loss, components.techniques

    def misfit(found: Checkpoint) -> ClipwrightError | None:
        found.changes(identity)  # E_RESUME for the checkpoint of another run
        return found.misfit(towers, loss, config.optim.state_size)

    found = checkpoint.newest(run, world=world, misfit=misfit)
    if found is None:
        ledger = run / run_folder.LEDGER
        if world.is_rank0 and ledger.exists() and ledger.stat().st_size:
            steps = sum(1 for _ in run_folder.read_steps(ledger))
            line = f"{format_count(steps, 'step')} of {run} ended before a checkpoint: training starts over"
            print_warning(line)
        techniques.initialize(towers, loss)
        return Start()
    changed = found.changes(identity)
    found.restore_weights(towers, loss)
    found.restore_techniques(techniques)
    return Start(
        checkpoint=found,
        step=found.step,
        skipped=found.manifest["skipped"],
        hook_pending=found.manifest["hook_pending"],
        changed=tuple(changed),
        accepted=tuple(found.accepted(changed)),
    )
