"""Statistics of a dataset folder, from manifest and sidecars only: sizes, captions, scripts, duplicates, rejects."""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from clipwright.pipeline.core.activity import Progress
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.tables import align, shorten_to
from clipwright.pipeline.folders.dataset import read_dataset_manifest, read_sidecar

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
_SIDE_EDGES = (0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)  # pixels
_ASPECT_EDGES = (0.0, 0.5, 0.67, 0.8, 1.0, 1.01, 1.25, 1.5, 2.0)  # width / height
_TOP_CAPTIONS = 10
_BAR_CELLS = 30
_CAPTION_CELLS = 66  # shown per caption
# Scripts whose characters have Unicode names that start with another word than the script's name.
_SCRIPTS = {
    "CJK": "Han",
    "IDEOGRAPHIC": "Han",
    "HIRAGANA": "Kana",
    "KATAKANA": "Kana",
    "KATAKANA-HIRAGANA": "Kana",
    "FULLWIDTH": "Latin",
    "HALFWIDTH": "Kana",
}
# First words of the names of letters that belong to no script.
_NO_SCRIPT = ("MODIFIER", "FEMININE", "MASCULINE", "MICRO", "MATHEMATICAL", "DOUBLE-STRUCK", "SCRIPT", "BLACK-LETTER")


def stats(folder: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Returns the statistics of a dataset folder. Keeps a few numbers per sample and caption in memory, no text."""
    manifest = read_dataset_manifest(folder, totals=True)
    shards = manifest["shards"]
    samples = sum(shard["samples"] for shard in shards)
    scripts: Counter[str] = Counter()
    values_per_shard: dict[str, list[np.ndarray]] = {}
    with Progress("stats", samples, "sample", quiet=quiet) as progress:
        for shard in shards:
            for name, values in _shard_values(folder, shard, scripts).items():
                values_per_shard.setdefault(name, []).append(values)
            progress.add(shard["samples"])
    values = {name: np.concatenate(arrays) for name, arrays in values_per_shard.items()}
    width = values["width"]
    height = values["height"]
    aspect = width / height
    return {
        "data": str(folder),
        "fingerprint": manifest["fingerprint"],
        "samples": samples,
        "shards": len(shards),
        "bytes": sum(shard["tar_bytes"] for shard in shards),
        "image_bytes": _quantiles(values["size"]),
        "width": _quantiles(width),
        "height": _quantiles(height),
        "aspect": _quantiles(aspect),
        "shortest_side_histogram": _histogram(np.minimum(width, height), _SIDE_EDGES),
        "aspect_histogram": _histogram(aspect, _ASPECT_EDGES),
        "captions": len(values["hash"]),
        "captions_dropped": manifest["captions_dropped"],
        "captions_per_image": _quantiles(values["captions"]),
        "caption_characters": _quantiles(values["characters"]),
        "caption_words": _quantiles(values["words"]),
        "scripts": dict(scripts.most_common()),
        "duplicates": {"exact_merged": manifest["merged"], **_near_duplicates(values["dhash"])},
        "equal_captions": _equal_captions(folder, shards, values["hash"]),
        "rows_in": manifest["rows_in"],
        "rejected": manifest["rejected"],
        "rejects": manifest["rejects"],
        "decisions": manifest.get("decisions", {}),
    }


def script(text: str) -> str:
    """Returns the Unicode script of a caption's letters: Latin, Hangul, Han, Kana (with or without Han), …

    A caption in several scripts is `mixed`, one without letters `none`.
    """
    if text.isascii():
        return "Latin" if any(map(str.isalpha, text)) else "none"
    scripts = set(map(_letter_script, text)) - {""}
    if scripts == {"Han", "Kana"}:
        return "Kana"
    if not scripts:
        return "none"
    return scripts.pop() if len(scripts) == 1 else "mixed"


@functools.lru_cache(maxsize=1 << 16)
def _letter_script(character: str) -> str:
    if not character.isalpha():
        return ""
    first_word = unicodedata.name(character, "OTHER").split()[0]
    if first_word in _NO_SCRIPT:
        return ""
    return _SCRIPTS.get(first_word, first_word.capitalize())


def _shard_values(folder: Path, shard: dict[str, Any], scripts: Counter[str]) -> dict[str, np.ndarray]:
    """Returns the numbers that the statistics need: one per sample or one per caption. Counts `scripts`."""
    table = read_sidecar(folder / shard["sidecar"], shard, ["captions", "width", "height", "size", "dhash"])
    captions = table["captions"].to_pylist()
    texts = [text for sample_captions in captions for text in sample_captions]
    scripts.update(map(script, texts))
    return {
        "width": table["width"].to_numpy(),
        "height": table["height"].to_numpy(),
        "size": table["size"].to_numpy(),
        "dhash": table["dhash"].to_numpy(),
        "captions": _int_array(map(len, captions)),
        "characters": _int_array(map(len, texts)),
        "words": _int_array(len(text.split()) for text in texts),
        "hash": _int_array(map(hash, texts)),  # differs between processes, so it is never shown
    }


def _int_array(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64)


def _quantiles(values: np.ndarray) -> dict[str, float]:
    """Returns quantiles and mean; nothing for no values, as of the captions of images without captions."""
    if not len(values):
        return {}
    quantiles = np.quantile(values, list(QUANTILES.values()))
    named = {name: round(float(value), 3) for name, value in zip(QUANTILES, quantiles, strict=True)}
    return {**named, "mean": round(float(values.mean()), 3)}


def _histogram(values: np.ndarray, edges: tuple[float, ...]) -> dict[str, int]:
    """Counts values per bin [edge, next edge); the last bin is open. Empty bins at both ends are left out."""
    counts = np.histogram(values, [*edges, np.inf])[0]
    names = [f"{low:g}-{high:g}" for low, high in itertools.pairwise(edges)]
    names.append(f"{edges[-1]:g}-")
    filled = np.flatnonzero(counts)
    return {names[i]: int(counts[i]) for i in range(filled[0], filled[-1] + 1)}


def _near_duplicates(dhashes: np.ndarray) -> dict[str, int]:
    """Counts images with the same difference hash as another: look-alikes, or copies in another size or quality."""
    group_sizes = np.unique(dhashes, return_counts=True)[1]
    shared = group_sizes[group_sizes > 1]
    return {"near_groups": len(shared), "near_images": int(shared.sum())}


def _equal_captions(folder: Path, shards: list[dict[str, Any]], hashes: np.ndarray) -> dict[str, Any]:
    """Counts captions that occur with several images, and returns the most frequent; ties in order of appearance."""
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))[:_TOP_CAPTIONS]
    images_at = {int(first[i]): int(counts[i]) for i in order if counts[i] > 1}  # position of a caption → its images
    texts: dict[int, str] = {}
    start = 0
    for shard in shards if images_at else ():
        captions = read_sidecar(folder / shard["sidecar"], shard, ["captions"])["captions"].combine_chunks().flatten()
        for position in images_at:
            if start <= position < start + len(captions):
                texts[position] = captions[position - start].as_py()
        start += len(captions)
    top = [{"caption": texts[position], "images": images} for position, images in images_at.items()]
    return {"distinct": len(counts), "repeated": int((counts > 1).sum()), "top": top}


def table(result: dict[str, Any]) -> str:
    """Formats the statistics for a terminal."""
    quantile_rows = [["", *QUANTILES, "mean"]]
    for name, title in (
        ("width", "width, pixels"),
        ("height", "height, pixels"),
        ("aspect", "width / height"),
        ("image_bytes", "bytes per image"),
        ("captions_per_image", "captions per image"),
        ("caption_characters", "characters per caption"),
        ("caption_words", "words per caption"),
    ):
        if result[name]:
            quantile_rows.append([title, *map(_short, result[name].values())])
    duplicates = result["duplicates"]
    captions = result["equal_captions"]
    lines = [
        f"{format_count(result['samples'], 'sample')} in {format_count(result['shards'], 'shard')}, "
        f"{result['bytes'] / 1e6:,.1f} MB of tars",
        "",
        align(quantile_rows),
        "",
        "shortest side in pixels",
        *_bars(result["shortest_side_histogram"]),
        "",
        "width / height",
        *_bars(result["aspect_histogram"]),
        "",
        *_bars_below("captions by script", result["scripts"]),
        f"exact duplicates merged: {duplicates['exact_merged']:,}",
        f"near duplicates (equal difference hash): {format_count(duplicates['near_images'], 'image')} "
        f"in {format_count(duplicates['near_groups'], 'group')}",
        f"captions: {result['captions']:,}, of them {captions['distinct']:,} distinct; "
        f"{captions['repeated']:,} occur more than once",
    ]
    lines += [f"  {row['images']:>7,} × {_cut(row['caption'])}" for row in captions["top"]]
    lines += [
        "",
        f"rejected: {result['rejected']:,} of {format_count(result['rows_in'], 'row')}",
        *_bars(result["rejects"]),
    ]
    for rule, samples in result["decisions"].items():
        lines.append(f"samples of one color only ({rule}), kept: {samples:,}")
    if result["captions_dropped"]:
        lines.append(f"invalid captions dropped from written samples: {result['captions_dropped']:,}")
    return "\n".join(lines)


def _bars_below(title: str, counts: dict[str, int]) -> list[str]:
    return [title, *_bars(counts), ""] if counts else []


def _bars(counts: dict[str, int]) -> list[str]:
    if not counts:
        return []
    largest = max(counts.values())
    rows = [[f"  {name}", f"{count:,}"] for name, count in counts.items()]
    bars = ["█" * round(_BAR_CELLS * count / largest) for count in counts.values()]
    return [f"{line}  {bar}".rstrip() for line, bar in zip(align(rows).splitlines(), bars, strict=True)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"


def _cut(text: str) -> str:
    return shorten_to(" ".join(text.split()), _CAPTION_CELLS)
