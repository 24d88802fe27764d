"""Exact ranks and recall over all candidates, with several right ones a query; intervals of shares."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

KEY_DIGITS = 32  # of a key; what follows (`_1`) only tells copies of the same image apart

# Scores of unit float32 vectors are certain to about 1e-7, and two equal vectors may score one rounding apart,
# depending on where a matmul's tiles end. What lies this near counts as a tie.
TIE = 1e-6

TOP = 5  # how many of a query's best candidates are kept

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


@dataclass(frozen=True)
class Found:
    """What each of Q queries found among C candidates; the best k = min(5, C) in order, wrong before right in a tie."""

    rank: Tensor  # (Q,) int64: wrong candidates before the best right one; a hit at k is a rank below k
    top: Tensor  # (Q, k) int64: positions of the best candidates
    right: Tensor  # (Q, k) bool: which of them are right
    score: Tensor  # (Q, k) float32

    @classmethod
    def concatenate(cls, parts: Sequence[Found]) -> Found:
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))


def best(values: pa.Array, found: Found) -> pa.Array:
    """`values`, one for each of the queries' best candidates, as one list a query."""
    queries, k = found.top.shape
    return pa.ListArray.from_arrays(pa.array(np.arange(queries + 1, dtype=np.int32) * k), values)


def find(queries: Tensor, candidates: Tensor, right: Sequence[np.ndarray], *, chunk: int = _CHUNK) -> Found:
    """Ranks every query's candidates.

    queries (Q, E) and candidates (C, E) are float32 unit rows, `right[q]` the positions of q's right candidates (at
    least one). A wrong candidate that ties (TIE) stands before: a model that maps all to one point finds nothing. At
    most twice max(`chunk`, C) scores are held.
    """
    step = max(1, chunk // max(1, len(candidates)))
    parts = [_find(queries[i : i + step] @ candidates.T, right[i : i + step]) for i in range(0, len(queries), step)]
    return Found.concatenate(parts)


def _find(scores: Tensor, right: Sequence[np.ndarray]) -> Found:
    sizes = np.array([len(group) for group in right])
    assert sizes.all(), "a query without a right candidate"
    rows = torch.from_numpy(np.repeat(np.arange(len(right)), sizes))
    columns = torch.from_numpy(np.concatenate(right))
    ours = torch.full_like(scores, -torch.inf)
    ours[rows, columns] = scores[rows, columns]
    scores[rows, columns] = -torch.inf
    rank = (scores >= ours.amax(1, keepdim=True) - TIE).sum(1)
    # The best wrong ones, then the best right ones, sorted as one list in which a right one is a TIE less.
    k = min(TOP, scores.shape[1])
    wrong, mine = scores.topk(k), ours.topk(k)
    values, places = torch.cat([wrong.values, mine.values], 1), torch.cat([wrong.indices, mine.indices], 1)
    behind = torch.cat([wrong.values, mine.values - TIE], 1)
    order = behind.argsort(dim=1, descending=True, stable=True)[:, :k]
    return Found(rank, places.gather(1, order), order >= k, values.gather(1, order))


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


@dataclass(frozen=True)
class Retrieved:
    """What images found among the captions, and captions among the images."""

    relation: Relation
    i2t: Found
    t2i: Found

    def numbers(self) -> dict[str, dict[str, float | int]]:
        """Recall at 1, 5 and 10, `i2t` (one query an image) and `t2i` (one query a caption), over all candidates."""
        images, captions = len(self.i2t.rank), len(self.t2i.rank)
        return {
            "i2t": recall(self.i2t.rank, self.relation.captions_of, captions, (1, 5, 10)),
            "t2i": recall(self.t2i.rank, self.relation.images_of, images, (1, 5, 10)),
        }


def retrieval(
    images: Tensor, texts: Tensor, keys: Sequence[str], captions: Sequence[str], owners: Sequence[int]
) -> Retrieved:
    """Every image against every caption, both ways.

    images (N, E) and texts (C, E) are float32 unit rows; caption c was written for image `owners[c]`. Every image
    needs a caption.
    """
    relation = Relation.of(keys, captions, owners)
    return Retrieved(relation, find(images, texts, relation.captions_of), find(texts, images, relation.images_of))


def wilson(hits: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The interval in which the true share lies at 95 %, for `hits` of `n` > 0 independent trials.

    Source: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927).
    """
    share, weight = hits / n, z * z / n
    middle = share + weight / 2
    half = z * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    return max(0.0, (middle - half) / (1 + weight)), min(1.0, (middle + half) / (1 + weight))
