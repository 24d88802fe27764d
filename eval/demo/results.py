"""Opens a finished demo folder: the outputs of its steps, checked to belong together."""

from __future__ import annotations

import json
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipwright.pipeline.core.config_files import read_yaml
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.messages import command_line
from clipwright.pipeline.core.status import STATUS
from clipwright.pipeline.folders.dataset import Dataset
from clipwright.pipeline.folders.records import read_manifest

CONFIG, REPORT = "config.yaml", "report.json"
# The folders of a demo in the order of its steps, each with a file that it must contain.
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
COMBINATION = ("colour", "shape")  # the columns of which training leaves out some combinations
# The keys and columns of each file that the page shows. A demo with changed steps may lack them.
_REQUIRED = {
    STATUS: ("command", "started", "ended", "host", "versions"),
    "log.jsonl": ("step", "samples", "loss", "acc_image", "acc_text", "samples_per_s", "data_share", "memory_gb"),
    "zeroshot": (
        "n",
        "classes",
        "top1",
        "top1_low",
        "top1_high",
        "chance",
        "per_class",
        "confusion",
        "confused",
        "colour_top1",
        "colour_chance",
        "shape_top1",
        "shape_chance",
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
                "E_INPUT",
                "the demo folder does not exist",
                where=folder,
                found="no such folder",
                fix="run `clipwright demo -o DIR`",
            )
        self.folder = folder
        self.status: dict[str, dict[str, Any]] = {}  # stays empty until the status of every step was checked
        self.status = {name: self._finished_status(name) for name in STEPS}
        self.train, self.test = Dataset(folder / "shards"), Dataset(folder / "test")
        self.batch = self._global_batch()
        self.log = self._read_json("run", "log.jsonl", _REQUIRED["log.jsonl"])
        self.zeroshot = self._numbers("zeroshot", "zeroshot")
        self.retrieval, self.search = self._numbers("retrieval", "retrieval"), self._numbers("search", "search")
        self.predictions = self._read_table("zeroshot", "predictions.parquet")
        self.queries = self._read_table("retrieval", "queries.parquet")
        self.hits = self._read_table("search", "hits.parquet")
        self.test_images = ImagesByKey(self.test)
        self.unseen_combinations = self._has_unseen_combinations()

    @property
    def precision(self) -> float:
        return self.search[f"mean_precision_at_{self.search['k']}"]

    def headline(self) -> dict[str, Any]:
        """Returns the numbers that show whether the demo worked, with their chance levels."""
        t2i = self.retrieval["t2i"]
        return {
            "zeroshot": {key: self.zeroshot[key] for key in ("n", "top1", "chance", "shape_top1", "shape_chance")},
            "retrieval": {key: t2i[key] for key in ("n", "r1", "r10", "chance_r1", "chance_r10")},
            "search": {"n": self.search["n"], "precision": self.precision, "chance": self.search["chance"]},
        }

    def text(self, step: str, name: str) -> str:
        """Returns the content of a step's file."""
        path = self.folder / step / name
        if not path.is_file():
            raise self._unfinished(step, f"it has no {name}")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise self._unfinished(step, f"its {name} cannot be read: {error}") from None

    def _has_unseen_combinations(self) -> bool:
        """Whether training showed every color and shape of the zero-shot test, but none of their combinations."""
        shards = [self.train.sidecar(shard) for shard in range(len(self.train.sizes))]
        if not all(set(COMBINATION) <= set(shard.column_names) for shard in shards):
            return False
        trained = set()
        for shard in shards:
            trained.update(zip(*(shard[name].to_pylist() for name in COMBINATION), strict=True))
        tested = set()
        for prediction in self.predictions:
            row = self.test_images.row(prediction["key"])
            tested.add(tuple(row.get(name) for name in COMBINATION))
        for i in range(len(COMBINATION)):
            if not {values[i] for values in tested} <= {values[i] for values in trained}:
                return False
        return not tested & trained

    def _global_batch(self) -> int:
        try:
            return int(read_yaml(self.folder / "run" / CONFIG)["schedule"]["global_batch"])
        except (KeyError, TypeError, ValueError):
            raise self._unfinished("run", f"its {CONFIG} has no schedule.global_batch") from None

    def _finished_status(self, step: str) -> dict[str, Any]:
        """Returns the status of a step that ended without an error."""
        if not (self.folder / step).is_dir():
            raise self._unfinished(step, "no such folder")
        if not (self.folder / step / STATUS).is_file():
            raise self._unfinished(step, f"it has no {STATUS}: its command was killed or is still running")
        [status] = self._read_json(step, STATUS, ("exit_code",))
        if status["exit_code"] != 0:
            raise self._unfinished(step, f"its command ended with exit code {status['exit_code']}")
        self._require_keys(step, STATUS, status, _REQUIRED[STATUS])
        if not (self.folder / step / STEPS[step]).is_file():
            raise self._unfinished(step, f"it has no {STEPS[step]}")
        return status

    def _numbers(self, step: str, benchmark: str) -> dict[str, Any]:
        """Returns a step's numbers, which must be those of this folder's model and test set."""
        [report] = self._read_json(step, REPORT, ())
        if report.get("benchmark") != benchmark:
            raise self._unfinished(step, f"its {REPORT} has no numbers of the benchmark {benchmark}")
        self._require_keys(step, REPORT, report, (benchmark, "fingerprints"))
        numbers, fingerprints = report[benchmark], report["fingerprints"]
        self._require_keys(step, f"{REPORT}, {benchmark},", numbers, _REQUIRED[benchmark])
        model = read_manifest(self.folder / "model", "model")
        expected = {"model": model["fingerprint"], "data": self.test.fingerprint}
        for name, fingerprint in expected.items():
            if fingerprints.get(name, fingerprint) != fingerprint:
                raise ClipwrightError(
                    "E_FINGERPRINT",
                    f"the scores are of another {'model' if name == 'model' else 'test set'}",
                    where=self.folder / step / REPORT,
                    found=f"they are of {fingerprints[name][:16]}…, the demo has {fingerprint[:16]}…",
                    fix=self._rerun_hint(step),
                )
        return numbers

    def _read_json(self, step: str, name: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
        """Returns the objects of a .jsonl file, or the object of a .json file; at least one, each with `keys`."""
        text = self.text(step, name)
        documents = text.splitlines() if name.endswith(".jsonl") else [text]
        try:
            trees = [json.loads(document) for document in documents]
        except ValueError as error:
            raise self._unfinished(step, f"its {name} cannot be read: {error}") from None
        if not trees:
            raise self._unfinished(step, f"its {name} is empty")
        for tree in trees:
            self._require_keys(step, name, tree, keys)
        return trees

    def _require_keys(self, step: str, name: str, tree: Any, keys: tuple[str, ...]) -> None:
        if not isinstance(tree, dict):
            raise self._unfinished(step, f"its {name} cannot be read: {str(tree)[:40]} is not an object")
        for key in keys:
            if key not in tree:
                raise self._unfinished(step, f"its {name} has no {key}, which the page shows")

    def _read_table(self, step: str, name: str) -> list[dict[str, Any]]:
        try:
            table = pq.read_table(self.folder / step / name)
        except (pa.ArrowException, OSError) as error:
            raise self._unfinished(step, f"its {name} cannot be read: {error}") from None
        self._require_keys(step, name, dict.fromkeys(table.column_names), _REQUIRED[name])
        return table.to_pylist()

    def _unfinished(self, step: str, found: str) -> ClipwrightError:
        return ClipwrightError(
            "E_UNFINISHED",
            f"the demo's step {step} is missing or did not finish",
            where=self.folder / step,
            found=found,
            fix=self._rerun_hint(step),
        )

    def _rerun_hint(self, step: str) -> str:
        """Names the command that runs this step again, and the one that runs all missing steps."""
        own_config = self.folder / CONFIG
        tree = read_yaml(own_config) if own_config.is_file() else {}
        if not {"seed", "steps"} <= tree.keys():
            tree = read_yaml(Path(str(resources.files("clipwright") / "configs" / "demo.yaml")))
        command = f"make {step}"
        for line in tree["steps"].values():
            if line.endswith(f"-o {{demo}}/{step}"):
                command = f"clipwright {line.format(demo=shlex.quote(str(self.folder)), seed=tree['seed'])}"
                break
        if step == "run" and self.status:  # the run has finished: without --fresh the command would leave it unchanged
            return f"run `{command} --fresh`"
        return f"run `{command}`, or `{command_line('demo', '-o', self.folder)}` to resume the demo"


class ImagesByKey:
    """Images and sidecar rows of a dataset by key."""

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
