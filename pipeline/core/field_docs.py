"""What each field of a config means: the string literal directly below the field, read from the source.

    lr: float = 1e-3
    \"\"\"Peak learning rate.\"\"\"

Python drops these literals at run time, so they are parsed from the file that defines the class.
"""

from __future__ import annotations

import ast
import inspect
import sys
from functools import cache
from pathlib import Path
from typing import Any


def field_docs(config: type[Any]) -> dict[str, str]:
    """Returns field name → description, for the documented fields of a config class and of its bases."""
    docs: dict[str, str] = {}
    for base in reversed(config.__mro__):
        file = getattr(sys.modules.get(base.__module__), "__file__", None)
        if file is not None and base.__module__ not in sys.stdlib_module_names:
            docs.update(_own_docs(Path(file), base.__name__))
    return docs


def _own_docs(file: Path, class_name: str) -> dict[str, str]:
    if class_name not in classes_of(file):
        return {}
    return {field: text for field, text in documented_fields(class_ast(file, class_name)).items() if text}


def class_ast(file: Path, name: str) -> ast.ClassDef:
    return classes_of(file)[name]


@cache
def module_ast(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def classes_of(file: Path) -> dict[str, ast.ClassDef]:
    """Returns all classes of a file by name, nested ones included."""
    return {node.name: node for node in ast.walk(module_ast(file)) if isinstance(node, ast.ClassDef)}


@cache
def imports_of(file: Path) -> dict[str, str]:
    """Returns imported name → module, of the `from MODULE import NAME` at the top of a file."""
    return {
        alias.name: node.module
        for node in module_ast(file).body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }


def documented_fields(node: ast.ClassDef) -> dict[str, str]:
    """Returns the annotated fields of a class body (not ClassVars) in order, each with the literal that follows it."""
    docs: dict[str, str] = {}
    previous: str | None = None
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            is_field = "ClassVar" not in ast.unparse(statement.annotation)
            previous = statement.target.id if is_field else None
            if previous is not None:
                docs[previous] = ""
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and previous is not None:
            docs[previous] = inspect.cleandoc(str(statement.value.value))
            previous = None
        else:
            previous = None
    return docs
