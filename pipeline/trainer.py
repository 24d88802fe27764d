"""The training loop: prints its numbers first, then one line per interval; the same command resumes."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from clipwright.pipeline import checkpoint, runfolder
from clipwright.pipeline.core.command import Call, Preempted, StopFlag
from clipwright.pipeline.core.config import Resolved
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.log import Progress
from clipwright.pipeline.distributed import World, any_of, on_first, process_group
from clipwright.pipeline.engine import Engine, StepResult
from clipwright.pipeline.ledger import Ledger
from clipwright.pipeline.metrics import RunLog, header, peak_memory, step_line
from clipwright.pipeline.place import detect
from clipwright.pipeline.precision import settle_precision
from clipwright.pipeline.run import Parts, RunConfig, RuntimeConfig, build, identity, settle_text
from clipwright.pipeline.saver import Saver


def thread_count(runtime: RuntimeConfig, world: World) -> int:
    """Threads of one rank: as configured, or its share of this machine's cores."""
    return runtime.threads or max(1, (os.cpu_count() or 1) // world.local_size)


class Trainer:
    """One run on one rank."""

    def __init__(self, call: Call, resolved: Resolved[RunConfig], world: World, run: Path) -> None:
        self.call, self.world = call, world
        self.config = resolved.value
        self.runtime, self.schedule = self.config.runtime, self.config.schedule
        self.threads = thread_count(self.runtime, world)
        torch.set_num_threads(self.threads)
        self.parts: Parts = build(self.config, world, None if call.fresh else run)
        self.identity = identity(resolved, self.parts.loader.dataset.fingerprint, self.parts.tokenizer.fingerprint)

    def open(self, run: Path, yaml: str, fresh: bool) -> None:
        """Claims the run folder, builds the engine and restores the newest checkpoint."""
        self.run = run
        learned = self.parts.tokenizer if self.config.tokenizer.learned else None
        on_first(lambda: runfolder.claim(run, yaml=yaml, identity=self.identity, fresh=fresh, learned=learned))
        found = checkpoint.newest(run, world=self.world)
        self.step = 0 if found is None else found.step
        if found is not None:  # before DeepSpeed divides them among the ranks
            found.restore_weights(self.parts.towers, self.parts.loss)
        self.engine = Engine(self.parts.towers, self.parts.loss, self.config, self.world)
        if found is not None:
            found.restore_optimizers(self.engine)
        self.saver = Saver(run, self.world, self.runtime, self.identity, self.step)

    def train(self) -> None:
        """Steps until the schedule's end, `stop_at`, or a signal; a checkpoint stands at every end."""
        stop = StopFlag()
        end = min(self.schedule.steps, self.runtime.stop_at or self.schedule.steps)
        self.parts.towers.train()
        since, since_step, waited = time.perf_counter(), self.step, 0.0
        with ExitStack() as ends:
            batches = ends.enter_context(closing(self.parts.loader.batches(self._samples())))
            self.ledger = ends.enter_context(closing(Ledger(self.run, self.step, self.world, self.runtime.ledger)))
            log = ends.enter_context(closing(RunLog(self.run, self.step))) if self.world.first else None
            bar = ends.enter_context(self._bar(end))
            while self.step < end:
                batch = next(batches)
                waited += batch.waited
                flags = (stop.cause is not None, self.saver.late, self.saver.pending, self.saver.failed)
                stopping, late, pending, failed = any_of(flags, self.world.device)
                self.saver.settle(pending, failed)
                if stopping:
                    self._save(wait=True)
                    raise (stop.cause or Preempted)()
                factor = self.schedule.factor(self._samples())
                shown = self._shown(self.step + 1, end)
                result = self.engine.step(batch, self.step, factor, measure=shown)
                self.step += 1
                self._check_finite(result)
                self.ledger.add(self.step, self._samples() - self.schedule.global_batch, batch.tally)
                bar.add(self.schedule.global_batch)
                if shown:
                    now = time.perf_counter()
                    seconds = max(now - since, 1e-9)
                    rate = (self.step - since_step) * self.schedule.global_batch / seconds
                    record = self._record(result, factor, rate, waited / seconds)
                    since, since_step, waited = now, self.step, 0.0
                    self.saver.note(record)
                    if log is not None:
                        log.write(record)
                        with bar.above():
                            self.call.say(step_line(record, self.schedule.steps, self._left() / rate))
                if self.saver.due(self.step, late):
                    self._save()
            self._save(wait=True)

    def _bar(self, end: int) -> Progress:
        """On a terminal; elsewhere the step lines are the progress."""
        total, quiet = end * self.schedule.global_batch, self.call.quiet or not self.world.first
        return Progress("train", total, "samples", quiet=quiet, interval=math.inf, begun=self._samples())

    def _samples(self) -> int:
        """Samples trained on so far."""
        return self.step * self.schedule.global_batch

    def _shown(self, step: int, end: int) -> bool:
        return step == 1 or step == end or step % self.runtime.log_every == 0

    def _left(self) -> int:
        """Samples still to train."""
        return (self.schedule.steps - self.step) * self.schedule.global_batch

    def _save(self, *, wait: bool = False) -> None:
        self.ledger.sync()
        self.saver.save(self.engine, self.step, wait=wait)

    def _check_finite(self, result: StepResult) -> None:
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise ClipwrightError(
                "E_NONFINITE",
                "a step that is not finite",
                where=f"{self.run} step {self.step}",
                found=f"loss {result.loss}, gradient norm {result.grad_norm}",
                fix="lower optim.lr or use precision=fp32, with --fresh or another -o",
            )

    def _record(self, result: StepResult, factor: float, rate: float, data_share: float) -> dict[str, Any]:
        return {
            "step": self.step,
            "samples": self._samples(),
            **dataclasses.asdict(result),
            **self.engine.loss.report(),
            "lr": self.config.optim.lr * factor,
            "samples_per_s": rate,
            "data_share": min(data_share, 1.0),
            "replaced": self.ledger.replaced,
            "saved": self.saver.sealed,
            "memory_gb": peak_memory(self.world.device) / 2**30,
        }


def train(call: Call) -> None:
    """Runs `clipwright train`, alone or as one rank of a launcher's group, which no refused config waits for."""
    call.writes_status = detect(os.environ).rank == 0
    run = call.output() if not call.dry_run else call.out or Path("run")
    resolved = call.load()
    with process_group() as world:
        resolved = settle_text(settle_precision(resolved, run, world, fresh=call.fresh), run, fresh=call.fresh)
        trainer = Trainer(call, resolved, world, run)
        if world.first:
            call.say(header(trainer.config, trainer.parts, world, trainer.threads))
        if call.dry_run:
            return
        trainer.open(run, resolved.yaml(), call.fresh)
        if world.first and trainer.step:
            call.say(f"resuming at step {trainer.step}")
        trainer.train()
        if world.first:
            _finish(call, trainer, run)


def _finish(call: Call, trainer: Trainer, run: Path) -> None:
    lines = runfolder.read_log(run)
    if not lines:
        raise ClipwrightError(
            "E_INPUT",
            "a finished run without its log",
            where=run / runfolder.LOG,
            found="no line; the checkpoints are whole",
            fix=f"export it (clipwright export {run} -o MODEL), or train again with --fresh",
        )
    result = {
        "steps": trainer.step,
        "samples": trainer.step * trainer.schedule.global_batch,
        "samples_per_s": round(statistics.median(line["samples_per_s"] for line in lines), 1),
        "loss_first": lines[0]["loss"],
        "loss_last": lines[-1]["loss"],
        "precision": trainer.config.precision,
        "world": trainer.world.size,
        "run": str(run),
    }
    text = f"trained {result['samples']:,} samples: loss {result['loss_first']:.3f} → {result['loss_last']:.3f}"
    call.finish(result, text, then=f"clipwright export {run} -o MODEL")
