"""Reads hostfiles: one machine per line, with the number of ranks on it."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.core.text import shorten

HOSTFILE_LINE = "`[USER@]HOST[:SSH_PORT] slots=NUMBER`"
LOCAL_ADDRESSES = ("localhost", "127.0.0.1", "::1")
MAX_ECHO = 200  # characters of a line that an error shows
_LINE = re.compile(r"(?:(?P<user>[\w][\w.-]*)@)?(?P<place>[\w.:%\[\]-]+)\s+slots=(?P<slots>[1-9]\d{0,5})", re.ASCII)
_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Host:
    """A line of a hostfile. `user` and `ssh_port` are for ssh only: the other hosts connect to `address`."""

    address: str
    slots: int
    user: str = ""
    ssh_port: int | None = None

    @property
    def is_local(self) -> bool:
        """Whether its ranks are started without ssh."""
        return self.address in LOCAL_ADDRESSES and not self.user and self.ssh_port is None

    @property
    def ssh_arguments(self) -> list[str]:
        """The arguments of ssh that name the host."""
        port = [] if self.ssh_port is None else ["-p", str(self.ssh_port)]
        return [*port, f"{self.user}@{self.address}" if self.user else self.address]


def read_hostfile(path: Path) -> list[Host]:
    """Returns the hosts in order. Raises E_HOSTFILE, which names a line that is malformed or lists a host again.

    DeepSpeed runs on this machine alone if the file is missing; we do not.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        found = "the file does not exist" if isinstance(error, FileNotFoundError) else str(error)
        raise hostfile_error(path, "the hostfile cannot be read", found, "check hostfile=FILE") from None
    hosts: dict[str, Host] = {}
    for number, text in enumerate(lines, 1):
        line = text.partition("#")[0].strip()
        if not line:
            continue
        host = _parse(line)
        if host is None:
            found = shorten(repr(line), MAX_ECHO)
            raise hostfile_error(f"{path}:{number}", "the line is malformed", found, f"write {HOSTFILE_LINE}")
        name = host.address.lower()  # DNS ignores case; ssh's config does not, so the address stays as written
        if name in hosts:
            what = f"{host.address} is listed on an earlier line"
            raise hostfile_error(f"{path}:{number}", what, "", "give it all its slots on one line")
        hosts[name] = host
    if not hosts:
        raise hostfile_error(path, "the hostfile lists no host", "", f"write lines {HOSTFILE_LINE}")
    return list(hosts.values())


def _parse(line: str) -> Host | None:
    """Returns the host of a line, or None if it is malformed. An IPv6 address with a port is in brackets."""
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    place, port = match["place"], None
    bracketed = re.fullmatch(r"\[([^\[\]]+)\](?::(\d{1,5}))?", place)
    named = re.fullmatch(r"([^:\[\]]+):(\d{1,5})", place)
    if bracketed is not None or named is not None:
        place, port = (bracketed or named).groups()  # pyright: ignore[reportOptionalMemberAccess]
    if ":" in place or bracketed is not None:
        try:
            ipaddress.IPv6Address(place)  # with or without a zone, such as %eth0
        except ValueError:
            return None
    elif _NAME.fullmatch(place) is None:
        return None
    if port is not None and not 1 <= int(port) <= 65535:
        return None
    return Host(place, int(match["slots"]), match["user"] or "", None if port is None else int(port))


def hostfile_error(where: object, what: str, found: str, fix: str) -> ClipwrightError:
    """Returns E_HOSTFILE."""
    return ClipwrightError("E_HOSTFILE", what, where=where, found=found, fix=fix)
