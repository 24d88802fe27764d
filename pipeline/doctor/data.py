"""Checks of the config and of the dataset against it."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.data.batch import RankBatch
from clipwright.pipeline.data.datasets import Datasets
from clipwright.pipeline.doctor.base import CheckResult, DoctorContext, check
from clipwright.pipeline.folders.cache import GB, bytes_needed, gb_for
from clipwright.pipeline.folders.dataset import OPEN_TARS
from clipwright.pipeline.pixels import PixelError, decode, probe
from clipwright.pipeline.train.config import open_tokenizer
from clipwright.pipeline.train.precision import resolve_precision

# Size of the sample, spread evenly over the dataset.
SAMPLED_SHARDS = 16
SAMPLED_CAPTIONS = 20_000
SAMPLED_IMAGES = 64
SAMPLED_ROWS = 20_000  # keys per sampled shard
OTHER_FILES = 128  # open files of a process besides shards: libraries, sockets, the log
# Above these shares there is a warning.
CUT_SHARE = 0.01  # captions longer than the context
UNKNOWN_SHARE = 0.05  # tokens that are unknown or single bytes
KEY = re.compile(r"[0-9a-f]{32}(_[0-9]+)?")


@check("config")
def config(context: DoctorContext) -> CheckResult:
    call = context.call
    run = call.out or Path("run")
    fresh = call.fresh or call.out is None
    context.resolved = resolve_precision(context.load(), run, context.world, fresh=fresh)
    value = context.config
    return CheckResult(
        "ok",
        f"{value.image.name} at {value.image.image_size} px, {value.text.name}, {value.tokenizer.name}, "
        f"{format_count(value.schedule.samples, 'sample')}, global batch {value.schedule.global_batch}, "
        f"{value.precision}",
    )


@check("dataset", "config")
def dataset(context: DoctorContext) -> CheckResult:
    data = Datasets(context.config.data, context.config.runtime.cache)
    context.dataset = data
    return CheckResult(
        "ok",
        f"{format_count(data.samples, 'sample')} in {format_count(len(data.sizes), 'shard')}, all present",
        "shards match the manifest",
    )


@check("keys", "dataset")
def keys(context: DoctorContext) -> CheckResult:
    """Keys are well-formed and unique within their shard, and every sample has a caption."""
    data = context.dataset
    checked = malformed = repeated = without_caption = 0
    for shard in spread(len(data.sizes), SAMPLED_SHARDS):
        table = data.sidecar(shard).slice(0, SAMPLED_ROWS)
        names = table["key"].to_pylist()
        checked += len(names)
        malformed += sum(not KEY.fullmatch(name) for name in names)
        repeated += len(names) - len(set(names))
        counts = table["captions"].combine_chunks().value_lengths().to_numpy()
        without_caption += int((counts == 0).sum())
    found = (
        f"{checked:,} checked: {malformed} malformed, {repeated} repeated within a shard, "
        f"{without_caption} without caption"
    )
    need = "32 hex digits, unique, with a caption"
    if malformed or repeated or without_caption:
        return CheckResult("FAIL", found, need, "prepare the dataset again with clipwright prep")
    return CheckResult("ok", found, need)


@check("samples", "dataset")
def samples(context: DoctorContext) -> CheckResult:
    """Every dataset has at least one global batch, and the ranks can split it evenly."""
    global_batch, data = context.config.schedule.global_batch, context.dataset
    RankBatch(context.world.rank, context.world.size, global_batch)
    data.check_batch(global_batch)
    epochs = ", ".join(f"{count:.1f}" for count in data.epochs(context.config.schedule.samples))
    return CheckResult("ok", f"{data.samples:,}, epochs: {epochs}", f"at least one global batch: {global_batch}")


@check("shards", "dataset")
def shards(context: DoctorContext) -> CheckResult:
    """Shards and streams against ranks: which ranks read the same files, and how well a batch mixes."""
    streams, batch = context.config.data.streams, context.config.schedule.global_batch
    world, count = context.world.size, len(context.dataset.sizes)
    found = (
        f"{format_count(count, 'shard')}, {format_count(streams, 'stream')}, world size {world}, global batch {batch}"
    )
    if world > streams or streams % world:
        multiple = -(-streams // world) * world
        return CheckResult(
            "warn", found, "a number of streams divisible by the world size", f"set data.streams={multiple}"
        )
    if batch > 64 * streams:
        need = f"a global batch of at most {64 * streams}"
        return CheckResult("warn", found, need, f"set data.streams={-(-batch // 64)} or more")
    if count < world:
        return CheckResult("warn", found, "at least one shard per rank", "prepare with smaller shards.samples")
    return CheckResult("ok", found)


@check("shard files", "dataset")
def shard_files(context: DoctorContext) -> CheckResult:
    """Shards that a process keeps open, over all datasets, against its limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_shards = sum(min(len(part.sizes), OPEN_TARS) for part in context.dataset.datasets)
    files = open_shards + context.config.runtime.workers + OTHER_FILES
    found = f"{format_count(open_shards, 'shard')} open at once per process"
    if soft == resource.RLIM_INFINITY:
        return CheckResult("ok", found, f"{format_count(files, 'file')}; no limit")
    need = f"{format_count(files, 'file')}; limit {soft}"
    if files <= soft:
        return CheckResult("ok", found, need)
    if hard == resource.RLIM_INFINITY or files <= hard:
        return CheckResult("FAIL", found, need, f"ulimit -n {files}")
    return CheckResult("FAIL", found, need, f"raise the hard limit of {hard}, or prepare with larger shards")


@check("shard cache", "dataset")
def shard_cache(context: DoctorContext) -> CheckResult:
    """Disk space that remote shards take on this machine, given the order in which they are read."""
    data, runtime = context.dataset, context.config.runtime
    orders = data.order(context.config.seed).orders
    remote = [(part, order) for part, order in zip(data.datasets, orders, strict=True) if part.remote]
    if not remote:
        return CheckResult("ok", "no shard is remote")
    shards_in_use = [order.shards_in_use(context.world.size) for _, order in remote]
    sizes = [[shard.bytes for shard in part.remote_shards()] for part, _ in remote]
    largest = max(bytes_needed(size, count) for size, count in zip(sizes, shards_in_use, strict=True))
    found = (
        f"runtime.cache_gb={runtime.cache_gb:g} for each of {format_count(len(remote), 'dataset')} in "
        f"{runtime.cache.root()}"
    )
    need = f"{gb_for(largest):g} GB per process: {format_count(max(shards_in_use), 'shard')} in use at a time"
    if largest > runtime.cache_gb * GB:
        fix = f"set runtime.cache_gb={gb_for(largest):g} or more, or a smaller data.window"
        return CheckResult("FAIL", found, need, fix)
    return CheckResult("ok", found, need)


@check("tokenizer", "dataset")
def tokenizer(context: DoctorContext) -> CheckResult:
    context.tokenizer = open_tokenizer(context.config.tokenizer, context.dataset, None, context.world)
    return CheckResult("ok", f"{context.config.tokenizer.name}, vocabulary of {context.tokenizer.vocab_size:,}")


@check("captions", "tokenizer")
def captions(context: DoctorContext) -> CheckResult:
    """Caption lengths against the text tower's context, over a sample."""
    limit, tokenizer = context.config.text.context, context.tokenizer
    longest = 4 * limit
    lengths: list[np.ndarray] = []
    unknown = total = 0
    for texts in caption_sample(context.dataset):
        ids = tokenizer.encode(texts, longest)
        batch_lengths = (ids == tokenizer.eot_id).argmax(1) + 1
        is_text = (np.arange(longest) < batch_lengths[:, None] - 1) & (ids != tokenizer.sot_id)
        unknown += int(np.isin(ids[is_text], list(tokenizer.unknown_ids)).sum())
        total += int(is_text.sum())
        lengths.append(batch_lengths)
    tokens = np.concatenate(lengths)
    context.unknown_share = unknown / max(total, 1)
    cut = float((tokens > limit).mean())
    median = format_count(round(float(np.median(tokens))), "token")
    found = f"{len(tokens):,} checked: median {median}, max {tokens.max()}, {cut:.1%} cut"
    need = f"at most {CUT_SHARE:.0%} longer than text.context={limit}"
    if cut > CUT_SHARE:
        enough = int(np.quantile(tokens, 1 - CUT_SHARE, method="higher"))
        return CheckResult("warn", found, need, f"set text.context={enough}")
    return CheckResult("ok", found, need)


@check("unknown tokens", "captions")
def unknown_tokens(context: DoctorContext) -> CheckResult:
    """Share of tokens for which the vocabulary has no piece."""
    if not context.tokenizer.unknown_ids:
        return CheckResult("ok", "none: every byte has an id")
    found = f"{context.unknown_share:.1%} of all tokens are unknown or single bytes"
    need = f"at most {UNKNOWN_SHARE:.0%}"
    if context.unknown_share > UNKNOWN_SHARE:
        is_trained = hasattr(context.config.tokenizer, "vocab_size")
        fix = "set a larger tokenizer.vocab_size" if is_trained else "use another tokenizer"
        return CheckResult("warn", found, need, fix)
    return CheckResult("ok", found, need)


@check("images", "dataset")
def images(context: DoctorContext) -> CheckResult:
    """A sample of images: SHA-256 of the bytes, then decoding."""
    data = context.dataset
    bad: list[str] = []
    short_sides: list[int] = []
    per_shard = -(-SAMPLED_IMAGES // min(SAMPLED_SHARDS, len(data.sizes)))
    for shard in spread(len(data.sizes), SAMPLED_SHARDS):
        for row in spread(data.sizes[shard], per_shard):
            try:
                stored = data.image(shard, row)
                header = probe(stored)
                decode(stored)
                short_sides.append(min(header.width, header.height))
            except (PixelError, ClipwrightError) as error:
                code, detail = (error.code, error.found) if isinstance(error, ClipwrightError) else error.args
                bad.append(f"{code} in {data.tar_name(shard)}, row {row}: {detail}")
    need = "bytes with the right hash that decode"
    if bad:
        fix = "restore the shard or run `clipwright prep` again with --fresh"
        found = f"{len(bad)} of {len(bad) + len(short_sides)} are bad; the first: {bad[0]}"
        return CheckResult("FAIL", found, need, fix)
    return CheckResult("ok", f"{len(short_sides)} decoded, median short side {np.median(short_sides):.0f} px", need)


def spread(count: int, limit: int) -> list[int]:
    """Returns at most `limit` numbers of range(count), evenly spaced, including the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(limit, count)).astype(np.int64)).tolist()


def caption_sample(data: Datasets) -> Iterator[list[str]]:
    """Yields at most SAMPLED_CAPTIONS captions, spread over the shards, in batches."""
    selected = spread(len(data.sizes), SAMPLED_SHARDS)
    for shard in selected:
        texts = data.sidecar(shard)["captions"].combine_chunks().flatten()
        sample = texts.take(np.array(spread(len(texts), -(-SAMPLED_CAPTIONS // len(selected)))))
        for start in range(0, len(sample), 1000):
            yield sample.slice(start, 1000).to_pylist()
