"""Commands of the pipeline: train, export."""

from __future__ import annotations

import typer

from clipwright.pipeline.core.command import Call, command

app = typer.Typer()


@command(app, "train", kind="clipwright.pipeline.run:RunConfig")
def train(call: Call) -> None:
    """Train a two-tower model on a dataset folder; the same command resumes."""
    from clipwright.pipeline.trainer import train as run

    run(call)


@command(app, "export", kind="clipwright.pipeline.export:ExportConfig", subject="run", metavar="RUN")
def export(call: Call) -> None:
    """Write a run's newest checkpoint as a model folder."""
    from clipwright.pipeline.export import export as run

    run(call)
