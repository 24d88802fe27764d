"""Self-contained web pages: one look, no script, no network, every text escaped."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2

# What a browser may be handed as it is; anything else is re-encoded first.
_TYPES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png", b"RIFF": "image/webp", b"GIF8": "image/gif"}


def render(template: Path, **values: Any) -> str:
    """The page that `template` makes; it extends `page.html`, which needs `title` and `lead`.

    Captions and file names are data: autoescape is on, and the page's content policy lets nothing run or load.
    """
    loader = jinja2.FileSystemLoader([Path(__file__).parent, template.parent])
    made = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    made.filters |= {"picture": picture}
    return made.get_template(template.name).render(**values)


def picture(data: bytes) -> str:
    """An image file as a `data:` address."""
    kind = next((kind for start, kind in _TYPES.items() if data.startswith(start)), None)
    assert kind is not None, data[:8]
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
