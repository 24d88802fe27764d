"""Imported models compute the same as transformers and work in evaluation, index and search like our own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from clipwright.pipeline.core.config import resolve
from clipwright.pipeline.folders.records import check_files, read_manifest
from clipwright.pipeline.interop import parity
from clipwright.pipeline.interop.formats.base import FORMATS, open_foreign_model
from clipwright.pipeline.interop.huggingface import preprocessing, towers
from clipwright.pipeline.interop.huggingface.model import TOKEN_TABLE, TransformersFormat, TransformersModel
from clipwright.pipeline.interop.weights import NameTable, TensorRule
from clipwright.pipeline.model.folder import Model, load_model
from clipwright.pipeline.model.two_tower import ModelConfig, build_model
from clipwright.pipeline.pixels import encode
from clipwright.pipeline.tokenizers.base import TOKENIZERS
from clipwright.pipeline.tokenizers.siglip import SigLIPTokenizer

TEXTS = ["Red CARS on snow!", "", "a photo of “two” dogs & 猫", "word, " * 90, "x </s>", "it's <|endoftext|> 한국어"]
B32 = {"hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12, "intermediate_size": 3072}
Make = Callable[..., Path]


def images() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((50, 73), (90, 61), (33, 40), (43, 40))]


def reference(folder: Path, fixed: bool) -> tuple[Any, Any]:
    """The model of transformers and its outputs for `images` and TEXTS, by its own classes."""
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, SiglipImageProcessorPil, SiglipModel

    model, processor = (SiglipModel, SiglipImageProcessorPil) if fixed else (CLIPModel, CLIPImageProcessorPil)
    opened = model.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    context = opened.config.text_config.max_position_embeddings
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=context, return_tensors="pt")["input_ids"]
    inputs = processor.from_pretrained(folder)([Image.fromarray(image) for image in images()], return_tensors="pt")
    with torch.inference_mode():
        return opened, opened(input_ids=ids, pixel_values=inputs["pixel_values"])


def check(folder: Path, out: Path) -> Model:
    """Checks that an import of `folder` gives its embeddings and temperature on inputs other than the receipt's."""
    ours = load_model(out, device="cpu")
    fixed = ours.config.text.pad == "fixed"
    theirs, expected = reference(folder, fixed)
    views = np.stack([ours.view(encode(pixels, "png")) for pixels in images()])
    image, text = ours.embed_images(views), ours.embed_texts(TEXTS)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(image, unit(expected.image_embeds), atol=2e-6, rtol=0)
    torch.testing.assert_close(text, unit(expected.text_embeds), atol=2e-6, rtol=0)
    assert image.std(0).max() > 0.01 and text.std(0).max() > 0.01  # the inputs affect the outputs
    weights = load_file(out / "model.safetensors")
    scale, bias = weights["loss.logit_scale"], weights.get("loss.bias", torch.zeros(1))
    assert scale.shape == bias.shape == (1,) and scale.item() == pytest.approx(theirs.logit_scale.item())
    torch.testing.assert_close(scale.exp() * image @ text.T + bias, expected.logits_per_image, atol=1e-4, rtol=0)
    assert json.loads((out / "config.json").read_text())["loss"] == {"name": "sigmoid" if fixed else "softmax"}
    return ours


@pytest.mark.parametrize(
    "form",
    [
        {},
        # An early folder: argmax pooling, float16, old processor keys; odd sizes.
        {
            "text": {"eos_token_id": 2, "bos_token_id": 0, "max_position_embeddings": 21, "hidden_act": "gelu"},
            "vision": {"image_size": 30, "patch_size": 10, "layer_norm_eps": 1e-3, "hidden_act": "gelu"},
            "processor": {"resample": 2, "image_mean": [0.1, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]},
            "dtype": torch.float16,
        },
        # Pixels that fill no patch, towers of different depth, a token table larger than the tokenizer.
        {
            "text": {"num_hidden_layers": 1, "vocab_size": 49420, "layer_norm_eps": 1e-2},
            "vision": {"image_size": 37, "num_hidden_layers": 3, "hidden_act": "gelu_pytorch_tanh"},
            "processor": {"resample": 1},
            "dtype": torch.bfloat16,
        },
        # ViT-B/32 with one layer; its full depth would take seconds and prove nothing more.
        {
            "text": {**B32, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048},
            "vision": {**B32, "image_size": 224, "patch_size": 32},
            "dim": 512,
            "dtype": torch.bfloat16,
        },
    ],
    ids=["plain", "early", "odd", "b32"],
)
def test_clip_import_matches_transformers(make_clip: Make, run: Any, tmp_path: Path, form: dict[str, Any]) -> None:
    folder, out = make_clip(**form), tmp_path / "model"
    if form.get("dtype") == torch.float16:
        path = folder / "preprocessor_config.json"
        tree = json.loads(path.read_text())
        for key in ("do_rescale", "rescale_factor", "image_processor_type", "do_convert_rgb"):
            del tree[key]
        path.write_text(
            json.dumps({**tree, "feature_extractor_type": "CLIPFeatureExtractor", "size": 30, "crop_size": 30})
        )
    done = run("import", folder, "-o", out, "--json")
    assert done.code == 0, done.err
    ours = check(folder, out)
    text, image = ours.config.text, ours.config.image
    assert text.pool == ("argmax" if form.get("text", {}).get("eos_token_id") == 2 else "eot")
    assert (text.pad, image.pool, ours.config.tokenizer.clean) == ("longest", "cls", "transformers")
    printed, receipt = json.loads(done.out), json.loads((out / "parity.json").read_text())
    manifest = read_manifest(out, "model")
    assert printed["parity"] == receipt and receipt["inputs"] == {"images": 5, "texts": len(parity.TEXTS)}
    assert receipt["model"]["fingerprint"] == manifest["fingerprint"] == ours.fingerprint
    assert receipt["source"] == {"kind": "CLIPModel", "fingerprint": manifest["made_from"]["source"]}
    assert (
        all(0 <= receipt[name]["max_abs"] <= 1e-5 for name in ("images", "texts"))
        and receipt["pixels"]["max_levels"] == 0
    )
    assert "version" not in (out / "parity.json").read_text() and "parity.json" in manifest["files"]
    check_files(out, manifest["files"], "E_MODEL_HASH")
    assert json.loads((out / "status.json").read_text())["verb"] == "import"


@pytest.mark.filterwarnings("ignore:This sequence already has")
@pytest.mark.parametrize(
    "form",
    [
        {},
        {
            "text": {"max_position_embeddings": 19, "layer_norm_eps": 1e-2, "num_hidden_layers": 1},
            "vision": {"image_size": 37, "patch_size": 9, "num_hidden_layers": 1},
            "processor": {"resample": 2, "image_std": [0.4, 0.5, 0.6]},
            "tokenizer": {"model_max_length": 19, "do_lower_case": False},
            "dtype": torch.bfloat16,
        },
    ],
    ids=["plain", "odd"],
)
def test_siglip_import_matches_transformers(make_siglip: Make, run: Any, tmp_path: Path, form: dict[str, Any]) -> None:
    folder, out = make_siglip(**form), tmp_path / "model"
    if form:  # the other name of the vocabulary
        (folder / "spiece.model").rename(folder / "tokenizer.model")
    assert (done := run("import", folder, "-o", out)).code == 0, done.err
    if form:
        (folder / "tokenizer.model").rename(folder / "spiece.model")
    ours = check(folder, out)
    assert (ours.config.text.pad, ours.config.text.pool, ours.config.image.pool) == ("fixed", "last", "attention")
    assert (ours.config.preprocessing.fit, ours.config.tokenizer.lower_case) == ("squash", not form)
    assert ours.config.image.drop_rest == bool(form)


def test_sharded_weights_processor_config_and_separate_vocabulary(clip: Path, run: Any, tmp_path: Path) -> None:
    """The file layout of other versions gives the same model, byte for byte; an import replaces an existing model."""
    first, second, other = tmp_path / "first", tmp_path / "second", tmp_path / "folder"
    assert run("import", clip, "-o", first, "--quiet").code == 0
    shutil.copytree(clip, other)
    tensors = load_file(other / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    halves = {"a-1.safetensors": sorted(tensors)[:20], "a-2.safetensors": sorted(tensors)[20:]}
    for file, names in halves.items():
        save_file({name: tensors[name] for name in names}, other / file)
    (other / "model.safetensors").unlink()
    weight_map = {name: file for file, names in halves.items() for name in names}
    (other / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    processor = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").unlink()
    (other / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    model = json.loads((other / "tokenizer.json").read_text())["model"]
    (other / "tokenizer.json").unlink()
    (other / "vocab.json").write_text(json.dumps(model["vocab"]))
    (other / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
    for _ in range(2):  # the second import replaces the model of the first
        assert (done := run("import", other, "-o", second)).code == 0, done.err
    for name in ("model.safetensors", "config.json", "bpe_simple_vocab_16e6.txt.gz"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    receipts = [json.loads((folder / "parity.json").read_text()) for folder in (first, second)]
    assert receipts[0]["model"] == receipts[1]["model"]
    assert receipts[0]["source"] != receipts[1]["source"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "folder", "second"]


def test_another_clip_vocabulary_is_copied(make_clip: Make, run: Any, tmp_path: Path) -> None:
    """A CLIP with a small vocabulary of its own."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(x + "</w>" for x in letters), "do", "dog</w>", "<|startoftext|>", "<|endoftext|>"]
    small = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[("d", "o"), ("do", "g</w>")])
    folder, out = make_clip(text={"vocab_size": 56, "eos_token_id": 55, "bos_token_id": 54}), tmp_path / "model"
    small.save_pretrained(folder)
    assert (done := run("import", folder, "-o", out)).code == 0, done.err
    ours = load_model(out, device="cpu")
    assert ours.config.tokenizer.name == "huggingface" and ours.tokenizer.vocab_size == 56
    assert ours.tokenizer.encode(["A dog"], 8).tolist()[0][:5] == [54, 26, 53, 55, 55]


def test_siglip_with_a_fast_tokenizer(make_siglip: Make, run: Any, tmp_path: Path) -> None:
    """Later SigLIP folders have a tokenizer.json with a padding token of its own."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    ids |= {piece: 259 + i for i, piece in enumerate(["▁", "d", "o", "g", "do", "dog"])}
    backend = Tokenizer(models.BPE(ids, [("d", "o"), ("do", "g")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("▁", "merged_with_previous"), decoders.ByteFallback()
    backend.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    folder, out = make_siglip(text={"vocab_size": 265, "max_position_embeddings": 12}), tmp_path / "model"
    (folder / "spiece.model").unlink()
    fast.save_pretrained(folder)
    assert (done := run("import", folder, "-o", out)).code == 0, done.err
    ours = check(folder, out)
    assert (ours.config.tokenizer.name, ours.tokenizer.pad_id, ours.tokenizer.eot_id) == ("huggingface", 0, 1)


def test_published_sizes_map_to_the_presets_of_the_same_name(tmp_path: Path) -> None:
    """The configs of published folders, which state only what differs from the defaults of transformers."""
    from transformers import CLIPConfig, SiglipConfig

    tokenizer = TOKENIZERS.build(TOKENIZERS.preset("clip_bpe"))
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    wide = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    so400m = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    for name, config, names in (
        ("transformers_clip", CLIPConfig(), ("clip_vit_b32", "clip_text_b", 512)),
        (
            "transformers_clip",
            CLIPConfig(text_config=wide, vision_config={**large, "patch_size": 14}, projection_dim=768),
            ("clip_vit_l14", "clip_text_l", 768),
        ),
        ("transformers_siglip", SiglipConfig(), ("siglip_vit_b16", "siglip_text_b", 768)),
        (
            "transformers_siglip",
            SiglipConfig(text_config=so400m, vision_config={**so400m, "patch_size": 14, "image_size": 224}),
            ("siglip_vit_so400m14", "siglip_text_so400m", 1152),
        ),
    ):
        model_format = FORMATS.build(FORMATS.preset(name))
        assert isinstance(model_format, TransformersFormat)
        config.text_config.vocab_size = 49408
        checked = towers.CheckedConfig(tmp_path, config)
        image, text = model_format.image_fields(checked), model_format.text_fields(checked, tokenizer)
        assert (image["name"], text["name"], model_format.embed_dim(checked)) == names


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_name_table_maps_there_and_back(kind: str, request: pytest.FixtureRequest) -> None:
    """Foreign → ours → foreign is the identity, and our side names every tensor of the model exactly once."""
    foreign = open_foreign_model(request.getfixturevalue(kind))
    assert isinstance(foreign, TransformersModel)
    tree, tokenizer = foreign.model_config()
    config = resolve(ModelConfig, base=tree).value
    table = foreign.format.name_table(config)
    shapes = {**foreign.tensor_shapes()}
    shapes[TOKEN_TABLE] = (tokenizer.vocab_size, shapes[TOKEN_TABLE][1])  # rows beyond the tokenizer's ids are dropped
    original = {name: torch.randn(shape) for name, shape in shapes.items()}
    converted = table.to_ours(original)
    expected = {name: tuple(tensor.shape) for name, tensor in build_model(config, tokenizer).state_dict().items()}
    expected |= dict.fromkeys(("loss.logit_scale", *(["loss.bias"] if kind == "siglip" else [])), (1,))
    assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == expected
    again = table.to_foreign(converted)
    assert again.keys() == original.keys()
    for name, tensor in original.items():
        assert again[name].shape == tensor.shape and torch.equal(again[name], tensor), name
    back = table.to_ours(again)
    assert all(torch.equal(back[name], tensor) for name, tensor in converted.items())


def test_name_table_splits_stacks_and_reshapes() -> None:
    table = NameTable(
        [
            TensorRule(("qkv",), ("q", "k", "v")),
            TensorRule(("a", "bc"), ("abc",), our_parts=(1, 2)),
            TensorRule(("scale",), ("logit_scale",), our_shape=(1,), foreign_shape=()),
        ]
    )
    foreign = {name: torch.randn(2, 3) for name in "qkv"} | {"abc": torch.randn(6, 2), "logit_scale": torch.tensor(3.0)}
    ours = table.to_ours(foreign)
    assert torch.equal(ours["qkv"], torch.cat([foreign[name] for name in "qkv"]))
    assert torch.equal(ours["a"], foreign["abc"][:2]) and torch.equal(ours["bc"], foreign["abc"][2:])
    assert ours["scale"].tolist() == [3.0]
    again = table.to_foreign(ours)
    assert again.keys() == foreign.keys() and again["logit_scale"].shape == ()
    assert all(torch.equal(again[name], tensor) for name, tensor in foreign.items())
    with pytest.raises(AssertionError):
        table.to_ours({**foreign, "extra": torch.zeros(1)})
    with pytest.raises(AssertionError):
        NameTable([TensorRule(("a",), ("b",)), TensorRule(("a",), ("c",))])


def test_formats_are_listed(run: Any) -> None:
    done = run("list", "formats", "--json")
    assert done.code == 0, done.err
    assert {"transformers_clip", "transformers_siglip"} <= {row["name"] for row in json.loads(done.out)["formats"]}


def test_receipt_detects_conversion_errors(
    clip: Path, siglip: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every mistake an importer could make fails the parity check and leaves nothing behind."""
    out, preset = tmp_path / "model", TOKENIZERS.preset
    block_fields, to_ours = towers.CheckedConfig.block_fields, NameTable.to_ours

    def other_eps(self: towers.CheckedConfig, *args: str) -> dict[str, Any]:
        return {**block_fields(self, *args), "ln_eps": 1e-2}

    def swapped_projections(self: NameTable, tensors: Any) -> dict[str, torch.Tensor]:
        rules = [dataclasses.replace(rule, foreign=rule.foreign[::-1]) for rule in self.rules]
        return to_ours(NameTable(rules), tensors)

    def no_bias(self: NameTable, tensors: Any) -> dict[str, torch.Tensor]:
        return {**to_ours(self, tensors), "loss.bias": torch.zeros(1)}

    activations = {**towers.ACTIVATIONS, "gelu_pytorch_tanh": "quick_gelu"}
    for target, name, value, parts in (
        (towers, "ACTIVATIONS", activations, ("images", "texts", "logits")),
        (towers.CheckedConfig, "block_fields", other_eps, ("images", "texts")),
        (NameTable, "to_ours", swapped_projections, ("images", "texts")),
        (NameTable, "to_ours", no_bias, ("logits",)),
        (preprocessing, "RESAMPLE", {3: "bilinear"}, ("pixels differ by", "of 255")),
        (preprocessing, "_fit", lambda *_: "crop", ("pixels differ by", "of 255")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            check_parity_failure(run, siglip, out, *parts)
    with monkeypatch.context() as patch:
        patch.setattr(SigLIPTokenizer, "_text_pieces", lambda self, text: self._pieces.encode(text, out_type=str))
        check_parity_failure(run, siglip, out, "texts", "token ids differ for the text 'Two CATS, running")
    with monkeypatch.context() as patch:
        patch.setattr(TOKENIZERS, "preset", lambda name, **_: preset(name))  # OpenAI's cleaning
        check_parity_failure(run, clip, out, "token ids differ for the text")
    assert not list(tmp_path.iterdir())


def check_parity_failure(run: Any, folder: Path, out: Path, *parts: str) -> None:
    done = run("import", folder, "-o", out)
    assert done.code == 1 and done.error.startswith("error[E_PARITY]: "), done.error
    assert str(folder) in done.error and all(part in done.error for part in parts), done.error


def test_overflowing_embeddings_fail_the_parity_check(siglip: Path, run: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(siglip, tmp_path / "folder")
    tensors = load_file(folder / "model.safetensors")
    tensors["text_model.head.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors")
    done = run("import", folder, "-o", tmp_path / "model")
    assert done.code == 1 and "E_PARITY" in done.error and "texts differ by nan" in done.error
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_imported_model_works_up_to_a_search_hit(siglip: Path, run: Any, tmp_path: Path) -> None:
    """Evaluation, embeddings, index and search on generated images; an image finds itself."""
    pairs, names = tmp_path / "pairs", ("data", "model", "emb", "index")
    data, model, emb, index = (tmp_path / name for name in names)
    pairs.mkdir()
    for number, pixels in enumerate(images()):
        (pairs / f"{number}.png").write_bytes(encode(pixels, "png"))
        (pairs / f"{number}.txt").write_text(f"a photo of number {number}")
    for arguments in (
        ("prep", "folder", f"source.path={pairs}", "runtime.workers=1", "-o", data),
        ("import", siglip, "-o", model),
        ("eval", "retrieval", f"model={model}", f"data={data}"),
        ("embed", f"model={model}", f"data={data}", "-o", emb),
        ("index", "build", "flat", f"embeddings={emb}", "-o", index),
        ("search", index, "text=a photo of two dogs", "k=2"),
    ):
        assert (done := run(*arguments)).code == 0, done.err
    done = run("search", index, f"image={pairs / '2.png'}", "k=1", "--json")
    hit = json.loads(done.out)["hits"][0]
    assert hit["caption"] == "a photo of number 2" and hit["score"] == pytest.approx(1, abs=1e-3)
