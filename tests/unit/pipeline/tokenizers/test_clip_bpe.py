"""CLIP's BPE against a slow version of OpenAI's algorithm and against the tokenizer of transformers."""

from __future__ import annotations

import gzip
import html
import pickle
import random
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import ftfy
import numpy as np
import pytest
import regex

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.tokenizers import clip_bpe
from clipwright.pipeline.tokenizers.base import TOKENIZERS, trim

ROOT = Path(__file__).parents[4]
SHIPPED = ROOT / "pipeline/tokenizers/bpe_simple_vocab_16e6.txt.gz"
PAIRS = ROOT.parent / "shared/data/pairs"
SOT, EOT = 49406, 49407

CASES = [
    "",
    " ",
    "\n\t ",
    "a",
    "A",
    "!",
    "!!",
    "a photo of a cat",
    "  two   spaces\tand\r\nlines \n",
    "don't can't I'm they'll we've you're he'd it's",
    "O'REILLY'S D'Artagnan'll",
    "''s 's's '",
    "rock'n'roll 'tis",
    "42 3.14 1,000,000 2nd B2B x86_64 v2.0-rc1",
    "snake_case kebab-case CamelCase ALLCAPS",
    "___ --- ...",
    "a.b,c;d:e",
    "http://example.com/a?b=c&d=e#f",
    "user@example.org",
    "C++ & C#",
    "#hashtag @mention $5.00 50% (a) [b] {c}",
    "“curly” ‘quotes’ — dashes – and … dots",
    "it’s don’t ‘S ’S",
    "«guillemets» „low“ ‚one‘",
    "a′ 5″ ʼs",
    "&amp; &lt;b&gt; &quot;x&quot; &#39;s &#x27;t &nbsp;",
    "&amp;amp; &amp;lt;",
    "&eacute;&#233;&#xe9;",
    "AT&T R&D &",
    "&#0; &#28; &#x85; &#128; &bogus; &copy &hellip;",
    "&lt;|endoftext|&gt;",
    "&amp;lt;|startoftext|&amp;gt;",
    "\uff28\uff45\uff4c\uff4c\uff4f \uff11\uff12\uff13\uff01",
    "ﬁne ﬂow eﬃcient ﬅ ﬆ",
    "Ⅷ ½ ² ①",
    "ｶﾞｷﾞ",
    "schÃ¶n cafÃ© â€œmojibakeâ€\x9d",
    "l’Ã©tÃ©",
    "ä½\xa0å¥½",
    "naïve café Zürich ÅNGSTRÖM Ångström",
    "caf\u00e9 cafe\u0301",
    "A\u030a \u00c5 \u212b",
    "\u1e9b\u0323",
    "x\u0345y !\u0345? \u03b1\u0345",
    "İstanbul ISTANBUL ıi",
    "ΟΔΟΣ ὈΔΥΣΣΕΎΣ Σ",
    "STRAẞE straße",
    "猫と犬",
    "一只猫坐在垫子上。",
    "你好，世界！",
    "東京2020",
    "ありがとう",
    "カタカナ",
    "고양이 사진",
    "\u1100\u1161\u11a8 \u1112\u1161\u11ab\u1100\u1173\u11af",
    "한국어와 English",
    "\uac01\u11a8",
    "кошка на столе",
    "Ёлка ЙОГУРТ",
    "قطة على الطاولة",
    "חתול על השולחן",
    "एक बिल्ली",
    "แมวบนโต๊ะ",
    "ქართული ᲥᲐᲠᲗᲣᲚᲘ",
    "😀 😃 👍🏽 👩‍👩‍👧‍👦 🇩🇪 ❤️ 🏳️‍🌈",
    "cat😺dog",
    "♥♦♣♠ → ← ✓",
    "∑ ∫ √2 ≤ 3",
    "\u200bzero\u200dwidth\ufeff",
    "a\xa0b\u3000c\u2028d\x85e",
    "\x00 \x07 \x0b \x0c \x1b[31mred\x1b[0m \x1c\x1d\x1e\x1f \x7f",
    "a\x0cb",
    "a\x1cb",
    "tab\tseparated",
    "\ufffd \ufffe",
    "ſo 'ſ ſtop K\u212a",
    "<|ſtartoftext|>",
    "<|startoftext|>",
    "<|endoftext|>",
    "a<|endoftext|>b",
    "a <|endoftext|> b",
    "!!<|endoftext|>!!",
    "<|ENDOFTEXT|> <|StartOfText|>!?",
    "<|endoftext|><|endoftext|>",
    "<| endoftext |>",
    "<|end",
    "<||>",
    "</w> <w> </W>a",
    "a</w>b",
    "supercalifragilisticexpialidocious " * 3,
    "antidisestablishmentarianism" * 30,
    "word " * 200,
    "é" * 500,
    "猫" * 300,
    "!" * 400,
    "a1" * 200,
    "😀" * 100,
    "x" * 5000,
]


def varied(count: int) -> list[str]:
    """Random strings: letters of many scripts, marks, entities, punctuation, spaces."""
    rng = random.Random(0)
    pieces = [word for case in CASES for word in case.split(" ")[:6] if len(word) < 40]
    blocks = [(0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x1E00, 0x2000), (0x2000, 0x2100)]
    blocks += [(0x1100, 0x1200), (0x3040, 0x3100), (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0xFB00, 0xFB07)]
    blocks += [(0xFF01, 0xFF5F), (0x1F600, 0x1F650), (0x5D0, 0x5EB), (0x900, 0x980), (0xD7B0, 0xD7FC)]
    out = []
    for _ in range(count):
        text = ""
        for _ in range(rng.randint(1, 9)):
            if rng.random() < 0.5:
                text += rng.choice(pieces)
            else:
                block = rng.choice(blocks)
                text += "".join(chr(rng.randrange(*block)) for _ in range(rng.randint(1, 5)))
            text += rng.choice(["", "", " ", "  ", "'s", ".", ", ", "\n"])
        out.append(text)
    return out


@cache
def build(clean: str = "openai") -> clip_bpe.CLIPBPE:
    return TOKENIZERS.build(TOKENIZERS.preset("clip_bpe", clean=clean))


@cache
def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]], dict[int, str]]:
    """Ids, merges and the character of each byte, built as in OpenAI's simple_tokenizer.py."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    numbers, symbols, spare = printable[:], printable[:], 0
    for byte in range(256):
        if byte not in printable:
            numbers.append(byte)
            symbols.append(256 + spare)
            spare += 1
    lines = gzip.decompress(SHIPPED.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    tokens = [chr(s) for s in symbols]
    tokens = tokens + [t + "</w>" for t in tokens] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(tokens)}
    return ids, merges, {n: chr(s) for n, s in zip(numbers, symbols, strict=True)}


@cache
def ranks() -> dict[tuple[str, str], int]:
    return {merge: i for i, merge in enumerate(vocabulary()[1])}


@cache
def slow_bpe(word: str) -> tuple[str, ...]:
    """Merges the adjacent pair of lowest rank, everywhere, until no pair has a rank."""
    if word in ("<|startoftext|>", "<|endoftext|>"):
        return (word,)
    parts = [*word[:-1], word[-1] + "</w>"]
    while len(parts) > 1:
        best = min(pairwise(parts), key=lambda pair: ranks().get(pair, float("inf")))
        if best not in ranks():
            break
        joined: list[str] = []
        for part in parts:
            if joined and (joined[-1], part) == best and not joined[-1].startswith("\0"):
                joined[-1] = "\0" + "".join(best)  # marked, so that it is not merged again in this round
            else:
                joined.append(part)
        parts = [part.removeprefix("\0") for part in joined]
    return tuple(parts)


PATTERN = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


def slow_openai(text: str) -> list[int]:
    """OpenAI's encode: fix text, unescape twice, collapse white space, lowercase, split, bytes, merges."""
    ids, _, symbol = vocabulary()
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = regex.sub(r"\s+", " ", text).strip().lower()
    words = ("".join(symbol[b] for b in word.encode()) for word in PATTERN.findall(text))
    return [ids[token] for word in words for token in slow_bpe(word)]


@cache
def transformers_ids() -> Callable[[str], list[int]]:
    from transformers import CLIPTokenizer

    ids, merges, _ = vocabulary()
    theirs = CLIPTokenizer(vocab=ids, merges=merges)
    return lambda text: theirs(text, add_special_tokens=False, verbose=False)["input_ids"]


def check(clean: str, texts: list[str]) -> None:
    reference = slow_openai if clean == "openai" else transformers_ids()
    for text in texts:
        expected = [SOT, *reference(text), EOT]
        for context in (77, len(expected)):
            row = build(clean).encode([text], context)[0].tolist()
            truncated = [*expected[: context - 1], EOT] if len(expected) > context else expected
            assert row == truncated + [0] * (context - len(truncated)), (text, context)


@pytest.mark.parametrize("clean", ["openai", "transformers"])
def test_ids_match_the_reference_on_hard_cases(clean):
    check(clean, CASES)


@pytest.mark.parametrize("clean", ["openai", "transformers"])
def test_ids_match_the_reference_on_random_strings(clean):
    check(clean, varied(600))


@pytest.mark.skipif(not PAIRS.exists(), reason="no ../shared/data")
@pytest.mark.parametrize("clean", ["openai", "transformers"])
def test_ids_match_the_reference_on_captions(clean):
    import pyarrow.parquet as pq

    texts: list[str] = []
    for file in ("flickr8k-val.parquet", "flickr8k-train-00000-of-00006.parquet"):
        column = pq.read_table(PAIRS / file, columns=["captions"]).column("captions")
        texts += [caption for captions in column.to_pylist() for caption in captions]
    assert len(texts) >= 10_000
    check(clean, texts[:10_000])


def test_known_ids():
    """The ids of the example in CLIP's README."""
    rows = build().encode(["a diagram", "a dog", "a cat"], 77)
    assert rows.dtype == np.int32 and rows.shape == (3, 77)
    assert rows[:, :5].tolist() == [[SOT, 320, 22697, EOT, 0], [SOT, 320, 1929, EOT, 0], [SOT, 320, 2368, EOT, 0]]
    assert (rows[:, 5:] == 0).all()
    tok = build()
    assert (tok.vocab_size, tok.sot_id, tok.eot_id, tok.pad_id) == (49408, SOT, EOT, 0)


def test_no_texts_give_no_rows():
    assert build().encode([], 77).shape == (0, 77)


def test_truncated_text_ends_in_eot():
    row = build().encode(["dog " * 100], 8)[0].tolist()
    assert row == [SOT, *[1929] * 6, EOT]
    assert build().encode(["dog dog"], 4)[0].tolist() == [SOT, 1929, 1929, EOT]
    assert build().encode(["dog"], 2)[0].tolist() == [SOT, EOT]


def test_the_two_cleanings_differ_on_known_cases():
    for text in ("“hi”", "a &amp; b", "&#233;", "\uff21\uff22", "ﬁne", "schÃ¶n"):
        first, second = (build(clean).encode([text], 20) for clean in ("openai", "transformers"))
        assert (first != second).any(), text


def test_a_full_cache_changes_no_id(monkeypatch):
    texts = varied(40)
    expected = build().encode(texts, 77)
    monkeypatch.setattr(clip_bpe, "CACHE_WORDS", 3)
    small = TOKENIZERS.build(TOKENIZERS.preset("clip_bpe"))
    assert np.array_equal(small.encode(texts, 77), expected) and len(small._cache) <= 3


def test_decode_returns_the_words():
    tok = build()
    for text in ("a dog ' s life , 4 2 !", "猫 😀 naïve", ""):
        assert tok.decode(tok.encode([text], 77)[0]).replace(" ", "") == text.replace(" ", "")
    assert tok.decode([SOT, 320, 1929, EOT, 320, 0]) == "a dog"
    assert tok.decode(np.array([320, 1929])) == "a dog"


def test_fingerprint_covers_what_determines_the_ids(tmp_path):
    assert build().fingerprint != build("transformers").fingerprint
    repacked = tmp_path / clip_bpe.VOCABULARY
    repacked.write_bytes(gzip.compress(gzip.decompress(SHIPPED.read_bytes()), 1))
    again = TOKENIZERS.build(TOKENIZERS.preset("clip_bpe"), folder=tmp_path)
    assert again.fingerprint == build().fingerprint
    lines = gzip.decompress(SHIPPED.read_bytes()).split(b"\n")
    lines[40000], lines[40001] = lines[40001], lines[40000]
    repacked.write_bytes(gzip.compress(b"\n".join(lines)))
    assert TOKENIZERS.build(TOKENIZERS.preset("clip_bpe"), folder=tmp_path).fingerprint != build().fingerprint


def test_save_and_load(tmp_path):
    tok = build("transformers")
    paths = tok.save(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in paths] == [clip_bpe.VOCABULARY] == [p.name for p in paths]
    assert paths[0].read_bytes() == SHIPPED.read_bytes()
    again = TOKENIZERS.build(TOKENIZERS.preset("clip_bpe", clean="transformers"), folder=tmp_path)
    texts = varied(30)
    assert again.fingerprint == tok.fingerprint and np.array_equal(again.encode(texts, 30), tok.encode(texts, 30))


def test_tokenizer_can_be_pickled():
    texts = varied(30)
    assert np.array_equal(pickle.loads(pickle.dumps(build())).encode(texts, 30), build().encode(texts, 30))


@pytest.mark.parametrize("change", ["missing", "not gzip", "truncated", "short", "unknown symbol", "repeated merge"])
def test_invalid_vocabulary_is_rejected(change, tmp_path):
    path, packed = tmp_path / clip_bpe.VOCABULARY, SHIPPED.read_bytes()
    lines = gzip.decompress(packed).split(b"\n")
    if change == "short":
        lines = lines[:1000]
    elif change == "unknown symbol":
        lines[5] = b"zzzzqqqq xxxxyyyy"
    elif change == "repeated merge":
        lines[48894] = lines[48893]  # the last two, which no other merge uses
    if change != "missing":
        complete = gzip.compress(b"\n".join(lines), 1)
        path.write_bytes({"not gzip": b"merges", "truncated": packed[:5000]}.get(change, complete))
    with pytest.raises(ClipwrightError) as caught:
        TOKENIZERS.build(TOKENIZERS.preset("clip_bpe"), folder=tmp_path)
    assert caught.value.code == "E_INPUT" and str(path) in caught.value.where and caught.value.fix


@pytest.mark.parametrize("longest", range(1, 20))
def test_trimmed_captions_keep_their_end(longest: int) -> None:
    """To the longest caption, rounded up to 8: one of 8k + 1 tokens needs the next multiple."""
    tokens = np.full((3, 20), 0, np.int32)
    for row, length in enumerate((longest, 1, max(longest - 1, 1))):
        tokens[row, :length] = 5
        tokens[row, length - 1 :] = EOT
    trimmed = trim(tokens, EOT, "longest")
    assert trimmed.shape == (3, min(-(-longest // 8) * 8, 20))
    assert (trimmed == EOT).any(axis=1).all() and (trimmed == tokens[:, : trimmed.shape[1]]).all()
    assert trim(tokens, EOT, "fixed") is tokens
