"""Every config key of every verb has a test that fails when the key is ignored: which file has it, by verb."""

from __future__ import annotations

from pathlib import Path

from config_keys import config_keys

from clipwright.pipeline.core.command import COMMANDS

TESTS = Path(__file__).parent
# Verbs whose keys are tested one by one, in a file with a table of them.
TABLES = {
    "train": "unit/pipeline/train/test_config_keys.py",
    "prep": "unit/data_prep/test_config_keys.py",
    "data index": "unit/data_prep/test_config_keys.py",
    "embed": "unit/eval/test_config_keys.py",
    "eval": "unit/eval/test_config_keys.py",
    "index build": "unit/eval/test_config_keys.py",
    "search": "unit/eval/test_config_keys.py",
    "launch": "unit/pipeline/launch/test_config_keys.py",
}
# The few keys of the other verbs, and the file that tests each.
OTHERS = {
    "data ledger": {
        "unit/pipeline/train/test_sample_log.py": {"run", "step", "train"},
        "unit/pipeline/train/test_mixtures.py": {"train[].path", "train[].weight"},
    },
    "data stats": {"unit/data_prep/inspect/test_stats.py": {"data"}},
    "data view": {"unit/data_prep/inspect/test_view.py": {"data", "kept", "rejected", "seed"}},
    "demo": {"test_end_to_end.py": {"seed", "steps"}},
    "export": {
        "unit/pipeline/train/test_state_checks.py": {"run", "step"},
        "unit/pipeline/train/test_train_errors.py": {"to"},
    },
    "import": {"unit/pipeline/interop/test_import.py": {"folder"}},
    "list": {"unit/pipeline/towers/test_list.py": {"image_size"}, "unit/pipeline/core/test_hints.py": {"what"}},
}


def test_every_key_of_every_verb_is_tested() -> None:
    verbs = {verb for verb in COMMANDS if config_keys(verb)}
    assert verbs == {*TABLES, *OTHERS}
    for verb, file in TABLES.items():
        assert f'"{verb}"' in (TESTS / file).read_text(encoding="utf-8"), f"{file} does not test {verb}"
    for verb, files in OTHERS.items():
        assert config_keys(verb) == set().union(*files.values()), verb
        for file, keys in files.items():
            text = (TESTS / file).read_text(encoding="utf-8")
            assert [key for key in keys if key.rpartition(".")[2].rpartition("]")[2] not in text] == [], file
