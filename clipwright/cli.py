"""The front door: mounts the commands of each part. The only file that imports all three parts."""

from __future__ import annotations

import importlib.metadata
import io
import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from clipwright.data_prep.cli import app as data_prep_app
from clipwright.eval.cli import app as eval_app
from clipwright.pipeline.cli import SCORE
from clipwright.pipeline.cli import app as pipeline_app
from clipwright.pipeline.core import command
from clipwright.pipeline.core.command import COMMANDS, Call, Command, Outcome, Preempted, load_name, print_error
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import command_line, format_count
from clipwright.pipeline.core.nearest import nearest
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.core.status import INTERRUPTED, STOPPED, stop_error
from clipwright.pipeline.core.usage import check_verb, flag_error, verb_of

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Raw image-text pairs to shards, a trained two-tower model, scores, an index and search.",
    epilog="Exit codes: 0 done · 1 failed, or a gate failed · 2 config or command line · 3 input refused · "
    "85 stopped by a signal with state saved · 130 Ctrl-C. Help on a command: clipwright help COMMAND. "
    "Version: clipwright --version. Start with: clipwright demo",
)
for part_app in (data_prep_app, pipeline_app, eval_app):
    app.registered_commands += part_app.registered_commands
    for group in part_app.registered_groups:
        same = next((known for known in app.registered_groups if known.name == group.name), None)
        if same is None or same.typer_instance is None or group.typer_instance is None:
            app.registered_groups.append(group)
        else:  # several parts have commands in this group
            same.typer_instance.registered_commands += group.typer_instance.registered_commands
SCORE.append("clipwright.eval.benchmarks.retrieval:score")
config_app = typer.Typer(no_args_is_help=True, help="Resolved configs, their JSON schema and their reference.")
app.add_typer(config_app, name="config")

# What `list` shows → MODULE:REGISTRY of each registry in it.
REGISTRIES = {
    "towers": ("clipwright.pipeline.towers.base:IMAGE_TOWERS", "clipwright.pipeline.towers.base:TEXT_TOWERS"),
    "losses": ("clipwright.pipeline.losses.base:LOSSES",),
    "optimizers": ("clipwright.pipeline.train.optimizers.base:OPTIMIZERS",),
    "schedules": ("clipwright.pipeline.train.schedules.base:SCHEDULES",),
    "techniques": ("clipwright.pipeline.train.techniques.base:TECHNIQUES",),
    "tokenizers": ("clipwright.pipeline.tokenizers.base:TOKENIZERS",),
    "sources": ("clipwright.data_prep.sources.base:SOURCES",),
    "benchmarks": ("clipwright.eval.benchmarks.base:BENCHMARKS",),
    "recipes": ("clipwright.eval.search.recipes.base:RECIPES",),
    "formats": ("clipwright.pipeline.interop.formats.base:FORMATS",),
}


@configclass
class DemoConfig:
    """The demo: its seed and its steps."""

    seed: int
    """Seed of data, held-out combinations and training, `{seed}` in a step."""
    steps: dict[str, str]
    """Step name → clipwright command line; `{demo}` is the output folder, `{seed}` the seed."""


@Command(
    app,
    "demo",
    kind="clipwright.cli:DemoConfig",
    resumes=True,
    flags=("-o", "--dry-run", "--fresh"),
    default_out="demo",
    examples=("clipwright demo", "clipwright demo --dry-run"),
)
def demo(call: Call) -> Outcome:
    """Run every stage on rendered images, on a CPU, in minutes; ends with a report and a search."""
    from clipwright.pipeline.core.config_files import read_yaml
    from clipwright.pipeline.folders import output

    out = call.output()
    resolved = call.load(base=read_yaml(Path(__file__).parent / "configs" / "demo.yaml"))
    if call.dry_run:
        output.check(out, output.DEMO)
        return _run_demo(call, resolved)
    with output.claim(out, output.DEMO):
        return _run_demo(call, resolved)


def _run_demo(call: Call, resolved: Any) -> Outcome:
    """Runs the steps one after another and writes their results; with --dry-run, prints them."""
    import time

    from clipwright.eval.intervals import format_interval
    from clipwright.pipeline.core import activity
    from clipwright.pipeline.core.files import atomic_write, write_json
    from clipwright.pipeline.page.render import percent

    out, config = call.output(), resolved.value
    report: dict[str, Any] = {}
    lines: list[str] = []
    for number, (name, line) in enumerate(config.steps.items(), 1):
        arguments = [argument.format(demo=out, seed=config.seed) for argument in shlex.split(line)]
        step = f"{number}/{len(config.steps)} {name}: clipwright {shlex.join(arguments)}"
        lines.append(step)
        if call.dry_run:
            continue
        call.say(step)
        activity.hide()
        if call.quiet:
            arguments.append("--quiet")
        if call.fresh and COMMANDS[verb_of(arguments, COMMANDS)].supports("--fresh"):
            arguments.append("--fresh")
        started = time.monotonic()
        exit_code, result = _run_step(arguments)
        if exit_code:
            return Outcome(result, exit_code=exit_code)  # the step has printed its error
        report[name] = {**result, "seconds": round(time.monotonic() - started, 1)}
        if number == 1:  # the first step refuses a folder of another demo
            atomic_write(out / "config.yaml", resolved.yaml())
    if call.dry_run:
        return Outcome({"steps": lines}, "\n".join(lines))
    report["seconds"] = round(sum(step["seconds"] for step in report.values()), 1)
    write_json(out / "report.json", report)
    zeroshot, search = report["zeroshot"], report["search"]
    n = zeroshot["n"]
    text = (
        f"zero-shot on {format_count(n, 'new image')}: {format_interval(zeroshot['top1'], n)} correct, chance "
        f"{percent(zeroshot['chance'])}\n"
        f"shape: {format_interval(zeroshot['shape_top1'], n)} correct, {percent(zeroshot['shape_chance'])} if only "
        "the color were known\n"
        f"search, mean precision over {format_count(search['n'], 'query', 'queries')}: "
        f"{percent(search['mean_precision_at_10'])}, chance {percent(search['chance'])}; “{search['query']}”: "
        f"{search['hits_right']} of the first {format_count(search['k'], 'hit')} correct\n"
        f"a smoke test on toy images, not a useful model\npage {report['report']['page']}"
    )
    text = text.replace("\N{NO-BREAK SPACE}", " ")
    return Outcome(report, text, next=command_line("search", out / "index", f"text={search['query']}"))


def _run_step(arguments: list[str]) -> tuple[int, dict[str, Any]]:
    """Runs a command line in its own process, as a user would; returns exit code and JSON result without its lists."""
    import json
    import subprocess

    command_line = [sys.executable, "-m", "clipwright", *arguments, "--json"]
    child = subprocess.Popen(command_line, stdout=subprocess.PIPE, text=True)
    try:
        printed, _ = child.communicate()
    except (KeyboardInterrupt, Preempted) as stop:
        if isinstance(stop, Preempted):
            child.terminate()  # Ctrl-C has already reached the complete foreground group
        child.communicate()  # wait until it has saved its state
        raise
    result: dict[str, Any] = json.loads(printed) if printed else {}
    if child.returncode:
        return child.returncode, result
    if "benchmark" in result:
        result = result[result["benchmark"]]
    return 0, {name: value for name, value in result.items() if not isinstance(value, list)}


@configclass
class ListConfig:
    """What to list."""

    what: str
    """What to list: a kind of registry such as towers, losses or optimizers, or prompts or configs."""
    image_size: int | None = None
    """Image size in pixels at which image towers are measured; null: the default of each preset."""


@Command(
    app,
    "list",
    kind="clipwright.cli:ListConfig",
    subject="what",
    metavar="WHAT",
    examples=("clipwright list towers image_size=224", "clipwright list configs --json"),
)
def list_(call: Call) -> Outcome:
    """List towers, losses, optimizers, schedules, techniques, tokenizers, sources, benchmarks, recipes and more."""
    from clipwright.pipeline.core.tables import align

    kinds = [*REGISTRIES, "prompts", "configs"]
    if call.config not in kinds:
        raise ClipwrightError(
            "E_USAGE",
            "there is nothing of this name to list",
            where=f"clipwright list {call.config or ''}",
            allowed=f"choose from {', '.join(kinds)}",
            fix=nearest(call.config or "", kinds) or "name one of them",
        )
    resolved = call.load()
    config: ListConfig = resolved.value
    if config.image_size is not None and config.what != "towers":
        raise ClipwrightError(
            "E_CONFIG_VALUE",
            f"image_size applies to towers only, not to {config.what}",
            where=f"image_size: {config.image_size}",
            fix="leave image_size out",
        )
    if config.what == "prompts":
        rows = _prompts()
    elif config.what == "configs":
        rows = _configs()
    elif config.what != "towers" and not resolved.plugins:
        rows = _outlined_entries(config.what)
    else:
        rows = _entries(config.what, config.image_size)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys, *([_cell(row.get(key)) for key in keys] for row in rows)]
    return Outcome({config.what: rows}, align(cells, left=len(keys)))


def _configs() -> list[dict[str, Any]]:
    from clipwright.pipeline.core.config_files import shipped_configs

    return [
        {"verb": verb, "name": name, "file": path.relative_to(Path(__file__).parent).as_posix()}
        for verb, names in shipped_configs().items()
        for name, path in names.items()
    ]


def _prompts() -> list[dict[str, Any]]:
    from clipwright.eval.prompting import list_prompt_sets

    return list_prompt_sets()


def _entries(kind: str, image_size: int | None) -> list[dict[str, Any]]:
    """Returns one row per preset of a kind of registry."""
    from clipwright.pipeline.core.activity import phase

    rows: list[dict[str, Any]] = []
    phase(f"reading the {kind}")
    for name in REGISTRIES[kind]:
        registry = load_name(name)
        for preset, entry in registry.entries.items():
            row: dict[str, Any] = {"name": preset, "family": entry.family}
            size = _tower_size(registry, preset, image_size) if kind == "towers" else {"kind": registry.kind}
            error = size.pop("error", None)
            row.update(size)
            row["source"] = entry.source
            if error is not None:
                row["error"] = error
            rows.append(row)
    return rows


def _outlined_entries(kind: str) -> list[dict[str, Any]]:
    """Returns the rows of `_entries` of a kind whose presets are not measured, without importing it."""
    from clipwright.pipeline.core import outline

    registries = [outline.registry(name) for name in REGISTRIES[kind]]
    return [
        {"name": preset, "family": family.family, "kind": registry.kind, "source": family.source}
        for registry in registries
        for family in registry.families
        for preset in family.presets
    ]


def _tower_size(registry: Any, preset: str, image_size: int | None) -> dict[str, Any]:
    """Returns a tower's size, built on the meta device; null with an `error` if it refuses the image size."""
    import torch

    from clipwright.pipeline.towers.base import TextTowerConfig, parameter_count
    from clipwright.pipeline.towers.count import multiply_adds

    config = registry.preset(preset)
    is_text = issubclass(registry.entry(preset).config, TextTowerConfig)
    if image_size is not None and not is_text:
        config = registry.preset(preset, image_size=image_size)
    row: dict[str, Any] = {
        "image_size": None if is_text else config.image_size,
        "params_features": None,
        "gmacs": None,
        "feature_dim": None,
    }
    try:
        with torch.device("meta"):
            # A text tower's size depends on its vocabulary: CLIP's is assumed.
            tower = registry.build(config, vocab_size=49408, eot_id=49407) if is_text else registry.build(config)
    except ClipwrightError as refusal:
        row["error"] = "; ".join(part for part in (refusal.found, refusal.fix) if part)
        return row
    row["params_features"] = parameter_count(tower)
    row["gmacs"] = None if is_text else round(multiply_adds(tower) / 1e9, 4)
    row["feature_dim"] = tower.feature_dim
    return row


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _config_verb(call: Call) -> str:
    """Returns the verb whose config is requested: `config show train photos` or `config show index build flat`."""
    verbs = [verb for verb, spec in COMMANDS.items() if spec.kind is not None]
    for count in (2, 1):
        verb = " ".join(call.arguments[:count])
        if verb in verbs:
            return verb
    name = call.config or ""
    raise ClipwrightError(
        "E_USAGE",
        "a verb with a config is required",
        where=name or f"clipwright {call.command.verb}",
        allowed=f"choose from {', '.join(verbs)}",
        fix=nearest(name, verbs) or "name one of them",
    )


@Command(
    config_app,
    "config show",
    metavar="VERB [CONFIG]",
    max_arguments=3,
    examples=("clipwright config show train photos image.name=swin_nano", "clipwright config show index build flat"),
)
def config_show(call: Call) -> Outcome:
    """Print the resolved values of a verb's config, each with its origin."""
    verb = _config_verb(call)
    shown = COMMANDS[verb].call([*call.arguments[len(verb.split()) :], *call.overrides])
    shown.check()
    resolved = shown.load(partial=True)
    return Outcome(resolved.tree, resolved.show())


@Command(
    config_app,
    "config schema",
    metavar="VERB",
    max_arguments=2,
    takes_overrides=False,
    examples=("clipwright config schema train > train.schema.json",),
)
def config_schema(call: Call) -> Outcome:
    """Print the JSON schema of a verb's config, for editors."""
    import json

    from clipwright.pipeline.core.config import schema

    result = schema(COMMANDS[_config_verb(call)].load_kind())
    return Outcome(result, json.dumps(result, indent=1))


@Command(
    config_app,
    "config reference",
    max_arguments=0,
    takes_overrides=False,
    metavar="",
    examples=("clipwright config reference > configs.md",),
)
def config_reference(call: Call) -> Outcome:
    """Print the reference of all config keys, with type, default and meaning, as Markdown."""
    from clipwright.pipeline.core.reference import reference

    text = reference(COMMANDS)
    return Outcome({"markdown": text}, text.rstrip("\n"))


def _check_utf8(arguments: list[str]) -> None:
    """Raises E_USAGE for an argument that is not UTF-8: no config, manifest or status file could store it."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ClipwrightError(
                "E_USAGE",
                "an argument is not valid UTF-8",
                where=ascii(argument),
                fix="rename the file or folder, or use a link with another name",
            ) from None


def _usage_error(error: typer.TyperException) -> ClipwrightError:
    """Returns E_USAGE for what typer refuses: a flag that does not exist, a flag without its value."""
    flag = getattr(error, "option_name", "")
    verb = verb_of(sys.argv[1:], COMMANDS) or " ".join(word for word in sys.argv[1:2] if not word.startswith("-"))
    if flag and not hasattr(error, "param") and "No such option" in str(error):
        return flag_error(flag, sys.argv[1:], COMMANDS)
    place = f"clipwright {verb}".strip()
    return ClipwrightError(
        "E_USAGE",
        "the command line is malformed",
        where=place,
        found=getattr(error, "message", "") or "a verb is missing",
        fix=f"see {place} --help",
    )


def main(early_signals: Sequence[int] = ()) -> None:
    """Runs the command line. DeepSpeed's launcher puts `--local_rank=N` before the verb; it is ignored.

    early_signals: stop signals that arrived before: the command stops as soon as it can.
    """
    command.early_signals = early_signals
    if len(sys.argv) > 1 and sys.argv[1].startswith(("--local_rank=", "--local-rank=")):
        del sys.argv[1]
    if sys.argv[1:] == ["--version"]:
        print(f"clipwright {importlib.metadata.version('clipwright')}")
        return
    if sys.argv[1:2] in ([], ["help"]):  # `clipwright help index build` is `clipwright index build --help`
        sys.argv[1:] = [*sys.argv[2:], "--help"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # like stderr: an unprintable name must not end a command
    try:
        _check_utf8(sys.argv[1:])
        check_verb(sys.argv[1:], COMMANDS)
        code = app(prog_name="clipwright", standalone_mode=False)
    except ClipwrightError as error:
        print_error(error, as_json="--json" in sys.argv)
        code = error.exit_code
    except typer.TyperException as error:
        line = _usage_error(error)
        print_error(line, as_json="--json" in sys.argv)
        code = line.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
        print_error(stop_error(code, "run the same command again"), as_json="--json" in sys.argv)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from now on Ctrl-C ends the process without a traceback
    if code in STOPPED or any(thread.daemon for thread in threading.enumerate()):
        # After a signal that interrupted an import, Python may end itself by SIGINT instead of with this exit code, or
        # fail to clean up. A daemon thread inside torch, such as a checkpoint writer, would abort the process when the
        # interpreter ends.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # the reader has gone
                stream.flush()
        os._exit(code or 0)
    sys.exit(code)
