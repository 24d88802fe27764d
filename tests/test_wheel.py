"""The installed wheel: one import name, whatever folders the current directory has."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.xdist_group("wheel")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_wheel_contains_the_package_its_data_and_its_licenses(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"clipwright", f"clipwright-{wheel.name.split('-')[1]}.dist-info"}
    for part in (
        "clipwright/cli.py",
        "clipwright/pipeline/towers/vit.py",
        "clipwright/data_prep/build/pack.py",
        "clipwright/eval/search/query.py",
        "clipwright/configs/demo.yaml",
        "clipwright/configs/train/photos.yaml",
        "clipwright/pipeline/tokenizers/bpe_simple_vocab_16e6.txt.gz",
        "clipwright/eval/prompts/openai.json",
        "clipwright/pipeline/page/page.js",
    ):
        assert part in names
    licenses = [name for name in names if name.endswith(("/LICENSE", "/THIRD-PARTY-NOTICES"))]
    assert len(licenses) == 2


def test_installed_wheel_ignores_folders_of_the_same_names(wheel: Path, tmp_path: Path) -> None:
    """A user's own `eval.py`, `pipeline/` and `data_prep/` must not shadow ours, however the command is started."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = venv / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run(install, check=True)
    inner = next((venv / "lib").glob("python*/site-packages"))
    (inner / "outer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    work = tmp_path / "work"
    for decoy in ("eval.py", "pipeline/__init__.py", "data_prep/__init__.py"):
        (work / decoy).parent.mkdir(parents=True, exist_ok=True)
        (work / decoy).write_text("raise SystemExit('a decoy was imported')\n")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"OMP_NUM_THREADS": "1"}
    torchrun = [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for start in (
        [str(venv / "bin" / "clipwright")],
        [str(python), "-m", "clipwright"],
        [*torchrun, "-m", "clipwright"],
    ):
        for arguments in (["list", "losses", "--json"], ["config", "show", "train", "photos"], ["prep", "--help"]):
            done = subprocess.run([*start, *arguments], cwd=work, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert "decoy" not in done.stdout + done.stderr
    code = "import clipwright.eval.embed, clipwright; print(clipwright.__file__)"
    done = subprocess.run([str(python), "-c", code], cwd=work, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.startswith(str(inner)), (done.stdout, done.stderr)
