"""The config, and the dataset against it."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.data.batch import RankBatch
from clipwright.pipeline.data.datasets import Datasets
from clipwright.pipeline.doctor.base import Context, Found, check
from clipwright.pipeline.folders.cache import GB, bytes_needed, gb_for
from clipwright.pipeline.folders.dataset import OPEN_TARS
from clipwright.pipeline.pixels import PixelError, decode, probe
from clipwright.pipeline.train.config import open_tokenizer
from clipwright.pipeline.train.precision import resolve_precision

SHARDS, CAPTIONS, IMAGES = 16, 20_000, 64  # looked at, spread over the dataset
OTHER_FILES = 128  # that a process has open beside shards: libraries, sockets, its log
CUT, ODD = 0.01, 0.05  # shares of captions and of tokens beyond which there is a warning
ROWS = 20_000  # of each of these shards, for their keys
KEY = re.compile(r"[0-9a-f]{32}(_[0-9]+)?")


@check("config")
def config(context: Context) -> Found:
    call = context.call
    run = call.out or Path("run")
    context.resolved = resolve_precision(context.load(), run, context.world, fresh=call.fresh or call.out is None)
    made = context.config
    return Found(
        "ok",
        f"{made.image.name} at {made.image.image_size} px, {made.text.name}, {made.tokenizer.name}, "
        f"{made.schedule.samples:,} samples in batches of {made.schedule.global_batch}, {made.precision}",
    )


@check("dataset", "config")
def dataset(context: Context) -> Found:
    context.dataset = made = Datasets(context.config.data, context.config.runtime.cache)
    return Found("ok", f"{made.samples:,} samples in {len(made.sizes)} shards, all there", "manifest and shards agree")


@check("keys", "dataset")
def keys(context: Context) -> Found:
    """Keys of our form, each once in its shard, and a caption for each."""
    data, seen, odd, bare, twice = context.dataset, 0, 0, 0, 0
    for shard in spread(len(data.sizes), SHARDS):
        table = data.sidecar(shard).slice(0, ROWS)
        names = table["key"].to_pylist()
        seen += len(names)
        odd += sum(not KEY.fullmatch(name) for name in names)
        twice += len(names) - len(set(names))
        bare += int((table["captions"].combine_chunks().value_lengths().to_numpy() == 0).sum())
    found = f"{seen:,} looked at: {odd} of another form, {twice} twice in a shard, {bare} without caption"
    need = "32 hex digits, each once, with a caption"
    if odd or twice or bare:
        return Found("FAIL", found, need, "make the dataset again with clipwright prep")
    return Found("ok", found, need)


@check("samples", "dataset")
def samples(context: Context) -> Found:
    """Enough for a batch, of each dataset, and a batch that the ranks can share."""
    batch, data = context.config.schedule.global_batch, context.dataset
    RankBatch(context.world.rank, context.world.size, batch)
    data.check_batch(batch)
    epochs = ", ".join(f"{turns:.1f}" for turns in data.epochs(context.config.schedule.samples))
    return Found("ok", f"{data.samples:,}, each seen {epochs} times", f"at least a batch: {batch}")


@check("shards", "dataset")
def shards(context: Context) -> Found:
    """Shards and streams against ranks: which of them must read the same files, and how well a batch mixes."""
    streams, batch = context.config.data.streams, context.config.schedule.global_batch
    world, count = context.world.size, len(context.dataset.sizes)
    found = f"{count} shards, {streams} streams, ranks: {world}, batch {batch}"
    if world > streams or streams % world:
        more = -(-streams // world) * world
        return Found("warn", found, "a multiple of the ranks as streams", f"set data.streams={more}")
    if batch > 64 * streams:
        return Found("warn", found, f"a batch of at most {64 * streams}", f"set data.streams={-(-batch // 64)} or more")
    if count < world:
        return Found("warn", found, "a shard for each rank", "prepare with smaller shards.samples")
    return Found("ok", found)


@check("shard files", "dataset")
def shard_files(context: Context) -> Found:
    """Shards that a process keeps open, of each dataset, against its limit of open files."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    shards = [min(len(part.sizes), OPEN_TARS) for part in context.dataset.datasets]
    need = sum(shards) + context.config.runtime.workers + OTHER_FILES
    found = f"{sum(shards)} shards open at once in each process"
    if limit == resource.RLIM_INFINITY or need <= limit:
        return Found("ok", found, f"{need} files; {'no limit' if limit == resource.RLIM_INFINITY else limit} allowed")
    raised = most == resource.RLIM_INFINITY or need <= most
    fix = f"ulimit -n {need}" if raised else f"have the hard limit of {most} raised, or prepare with larger shards"
    return Found("FAIL", found, f"{need} files; {limit} allowed", fix)


@check("shard cache", "dataset")
def shard_cache(context: Context) -> Found:
    """What remote shards take on this machine, by the order in which they are read."""
    data, runtime = context.dataset, context.config.runtime
    orders = data.order(context.config.seed).orders
    remote = [(part, order) for part, order in zip(data.datasets, orders, strict=True) if part.remote]
    if not remote:
        return Found("ok", "no shard is remote")
    reach = [order.shards_in_use(context.world.size) for _, order in remote]
    sizes = [[shard.bytes for shard in part.remote_shards()] for part, _ in remote]
    most = max(bytes_needed(size, count) for size, count in zip(sizes, reach, strict=True))
    found = f"runtime.cache_gb={runtime.cache_gb:g} for each of {len(remote)} datasets in {runtime.cache.root()}"
    need = f"{gb_for(most):g} GB a process: {max(reach)} shards are in use at a time"
    if most > runtime.cache_gb * GB:
        return Found("FAIL", found, need, f"set runtime.cache_gb={gb_for(most):g} or more, or a smaller data.window")
    return Found("ok", found, need)


@check("tokenizer", "dataset")
def tokenizer(context: Context) -> Found:
    context.tokenizer = made = open_tokenizer(context.config.tokenizer, context.dataset, None, context.world)
    return Found("ok", f"{context.config.tokenizer.name}, {made.vocab_size:,} ids")


@check("captions", "tokenizer")
def captions(context: Context) -> Found:
    """Captions against the text tower's context, over a spread sample."""
    context_length, made = context.config.text.context, context.tokenizer
    longest = 4 * context_length
    lengths: list[np.ndarray] = []
    odd, real = 0, 0
    for texts in caption_sample(context.dataset):
        ids = made.encode(texts, longest)
        here = (ids == made.eot_id).argmax(1) + 1
        inside = (np.arange(longest) < here[:, None] - 1) & (ids != made.sot_id)
        odd += int(np.isin(ids[inside], list(made.unknown_ids)).sum())
        real += int(inside.sum())
        lengths.append(here)
    tokens = np.concatenate(lengths)
    context.odd_tokens = odd / max(real, 1)
    cut, most = float((tokens > context_length).mean()), int(np.quantile(tokens, 1 - CUT, method="higher"))
    found = f"{len(tokens):,} looked at: median {np.median(tokens):.0f} tokens, most {tokens.max()}, {cut:.1%} cut"
    need = f"at most {CUT:.0%} longer than text.context={context_length}"
    if cut > CUT:
        return Found("warn", found, need, f"set text.context={most}")
    return Found("ok", found, need)


@check("unknown tokens", "captions")
def unknown_tokens(context: Context) -> Found:
    """How much of the captions the vocabulary has no piece for."""
    if not context.tokenizer.unknown_ids:
        return Found("ok", "none: every byte has an id")
    found, need = f"{context.odd_tokens:.1%} of all tokens are unknown or single bytes", f"at most {ODD:.0%}"
    if context.odd_tokens > ODD:
        own = hasattr(context.config.tokenizer, "vocab_size")
        return Found("warn", found, need, "set a larger tokenizer.vocab_size" if own else "use another tokenizer")
    return Found("ok", found, need)


@check("images", "dataset")
def images(context: Context) -> Found:
    """A spread sample of pictures: their bytes by SHA-256, then decoded."""
    data, bad, sides = context.dataset, [], []
    for shard in spread(len(data.sizes), SHARDS):
        for row in spread(data.sizes[shard], -(-IMAGES // min(SHARDS, len(data.sizes)))):
            try:
                stored = data.image(shard, row)
                header = probe(stored)
                decode(stored)
                sides.append(min(header.width, header.height))
            except (PixelError, ClipwrightError) as error:
                code, detail = (error.code, error.found) if isinstance(error, ClipwrightError) else error.args
                bad.append(f"{code} in {data.tar_name(shard)}, row {row}: {detail}")
    need = "whole bytes that decode"
    if bad:
        fix = "restore the shard or run `clipwright prep` again with --fresh"
        return Found("FAIL", f"{len(bad)} of {len(bad) + len(sides)} are bad; the first: {bad[0]}", need, fix)
    return Found("ok", f"{len(sides)} decoded, short side {np.median(sides):.0f} px", need)


def spread(count: int, most: int) -> list[int]:
    """At most `most` of range(count), evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64)).tolist()


def caption_sample(data: Datasets) -> Iterator[list[str]]:
    """Shard by shard, a spread sample of at most CAPTIONS captions."""
    chosen = spread(len(data.sizes), SHARDS)
    for shard in chosen:
        texts = data.sidecar(shard)["captions"].combine_chunks().flatten()
        some = texts.take(np.array(spread(len(texts), -(-CAPTIONS // len(chosen)))))
        for start in range(0, len(some), 1000):
            yield some.slice(start, 1000).to_pylist()
