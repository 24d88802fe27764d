"""Commands of the pipeline: train, launch, doctor, data ledger, export, import."""

from __future__ import annotations

import typer

from clipwright.pipeline.core.command import Call, Command, Outcome, leave_error_to_rank0, load_name

app = typer.Typer()
data_app = typer.Typer()  # joined with the group of the same name in data_prep.cli
app.add_typer(data_app, name="data")

RANK = "clipwright.pipeline.distributed.rank_process:rank_process"
# MODULE:FUNCTION that scores a model on held-out data during training. Set by clipwright/cli.py, since the pipeline
# does not import eval.
SCORE: list[str] = []


@Command(
    app,
    "train",
    kind="clipwright.pipeline.train.config:RunConfig",
    resumes=True,
    inputs="clipwright.pipeline.train.setup:check_inputs",
    flags=("-o", "--dry-run", "--fresh"),
    rank=RANK,
    examples=(
        "clipwright train photos data.train=shards -o run",
        "torchrun --nproc-per-node 8 -m clipwright train photos data.train=shards image.name=vit_nano -o run",
    ),
)
def train(call: Call) -> Outcome:
    """Train a two-tower model on a dataset folder; run the same command again to resume."""
    from clipwright.pipeline.train.trainer import train as run

    return run(call, lambda: load_name(SCORE[0]))


@Command(
    app,
    "launch",
    kind="clipwright.pipeline.launch.config:LaunchConfig",
    metavar="LAUNCHER VERB",
    max_arguments=100,
    flags=("-o", "--dry-run", "--fresh"),
    wraps_command=True,
    writes_status=False,  # -o is the output folder of the launched command, which writes its own
    examples=(
        "clipwright launch torchrun processes=8 train photos data.train=shards -o run",
        "clipwright launch slurm nodes=4 processes=8 train photos data.train=shards -o run > job.sh",
    ),
)
def launch(call: Call) -> Outcome:
    """Start the ranks of a command with a hostfile or torchrun, or print a Slurm or Kubernetes job that does."""
    from clipwright.pipeline.launch.run import launch as run

    return run(call)


@Command(
    app,
    "doctor",
    kind="clipwright.pipeline.train.config:RunConfig",
    configs="train",
    other_overrides=("check",),
    inputs="clipwright.pipeline.train.setup:check_inputs",
    flags=("-o", "--fresh"),
    rank=RANK,
    writes_status=False,  # -o is the folder of the run that would follow; nothing is written
    examples=(
        "clipwright doctor",
        "clipwright doctor photos data.train=shards",
        "clipwright doctor photos data.train=shards check=speed",
    ),
)
def doctor(call: Call) -> Outcome:
    """Check this machine; with a training config also data, model, speed and gradients; check=NAME runs one check."""
    import dataclasses

    from clipwright.pipeline.doctor.base import CheckResult, DoctorContext, checks, report, requested_check

    only, overrides = requested_check(call.overrides)
    context = DoctorContext(dataclasses.replace(call, overrides=overrides), only)
    for check in [] if only else checks("environment"):
        context.results[check.name] = check.evaluate(context)
    try:
        from clipwright.pipeline.doctor.run import run_checks
    except (ImportError, OSError) as error:
        context.results["device"] = CheckResult("FAIL", f"a library does not load: {error}", fix="reinstall clipwright")
        return report(context)
    run_checks(context)
    outcome = report(context)
    if outcome.error is not None and not context.is_rank0:
        return leave_error_to_rank0(outcome.error)
    return outcome


@Command(
    data_app,
    "data ledger",
    kind="clipwright.pipeline.train.sample_log:LedgerConfig",
    subject="run",
    metavar="RUN",
    examples=("clipwright data ledger run", "clipwright data ledger run step=120"),
)
def data_ledger(call: Call) -> Outcome:
    """List the samples that one step of a run trained on; without step=NUMBER, count the samples of all steps."""
    from clipwright.pipeline.train.sample_log import show

    return show(call)


@Command(
    app,
    "export",
    kind="clipwright.pipeline.train.export:ExportConfig",
    subject="run",
    metavar="RUN",
    flags=("-o", "--dry-run"),
    examples=("clipwright export run -o model",),
)
def export(call: Call) -> Outcome:
    """Write the newest checkpoint of a run as a model folder."""
    from clipwright.pipeline.train.export import export as run

    return run(call)


@Command(
    app,
    "import",
    kind="clipwright.pipeline.interop.importing:ImportConfig",
    subject="folder",
    metavar="DIR",
    flags=("-o", "--dry-run"),
    examples=("clipwright import clip-vit-base-patch32 -o model",),
)
def import_(call: Call) -> Outcome:
    """Convert a CLIPModel or SiglipModel folder of transformers to a model folder and compare their outputs."""
    from clipwright.pipeline.interop.importing import import_model

    return import_model(call)
