"""Checks a command before it is launched: a mistake ends here, not after hours in the queue of a cluster."""

from __future__ import annotations

from collections.abc import Sequence

from clipwright.pipeline.core.command import COMMANDS, Call, load_name
from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.data.batch import RankBatch
from clipwright.pipeline.launch.config import LaunchConfig

INPUT_REFUSED = 3  # exit code of errors about data and models
ONLY_THERE = "; if it exists only where the ranks run, add check=config before the command that is launched"


def check_command(config: LaunchConfig, call: Call, inner: Sequence[str], world: int) -> None:
    """Raises the error with which each of `world` ranks of the command `inner` would end.

    Its command line and config are resolved; with `check=all` its inputs and its output folder are opened too.
    """
    if config.check == "none":
        return
    command, words = COMMANDS[inner[0]], _words(inner)
    if command.verb == "doctor":
        words = [word for word in words if not word.startswith("check=")]
        if not words:
            return  # it checks the machines only
    wrapped = command.call(words, out=call.out, fresh=call.fresh)
    wrapped.check()
    if command.verb != "doctor":
        wrapped.output()
    resolved = wrapped.load()
    if command.verb != "embed" and config.parts is None:
        RankBatch(0, world, resolved.value.schedule.global_batch)
    if config.check == "all" and command.inputs:
        try:
            load_name(command.inputs)(wrapped, resolved)
        except ClipwrightError as error:
            if error.exit_code != INPUT_REFUSED:
                raise
            fields = error.to_dict()
            raise ClipwrightError.from_dict({**fields, "fix": fields["fix"] + ONLY_THERE}) from None


def _words(inner: Sequence[str]) -> list[str]:
    """Returns the arguments and overrides of a command line, without its verb and flags."""
    words: list[str] = []
    for word in inner[1:]:
        if word.startswith("-"):
            break  # `plan.split` puts the flags last
        words.append(word)
    return words
