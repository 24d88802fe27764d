"""Imports that are not allowed, and what `--help` may load."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "webdataset", "deepspeed", "accelerate", "faiss", "pyarrow", "numpy", "pydantic")


def loaded_by(code: str) -> set[str]:
    """Returns which heavy libraries a fresh interpreter has loaded after `code`."""
    end = f"\nimport sys\nprint('LOADED', *[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + end], capture_output=True, text=True, check=True)
    return set(done.stdout.rsplit("LOADED", 1)[1].split())


def test_help_loads_no_heavy_library() -> None:
    start = "import sys; sys.argv = ['clipwright', '--help']\nfrom clipwright.cli import main\n"
    assert loaded_by(start + "try:\n    main()\nexcept SystemExit:\n    pass") == set()
    assert loaded_by("import clipwright; dir(clipwright)") == set()


def test_help_of_a_verb_loads_only_what_typer_loads() -> None:
    code = """
import sys
from contextlib import suppress
from clipwright.cli import COMMANDS, main
for verb in COMMANDS:
    sys.argv = ["clipwright", *verb.split(), "--help"]
    with suppress(SystemExit):
        main()
"""
    assert loaded_by(code) == {"pydantic"}


@pytest.mark.parametrize("module", ["errors", "registry", "config", "files", "captions", "log", "command"])
def test_core_does_not_import_torch(module: str) -> None:
    assert not loaded_by(f"import clipwright.pipeline.core.{module}") & {"torch", "transformers", "webdataset"}


def test_prep_imports_torch_in_workers_only() -> None:
    assert "torch" not in loaded_by("import clipwright.data_prep.build.pack")


def test_public_api() -> None:
    import clipwright

    for name in clipwright.__all__:
        assert callable(getattr(clipwright, name)), name
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = clipwright.no_such_thing


def test_one_module_imports_deepspeed_and_models_do_not_use_torch_distributed() -> None:
    for path in [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("data_prep/**/*.py"), *ROOT.glob("eval/**/*.py")]:
        text = path.read_text(encoding="utf-8")
        if path.relative_to(ROOT).as_posix() != "pipeline/train/engine.py":
            assert not re.search(r"^\s*(import|from) deepspeed", text, re.M), path
        if path.parent.name in ("towers", "losses", "tokenizers"):
            assert "torch.distributed" not in text.replace("torch.distributed or DeepSpeed", ""), path
