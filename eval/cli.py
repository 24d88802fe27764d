"""Commands of evaluation: embed, index build, search, eval, report."""

from __future__ import annotations

import typer

from clipwright.pipeline.core.command import Call, Command, Outcome, Preempted, leave_error_to_rank0
from clipwright.pipeline.core.messages import command_line, format_count

app = typer.Typer()
index_app = typer.Typer(help="Build search indexes.", no_args_is_help=True)
app.add_typer(index_app, name="index")


@Command(
    app,
    "embed",
    kind="clipwright.eval.embed:EmbedConfig",
    resumes=True,
    inputs="clipwright.eval.embed:check_inputs",
    flags=("-o", "--dry-run", "--fresh"),
    rank="clipwright.pipeline.distributed.rank_process:rank_process",
    examples=(
        "clipwright embed model=model data=shards -o embeddings",
        "torchrun --nproc-per-node 8 -m clipwright embed model=model data=shards -o embeddings",
    ),
)
def embed(call: Call) -> Outcome:
    """Embed every image or caption of a dataset; run again to resume; also runs as several ranks under a launcher."""
    from clipwright.eval.embed import COLLECTIVE_SECONDS, RENDEZVOUS_SECONDS, kept_parts
    from clipwright.eval.embed import embed as run
    from clipwright.pipeline.core.errors import ClipwrightError
    from clipwright.pipeline.distributed.group import process_group

    # Before the rendezvous: a refused config waits for no other rank.
    resolved, out = call.load(), call.output()
    config = resolved.value
    is_part = "/" in config.runtime.part
    if is_part:
        call.status.disable()  # the folder's status describes the complete job
    if call.dry_run:
        return Outcome(resolved.tree, f"would embed every {config.what} of {config.data} into {out}")
    with process_group(COLLECTIVE_SECONDS, RENDEZVOUS_SECONDS) as world:
        say = call.say if world.is_rank0 else lambda _: None
        try:
            manifest = run(resolved, out, world, quiet=call.quiet, fresh=call.fresh, say=say)
        except ClipwrightError as error:
            if world.is_rank0:
                raise
            return leave_error_to_rank0(error)
        except (KeyboardInterrupt, Preempted):
            parts = kept_parts(out)
            kept = f"kept {format_count(parts, 'finished part')} in {out}"
            say(kept if parts else "no part was finished: nothing is kept")
            raise
    rows, new = manifest["rows"], manifest["new_rows"]
    action = "embedded" if new or not rows else "already embedded:"
    earlier = f" ({new:,} now, {rows - new:,} by earlier starts)" if 0 < new < rows else ""
    text = f"{action} {format_count(rows, config.what)}{earlier}, dimension {manifest['dimension']}, in {out}"
    if is_part and "files" not in manifest:
        return Outcome(manifest, f"part {config.runtime.part}: {text}")
    return Outcome(manifest, text, next=command_line("index", "build", "flat", f"embeddings={out}", "-o", "INDEX"))


@Command(
    index_app,
    "index build",
    kind="clipwright.eval.search.versions:IndexBuildConfig",
    flags=("-o", "--dry-run", "--fresh"),
    examples=("clipwright index build flat embeddings=embeddings -o index",),
)
def index_build(call: Call) -> Outcome:
    """Build a search index from an embedding folder."""
    from clipwright.eval.search.versions import build

    resolved = call.load()
    out = call.output()
    if call.dry_run:
        config = resolved.value
        return Outcome(resolved.tree, f"would build a {config.recipe.name} index of {config.embeddings} in {out}")
    version = build(resolved, out, fresh=call.fresh, quiet=call.quiet)
    action = "built" if version["made"] else "already built from these embeddings:"
    text = f"{action} {out}/versions/{version['name']}: {format_count(version['rows'], 'row')}, {version['recipe']}"
    return Outcome(version, text, next=command_line("search", out, "text=a photo of a dog"))


@Command(
    app,
    "search",
    kind="clipwright.eval.search.query:SearchConfig",
    subject="index",
    metavar="INDEX",
    flags=("-o",),
    examples=(
        'clipwright search index text="a red dog" k=5',
        "clipwright search index image=query.jpg -o hits",
    ),
)
def search(call: Call) -> Outcome:
    """Find the nearest rows of an index to a text or an image; -o writes a page with the images."""
    from clipwright.eval.search.query import run, table

    result = run(call.load().value, call.out)
    text = table(result)
    if call.out is not None:
        text += f"\n\npage {result['page']}"
        if result["problem"]:
            text += f"\n{result['problem']}"
    return Outcome(result, text)


@Command(
    app,
    "eval",
    kind="clipwright.eval.evaluate:EvalConfig",
    flags=("-o", "--dry-run", "--fresh"),
    examples=(
        "clipwright eval retrieval model=model data=shards -o report",
        "clipwright eval zeroshot model=model data=shards",
    ),
)
def evaluate(call: Call) -> Outcome:
    """Score a model on a benchmark: retrieval, zero-shot classification or search."""
    from pathlib import Path

    from clipwright.eval.evaluate import run

    resolved = call.load()
    config = resolved.value
    if call.dry_run:
        return Outcome(resolved.tree, f"would run the benchmark {config.benchmark.name}")
    report, text = run(resolved, call.out, quiet=call.quiet, fresh=call.fresh)
    if config.data is not None and Path(config.data).is_dir():
        return Outcome(
            report, text, next=command_line("embed", f"model={config.model}", f"data={config.data}", "-o", "EMBEDDINGS")
        )
    return Outcome(report, text)


@Command(
    app,
    "report",
    metavar="FOLDER",
    takes_overrides=False,
    flags=("-o", "--dry-run"),
    examples=("clipwright report run", "clipwright report demo -o page"),
)
def report(call: Call) -> Outcome:
    """Write the page of a training run, an evaluation report or a demo: FOLDER/report.html, or in -o DIR."""
    from clipwright.eval.report.report import report as run

    return run(call)
