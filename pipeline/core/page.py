"""Self-contained web pages: one style, no script, no network, all text escaped."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2

# First bytes → media type of the formats that browsers can show; images of other formats are re-encoded first.
_MEDIA_TYPES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"RIFF": "image/webp", b"GIF8": "image/gif"}


def render(template: Path, **values: Any) -> str:
    """Renders a template that extends `page.html`, which needs `title` and `lead`.

    Captions and file names are untrusted: autoescape is on, and the page's content policy blocks scripts and requests.
    """
    loader = jinja2.FileSystemLoader([Path(__file__).parent, template.parent])
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["data_url"] = data_url
    return environment.get_template(template.name).render(**values)


def data_url(data: bytes) -> str:
    """Returns an image file as a `data:` URL."""
    media_type = next((name for start, name in _MEDIA_TYPES.items() if data.startswith(start)), None)
    assert media_type is not None, data[:8]
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
