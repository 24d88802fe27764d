"""A run's checkpoint as a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from clipwright.pipeline.core.command import Call, Outcome
from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import digest
from clipwright.pipeline.core.log import Progress
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.folders import output
from clipwright.pipeline.model.folder import load_model, save_model
from clipwright.pipeline.train import run_folder
from clipwright.pipeline.train.checkpoints import checkpoint
from clipwright.pipeline.train.config import RunConfig, model_tree, stored_tokenizer


@configclass
class ExportConfig:
    """Which run, which step (the newest by default), and to which form."""

    run: str
    to: Literal["safetensors"] = "safetensors"
    step: int | None = None


def export(call: Call) -> Outcome:
    """Runs `clipwright export RUN -o MODEL`."""
    config: ExportConfig = call.load().value
    run, out = Path(config.run), call.output().absolute()
    tree = run_folder.stored_tree(run)
    if tree is None:
        raise ClipwrightError(
            "E_INPUT", "not a run folder", where=run, found="no config.yaml", fix="give the -o folder of `train`"
        )
    found = checkpoint.newest(run, config.step)
    if found is None:
        raise ClipwrightError(
            "E_CKPT_NONE",
            "a run without checkpoint",
            where=run,
            found="none was saved yet",
            fix="train on, then export",
        )
    output.check(out, output.MODEL)
    if call.dry_run:
        result = {"run": str(run), "step": found.step, "model": str(call.out)}
        return Outcome(result, f"would export step {found.step} of {run} to {out}")
    run_config = resolve(RunConfig, base=tree).value
    loss = {f"loss.{k}": v for k, v in found.loss().items() if not k.startswith("optimizer.")}
    made_from = {
        "dataset": found.manifest["identity"]["data"]["train"],
        "run": digest(found.manifest["identity"]),
        "samples": found.step * run_config.schedule.global_batch,
    }
    with output.staging(out) as staged, Progress("export", 2, "passes", quiet=call.quiet) as progress:
        manifest = save_model(
            staged,
            config=model_tree(tree),
            weights={**found.weights(), **loss},
            tokenizer=stored_tokenizer(run_config.tokenizer, run),
            made_from=made_from,
            card=_card(tree, made_from, found.manifest["accepted"]),
        )
        progress.add(1)
        load_model(staged, device="cpu")  # what is announced has been read back
        progress.add(1)
    result = {"model": str(call.out), "fingerprint": manifest["fingerprint"], "step": found.step, **made_from}
    return Outcome(
        result,
        f"exported step {found.step} to {call.out}",
        next=f"clipwright eval retrieval model={call.out} data=DATASET",
    )


def _card(tree: dict[str, Any], made_from: dict[str, Any], accepted: list[dict[str, Any]]) -> str:
    image, text = tree["image"], tree["text"]
    changed = "".join(f"- changed behind step {one['step']:,}: {'; '.join(one['changed'])}\n" for one in accepted)
    return (
        "# A two-tower image-text model\n\n"
        f"- image tower: {image['name']} at {image['image_size']} px\n"
        f"- text tower: {text['name']}, context {text['context']}, tokenizer {tree['tokenizer']['name']}\n"
        f"- embedding: {tree['embed_dim']} numbers, unit length\n"
        f"- trained on {made_from['samples']:,} samples of the dataset with fingerprint {made_from['dataset']}\n"
        f"{changed}\n"
        "Made by clipwright. Open it with `clipwright.load_model(folder)`. It knows what its training data showed it, "
        "biases included; test it on your own data before you rely on it.\n"
    )
