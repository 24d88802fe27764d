"""`runtime.part`: which part of a job this process does, if a job array splits the job."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from clipwright.pipeline.core.errors import ClipwrightError


@dataclass(frozen=True)
class Part:
    """A step of a job and, for a step that is split, the number of the part (from 1) and the number of parts."""

    step: Literal["all", "plan", "hash", "share", "finish"]
    number: int = 1
    of: int = 1

    @classmethod
    def read(cls, text: str, *, planned: bool) -> Part:
        """Parses `K/N`, `finish` or nothing (the complete job); if the job is `planned`, also `plan` and `plan/K/N`.

        Raises ValueError for anything else.
        """
        if text == "":
            return cls("all")
        if text == "finish":
            return cls("finish")
        if text == "plan" and planned:
            return cls("plan")
        match = re.fullmatch(r"(plan/)?(\d{1,6})/(\d{1,6})", text, re.ASCII)
        if match is None or not 1 <= int(match[2]) <= int(match[3]) or (match[1] and not planned):
            raise ValueError(f"{'plan, plan/K/N, ' if planned else ''}K/N with K from 1 to N, or finish")
        return cls("hash" if match[1] else "share", int(match[2]), int(match[3]))

    def check(self, *, fresh: bool) -> None:
        """Raises E_USAGE if a part of a job is asked to start over."""
        if fresh and self.step != "all":
            raise ClipwrightError(
                "E_USAGE",
                "a part of a job cannot start over",
                where=f"--fresh with runtime.part={self}",
                found="it would remove the output of the other parts",
                fix="leave out --fresh, or give a new folder with -o",
            )

    def __str__(self) -> str:
        if self.step == "hash":
            return f"plan/{self.number}/{self.of}"
        if self.step == "share":
            return f"{self.number}/{self.of}"
        return self.step

    def share(self, count: int, rank: int = 0, world: int = 1) -> range:
        """Returns which of `count` items this part does, or one rank of it: contiguous ranges of equal length (±1).

        The ranks of all parts together split the items into `of` × `world` ranges.
        """
        number, of = (self.number - 1) * world + rank, self.of * world
        return range(count * number // of, count * (number + 1) // of)
