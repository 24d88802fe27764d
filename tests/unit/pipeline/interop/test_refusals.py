"""Folders that cannot be imported: each error names the key, the expected and the actual value, and nothing is left."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Change = Callable[[Path], object]
CONFIG, PREPROCESSOR, TOKENIZER_CONFIG = "config.json", "preprocessor_config.json", "tokenizer_config.json"
HEAD = "vision_model.head.attention.in_proj_weight"
TABLE = "vision_model.embeddings.position_embedding.weight"


def state(file: str, **keys: Any) -> Change:
    """Sets keys (`section__key`) of a JSON file; `...` removes the key."""

    def change(folder: Path) -> None:
        tree = json.loads((folder / file).read_text())
        for key, value in keys.items():
            *path, last = key.split("__")
            node = tree
            for part in path:
                node = node[part]
            if value is ...:
                del node[last]
            else:
                node[last] = value
        (folder / file).write_text(json.dumps(tree))

    return change


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def write(file: str, data: bytes | str) -> Change:
    return lambda folder: (folder / file).write_bytes(data if isinstance(data, bytes) else data.encode())


def remove(*files: str) -> Change:
    return lambda folder: [(folder / file).unlink() for file in files]


class Trap:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("ran", "w"))


def keep_only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def add_contradicting_processor(folder: Path) -> None:
    tree = {**json.loads((folder / PREPROCESSOR).read_text()), "resample": 2}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": tree}))


def add_code(folder: Path) -> None:
    (folder / "modeling.py").write_text("open('ran', 'w').close()\n")
    state(CONFIG, auto_map={"AutoModel": "modeling.Model"})(folder)


def shards(**weight_map: str) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


# Change, error code, then parts of the error: the culprit, the expected and the actual value.
SIGLIP: dict[str, tuple[Any, ...]] = {
    "pickle": (keep_only_a_pickle, "E_IMPORT", "pytorch_model.bin", "expected model.safetensors", "may run code"),
    "code": (add_code, "E_IMPORT", "config.json: auto_map", "expected no code", "modeling.Model"),
    "tokenizer code": (
        state(TOKENIZER_CONFIG, auto_map={"AutoTokenizer": ["t.T", None]}),
        "E_IMPORT",
        f"{TOKENIZER_CONFIG}: auto_map",
    ),
    "processor code": (state(PREPROCESSOR, auto_map={"AutoProcessor": "p.P"}), "E_IMPORT", f"{PREPROCESSOR}: auto_map"),
    "nested code": (
        state(CONFIG, text_config__auto_map={"AutoModel": "m.M"}),
        "E_IMPORT",
        "config.json: text_config.auto_map",
    ),
    "no weights": (remove("model.safetensors"), "E_INPUT", "model.safetensors", "neither"),
    "no config": (remove(CONFIG), "E_INPUT", CONFIG, "No such file"),
    "invalid JSON": (write(CONFIG, "{"), "E_INPUT", CONFIG, "Expecting property name"),
    "a list": (write(CONFIG, "[1]"), "E_INPUT", CONFIG, "a list, not an object"),
    "corrupt weights": (write("model.safetensors", b"\xff" * 99), "E_INPUT", "model.safetensors", "header"),
    "another kind": (
        state(CONFIG, model_type="chinese_clip"),
        "E_IMPORT",
        "transformers_clip: expected model_type 'clip', got 'chinese_clip'",
        "transformers_siglip: expected model_type 'siglip', got 'chinese_clip'",
    ),
    "another class": (
        state(CONFIG, architectures=["SiglipForImageClassification"]),
        "E_IMPORT",
        "architectures",
        "expected ['SiglipModel']",
        "SiglipForImageClassification",
    ),
    "no vision": (state(CONFIG, vision_config=...), "E_IMPORT", "config.json: vision_config", "an object", "nothing"),
    "value of the wrong type": (state(CONFIG, vision_config__hidden_size="wide"), "E_IMPORT", CONFIG, "hidden_size"),
    "act": (
        state(CONFIG, text_config__hidden_act="relu"),
        "E_IMPORT",
        "text_config.hidden_act",
        "expected quick_gelu or gelu or gelu_pytorch_tanh",
        "got 'relu'",
    ),
    "eps": (state(CONFIG, vision_config__layer_norm_eps=0.0), "E_IMPORT", "vision_config.layer_norm_eps", "got 0.0"),
    "heads": (state(CONFIG, vision_config__num_attention_heads=5), "E_IMPORT", "num_attention_heads", "36", "got 5"),
    "grayscale": (
        state(CONFIG, vision_config__num_channels=1),
        "E_IMPORT",
        "vision_config.num_channels",
        "expected 3, got 1",
    ),
    "not square": (
        state(CONFIG, vision_config__image_size=[40, 48]),
        "E_IMPORT",
        "vision_config.image_size",
        "[40, 48]",
    ),
    "headless": (state(CONFIG, vision_config__vision_use_head=False), "E_IMPORT", "vision_use_head", "got False"),
    "different widths": (
        state(CONFIG, text_config__projection_size=24),
        "E_IMPORT",
        "text_config.projection_size",
        "vision_config.hidden_size, 36",
        "got 24",
    ),
    "few ids": (state(CONFIG, text_config__vocab_size=9), "E_IMPORT", "text_config.vocab_size", "ids, got 9"),
    "too deep": (
        state(CONFIG, vision_config__num_hidden_layers=10**9),
        "E_IMPORT",
        "vision_config.num_hidden_layers",
        "expected at most 1000, got 1000000000",
    ),
    "truncated weights": (truncate, "E_INPUT", "model.safetensors", "not fully covered"),
    "wrong shape": (
        change_weights(lambda t: t.update({HEAD: t[HEAD][:-1]})),
        "E_MODEL_SHAPE",
        HEAD,
        "expected shape (108, 36)",
        "got shape (107, 36)",
    ),
    "other depth": (
        state(CONFIG, text_config__num_hidden_layers=3),
        "E_MODEL_SHAPE",
        "text_model.encoder.layers.2",
        "expected a tensor of shape",
        "no such tensor",
    ),
    "missing": (change_weights(lambda t: t.pop("logit_bias")), "E_MODEL_SHAPE", "logit_bias", "got no such tensor"),
    "renamed": (
        change_weights(lambda t: t.update({"logit_scales": t.pop("logit_scale")})),
        "E_MODEL_SHAPE",
        ": logit_scale —",
        "no such tensor, but logit_scales",
    ),
    "extra": (
        change_weights(lambda t: t.update({"lora.weight": torch.ones(2, 3)})),
        "E_MODEL_SHAPE",
        "lora.weight",
        "expected no such tensor, got shape (2, 3)",
    ),
    "not finite": (
        change_weights(lambda t: t[TABLE][3].fill_(float("nan"))),
        "E_MODEL_SHAPE",
        TABLE,
        "expected finite numbers, got 36 that are not",
    ),
    "integer weights": (
        change_weights(lambda t: t.update({TABLE: t[TABLE].int()})),
        "E_MODEL_SHAPE",
        TABLE,
        "float16 or bfloat16",
        "torch.int32",
    ),
    "weight file outside the folder": (
        shards(logit_scale="../a.safetensors"),
        "E_IMPORT",
        "weight_map",
        "../a.safetensors",
    ),
    "empty weight map": (shards(), "E_IMPORT", "weight_map", "no files"),
    "missing weight file": (shards(logit_scale="b.safetensors"), "E_INPUT", "b.safetensors", "missing"),
    "no processor": (remove(PREPROCESSOR), "E_INPUT", PREPROCESSOR, "No such file"),
    "size": (
        state(PREPROCESSOR, size={"height": 48, "width": 40}),
        "E_IMPORT",
        "size.height",
        "expected 40, as in vision_config.image_size",
        "got 48",
    ),
    "no size": (state(PREPROCESSOR, size=...), "E_IMPORT", f"{PREPROCESSOR}: size", "got nothing"),
    "no mean": (state(PREPROCESSOR, image_mean=...), "E_IMPORT", "image_mean", "three numbers, got nothing"),
    "std": (state(PREPROCESSOR, image_std=[0.5, 0, 0.5]), "E_IMPORT", "image_std", "three numbers", "[0.5, 0, 0.5]"),
    "resample": (state(PREPROCESSOR, resample=4), "E_IMPORT", "resample", "3 (bicubic)", "got 4"),
    "no resample": (state(PREPROCESSOR, resample=...), "E_IMPORT", "resample", "got nothing"),
    "no normalization": (
        state(PREPROCESSOR, do_normalize=False),
        "E_IMPORT",
        "do_normalize",
        "expected True, got False",
    ),
    "no resizing": (state(PREPROCESSOR, do_resize=...), "E_IMPORT", "do_resize", "expected True, got nothing"),
    "no rescaling": (state(PREPROCESSOR, do_rescale=False), "E_IMPORT", "do_rescale", "expected True, got False"),
    "scale": (state(PREPROCESSOR, rescale_factor=1 / 127.5), "E_IMPORT", "rescale_factor", "expected 1/255"),
    "padded": (state(PREPROCESSOR, do_pad=True), "E_IMPORT", "do_pad", "got True"),
    "another processor": (
        state(PREPROCESSOR, image_processor_type="ViTImageProcessor"),
        "E_IMPORT",
        "image_processor_type",
        "SiglipImageProcessor",
        "'ViTImageProcessor'",
    ),
    "no tokenizer": (remove("spiece.model", TOKENIZER_CONFIG), "E_INPUT", "none of the files", "spiece.model"),
    "corrupt tokenizer": (write("spiece.model", b"\xff" * 99), "E_INPUT", "tokenizer cannot be read"),
    "other length": (
        state(TOKENIZER_CONFIG, model_max_length=32),
        "E_IMPORT",
        f"{TOKENIZER_CONFIG}: model_max_length",
        "expected 64, as in text_config.max_position_embeddings",
        "got 32",
    ),
    "padding on the left": (
        state(TOKENIZER_CONFIG, padding_side="left"),
        "E_IMPORT",
        f"{TOKENIZER_CONFIG}: padding_side",
        "expected right, got left",
        "set it to right only if the model was trained so",
    ),
    "class that lower-cases": (
        state(TOKENIZER_CONFIG, tokenizer_class="Siglip2Tokenizer"),
        "E_IMPORT",
        f"{TOKENIZER_CONFIG}: tokenizer_class",
        "got Siglip2Tokenizer, which lower-cases",
        "cannot be imported yet",
    ),
    "added token": (
        state(
            TOKENIZER_CONFIG,
            added_tokens_decoder__9={
                "content": "<x>",
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
                "normalized": False,
                "special": True,
            },
        ),
        "E_IMPORT",
        "added_tokens_decoder",
        "expected the tokens </s>, <unk>",
        "got <x>",
    ),
}
CLIP: dict[str, tuple[Any, ...]] = {
    "another end": (
        state(CONFIG, text_config__eos_token_id=49406),
        "E_IMPORT",
        "text_config.eos_token_id",
        "end of text, 49407",
        "got 49406",
    ),
    "edge": (
        state(PREPROCESSOR, size={"shortest_edge": 48}),
        "E_IMPORT",
        "size.shortest_edge",
        "expected 40",
        "got 48",
    ),
    "crop": (
        state(PREPROCESSOR, crop_size={"height": 40, "width": 32}),
        "E_IMPORT",
        "crop_size.width",
        "expected 40",
        "got 32",
    ),
    "no crop": (state(PREPROCESSOR, do_center_crop=False), "E_IMPORT", "do_center_crop", "only the shorter side"),
    "two processors": (
        add_contradicting_processor,
        "E_IMPORT",
        f"{PREPROCESSOR}: resample",
        "expected processor_config.json's 2, got 3",
    ),
    "other length": (
        state(TOKENIZER_CONFIG, model_max_length=32),
        "E_IMPORT",
        f"{TOKENIZER_CONFIG}: model_max_length",
        "expected 77, as in text_config.max_position_embeddings",
        "got 32",
    ),
    "padding with a word": (
        state(TOKENIZER_CONFIG, pad_token="!"),
        "E_IMPORT",
        f"{TOKENIZER_CONFIG}: pad_token",
        "got '!', which is a word of the vocabulary",
        "set pad_token to '<|endoftext|>'",
    ),
    "no vocabulary": (remove("tokenizer.json"), "E_INPUT", "none of the files tokenizer.json, vocab.json"),
    "no merges": (
        lambda folder: [(folder / "tokenizer.json").unlink(), write("vocab.json", '{"a": 0}')(folder)],
        "E_INPUT",
        "merges.txt",
        "vocab.json without it",
    ),
    "another tokenizer": (
        state(TOKENIZER_CONFIG, tokenizer_class="BertTokenizer"),
        "E_IMPORT",
        "text_config.vocab_size",
        "tokenizer's largest id",
        "got 49408",
    ),
    "no crop size": (state(PREPROCESSOR, crop_size=...), "E_IMPORT", "crop_size", "expected 40, got nothing"),
    "longest edge": (
        state(PREPROCESSOR, size={"shortest_edge": 40, "longest_edge": 90}),
        "E_IMPORT",
        f"{PREPROCESSOR}: size",
        "shortest_edge alone",
    ),
}


def check(run: Any, original: Path, folder: Path, change: Change, code: str, *parts: str) -> None:
    copy, out = folder / "folder", folder / "model"
    shutil.copytree(original, copy)
    change(copy)
    done = run("import", copy, "-o", out)
    assert done.code == 3 and done.error.startswith(f"error[{code}]: "), done.error
    _, where, _, fix = done.error.split(" — ")
    assert str(copy) in where and fix and all(part in done.error for part in parts), (parts, done.error)
    assert [path.name for path in folder.iterdir()] == ["folder"]
    shutil.rmtree(copy)


def test_invalid_siglip_folders_are_rejected(
    siglip: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work := tmp_path / "work").mkdir()
    monkeypatch.chdir(work)
    for number, (change, code, *parts) in enumerate(SIGLIP.values()):
        (folder := tmp_path / str(number)).mkdir()
        check(run, siglip, folder, change, code, *parts)
    assert not list(work.iterdir())  # no code of a folder was run


def test_invalid_clip_folders_are_rejected(clip: Path, run: Any, tmp_path: Path) -> None:
    for number, (change, code, *parts) in enumerate(CLIP.values()):
        (folder := tmp_path / str(number)).mkdir()
        check(run, clip, folder, change, code, *parts)


def test_import_command_line_errors(siglip: Path, run: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("dear")
    done = run("import", siglip, "-o", other)
    assert done.code == 2 and "E_OUTPUT" in done.error and str(other) in done.error
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    done = run("import", tmp_path / "nowhere", "-o", tmp_path / "model")
    assert done.code == 3 and "E_INPUT" in done.error and "nowhere" in done.error and "no such folder" in done.error
    assert (done := run("import", siglip)).code == 2 and "E_USAGE" in done.error and "-o" in done.error
    assert (done := run("import", "-o", tmp_path / "model")).code == 2 and "folder" in done.error
    done = run("import", siglip, "-o", tmp_path / "model", "--dry-run")
    assert done.code == 0 and "would import the SiglipModel" in done.out
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
