"""Figures of a dataset folder, from its manifest and sidecars alone: sizes, captions, scripts, duplicates, rejects."""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from clipwright.data_prep.inspect.dataset_files import open_dataset, read_sidecar
from clipwright.pipeline.core.log import Progress

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
_SIDES = (0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)  # pixels
_ASPECTS = (0.0, 0.5, 0.67, 0.8, 1.0, 1.01, 1.25, 1.5, 2.0)  # width by height
_TOP = 10
# How Unicode's character names begin, where that is not the script's own name.
_SCRIPTS = {"CJK": "Han", "IDEOGRAPHIC": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana", "KATAKANA-HIRAGANA": "Kana"}
_SCRIPTS |= {"FULLWIDTH": "Latin", "HALFWIDTH": "Kana"}
_NO_SCRIPT = ("MODIFIER", "FEMININE", "MASCULINE", "MICRO", "MATHEMATICAL", "DOUBLE-STRUCK", "SCRIPT", "BLACK-LETTER")


def stats(folder: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Figures of a dataset folder; holds a few numbers a sample and a caption, no pixels and no text."""
    manifest = open_dataset(folder)
    total = sum(shard["samples"] for shard in manifest["shards"])
    gathered: dict[str, list[np.ndarray]] = {}
    scripts: Counter[str] = Counter()
    with Progress("stats", total, "samples", quiet=quiet) as progress:
        for shard in manifest["shards"]:
            table = read_sidecar(folder, shard, ["captions", "width", "height", "size", "dhash"])
            lists = table["captions"].to_pylist()
            texts = [text for captions in lists for text in captions]
            scripts.update(map(script, texts))
            found = {name: table[name].to_numpy() for name in ("width", "height", "size", "dhash")}
            found["captions"] = _numbers(map(len, lists))
            found["characters"] = _numbers(map(len, texts))
            found["words"] = _numbers(len(text.split()) for text in texts)
            found["hash"] = _numbers(map(hash, texts))  # of this process, never shown
            for name, values in found.items():
                gathered.setdefault(name, []).append(values)
            progress.add(table.num_rows)
    values = {name: np.concatenate(parts) for name, parts in gathered.items()}
    width, height = values["width"], values["height"]
    shortest, aspect = np.minimum(width, height), width / height
    return {
        "data": str(folder),
        "fingerprint": manifest["fingerprint"],
        "samples": total,
        "shards": len(manifest["shards"]),
        "bytes": sum(shard["tar_bytes"] for shard in manifest["shards"]),
        "image_bytes": _quantiles(values["size"]),
        "width": _quantiles(width),
        "height": _quantiles(height),
        "aspect": _quantiles(aspect),
        "shortest_side_histogram": _histogram(shortest, _SIDES),
        "aspect_histogram": _histogram(aspect, _ASPECTS),
        "captions": len(values["hash"]),
        "captions_dropped": manifest["captions_dropped"],
        "captions_per_image": _quantiles(values["captions"]),
        "caption_characters": _quantiles(values["characters"]),
        "caption_words": _quantiles(values["words"]),
        "scripts": dict(scripts.most_common()),
        "duplicates": {"exact_merged": manifest["merged"], **_near(values["dhash"])},
        "equal_captions": _equal(folder, manifest["shards"], values["hash"]),
        "rows_in": manifest["rows_in"],
        "rejected": manifest["rejected"],
        "rejects": manifest["rejects"],
    }


def script(text: str) -> str:
    """The writing of a caption's letters by Unicode: Latin, Hangul, Han, Kana (with or without Han), …, mixed, none."""
    if text.isascii():
        return "Latin" if any(map(str.isalpha, text)) else "none"
    met = set(map(_letter_script, text)) - {""}
    if met == {"Han", "Kana"}:
        return "Kana"
    return met.pop() if len(met) == 1 else "mixed" if met else "none"


@functools.lru_cache(maxsize=1 << 16)
def _letter_script(character: str) -> str:
    if not character.isalpha():
        return ""
    word = unicodedata.name(character, "OTHER").split()[0]
    return "" if word in _NO_SCRIPT else _SCRIPTS.get(word, word.capitalize())


def _numbers(values: Any) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64)


def _quantiles(values: np.ndarray) -> dict[str, float]:
    found = np.quantile(values, list(QUANTILES.values()))
    named = {name: round(float(value), 3) for name, value in zip(QUANTILES, found, strict=True)}
    return named | {"mean": round(float(values.mean()), 3)}


def _histogram(values: np.ndarray, edges: tuple[float, ...]) -> dict[str, int]:
    """How many values lie in each bin [edge, next edge), the last one open; empty bins at both ends are left out."""
    counts = np.histogram(values, [*edges, np.inf])[0]
    names = [f"{low:g}-{high:g}" for low, high in itertools.pairwise(edges)] + [f"{edges[-1]:g}-"]
    filled = np.flatnonzero(counts)
    return {names[i]: int(counts[i]) for i in range(filled[0], filled[-1] + 1)}


def _near(dhashes: np.ndarray) -> dict[str, int]:
    """Pictures that share their difference hash with another: look-alikes, copies of another size or quality."""
    counts = np.unique(dhashes, return_counts=True)[1]
    shared = counts[counts > 1]
    return {"near_groups": len(shared), "near_images": int(shared.sum())}


def _equal(folder: Path, shards: list[dict[str, Any]], hashes: np.ndarray) -> dict[str, Any]:
    """How many captions stand with more than one image, and the most frequent; ties in order of appearance."""
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))[:_TOP]
    wanted = {int(first[i]): int(counts[i]) for i in order if counts[i] > 1}
    texts: dict[int, str] = {}
    seen = 0
    for shard in shards if wanted else ():
        column = read_sidecar(folder, shard, ["captions"])["captions"].combine_chunks().flatten()
        texts |= {at: column[at - seen].as_py() for at in wanted if seen <= at < seen + len(column)}
        seen += len(column)
    top = [{"caption": texts[at], "images": n} for at, n in wanted.items()]
    return {"distinct": len(counts), "repeated": int((counts > 1).sum()), "top": top}


def table(result: dict[str, Any]) -> str:
    """The figures for a person."""
    lines = [f"{result['samples']:,} samples in {result['shards']} shards, {result['bytes'] / 1e6:,.1f} MB of tars", ""]
    lines.append(" " * 20 + "".join(f"{name:>9}" for name in (*QUANTILES, "mean")))
    named = {"width": "width", "height": "height", "aspect": "width / height", "image_bytes": "image bytes"}
    named |= {"captions_per_image": "captions an image", "caption_characters": "characters", "caption_words": "words"}
    for name, shown in named.items():
        lines.append(f"{shown:<20}" + "".join(f"{_short(value):>9}" for value in result[name].values()))
    lines += ["", "shortest side, pixels", *_bars(result["shortest_side_histogram"])]
    lines += ["", "width / height", *_bars(result["aspect_histogram"])]
    lines += ["", "captions by script", *_bars(result["scripts"])]
    copies, equal = result["duplicates"], result["equal_captions"]
    lines += ["", f"exact duplicates merged: {copies['exact_merged']:,}"]
    lines.append(f"equal difference hash: {copies['near_images']:,} pictures in {copies['near_groups']:,} groups")
    lines.append(f"captions: {result['captions']:,}, {equal['distinct']:,} distinct, {equal['repeated']:,} repeated")
    lines += [f"  {row['images']:>7,} × {_cut(row['caption'])}" for row in equal["top"]]
    lines += ["", f"rejected: {result['rejected']:,} of {result['rows_in']:,} rows", *_bars(result["rejects"])]
    if result["captions_dropped"]:
        lines.append(f"bad captions left out of written samples: {result['captions_dropped']:,}")
    return "\n".join(lines)


def _bars(counts: dict[str, int]) -> list[str]:
    most, width = max(counts.values(), default=1), max(map(len, counts), default=0)
    return [f"  {name:<{width}}  {n:>9,}  {'█' * round(30 * n / most)}".rstrip() for name, n in counts.items()]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"
