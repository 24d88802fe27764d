"""The document of every page: one style, one script, no network, all text escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from clipwright.pipeline.core.messages import format_count

FOLDER = Path(__file__).parent
# First bytes → media type of the formats that browsers can show; images of other formats are re-encoded first.
_MEDIA_TYPES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"RIFF": "image/webp", b"GIF8": "image/gif"}


def render(template: Path, *, sections: Sequence[tuple[str, str]] = (), **values: Any) -> str:
    """Renders a template that extends `page.html`, which needs `title` and `lead`.

    sections: anchor and title of each section that the table of contents lists. Captions and file names are untrusted:
    autoescape is on, and the page's content policy blocks requests and every script but `page.js`.
    """
    loader = jinja2.FileSystemLoader([template.parent, FOLDER])
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["data_url"] = data_url
    environment.filters["count"] = format_count  # instead of the built-in `count`, an alias of `length`
    environment.globals["percent"] = percent
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    parts = {
        "style": Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return environment.get_template(template.name).render(sections=sections, **parts, **values)


def data_url(data: bytes) -> str:
    """Returns an image file as a `data:` URL."""
    media_type = next((name for start, name in _MEDIA_TYPES.items() if data.startswith(start)), None)
    assert media_type is not None, data[:8]
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def percent(share: float) -> str:
    """Formats a share in whole percent, with one decimal near 0 and 1; the space before the sign does not break."""
    decimals = 0 if 0.1 <= share <= 0.99 or share in (0, 1) else 1
    return f"{100 * share:.{decimals}f}\N{NO-BREAK SPACE}%"
