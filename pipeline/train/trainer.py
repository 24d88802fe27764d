"""The training loop: prints its numbers first, then one line per interval; the same command resumes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from clipwright.pipeline.core.command import Call, Outcome, Preempted, StopFlag
from clipwright.pipeline.core.lock import verify_held
from clipwright.pipeline.core.log import Progress
from clipwright.pipeline.data.batch import Batch
from clipwright.pipeline.distributed.group import World, any_rank_flags, process_group, run_on_rank0
from clipwright.pipeline.folders import output, remote
from clipwright.pipeline.train import run_folder
from clipwright.pipeline.train.checkpoints import checkpoint
from clipwright.pipeline.train.checkpoints.saver import Saver
from clipwright.pipeline.train.config import resolve_text
from clipwright.pipeline.train.engine import Engine, StepResult
from clipwright.pipeline.train.logging import Meter, RunLog, header, step_line, summary
from clipwright.pipeline.train.precision import resolve_precision
from clipwright.pipeline.train.sample_log import Ledger
from clipwright.pipeline.train.setup import Setup, set_up
from clipwright.pipeline.train.step_checks import NonFiniteSteps, StepPace
from clipwright.pipeline.train.supervision.progress import enter_phase
from clipwright.pipeline.train.supervision.supervisor import Supervisor
from clipwright.pipeline.train.validation import Score


class Trainer:
    """One run on one rank: claims the run folder, restores the newest checkpoint, trains."""

    def __init__(self, call: Call, setup: Setup, world: World, run: Path, supervisor: Supervisor) -> None:
        self.call, self.world, self.run, self.supervisor = call, world, run, supervisor
        self.config, self.components, self.validation = setup.resolved.value, setup.components, setup.validation
        self.runtime, self.schedule = self.config.runtime, self.config.schedule
        towers, loss, self.techniques = self.components.towers, self.components.loss, self.components.techniques
        run_on_rank0(lambda: self._claim(setup))
        found = checkpoint.newest(run, world=world)
        self.step = 0 if found is None else found.step
        self.resumed_at = self.step  # until the first record, which states it
        self.changed = [] if found is None else found.changes(setup.identity)
        if found is not None:  # before DeepSpeed partitions the parameters
            found.restore_weights(towers, loss)
            found.restore_techniques(self.techniques)
        else:
            self.techniques.initialize(towers, loss)
        self.engine = Engine(towers, loss, self.config, world)
        if found is not None:
            found.restore_optimizers(self.engine)
        metadata = {"identity": setup.identity, "accepted": [] if found is None else found.accepted(self.changed)}
        self.saver = Saver(run, world, self.runtime, metadata, self.step, self.techniques)
        self.end = min(self.schedule.steps, self.runtime.stop_at or self.schedule.steps)
        self.skips = NonFiniteSteps(run, 0 if found is None else found.manifest["skipped"])
        self.pace = StepPace(world)
        self.meter = Meter(world.device)
        self.ledger = Ledger(run, self.step, world, self.runtime.ledger)
        self.log = RunLog(run, self.step, world)
        # On a terminal; elsewhere the step lines are the progress.
        quiet, total = call.quiet or not world.is_rank0, self.end * self.schedule.global_batch
        self.progress = Progress("train", total, "sample", quiet=quiet, interval=math.inf, already_done=self.samples)
        self.stop = supervisor.begin_training(StopFlag())

    def _claim(self, setup: Setup) -> None:
        claimed = run_folder.claim(
            self.run,
            yaml=setup.resolved.yaml(),
            identity=setup.identity,
            fresh=self.call.fresh,
            accept=self.config.accept,
            trained_tokenizer=self.components.tokenizer if self.config.tokenizer.trained_file else None,
        )
        claimed.lock.on_lost = self.supervisor.end_group

    @property
    def samples(self) -> int:
        """Samples trained on so far."""
        return self.step * self.schedule.global_batch

    def train(self) -> None:
        """Trains until the schedule's end, `stop_at` or a signal to any rank; saves a checkpoint in each case."""
        self.components.towers.train()
        loader = self.components.loader.batches(self.samples, self.should_stop)
        with closing(loader) as batches, closing(self.ledger), closing(self.log), self.progress:
            self.meter.restart(self.step)
            while self.step < self.end:
                batch, save_now = self.fetch(batches)
                result = self.train_step(batch)
                self.after_step(batch, result, save_now)
            self.save(wait=True)

    def fetch(self, batches: Iterator[Batch]) -> tuple[Batch, bool]:
        """Returns the next batch, and whether it is time to save; saves and raises if any rank should stop."""
        enter_phase("data", self.step)
        batch = next(batches, None)  # None if a signal arrived while it waited
        enter_phase("agree")
        flags = (self.should_stop(), self.saver.late, self.saver.pending, self.saver.failed)
        stopping, late, pending, failed = any_rank_flags(flags, self.world.device)
        self.saver.commit_if_written(pending, failed)
        if stopping or batch is None:
            self.supervisor.agree_to_stop()
            self.save(wait=True)
            raise (self.stop.cause or Preempted)()
        self.meter.waited += batch.wait_seconds
        return batch, late

    def train_step(self, batch: Batch) -> StepResult:
        lr_factor = self.schedule.factor(self.samples)
        result = self.engine.step(batch, self.step, lr_factor, measure=self.is_logged(self.step + 1))
        self.step += 1
        if not result.skipped:
            self.techniques.after_update(self.engine, self.step)
        return result

    def after_step(self, batch: Batch, result: StepResult, save_now: bool) -> None:
        """Records, validates and saves."""
        enter_phase("record")
        verify_held(max_age_seconds=1.0)
        self.ledger.add(self.step, self.samples - self.schedule.global_batch, batch.batch_samples)
        self.skips.add(result)
        self.progress.add(self.schedule.global_batch)
        self.supervisor.step_done()
        lines = self.pace.add(self.step)
        if self.is_logged(self.step):
            record = self.record(result)
            if self.validates(self.step):
                record.update(self.validate())
            remaining = self.schedule.steps * self.schedule.global_batch - self.samples
            lines.append(step_line(record, self.schedule.steps, remaining / record["samples_per_s"]))
            self.saver.note(record)
            self.log.write(record)
        with self.progress.above():
            for line in lines if self.world.is_rank0 else []:
                self.call.say(line)
        if self.skips.too_many:
            enter_phase("save")
            self.saver.commit()  # the checkpoint being written is from before these steps
            raise self.skips.error(result, self.step, batch)
        if self.saver.due(self.step, save_now):
            self.save()

    def should_stop(self) -> bool:
        """Whether a signal arrived at any rank, as far as this rank knows."""
        return self.stop.cause is not None

    def is_logged(self, step: int) -> bool:
        return step in (1, self.end) or step % self.runtime.log_every == 0 or self.validates(step)

    def validates(self, step: int) -> bool:
        return self.validation is not None and self.validation.due(step, self.end)

    def record(self, result: StepResult) -> dict[str, Any]:
        """Returns the log record of the step that was just made."""
        further: dict[str, Any] = self.engine.loss.report()
        further["lr"] = self.config.optim.lr * self.schedule.factor(self.samples - self.schedule.global_batch)
        further["replaced"], further["skipped"] = self.ledger.replaced, self.skips.count
        further["saved"] = self.saver.committed
        # In the first record only.
        if self.resumed_at:
            further["resumed"], self.resumed_at = self.resumed_at, 0
        if self.changed:
            further["accepted"], self.changed = self.changed, []
        record = self.meter.record(self.step, self.samples, result, **further)
        if self.pace.slow:
            record["slow"] = self.pace.slow
        return record

    def validate(self) -> dict[str, float]:
        enter_phase("validate")
        assert self.validation is not None
        scores = self.validation.run(self.engine, self.techniques, self.should_stop)
        self.meter.restart(self.step)
        return scores

    def save(self, *, wait: bool = False) -> None:
        enter_phase("save")
        self.ledger.sync()
        self.saver.save(self.engine, self.step, wait=wait)


def train(call: Call, score: Callable[[], Score]) -> Outcome:
    """Runs `clipwright train`, alone or as one rank; a refused config ends every rank before it waits for others."""
    run = call.output() if not call.dry_run else call.out or Path("run")
    resolved = call.load()
    if resolved.value.runtime.copy_to:
        remote.check_address(resolved.value.runtime.copy_to)
    timeout_seconds = resolved.value.runtime.timeout_minutes * 60
    supervisor = Supervisor(call, timeout_seconds)
    with supervisor.handle_signals(), process_group(2 * timeout_seconds + 1800) as world, supervisor.start(world):
        if not call.dry_run:
            run_on_rank0(lambda: output.refuse_locked(run, output.RUN))
        resolved = resolve_text(resolve_precision(resolved, run, world, fresh=call.fresh), run, fresh=call.fresh)
        setup = set_up(resolved, world, run, fresh=call.fresh, score=score)
        if world.is_rank0:
            call.say(header(resolved.value, setup.components, world, torch.get_num_threads()))
        if call.dry_run:
            return Outcome()
        trainer = Trainer(call, setup, world, run, supervisor)
        call.status.claim(run)
        if world.is_rank0 and trainer.step:
            call.say("; ".join([f"resuming at step {trainer.step}", *trainer.changed]))
        trainer.train()
        outcome = summary(run, trainer.config, world, trainer.step) if world.is_rank0 else Outcome()
    trainer.saver.finish()
    return outcome
