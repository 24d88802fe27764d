"""Commands of eval."""

from __future__ import annotations

import typer

from clipwright.pipeline.core.command import Call, command

app = typer.Typer()
index_app = typer.Typer(help="Build search indexes.", no_args_is_help=True)
app.add_typer(index_app, name="index")


@command(app, "embed", kind="clipwright.eval.embed:EmbedConfig")
def embed(call: Call) -> None:
    """Dataset folder through a model folder to an embedding folder; also under torchrun or accelerate launch."""
    import os
    import time

    from clipwright.eval.embed import COLLECTIVE_SECONDS, RENDEZVOUS_SECONDS
    from clipwright.eval.embed import embed as run
    from clipwright.pipeline.core.errors import ClipwrightError
    from clipwright.pipeline.distributed.group import process_group
    from clipwright.pipeline.distributed.launcher_env import read_launcher_env

    # Before the rendezvous: a refused config waits for no other rank.
    is_rank0 = read_launcher_env(os.environ).rank == 0
    call.writes_status = is_rank0
    resolved, out = call.load(), call.output()
    share = "/" in resolved.value.runtime.part
    call.writes_status = is_rank0 and not share  # the folder's status is that of the complete run
    if call.dry_run:
        if is_rank0:
            call.finish(resolved.tree, f"would embed every {resolved.value.what} of {resolved.value.data} into {out}")
        return
    with process_group(COLLECTIVE_SECONDS, RENDEZVOUS_SECONDS) as world:
        try:
            manifest = run(resolved, out, world, quiet=call.quiet, fresh=call.fresh)
        except ClipwrightError as error:
            if is_rank0:
                raise
            # A launcher stops all ranks as soon as one exits: rank 0 needs time to print the error.
            time.sleep(2)
            raise typer.Exit(error.exit_code) from None
    if is_rank0:
        did = "embedded" if manifest["made"] else "already embedded:"
        text = f"{did} {manifest['rows']} {manifest['what']}s, {manifest['dimension']} numbers each, in {out}"
        if share and "files" not in manifest:
            call.finish(manifest, f"part {resolved.value.runtime.part}: {text}")
        else:
            call.finish(manifest, text, then=f"clipwright index build flat embeddings={out} -o INDEX")


@command(index_app, "index build", kind="clipwright.eval.search.versions:IndexBuildConfig")
def index_build(call: Call) -> None:
    """Embedding folder to index folder."""
    from clipwright.eval.search.versions import build

    resolved = call.load()
    out = call.output()
    if call.dry_run:
        call.finish(
            resolved.tree, f"would build a {resolved.value.recipe.name} index of {resolved.value.embeddings} in {out}"
        )
        return
    version = build(resolved, out, fresh=call.fresh, quiet=call.quiet)
    did = "built" if version["made"] else "already built from these embeddings:"
    text = f"{did} {out}/versions/{version['name']}: {version['rows']} rows, {version['recipe']}"
    call.finish(version, text, then=f'clipwright search {out} text="..."')


@command(
    app, "search", kind="clipwright.eval.search.query:SearchConfig", subject="index", metavar="INDEX", output=False
)
def search(call: Call) -> None:
    """Index folder and a text or image to the nearest rows: `search INDEX text="a red dog"` or `image=FILE`."""
    from clipwright.eval.search.query import run, table

    result = run(call.load().value)
    call.finish(result, table(result))


@command(app, "eval", kind="clipwright.eval.evaluate:EvalConfig")
def evaluate(call: Call) -> None:
    """Scores of a model folder: `eval retrieval` or `eval zeroshot` with `model=DIR data=DIR [-o REPORT]`."""
    from pathlib import Path

    from clipwright.eval.evaluate import run

    resolved = call.load()
    if call.dry_run:
        call.finish(resolved.tree, f"would run the benchmark {resolved.value.benchmark.name}")
        return
    report, text = run(resolved, call.out, quiet=call.quiet, fresh=call.fresh)
    config = resolved.value
    folder = config.data is not None and Path(config.data).is_dir()
    then = f"clipwright embed model={config.model} data={config.data} -o EMBEDDINGS" if folder else ""
    call.finish(report, text, then=then)


@command(app, "report", metavar="FOLDER", output=False)
def report(call: Call) -> None:
    """The page of a finished demo: every figure of its steps in one file, FOLDER/report.html."""
    from pathlib import Path

    from clipwright.eval.demo.page import write
    from clipwright.eval.demo.results import Demo

    folder = Path(call.config or "demo")
    if call.dry_run:
        call.finish(Demo(folder).headline(), f"would write {folder / 'report.html'}")
        return
    made = write(folder)
    text = f"{made['page']}, {made['bytes'] / 1e6:.1f} MB"
    call.finish(made, text, then=f'clipwright search {folder / "index"} text="..."')
