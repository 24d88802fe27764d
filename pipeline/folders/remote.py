"""Files of a bucket or web server, fetched whole and checked, through obstore (extra `cloud`)."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from clipwright.pipeline.core.errors import ClipwrightError

T = TypeVar("T")
SCHEMES = ("s3", "gs", "http", "https")
CONNECT, REQUEST = "10s", "60s"  # time-outs: to be connected, and for a request of at most PART bytes
PART = 16 << 20
PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0)  # seconds before each new try
# Obstore's errors that another try would meet again; the last is a server's that does not answer a range of bytes.
FINAL = ("NotFoundError", "PermissionDeniedError", "UnauthenticatedError", "NotSupportedError")


def is_remote(place: str) -> bool:
    """Whether a place is an address and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place) is not None


def fetch(address: str) -> bytes:
    """A small file. Raises E_EXTRA, E_REMOTE."""
    store, name = _open(address)
    return _patiently(lambda: bytes(_obstore().get(store, name).bytes()), address)


def fetch_known(address: str, sha256: str) -> bytes:
    """A small file of known content. Raises E_EXTRA, E_REMOTE, E_DATA_HASH."""
    for _ in range(2):
        data = fetch(address)
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
    raise _changed(address)


def fetch_shard(address: str, path: Path, size: int, sha256: str) -> None:
    """A shard, part by part, so that a lost connection costs one part; hash checked before it has its final name."""
    store, name = _open(address)
    staged = path.with_name(path.name + ".partial")
    try:
        for _ in range(2):
            made = hashlib.sha256()
            with staged.open("wb") as file:
                for start in range(0, size, PART):
                    length = min(PART, size - start)
                    data = _patiently(lambda s=start, n=length: _range(store, name, s, n), address)
                    made.update(data)
                    file.write(data)
            if made.hexdigest() == sha256:
                staged.replace(path)
                return
    finally:
        with suppress(OSError):
            staged.unlink()
    raise _changed(address)


def reach(address: str) -> None:
    """E_EXTRA, E_REMOTE for an address that cannot be opened; whether it is there and ours is seen later."""
    _store(address)


def holds(address: str, data: bytes) -> bool:
    """Whether a file is there and is `data`."""
    store, name = _open(address)
    try:
        return bytes(_obstore().get(store, name).bytes()) == data
    except Exception:  # missing, by as many kinds of error as there are stores: writing it will say what is wrong
        return False


def upload(path: Path, address: str) -> None:
    """Writes a file, whole or not at all. Raises E_EXTRA, E_REMOTE."""
    store, name = _open(address)
    _patiently(lambda: _obstore().put(store, name, path), address)


def shown(address: str) -> str:
    """An address without what may be secret in it: a user's name and password, a signature."""
    return re.sub(r"//[^/@\s]*@", "//", re.sub(r"\?\S*", "", address))


def _obstore() -> Any:
    import obstore  # noqa: PLC0415  an extra that only remote shards need

    return obstore


@lru_cache(maxsize=64)
def _store(base: str) -> Any:
    if importlib.util.find_spec("obstore") is None:
        raise ClipwrightError(
            "E_EXTRA",
            "remote shards without the extra for them",
            where=shown(base),
            found="the package obstore is not installed",
            fix="pip install 'clipwright[cloud]'",
        )
    scheme = base.partition("://")[0].lower()
    if scheme not in SCHEMES or "@" in base.partition("://")[2] or "?" in base:
        raise ClipwrightError(
            "E_REMOTE",
            "an address that is not read",
            where=shown(base),
            found=f"it starts with {scheme}://, or holds a password or a query; {', '.join(SCHEMES)} are read",
            fix="name bucket and prefix alone; credentials come from the environment",
        )
    from obstore.store import from_url  # noqa: PLC0415

    plain = scheme == "http" or any(
        value.startswith("http://") for name, value in os.environ.items() if name.startswith("AWS_ENDPOINT_URL")
    )
    options: Any = {"allow_http": plain, "connect_timeout": CONNECT, "timeout": REQUEST}
    try:
        # Tried again here, not there, where an answer that breaks off is not.
        return from_url(base, client_options=options, retry_config={"max_retries": 0})
    except Exception as error:  # of obstore's own kinds, one a store
        raise _unreachable(base, error) from None


def _open(address: str) -> tuple[Any, str]:
    base, _, name = address.rpartition("/")
    return _store(base), name


def _range(store: Any, name: str, start: int, length: int) -> bytes:
    data = bytes(_obstore().get_range(store, name, start=start, length=length))
    if len(data) != length:
        raise ConnectionError(f"{len(data)} of {length} bytes")
    return data


def _patiently(get: Callable[[], T], address: str) -> T:
    """What `get` gives, tried again after pauses; what is not there, or not ours to read, is not tried again."""
    for pause in (*PAUSES, None):
        try:
            return get()
        except Exception as error:  # of obstore's own kinds
            final = type(error).__name__ in FINAL
            # A missing file is FileNotFoundError in some of obstore's stores.
            if pause is None or final or isinstance(error, FileNotFoundError):
                raise _unreachable(address, error) from None
            time.sleep(pause)
    raise AssertionError


def _unreachable(address: str, error: Exception) -> ClipwrightError:
    said = shown((str(error).splitlines() or [type(error).__name__])[0])[:300]
    return ClipwrightError(
        "E_REMOTE",
        "a remote file that cannot be fetched or written",
        where=shown(address),
        found=said,
        fix="check the address, the network and the credentials in the environment, and run again",
    )


def _changed(address: str) -> ClipwrightError:
    return ClipwrightError(
        "E_DATA_HASH",
        "a remote file that is not what its manifest says",
        where=shown(address),
        found="its size or sha256 is another, twice",
        fix="upload the dataset folder again, the manifest last",
    )
