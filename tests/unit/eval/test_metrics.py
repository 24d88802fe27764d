"""Recall@k against a slow reference that sorts, and the cases that a fast implementation gets wrong."""

import math

import numpy as np
import pytest
import torch

from clipwright.eval import metrics
from clipwright.eval.intervals import wilson_interval


def units(rows: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator), dim=1)


def reference(queries, candidates, is_relevant, k):
    """Sorts every query's candidates, irrelevant candidates first in a tie, and looks at the first k."""
    hits = 0
    for q in range(len(queries)):
        scored = [(float(queries[q] @ candidates[c]), is_relevant(q, c), c) for c in range(len(candidates))]
        scored.sort(key=lambda s: (-s[0], s[1]))
        hits += any(relevant for _, relevant, _ in scored[:k])
    return hits / len(queries)


def make_pairs(images: int, seed: int):
    """Uneven numbers of captions, duplicates of an image (`_1`), and captions that two images share."""
    generator = torch.Generator().manual_seed(seed)
    keys = [f"{i // 2 if i < 6 else i:032x}" + ("_1" if i < 6 and i % 2 else "") for i in range(images)]
    owners = [i for i in range(images) for _ in range(1 + int(torch.randint(3, (), generator=generator)))]
    captions = [f"caption {c if c % 4 else 'shared by some'} {c // 12}" for c in range(len(owners))]
    return keys, captions, owners


def test_recall_equals_sorting():
    keys, captions, owners = make_pairs(23, 0)
    images, texts = units(23, 8, 1), units(len(captions), 8, 2)
    texts[5] = texts[4]  # a tie between two captions
    images[9] = images[8]

    def is_relevant(image, caption):
        relevant_keys = {keys[owners[c]][:32] for c in range(len(captions)) if captions[c] == captions[caption]}
        return keys[image][:32] in relevant_keys

    numbers = metrics.rank_both_directions(images, texts, keys, captions, owners).numbers()
    for k in (1, 5, 10):
        assert numbers["i2t"][f"r{k}"] == pytest.approx(reference(images, texts, is_relevant, k), abs=1e-12)
        expected = reference(texts, images, lambda c, i: is_relevant(i, c), k)
        assert numbers["t2i"][f"r{k}"] == pytest.approx(expected, abs=1e-12)
    assert (numbers["i2t"]["n"], numbers["t2i"]["n"]) == (23, len(captions))


@pytest.mark.parametrize("chunk", [1, 37, 100_000])
def test_chunk_size_does_not_change_ranks(chunk):
    keys, captions, owners = make_pairs(23, 3)
    images, texts = units(23, 8, 4), units(len(captions), 8, 5)
    relevant = metrics.Relevance.from_pairs(keys, captions, owners).captions_of
    chunked = metrics.rank_candidates(images, texts, relevant, chunk=chunk)
    complete = metrics.rank_candidates(images, texts, relevant)
    assert torch.equal(chunked.rank, complete.rank) and torch.equal(chunked.top, complete.top)
    assert torch.equal(chunked.relevant, complete.relevant) and torch.allclose(chunked.score, complete.score)


def test_top5_agrees_with_the_rank():
    """Irrelevant first in a tie; the first relevant candidate stands at the rank; the order is that of sorting."""
    keys, captions, owners = make_pairs(23, 6)
    images, texts = units(23, 8, 7), units(len(captions), 8, 8)
    for c in range(0, 12, 3):
        texts[c] = texts[c + 1]
    relevant = metrics.Relevance.from_pairs(keys, captions, owners).captions_of
    results = metrics.rank_candidates(images, texts, relevant)
    assert results.top.shape == (23, 5)
    for q, group in enumerate(relevant):
        scores = [float(images[q] @ text) for text in texts]
        order = sorted(range(len(texts)), key=lambda c: -scores[c] + (2 * metrics.TIE if c in group else 0))
        assert results.relevant[q].tolist() == [c in group for c in order[:5]]
        assert results.score[q].tolist() == pytest.approx([scores[c] for c in order[:5]], abs=1e-6)
        first = next(position for position, c in enumerate(order) if c in group)
        assert int(results.rank[q]) == first
        assert results.relevant[q].int().argmax() == first if first < 5 else not results.relevant[q].any()


@pytest.mark.parametrize(("distance", "rank"), [(5e-7, 1), (5e-6, 0)])
def test_scores_within_a_millionth_are_a_tie(distance, rank):
    candidates = torch.tensor([[0.5], [0.5 + distance], [0.1]])
    results = metrics.rank_candidates(torch.ones(1, 1), candidates, [np.array([1])])
    assert results.rank.tolist() == [rank] and results.relevant[0].tolist() == [rank == 0, rank == 1, False]


def test_fewer_than_five_candidates_give_short_lists():
    results = metrics.rank_candidates(torch.eye(3), torch.eye(3), [np.array([0]), np.array([0]), np.array([0, 1, 2])])
    assert results.top.shape == (3, 3) and results.rank.tolist() == [0, 2, 0]
    assert results.top[0, 0] == 0 and results.top[1].tolist()[0] == 1 and results.relevant[2].all()


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (5, 10), (10, 10), (1, 3), (7321, 10_000)])
def test_wilson_interval_contains_the_proportions_that_are_not_rejected(successes, n):
    """The ends of the interval are where |successes/n - p| equals z standard errors of p; bisection finds them."""

    def end(inside, outside):
        for _ in range(200):
            p = (inside + outside) / 2
            accepted = abs(successes / n - p) <= 1.959963984540054 * math.sqrt(p * (1 - p) / n)
            inside, outside = (p, outside) if accepted else (inside, p)
        return inside

    low, high = wilson_interval(successes, n)
    assert (low, high) == pytest.approx((end(successes / n, 0.0), end(successes / n, 1.0)), abs=1e-9)


def test_collapsed_model_has_zero_recall():
    images = units(1, 16, 0).repeat(40, 1)
    keys, captions = [f"{i:032x}" for i in range(40)], [str(i) for i in range(40)]
    numbers = metrics.rank_both_directions(images, images, keys, captions, range(40)).numbers()
    assert all(numbers[direction][f"r{k}"] == 0.0 for direction in numbers for k in (1, 5, 10))


def test_duplicate_images_and_equal_texts_are_relevant():
    keys = ["a" * 32, "a" * 32 + "_1", "b" * 32, "c" * 32]
    images = torch.eye(4)
    texts = torch.eye(4)[[1, 0, 3, 2]]  # the text of each image is embedded like its neighbor
    numbers = metrics.rank_both_directions(images, texts, keys, ["x", "y", "one", "two"], range(4)).numbers()
    assert numbers["t2i"]["r1"] == 0.5  # the duplicates are hits, the other two are not
    shared = metrics.rank_both_directions(images, texts, keys, ["x", "y", "one", "one"], range(4)).numbers()
    assert shared["t2i"]["r1"] == shared["i2t"]["r1"] == 1.0


def test_chance_level_is_the_probability_of_a_random_hit():
    chance = metrics.chance_of_hit(np.array([1, 3, 48]), 50, 5)
    assert chance == pytest.approx([1 - math.comb(50 - m, 5) / math.comb(50, 5) for m in (1, 3, 48)])
    assert metrics.chance_of_hit(np.array([1]), 3_000_000, 1) == pytest.approx([1 / 3_000_000], rel=1e-9)
    assert metrics.chance_of_hit(np.array([2]), 5, 10) == 1.0
