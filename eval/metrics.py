"""Exact retrieval recall, both ways, with several captions an image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

KEY_DIGITS = 32  # of a key; what follows (`_1`) only tells copies of the same image apart

# Scores of unit float32 vectors are certain to about 1e-7, and two equal vectors may score one rounding apart,
# depending on where a matmul's tiles end. What lies this near counts as a tie.
TIE = 1e-6

_CHUNK = 1 << 24  # scores held at a time: 64 MiB


@dataclass(frozen=True)
class Relation:
    """Which captions are right for which images.

    A caption is right for an image when they were written as a pair, when the pair's image has the same first 32
    key digits (a copy of the image), or when its text equals a right caption's (the same text is the same answer).
    These are the positives that the losses know.
    """

    images_of: list[np.ndarray]  # caption → images
    captions_of: list[np.ndarray]  # image → captions

    @classmethod
    def of(cls, keys: Sequence[str], captions: Sequence[str], owners: Sequence[int]) -> Relation:
        """From the images' keys and, for each caption, its text and the position of the image it was written for."""
        pictures: dict[str, list[int]] = defaultdict(list)
        for image, key in enumerate(keys):
            pictures[key[:KEY_DIGITS]].append(image)
        copies: dict[str, list[int]] = defaultdict(list)
        texts: dict[str, set[str]] = defaultdict(set)
        depicted: dict[str, set[str]] = defaultdict(set)
        for caption, (text, owner) in enumerate(zip(captions, owners, strict=True)):
            picture = keys[owner][:KEY_DIGITS]
            copies[text].append(caption)
            texts[picture].add(text)
            depicted[text].add(picture)
        images = {text: _flat(pictures[picture] for picture in found) for text, found in depicted.items()}
        right = {picture: _flat(copies[text] for text in found) for picture, found in texts.items()}
        none = np.empty(0, np.int64)
        return cls(
            images_of=[images[text] for text in captions],
            captions_of=[right.get(key[:KEY_DIGITS], none) for key in keys],
        )


def _flat(groups: Iterator[list[int]]) -> np.ndarray:
    return np.array(sorted(i for group in groups for i in group), np.int64)


def ranks(queries: Tensor, candidates: Tensor, right: Sequence[np.ndarray], *, chunk: int = _CHUNK) -> Tensor:
    """How many wrong candidates stand before each query's best right one.

    queries (Q, E) and candidates (C, E) are float32 unit rows, `right[q]` the positions of q's right candidates (at
    least one). Returns int64 (Q,); query q is a hit at k if its rank is below k. A wrong candidate that ties (TIE)
    stands before: a model that maps all to one point finds nothing. At most max(`chunk`, C) scores are held.
    """
    out = torch.empty(len(queries), dtype=torch.int64)
    step = max(1, chunk // max(1, len(candidates)))
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ candidates.T
        groups = right[start : start + len(scores)]
        sizes = np.array([len(group) for group in groups])
        assert sizes.all(), "a query without a right candidate"
        rows = torch.from_numpy(np.repeat(np.arange(len(groups)), sizes))
        columns = torch.from_numpy(np.concatenate(groups))
        best = torch.full((len(scores),), -torch.inf).scatter_reduce_(0, rows, scores[rows, columns], "amax")
        scores[rows, columns] = -torch.inf
        out[start : start + len(scores)] = (scores >= best[:, None] - TIE).sum(1)
    return out


def recall(found: Tensor, right: Sequence[np.ndarray], candidates: int, ks: Sequence[int]) -> dict[str, float | int]:
    """`r1 … rK` and, under `chance_r1 …`, what random order gives; `n` is the number of queries. All in 0 … 1."""
    numbers: dict[str, float | int] = {"n": len(found)}
    sizes = np.array([len(group) for group in right])
    for k in ks:
        numbers[f"r{k}"] = (found < k).double().mean().item()
        numbers[f"chance_r{k}"] = float(chance(sizes, candidates, k).mean())
    return numbers


def chance(right: np.ndarray, candidates: int, k: int) -> np.ndarray:
    """Probability that k candidates drawn at random hold one of the `right` ones: 1 − C(n−m, k) / C(n, k)."""
    drawn = np.arange(min(k, candidates))
    with np.errstate(divide="ignore"):  # log 0 where every draw that is left is right
        return -np.expm1(np.log1p(-np.minimum(right[:, None] / (candidates - drawn), 1)).sum(1))


def retrieval(
    images: Tensor, texts: Tensor, keys: Sequence[str], captions: Sequence[str], owners: Sequence[int]
) -> dict[str, dict[str, float | int]]:
    """Recall at 1, 5 and 10, `i2t` (one query an image) and `t2i` (one query a caption), over all candidates.

    images (N, E) and texts (C, E) are float32 unit rows; caption c was written for image `owners[c]`. Every image
    needs a caption.
    """
    relation = Relation.of(keys, captions, owners)
    ks = (1, 5, 10)
    return {
        "i2t": recall(ranks(images, texts, relation.captions_of), relation.captions_of, len(texts), ks),
        "t2i": recall(ranks(texts, images, relation.images_of), relation.images_of, len(images), ks),
    }
