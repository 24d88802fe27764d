"""Exact ranks, recall@k and chance levels over all candidates, with any number of relevant candidates per query."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

KEY_DIGITS = 32  # the digits of a key that identify the image; a suffix such as `_1` numbers its duplicates

# Cosines of float32 unit embeddings are accurate to about 1e-7, and two equal embeddings may score one rounding step
# apart, depending on where a matmul's tiles end. Scores within this distance count as a tie.
TIE = 1e-6

TOP_K = 5  # candidates that are kept per query

_CHUNK_SCORES = 1 << 24  # scores that are held at a time: 64 MiB


@dataclass(frozen=True)
class Relevance:
    """Which captions are relevant to which images.

    A caption is relevant to an image if they were written as a pair, if the pair's image has the same first 32 key
    digits (a duplicate of the image), or if its text equals the text of a relevant caption. These are the positives
    that the losses use.
    """

    images_of: list[np.ndarray]  # caption → positions of images
    captions_of: list[np.ndarray]  # image → positions of captions

    @classmethod
    def from_pairs(cls, keys: Sequence[str], captions: Sequence[str], owners: Sequence[int]) -> Relevance:
        """From the keys of the images, the captions, and the position of the image that each caption belongs to."""
        images_by_digits: dict[str, list[int]] = defaultdict(list)
        for image, key in enumerate(keys):
            images_by_digits[key[:KEY_DIGITS]].append(image)
        captions_by_text: dict[str, list[int]] = defaultdict(list)
        texts_by_digits: dict[str, set[str]] = defaultdict(set)
        digits_by_text: dict[str, set[str]] = defaultdict(set)
        for caption, (text, owner) in enumerate(zip(captions, owners, strict=True)):
            digits = keys[owner][:KEY_DIGITS]
            captions_by_text[text].append(caption)
            texts_by_digits[digits].add(text)
            digits_by_text[text].add(digits)
        images_by_text = {
            text: _sorted_positions(images_by_digits[digits] for digits in group)
            for text, group in digits_by_text.items()
        }
        captions_by_digits = {
            digits: _sorted_positions(captions_by_text[text] for text in group)
            for digits, group in texts_by_digits.items()
        }
        none = np.empty(0, np.int64)
        return cls(
            images_of=[images_by_text[text] for text in captions],
            captions_of=[captions_by_digits.get(key[:KEY_DIGITS], none) for key in keys],
        )


def _sorted_positions(groups: Iterable[list[int]]) -> np.ndarray:
    return np.array(sorted(position for group in groups for position in group), np.int64)


@dataclass(frozen=True)
class RankedResults:
    """The top-k candidates of Q queries, k = min(5, candidates). In a tie, irrelevant candidates come first."""

    rank: Tensor  # (Q,) int64: irrelevant candidates before the first relevant one; a hit at k is a rank below k
    top: Tensor  # (Q, k) int64: positions of the top-k candidates
    relevant: Tensor  # (Q, k) bool: which of them are relevant
    score: Tensor  # (Q, k) float32

    @classmethod
    def concatenate(cls, parts: Sequence[RankedResults]) -> RankedResults:
        return cls(
            rank=torch.cat([part.rank for part in parts]),
            top=torch.cat([part.top for part in parts]),
            relevant=torch.cat([part.relevant for part in parts]),
            score=torch.cat([part.score for part in parts]),
        )

    def as_lists(self, values: pa.Array) -> pa.Array:
        """Groups `values`, one for each entry of `top`, into one list per query."""
        queries, k = self.top.shape
        return pa.ListArray.from_arrays(pa.array(np.arange(queries + 1, dtype=np.int32) * k), values)


def rank_candidates(
    queries: Tensor, candidates: Tensor, relevant: Sequence[np.ndarray], *, chunk: int = _CHUNK_SCORES
) -> RankedResults:
    """Ranks all candidates of every query.

    queries (Q, E) and candidates (C, E) are float32 unit embeddings; `relevant[q]` holds the positions of q's relevant
    candidates, at least one. In a tie (TIE) irrelevant candidates come first, so that a model which maps all inputs
    to one point scores zero. At most twice max(`chunk`, C) scores are held.
    """
    step = max(1, chunk // max(1, len(candidates)))
    parts = []
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ candidates.T
        parts.append(_rank_chunk(scores, relevant[start : start + step]))
    return RankedResults.concatenate(parts)


def _rank_chunk(scores: Tensor, relevant: Sequence[np.ndarray]) -> RankedResults:
    """Ranks the candidates by `scores` (q, C), which are overwritten."""
    counts = np.array([len(group) for group in relevant])
    assert counts.all(), "a query without a relevant candidate"
    rows = torch.from_numpy(np.repeat(np.arange(len(relevant)), counts))
    columns = torch.from_numpy(np.concatenate(relevant))
    relevant_scores = torch.full_like(scores, -torch.inf)
    relevant_scores[rows, columns] = scores[rows, columns]
    scores[rows, columns] = -torch.inf
    rank = (scores >= relevant_scores.amax(1, keepdim=True) - TIE).sum(1)
    # The best irrelevant and the best relevant candidates, sorted as one list with TIE taken off the relevant ones.
    k = min(TOP_K, scores.shape[1])
    best_irrelevant = scores.topk(k)
    best_relevant = relevant_scores.topk(k)
    values = torch.cat([best_irrelevant.values, best_relevant.values], 1)
    positions = torch.cat([best_irrelevant.indices, best_relevant.indices], 1)
    sort_keys = torch.cat([best_irrelevant.values, best_relevant.values - TIE], 1)
    order = sort_keys.argsort(dim=1, descending=True, stable=True)[:, :k]
    return RankedResults(rank, positions.gather(1, order), order >= k, values.gather(1, order))


def recall_at_k(
    rank: Tensor, relevant: Sequence[np.ndarray], candidates: int, ks: Sequence[int]
) -> dict[str, float | int]:
    """Returns recall@k as `rK`, its chance level as `chance_rK`, both in 0 … 1, and the number of queries as `n`."""
    numbers: dict[str, float | int] = {"n": len(rank)}
    counts = np.array([len(group) for group in relevant])
    for k in ks:
        numbers[f"r{k}"] = (rank < k).double().mean().item()
        numbers[f"chance_r{k}"] = float(chance_of_hit(counts, candidates, k).mean())
    return numbers


def chance_of_hit(relevant: np.ndarray, candidates: int, k: int) -> np.ndarray:
    """Probability that k random candidates contain one of m relevant ones: 1 − C(n−m, k) / C(n, k).

    `relevant` (Q,) holds m for each query, `candidates` is n.
    """
    drawn = np.arange(min(k, candidates))
    with np.errstate(divide="ignore"):  # log 0 where every remaining candidate is relevant
        return -np.expm1(np.log1p(-np.minimum(relevant[:, None] / (candidates - drawn), 1)).sum(1))


@dataclass(frozen=True)
class RetrievalResults:
    """Images ranked for every caption (`t2i`) and captions ranked for every image (`i2t`)."""

    relevance: Relevance
    i2t: RankedResults
    t2i: RankedResults

    def numbers(self) -> dict[str, dict[str, float | int]]:
        """Returns recall@1, @5 and @10 over all candidates: `i2t` with a query per image, `t2i` per caption."""
        images, captions = len(self.i2t.rank), len(self.t2i.rank)
        return {
            "i2t": recall_at_k(self.i2t.rank, self.relevance.captions_of, captions, (1, 5, 10)),
            "t2i": recall_at_k(self.t2i.rank, self.relevance.images_of, images, (1, 5, 10)),
        }


def rank_both_directions(
    images: Tensor, texts: Tensor, keys: Sequence[str], captions: Sequence[str], owners: Sequence[int]
) -> RetrievalResults:
    """Ranks all captions for every image and all images for every caption.

    images (N, E) and texts (C, E) are float32 unit embeddings; caption c belongs to image `owners[c]`. Every image
    needs a caption.
    """
    relevance = Relevance.from_pairs(keys, captions, owners)
    return RetrievalResults(
        relevance=relevance,
        i2t=rank_candidates(images, texts, relevance.captions_of),
        t2i=rank_candidates(texts, images, relevance.images_of),
    )
