"""`runtime.part`: what of a job one process does, where a job array shares it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from clipwright.pipeline.core.errors import ClipwrightError


@dataclass(frozen=True)
class Part:
    """Which step of a job, and for a share of it the share's number, from 1, of how many."""

    step: Literal["all", "plan", "hash", "share", "finish"]
    number: int = 1
    of: int = 1

    @classmethod
    def read(cls, text: str, *, planned: bool) -> Part:
        """`K/N` or `finish`, where the job is `planned` also `plan` and `plan/K/N`; nothing is all. ValueError."""
        if text in ("", "finish") or (planned and text == "plan"):
            return cls(text or "all")
        match = re.fullmatch(r"(plan/)?(\d{1,6})/(\d{1,6})", text, re.ASCII)
        if match is None or not 1 <= int(match[2]) <= int(match[3]) or (match[1] and not planned):
            raise ValueError(f"{'plan, plan/K/N, ' if planned else ''}K/N with K from 1 to N, or finish")
        return cls("hash" if match[1] else "share", int(match[2]), int(match[3]))

    def check(self, *, fresh: bool) -> None:
        """E_USAGE for a part of a job that would start all over."""
        if fresh and self.step != "all":
            raise ClipwrightError(
                "E_USAGE",
                "a part that would start all over",
                where=f"--fresh with runtime.part={self}",
                found="it would remove what other parts have written",
                fix="give a new folder with -o",
            )

    def __str__(self) -> str:
        told = {"hash": f"plan/{self.number}/{self.of}", "share": f"{self.number}/{self.of}"}
        return told.get(self.step, self.step)

    def share(self, count: int, rank: int = 0, world: int = 1) -> range:
        """Which of `count` things are this share's, or those of one of its ranks: contiguous, and as many as others'.

        Give or take one. The ranks of all shares together are as many equal shares.
        """
        number, of = (self.number - 1) * world + rank, self.of * world
        return range(count * number // of, count * (number + 1) // of)
