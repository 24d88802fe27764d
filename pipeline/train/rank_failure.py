"""Failures of one rank that leave time to save: they are kept until all ranks agree on them, between two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.system_errors import system_error
from clipwright.pipeline.distributed.group import World, all_gather_object


class RankFailure:
    """The failure of this rank that the others do not know yet, if there is one."""

    def __init__(self, world: World, save: Callable[..., None]) -> None:
        """save: `save(wait=True)` saves the run at its current step, on all ranks."""
        self.world, self._save = world, save
        self.error: ClipwrightError | None = None

    @property
    def pending(self) -> bool:
        """Whether this rank has a failure: the ranks must combine this before they act on it."""
        return self.error is not None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Keeps an error of the operating system or a coded error that the block raises; the first one counts."""
        try:
            yield
        except ClipwrightError as error:
            self.error = self.error or error
        except OSError as error:
            self.error = self.error or system_error(error, self.world.rank)

    def end_if(self, failed: bool) -> None:
        """Saves, then raises the first failure of any rank; every rank must call it, with an equal `failed`."""
        if not failed:
            return
        error = next(error for error in all_gather_object(self.error) if error is not None)
        try:
            self._save(wait=True)
        except ClipwrightError as unsaved:
            raise with_note(error, f"and this step could not be saved: {unsaved.found or unsaved.what}") from None
        raise with_note(error, "this step is saved")


def with_note(error: ClipwrightError, note: str) -> ClipwrightError:
    """Returns the error with a further finding."""
    found = f"{error.found}; {note}" if error.found else note
    return ClipwrightError(error.code, error.what, where=error.where, found=found, fix=error.fix)
