"""A run's checkpoint as a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from clipwright.pipeline.core.activity import Progress
from clipwright.pipeline.core.command import Call, Outcome
from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import digest
from clipwright.pipeline.core.messages import command_line, format_count
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.folders import output
from clipwright.pipeline.folders.describe import describe, wrong_kind
from clipwright.pipeline.model.folder import load_model, save_model
from clipwright.pipeline.train import run_folder
from clipwright.pipeline.train.checkpoints import checkpoint
from clipwright.pipeline.train.config import RunConfig, model_tree, stored_tokenizer
from clipwright.pipeline.train.techniques.base import build_techniques


@configclass
class ExportConfig:
    """Which checkpoint to export, and to which format."""

    run: str
    """Run folder."""
    to: Literal["safetensors"] = "safetensors"
    """Format of the model folder."""
    step: int | None = None
    """Step of the checkpoint; by default the newest."""


def export(call: Call) -> Outcome:
    """Runs `clipwright export RUN -o MODEL`."""
    config: ExportConfig = call.load().value
    run, out = Path(config.run), call.output().absolute()
    tree = run_folder.stored_tree(run)
    if tree is None or describe(run).kind != "run":
        raise wrong_kind(run, "run")
    found = checkpoint.newest(run, config.step)
    if found is None:
        raise ClipwrightError(
            "E_CKPT_NONE",
            "the run has no checkpoint yet",
            where=run,
            found="none was saved",
            fix="resume training, then export",
        )
    output.check(out, output.MODEL)
    if call.dry_run:
        result = {"run": str(run), "step": found.step, "model": str(call.out)}
        return Outcome(result, f"would export step {found.step} of {run} to {out}")
    run_config = resolve(RunConfig, base=tree).value
    techniques = build_techniques(run_config.techniques)
    found.restore_techniques(techniques)
    weights = techniques.export(found.weights())
    for name, tensor in found.loss().items():
        weights[f"loss.{name}"] = tensor
    made_from: dict[str, Any] = {
        "dataset": found.manifest["identity"]["data"]["train"],
        "run": digest(found.manifest["identity"]),
        "samples": found.step * run_config.schedule.global_batch,
    }
    plugins = found.manifest["identity"].get("plugins", [])
    if plugins:
        made_from["plugins"] = plugins
    with (
        output.claim(out, output.MODEL),
        output.staging(out) as staged,
        Progress("export", 2, "pass", plural="passes", quiet=call.quiet) as progress,
    ):
        manifest = save_model(
            staged,
            config=model_tree(tree),
            weights=weights,
            tokenizer=stored_tokenizer(run_config.tokenizer, run),
            made_from=made_from,
            card=_card(tree, made_from, found.manifest["accepted"]),
        )
        progress.add(1)
        load_model(staged, device="cpu")  # verified before it is published
        progress.add(1)
    result = {"model": str(call.out), "fingerprint": manifest["fingerprint"], "step": found.step, **made_from}
    return Outcome(
        result,
        f"exported step {found.step} to {call.out}",
        next=command_line("eval", "retrieval", f"model={call.out}", "data=DATASET"),
    )


def _card(tree: dict[str, Any], made_from: dict[str, Any], accepted: list[dict[str, Any]]) -> str:
    """Returns the text of the model card."""
    image, text = tree["image"], tree["text"]
    changes = "".join(
        f"- config changed after step {change['step']:,}: {'; '.join(change['changed'])}\n" for change in accepted
    )
    plugins = "".join(
        f"- plugin {plugin['name']}, SHA-256 {plugin['sha256']}: commands that read this model need plugins="
        f"{plugin['name']} with its path; in Python, import the file before `load_model`\n"
        for plugin in made_from.get("plugins", [])
    )
    return (
        "# A two-tower image-text model\n\n"
        f"- image tower: {image['name']} at {image['image_size']} px\n"
        f"- text tower: {text['name']}, context {text['context']}, tokenizer {tree['tokenizer']['name']}\n"
        f"- embedding: {format_count(tree['embed_dim'], 'number')}, unit length\n"
        f"- trained on {format_count(made_from['samples'], 'sample')} of the dataset with fingerprint "
        f"{made_from['dataset']}\n"
        f"{plugins}{changes}\n"
        "Made by clipwright. Open it with `clipwright.load_model(folder)`. The model knows only what its training data "
        "showed, including its biases; test it on your own data before you rely on it.\n"
    )
