"""Checks the shapes in jaxtyping annotations with beartype, in the test process only.

tests/conftest.py installs the import hook before anything imports the checked packages. Commands that tests run, forked
or as subprocesses, are not checked: there the annotations cost nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping
from beartype import BeartypeConf, beartype

CHECKED_PACKAGES = [f"clipwright.pipeline.{name}" for name in ("towers", "tokenizers", "losses", "model")]

check_types = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a valid float


def install_shape_checks() -> None:
    """Makes every function and dataclass of the checked packages raise jaxtyping.TypeCheckError for a wrong shape."""
    imported = [name for name in sys.modules if name.startswith(tuple(CHECKED_PACKAGES))]
    assert not imported, f"imported before the hook was installed: {imported}"
    jaxtyping.install_import_hook(CHECKED_PACKAGES, f"{__name__}.check_types")


@contextmanager
def no_shape_checks() -> Iterator[None]:
    """Turns the checks off; torch.compile cannot trace them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
