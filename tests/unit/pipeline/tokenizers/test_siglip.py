"""SigLIP's tokenizer: the ids of transformers, and the copy of the vocabulary that a model keeps."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.tokenizers.base import TOKENIZERS
from clipwright.pipeline.tokenizers.siglip import SigLIPTokenizer

CAPTIONS = ["a photo of two dogs in the snow", "the red cat's house", "한국어 문장 그리고 개", "猫と犬", "un été naïf"]
CASES = [
    "",
    " ",
    "\t\n",
    "a dog",
    "A DOG!",
    "it's 3.5% — “quoted”, l'été",
    "...",
    "?a.b-c_d",
    "two  \u3000\u00a0dogs ",
    "</s>",
    "a </s> b",
    "dog</s>",
    "dog </s></s>",
    "<unk>",
    " <unk>  dog",
    "<unk></s>",
    "</s",
    "<UNK> </S>",
    "▁",
    "▁dog",
    "▁ ▁dog▁cat",
    "a ▁</s>",
    "猫と犬と鳥",
    "\u1112\u1161\u11ab국어",
    "한국어 문장",
    "\U0001f468\u200d\U0001f469",
    "ＦＵＬＬ　ｗｉｄｔｈ",
    "&amp; &#233;",
    "\u0000\ufeff\u200b",
    "İstanbul ß ſ Σας",
    "e\u0301te\u0301",
    "\ud7a3\ufe0f",
    "dog. " * 90,
    "dogdog" * 90,
    "x </s> " * 40,
    "<pad> <s> [SEP]",
    "<0x41>",
]


def train(byte_fallback: bool, kind: str) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 40),
        model_writer=model,
        model_type=kind,
        vocab_size=380 if byte_fallback else 110,
        byte_fallback=byte_fallback,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return model.getvalue()


@pytest.fixture(scope="module", params=[(False, "unigram"), (True, "unigram"), (False, "bpe")], ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spiece")
    (folder / "spiece.model").write_bytes(train(*request.param))
    return folder


def build(folder: Path, **fields: Any) -> SigLIPTokenizer:
    return TOKENIZERS.build(TOKENIZERS.preset("siglip", **fields), folder=folder)  # pyright: ignore


@pytest.mark.filterwarnings("ignore:This sequence already has")
@pytest.mark.parametrize("strip", [False, True], ids=["bare", "hub"])
@pytest.mark.parametrize("fields", [{}, {"lower_case": False, "pad": "<pad>"}], ids=["lower", "cased"])
def test_ids_match_transformers(folder: Path, fields: dict[str, Any], strip: bool) -> None:
    """Whether transformers drops white space next to special tokens makes no difference: canonical text has none."""
    from transformers import AddedToken, SiglipTokenizer

    pad = fields.get("pad", "</s>")
    tokens = {
        i: AddedToken(token, lstrip=strip, rstrip=strip, normalized=False, special=True)
        for i, token in enumerate(("<pad>", "</s>", "<unk>"))
        if token in ("</s>", "<unk>", pad)
    }
    theirs = SiglipTokenizer(
        str(folder / "spiece.model"),
        pad_token=pad,
        added_tokens_decoder=tokens,
        do_lower_case=fields.get("lower_case", True),
    )
    assert all(token.lstrip == strip for token in theirs.added_tokens_decoder.values())
    ours = build(folder, **fields)
    rng = np.random.default_rng(0)
    parts = [*"".join(CAPTIONS), " ", "</s>", "<unk>", "<", ">", ".", "▁", "É", "\n", "Dog"]
    texts = CASES + ["".join(rng.choice(parts, size=rng.integers(1, 30))) for _ in range(300)]
    for context in (2, 16, 64):
        expected = [theirs(t, padding="max_length", truncation=True, max_length=context)["input_ids"] for t in texts]
        rows = ours.encode(texts, context)
        assert rows.dtype == np.int32 and rows.shape == (len(texts), context)
        for text, row, ids in zip(texts, rows.tolist(), expected, strict=True):
            assert row == ids, (text, context)
    assert (ours.vocab_size, ours.eot_id, ours.sot_id) == (len(theirs), theirs.eos_token_id, -1)
    assert ours.pad_id == theirs.pad_token_id and theirs.unk_token_id in ours.unknown_ids


def test_copy_save_and_load(folder: Path, tmp_path: Path) -> None:
    config = TOKENIZERS.preset("siglip", folder=str(folder))
    config.train([], tmp_path)
    ours = TOKENIZERS.build(config, folder=tmp_path)
    (saved := tmp_path / "saved").mkdir()
    assert [path.name for path in ours.save(saved)] == ["spiece.model"]
    again = build(saved)
    assert again.fingerprint == ours.fingerprint and (again.encode(CASES, 64) == ours.encode(CASES, 64)).all()
    others = [build(folder, **fields) for fields in ({"lower_case": False}, {"pad": "<pad>"})]
    assert len({ours.fingerprint, *(other.fingerprint for other in others)}) == 3
    assert ours.decode(ours.encode(["A photo, of two DOGS!"], 64)[0]) == "a photo of two dogs"
    with_bytes = any(ours._pieces.IsByte(i) for i in range(ours.vocab_size))
    assert len(ours.unknown_ids) == (257 if with_bytes else 1)


def test_invalid_models_are_rejected(folder: Path, tmp_path: Path) -> None:
    def code(fields: dict[str, Any], *parts: str) -> str:
        with pytest.raises(ClipwrightError) as caught:
            TOKENIZERS.preset("siglip", **fields).train([], tmp_path)
        assert all(part in str(caught.value) for part in parts), caught.value
        return caught.value.code

    assert code({}, "tokenizer.folder", "DIR") == "E_CONFIG_VALUE"
    assert code({"folder": str(tmp_path)}, "spiece.model", "No such file") == "E_INPUT"
    assert code({"folder": str(folder), "pad": "<none>"}, "spiece.model", "'<none>'", "tokenizer.pad") == "E_INPUT"
    (tmp_path / "spiece.model").write_bytes(b"\xff" * 99)
    assert code({"folder": str(tmp_path)}, "spiece.model") == "E_INPUT"


@pytest.mark.parametrize(
    ("field", "value"),
    [("lower_case", False), ("end", "<pad>"), ("unknown", "<pad>"), ("pad", "<pad>")],
)
def test_every_setting_changes_the_ids(field: str, value: Any, folder: Path) -> None:
    settings = ({}, {field: value})
    ids = [TOKENIZERS.build(TOKENIZERS.preset("siglip", **one), folder=folder).encode(CASES, 16) for one in settings]
    assert not np.array_equal(*ids), f"{field} is ignored"
