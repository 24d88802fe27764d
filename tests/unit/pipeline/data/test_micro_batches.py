"""Micro-batches of captions of similar length cost less and give the same loss and gradients."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.data.batch import Batch
from clipwright.pipeline.distributed.group import process_group
from clipwright.pipeline.train.config import Components, RunConfig, assemble, stored_tokenizer
from clipwright.pipeline.train.engine import Engine, micro_batches

pytestmark = pytest.mark.xdist_group("ranks")


def test_micro_batches_are_trimmed_to_their_own_longest_caption(make_dataset: Any, small: Any) -> None:
    """Loss and gradients equal those of the untrimmed batch, with fewer tokens.

    Images have two captions and up to two hard negatives of different lengths.
    """
    negatives = [[f"no {'such thing ' * (i * k % 11)}{i}" for k in range(i % 4)] for i in range(40)]
    folder = make_dataset(
        "d", [40], lambda i: [f"caption {'of something ' * (i * 7 % 13)}{i}", f"a {i}"], wrong=negatives
    )
    overrides = [f"data.train={folder}", *small.settings, "text.context=40", "data.captions=2"]
    overrides += ["data.negatives=wrong", "data.negative_count=2"]
    config = resolve(RunConfig, verb="train", overrides=overrides).value
    with process_group() as world:
        components: Components = assemble(config, world, stored_tokenizer(config.tokenizer, None))
        batches = components.loader.batches(0)
        [batch] = itertools.islice(batches, 1)
        batches.close()
        assert batch.lengths is not None and batch.lengths.tolist() == sorted(batch.lengths.tolist())
        ends = (batch.tokens == components.tokenizer.eot_id).int().argmax(1) + 1
        assert torch.equal(ends, batch.lengths)
        cut = micro_batches(batch, 4)
        widths = [part.tokens.shape[1] for part in cut]
        assert widths == [-(-int(part.max()) // 8) * 8 for part in batch.lengths.tensor_split(4)]
        decode = components.tokenizer.decode
        for i, number in enumerate(batch.views[:, 16, 16, 0].tolist()):  # the color encodes the image's number
            rows = batch.text_row[2 * i : 2 * i + 2], batch.negative_row[2 * i : 2 * i + 2]
            captions, hard = ([decode(batch.tokens[row].tolist()) for row in some if row >= 0] for some in rows)
            assert sorted(text.replace(" ", "")[:7] for text in captions) == sorted((f"a{number}", "caption"))
            assert len(hard) == min(number % 4, 2) and all(text.startswith("no ") for text in hard)
        assert widths[0] < widths[-1] == batch.tokens.shape[1] and sum(widths) < 3 * widths[-1]

        def gradients(size: int, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
            runtime = dataclasses.replace(config.runtime, micro_batch=size)
            components.towers.zero_grad(set_to_none=True)
            engine = Engine(components.towers, components.loss, dataclasses.replace(config, runtime=runtime), world)
            loss, _ = engine.backward(batch, 0)
            return loss, engine.gradients()

        full_batch, ours = gradients(0, batch), gradients(4, batch)
        full = gradients(4, dataclasses.replace(batch, lengths=None))
    for other in (ours, full):
        assert full_batch[0] == pytest.approx(other[0], abs=1e-5)
        largest = max(float(grad.abs().max()) for grad in full_batch[1].values())
        for name, grad in full_batch[1].items():
            assert (other[1][name] - grad).abs().max() <= 1e-5 * largest, name
    few = dataclasses.replace(batch, tokens=batch.tokens[:2], lengths=batch.lengths[:2])
    assert [len(part.tokens) for part in micro_batches(few, 4)] == [1, 1, 1, 1]
