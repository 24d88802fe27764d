"""Model folders as `save_pretrained` of transformers writes them, with random weights; `clipwright` in-process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from output_checks import check_output

from clipwright.pipeline.tokenizers import clip_bpe

TEXT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 52}
VISION = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 71}
CAPTIONS = (
    "a photo of two dogs in the snow",
    "the red cat running on a beach",
    "its car at the house, 3 of 5 doors open",
    "한국어 문장 그리고 눈 속의 개",
    "猫と犬 日本語",
    "un été naïf à la plage",
    "“quoted” & 100% sure",
)


@pytest.fixture(scope="session")
def clip_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a CLIPTokenizer with CLIP's vocabulary."""
    from transformers import CLIPTokenizer

    path = Path(clip_bpe.__file__).parent / clip_bpe.VOCABULARY
    merges = clip_bpe.parse_merges(path, clip_bpe.read_vocabulary(path)[1])
    vocabulary = {token: i for i, token in enumerate(clip_bpe.token_list(merges))}
    folder = tmp_path_factory.mktemp("clip-tokenizer")
    CLIPTokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with SigLIP's special pieces."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("spiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 50),
        model_prefix=str(folder / "spiece"),
        vocab_size=120,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return folder / "spiece.model"


def save(model: Any, folder: Path, *, seed: int, dtype: torch.dtype) -> None:
    """Saves random weights that are large enough for every part of the model to affect its output."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.15 * torch.randn_like(parameter) if parameter.ndim else 0.1
            assert torch.isfinite(parameter).all(), name
    model.to(dtype).save_pretrained(folder)


@pytest.fixture(scope="session")
def make_clip(tmp_path_factory: pytest.TempPathFactory, clip_tokenizer: Path) -> Callable[..., Path]:
    """`make(text={…}, vision={…}, processor={…}, dtype=…)`: a CLIPModel folder."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    def make(
        text: Any = None, vision: Any = None, processor: Any = None, dtype: torch.dtype = torch.float32, dim: int = 20
    ) -> Path:
        folder = tmp_path_factory.mktemp("clip")
        side = (vision or {}).get("image_size", 40)
        config = CLIPConfig(
            text_config={**TEXT, **(text or {})},
            vision_config={**VISION, "image_size": side, "patch_size": 8, **(vision or {})},
            projection_dim=dim,
        )
        save(CLIPModel(config), folder, seed=1, dtype=dtype)
        CLIPImageProcessorPil(
            **{"size": {"shortest_edge": side}, "crop_size": side, **(processor or {})}
        ).save_pretrained(folder)
        shutil.copytree(clip_tokenizer, folder, dirs_exist_ok=True)
        return folder

    return make


@pytest.fixture(scope="session")
def make_siglip(tmp_path_factory: pytest.TempPathFactory, spiece: Path) -> Callable[..., Path]:
    """`make(text={…}, vision={…}, processor={…}, dtype=…, tokenizer={…})`: a SiglipModel folder."""
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel, SiglipTokenizer

    def make(
        text: Any = None,
        vision: Any = None,
        processor: Any = None,
        dtype: torch.dtype = torch.float32,
        tokenizer: Any = None,
    ) -> Path:
        folder = tmp_path_factory.mktemp("siglip")
        side = (vision or {}).get("image_size", 40)
        siglip_tokenizer = SiglipTokenizer(str(spiece), **{"model_max_length": 64, **(tokenizer or {})})
        config = SiglipConfig(
            text_config={**TEXT, "projection_size": 36, "vocab_size": len(siglip_tokenizer), **(text or {})},
            vision_config={**VISION, "image_size": side, "patch_size": 8, **(vision or {})},
        )
        save(SiglipModel(config), folder, seed=2, dtype=dtype)
        SiglipImageProcessorPil(**{"size": {"height": side, "width": side}, **(processor or {})}).save_pretrained(
            folder
        )
        siglip_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def clip(make_clip: Callable[..., Path]) -> Path:
    return make_clip()


@pytest.fixture(scope="session")
def siglip(make_siglip: Callable[..., Path]) -> Path:
    return make_siglip()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """`clipwright ARGUMENTS` in this process, which has torch loaded, without network access."""
    from clipwright.cli import app

    def refuse(*_: object) -> None:
        raise AssertionError("network access")

    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")

    def call(*arguments: object) -> SimpleNamespace:
        capfd.readouterr()
        code = app(list(map(str, arguments)), standalone_mode=False)
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err, printed.err
        check_output(list(map(str, arguments)), code, printed.out, printed.err)
        last = (printed.err.strip().splitlines() or [""])[-1]
        return SimpleNamespace(code=code, out=printed.out, err=printed.err, error=last if code else "")

    return call
