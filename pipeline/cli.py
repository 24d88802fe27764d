"""Commands of the pipeline: train, launch, doctor, data ledger, export, import."""

from __future__ import annotations

import typer

from clipwright.pipeline.core.command import Call, command, load_name

app = typer.Typer()
data_app = typer.Typer()  # beside data preparation's verbs of this group
app.add_typer(data_app, name="data")

# MODULE:FUNCTION that scores a model on held-out data while it trains; the front door, which imports evaluation too,
# names it.
SCORE: list[str] = []


@command(app, "train", kind="clipwright.pipeline.train.config:RunConfig")
def train(call: Call) -> None:
    """Train a two-tower model on a dataset folder; the same command resumes."""
    from clipwright.pipeline.train.trainer import train as run

    run(call, lambda: load_name(SCORE[0]))


@command(app, "launch", kind="clipwright.pipeline.launch.plan:LaunchConfig", metavar="LAUNCHER VERB", words=100)
def launch(call: Call) -> None:
    """Start the ranks of a command by hostfile or torchrun, or print a slurm or kubernetes job of them."""
    from clipwright.pipeline.launch.run import launch as run

    run(call)


@command(app, "doctor", kind="clipwright.pipeline.train.config:RunConfig", configs="train")
def doctor(call: Call) -> None:
    """Check this machine; with a training config also its data, model, speed and gradients; check=NAME: one check."""
    import time

    from clipwright.pipeline.doctor.base import CheckResult, Context, checks, failure, report, take_requested_check

    call.writes_status = False  # -o names the folder of the planned run; nothing is written
    context = Context(call, take_requested_check(call))
    for check in [] if context.only else checks("environment"):
        context.results[check.name] = check.evaluate(context)
    try:
        from clipwright.pipeline.doctor.run import run_checks
    except (ImportError, OSError) as error:
        context.results["device"] = CheckResult("FAIL", f"a library does not load: {error}", fix="reinstall clipwright")
        report(context)
    else:
        run_checks(context)
    if (error := failure(context)) is not None:
        if not context.is_rank0:
            time.sleep(2)  # a launcher stops all ranks when one exits, so rank 0 must print its report first
            raise typer.Exit(error.exit_code)
        raise error


@command(
    data_app,
    "data ledger",
    kind="clipwright.pipeline.train.sample_log:LedgerConfig",
    subject="run",
    metavar="RUN",
    output=False,
)
def data_ledger(call: Call) -> None:
    """List the samples that a step of a run trained on: `data ledger RUN step=NUMBER`; without a step, count them."""
    from clipwright.pipeline.train.sample_log import show

    show(call)


@command(app, "export", kind="clipwright.pipeline.train.export:ExportConfig", subject="run", metavar="RUN")
def export(call: Call) -> None:
    """Write a run's newest checkpoint as a model folder."""
    from clipwright.pipeline.train.export import export as run

    run(call)


@command(app, "import", kind="clipwright.pipeline.interop.importing:ImportConfig", subject="folder", metavar="DIR")
def import_(call: Call) -> None:
    """Take over a CLIPModel or SiglipModel folder of transformers as a model folder, compared with its source."""
    from clipwright.pipeline.interop.importing import import_model

    import_model(call)
