"""JSON files that are one value: an array of objects, an object with a list of objects, or COCO annotations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clipwright.data_prep.sources.tables.base import unreadable
from clipwright.pipeline.core.messages import format_count
from clipwright.pipeline.core.text import listed, shown

_SPACE = re.compile(r"[\s,]*")
_LINE_BREAKS = str.maketrans("\r\n", "  ")  # between values; inside JSON text they are escaped
Parse = Callable[[str], Any]


def document_rows(path: Path, text: str, parse: Parse) -> tuple[Iterator[str], list[str]]:
    """Returns the rows of a document, each as one line of JSON, and notes. Raises E_TABLE."""
    if text.lstrip().startswith("["):
        return _array_items(path, text, parse), []
    try:
        document = parse(text)
    except (ValueError, RecursionError) as error:
        raise unreadable(path, str(error), "check the file", "the file is not JSON") from None
    if not isinstance(document, dict):
        raise _unknown(path, f"it is a {type(document).__name__}")
    if _is_list_of_objects(document.get("images")) and isinstance(document.get("annotations"), list):
        return _coco_rows(path, document)
    lists = [name for name, value in document.items() if _is_list_of_objects(value)]
    if len(lists) != 1:
        raise _unknown(path, f"an object with the keys {listed(list(document))}")
    note = f"{path.name}: the rows are the objects of its list {shown(lists[0])}"
    return (json.dumps(item) for item in document[lists[0]] if isinstance(item, dict)), [note]


def _array_items(path: Path, text: str, parse: Parse) -> Iterator[str]:
    """Yields the objects of an array as the file writes them."""
    decoder = json.JSONDecoder()
    position = text.index("[") + 1
    number = 0
    while True:
        position = _match_end(_SPACE, text, position)
        if text.startswith("]", position):
            break
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            line = text.count("\n", 0, position) + 1
            where = f"{path}, line {line}, item {number} of the array"
            raise unreadable(where, str(error), "check the file", "the file is not JSON") from None
        if not isinstance(value, dict):
            raise unreadable(
                f"{path}, item {number} of the array",
                f"a {type(value).__name__}: {shown(text[position:end], 80)}",
                'write an array of objects, such as [{"image": "a.jpg", "caption": "a cat"}]',
                "an item of the array is not an object",
            )
        yield text[position:end].translate(_LINE_BREAKS)
        position = end
        number += 1
    rest = text[position + 1 :].strip()
    if rest:
        raise unreadable(path, f"text after the array: {shown(rest, 80)}", "check it", "the file is not JSON")


def _coco_rows(path: Path, document: dict[str, Any]) -> tuple[Iterator[str], list[str]]:
    """Returns one row per image: its fields, `image` for its file name, and the texts of its annotations as lists."""
    by_image: dict[Any, list[dict[str, Any]]] = {}
    for annotation in document["annotations"]:
        if isinstance(annotation, dict):
            by_image.setdefault(annotation.get("image_id"), []).append(annotation)
    images = [image for image in document["images"] if isinstance(image, dict)]
    text_keys = list(
        {
            name: None
            for annotations in by_image.values()
            for annotation in annotations
            for name, value in annotation.items()
            if isinstance(value, str)
        }
    )
    if not text_keys:
        raise unreadable(
            path,
            f"the annotations hold {listed(list(document['annotations'][0]) if document['annotations'] else [])}",
            "use a file with captions, such as captions_val2017.json",
            "the annotations have no captions",
        )
    notes: list[str] = []
    unknown = len(by_image.keys() - {image.get("id") for image in images})
    if unknown:
        notes.append(f"{path.name}: annotations of {format_count(unknown, 'image')} that the file does not list")

    def rows() -> Iterator[str]:
        for image in images:
            row = {"image": image.get("file_name"), **image}
            for name in text_keys:
                texts = [item[name] for item in by_image.get(image.get("id"), []) if isinstance(item.get(name), str)]
                row.setdefault(name, texts)
            yield json.dumps(row)

    return rows(), notes


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _match_end(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    assert match is not None
    return match.end()


def _unknown(path: Path, found: str) -> Exception:
    return unreadable(
        path,
        found,
        "give an array of objects, one object per line, or COCO annotations (images, annotations)",
        "the JSON file does not hold rows",
    )
