"""SentencePiece: trained once on the captions, with the same bytes every time and the same ids everywhere."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import write_json
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.folders.records import file_entries
from clipwright.pipeline.tokenizers.base import TOKENIZERS, Tokenizer
from clipwright.pipeline.tokenizers.sentencepiece import MODEL
from clipwright.pipeline.train.config import sample_captions

ranks = pytest.mark.xdist_group("ranks")

CAPTIONS = [
    f"{text} {number}"
    for number in range(40)
    for text in (
        "a photo of a red circle",
        "빨간 원이 있는 사진",
        "왼쪽 위에 있는 큰 별",
        "赤い丸の写真",
        "Café au lait",
    )
]
TEXTS = [
    "",
    " ",
    "a photo of a red circle 7",
    "RED Circle",
    "고양이가 큰 별을 본다",
    "猫と犬",
    "😀👩‍👩‍👧 ok",
    "naïve café Å ẛ̣",
    "<s></s><pad><unk>",
    "▁▁a▁b",
    "x\u0345y",
    "a\tb\nc",
    "кошка",
    "ａｂｃ１２３",
    "ﬁne",
    "\U0010ffff",
    "▅",
]
SMALL = ["tokenizer.name=sentencepiece", "tokenizer.vocab_size=400"]


def train(folder: Path, **fields: Any) -> Tokenizer:
    config = TOKENIZERS.preset("sentencepiece", **{"vocab_size": 400, **fields})
    folder.mkdir(exist_ok=True)
    config.train(CAPTIONS, folder)
    return TOKENIZERS.build(config, folder=folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train(tmp_path_factory.mktemp("tokenizer"))


def test_equal_captions_give_equal_bytes_in_any_process(tokenizer: Tokenizer, tmp_path: Path) -> None:
    train(tmp_path / "a")
    script = (
        "import json, sys\nfrom pathlib import Path\n"
        "from clipwright.pipeline.tokenizers.base import TOKENIZERS\n"
        "config = TOKENIZERS.preset('sentencepiece', vocab_size=400)\n"
        "config.train(json.load(sys.stdin), Path(sys.argv[1]))\n"
    )
    (tmp_path / "b").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "b")],
        input=json.dumps(CAPTIONS),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == done.stdout == ""  # no log output of the library
    (saved,) = tokenizer.save(tmp_path)
    model = saved.read_bytes()
    assert (tmp_path / "a" / MODEL).read_bytes() == (tmp_path / "b" / MODEL).read_bytes() == model
    assert str(tmp_path).encode() not in model
    again = TOKENIZERS.build(TOKENIZERS.preset("sentencepiece", vocab_size=400), folder=tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert train(tmp_path / "c", vocab_size=401).fingerprint != tokenizer.fingerprint


def test_ids_follow_the_tokenizer_contract(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXTS, 64)
    assert ids.shape == (len(TEXTS), 64) and ids.dtype == np.int32 and ids.max() < tokenizer.vocab_size == 400
    for text, row in zip(TEXTS, ids.tolist(), strict=True):
        end = row.index(tokenizer.eot_id)
        assert row[0] == tokenizer.sot_id == 2 and tokenizer.eot_id == 3
        assert set(row[end + 1 :]) <= {tokenizer.pad_id} == {0}
        # Text cannot produce a special id, and nothing is unknown.
        assert not set(row[1:end]) & {0, 1, 2, 3}, text
    assert ids[0].tolist()[:3] == [2, 3, 0]
    assert tokenizer.encode([], 8).shape == (0, 8)


def test_truncated_text_ends_in_eot(tokenizer: Tokenizer) -> None:
    text = "a photo of a red circle"
    full = [i for i in tokenizer.encode([text], 64)[0].tolist() if i]
    for context in range(2, len(full) + 2):
        row = tokenizer.encode([text], context)[0].tolist()
        kept = full if context >= len(full) else [*full[: context - 1], 3]
        assert row == kept + [0] * (context - len(kept))
    long = tokenizer.encode(["별" * 200_000, "a " * 200_000, "☃" * 200_000], 77)
    assert (long[:, -1] == 3).all() and (long[:, 1:-1] > 3).all()


def test_composed_and_decomposed_text_have_equal_ids(tokenizer: Tokenizer) -> None:
    for text in (*CAPTIONS[:5], *TEXTS, "각힣뷁 값", "q\u0323\u0307", "ệ"):
        forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
        composed, decomposed = tokenizer.encode(forms, 48)
        assert (composed == decomposed).all(), text
    assert unicodedata.normalize("NFD", "고양이") != "고양이"
    first, second = tokenizer.encode(["q\u0323\u0307", "q\u0307\u0323"], 48)  # the order of marks does not matter
    assert (first == second).all()


def test_decode_returns_the_normalized_text(tokenizer: Tokenizer) -> None:
    for text in (*CAPTIONS[:5], "RED Circle", "고양이가 큰 별을 본다", "猫と犬", "😀 ok", "naïve café", "кошка"):
        expected = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
        assert tokenizer.decode(tokenizer.encode([text], 96)[0].tolist()) == expected
    row = tokenizer.encode(["red circle"], 32)[0].tolist()
    assert tokenizer.decode([*row, *row]) == "red circle" and tokenizer.decode([]) == ""


def test_case_is_folded_by_default(tokenizer: Tokenizer, tmp_path: Path) -> None:
    upper, lower = tokenizer.encode(["RED CIRCLE", "red circle"], 32)
    assert (upper == lower).all()
    upper, lower = train(tmp_path / "cased", normalization="nmt_nfkc").encode(["RED CIRCLE", "red circle"], 32)
    assert (upper != lower).any()


@pytest.mark.parametrize("change", ["absent", "empty", "truncated", "noise", "huge", "other ids"])
def test_invalid_model_file_is_rejected(change: str, tmp_path: Path, monkeypatch: Any) -> None:
    train(tmp_path)
    path = tmp_path / MODEL
    model = path.read_bytes()
    if change == "absent":
        path.unlink()
    elif change == "huge":
        monkeypatch.setattr("clipwright.pipeline.tokenizers.sentencepiece.MAX_MODEL_BYTES", 1000)
    elif change == "other ids":
        from sentencepiece import SentencePieceTrainer

        with path.open("wb") as file:
            SentencePieceTrainer.train(
                sentence_iterator=iter(CAPTIONS),
                model_writer=file,
                vocab_size=60,
                hard_vocab_limit=False,
                minloglevel=2,
            )
    else:
        path.write_bytes({"empty": b"", "truncated": model[:-700], "noise": b"\xff" * 3000}[change])
    with pytest.raises(ClipwrightError) as caught:
        TOKENIZERS.build(TOKENIZERS.preset("sentencepiece", vocab_size=400), folder=tmp_path)
    assert caught.value.code == "E_INPUT" and str(path) in str(caught.value) and "--fresh" in str(caught.value)


def test_vocabulary_too_small_for_the_characters(tmp_path: Path) -> None:
    with pytest.raises(ClipwrightError) as caught:
        train(tmp_path, vocab_size=100)
    assert caught.value.code == "E_CONFIG_VALUE" and "tokenizer.vocab_size=100" in str(caught.value)
    least = re.search(r"set tokenizer\.vocab_size=(\d+) or more", str(caught.value))
    assert least is not None and 260 < int(least[1]) < 400 and not list(tmp_path.iterdir())
    assert train(tmp_path, vocab_size=int(least[1])).vocab_size == int(least[1])


def test_captions_that_cannot_train_a_tokenizer_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ClipwrightError) as caught:
        TOKENIZERS.preset("sentencepiece").train(["▅", "▅▅"], tmp_path)  # a character that SentencePiece reserves
    assert caught.value.code == "E_INPUT" and "another tokenizer" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_captions_of_a_large_dataset_are_sampled_evenly(scenes: Path) -> None:
    dataset = Dataset(scenes)
    texts = [text for shard in range(3) for texts in dataset.sidecar(shard)["captions"].to_pylist() for text in texts]
    streamed = Dataset(scenes)
    assert list(sample_captions(streamed, 10**6)) == texts
    assert list(sample_captions(streamed, 7)) == [texts[len(texts) * i // 7] for i in range(7)]
    assert streamed.sidecar.cache_info().currsize == 0  # no sidecar stays in memory


# Through the command ------------------------------------------------------------------------------------------------


def train_arguments(scenes: Path, *arguments: str) -> list[str]:
    return [f"data.train={scenes}", "schedule.samples=64", "-o", "run", *arguments]


@ranks
def test_vocabulary_too_large_for_the_captions(scenes: Path, tmp_path: Path, small: Any, here: Any) -> None:
    """Rejected before anything is written; the size that the error suggests works with the same -o."""
    arguments = ["train", *small.settings, *train_arguments(scenes), "tokenizer.name=sentencepiece"]
    line = here(tmp_path, *arguments, code=2).error
    assert line.startswith("error[E_CONFIG_VALUE]") and "tokenizer.vocab_size=8000" in line
    most = re.search(r"set tokenizer\.vocab_size=(\d+) or less", line)
    assert most is not None
    assert not list(tmp_path.iterdir())
    here(tmp_path, *arguments, f"tokenizer.vocab_size={most[1]}", "--dry-run")
    assert not list(tmp_path.iterdir())
    done = small.cli(tmp_path)(*arguments, f"tokenizer.vocab_size={most[1]}", "--json")
    assert json.loads(done.stdout)["samples"] == 64 and "sentencepiece" not in done.stderr.lower()


@pytest.fixture(scope="module")
def partial_run(scenes: Path, tmp_path_factory: pytest.TempPathFactory, small: Any) -> Path:
    """A run stopped at its second step of four."""
    folder = tmp_path_factory.mktemp("partial_run")
    small(folder, *train_arguments(scenes, *SMALL, "runtime.stop_at=2"))
    return folder


@ranks
def test_run_resumes_with_its_own_tokenizer(
    scenes: Path, partial_run: Path, tmp_path: Path, small: Any, here: Any
) -> None:
    shutil.copytree(partial_run / "run", tmp_path / "run")
    file = tmp_path / "run" / "tokenizer" / MODEL
    model = file.read_bytes()
    cli, arguments = small.cli(tmp_path), ["train", *small.settings, *train_arguments(scenes, *SMALL)]
    line = here(tmp_path, *arguments, "tokenizer.vocab_size=401", code=2).error
    assert line.startswith("error[E_RESUME]") and "tokenizer.vocab_size: 400 → 401" in line
    # A tokenizer of another run is valid, but its ids have other meanings.
    train(tmp_path / "other")
    shutil.copy(tmp_path / "other" / MODEL, file)
    line = here(tmp_path, *arguments, code=3).error
    assert line.startswith("error[E_CKPT_HASH]") and MODEL in line and "--fresh" in line
    file.unlink()
    line = here(tmp_path, "export", "run", "-o", "model", code=3).error
    assert line.startswith("error[E_INPUT]") and MODEL in line and "--fresh" in line
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob("**/*.partial"))
    file.write_bytes(model)
    done = cli(*arguments)
    assert "resuming at step 2" in done.stdout and file.read_bytes() == model
    cli(*arguments, "tokenizer.vocab_size=350", "runtime.stop_at=1", "--fresh")
    assert file.read_bytes() != model


@ranks
def test_export_copies_the_tokenizer_and_a_replaced_one_is_rejected(
    scenes: Path, partial_run: Path, tmp_path: Path, here: Any
) -> None:
    from clipwright import load_model

    shutil.copytree(partial_run / "run", tmp_path / "run")
    model = tmp_path / "model"
    here(tmp_path, "export", "run", "-o", "model")
    assert (model / MODEL).read_bytes() == (tmp_path / "run" / "tokenizer" / MODEL).read_bytes()
    opened = load_model(model)
    embeddings = opened.embed_texts(["a red circle", unicodedata.normalize("NFD", "빨간 원"), "빨간 원"])
    assert (embeddings[1] == embeddings[2]).all() and (embeddings[0] != embeddings[1]).any()
    train(tmp_path / "other")
    shutil.copy(tmp_path / "other" / MODEL, model / MODEL)
    with pytest.raises(ClipwrightError) as caught:
        load_model(model)
    assert caught.value.code == "E_MODEL_HASH" and MODEL in str(caught.value)
    # With a matching manifest, only the tokenizer's fingerprint differs.
    update_manifest(model)
    line = here(tmp_path, "eval", "retrieval", "model=model", f"data={scenes}", code=3).error
    assert line.startswith("error[E_MODEL_HASH]") and "fingerprint" in line and "export the run again" in line
    (model / MODEL).write_bytes(b"\xff" * 1000)
    update_manifest(model)
    with pytest.raises(ClipwrightError) as caught:
        load_model(model)
    assert caught.value.code == "E_INPUT" and "export the model again" in str(caught.value)


def update_manifest(model: Path) -> None:
    """Updates a model's manifest to match its changed files, like someone who replaces a file on purpose."""
    manifest = json.loads((model / "manifest.json").read_text())
    manifest["files"] = file_entries(model, manifest["files"])
    write_json(model / "manifest.json", manifest)


@ranks
def test_ranks_share_the_tokenizer_that_rank_0_trained(
    scenes: Path, partial_run: Path, tmp_path: Path, small: Any
) -> None:
    small(tmp_path, *train_arguments(scenes, *SMALL, "runtime.stop_at=2"), ranks=2)
    first, second = (folder / "run" / "tokenizer" / MODEL for folder in (partial_run, tmp_path))
    assert hashlib.sha256(first.read_bytes()).digest() == hashlib.sha256(second.read_bytes()).digest()
    for ours, theirs in zip(small.losses(tmp_path / "run"), small.losses(partial_run / "run"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    done = small(tmp_path, *train_arguments(scenes, "tokenizer.name=sentencepiece", "--fresh"), ranks=2, code=1)
    assert done.stderr.count("error[E_CONFIG_VALUE]") == 1  # both ranks stop, one reports
    assert (tmp_path / "run" / "latest").exists()  # a rejected start keeps the old run
