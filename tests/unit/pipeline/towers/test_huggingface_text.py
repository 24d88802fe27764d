"""Text encoders of transformers from a folder: outputs, pooling, weights, and models that do not need the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.towers.base import TEXT_TOWERS, parameter_count
from clipwright.pipeline.towers.checkpointing import checkpoint_activations
from clipwright.pipeline.towers.huggingface_encoder import read_architecture
from clipwright.pipeline.towers.huggingface_text import HuggingFaceText

ranks = pytest.mark.xdist_group("ranks")

VOCAB, EOT, PAD = 60, 3, 1
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": VOCAB,
}


def pretraining_model(kind: str) -> Any:
    """Returns a random pretraining model, task heads included."""
    import transformers as hf

    torch.manual_seed(0)
    positions = {"max_position_embeddings": 20}
    if kind == "bert":
        return hf.BertForPreTraining(hf.BertConfig(**SIZES, **positions)).eval()
    if kind == "roberta":  # its positions start after the padding id
        return hf.RobertaForMaskedLM(hf.RobertaConfig(**SIZES, max_position_embeddings=22, pad_token_id=PAD)).eval()
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": VOCAB}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes)).eval()


def base_of(model: Any) -> Any:
    return model.encoder if hasattr(model, "encoder") else getattr(model, model.base_model_prefix)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    for kind in ("bert", "roberta", "t5"):
        pretraining_model(kind).save_pretrained(root / kind)
    return {kind: root / kind for kind in ("bert", "roberta", "t5")}


def build(folder: Path | None, vocab_size: int = VOCAB, eot_id: int = EOT, **fields: Any) -> HuggingFaceText:
    torch.manual_seed(1)
    config = TEXT_TOWERS.preset("huggingface", folder=str(folder) if folder else None, **{"context": 20, **fields})
    tower = TEXT_TOWERS.build(config, vocab_size=vocab_size, eot_id=eot_id)
    assert isinstance(tower, HuggingFaceText)
    return tower.eval()


def captions(ends: list[int], length: int = 20) -> torch.Tensor:
    torch.manual_seed(2)
    ids = torch.randint(4, VOCAB, (len(ends), length))
    for row, end in enumerate(ends):
        ids[row, end], ids[row, end + 1 :] = EOT, PAD
    return ids


def rejection(code: str, *args: Any, **fields: Any) -> ClipwrightError:
    with pytest.raises(ClipwrightError) as caught:
        build(*args, **fields)
    assert caught.value.code == code and caught.value.fix, caught.value
    return caught.value


@pytest.mark.parametrize("kind", ["bert", "roberta", "t5"])
def test_tower_matches_transformers(kind: str, folders: dict[str, Path]) -> None:
    """The reference runs one caption at a time, trimmed to its end, so that it needs no mask."""
    ids, ends, model = captions([4, 9, 19]), [4, 9, 19], base_of(pretraining_model(kind))
    expected = [model(input_ids=row[None, : end + 1]).last_hidden_state[0] for row, end in zip(ids, ends, strict=True)]
    pooled = {
        "mean": torch.stack([x.mean(dim=0) for x in expected]),
        "cls": torch.stack([x[0] for x in expected]),
        "eot": torch.stack([x[-1] for x in expected]),
    }
    for pool, expected_pooled in pooled.items():
        tower = build(folders[kind], pretrained=True, pool=pool)
        out = tower(ids)
        torch.testing.assert_close(out.pooled, expected_pooled, atol=2e-6, rtol=1e-5)
        assert (tower(ids[:2, :16]).pooled - out.pooled[:2]).abs().max() <= 3e-6  # trimmed
        noisy = ids.clone()
        noisy[0, 6:], noisy[0, 7] = 17, EOT
        if kind != "roberta":  # its positions depend on the padding id
            assert (tower(noisy).pooled - out.pooled).abs().max() <= 1e-6
    assert out.tokens.shape == (3, 20, tower.feature_dim) and tower.feature_dim == tower.token_dim == 16
    assert out.mask is not None and out.mask.sum(dim=1).tolist() == [5, 10, 20] and out.grid is None
    assert not torch.equal(build(folders[kind])(ids).pooled, out.pooled)  # random without `pretrained`


@pytest.mark.parametrize("mistake", ["no mask", "last instead of eot", "other weights"])
def test_comparison_detects_mistakes(mistake: str, folders: dict[str, Path]) -> None:
    ids = captions([4, 9])
    right = build(folders["bert"], pretrained=True, pool="eot")(ids).pooled
    tower = build(folders["bert"], pretrained=mistake != "other weights", pool="eot")
    if mistake == "no mask":
        unmasked = tower.encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        wrong = unmasked[torch.arange(2), torch.tensor([4, 9])]
    else:
        ids = ids.masked_fill(ids == EOT, 5) if mistake == "last instead of eot" else ids
        wrong = tower(ids).pooled
    assert (wrong - right).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["bert", "roberta", "t5"])
def test_every_parameter_receives_gradient(kind: str, folders: dict[str, Path]) -> None:
    tower = build(folders[kind])
    out = tower(captions([4, 9, 19]))
    (out.pooled * torch.linspace(-1, 1, 16)).sum().backward()
    assert not [name for name, p in tower.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert parameter_count(tower) == sum(t.numel() for t in tower.state_dict().values())  # nothing is stored twice
    places = [t.data_ptr() for t in tower.state_dict().values()]
    assert len(set(places)) == len(places)
    free = {name for name, p in tower.named_parameters() if p.ndim == 2 and name.endswith(tower.no_weight_decay)}
    assert len(free) == 1


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_layers_recompute(kind: str, folders: dict[str, Path]) -> None:
    ids, grads = captions([4, 19, 9]), []
    for blocks in ("none", "all"):
        tower = build(folders[kind]).train()  # with dropout as in config.json
        assert len(tower.block_list()) == 2
        checkpoint_activations(tower, blocks, "blocks")
        torch.manual_seed(3)
        tower(ids).pooled.square().sum().backward()
        grads.append({name: p.grad for name, p in tower.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_stored_fields_replace_the_folder(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(folders[kind], tmp_path / "source")
    config = TEXT_TOWERS.preset("huggingface", folder=str(source), pretrained=True)
    fields = json.loads(json.dumps(config.resolved_fields({})))
    assert str(tmp_path) not in json.dumps(fields) and len(fields["weights"]) == 64
    here, there = build(source, pretrained=True), build(None, **fields)
    there.load_state_dict(here.state_dict(), strict=True)
    ids = captions([4, 9])
    assert torch.equal(here(ids).pooled, there(ids).pooled)
    plain = TEXT_TOWERS.preset("huggingface", folder=str(source))
    first = plain.resolved_fields({})
    assert first == {"architecture": fields["architecture"], "weights": None}
    shutil.rmtree(source)
    assert plain.resolved_fields(first) == first  # a run resumes without the folder unless it needs pretrained weights
    with pytest.raises(ClipwrightError):
        config.resolved_fields(fields)


def test_architecture_has_defaults_but_no_references_to_code(folders: dict[str, Path], tmp_path: Path) -> None:
    tree = json.loads((folders["bert"] / "config.json").read_text())
    small = {key: tree[key] for key in ("model_type", *SIZES)}
    hostile = {**small, "_name_or_path": "/secret", "auto_map": {"AutoModel": "evil.py"}, "attn_implementation": "a/b"}
    (tmp_path / "config.json").write_text(json.dumps({**hostile, "_attn_implementation": "someone/kernel"}))
    architecture = read_architecture(tmp_path)
    assert architecture["layer_norm_eps"] == 1e-12 and architecture["hidden_size"] == 16
    assert not [key for key in architecture if key.startswith("_") or key in ("auto_map", "attn_implementation")]
    assert build(None, architecture=hostile)(captions([4])).pooled.shape == (1, 16)


def test_vocabulary_and_context_are_checked(folders: dict[str, Path]) -> None:
    error = rejection("E_CONFIG_VALUE", folders["bert"], vocab_size=61)
    assert "the tokenizer has 61 ids" in error.found and "the text encoder 60 embeddings" in error.found
    assert str(folders["bert"]) in error.where and "tokenizer.name=huggingface" in error.fix
    for kind in ("bert", "roberta"):
        error = rejection("E_CONFIG_VALUE", folders[kind], context=21)
        assert error.where == "text.context=21" and error.fix == "set text.context=20 or less"
    build(folders["t5"], context=64)(captions([50], 64))  # relative positions are unlimited


def test_folder_is_required() -> None:
    assert "text.folder=DIR" in rejection("E_CONFIG_VALUE", None).fix


@pytest.mark.parametrize("defect", ["absent", "noise", "list", "unknown", "image", "impossible"])
def test_folder_without_a_text_encoder_is_rejected(defect: str, folders: dict[str, Path], tmp_path: Path) -> None:
    tree = json.loads((folders["bert"] / "config.json").read_text())
    changed = {
        "noise": "\0{",
        "list": "[]",
        "unknown": json.dumps({**tree, "model_type": "nothing"}),
        "image": json.dumps({"model_type": "vit", "hidden_size": 16, "num_attention_heads": 2}),
        "impossible": json.dumps({**tree, "num_attention_heads": 7}),
    }
    if defect != "absent":
        (tmp_path / "config.json").write_text(changed[defect])
    code = "E_CONFIG_VALUE" if defect in ("unknown", "image", "impossible") else "E_INPUT"
    assert str(tmp_path) in rejection(code, tmp_path).where


@pytest.mark.parametrize("defect", ["pickle", "none", "missing", "renamed", "shape", "nan", "cut"])
def test_invalid_weights_are_rejected(defect: str, folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = shutil.copytree(folders["bert"], tmp_path / "source")
    file, key = source / "model.safetensors", "bert.encoder.layer.1.output.dense.weight"
    weights = load_file(file)
    if defect in ("pickle", "none"):
        file.unlink()
        if defect == "pickle":
            torch.save(weights, source / "pytorch_model.bin")
    elif defect == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    else:
        value = weights.pop(key)
        if defect == "renamed":
            weights[key.replace("dense", "danse")] = value
        elif defect == "shape":
            weights[key] = value[:, :-1].contiguous()
        elif defect == "nan":
            weights[key] = torch.full_like(value, float("nan"))
        save_file(weights, file, {"format": "pt"})
    error = rejection("E_INPUT" if defect in ("pickle", "none") else "E_MODEL_SHAPE", source, pretrained=True)
    assert error.where == str(source)
    if defect == "pickle":
        assert "pytorch_model.bin, a pickle" in error.found
    if defect in ("missing", "renamed", "shape", "nan"):
        assert "encoder.layer.1.output.dense.weight" in error.found
    if defect == "shape":
        assert "has shape (16, 23), the config expects (16, 24)" in error.found
    build(source)  # random weights need no file


def test_changed_weights_are_rejected(folders: dict[str, Path]) -> None:
    error = rejection("E_INPUT", folders["bert"], pretrained=True, weights="0" * 64)
    assert "the pretrained weights changed after the run started" in error.what and "--fresh" in error.fix


def test_sharded_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    pretraining_model("bert").save_pretrained(tmp_path / "many", max_shard_size="8KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    ids = captions([4, 9])
    single, sharded = (build(folder, pretrained=True)(ids).pooled for folder in (folders["bert"], tmp_path / "many"))
    assert torch.equal(single, sharded)


def bert_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "red", "green", "circle", "square"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))


@ranks
def test_exported_model_does_not_need_the_encoder_folder(
    scenes: Path, folders: dict[str, Path], tmp_path: Path, small: Any, here: Any
) -> None:
    """Trains a pretrained encoder with its own tokenizer; the model opens after the encoder's folder is deleted."""
    from clipwright import load_model

    source = shutil.copytree(folders["bert"], tmp_path / "bert")
    bert_tokenizer(source)
    cli = small.cli(tmp_path)
    settings = [setting for setting in small.settings if not setting.startswith("text.")]
    arguments = [
        "train",
        *settings,
        f"data.train={scenes}",
        "schedule.samples=32",
        "-o",
        "run",
        "text.name=huggingface",
    ]
    arguments += [f"text.folder={source}", "text.context=20", "text.pretrained=true"]
    line = here(tmp_path, *arguments, code=2).error
    assert (
        line.startswith("error[E_CONFIG_VALUE]")
        and "the tokenizer has 49,408 ids" in line
        and "the text encoder 60 embeddings" in line
    )
    cli(*arguments, "tokenizer.name=huggingface", f"tokenizer.folder={source}")
    here(tmp_path, "export", "run", "-o", "model")
    shutil.rmtree(source)
    tree = json.loads((tmp_path / "model" / "config.json").read_text())
    assert tree["text"]["architecture"]["model_type"] == "bert" and str(tmp_path) not in json.dumps(tree)
    model = load_model(tmp_path / "model")
    embeddings = model.embed_texts(["a red circle", "a photo of a green square", "a red circle"])
    torch.testing.assert_close(embeddings[0], embeddings[2])
    assert (embeddings[0] - embeddings[1]).abs().max() > 1e-3
