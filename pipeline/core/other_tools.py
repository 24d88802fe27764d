"""What other tools call things: their flags and model names, and ours.

One table serves the hints in errors and the page docs/coming-from.md, which is the output of
`python -m clipwright.pipeline.core.other_tools`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """A flag, argument or file of another tool, and what to write here."""

    theirs: str
    verb: str
    ours: str = ""
    """A config key of the verb, a key=value, or a flag; empty if there is nothing to set."""
    note: str = ""

    @property
    def key(self) -> str:
        """The config key in `ours`; empty if it names none."""
        return "" if self.ours.startswith("-") else self.ours.partition("=")[0]

    @property
    def names(self) -> set[str]:
        """The normalized names of the flag."""
        return {normalized(name) for name in self.theirs.split(", ")}

    @property
    def advice(self) -> str:
        """What to do, in words."""
        if not self.ours:
            return self.note
        return f"use {self.ours}: {self.note}" if self.note else f"use {self.ours}"


OPEN_CLIP = (
    Flag("--train-data", "train", "data.train", "a dataset folder; `clipwright data index` makes one of your tars"),
    Flag("--train-num-samples", "train", "schedule.samples", "samples over all epochs, not per epoch"),
    Flag("--val-data", "train", "runtime.validation", "a held-out dataset folder"),
    Flag("--epochs", "train", "schedule.samples", "epochs × samples of the dataset; training counts samples"),
    Flag("--batch-size", "train", "schedule.global_batch", "samples per step over all ranks, not per GPU"),
    Flag("--accum-freq", "train", "runtime.micro_batch", "samples per forward pass of a rank; gradients stay exact"),
    Flag("--lr", "train", "optim.lr"),
    Flag("--wd", "train", "optim.weight_decay"),
    Flag("--beta1, --beta2", "train", "optim.betas=[0.9,0.98]", "both in one list"),
    Flag("--eps", "train", "optim.eps"),
    Flag("--momentum", "train", "optim.momentum", "with optim.name=sgd"),
    Flag("--opt", "train", "optim.name", "`clipwright list optimizers`"),
    Flag("--warmup", "train", "schedule.warmup", "in samples, not in steps"),
    Flag("--lr-scheduler", "train", "schedule.name", "`clipwright list schedules`"),
    Flag("--skip-scheduler", "train", "schedule.name=constant"),
    Flag("--lr-cooldown-end", "train", "schedule.final_lr_ratio", "a share of optim.lr"),
    Flag("--grad-clip-norm", "train", "optim.grad_clip_norm", "1.0 by default; 0 does not clip"),
    Flag("--precision", "train", "precision", "auto, bf16 or fp32; amp and fp16 do not exist"),
    Flag("--model", "train", "image.name", "with text.name; the names of models are listed below"),
    Flag("--pretrained", "train", "init_from", "a model folder; `clipwright import` makes one"),
    Flag("--resume", "train", "-o", "the same command with the same -o resumes; init_from=RUN starts a new run"),
    Flag("--logs, --name", "train", "-o", "the run folder holds checkpoints, log and tensorboard"),
    Flag("--report-to", "train", "", "TensorBoard files are always written to the run folder"),
    Flag("--workers", "train", "runtime.workers", "per rank"),
    Flag("--seed", "train", "seed"),
    Flag("--save-frequency", "train", "runtime.save_every", "in steps; also every runtime.save_minutes"),
    Flag("--delete-previous-checkpoint", "train", "runtime.keep", "the newest checkpoints that stay"),
    Flag("--save-most-recent", "train", "runtime.keep", "the newest checkpoints that stay"),
    Flag("--log-every-n-steps", "train", "runtime.log_every"),
    Flag("--val-frequency, --zeroshot-frequency", "train", "runtime.validate_every", "in steps"),
    Flag("--remote-sync", "train", "runtime.copy_to", "s3://… or gs://…"),
    Flag("--siglip", "train", "loss.name=sigmoid"),
    Flag("--loss-dist-impl", "train", "runtime.exchange", "gather or ring"),
    Flag("--local-loss", "train", "", "nothing to set: each rank computes its share of the exact global loss"),
    Flag("--gather-with-grad", "train", "", "nothing to set: gradients are always those of the global batch"),
    Flag("--lock-image", "train", "techniques=[{name: freeze, image: all}]"),
    Flag("--lock-text", "train", "techniques=[{name: freeze, text: all}]"),
    Flag("--lock-image-unlocked-groups", "train", "techniques=[{name: freeze, image: 6}]", "the first blocks, frozen"),
    Flag("--grad-checkpointing", "train", "runtime.activation_checkpointing.image=all", "and the same for text"),
    Flag("--force-image-size", "train", "image.image_size"),
    Flag("--force-quick-gelu", "train", "image.act=quick_gelu", "and text.act"),
    Flag("--image-mean", "train", "preprocessing.mean"),
    Flag("--image-std", "train", "preprocessing.std"),
    Flag("--image-interpolation", "train", "preprocessing.interpolation"),
    Flag("--image-resize-mode", "train", "preprocessing.fit", "crop or squash"),
    Flag("--aug-cfg", "train", "data.augment.scale", "and the other keys of data.augment"),
    Flag("--torchcompile", "train", "runtime.compile=true"),
    Flag("--dataset-type", "train", "", "nothing to set: training reads dataset folders; `clipwright prep` makes them"),
    Flag("--dataset-resampled", "train", "", "nothing to set: no sample repeats within an epoch"),
    Flag("--csv-img-key", "prep", "source.image", "`clipwright prep table`"),
    Flag("--csv-caption-key", "prep", "source.caption", "`clipwright prep table`"),
    Flag("--csv-separator", "prep", "source.delimiter", "`tab` for open_clip's default"),
    Flag("--imagenet-val", "eval", "data", "`clipwright eval zeroshot model=MODEL data=DATASET`"),
)

IMG2DATASET = (
    Flag("--url_list", "prep", "source.path", "a table with image files or bytes; URLs are not downloaded yet"),
    Flag("--caption_col", "prep", "source.caption"),
    Flag("--output_folder", "prep", "-o"),
    Flag("--image_size", "prep", "images.size", "with images.resize=shortest or longest"),
    Flag("--resize_mode", "prep", "images.resize", "keep, shortest or longest"),
    Flag("--encode_format", "prep", "images.format"),
    Flag("--encode_quality", "prep", "images.quality"),
    Flag("--skip_reencode", "prep", "", "nothing to set: images that need no resize keep their bytes"),
    Flag("--processes_count", "prep", "runtime.workers"),
    Flag("--number_sample_per_shard", "prep", "shards.samples"),
    Flag("--save_additional_columns", "prep", "", "nothing to set: all columns of the table are kept"),
    Flag("--incremental_mode", "prep", "", "nothing to set: the same command resumes"),
    Flag("a folder of finished tars", "data index", "data", "`clipwright data index FOLDER` adds sidecars to them"),
)

CLIP_RETRIEVAL = (
    Flag("inference --input_dataset", "embed", "data", "a dataset folder"),
    Flag("inference --clip_model", "embed", "model", "a model folder"),
    Flag("inference --batch_size", "embed", "runtime.batch"),
    Flag("inference --num_prepro_workers", "embed", "runtime.workers"),
    Flag("inference --enable_text, inference --enable_image", "embed", "what", "image or text"),
    Flag("inference --output_partition_count", "embed", "runtime.part", "K/N in each job of an array"),
    Flag("inference --output_folder", "embed", "-o"),
    Flag("index --embeddings_folder", "index build", "embeddings", "an embedding folder"),
    Flag("index --index_folder", "index build", "-o"),
    Flag("index --max_index_memory_usage", "index build", "recipe.name", "`clipwright list recipes`"),
    Flag("query --query", "search", "text", "or image"),
    Flag("query --num_images", "search", "k"),
    Flag("query --indice_folder", "search", "index", "the first argument"),
)

CLIP_BENCHMARK = (
    Flag("eval --task", "eval", "benchmark.name", "the first argument: `clipwright eval zeroshot …`"),
    Flag("eval --model, eval --pretrained", "eval", "model", "a model folder; `clipwright import` makes one"),
    Flag("eval --dataset, eval --dataset_root", "eval", "data", "a dataset folder or parquet files"),
    Flag("eval --split", "eval", "benchmark.where", "such as benchmark.where.split=test"),
    Flag("eval --batch_size", "eval", "runtime.batch"),
    Flag("eval --num_workers", "eval", "runtime.workers"),
    Flag("eval --custom_template_file", "eval", "benchmark.templates", "a .json or .txt file, a shipped set or a list"),
    Flag("eval --custom_classname_file", "eval", "benchmark.classes", "a .json or .txt file, a shipped set or a list"),
    Flag("eval --output", "eval", "-o"),
)

TOOLS = {
    "open_clip": OPEN_CLIP,
    "img2dataset": IMG2DATASET,
    "clip-retrieval": CLIP_RETRIEVAL,
    "CLIP_benchmark": CLIP_BENCHMARK,
}

# Further names from trainers, model configs and habit → key. Only hints use them.
SYNONYMS = {
    "learning_rate": "optim.lr",
    "base_lr": "optim.lr",
    "max_grad_norm": "optim.grad_clip_norm",
    "gradient_clipping": "optim.grad_clip_norm",
    "optimizer": "optim.name",
    "batch": "schedule.global_batch",
    "train_batch_size": "schedule.global_batch",
    "global_batch_size": "schedule.global_batch",
    "per_device_train_batch_size": "runtime.micro_batch",
    "micro_batch_size": "runtime.micro_batch",
    "gradient_accumulation_steps": "runtime.micro_batch",
    "warmup_steps": "schedule.warmup",
    "scheduler": "schedule.name",
    "steps": "schedule.samples",
    "max_steps": "schedule.samples",
    "num_samples": "schedule.samples",
    "num_workers": "runtime.workers",
    "dataloader_num_workers": "runtime.workers",
    "zero_stage": "runtime.zero",
    "save_steps": "runtime.save_every",
    "save_total_limit": "runtime.keep",
    "logging_steps": "runtime.log_every",
    "eval_steps": "runtime.validate_every",
    "val": "runtime.validation",
    "fp16": "precision",
    "bf16": "precision",
    "amp": "precision",
    "dtype": "precision",
    "patch_size": "image.patch",
    "image_patch": "image.patch",
    "img_size": "image.image_size",
    "input_size": "image.image_size",
    "resolution": "image.image_size",
    "hidden_size": "image.dim",
    "layers": "image.depth",
    "num_layers": "image.depth",
    "num_heads": "image.heads",
    "context_length": "text.context",
    "max_length": "text.context",
    "data": "data.train",
    "dataset": "data.train",
    "train": "data.train",
    "loss": "loss.name",
    "tower": "image.name",
    "freeze": "techniques",
    "images": "source.path",
    "table": "source.path",
    "caption_key": "source.caption",
    "captions": "source.caption",
    "image_key": "source.image",
    "samples_per_shard": "shards.samples",
    "output": "-o",
    "output_dir": "-o",
    "out": "-o",
    "top_k": "k",
    "query": "text",
}

# Architecture elsewhere → image tower and text tower here; "" where there is no equal one.
MODELS: dict[str, tuple[str, str]] = {
    "ViT-B-32": ("clip_vit_b32", "clip_text_b"),
    "ViT-B-16": ("clip_vit_b16", "clip_text_b"),
    "ViT-L-14": ("clip_vit_l14", "clip_text_l"),
    "ViT-L-14-336": ("clip_vit_l14_336", "clip_text_l"),
    "RN50": ("clip_rn50", "clip_text_b"),
    "RN101": ("clip_rn101", "clip_text_b"),
    "ViT-H-14": ("", "openclip_text_h"),
    "ViT-bigG-14": ("", "openclip_text_bigg"),
    "ViT-B-16-SigLIP": ("siglip_vit_b16", "siglip_text_b"),
    "ViT-L-16-SigLIP-256": ("siglip_vit_l16", "siglip_text_l"),
    "ViT-SO400M-14-SigLIP": ("siglip_vit_so400m14", "siglip_text_so400m"),
    "openai/clip-vit-base-patch32": ("clip_vit_b32", "clip_text_b"),
    "openai/clip-vit-base-patch16": ("clip_vit_b16", "clip_text_b"),
    "openai/clip-vit-large-patch14": ("clip_vit_l14", "clip_text_l"),
    "openai/clip-vit-large-patch14-336": ("clip_vit_l14_336", "clip_text_l"),
    "google/siglip-base-patch16-224": ("siglip_vit_b16", "siglip_text_b"),
    "google/siglip-large-patch16-256": ("siglip_vit_l16", "siglip_text_l"),
    "google/siglip-so400m-patch14-224": ("siglip_vit_so400m14", "siglip_text_so400m"),
    "vit_base_patch32_clip_224": ("clip_vit_b32", ""),
    "vit_base_patch16_clip_224": ("clip_vit_b16", ""),
    "vit_large_patch14_clip_224": ("clip_vit_l14", ""),
    "vit_large_patch14_clip_336": ("clip_vit_l14_336", ""),
    "vit_base_patch16_siglip_224": ("siglip_vit_b16", ""),
    "vit_so400m_patch14_siglip_224": ("siglip_vit_so400m14", ""),
    "swin_tiny_patch4_window7_224": ("swin_tiny_window7", ""),
    "swin_small_patch4_window7_224": ("swin_small_window7", ""),
    "swin_base_patch4_window7_224": ("swin_base_window7", ""),
    "swin_large_patch4_window7_224": ("swin_large_window7", ""),
    "swin_base_patch4_window12_384": ("swin_base_window12", ""),
    "swin_large_patch4_window12_384": ("swin_large_window12", ""),
    "convmixer_1536_20": ("convmixer_1536_20_k9_p7", ""),
    "convmixer_768_32": ("convmixer_768_32_k7_p7", ""),
    "convmixer_1024_20_ks9_p14": ("convmixer_1024_20_k9_p14", ""),
}


def normalized(name: str) -> str:
    """Returns a flag or key as other names are compared with it: `inference --batch_size` → `batch_size`."""
    return name.rpartition("--")[2].strip().lower().replace("-", "_").replace(".", "_")


def equal_model(name: str, presets: Collection[str]) -> str:
    """Returns the preset among `presets` that is the architecture `name` of open_clip, timm or Hugging Face, or ''."""
    wanted = _normalized_model(name)
    for known, towers in MODELS.items():
        if _normalized_model(known) == wanted:
            return next((tower for tower in towers if tower in presets), "")
    # timm and Hugging Face add owner, size and training data to the name of an architecture.
    stem = re.sub(r"_(224|256|288|336|384)$", "", wanted)
    return stem if stem in presets else ""


def _normalized_model(name: str) -> str:
    """`timm/vit_base_patch16_224.augreg_in21k` → `vit_base_patch16_224`; tags of training data are left out."""
    stem = name if re.match(r"(ViT|RN)[-\d]?[A-Za-z\d]*/", name) else name.rpartition("/")[2]
    stem = re.sub(r"^CLIP-(?=ViT-)", "", stem)
    tags = r"[-_.](laion|quickgelu|openai|webli|datacomp|augreg|commonpool|metaclip|dfn).*"
    stem = re.sub(tags, "", stem, flags=re.IGNORECASE)
    stem = stem.partition(".")[0]
    return re.sub(r"[-/@.]", "_", stem).lower().replace("_336px", "_336")


def page() -> str:
    """Returns the page docs/coming-from.md."""
    lines = [
        "# Coming from open_clip, img2dataset, clip-retrieval, CLIP_benchmark",
        "",
        "Their flag or file, and what to write here. Settings are keys of a config, written `key=value`; all of them",
        "stand in [configs](configs.md). An unknown key or flag names ours.",
        "",
        "This page is the output of `python -m clipwright.pipeline.core.other_tools`.",
    ]
    for tool, flags in TOOLS.items():
        lines += ["", f"## {tool}", "", "| theirs | command | ours | note |", "|---|---|---|---|"]
        for flag in flags:
            theirs = ", ".join(f"`{name}`" if "--" in name else name for name in flag.theirs.split(", "))
            ours = f"`{flag.ours}`" if flag.ours else "–"
            lines.append(f"| {theirs} | `{flag.verb}` | {ours} | {flag.note} |")
    lines += [
        "",
        "## Models",
        "",
        "The same layers and widths under another name. open_clip's models without `-quickgelu` use GELU: add",
        "`image.act=gelu text.act=gelu`. `clipwright import` converts trained weights.",
        "",
        "| theirs | `image.name` | `text.name` |",
        "|---|---|---|",
    ]
    for name, towers in MODELS.items():
        cells = [f"`{tower}`" if tower else "–" for tower in towers]
        lines.append(f"| `{name}` | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
