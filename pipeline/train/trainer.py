"""The training loop: prints its numbers first, then one line per interval; the same command resumes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from clipwright.pipeline.core.command import Call, Outcome, Preempted, StopFlag
from clipwright.pipeline.core.config import Resolved
from clipwright.pipeline.core.log import Progress
from clipwright.pipeline.distributed.group import World, any_rank_flags, process_group, run_on_rank0
from clipwright.pipeline.folders import remote
from clipwright.pipeline.train import run_folder, warm_start
from clipwright.pipeline.train.checkpoints import checkpoint
from clipwright.pipeline.train.checkpoints.saver import Saver
from clipwright.pipeline.train.config import Parts, RunConfig, RuntimeConfig, build, identity, resolve_text
from clipwright.pipeline.train.engine import Engine, StepResult
from clipwright.pipeline.train.logging import Meter, RunLog, header, step_line, summary
from clipwright.pipeline.train.precision import resolve_precision
from clipwright.pipeline.train.sample_log import Ledger
from clipwright.pipeline.train.step_checks import NonFiniteSteps, StepPace
from clipwright.pipeline.train.supervision.progress import enter_phase
from clipwright.pipeline.train.supervision.supervisor import Supervisor
from clipwright.pipeline.train.validation import Score, Validation


def thread_count(runtime: RuntimeConfig, world: World) -> int:
    """Threads of one rank: as configured, or its share of this machine's cores."""
    return runtime.threads or max(1, (os.cpu_count() or 1) // world.local_size)


class Trainer:
    """One run on one rank."""

    def __init__(
        self, call: Call, resolved: Resolved[RunConfig], world: World, run: Path, score: Callable[[], Score]
    ) -> None:
        self.call, self.world = call, world
        self.config = resolved.value
        self.runtime, self.schedule = self.config.runtime, self.config.schedule
        self.threads = thread_count(self.runtime, world)
        torch.set_num_threads(self.threads)
        self.parts: Parts = build(self.config, world, None if call.fresh else run)
        self.validation: Validation | None = None
        if self.runtime.validation:
            self.validation = Validation(self.config, self.parts.tokenizer, world, score())
        self.init_source = warm_start.init_source(self.config.init_from, run, fresh=call.fresh)
        dataset, tokenizer = self.parts.loader.data.fingerprint, self.parts.tokenizer.fingerprint
        self.identity = identity(resolved, dataset, tokenizer, self.init_source)

    def open(self, run: Path, yaml: str, fresh: bool) -> None:
        """Claims the run folder, builds the engine and restores the newest checkpoint."""
        self.run = run
        mine: dict[str, Any] = {"yaml": yaml, "identity": self.identity, "fresh": fresh, "accept": self.config.accept}
        mine["learned"] = self.parts.tokenizer if self.config.tokenizer.trained_file else None
        run_on_rank0(lambda: run_folder.claim(run, **mine))
        found = checkpoint.newest(run, world=self.world)
        self.step = 0 if found is None else found.step
        self.changed = [] if found is None else found.changes(self.identity)
        if found is not None:  # before DeepSpeed divides them among the ranks
            found.restore_weights(self.parts.towers, self.parts.loss)
        elif self.init_source is not None:
            warm_start.begin(self.parts, self.config.init_from, self.init_source)
        self.engine = Engine(self.parts.towers, self.parts.loss, self.config, self.world)
        if found is not None:
            found.restore_optimizers(self.engine)
        self.skips = NonFiniteSteps(run, found.manifest["skipped"] if found is not None else 0)
        about = {"identity": self.identity, "accepted": [] if found is None else found.accepted(self.changed)}
        self.saver = Saver(run, self.world, self.runtime, about, self.step)

    def train(self, supervisor: Supervisor) -> None:
        """Steps until the schedule's end, `stop_at`, or a signal to any rank; a checkpoint stands at every end."""
        end = min(self.schedule.steps, self.runtime.stop_at or self.schedule.steps)
        self.parts.towers.train()
        pace = StepPace(self.world)
        with ExitStack() as ends:
            stop = supervisor.begin_training(StopFlag())
            loader = self.parts.loader.batches(self._samples(), lambda: stop.cause is not None)
            batches = ends.enter_context(closing(loader))
            self.ledger = ends.enter_context(closing(Ledger(self.run, self.step, self.world, self.runtime.ledger)))
            log = ends.enter_context(closing(RunLog(self.run, self.step))) if self.world.is_rank0 else None
            bar = ends.enter_context(self._bar(end))
            meter = Meter(self.step, self.world.device)
            while self.step < end:
                enter_phase("data", self.step)
                batch = next(batches, None)  # none where it was told to stop while it waited
                enter_phase("agree")
                flags = (stop.cause is not None, self.saver.late, self.saver.pending, self.saver.failed)
                stopping, late, pending, failed = any_rank_flags(flags, self.world.device)
                self.saver.settle(pending, failed)
                if stopping or batch is None:
                    supervisor.agree_to_stop()
                    self._save(wait=True)
                    raise (stop.cause or Preempted)()
                meter.waited += batch.wait_seconds
                factor = self.schedule.factor(self._samples())
                shown = self._shown(self.step + 1, end)
                result = self.engine.step(batch, self.step, factor, measure=shown)
                self.step += 1
                enter_phase("record")
                self.ledger.add(self.step, self._samples() - self.schedule.global_batch, batch.batch_samples)
                self.skips.add(result)
                bar.add(self.schedule.global_batch)
                supervisor.step_done()
                lines = pace.add(self.step)
                if shown:
                    record = self._record(meter, result, factor)
                    record |= {"slow": pace.slow} if pace.slow else {}
                    if self.validation is not None and self.validation.due(self.step, end):
                        enter_phase("validate")
                        record |= self.validation.run(self.engine, lambda: stop.cause is not None)
                        meter.begin(self.step)
                    lines.append(step_line(record, self.schedule.steps, self._left() / record["samples_per_s"]))
                    self.saver.note(record)
                    if log is not None:
                        log.write(record)
                with bar.above():
                    for line in lines if self.world.is_rank0 else []:
                        self.call.say(line)
                if self.skips.too_many:
                    enter_phase("save")
                    self.saver.seal()  # what is being written is as good as the weights still are
                    raise self.skips.error(result, self.step, batch)
                if self.saver.due(self.step, late):
                    self._save()
            self._save(wait=True)

    def _bar(self, end: int) -> Progress:
        """On a terminal; elsewhere the step lines are the progress."""
        total, quiet = end * self.schedule.global_batch, self.call.quiet or not self.world.is_rank0
        return Progress("train", total, "samples", quiet=quiet, interval=math.inf, already_done=self._samples())

    def _samples(self) -> int:
        """Samples trained on so far."""
        return self.step * self.schedule.global_batch

    def _shown(self, step: int, end: int) -> bool:
        validating = self.validation is not None and self.validation.due(step, end)
        return step == 1 or step == end or validating or step % self.runtime.log_every == 0

    def _left(self) -> int:
        """Samples still to train."""
        return (self.schedule.steps - self.step) * self.schedule.global_batch

    def _save(self, *, wait: bool = False) -> None:
        enter_phase("save")
        self.ledger.sync()
        self.saver.save(self.engine, self.step, wait=wait)

    def _record(self, meter: Meter, result: StepResult, factor: float) -> dict[str, Any]:
        more = {"lr": self.config.optim.lr * factor, "replaced": self.ledger.replaced, "skipped": self.skips.count}
        more |= {"saved": self.saver.sealed, **({"accepted": self.changed} if self.changed else {})}
        self.changed = []  # said once, where it begins
        return meter.record(self.step, self._samples(), result, **self.engine.loss.report(), **more)


def train(call: Call, score: Callable[[], Score]) -> Outcome:
    """Runs `clipwright train`, alone or as one rank of a launcher's group, which no refused config waits for."""
    run = call.output() if not call.dry_run else call.out or Path("run")
    resolved = call.load()
    if resolved.value.runtime.copy_to:
        remote.reach(resolved.value.runtime.copy_to)
    timeout_seconds = resolved.value.runtime.timeout_minutes * 60
    supervisor = Supervisor(call, timeout_seconds)
    with supervisor.handle_signals(), process_group(2 * timeout_seconds + 1800) as world, supervisor.start(world):
        resolved = resolve_text(resolve_precision(resolved, run, world, fresh=call.fresh), run, fresh=call.fresh)
        trainer = Trainer(call, resolved, world, run, score)
        if world.is_rank0:
            call.say(header(trainer.config, trainer.parts, world, trainer.threads))
        if call.dry_run:
            return Outcome()
        trainer.open(run, resolved.yaml(), call.fresh)
        call.status.claim(run)
        if world.is_rank0 and trainer.step:
            call.say("; ".join([f"resuming at step {trainer.step}", *trainer.changed]))
        trainer.train(supervisor)
        outcome = summary(run, trainer.config, world, trainer.step) if world.is_rank0 else Outcome()
    trainer.saver.finish()
    return outcome
