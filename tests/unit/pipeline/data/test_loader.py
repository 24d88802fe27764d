"""The loader: batches are a pure function of position, whoever asks and with however many workers."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.data.augment import AugmentConfig, recolour
from clipwright.pipeline.data.loader import Batch, DataConfig, Loader, Share
from clipwright.pipeline.data.reader import Dataset
from clipwright.pipeline.tokenizers.base import TOKENIZERS
from clipwright.pipeline.towers.base import TEXT_TOWERS


def loader(folder: Path, share: Share, workers: int = 2, **config: Any) -> Loader:
    return Loader(
        DataConfig(train=str(folder), **config),
        share,
        tokenizer=TOKENIZERS.build(TOKENIZERS.preset("clip_bpe")),
        text=TEXT_TOWERS.preset("text_nano"),
        image_size=32,
        seed=5,
        workers=workers,
    )


def take(source: Loader, position: int, count: int) -> list[Batch]:
    batches = source.batches(position)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def test_resume_workers_and_ranks_change_nothing(scenes: Path) -> None:
    whole = take(loader(scenes, Share(0, 1, 16)), 0, 14)  # two epochs of 96 and a third begun
    again = take(loader(scenes, Share(0, 1, 16), workers=5), 16 * 9, 5)
    for one, other in zip(whole[9:], again, strict=True):
        assert torch.equal(one.views, other.views)
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.text_row, other.text_row)
    halves = [take(loader(scenes, Share(r, 2, 16)), 0, 14) for r in range(2)]
    for step, one in enumerate(whole):
        for r in range(2):
            assert torch.equal(halves[r][step].views, one.views[r::2])
            assert torch.equal(halves[r][step].image_id, one.image_id[r::2])
    epochs = torch.cat([batch.image_id for batch in whole]).tolist()
    assert sorted(epochs[:96]) == sorted(epochs[96:192])
    assert len(set(epochs[:96])) == 96


def test_views_differ_between_epochs_and_captions_follow_their_image(scenes: Path) -> None:
    data = Dataset(scenes)
    owner = {}
    for shard in range(len(data.sizes)):
        for row in range(data.sizes[shard]):
            record = data.record(shard, row)
            owner[int(record["key"][:16], 16) - 2**63] = set(record["captions"])
    source = loader(scenes, Share(0, 1, 16), captions=2)
    first, second = take(source, 0, 6), take(source, 96, 6)
    tokenizer = source.tokenizer
    for batch in first:
        assert batch.text_row.shape == (32,) and batch.caption_id.shape == (16, 2)
        # Each different caption stands once, and equal captions share its row.
        assert len(batch.tokens) == len(set(batch.caption_id.flatten().tolist())) == len(set(batch.text_row.tolist()))
        assert batch.tokens.shape[1] % 8 == 0 or batch.tokens.shape[1] == source.text.context
        for i, image in enumerate(batch.image_id.tolist()):
            texts = {tokenizer.decode(batch.tokens[batch.text_row[2 * i + k]].tolist()).strip() for k in range(2)}
            assert texts <= {c.lower() for c in owner[image]}
    by_key = {i: v for b in first for i, v in zip(b.image_id.tolist(), b.views, strict=True)}
    changed = [not torch.equal(by_key[i], v) for b in second for i, v in zip(b.image_id.tolist(), b.views, strict=True)]
    assert sum(changed) > 80


def test_an_image_has_as_many_views_as_asked_for(scenes: Path) -> None:
    few = AugmentConfig(views=2, jitter=(0.4, 0.4, 0.4, 0.1), grey=0.1)
    epochs = [
        {i: (v, c) for b in take(loader(scenes, Share(0, 1, 16), augment=few), 96 * e, 6) for i, v, c in rows_of(b)}
        for e in range(3)
    ]
    same = [[all(map(torch.equal, one[i], other[i])) for i in one] for one, other in itertools.combinations(epochs, 2)]
    assert not any(same[0]) and all(same[1]) and not any(same[2])
    batch = take(loader(scenes, Share(0, 1, 16), augment=few), 0, 1)[0]
    assert batch.colour is not None
    assert torch.equal(batch.images(torch.device("cpu")), recolour(batch.views, batch.colour))
    assert not torch.equal(batch.images(torch.device("cpu")), batch.views)


def rows_of(batch: Batch) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    assert batch.colour is not None
    return list(zip(batch.image_id.tolist(), batch.views, batch.colour, strict=True))


@pytest.fixture
def copy(scenes: Path, tmp_path: Path) -> Path:
    shutil.copytree(scenes, tmp_path / "data")
    return tmp_path / "data"


def test_a_changed_byte_in_a_sample_is_an_error_not_a_picture(copy: Path) -> None:
    data = Dataset(copy)
    record = data.record(1, 4)
    path = data.tar_path(1)
    with path.open("r+b") as file:
        file.seek(record["offset"] + record["size"] // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ClipwrightError) as caught:
        take(loader(copy, Share(0, 1, 16)), 0, 6)
    assert caught.value.code == "E_DATA_HASH" and record["key"] in str(caught.value)


def test_missing_cut_and_swapped_files_are_found_at_the_start(copy: Path) -> None:
    data = Dataset(copy)
    tar, sidecar = data.tar_path(0), copy / data.manifest["shards"][2]["sidecar"]
    whole = tar.read_bytes()
    for damage in (lambda: tar.unlink(), lambda: tar.write_bytes(whole[:-512])):
        damage()
        with pytest.raises(ClipwrightError) as caught:
            Dataset(copy)
        assert caught.value.code == "E_DATA_HASH" and tar.name in str(caught.value)
        tar.write_bytes(whole)
    sidecar.write_bytes((copy / data.manifest["shards"][1]["sidecar"]).read_bytes())
    with pytest.raises(ClipwrightError) as caught:
        Dataset(copy).sidecar(2)
    assert caught.value.code == "E_DATA_HASH" and sidecar.name in str(caught.value)
