"""Recall against a slow reference that sorts, and the cases a fast one gets wrong."""

import math

import numpy as np
import pytest
import torch

from clipwright.eval import metrics


def units(rows: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator), dim=1)


def reference(queries, candidates, is_right, k):
    """Sorts every query's candidates, wrong ones first among equals, and looks at the first k."""
    hits = 0
    for q in range(len(queries)):
        scored = [(float(queries[q] @ candidates[c]), is_right(q, c), c) for c in range(len(candidates))]
        scored.sort(key=lambda s: (-s[0], s[1]))
        hits += any(right for _, right, _ in scored[:k])
    return hits / len(queries)


def case(images: int, seed: int):
    """Uneven captions, copies of an image (`_1`), and captions that two pictures share."""
    generator = torch.Generator().manual_seed(seed)
    keys = [f"{i // 2 if i < 6 else i:032x}" + ("_1" if i < 6 and i % 2 else "") for i in range(images)]
    owners = [i for i in range(images) for _ in range(1 + int(torch.randint(3, (), generator=generator)))]
    captions = [f"caption {c if c % 4 else 'shared by some'} {c // 12}" for c in range(len(owners))]
    return keys, captions, owners


def test_recall_equals_sorting():
    keys, captions, owners = case(23, 0)
    images, texts = units(23, 8, 1), units(len(captions), 8, 2)
    texts[5] = texts[4]  # a tie between two captions
    images[9] = images[8]

    def right(image, caption):
        pictures = {keys[owners[c]][:32] for c in range(len(captions)) if captions[c] == captions[caption]}
        return keys[image][:32] in pictures

    numbers = metrics.retrieval(images, texts, keys, captions, owners).numbers()
    for k in (1, 5, 10):
        assert numbers["i2t"][f"r{k}"] == pytest.approx(reference(images, texts, right, k), abs=1e-12)
        flipped = reference(texts, images, lambda c, i: right(i, c), k)
        assert numbers["t2i"][f"r{k}"] == pytest.approx(flipped, abs=1e-12)
    assert (numbers["i2t"]["n"], numbers["t2i"]["n"]) == (23, len(captions))


@pytest.mark.parametrize("chunk", [1, 37, 100_000])
def test_chunks_do_not_change_ranks(chunk):
    keys, captions, owners = case(23, 3)
    images, texts = units(23, 8, 4), units(len(captions), 8, 5)
    right = metrics.Relation.of(keys, captions, owners).captions_of
    small, whole = metrics.find(images, texts, right, chunk=chunk), metrics.find(images, texts, right)
    assert torch.equal(small.rank, whole.rank) and torch.equal(small.top, whole.top)
    assert torch.equal(small.right, whole.right) and torch.allclose(small.score, whole.score)


def test_the_best_five_agree_with_the_rank():
    """Wrong first among equals; the place of the first right one is the rank, and the order is that of sorting."""
    keys, captions, owners = case(23, 6)
    images, texts = units(23, 8, 7), units(len(captions), 8, 8)
    for c in range(0, 12, 3):
        texts[c] = texts[c + 1]
    right = metrics.Relation.of(keys, captions, owners).captions_of
    found = metrics.find(images, texts, right)
    assert found.top.shape == (23, 5)
    for q, group in enumerate(right):
        scores = [float(images[q] @ text) for text in texts]
        order = sorted(range(len(texts)), key=lambda c: -scores[c] + (2 * metrics.TIE if c in group else 0))
        assert found.right[q].tolist() == [c in group for c in order[:5]]
        assert found.score[q].tolist() == pytest.approx([scores[c] for c in order[:5]], abs=1e-6)
        first = next(place for place, c in enumerate(order) if c in group)
        assert int(found.rank[q]) == first
        assert found.right[q].int().argmax() == first if first < 5 else not found.right[q].any()


def test_few_candidates_give_short_lists():
    found = metrics.find(torch.eye(3), torch.eye(3), [np.array([0]), np.array([0]), np.array([0, 1, 2])])
    assert found.top.shape == (3, 3) and found.rank.tolist() == [0, 2, 0]
    assert found.top[0, 0] == 0 and found.top[1].tolist()[0] == 1 and found.right[2].all()


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (5, 10), (10, 10), (1, 3), (7321, 10_000)])
def test_wilson_holds_the_shares_that_would_not_be_rejected(hits, n):
    """The interval's ends are where |hits/n - p| is exactly z standard errors of p, found here by bisection."""

    def end(inside, outside):
        for _ in range(200):
            p = (inside + outside) / 2
            near = abs(hits / n - p) <= 1.959963984540054 * math.sqrt(p * (1 - p) / n)
            inside, outside = (p, outside) if near else (inside, p)
        return inside

    low, high = metrics.wilson(hits, n)
    assert (low, high) == pytest.approx((end(hits / n, 0.0), end(hits / n, 1.0)), abs=1e-9)


def test_a_collapsed_model_finds_nothing():
    images = units(1, 16, 0).repeat(40, 1)
    keys, captions = [f"{i:032x}" for i in range(40)], [str(i) for i in range(40)]
    numbers = metrics.retrieval(images, images, keys, captions, range(40)).numbers()
    assert all(numbers[way][f"r{k}"] == 0.0 for way in numbers for k in (1, 5, 10))


def test_copies_and_equal_texts_are_right():
    keys = ["a" * 32, "a" * 32 + "_1", "b" * 32, "c" * 32]
    images = torch.eye(4)
    texts = torch.eye(4)[[1, 0, 3, 2]]  # each picture's own text is that of its neighbour
    numbers = metrics.retrieval(images, texts, keys, ["x", "y", "one", "two"], range(4)).numbers()
    assert numbers["t2i"]["r1"] == 0.5  # the copies find one another, the other two do not
    shared = metrics.retrieval(images, texts, keys, ["x", "y", "one", "one"], range(4)).numbers()
    assert shared["t2i"]["r1"] == shared["i2t"]["r1"] == 1.0


def test_chance_is_the_share_of_random_draws():
    found = metrics.chance(np.array([1, 3, 48]), 50, 5)
    assert found == pytest.approx([1 - math.comb(50 - m, 5) / math.comb(50, 5) for m in (1, 3, 48)])
    assert metrics.chance(np.array([1]), 3_000_000, 1) == pytest.approx([1 / 3_000_000], rel=1e-9)
    assert metrics.chance(np.array([2]), 5, 10) == 1.0
