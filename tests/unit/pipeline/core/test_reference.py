"""The reference of config keys: complete, and docs/configs.md is current."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

import clipwright.cli  # noqa: F401  registers the verbs
from clipwright.pipeline.core.command import COMMANDS
from clipwright.pipeline.core.reference import missing_docs
from clipwright.pipeline.core.type_text import type_text

DOCS = Path(__file__).resolve().parents[4] / "docs" / "configs.md"


def test_the_committed_reference_is_current(cli: Any) -> None:
    """If this fails: clipwright config reference > docs/configs.md."""
    assert cli("config", "reference").stdout == DOCS.read_text(encoding="utf-8")


def test_every_config_field_has_a_description() -> None:
    # Other tests may have loaded plugins in this process: only the fields of the package itself are checked.
    missing = [field for field in missing_docs(COMMANDS) if field.startswith("clipwright.")]
    assert not missing, "no description below: " + ", ".join(missing)


def test_the_reference_covers_every_verb_section_and_family(cli: Any) -> None:
    text = cli("config", "reference").stdout
    for heading in ("## train", "## prep", "## index build", "### optim", "### image", "#### image, family vit"):
        assert f"\n{heading}\n" in text, heading
    assert "\nThe same keys as [train](#train).\n" in text.partition("\n## doctor\n")[2]


def test_types_are_written_in_words() -> None:
    assert type_text(Annotated[int, Field(ge=1)]) == "integer ≥ 1"
    assert type_text(Literal["gather", "ring"]) == "one of `gather`, `ring`"
    assert type_text(float | None) == "number or null"
    assert type_text(tuple[int, int, int]) == "list of 3: integer"
    assert type_text(dict[str, list[str]]) == "mapping of text to list of text"
    assert type_text(Annotated[str, Field(pattern="^a$")]) == "text matching `^a$`"
