"""Published weights as a model folder: `clipwright import DIR -o MODEL`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from clipwright.pipeline.core.command import Call
from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import write_json
from clipwright.pipeline.core.log import Progress, quiet_libraries
from clipwright.pipeline.core.registry import configclass
from clipwright.pipeline.folders.records import MANIFEST, file_entries
from clipwright.pipeline.interop import towers
from clipwright.pipeline.interop.parity import compare
from clipwright.pipeline.interop.preprocessing import preprocessing_fields
from clipwright.pipeline.interop.source import KINDS, Source, open_source, read_tensors
from clipwright.pipeline.interop.tokenizer import open_theirs, take_tokenizer
from clipwright.pipeline.model.folder import check_output, load_model, publish, save_model
from clipwright.pipeline.model.two_tower import ModelConfig
from clipwright.pipeline.tokenizers.base import Tokenizer

PARITY = "parity.json"
LOSSES = {"clip": "softmax", "siglip": "sigmoid"}


@configclass
class ImportConfig:
    """`folder`: what `save_pretrained` of transformers wrote, a CLIPModel or SiglipModel with its processor."""

    folder: str


def import_model(call: Call) -> None:
    """Runs `clipwright import DIR -o MODEL`."""
    quiet_libraries()
    config: ImportConfig = call.load().value
    out = call.output().absolute()
    check_output(out)
    source = open_source(Path(config.folder))
    tree, theirs, tokenizer = model_tree(source)
    wanted = towers.wanted_shapes(source)
    if call.dry_run:
        call.say(f"would import the {KINDS[source.kind]} in {source.folder}, {len(wanted)} tensors, to {out}")
        return
    staged = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        with Progress("import", 2, "passes", quiet=call.quiet) as progress:
            manifest, logit = _write(staged, source, tree, tokenizer, wanted)
            progress.add(1)
            receipt = compare(source, theirs, load_model(staged, device="cpu"), logit)
            progress.add(1)
        write_json(staged / PARITY, receipt)
        manifest["files"] |= file_entries(staged, [PARITY])
        write_json(staged / MANIFEST, manifest)
        publish(staged, out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    apart = ", ".join(f"{name} {receipt[name]['max_abs']:.1e}" for name in ("images", "texts", "logits"))
    call.finish(
        {"model": str(call.out), "fingerprint": manifest["fingerprint"], "parity": receipt},
        f"imported the {KINDS[source.kind]} in {source.folder} to {call.out}; from its source apart at most: {apart}",
        then=f"clipwright eval retrieval model={call.out} data=DATASET",
    )


def model_tree(source: Source) -> tuple[dict[str, Any], Any, Tokenizer]:
    """The config of the model folder, and the tokenizer, as theirs and as ours."""
    # The tokenizer last: opening it takes the longest.
    image, width = towers.image_fields(source), towers.embed_dim(source)
    preprocessing = preprocessing_fields(source, towers.image_size(source))
    theirs = open_theirs(source)
    words, tokenizer = take_tokenizer(source, theirs)
    tree = {
        "image": image,
        "text": towers.text_fields(source, tokenizer),
        "tokenizer": words,
        "embed_dim": width,
        "preprocessing": preprocessing,
    }
    try:
        resolve(ModelConfig, base=tree)
    except ClipwrightError as error:
        place = f"{source.folder}: {error.where}"
        raise ClipwrightError(error.code, error.what, where=place, found=error.found, fix=error.fix) from None
    return {**tree, "loss": {"name": LOSSES[source.kind]}}, theirs, tokenizer


def _write(
    staged: Path, source: Source, tree: dict[str, Any], tokenizer: Tokenizer, wanted: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Writes the model folder; its manifest, and the loss's scale and bias."""
    weights = towers.convert(source, read_tensors(source, wanted), tokenizer.vocab_size)
    made_from = {"format": f"transformers {KINDS[source.kind]}", "source": source.fingerprint}
    card = _card(source, tree, made_from)
    manifest = save_model(staged, config=tree, weights=weights, tokenizer=tokenizer, made_from=made_from, card=card)
    logit = {"scale": weights["loss.logit_scale"].exp().item()}
    if "loss.bias" in weights:
        logit["bias"] = weights["loss.bias"].item()
    return manifest, logit


def _card(source: Source, tree: dict[str, Any], made_from: dict[str, Any]) -> str:
    image, text = tree["image"], tree["text"]
    return (
        "# A two-tower image-text model\n\n"
        f"- image tower: {image['name']} at {image['image_size']} px\n"
        f"- text tower: {text['name']}, context {text['context']}, tokenizer {tree['tokenizer']['name']}\n"
        f"- embedding: {tree['embed_dim']} numbers, unit length\n"
        f"- imported from a {KINDS[source.kind]} folder of transformers, fingerprint {made_from['source']}\n"
        f"- how far it is from its source: {PARITY}\n\n"
        "Made by clipwright. Open it with `clipwright.load_model(folder)`. The weights are their authors': their "
        "licence, their training data and its biases hold here too.\n"
    )
