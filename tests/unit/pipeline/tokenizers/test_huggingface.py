"""Hugging Face tokenizer folders: the ids of transformers, the end of a text, and the copy that a model keeps."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import write_json
from clipwright.pipeline.folders.records import file_entries
from clipwright.pipeline.tokenizers.base import TOKENIZERS
from clipwright.pipeline.tokenizers.huggingface import SPECIAL, TOKENIZER, HuggingFaceTokenizer

ranks = pytest.mark.xdist_group("ranks")

CORPUS = [
    "a photo of a red circle",
    "빨간 원이 있는 사진",
    "赤い丸の写真",
    "Café au lait",
    "two green squares, 42!",
] * 20
TEXTS = [
    "",
    " ",
    "a photo of a red circle",
    "RED Circle",
    "빨간 원",
    "\u1107\u1161\u11af",
    "猫と犬",
    "😀👩‍👩‍👧 ok",
    "naïve café cafe\u0301",
    "“curly” &amp; ｆｕｌｌ",
    "a\tb\nc",
    "[SEP] </s> <|endoftext|> [CLS]",
    "word " * 50,
    "é" * 99,
]


def bert() -> tuple[Tokenizer, dict[str, str]]:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.decoder = decoders.WordPiece()
    backend.enable_padding(length=50)  # some folders enable these; our tokenizer disables them
    backend.enable_truncation(7)
    return backend, {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}


def byte_level(special: list[str], **fields: Any) -> Tokenizer:
    backend = Tokenizer(models.BPE(**fields))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def roberta() -> tuple[Tokenizer, dict[str, str]]:
    backend = byte_level(["<s>", "<pad>", "</s>", "<unk>"])
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), processors.RobertaProcessing(("</s>", 2), ("<s>", 0))]
    )
    return backend, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "cls_token": "<s>"}


def gpt() -> tuple[Tokenizer, dict[str, str]]:
    return byte_level(["<|endoftext|>"]), {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


def unigram(template: str, special: list[str]) -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>")
    backend.train_from_iterator(CORPUS, trainer)
    ids = [(token, special.index(token)) for token in template.split() if token != "$A"]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return backend


def t5() -> tuple[Tokenizer, dict[str, str]]:
    backend = unigram("$A </s>", ["<pad>", "</s>", "<unk>"])
    return backend, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def llama() -> tuple[Tokenizer, dict[str, str]]:
    return unigram("<s> $A", ["<unk>", "<s>", "</s>"]), {"bos_token": "<s>", "eos_token": "</s>"}


# Name → how it is built, and its ids of start, end and padding.
KINDS: dict[str, tuple[Callable[[], tuple[Tokenizer, dict[str, str]]], tuple[int, int, int]]] = {
    "bert": (bert, (2, 3, 0)),
    "roberta": (roberta, (0, 2, 1)),
    "gpt": (gpt, (-1, 0, 0)),
    "t5": (t5, (-1, 1, 0)),
    "llama": (llama, (1, 2, 2)),
}


def write(folder: Path, backend: Tokenizer, special: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def opened(source: Path, copy: Path) -> HuggingFaceTokenizer:
    config = TOKENIZERS.preset("huggingface", folder=str(source))
    copy.mkdir(parents=True, exist_ok=True)
    config.train(iter(()), copy)
    tokenizer = TOKENIZERS.build(config, folder=copy)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_ids_match_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    make, roles = KINDS[kind]
    source = write(tmp_path / "source", *make())
    ours = opened(source, tmp_path / "copy")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(source / TOKENIZER))
    theirs.backend_tokenizer.no_padding()
    theirs.backend_tokenizer.no_truncation()
    assert (ours.sot_id, ours.eot_id, ours.pad_id) == roles
    for text in TEXTS:
        expected = theirs(text, verbose=False)["input_ids"]
        if kind in ("gpt", "llama"):  # their post-processor adds no end
            expected = [*expected, ours.eot_id]
        for context in (32, len(expected), 2):
            truncated = [*expected[: context - 1], ours.eot_id] if len(expected) > context else expected
            row = ours.encode([text], max(context, 2))[0]
            assert row.dtype == np.int32 and row.max() < ours.vocab_size
            assert row.tolist() == truncated + [ours.pad_id] * (max(context, 2) - len(truncated)), (text, context)
    assert ours.encode([], 8).shape == (0, 8)
    assert np.array_equal(ours.encode(TEXTS, 20), np.concatenate([ours.encode([text], 20) for text in TEXTS]))


@pytest.mark.parametrize("kind", KINDS)
def test_decode_returns_the_words(kind: str, tmp_path: Path) -> None:
    ours = opened(write(tmp_path / "source", *KINDS[kind][0]()), tmp_path / "copy")
    text = "a photo of a red circle"
    row = ours.encode([text], 64)[0]
    assert ours.decode(row) == text == ours.decode([*row.tolist(), *row.tolist()])


def test_unknown_ids(tmp_path: Path) -> None:
    unknown = {kind: opened(write(tmp_path / kind, *KINDS[kind][0]()), tmp_path / kind).unknown_ids for kind in KINDS}
    assert unknown == {"bert": (1,), "roberta": (), "gpt": (), "t5": (2,), "llama": (0,)}
    vocabulary = {"<unk>": 0, "</s>": 1, "a": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    ours = opened(write(tmp_path / "bytes", backend, {"eos_token": "</s>"}), tmp_path / "bytes")
    assert ours.unknown_ids == (0, *range(3, 259))
    assert ours.encode(["aé"], 6)[0].tolist() == [2, 3 + 0xC3, 3 + 0xA9, 1, 1, 1]


def test_folder_in_an_older_format(tmp_path: Path) -> None:
    """vocab.txt is converted by transformers once; the copy needs neither of them."""
    from transformers import BertTokenizer

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "##dish", "circle", ","]
    source = tmp_path / "source"
    source.mkdir()
    (source / "vocab.txt").write_text("\n".join(vocabulary))
    (source / "config.json").write_text(json.dumps({"model_type": "bert"}))
    ours = opened(source, tmp_path / "copy")
    theirs = BertTokenizer.from_pretrained(source, local_files_only=True)
    for text in ("a reddish circle, RED", "", "猫"):
        expected = theirs(text)["input_ids"]
        assert ours.encode([text], 16)[0].tolist() == expected + [0] * (16 - len(expected))
    shutil.rmtree(source)
    config = TOKENIZERS.preset("huggingface")
    assert TOKENIZERS.build(config, folder=tmp_path / "copy").fingerprint == ours.fingerprint


def test_save_and_load(tmp_path: Path) -> None:
    ours = opened(write(tmp_path / "source", *bert()), tmp_path / "copy")
    (tmp_path / "model").mkdir()
    paths = ours.save(tmp_path / "model")
    assert sorted(path.name for path in paths) == sorted(p.name for p in (tmp_path / "model").iterdir())
    assert (tmp_path / "model" / TOKENIZER).read_bytes() == (tmp_path / "source" / TOKENIZER).read_bytes()
    again = TOKENIZERS.build(TOKENIZERS.preset("huggingface"), folder=tmp_path / "model")
    assert again.fingerprint == ours.fingerprint
    assert np.array_equal(again.encode(TEXTS, 30), ours.encode(TEXTS, 30))
    assert np.array_equal(pickle.loads(pickle.dumps(ours)).encode(TEXTS, 30), ours.encode(TEXTS, 30))


def test_fingerprint_covers_what_determines_the_ids(tmp_path: Path) -> None:
    backend, special = bert()
    first = opened(write(tmp_path / "a", backend, special), tmp_path / "a1").fingerprint
    tree = json.loads((tmp_path / "a" / TOKENIZER).read_text())
    (tmp_path / "a" / TOKENIZER).write_text(json.dumps(tree, indent=7))
    assert opened(tmp_path / "a", tmp_path / "a2").fingerprint == first
    backend.no_padding()
    assert opened(write(tmp_path / "b", backend, special), tmp_path / "b1").fingerprint == first
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    cased = opened(write(tmp_path / "c", backend, special), tmp_path / "c1").fingerprint
    assert cased != first
    padded = opened(write(tmp_path / "d", backend, {**special, "pad_token": "[UNK]"}), tmp_path / "d1").fingerprint
    assert padded not in (first, cased)


def without_end() -> tuple[Tokenizer, dict[str, str]]:
    return byte_level(["<s>"]), {"bos_token": "<s>", "eos_token": "<gone>"}


def one_token_for_both() -> tuple[Tokenizer, dict[str, str]]:
    backend = byte_level(["</s>"])
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 0)])
    return backend, {"bos_token": "</s>", "eos_token": "</s>"}


def two_ends() -> tuple[Tokenizer, dict[str, str]]:
    backend = byte_level(["</s>", "en"])
    backend.post_processor = processors.TemplateProcessing(single="$A </s> en", special_tokens=[("</s>", 0), ("en", 1)])
    return backend, {"eos_token": "</s>"}


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (
            without_end,
            "no token marks the end of a text: the post-processor adds none, and the special tokens are bos",
        ),
        (one_token_for_both, "id 0 both starts and ends a text"),
        (two_ends, "0 tokens before a text and 2 after it"),
    ],
)
def test_tokenizer_without_a_usable_end_is_rejected(make: Any, found: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source", *make())
    with pytest.raises(ClipwrightError) as caught:
        opened(source, tmp_path / "copy")
    assert caught.value.code == "E_INPUT" and found in caught.value.found and caught.value.fix
    assert caught.value.where == str(source / TOKENIZER) and not list((tmp_path / "copy").iterdir())


@pytest.mark.parametrize(
    "change", ["absent", "empty", "empty folder", "noise", "huge", "list", "python", "bad special"]
)
def test_folder_without_a_valid_tokenizer_is_rejected(change: str, tmp_path: Path, monkeypatch: Any) -> None:
    source = write(tmp_path / "source", *bert())
    path = source / TOKENIZER
    if change == "absent":
        shutil.rmtree(source)
    elif change == "huge":
        monkeypatch.setattr("clipwright.pipeline.tokenizers.huggingface.MAX_BYTES", 1000)
    elif change == "bad special":
        (source / "tokenizer_config.json").write_text("[]")
    elif change in ("python", "empty folder"):
        path.unlink()
        config = {"tokenizer_class": "ByT5Tokenizer"} if change == "python" else {}
        (source / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        path.write_bytes({"empty": b"", "noise": b"\xff\x00" * 50, "list": b"[]"}[change])
    with pytest.raises(ClipwrightError) as caught:
        opened(source, tmp_path / "copy")
    assert caught.value.code == "E_INPUT" and str(source) in caught.value.where and caught.value.fix
    if change == "python":
        assert "ByT5Tokenizer" in caught.value.found


def test_missing_folder_setting_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ClipwrightError) as caught:
        TOKENIZERS.preset("huggingface").train([], tmp_path)
    assert caught.value.code == "E_CONFIG_VALUE" and "tokenizer.folder=DIR" in caught.value.fix


# Through the command ------------------------------------------------------------------------------------------------


@ranks
def test_run_keeps_its_own_copy(scenes: Path, tmp_path: Path, small: Any, here: Any) -> None:
    """A run resumes and exports without the original folder; a replaced tokenizer is rejected."""
    from clipwright import load_model

    source = write(tmp_path / "source", *roberta())
    cli = small.cli(tmp_path)
    arguments = ["train", *small.settings, f"data.train={scenes}", "schedule.samples=64", "-o", "run"]
    arguments += ["tokenizer.name=huggingface", f"tokenizer.folder={source}"]
    cli(*arguments, "runtime.stop_at=2")
    source.rename(tmp_path / "moved")
    done = cli(*arguments[:-1], f"tokenizer.folder={tmp_path / 'moved'}")
    assert "resuming at step 2" in done.stdout
    shutil.rmtree(tmp_path / "moved")
    here(tmp_path, "export", "run", "-o", "model")
    model = tmp_path / "model"
    assert {TOKENIZER, SPECIAL} <= json.loads((model / "manifest.json").read_text())["files"].keys()
    assert str(tmp_path) not in (model / "config.json").read_text()
    embeddings = load_model(model).embed_texts(["a red circle", "a red circle", "a green square"])
    assert (embeddings[0] == embeddings[1]).all() and (embeddings[0] != embeddings[2]).any()
    other = byte_level(["<s>", "<pad>", "</s>", "<unk>", "<other>"])
    other.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    other.save(str(model / TOKENIZER))
    with pytest.raises(ClipwrightError) as caught:
        load_model(model)
    assert caught.value.code == "E_MODEL_HASH" and TOKENIZER in str(caught.value)
    manifest = json.loads((model / "manifest.json").read_text())  # now matches the files: only the fingerprint differs
    manifest["files"] = file_entries(model, manifest["files"])
    write_json(model / "manifest.json", manifest)
    with pytest.raises(ClipwrightError) as caught:
        load_model(model)
    assert caught.value.code == "E_MODEL_HASH" and caught.value.what == "the tokenizer is not the one of this model"


@ranks
def test_error_names_the_folder(scenes: Path, tmp_path: Path, small: Any) -> None:
    cli = small.cli(tmp_path)
    arguments = ["train", *small.settings, f"data.train={scenes}", "tokenizer.name=huggingface", "-o", "run"]
    line = cli.error(*arguments, "tokenizer.folder=nowhere", code=3)
    assert line.startswith("error[E_INPUT]") and "nowhere" in line
