"""The front door: mounts each part's commands. The only file that imports all three parts."""

from __future__ import annotations

import io
import os
import shlex
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from clipwright.data_prep.cli import app as data_prep_app
from clipwright.eval.cli import app as eval_app
from clipwright.pipeline.cli import SCORE
from clipwright.pipeline.cli import app as pipeline_app
from clipwright.pipeline.core.command import COMMANDS, Call, Preempted, command, load_kind
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.nearest import nearest
from clipwright.pipeline.core.registry import configclass

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Raw image-text pairs to shards, a trained two-tower model, scores, an index and search.",
    epilog="Exit codes: 0 done · 1 failed or a gate missed · 2 config or command line · 3 input refused · "
    "85 stopped by a signal with state saved · 130 Ctrl-C. Start with: clipwright demo",
)
for part in (data_prep_app, pipeline_app, eval_app):
    app.registered_commands += part.registered_commands
    for group in part.registered_groups:
        same = next((known for known in app.registered_groups if known.name == group.name), None)
        if same is None or same.typer_instance is None or group.typer_instance is None:
            app.registered_groups.append(group)
        else:  # a group of several parts
            same.typer_instance.registered_commands += group.typer_instance.registered_commands
SCORE.append("clipwright.eval.benchmarks.retrieval:score")
config_app = typer.Typer(no_args_is_help=True, help="Resolved configs and their JSON schema.")
app.add_typer(config_app, name="config")

REGISTRIES = {
    "towers": "clipwright.pipeline.towers.base:IMAGE_TOWERS,TEXT_TOWERS",
    "losses": "clipwright.pipeline.losses.base:LOSSES",
    "tokenizers": "clipwright.pipeline.tokenizers.base:TOKENIZERS",
    "sources": "clipwright.data_prep.sources.base:SOURCES",
    "benchmarks": "clipwright.eval.benchmarks.base:BENCHMARKS",
    "recipes": "clipwright.eval.search.recipes.base:RECIPES",
    "formats": "clipwright.pipeline.interop.formats.base:FORMATS",
}


@configclass
class DemoConfig:
    """`steps`: name → a command line of ours; `{demo}` stands for the output folder, `{seed}` for the seed."""

    seed: int
    steps: dict[str, str]


@command(app, "demo", kind="clipwright.cli:DemoConfig")
def demo(call: Call) -> None:
    """Run every stage on rendered pictures, on a CPU, in minutes; ends with a page that shows what came of it."""
    import time

    from clipwright.pipeline.core.config import read_yaml
    from clipwright.pipeline.core.files import atomic_write, write_json

    out = call.out = call.out or Path("demo")
    resolved = call.load(base=read_yaml(Path(__file__).parent / "configs" / "demo.yaml"))
    config: DemoConfig = resolved.value
    _not_anothers(out / "config.yaml")
    report: dict[str, Any] = {}
    for number, (name, line) in enumerate(config.steps.items(), 1):
        words = [word.format(demo=out, seed=config.seed) for word in shlex.split(line)]
        call.say(f"{number}/{len(config.steps)} {name}: clipwright {shlex.join(words)}")
        if call.dry_run:
            continue
        started = time.monotonic()
        report[name] = _demo_step([*words, *(["--quiet"] if call.quiet else []), *(["--fresh"] if call.fresh else [])])
        report[name]["seconds"] = round(time.monotonic() - started, 1)
        if number == 1:  # which has refused a folder of another demo
            atomic_write(out / "config.yaml", resolved.yaml())
    if call.dry_run:
        return
    report["seconds"] = round(sum(step["seconds"] for step in report.values()), 1)
    write_json(out / "report.json", report)
    zeroshot, search = report["zeroshot"], report["search"]
    text = (
        f"zero-shot on {zeroshot['n']} new pictures: {zeroshot['top1']:.0%} right (chance {zeroshot['chance']:.0%}); "
        f"shape {zeroshot['shape_top1']:.0%} (knowing only the colour: {zeroshot['shape_chance']:.0%})\n"
        f"“{search['query']}”: {search['hits_right']} of the first {search['k']} hits are right; over all "
        f"{search['n']} queries {search['mean_precision_at_10']:.0%} (chance {search['chance']:.0%})\n"
        f"a smoke test on toy pictures, not a useful model\npage {report['report']['page']}"
    )
    call.finish(report, text, then=f"clipwright search {out / 'index'} text='{search['query']}'")


def _not_anothers(config: Path) -> None:
    """Whoever writes `-o .` by mistake keeps the config that lies there."""
    from clipwright.pipeline.core.config import read_yaml

    if config.exists() and "steps" not in read_yaml(config):
        raise ClipwrightError(
            "E_OUTPUT",
            "an output folder that holds something else",
            where=config,
            found="a config of another command",
            fix="name a new folder: -o DIR",
        )


def _demo_step(words: list[str]) -> dict[str, Any]:
    """One command line in a process of its own, as a user would run it; its result as JSON, without its lists."""
    import json
    import subprocess

    child = subprocess.Popen([sys.executable, "-m", "clipwright", *words, "--json"], stdout=subprocess.PIPE, text=True)
    try:
        printed, _ = child.communicate()
    except (KeyboardInterrupt, Preempted) as stop:
        if isinstance(stop, Preempted):
            child.terminate()  # Ctrl-C has reached the whole foreground group already
        child.communicate()  # it saves what it has
        raise
    if child.returncode:
        raise typer.Exit(child.returncode)  # the step has said why
    result = json.loads(printed)
    numbers = result[result["benchmark"]] if "benchmark" in result else result
    return {name: value for name, value in numbers.items() if not isinstance(value, list)}


@configclass
class ListConfig:
    """`what` to list; `image_size`: list image towers at this resolution instead of each preset's own."""

    what: str
    image_size: int | None = None


@command(app, "list", kind="clipwright.cli:ListConfig", subject="what", metavar="WHAT", output=False)
def list_(call: Call) -> None:
    """List towers, losses, tokenizers, sources, benchmarks, prompts or configs, with their size."""
    kinds = [*REGISTRIES, "prompts", "configs"]
    if call.config not in kinds:
        raise ClipwrightError(
            "E_USAGE",
            "nothing of this name to list",
            where=call.config or "list",
            found=f"there are {', '.join(kinds)}",
            fix=nearest(call.config or "", kinds) or "choose one",
        )
    config: ListConfig = call.load().value
    if config.image_size is not None and config.what != "towers":
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            f"{config.what} have no resolution",
            where=f"image_size: {config.image_size}",
            found="only towers are listed by image_size",
            fix="leave image_size out",
        )
    own = {"prompts": _prompts, "configs": _configs}
    rows = own[config.what]() if config.what in own else _entries(config.what, config.image_size)
    if call.json:
        call.finish(rows)
        return
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys, *([_cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    for line in cells:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _configs() -> list[dict[str, Any]]:
    from clipwright.pipeline.core.config import shipped_configs

    return [
        {"verb": verb, "name": name, "file": path.relative_to(Path(__file__).parent).as_posix()}
        for verb, names in shipped_configs().items()
        for name, path in names.items()
    ]


def _prompts() -> list[dict[str, Any]]:
    from clipwright.eval.prompting import list_prompt_sets

    return list_prompt_sets()


def _entries(kind: str, image_size: int | None) -> list[dict[str, Any]]:
    import importlib

    module, _, names = REGISTRIES[kind].partition(":")
    rows: list[dict[str, Any]] = []
    for name in names.split(","):
        registry = getattr(importlib.import_module(module), name)
        for preset, entry in registry.entries.items():
            row = {"name": preset, "family": entry.family}
            row |= _tower_size(registry, preset, image_size) if kind == "towers" else {"kind": registry.kind}
            error = row.pop("error", None)
            rows.append({**row, "source": entry.source, **({"error": error} if error else {})})
    return rows


def _tower_size(registry: Any, preset: str, image_size: int | None) -> dict[str, Any]:
    """A tower's figures, built on the meta device; null with an `error` where it refuses the image size."""
    import torch

    from clipwright.pipeline.towers.base import TextTowerConfig, parameter_count
    from clipwright.pipeline.towers.count import multiply_adds

    config = registry.preset(preset)
    is_text = issubclass(registry.entry(preset).config, TextTowerConfig)
    if image_size is not None and not is_text:
        config = registry.preset(preset, image_size=image_size)
    row: dict[str, Any] = {"image_size": None if is_text else config.image_size}
    row |= dict.fromkeys(("params_features", "gmacs", "feature_dim"))
    try:
        with torch.device("meta"):
            # A text tower's size depends on its vocabulary: CLIP's is the one listed.
            tower = registry.build(config, vocab_size=49408, eot_id=49407) if is_text else registry.build(config)
    except ClipwrightError as refusal:
        return row | {"error": f"{refusal.found}; {refusal.fix}"}
    return row | {
        "params_features": parameter_count(tower),
        "gmacs": None if is_text else round(multiply_adds(tower) / 1e9, 4),
        "feature_dim": tower.feature_dim,
    }


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if isinstance(value, float) else str(value)


def _config_verb(call: Call) -> str:
    """The verb whose config is asked for: `config show train photos` or `config show index build flat`."""
    verbs = [verb for verb, spec in COMMANDS.items() if spec.kind is not None]
    for words in (call.words[:2], call.words[:1]):
        if " ".join(words) in verbs:
            return " ".join(words)
    word = call.words[0] if call.words else ""
    raise ClipwrightError(
        "E_USAGE",
        "no verb with a config",
        where=word or "config",
        found=f"there are {', '.join(verbs)}",
        fix=nearest(word, verbs) or "name one of them",
    )


@command(config_app, "config show", metavar="VERB [CONFIG]", words=3, output=False)
def config_show(call: Call) -> None:
    """Print the resolved values of a verb's config, each with its origin."""
    from clipwright.pipeline.core.config import resolve

    verb = _config_verb(call)
    rest = call.words[len(verb.split()) :]
    resolved = resolve(
        load_kind(COMMANDS[verb]),
        verb=COMMANDS[verb].configs,
        config=rest[0] if rest else None,
        overrides=call.overrides,
        partial=True,
    )
    call.finish(resolved.tree, resolved.show())


@command(config_app, "config schema", metavar="VERB", words=2, output=False)
def config_schema(call: Call) -> None:
    """Print the JSON schema of a verb's config."""
    import json

    from clipwright.pipeline.core.config import schema

    call.finish(made := schema(load_kind(COMMANDS[_config_verb(call)])), json.dumps(made, indent=1))


def _check_words(words: list[str]) -> None:
    """E_USAGE for a word that is not UTF-8: no config, manifest or status file could hold it."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise ClipwrightError(
                "E_USAGE",
                "a word that is not UTF-8",
                where=ascii(word),
                found="bytes that are no text",
                fix="rename the file or folder, or reach it through a link",
            ) from None


def main() -> None:
    """Runs the command line. DeepSpeed's launcher puts `--local_rank=N` before the verb; it is ignored."""
    if len(sys.argv) > 1 and sys.argv[1].startswith(("--local_rank=", "--local-rank=")):
        del sys.argv[1]
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a name it cannot show ends no command
    try:
        _check_words(sys.argv[1:])
        code = app(standalone_mode=False)
    except ClipwrightError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except typer.TyperException as error:
        verb = " ".join(sys.argv[1:2])
        line = ClipwrightError(
            "E_USAGE",
            "not a command line of clipwright",
            where=verb,
            found=getattr(error, "message", "") or "a verb is missing",
            fix=f"see clipwright {verb} --help"
            if verb in {v.split()[0] for v in COMMANDS}
            else "see clipwright --help",
        )
        print(line, file=sys.stderr)
        code = line.exit_code
    except typer.Abort:
        code = 130
    if any(thread.daemon for thread in threading.enumerate()):
        # One that is inside torch, a checkpoint's writer say, would abort the process when Python takes it down.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # of a reader that has gone
                stream.flush()
        os._exit(code or 0)
    sys.exit(code)
