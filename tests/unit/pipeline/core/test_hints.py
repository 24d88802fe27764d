"""Wrong names on the command line: the error names the right one, or says where the right ones are listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clipwright.cli import REGISTRIES
from clipwright.pipeline.core import outline
from clipwright.pipeline.core.command import COMMANDS, load_name
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.other_tools import MODELS, SYNONYMS, TOOLS, equal_model, page
from clipwright.pipeline.core.usage import check_verb, flag_error, verb_of

DOCS = Path(__file__).resolve().parents[4] / "docs" / "coming-from.md"


def refused(line: str) -> str:
    """Returns the error that a command line ends with before anything is imported for its verb."""
    words = line.split(" ")
    with pytest.raises(ClipwrightError) as caught:
        check_verb(words, COMMANDS)
        verb = verb_of(words, COMMANDS)
        COMMANDS[verb].call(words[len(verb.split()) :]).check()
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "culprit", "remedy"),
    [
        ("train photos lr=1e-3", "lr (command line)", "use optim.lr"),
        ("train photos batch_size=32", "batch_size", "use schedule.global_batch: samples per step over all ranks"),
        ("train photos accum_freq=2", "accum_freq", "use runtime.micro_batch"),
        ("train photos image.name=vit_nano image.patch_size=8", "image.patch_size", "use image.patch"),
        ("train photos image.patch_size=8", "image.patch_size", "image.patch exists with another image.name"),
        ("train photos epochs=1", "epochs", "`clipwright data stats DATASET` prints them"),
        ("train photos data.train=ds epochs=1.5", "epochs", "set schedule.samples=300: 1.5 × the 200 samples of ds"),
        ("train photos schedule.epochs=2 data.train=ds", "schedule.epochs", "set schedule.samples=400"),
        ("train photos local_loss=true", "local_loss", "nothing to set"),
        ("train photos siglip=true", "siglip", "use loss.name=sigmoid"),
        ("train photos grad_clip_norm=1", "grad_clip_norm", "use optim.grad_clip_norm"),
        ("train photos matryoshka.dims=[1]", "matryoshka", "clipwright train --help lists the keys"),
        ("train photos optim.schedule=1", "optim.schedule", "clipwright train --help lists the keys"),
        ("train photos xyz=1", "xyz", "clipwright train --help lists the keys"),
        ("train photos runtime.worker=1", "runtime.worker", "did you mean 'runtime.workers'?"),
        ("prep table path=x", "path", "did you mean 'source.path'?"),
        ("prep table image_size=1", "image_size", "use images.size"),
        ("embed batch_size=3", "batch_size", "use runtime.batch"),
        ("index build flat embeddings_folder=x", "embeddings_folder", "use embeddings: an embedding folder"),
        ("search index num_images=3", "num_images", "use k"),
        ("eval zeroshot custom_template_file=x", "custom_template_file", "use benchmark.templates"),
    ],
)
def test_an_unknown_key_is_answered_with_ours(
    line: str, culprit: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "manifest.json").write_text(json.dumps({"written": 200}))
    monkeypatch.chdir(tmp_path)
    error = refused(line)
    assert error.startswith("error[E_CONFIG_KEY]") and culprit in error
    assert error.rpartition(" — ")[2].startswith(remedy) or remedy in error.rpartition(" — ")[2], error


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("train --batch-size 32", "use schedule.global_batch"),
        ("train photos --optim.lr=1", "write optim.lr=VALUE, without dashes"),
        ("train photos --epochs 3", "set schedule.samples"),
        ("train photos --keep 3", "write runtime.keep=VALUE"),
        ("prep --number_sample_per_shard 3", "use shards.samples"),
        ("train photos --nonsense", "clipwright train --help lists flags and keys"),
        ("--nonsense", "clipwright --help lists flags and keys"),
    ],
)
def test_an_unknown_flag_is_answered_with_a_key(line: str, remedy: str) -> None:
    words = line.split()
    flag = next(word for word in words if word.startswith("--")).partition("=")[0]
    error = str(flag_error(flag, words, COMMANDS))
    assert error.startswith("error[E_USAGE]: the flag does not exist") and remedy in error.rpartition(" — ")[2], error


def test_a_command_with_an_unknown_flag_ends_with_this_error(cli: Any) -> None:
    for line in ("train photos --batch-size 32", "train photos --batch-size=32"):
        error = cli.error(*line.split(), code=2)
        assert error.startswith("error[E_USAGE]") and "--batch-size" in error and "use schedule.global_batch" in error


@pytest.mark.parametrize(
    ("name", "image", "text"),
    [
        ("ViT-B-32", "clip_vit_b32", "clip_text_b"),
        ("ViT-B/32", "clip_vit_b32", "clip_text_b"),
        ("ViT-L-14-336-quickgelu", "clip_vit_l14_336", "clip_text_l"),
        ("ViT-L/14@336px", "clip_vit_l14_336", "clip_text_l"),
        ("RN50", "clip_rn50", "clip_text_b"),
        ("ViT-H-14", "", "openclip_text_h"),
        ("openai/clip-vit-base-patch32", "clip_vit_b32", "clip_text_b"),
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "clip_vit_b32", "clip_text_b"),
        ("timm/vit_base_patch16_224.augreg_in21k", "vit_base_patch16", ""),
        ("vit_base_patch16_clip_224.openai", "clip_vit_b16", ""),
        ("google/vit-base-patch16-224", "vit_base_patch16", ""),
        ("facebook/convnext-base-224", "convnext_base", ""),
        ("microsoft/cvt-13", "cvt_13", ""),
        ("swin_base_patch4_window7_224", "swin_base_window7", ""),
        ("google/siglip-base-patch16-224", "siglip_vit_b16", "siglip_text_b"),
        ("mixer_b16_224", "mixer_b16", ""),
        ("resnet50", "", ""),
        ("EVA02-B-16", "", ""),
    ],
)
def test_names_of_open_clip_timm_and_hugging_face(name: str, image: str, text: str) -> None:
    images = outline.registry("clipwright.pipeline.towers.base:IMAGE_TOWERS").presets
    texts = outline.registry("clipwright.pipeline.towers.base:TEXT_TOWERS").presets
    assert (equal_model(name, images), equal_model(name, texts)) == (image, text)


def test_a_foreign_model_name_is_answered_with_the_equal_tower(cli: Any) -> None:
    line = cli.error("train", "photos", "image.name=ViT-B-32", code=2)
    assert line.startswith("error[E_CONFIG_CHOICE]") and "image.name: ViT-B-32 (command line)" in line
    assert line.endswith("use clip_vit_b32, the same architecture")
    line = cli.error("train", "photos", "text.name=RN50", code=2)
    assert line.endswith("use clip_text_b, the same architecture")
    line = cli.error("train", "photos", "image.name=resnet50", code=2)
    assert line.endswith("see all: clipwright list towers")


def test_the_table_names_keys_towers_and_verbs_that_exist() -> None:
    for tool, flags in TOOLS.items():
        assert len({flag.theirs for flag in flags}) == len(flags), tool
        for flag in flags:
            kind = COMMANDS[flag.verb].kind
            assert kind is not None and (flag.ours or flag.note), flag
            if flag.key:
                assert flag.key in outline.keys(kind), flag
    every_key = {key for command in COMMANDS.values() if command.kind for key in outline.keys(command.kind)}
    assert not [name for name, key in SYNONYMS.items() if key != "-o" and key not in every_key]
    images, texts = (load_name(name).entries for name in REGISTRIES["towers"])
    for name, (image, text) in MODELS.items():
        assert (image in images or not image) and (text in texts or not text) and (image or text), name


def test_the_page_is_current() -> None:
    """If this fails: python -m clipwright.pipeline.core.other_tools > docs/coming-from.md."""
    assert page() == DOCS.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "code", "culprit", "remedy"),
    [
        ("train retrieval", "E_CONFIG_FILE", "retrieval", "use clipwright eval retrieval"),
        ("index build zeroshot", "E_CONFIG_FILE", "zeroshot", "use clipwright eval zeroshot"),
        ("train e.yaml", "E_CONFIG_FILE", "e.yaml", "use clipwright eval e.yaml"),
        ("train shards data.train=x", "E_USAGE", "shards is a folder", "KEY=shards"),
        ("train optim.lr", "E_USAGE", "optim.lr is a key", "write optim.lr=VALUE"),
        ("train optim", "E_USAGE", "optim is a key", "write optim.KEY=VALUE"),
        ("train photos optim.lr 0.1", "E_USAGE", "'optim.lr'", "write optim.lr=0.1"),
        ("data verify shards data=other", "E_USAGE", "data=other", "remove one of them"),
        ("train photos optim.lr=", "E_CONFIG_VALUE", "optim.lr", "write optim.lr=VALUE, or leave it out"),
        ("embed model= data=x", "E_CONFIG_VALUE", "model", "write model=VALUE, or leave it out"),
        ("search index text=", "E_CONFIG_VALUE", "text", "write text=VALUE, or null, or leave it out"),
        ("data verify ", "E_CONFIG_VALUE", "data", "write data=VALUE"),
        ("trian photos", "E_USAGE", "clipwright trian", "did you mean 'train'?"),
        ("index bild", "E_USAGE", "clipwright index bild", "did you mean 'index build'?"),
        ("evaluate x", "E_USAGE", "clipwright evaluate", "use clipwright eval"),
        ("qwertz", "E_USAGE", "clipwright qwertz", "clipwright --help describes them"),
    ],
)
def test_nonsense_is_refused_with_what_to_write(
    line: str, code: str, culprit: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "e.yaml").write_text("benchmark: {name: zeroshot}\n")
    monkeypatch.chdir(tmp_path)
    error = refused(line)
    assert error.startswith(f"error[{code}]") and culprit in error and remedy in error.rpartition(" — ")[2], error


def test_commands_end_with_these_errors(cli: Any) -> None:
    """The checks above, through the command line."""
    for line, code, remedy in (
        ("train photos lr=1e-3", "E_CONFIG_KEY", "use optim.lr"),
        ("help qwertz", "E_USAGE", "clipwright --help describes them"),
        ("train retrieval", "E_CONFIG_FILE", "use clipwright eval retrieval"),
        ("embed model= data=x", "E_CONFIG_VALUE", "write model=VALUE, or leave it out"),
    ):
        error = cli.error(*line.split(), code=2)
        assert error.startswith(f"error[{code}]") and error.endswith(remedy), error
