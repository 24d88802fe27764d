"""The tokenizer of a transformers folder, opened by transformers and converted to one of ours."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.log import quiet_transformers
from clipwright.pipeline.interop.formats.base import incompatible
from clipwright.pipeline.interop.huggingface.folder import TOKENIZER_FILES, read_json
from clipwright.pipeline.tokenizers import clip_bpe
from clipwright.pipeline.tokenizers.base import TOKENIZERS, Tokenizer, TokenizerConfig
from clipwright.pipeline.tokenizers.siglip import MODEL

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
LOWERING_CLASSES = ("Siglip2Tokenizer", "Siglip2TokenizerFast")
UNLIMITED_LENGTH = 10**9  # transformers sets a larger model_max_length if a tokenizer states none

TokenizerTree = dict[str, Any]  # a tokenizer's config as a plain tree, without fields outside the model


def open_tokenizer(folder: Path, config: Any, *, sentencepiece: bool) -> Any:
    """Opens a folder's tokenizer with transformers, offline and without running code of the folder.

    config: the folder's config as an object of transformers. sentencepiece: whether `tokenizer.model`, if it is the
    only vocabulary, is a SentencePiece model.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415  takes seconds that only an import needs

    with tempfile.TemporaryDirectory() as name:
        # A copy, since transformers does not find SigLIP's vocabulary under every name that folders give it.
        copy = Path(name)
        for file in TOKENIZER_FILES:
            if (folder / file).is_file():
                shutil.copyfile(folder / file, copy / file)
        # Without a vocabulary or without merges, transformers opens an empty tokenizer instead of failing.
        present = [file for file in VOCABULARIES if (copy / file).is_file()]
        if not present:
            raise _unreadable(folder, f"none of the files {', '.join(VOCABULARIES)}")
        if present == ["vocab.json"] and not (copy / "merges.txt").is_file():
            raise _unreadable(folder / "merges.txt", "vocab.json without it")
        if sentencepiece and present == ["tokenizer.model"]:
            (copy / "tokenizer.model").rename(copy / MODEL)
        try:
            with quiet_transformers():
                return AutoTokenizer.from_pretrained(
                    copy, config=config, local_files_only=True, trust_remote_code=False
                )
        except Exception as error:  # an untrusted folder may make the library raise anything
            raise _unreadable(folder, f"transformers: {error}") from None


def check_length(folder: Path, theirs: Any, context: int) -> None:
    """Raises E_IMPORT if the tokenizer's maximum length contradicts the text tower's context."""
    longest = theirs.model_max_length
    if longest < UNLIMITED_LENGTH and longest != context:
        where = f"{folder / 'tokenizer_config.json'}: model_max_length"
        raise incompatible(where, f"{context}, as in text_config.max_position_embeddings", longest)


def check_class(folder: Path) -> None:
    """Raises E_IMPORT for a tokenizer whose class changes the text before its tokenizer.json does."""
    config = folder / "tokenizer_config.json"
    name = read_json(config).get("tokenizer_class") if config.is_file() else None
    if name in LOWERING_CLASSES:
        found = f"{name}, which lower-cases text in its class"
        fix = "models with this tokenizer cannot be imported yet"
        raise incompatible(f"{config}: tokenizer_class", "normalization in tokenizer.json alone", found, fix)


def check_settings(folder: Path, theirs: Any) -> None:
    """Raises E_IMPORT for settings of a tokenizer that ours do not have."""
    config = folder / "tokenizer_config.json"
    if theirs.padding_side != "right":
        fix = "set it to right only if the model was trained so; padding on the left cannot be imported yet"
        raise incompatible(f"{config}: padding_side", "right", theirs.padding_side, fix)
    others = {theirs.bos_token, theirs.eos_token, theirs.unk_token}
    if type(theirs).__name__ == "CLIPTokenizer" and theirs.pad_token not in others and theirs.pad_token in clip_words():
        fix = f"set pad_token to {theirs.eos_token!r} there and in special_tokens_map.json: no padding is read"
        found = f"{theirs.pad_token!r}, which is a word of the vocabulary: it would be cut out of captions"
        raise incompatible(f"{config}: pad_token", "a token that stands for nothing else", found, fix)


def clip_words() -> list[str]:
    """Returns the tokens of CLIP's vocabulary."""
    path = Path(clip_bpe.__file__).parent / clip_bpe.VOCABULARY
    return clip_bpe.token_list(clip_bpe.parse_merges(path, clip_bpe.read_vocabulary(path)[1]))


def clip_tokenizer(theirs: Any) -> tuple[TokenizerTree, Tokenizer] | None:
    """Returns our CLIP tokenizer if `theirs` has CLIP's vocabulary, else None."""
    if type(theirs).__name__ != "CLIPTokenizer":
        return None
    path = Path(clip_bpe.__file__).parent / clip_bpe.VOCABULARY
    our_merges = clip_bpe.parse_merges(path, clip_bpe.read_vocabulary(path)[1])
    our_vocabulary = {token: i for i, token in enumerate(clip_bpe.token_list(our_merges))}
    their_merges = json.loads(theirs.backend_tokenizer.to_str())["model"]["merges"]
    if theirs.get_vocab() != our_vocabulary or [tuple(pair) for pair in their_merges] != our_merges:
        return None
    config = TOKENIZERS.preset("clip_bpe", clean="transformers")
    return dataclasses.asdict(config), TOKENIZERS.build(config)


def siglip_tokenizer(folder: Path, theirs: Any) -> tuple[TokenizerTree, Tokenizer] | None:
    """Returns our SigLIP tokenizer if `theirs` is a SiglipTokenizer, else None. Raises E_IMPORT."""
    if type(theirs).__name__ != "SiglipTokenizer":
        return None
    special = {"end": theirs.eos_token, "unknown": theirs.unk_token, "pad": theirs.pad_token}
    where = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder"
    strips: set[bool] = set()
    for token in theirs.added_tokens_decoder.values():
        if token.content not in special.values():
            raise incompatible(where, f"the tokens {', '.join(sorted(set(special.values())))}", token.content)
        if token.single_word or token.lstrip != token.rstrip:
            raise incompatible(where, "single_word false, lstrip and rstrip equal", repr(token))
        strips.add(token.lstrip)
    if len(strips) > 1:
        raise incompatible(where, "the same lstrip for all tokens", "both true and false")
    fields = {**special, "lower_case": bool(theirs.do_lower_case)}
    with tempfile.TemporaryDirectory() as name:
        file = MODEL if (folder / MODEL).is_file() else "tokenizer.model"
        shutil.copyfile(folder / file, Path(name) / MODEL)
        return _copied(TOKENIZERS.preset("siglip", folder=name, **fields))


def generic_tokenizer(folder: Path) -> tuple[TokenizerTree, Tokenizer]:
    """Returns a copy of the folder's tokenizer, which the `tokenizers` library opens. Raises E_INPUT."""
    return _copied(TOKENIZERS.preset("huggingface", folder=str(folder)))


def _copied(config: TokenizerConfig) -> tuple[TokenizerTree, Tokenizer]:
    with tempfile.TemporaryDirectory() as name:
        config.train([], Path(name))
        tokenizer = TOKENIZERS.build(config, folder=Path(name))
    tree = {key: value for key, value in dataclasses.asdict(config).items() if key not in config.external_fields}
    return tree, tokenizer


def _unreadable(where: Path, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_INPUT",
        "the model folder's tokenizer cannot be read",
        where=where,
        found=found,
        fix="save the tokenizer into the folder with save_pretrained",
    )
