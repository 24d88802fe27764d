"""A finished demo folder, opened: what its steps left on disk, checked to belong together."""

from __future__ import annotations

import json
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.pipeline.core.config import read_yaml
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.files import STATUS
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.folders.records import read_manifest

CONFIG, REPORT = "config.yaml", "report.json"
# The folders of a demo in the order they are made, and the file without which each is not there.
STEPS = {
    "shards": "manifest.json",
    "test": "manifest.json",
    "run": "log.jsonl",
    "model": "manifest.json",
    "zeroshot": "predictions.parquet",
    "retrieval": "queries.parquet",
    "embeddings": "manifest.json",
    "index": "current",
    "search": "hits.parquet",
}
PAIR = ("colour", "shape")  # the columns of which training leaves out some combinations
# What the page shows of each file. A demo whose steps are somebody's own may lack it.
_KEYS = {
    STATUS: ("command", "started", "ended", "host", "versions"),
    "log.jsonl": ("step", "samples", "loss", "acc_image", "acc_text", "samples_per_s", "data_share", "memory_gb"),
    "zeroshot": (
        *("n", "classes", "top1", "top1_low", "top1_high", "chance", "per_class", "confusion", "confused"),
        *("colour_top1", "colour_chance", "shape_top1", "shape_chance"),
    ),
    "retrieval": ("t2i", "i2t"),
    "search": ("n", "k", "chance", "queries"),
    "predictions.parquet": ("key", "label", "predicted"),
    "queries.parquet": ("way", "query", "key", "rank", "top", "right", "score"),
    "hits.parquet": ("query", "top", "right", "score"),
}


class Demo:
    """A finished demo folder: every step is there, and all scores are of its model and its test set."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ClipwrightError(
                "E_INPUT", "no demo folder", where=folder, found="there is no such folder", fix="clipwright demo -o DIR"
            )
        self.folder = folder
        self.status: dict[str, dict[str, Any]] = {}  # of all steps, once every one of them has ended well
        self.status = {name: self._status(name) for name in STEPS}
        self.train, self.test = Dataset(folder / "shards"), Dataset(folder / "test")
        self.batch = self._batch()
        self.log = self._json("run", "log.jsonl", _KEYS["log.jsonl"])
        self.zeroshot = self._scores("zeroshot", "zeroshot")
        self.retrieval, self.search = self._scores("retrieval", "retrieval"), self._scores("search", "search")
        self.predictions = self._table("zeroshot", "predictions.parquet")
        self.queries = self._table("retrieval", "queries.parquet")
        self.hits = self._table("search", "hits.parquet")
        self.pictures = Pictures(self.test)
        self.unseen = self._unseen()

    @property
    def precision(self) -> float:
        return self.search[f"mean_precision_at_{self.search['k']}"]

    def headline(self) -> dict[str, Any]:
        """The numbers that say whether the demo worked, each with its chance level."""
        t2i = self.retrieval["t2i"]
        return {
            "zeroshot": {k: self.zeroshot[k] for k in ("n", "top1", "chance", "shape_top1", "shape_chance")},
            "retrieval": {k: t2i[k] for k in ("n", "r1", "r10", "chance_r1", "chance_r10")},
            "search": {"n": self.search["n"], "precision": self.precision, "chance": self.search["chance"]},
        }

    def text(self, step: str, name: str) -> str:
        """A file of a step as it stands."""
        path = self.folder / step / name
        if not path.is_file():
            raise self._unfinished(step, f"no {name} in it")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise self._unfinished(step, f"its {name} cannot be read: {error}") from None

    def _unseen(self) -> bool:
        """Whether the zero-shot test asks only for colours and shapes that training showed, but never together."""
        asked = {tuple(self.pictures.row(line["key"]).get(name) for name in PAIR) for line in self.predictions}
        shards = [self.train.sidecar(shard) for shard in range(len(self.train.sizes))]
        if not all(set(PAIR) <= set(shard.column_names) for shard in shards):
            return False
        shown = {pair for shard in shards for pair in zip(*(shard[name].to_pylist() for name in PAIR), strict=True)}
        apart = all({pair[i] for pair in asked} <= {pair[i] for pair in shown} for i in range(len(PAIR)))
        return apart and not asked & shown

    def _batch(self) -> int:
        try:
            return int(read_yaml(self.folder / "run" / CONFIG)["schedule"]["global_batch"])
        except (KeyError, TypeError, ValueError):
            raise self._unfinished("run", f"its {CONFIG} has no schedule.global_batch") from None

    def _status(self, step: str) -> dict[str, Any]:
        """How a step ended, if it ended well."""
        if not (self.folder / step).is_dir():
            raise self._unfinished(step, "there is no such folder")
        if not (self.folder / step / STATUS).is_file():
            raise self._unfinished(step, f"no {STATUS}: its command was killed or still runs")
        [status] = self._json(step, STATUS, ("exit_code",))
        if status["exit_code"] != 0:
            raise self._unfinished(step, f"its command ended with exit code {status['exit_code']}")
        self._complete(step, STATUS, status, _KEYS[STATUS])
        if not (self.folder / step / STEPS[step]).is_file():
            raise self._unfinished(step, f"no {STEPS[step]} in it")
        return status

    def _scores(self, step: str, benchmark: str) -> dict[str, Any]:
        """A step's numbers, if they were measured on this folder's model and test set."""
        [report] = self._json(step, REPORT, ())
        if report.get("benchmark") != benchmark:
            raise self._unfinished(step, f"its {REPORT} holds no {benchmark} numbers")
        self._complete(step, REPORT, report, (benchmark, "fingerprints"))
        numbers, made_from = report[benchmark], report["fingerprints"]
        self._complete(step, f"{REPORT}, {benchmark},", numbers, _KEYS[benchmark])
        model = read_manifest(self.folder / "model", "model")
        here = {"model": model["fingerprint"], "data": self.test.fingerprint}
        for name, fingerprint in here.items():
            if made_from.get(name, fingerprint) != fingerprint:
                raise ClipwrightError(
                    "E_FINGERPRINT",
                    f"scores of another {'model' if name == 'model' else 'test set'}",
                    where=self.folder / step / REPORT,
                    found=f"{made_from[name][:16]}…, the folder's own is {fingerprint[:16]}…",
                    fix=self._again(step),
                )
        return numbers

    def _json(self, step: str, name: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
        """The object of a JSON file, or those of a file of one a line; at least one, each with `keys`."""
        text = self.text(step, name)
        try:
            found = [json.loads(part) for part in (text.splitlines() if name.endswith("l") else [text])]
        except ValueError as error:
            raise self._unfinished(step, f"its {name} cannot be read: {error}") from None
        if not found:
            raise self._unfinished(step, f"its {name} is empty")
        for tree in found:
            self._complete(step, name, tree, keys)
        return found

    def _complete(self, step: str, name: str, tree: Any, keys: tuple[str, ...]) -> None:
        """Refuses what is no object, or one without what the page shows of it."""
        if not isinstance(tree, dict):
            raise self._unfinished(step, f"its {name} cannot be read: not an object but {str(tree)[:40]}")
        for key in keys:
            if key not in tree:
                raise self._unfinished(step, f"its {name} has no {key}, which the page shows")

    def _table(self, step: str, name: str) -> list[dict[str, Any]]:
        try:
            table = pq.read_table(self.folder / step / name)
        except (pa.ArrowException, OSError) as error:
            raise self._unfinished(step, f"its {name} cannot be read: {error}") from None
        self._complete(step, name, dict.fromkeys(table.column_names), _KEYS[name])
        return table.to_pylist()

    def _unfinished(self, step: str, found: str) -> ClipwrightError:
        return ClipwrightError(
            "E_UNFINISHED",
            f"a demo without its step {step}",
            where=self.folder / step,
            found=found,
            fix=self._again(step),
        )

    def _again(self, step: str) -> str:
        """The command that makes one step, and the one that makes all that is missing."""
        own = self.folder / CONFIG
        shipped = Path(str(resources.files("clipwright") / "configs" / "demo.yaml"))
        tree = read_yaml(own) if own.is_file() else {}
        tree = tree if {"seed", "steps"} <= tree.keys() else read_yaml(shipped)
        ends = f"-o {{demo}}/{step}"
        line = next((line for line in tree["steps"].values() if line.endswith(ends)), "")
        demo = shlex.quote(str(self.folder))
        alone = f"clipwright {line.format(demo=demo, seed=tree['seed'])}" if line else f"make {step}"
        if step == "run" and self.status:  # finished, so that the same command would leave what lies there
            return f"run `{alone} --fresh`"
        return f"run `{alone}`, or `clipwright demo -o {demo}`, which goes on where it stopped"


class Pictures:
    """Pictures and rows of a dataset by key."""

    def __init__(self, data: Dataset) -> None:
        self.data = data
        self._rows = {
            record["key"]: (shard, row, record)
            for shard in range(len(data.sizes))
            for row, record in enumerate(data.sidecar(shard).to_pylist())
        }

    def row(self, key: str) -> dict[str, Any]:
        return self._rows[key][2]

    def image(self, key: str) -> bytes:
        shard, row, _ = self._rows[key]
        return self.data.image(shard, row)
