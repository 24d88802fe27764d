"""`clipwright import DIR -o MODEL`: a foreign model becomes a model folder with a parity receipt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipwright.pipeline.core.activity import Progress
from clipwright.pipeline.core.command import Call, Outcome
from clipwright.pipeline.core.files import write_json
from clipwright.pipeline.core.messages import command_line, format_count
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.folders import output
from clipwright.pipeline.folders.records import MANIFEST, file_entries
from clipwright.pipeline.interop.formats.base import ForeignModel, open_foreign_model
from clipwright.pipeline.interop.parity import compare
from clipwright.pipeline.model.folder import load_model, resolve_model_config, save_model
from clipwright.pipeline.model.two_tower import ModelConfig
from clipwright.pipeline.tokenizers.base import Tokenizer

PARITY = "parity.json"


@configclass
class ImportConfig:
    """The model to import; `clipwright list formats` shows the formats."""

    folder: str
    """Folder of the foreign model, for transformers as `save_pretrained` writes it."""


def import_model(call: Call) -> Outcome:
    """Runs `clipwright import DIR -o MODEL`."""
    config: ImportConfig = call.load().value
    out = call.output().absolute()
    output.check(out, output.MODEL)
    foreign = open_foreign_model(Path(config.folder))
    tree, tokenizer = foreign.model_config()
    model_config = resolve_model_config(tree, foreign.folder)
    tensors = len(foreign.tensor_shapes())
    if call.dry_run:
        result = {"folder": str(foreign.folder), "tensors": tensors, "model": str(call.out)}
        return Outcome(
            result, f"would import the {foreign.kind} in {foreign.folder} ({format_count(tensors, 'tensor')}) to {out}"
        )
    with output.claim(out, output.MODEL), output.staging(out) as staged:
        with Progress("import", 2, "pass", plural="passes", quiet=call.quiet) as progress:
            manifest, loss = _write(staged, foreign, tree, model_config, tokenizer)
            progress.add(1)
            receipt = compare(foreign, load_model(staged, device="cpu"), loss)
            progress.add(1)
        write_json(staged / PARITY, receipt)
        manifest["files"] |= file_entries(staged, [PARITY])
        write_json(staged / MANIFEST, manifest)
    differences = ", ".join(f"{name} {receipt[name]['max_abs']:.1e}" for name in ("images", "texts", "logits"))
    return Outcome(
        {"model": str(call.out), "fingerprint": manifest["fingerprint"], "parity": receipt},
        f"imported the {foreign.kind} in {foreign.folder} to {call.out}; largest differences: {differences}",
        next=command_line("eval", "retrieval", f"model={call.out}", "data=DATASET"),
    )


def _write(
    staged: Path, foreign: ForeignModel, tree: dict[str, Any], model_config: ModelConfig, tokenizer: Tokenizer
) -> tuple[dict[str, Any], dict[str, float]]:
    """Writes the model folder; returns its manifest, and the loss's scale and bias."""
    weights = foreign.weights(model_config, tokenizer.vocab_size)
    made_from = {"format": f"{foreign.library} {foreign.kind}", "source": foreign.fingerprint}
    manifest = save_model(
        staged,
        config={**tree, "loss": {"name": foreign.loss}},
        weights=weights,
        tokenizer=tokenizer,
        made_from=made_from,
        card=_model_card(foreign, tree),
    )
    loss = {"scale": weights["loss.logit_scale"].exp().item()}
    if "loss.bias" in weights:
        loss["bias"] = weights["loss.bias"].item()
    return manifest, loss


def _model_card(foreign: ForeignModel, tree: dict[str, Any]) -> str:
    image, text = tree["image"], tree["text"]
    return (
        "# A two-tower image-text model\n\n"
        f"- image tower: {image['name']} at {image['image_size']} px\n"
        f"- text tower: {text['name']}, context {text['context']}, tokenizer {tree['tokenizer']['name']}\n"
        f"- embedding: {format_count(tree['embed_dim'], 'dimension')}, unit length\n"
        f"- imported from a {foreign.kind} of {foreign.library}, fingerprint {foreign.fingerprint}\n"
        f"- differences from its source: {PARITY}\n\n"
        "Made by clipwright. Open it with `clipwright.load_model(folder)`. The weights are their authors' work: the "
        "license, the training data and its biases apply here too.\n"
    )
