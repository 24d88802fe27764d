"""Every config key of `embed`, `eval`, `index build` and `search` changes what it names. A new key needs an entry."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from config_keys import config_keys

from clipwright.eval import encode
from clipwright.pipeline.model.folder import Model

TESTS = Path(__file__).resolve().parents[2]
EMBED = ["embed", "model={model}", "data={data}"]
RETRIEVAL = ["eval", "retrieval", "model={model}", "data={data}"]
ZEROSHOT = ["eval", "zeroshot", "model={model}", "data={data}", "benchmark.label=colour"]
SEARCH_BENCHMARK = ["eval", "search", "index={index}", "benchmark.template=a {colour} image"]
SEARCH = ["search", "index={index}", "text=a red image"]
# Verb and key → (command line, arguments that change it): the JSON result differs.
RESULTS: dict[str, tuple[list[str], list[str]]] = {
    "embed data": (EMBED, ["data={other}"]),
    "embed model": (EMBED, ["model={other_model}"]),
    "embed what": (EMBED, ["what=text"]),
    "embed part_samples": (EMBED, ["part_samples=2"]),
    "eval benchmark.name": (RETRIEVAL, ["benchmark.name=zeroshot", "benchmark.label=colour"]),
    "eval model": (RETRIEVAL, ["model={other_model}"]),
    "eval data": (RETRIEVAL, ["data={other}"]),
    "eval index": (SEARCH_BENCHMARK, ["index={other_index}"]),
    "eval benchmark.classes (zeroshot)": (ZEROSHOT, ["benchmark.classes=[red, green, blue, black]"]),
    "eval benchmark.label (zeroshot)": (ZEROSHOT, ["benchmark.label={colour} {id}"]),
    "eval benchmark.templates (zeroshot)": (
        [*ZEROSHOT[:4], "benchmark.label={colour} {id}"],
        ['benchmark.templates=["no {}"]'],
    ),
    "eval benchmark.where (zeroshot)": (ZEROSHOT, ["benchmark.where={held_out: true}"]),
    "eval benchmark.template (search)": (SEARCH_BENCHMARK, ["benchmark.template={id}"]),
    "eval benchmark.where (search)": (SEARCH_BENCHMARK, ["benchmark.where={held_out: true}"]),
    "eval benchmark.k (search)": (SEARCH_BENCHMARK, ["benchmark.k=2"]),
    "eval benchmark.seed (search)": (SEARCH_BENCHMARK, ["benchmark.seed=3"]),
    "index build embeddings": (["index", "build", "flat", "embeddings={embedded}"], ["embeddings={other_embedded}"]),
    "search index": (SEARCH, ["index={other_index}"]),
    "search text": (SEARCH, ["text=number 5"]),
    "search k": (SEARCH, ["k=2"]),
}
ELSEWHERE = {
    "embed runtime.cache_dir": "unit/eval/test_remote_data.py",
    "embed runtime.cache_gb": "unit/eval/test_remote_data.py",
    "embed runtime.part": "unit/eval/test_embed.py",
    "eval runtime.cache_dir": "unit/eval/test_remote_data.py",
    "eval runtime.cache_gb": "unit/eval/test_remote_data.py",
    "eval benchmark.image (zeroshot)": "unit/eval/test_zeroshot.py",
    "search image": "unit/eval/search/test_query.py",
    "search model": "unit/eval/search/test_query.py",
    "search data": "unit/eval/search/test_page.py",
    "index build recipe.name": "unit/eval/search/test_recipes.py",
}
# Keys of speed: the batches and threads of a command.
RUNTIME = {"embed runtime.batch", "embed runtime.workers", "eval runtime.batch", "eval runtime.workers"}


def test_every_key_has_a_test() -> None:
    keys = {f"{verb} {key}" for verb in ("embed", "eval", "index build", "search") for key in config_keys(verb)}
    assert keys == {*RESULTS, *ELSEWHERE, *RUNTIME}
    for key, file in ELSEWHERE.items():
        name = key.removesuffix(" (zeroshot)").rpartition(" ")[2].rpartition(".")[2]
        assert name in (TESTS / file).read_text(encoding="utf-8"), f"{file} does not mention {key}"


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory,
    model: Path,
    small: Path,
    embedded: Path,
    indexed: Path,
    make_model: Callable[..., Path],
    make_dataset: Callable[..., Path],
    cli: Callable[..., Any],
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("keys")
    other_model = make_model(folder / "model", seed=1)
    other = make_dataset(folder / "data", 6)
    for arguments in (
        ["embed", f"model={model}", f"data={other}", "-o", folder / "embeddings"],
        ["index", "build", "flat", f"embeddings={folder / 'embeddings'}", "-o", folder / "index"],
    ):
        done = cli(*arguments)
        assert done.returncode == 0, done.stderr
    return {
        "model": model,
        "data": small,
        "embedded": embedded,
        "index": indexed,
        "other_model": other_model,
        "other": other,
        "other_embedded": folder / "embeddings",
        "other_index": folder / "index",
    }


def result(arguments: list[str], folders: dict[str, Path], tmp_path: Path, quick_cli: Callable[..., Any]) -> Any:
    """Returns what a command measured or wrote, without the config that it repeats."""
    filled = []
    for argument in arguments:
        for name, folder in folders.items():
            argument = argument.replace(f"{{{name}}}", str(folder))
        filled.append(argument)
    out = ["-o", tmp_path / f"out-{len(list(tmp_path.iterdir()))}"] if filled[0] in ("embed", "index") else []
    done = quick_cli(*filled, *out, "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    if "files" in printed:
        return printed["files"]
    return {name: value for name, value in printed.items() if name not in ("config", "fingerprints", "query", "k")}


@pytest.mark.parametrize("key", RESULTS)
def test_key_changes_the_result(
    key: str, folders: dict[str, Path], tmp_path: Path, quick_cli: Callable[..., Any]
) -> None:
    base, changed = RESULTS[key]
    names = {argument.partition("=")[0] for argument in changed}
    kept = [argument for argument in base if argument.partition("=")[0] not in names]
    expected = result(base, folders, tmp_path, quick_cli)
    assert result([*kept, *changed], folders, tmp_path, quick_cli) != expected, f"{key} is ignored"


@pytest.mark.parametrize("verb", ["embed", "eval"])
def test_batch_and_workers_are_used(
    verb: str, folders: dict[str, Path], tmp_path: Path, quick_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, threads = [], []
    embed_images, executor = Model.embed_images, encode.ThreadPoolExecutor

    def counting_embed(self: Model, images: Any) -> Any:
        sizes.append(len(images))
        return embed_images(self, images)

    def counting_executor(workers: int, *arguments: Any, **options: Any) -> Any:
        threads.append(workers)
        return executor(workers, *arguments, **options)

    monkeypatch.setattr(Model, "embed_images", counting_embed)
    monkeypatch.setattr(encode, "ThreadPoolExecutor", counting_executor)
    base = EMBED if verb == "embed" else RETRIEVAL
    result([*base, "runtime.batch=3", "runtime.workers=4"], folders, tmp_path, quick_cli)
    assert max(sizes) == 3 and threads == [4]
