"""The training loop: prints its numbers first, then one line per interval; the same command resumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch

from clipwright.pipeline.core.activity import during
from clipwright.pipeline.core.command import Call, Outcome, Preempted, StopFlag
from clipwright.pipeline.core.lock import verify_held
from clipwright.pipeline.data.batch import Batch
from clipwright.pipeline.distributed.group import World, any_rank, any_rank_flags, process_group, run_on_rank0
from clipwright.pipeline.folders import output, remote
from clipwright.pipeline.train import run_folder
from clipwright.pipeline.train.checkpoints.restore import load_start
from clipwright.pipeline.train.checkpoints.saver import Saver
from clipwright.pipeline.train.config import resolve_text
from clipwright.pipeline.train.engine import Engine, StepResult
from clipwright.pipeline.train.logging import Records, header, summary
from clipwright.pipeline.train.precision import resolve_precision
from clipwright.pipeline.train.rank_failure import RankFailure
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
        # Before DeepSpeed partitions the parameters.
        start = load_start(run, world, setup.identity, self.config, self.components)
        self.step, self.hook_pending, self.changed = start.step, start.hook_pending, start.changed
        self.engine = Engine(towers, loss, self.config, world)
        start.restore_optimizers(self.engine)
        metadata = {"identity": setup.identity, "accepted": start.accepted}
        self.end = min(self.schedule.steps, self.runtime.stop_at or self.schedule.steps)
        self.records = Records(call, run, self.step, self.end, world, self.config, start.changed)
        self.saver = Saver(run, world, self.runtime, metadata, self.step, self.techniques, self.records.say)
        self.failure = RankFailure(world, self.save)
        self.skips = NonFiniteSteps(run, start.skipped)
        self.pace = StepPace(world)
        self.ledger = Ledger(run, self.step, world, self.runtime.ledger, self.failure)
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
        with closing(loader) as batches, closing(self.ledger), closing(self.records), self.records.progress:
            self.complete_step()
            self.records.meter.restart(self.step)
            while self.step < self.end:
                batch, late = self.fetch(batches)
                saving = self.saver.due(self.step + 1, late)
                measure = saving or self.is_logged(self.step + 1)
                result = self.engine.step(batch, self.step, self.schedule.factor(self.samples), measure=measure)
                self.step += 1
                self.after_step(batch, result, saving=saving)
            self.save(wait=True)
            self.failure.end_if(any_rank(self.failure.pending, self.world.device))

    def complete_step(self) -> None:
        """Makes up for what failed after the step that the run resumes from: a technique's hook, a validation."""
        if self.hook_pending:
            self.update_techniques()
        if self.step and self.validates(self.step) and self.records.lacks_scores(self.step):
            self.validate()

    def fetch(self, batches: Iterator[Batch]) -> tuple[Batch, bool]:
        """Returns the next batch, and whether it is time to save; saves and raises if any rank should stop."""
        enter_phase("data", self.step)
        batch = None  # stays None if a signal arrived while it waited
        with self.failure.deferred():
            batch = next(batches, None)
        enter_phase("agree")
        flags = (self.should_stop(), self.saver.late, self.saver.pending, self.saver.failed, self.failure.pending)
        stopping, late, pending, unwritten, failed = any_rank_flags(flags, self.world.device)
        self.saver.commit_if_written(pending, unwritten)
        self.failure.end_if(failed)
        if stopping or batch is None:
            self.supervisor.agree_to_stop()
            self.save(wait=True)
            raise (self.stop.cause or Preempted)()
        self.records.meter.waited += batch.wait_seconds
        return batch, late

    def update_techniques(self) -> None:
        """Runs the techniques' hook. If it fails, the step is saved without it, and resuming runs it again."""
        if not self.techniques.has_after_update:
            return
        with self.failure.deferred():
            self.techniques.after_update(self.engine, self.step)
        self.hook_pending = any_rank(self.failure.pending, self.world.device)
        self.failure.end_if(self.hook_pending)

    def after_step(self, batch: Batch, result: StepResult, *, saving: bool) -> None:
        """Records the step and saves it, then validates: what fails after a save costs no step."""
        enter_phase("record")
        verify_held(max_age_seconds=1.0)
        validates = self.validates(self.step)
        with self.saver.committed_on_error():
            self.ledger.add(self.step, self.samples - self.schedule.global_batch, batch.batch_samples)
        self.skips.add(result)
        self.records.progress.add(self.schedule.global_batch)
        self.supervisor.step_done()
        self.records.say(*self.pace.add(self.step))
        if saving or self.is_logged(self.step):
            counts = {"replaced": self.ledger.replaced, "skipped": self.skips.count, "saved": self.saver.committed}
            with self.failure.deferred():
                self.saver.note(self.records.write(self.step, result, self.engine.loss, counts, self.pace.slow))
        if self.skips.too_many:
            enter_phase("save")
            self.saver.commit()  # the checkpoint being written is from before these steps
            raise self.skips.error(result, self.step, batch, self.engine)
        if not result.skipped:
            self.update_techniques()
        if saving or validates:
            self.save(wait=validates)
        if validates:
            self.validate()

    def should_stop(self) -> bool:
        """Whether a signal arrived at any rank, as far as this rank knows."""
        return self.stop.cause is not None

    def is_logged(self, step: int) -> bool:
        return step in (1, self.end) or step % self.runtime.log_every == 0 or self.validates(step)

    def validates(self, step: int) -> bool:
        return self.validation is not None and self.validation.due(step, self.end)

    def validate(self) -> None:
        """Scores the saved step and adds the scores to its record."""
        enter_phase("validate")
        assert self.validation is not None
        scores = self.validation.run(self.engine, self.techniques, self.should_stop, self.step)
        with self.failure.deferred():
            self.saver.note(self.records.add_scores(self.step, scores))
        self.records.meter.restart(self.step)

    def save(self, *, wait: bool = False) -> None:
        enter_phase("save")
        self.ledger.sync()
        with during(f"saving step {self.step}"):
            self.saver.save(self.engine, self.step, wait=wait, hook_pending=self.hook_pending)


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
            return Outcome(resolved.tree)
        trainer = Trainer(call, setup, world, run, supervisor)
        call.status.claim(run)
        if world.is_rank0 and trainer.step:
            call.say("; ".join([f"resuming at step {trainer.step}", *trainer.changed]))
        trainer.train()
        outcome = summary(run, trainer.config, world, trainer.step) if world.is_rank0 else Outcome()
    trainer.saver.finish()
    return outcome
