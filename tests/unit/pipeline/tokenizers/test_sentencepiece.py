"""SentencePiece: learned from captions once, the same bytes each time, and the same ids wherever it is opened."""

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
    *("", " ", "a photo of a red circle 7", "RED Circle", "고양이가 큰 별을 본다", "猫と犬", "😀👩‍👩‍👧 ok"),
    *("naïve café Å ẛ̣", "<s></s><pad><unk>", "▁▁a▁b", "x\u0345y", "a\tb\nc", "кошка"),
    *("ａｂｃ１２３", "ﬁne", "\U0010ffff", "▅"),
]
SMALL = ["tokenizer.name=sentencepiece", "tokenizer.vocab_size=400"]


def learn(folder: Path, **fields: Any) -> Tokenizer:
    config = TOKENIZERS.preset("sentencepiece", **{"vocab_size": 400, **fields})
    folder.mkdir(exist_ok=True)
    config.train(CAPTIONS, folder)
    return TOKENIZERS.build(config, folder=folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return learn(tmp_path_factory.mktemp("tokenizer"))


def test_equal_captions_give_equal_bytes_in_any_process(tokenizer: Tokenizer, tmp_path: Path) -> None:
    learn(tmp_path / "a")
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
    assert done.stderr == done.stdout == ""  # the library's own log is silent
    (saved,) = tokenizer.save(tmp_path)
    model = saved.read_bytes()
    assert (tmp_path / "a" / MODEL).read_bytes() == (tmp_path / "b" / MODEL).read_bytes() == model
    assert str(tmp_path).encode() not in model
    again = TOKENIZERS.build(TOKENIZERS.preset("sentencepiece", vocab_size=400), folder=tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert learn(tmp_path / "c", vocab_size=401).fingerprint != tokenizer.fingerprint


def test_ids_keep_the_contract(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXTS, 64)
    assert ids.shape == (len(TEXTS), 64) and ids.dtype == np.int32 and ids.max() < tokenizer.vocab_size == 400
    for text, row in zip(TEXTS, ids.tolist(), strict=True):
        end = row.index(tokenizer.eot_id)
        assert row[0] == tokenizer.sot_id == 2 and tokenizer.eot_id == 3
        assert set(row[end + 1 :]) <= {tokenizer.pad_id} == {0}
        # Text cannot spell a special id, and nothing is unknown.
        assert not set(row[1:end]) & {0, 1, 2, 3}, text
    assert ids[0].tolist()[:3] == [2, 3, 0]
    assert tokenizer.encode([], 8).shape == (0, 8)


def test_what_is_cut_ends_in_eot(tokenizer: Tokenizer) -> None:
    text = "a photo of a red circle"
    whole = [i for i in tokenizer.encode([text], 64)[0].tolist() if i]
    for context in range(2, len(whole) + 2):
        row = tokenizer.encode([text], context)[0].tolist()
        kept = whole if context >= len(whole) else [*whole[: context - 1], 3]
        assert row == kept + [0] * (context - len(kept))
    long = tokenizer.encode(["별" * 200_000, "a " * 200_000, "☃" * 200_000], 77)
    assert (long[:, -1] == 3).all() and (long[:, 1:-1] > 3).all()


def test_composed_and_decomposed_text_have_equal_ids(tokenizer: Tokenizer) -> None:
    for text in (*CAPTIONS[:5], *TEXTS, "각힣뷁 값", "q\u0323\u0307", "ệ"):
        forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
        one, other = tokenizer.encode(forms, 48)
        assert (one == other).all(), text
    assert unicodedata.normalize("NFD", "고양이") != "고양이"
    one, other = tokenizer.encode(["q\u0323\u0307", "q\u0307\u0323"], 48)  # marks in either order are one text
    assert (one == other).all()


def test_decoding_gives_the_normalised_text(tokenizer: Tokenizer) -> None:
    for text in (*CAPTIONS[:5], "RED Circle", "고양이가 큰 별을 본다", "猫と犬", "😀 ok", "naïve café", "кошка"):
        wanted = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
        assert tokenizer.decode(tokenizer.encode([text], 96)[0].tolist()) == wanted
    row = tokenizer.encode(["red circle"], 32)[0].tolist()
    assert tokenizer.decode([*row, *row]) == "red circle" and tokenizer.decode([]) == ""


def test_case_is_folded_unless_told_otherwise(tokenizer: Tokenizer, tmp_path: Path) -> None:
    one, other = tokenizer.encode(["RED CIRCLE", "red circle"], 32)
    assert (one == other).all()
    one, other = learn(tmp_path / "cased", normalization="nmt_nfkc").encode(["RED CIRCLE", "red circle"], 32)
    assert (one != other).any()


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "noise", "huge", "other ids"])
def test_a_file_that_is_no_model_of_ours_is_refused(damage: str, tmp_path: Path, monkeypatch: Any) -> None:
    learn(tmp_path)
    path = tmp_path / MODEL
    model = path.read_bytes()
    if damage == "absent":
        path.unlink()
    elif damage == "huge":
        monkeypatch.setattr("clipwright.pipeline.tokenizers.sentencepiece.MAX_MODEL_BYTES", 1000)
    elif damage == "other ids":
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
        path.write_bytes({"empty": b"", "cut": model[:-700], "noise": b"\xff" * 3000}[damage])
    with pytest.raises(ClipwrightError) as caught:
        TOKENIZERS.build(TOKENIZERS.preset("sentencepiece", vocab_size=400), folder=tmp_path)
    assert caught.value.code == "E_INPUT" and str(path) in str(caught.value) and "--fresh" in str(caught.value)


def test_a_vocabulary_too_small_for_the_bytes_and_characters(tmp_path: Path) -> None:
    with pytest.raises(ClipwrightError) as caught:
        learn(tmp_path, vocab_size=100)
    assert caught.value.code == "E_CONFIG_VALUE" and "tokenizer.vocab_size=100" in str(caught.value)
    least = re.search(r"set tokenizer\.vocab_size=(\d+) or more", str(caught.value))
    assert least is not None and 260 < int(least[1]) < 400 and not list(tmp_path.iterdir())
    assert learn(tmp_path, vocab_size=int(least[1])).vocab_size == int(least[1])


def test_captions_without_a_usable_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ClipwrightError) as caught:
        TOKENIZERS.preset("sentencepiece").train(["▅", "▅▅"], tmp_path)  # a mark SentencePiece keeps for itself
    assert caught.value.code == "E_INPUT" and "another tokenizer" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_large_dataset_is_sampled_evenly(scenes: Path) -> None:
    dataset = Dataset(scenes)
    texts = [text for shard in range(3) for texts in dataset.sidecar(shard)["captions"].to_pylist() for text in texts]
    streamed = Dataset(scenes)
    assert list(sample_captions(streamed, 10**6)) == texts
    assert list(sample_captions(streamed, 7)) == [texts[len(texts) * i // 7] for i in range(7)]
    assert streamed.sidecar.cache_info().currsize == 0  # a set of millions fits because no shard's sidecar is kept


# Through the command ------------------------------------------------------------------------------------------------


def train_words(scenes: Path, *words: str) -> list[str]:
    return [f"data.train={scenes}", "schedule.samples=64", "-o", "run", *words]


@ranks
def test_a_vocabulary_that_the_captions_do_not_allow(scenes: Path, tmp_path: Path, small: Any, here: Any) -> None:
    """Refused before anything is written; the size the error names is one that works, on the same -o."""
    words = ["train", *small.settings, *train_words(scenes), "tokenizer.name=sentencepiece"]
    line = here(tmp_path, *words, code=2).error
    assert line.startswith("error[E_CONFIG_VALUE]") and "tokenizer.vocab_size=8000" in line
    most = re.search(r"set tokenizer\.vocab_size=(\d+) or less", line)
    assert most is not None
    assert not list(tmp_path.iterdir())
    here(tmp_path, *words, f"tokenizer.vocab_size={most[1]}", "--dry-run")
    assert not list(tmp_path.iterdir())
    done = small.cli(tmp_path)(*words, f"tokenizer.vocab_size={most[1]}", "--json")
    assert json.loads(done.stdout)["samples"] == 64 and "sentencepiece" not in done.stderr.lower()


@pytest.fixture(scope="module")
def begun(scenes: Path, tmp_path_factory: pytest.TempPathFactory, small: Any) -> Path:
    """A run stopped at its second step of four."""
    folder = tmp_path_factory.mktemp("begun")
    small(folder, *train_words(scenes, *SMALL, "runtime.stop_at=2"))
    return folder


@ranks
def test_a_run_resumes_with_the_tokenizer_it_began_with(
    scenes: Path, begun: Path, tmp_path: Path, small: Any, here: Any
) -> None:
    shutil.copytree(begun / "run", tmp_path / "run")
    file = tmp_path / "run" / "tokenizer" / MODEL
    model = file.read_bytes()
    cli, words = small.cli(tmp_path), ["train", *small.settings, *train_words(scenes, *SMALL)]
    line = here(tmp_path, *words, "tokenizer.vocab_size=401", code=2).error
    assert line.startswith("error[E_RESUME]") and "tokenizer.vocab_size: 400 → 401" in line
    # Of another run: it reads as a tokenizer, and every id means something else.
    learn(tmp_path / "other")
    shutil.copy(tmp_path / "other" / MODEL, file)
    line = here(tmp_path, *words, code=3).error
    assert line.startswith("error[E_CKPT_HASH]") and MODEL in line and "--fresh" in line
    file.unlink()
    line = here(tmp_path, "export", "run", "-o", "model", code=3).error
    assert line.startswith("error[E_INPUT]") and MODEL in line and "--fresh" in line
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob("**/*.partial"))
    file.write_bytes(model)
    done = cli(*words)
    assert "resuming at step 2" in done.stdout and file.read_bytes() == model
    cli(*words, "tokenizer.vocab_size=350", "runtime.stop_at=1", "--fresh")
    assert file.read_bytes() != model


@ranks
def test_export_and_a_tokenizer_that_was_swapped(scenes: Path, begun: Path, tmp_path: Path, here: Any) -> None:
    from clipwright import load_model

    shutil.copytree(begun / "run", tmp_path / "run")
    model = tmp_path / "model"
    here(tmp_path, "export", "run", "-o", "model")
    assert (model / MODEL).read_bytes() == (tmp_path / "run" / "tokenizer" / MODEL).read_bytes()
    opened = load_model(model)
    vectors = opened.embed_texts(["a red circle", unicodedata.normalize("NFD", "빨간 원"), "빨간 원"])
    assert (vectors[1] == vectors[2]).all() and (vectors[0] != vectors[1]).any()
    learn(tmp_path / "other")
    shutil.copy(tmp_path / "other" / MODEL, model / MODEL)
    with pytest.raises(ClipwrightError) as caught:
        load_model(model)
    assert caught.value.code == "E_MODEL_HASH" and MODEL in str(caught.value)
    # With a manifest made to fit it, only the ids' own fingerprint tells.
    refit(model)
    line = here(tmp_path, "eval", "retrieval", "model=model", f"data={scenes}", code=3).error
    assert line.startswith("error[E_MODEL_HASH]") and "fingerprint" in line and "export the run again" in line
    (model / MODEL).write_bytes(b"\xff" * 1000)
    refit(model)
    with pytest.raises(ClipwrightError) as caught:
        load_model(model)
    assert caught.value.code == "E_INPUT" and "export the model again" in str(caught.value)


def refit(model: Path) -> None:
    """Makes a model's manifest agree with its changed files, as somebody would who swaps one on purpose."""
    manifest = json.loads((model / "manifest.json").read_text())
    manifest["files"] = file_entries(model, manifest["files"])
    write_json(model / "manifest.json", manifest)


@ranks
def test_two_ranks_share_what_the_first_learned(scenes: Path, begun: Path, tmp_path: Path, small: Any) -> None:
    small(tmp_path, *train_words(scenes, *SMALL, "runtime.stop_at=2"), ranks=2)
    one, two = (folder / "run" / "tokenizer" / MODEL for folder in (begun, tmp_path))
    assert hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(two.read_bytes()).digest()
    for ours, theirs in zip(small.losses(tmp_path / "run"), small.losses(begun / "run"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    done = small(tmp_path, *train_words(scenes, "tokenizer.name=sentencepiece", "--fresh"), ranks=2, code=1)
    assert done.stderr.count("error[E_CONFIG_VALUE]") == 1  # both ranks know, none waits, one speaks
    assert (tmp_path / "run" / "latest").exists()  # a refused start leaves the old run alone
