"""The tokenizer of a transformers folder as one of ours."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.log import quiet_transformers
from clipwright.pipeline.interop.source import TOKENIZER_FILES, Source, refused
from clipwright.pipeline.tokenizers import clip_bpe
from clipwright.pipeline.tokenizers.base import TOKENIZERS, Tokenizer, TokenizerConfig
from clipwright.pipeline.tokenizers.siglip import MODEL

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
UNSTATED = 10**9  # transformers writes a number beyond this where a tokenizer states no longest text


def open_theirs(source: Source) -> Any:
    """The tokenizer as transformers opens it: offline, and without code of the folder's."""
    from transformers import AutoTokenizer  # noqa: PLC0415  see source.py

    with tempfile.TemporaryDirectory() as name:
        # A copy, since SigLIP's vocabulary may bear a name under which transformers does not look for it.
        copy = Path(name)
        for file in TOKENIZER_FILES:
            if (source.folder / file).is_file():
                shutil.copyfile(source.folder / file, copy / file)
        # transformers opens a tokenizer without its vocabulary, or without its merges, as one of no words.
        found = [file for file in VOCABULARIES if (copy / file).is_file()]
        if not found:
            raise _unreadable(source.folder, f"none of the files {', '.join(VOCABULARIES)}")
        if found == ["vocab.json"] and not (copy / "merges.txt").is_file():
            raise _unreadable(source.folder / "merges.txt", "vocab.json without it")
        if source.kind == "siglip" and found == ["tokenizer.model"]:
            (copy / "tokenizer.model").rename(copy / MODEL)
        try:
            with quiet_transformers():
                return AutoTokenizer.from_pretrained(
                    copy, config=source.config, local_files_only=True, trust_remote_code=False
                )
        except Exception as error:  # whatever a library meets in a stranger's folder
            raise _unreadable(source.folder, f"transformers says: {error}") from None


def take_tokenizer(source: Source, theirs: Any) -> tuple[dict[str, Any], Tokenizer]:
    """Config and tokenizer of ours with the ids of `theirs`; E_IMPORT where what it states cannot be taken over."""
    longest, context = theirs.model_max_length, source.config.text_config.max_position_embeddings
    if longest < UNSTATED and longest != context:
        where = f"{source.folder / 'tokenizer_config.json'}: model_max_length"
        raise refused(where, f"text_config.max_position_embeddings, {context}, the tower's longest text", longest)
    if source.kind == "siglip" and theirs.pad_token_id is None:
        raise refused(f"{source.folder / 'tokenizer_config.json'}: pad_token", "a token to pad with", "nothing")
    kind = type(theirs).__name__
    if kind == "SiglipTokenizer":
        return _siglip(source, theirs)
    if kind == "CLIPTokenizer" and _is_clips(theirs):
        config = TOKENIZERS.preset("clip_bpe", clean="transformers")
        return dataclasses.asdict(config), TOKENIZERS.build(config)
    return _learned(TOKENIZERS.preset("huggingface", folder=str(source.folder)))


def _siglip(source: Source, theirs: Any) -> tuple[dict[str, Any], Tokenizer]:
    special = {"end": theirs.eos_token, "unknown": theirs.unk_token, "pad": theirs.pad_token}
    where = f"{source.folder / 'tokenizer_config.json'}: added_tokens_decoder"
    strips: set[bool] = set()
    for token in theirs.added_tokens_decoder.values():
        if token.content not in special.values():
            raise refused(where, f"the tokens {', '.join(sorted(set(special.values())))}", token.content)
        if token.single_word or token.lstrip != token.rstrip:
            raise refused(where, "single_word false, lstrip and rstrip equal", repr(token))
        strips.add(token.lstrip)
    if len(strips) > 1:
        raise refused(where, "lstrip alike in all tokens", "both")
    fields = {**special, "lower_case": bool(theirs.do_lower_case), "strip": strips == {True}}
    with tempfile.TemporaryDirectory() as name:
        file = MODEL if (source.folder / MODEL).is_file() else "tokenizer.model"
        shutil.copyfile(source.folder / file, Path(name) / MODEL)
        return _learned(TOKENIZERS.preset("siglip", folder=name, **fields))


def _learned(config: TokenizerConfig) -> tuple[dict[str, Any], Tokenizer]:
    """The config without its folder, and the tokenizer, whose files are copied from there."""
    with tempfile.TemporaryDirectory() as name:
        config.train([], Path(name))
        tokenizer = TOKENIZERS.build(config, folder=Path(name))
    tree = {key: value for key, value in dataclasses.asdict(config).items() if key not in config.external_fields}
    return tree, tokenizer


def _is_clips(theirs: Any) -> bool:
    """Whether ids and merges are those of CLIP's vocabulary, which we have."""
    path = Path(clip_bpe.__file__).parent / clip_bpe.VOCABULARY
    ours = clip_bpe.parse_merges(path, clip_bpe.read_vocabulary(path)[1])
    ids = {token: i for i, token in enumerate(clip_bpe.token_list(ours))}
    merges = json.loads(theirs.backend_tokenizer.to_str())["model"]["merges"]
    return theirs.get_vocab() == ids and [tuple(pair) for pair in merges] == ours


def _unreadable(place: Path, found: str) -> ClipwrightError:
    return ClipwrightError(
        "E_INPUT",
        "a model folder whose tokenizer cannot be read",
        where=place,
        found=found,
        fix="save the tokenizer into the folder with save_pretrained",
    )
